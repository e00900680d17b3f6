"""The configuration of a training run: frozen dataclasses; `plaudit._trees` reads and writes them.

Names are TRL's where TRL has one. Every field says what it does and why its default is what it is; `--help`
and the table that a run prints first take the text from here. None means "resolved when the run starts";
the `run.toml` that a run leaves holds the resolved value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from plaudit._trees import check_ranges, leaves, option
from plaudit.errors import ConfigurationError
from plaudit_model.adam import AdamConfig


@dataclass(frozen=True)
class DataConfig:
    """What is read, and what of it is held out."""

    train: tuple[str, ...] = option((), "files to train on; `starter` is the built-in generator")
    eval: tuple[str, ...] = option((), "files to evaluate on; none: a share of the training data is held out")
    eval_share: float = option(
        0.05,
        "share of the conversations held out; whole conversations, so that no prompt is on both sides",
        low=0,
        high=0.5,
    )
    format: str = option("auto", "format of the files; auto: by their columns")
    columns: dict[str, str] = option({}, "our column = theirs, for files that name them differently")
    labels: dict[str, str] = option({}, "their label = a, b or tie, for files that name the winner otherwise")
    strict_ids: str | None = option(None, "file of ids, one a line: only training rows with these are used")
    eval_strict_ids: str | None = option(None, "the same for the files to evaluate on")
    ties: Literal["drop", "half", "keep"] = option(
        "half", "comparisons without a winner: train towards 0.5, drop them, or keep their votes"
    )
    max_bad_rows: int = option(0, "bad rows to tolerate; 0: look at a bad row before training, not after", low=0)
    allow: tuple[str, ...] = option((), "preflight problems that may pass, by their code")
    starter_records: int = option(2000, "how many records the built-in generator gives", low=1)


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    base: str = option("starter", "directory or Hub id to start from; `starter` is the bundled small model")
    max_length: int = option(2048, "tokens of prompt and response; a longer prompt loses its start, counted", low=1)
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of the forward pass; weights and optimiser are fp32. auto: bfloat16 on CUDA, float32 on CPU"
    )
    device: str = option("auto", "cpu, cuda, cuda:1...; auto: cuda if there is one")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685) on a frozen base; the head is always trained whole."""

    r: int = option(0, "rank of the adapters, 16 say; 0: none, all weights are trained", low=0)
    alpha: int = option(32, "adapters are scaled by alpha / r", low=1)
    dropout: float = option(
        0.0, "dropout before the adapters; 0: a pair's responses meet the same network", low=0, high=0.9
    )
    target_modules: tuple[str, ...] = option(
        ("all-linear",), "layers of the trunk that are adapted: ends of their names, as q_proj,v_proj, or all-linear"
    )
    use_rslora: bool = option(False, "scale by alpha / sqrt(r) instead (arXiv 2312.03732): for high ranks")
    save: Literal["merged", "adapter"] = option(
        "merged", "what is written: a whole checkpoint, or the adapter alone, which names its base and needs it"
    )


@dataclass(frozen=True)
class LossConfig:
    """Bradley-Terry and what is added to it."""

    center_rewards_coefficient: float = option(
        0.01, "pulls scores towards 0, which comparisons leave free (0.01 is that of arXiv 2312.09244)", low=0
    )
    label_smoothing: float = option(
        0.0, "probability that a label is wrong; 0: plain Bradley-Terry, which ablations did not beat", low=0, high=0.5
    )
    labels: Literal["majority", "votes"] = option("majority", "train towards the winner, or vote shares")
    weight: Literal["comparison", "record"] = option(
        "comparison", "what counts the same: each comparison, or each prompt (as in InstructGPT)"
    )


@dataclass(frozen=True)
class OptimConfig(AdamConfig):
    """AdamW, its schedule, and the size of a step."""

    learning_rate: float | None = option(
        None,
        "peak learning rate; default by size: 5e-6 from 1B parameters, 2e-5 from 100M, 5e-5 from 20M, else 3e-4; ten "
        "times that with adapters",
        low=0,
        high=1,
    )
    head_learning_rate: float | None = option(None, "that of the head alone; default: the same", low=0, high=1)
    num_train_epochs: int = option(1, "passes over the data; reward models overfit from the second on", low=1)
    batch_pairs: int | None = option(
        None, "comparisons in an optimiser step; default 128, down to 8 where a run would have under 50 steps", low=1
    )
    token_budget: int = option(8192, "packed tokens of one forward pass: memory and speed, not the result", low=1)
    gradient_checkpointing: bool = option(
        False, "compute each layer once more in the backward pass instead of keeping it: less memory, the same result"
    )
    min_lr_ratio: float = option(0.1, "where the cosine ends, as a share of the peak", low=0, high=1)
    max_skipped_steps: int = option(
        5, "steps skipped because loss or gradient is not finite; one more stops the run", low=0
    )


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during and after training."""

    every: int = option(0, "evaluate every so many steps; 0: at the end only", low=0)
    patience: int = option(0, "stop after so many evaluations without a better one; 0: never", low=0)
    metric: Literal["nll", "accuracy"] = option("nll", "what decides; nll moves before accuracy does")
    cluster: Literal["conversation", "response"] = option(
        "conversation", "what is resampled for intervals: rows of one conversation are not independent"
    )
    bootstrap: int = option(1000, "resamples; 0: no intervals", low=0)


@dataclass(frozen=True)
class CheckpointConfig:
    """What survives a kill."""

    every: int = option(0, "save every so many steps; 0: as often as keeps saving under 2% of the time", low=0)
    keep: int = option(2, "checkpoints kept besides the best; at least 2: a damaged one needs a predecessor", low=2)


@dataclass(frozen=True)
class RunConfig:
    """One training run. Where it is written (`--out`) is not part of it."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    evaluation: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    seed: int = option(0, "of a fresh head, the split and the order of the data", low=0, high=2**63 - 1)
    report_to: tuple[str, ...] = option(
        ("tensorboard",), "tensorboard, wandb, mlflow: besides metrics.jsonl, where installed"
    )
    label: str = option("", "a few words for the model's contract")

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.lora.r and self.lora != LoraConfig():
            raise ConfigurationError(
                "lora.r is 0, so there are no adapters that its other options could be of: set --lora-r"
            )
        if self.evaluation.patience and not self.evaluation.every:
            raise ConfigurationError(
                "evaluation.patience needs evaluation.every (--eval-every): nothing is evaluated else"
            )
        if self.data.eval_strict_ids and not self.data.eval:
            raise ConfigurationError(
                "data.eval_strict_ids needs data.eval (--eval): what is held out is of the training rows"
            )
        if unknown := sorted(set(self.report_to) - {"tensorboard", "wandb", "mlflow"}):
            raise ConfigurationError(f"report_to: expected tensorboard, wandb or mlflow, got {unknown[0]!r}")


HELP: Mapping[str, str] = {path: field.metadata["help"] for path, field, _ in leaves(RunConfig)}
"""The sentence that explains the field at a dotted path."""
