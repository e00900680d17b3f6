"""Everything before the first step: data, base, preflight, encoding, and a configuration with nothing left open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plaudit_model import contract as contracts
from plaudit_model import starter
from plaudit_model.adapter import require_peft
from plaudit_model.heads import final_layer
from plaudit_model.records import Record
from plaudit_model.reward_model import RewardModel
from plaudit_model.store import weights_identity

from . import preflight, sources, trackers
from .batches import Encoding, default_batch_pairs, encode_records, fingerprint
from .config import RunConfig
from .errors import BadRows, DataError
from .preflight import ModelFacts, PreflightReport
from .read_options import READ
from .sources import ReadOptions, ReadReport
from .split import split_by_conversation

SCRATCH = "starter-scratch"
"""The base that is made on the spot: the starter's shape and tokenizer, untrained."""

LEARNING_RATES: tuple[tuple[float, float, str], ...] = (
    (1e9, 5e-6, "from 1B parameters on published full fine-tunes use 1e-6 to 1e-5"),
    (1e8, 2e-5, "100M to 1B parameters, as encoders of this size are tuned"),
    (2e7, 5e-5, "20M to 100M parameters, as small encoders are tuned"),
    (0, 3e-4, "under 20M parameters: so small a model is trained rather than tuned"),
)

LORA_RATE = 10
"""How much higher the rate of adapters is (TRL's guide, after Schulman et al. 2025, "LoRA without regret")."""


@dataclass(frozen=True, eq=False)
class Data:
    """Records on both sides, and what became of every row that was read."""

    train: list[Record]
    held_out: list[Record]
    reports: dict[str, ReadReport]

    def facts(self) -> dict[str, Any]:
        """What a model remembers of its data."""
        return {
            "fingerprint": fingerprint(self.train),
            "records": len(self.train),
            "eval_fingerprint": fingerprint(self.held_out),
            "eval_records": len(self.held_out),
            "reports": {side: report.to_json() for side, report in self.reports.items()},
        }


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run that is ready to begin. `config` is resolved; `reasons` say why, by dotted path. `base` and `data`
    are what the model will remember of where it comes from."""

    model: RewardModel
    config: RunConfig
    reasons: dict[str, str]
    train: Encoding
    held_out: Encoding
    reports: dict[str, ReadReport]
    preflight: PreflightReport
    base: dict[str, Any]
    data: dict[str, Any]

    @property
    def frozen(self) -> dict[str, Any]:
        """What tells the base from others where it is frozen, so that checkpoints do not hold it."""
        return {name: self.base[name] for name in ("config", "weights")} if self.config.lora.r else {}

    @property
    def fingerprint(self) -> str:
        """Of the examples that are trained on and evaluated on."""
        return f"{self.data['fingerprint']}:{self.data['eval_fingerprint']}"


def check_inputs(config: RunConfig) -> None:
    """What can be known at once, before anything is spent on it: raises DataError for a file that cannot be read,
    ConfigurationError for a tracker that is not installed."""
    trackers.check(config.report_to)
    if config.lora.r:
        require_peft()
    if not config.data.train:
        raise DataError("nothing to train on: name at least one file, or `starter`")
    sources.check_files([*config.data.train, *config.data.eval])


def prepare(config: RunConfig, out: Path, *, scratch: Path) -> Prepared:
    """Read, split, load, check, encode, resolve. Writes nothing but lists of bad rows, in `out`, and a base that is
    made on the spot, in `scratch`.

    Raises DataError and its kind for the data, ModelError for the base, OptionError and ConfigurationError.
    """
    data = read_data(config, out)
    model = RewardModel.from_base(
        _base(config, scratch),
        seed=config.seed,
        max_length=config.model.max_length,
        dtype="float32",
        device=config.model.device,
    )
    if config.lora.r:
        lora = {name: value for name, value in vars(config.lora).items() if name != "save"}
        model.adapt(config.model.base, seed=config.seed, **lora)
    checked = preflight.inspect(data.train, data.held_out, model.encoder, _facts(model))
    checked.raise_for_problems(frozenset(config.data.allow))
    train, held_out = (_encode(records, model, config) for records in (data.train, data.held_out))
    pairs = sum(example.pairs for example in train.examples)
    resolved, reasons = resolve(config, device=model.device, parameters=model.parameters, pairs=pairs)
    facts = data.facts() | {"truncated": train.truncated, "unusable": train.reasons()}
    return Prepared(
        model, resolved, reasons, train, held_out, data.reports, checked, _base_facts(config.model.base, model), facts
    )


def resolve(config: RunConfig, *, device: str, parameters: int, pairs: int) -> tuple[RunConfig, dict[str, str]]:
    """The configuration without None and `auto`, and why each was chosen, by dotted path."""
    optim, model, reasons = config.optim, config.model, dict[str, str]()
    if optim.learning_rate is None:
        rate, why = learning_rate(parameters, adapters=config.lora.r > 0)
        optim = replace(optim, learning_rate=rate)
        reasons["optim.learning_rate"] = f"{parameters:,} parameters: {why}"
    if optim.batch_pairs is None:
        optim = replace(optim, batch_pairs=default_batch_pairs(pairs, optim.num_train_epochs))
        reasons["optim.batch_pairs"] = f"{pairs:,} comparisons"
    if model.dtype == "auto":
        model = replace(model, dtype="bfloat16" if device.startswith("cuda") else "float32")
        reasons["model.dtype"] = f"on {device}"
    return replace(config, optim=optim, model=model), reasons


def learning_rate(parameters: int, *, adapters: bool = False) -> tuple[float, str]:
    """The default peak rate for a model of that size, and why."""
    rate, why = next((rate, why) for least, rate, why in LEARNING_RATES if parameters >= least)
    if adapters:
        return round(LORA_RATE * rate, 9), f"{why}; {LORA_RATE} times {rate:g}, as TRL advises for adapters"
    return rate, why


def read_data(config: RunConfig, out: Path) -> Data:
    """The two sides: from files of their own, or by conversation."""
    data = config.data
    train, report = sources.load(data.train, _options(config, data.strict_ids, out / "quarantine.jsonl"))
    if data.eval:
        options = _options(config, data.eval_strict_ids, out / "quarantine-eval.jsonl")
        held_out, other = sources.load(data.eval, options)
        return Data(train, held_out, {"train": report, "eval": other})
    if data.eval_share == 0:
        return Data(train, [], {"train": report})
    return Data(*split_by_conversation(train, data.eval_share, config.seed), {"train": report})


def _options(config: RunConfig, strict_ids: str | None, quarantine: Path) -> ReadOptions:
    said = {name: getattr(config.data, name) for name in READ} | {
        "strict_ids": Path(strict_ids) if strict_ids else None
    }
    return ReadOptions(**said, quarantine=quarantine, starter_records=config.data.starter_records, seed=config.seed)


def _base(config: RunConfig, scratch: Path) -> str:
    """The base's name; one that is made on the spot is made here, in `scratch`."""
    if config.model.base != SCRATCH:
        return config.model.base
    starter.write_base(scratch, config.seed)
    return str(scratch)


def _facts(model: RewardModel) -> ModelFacts:
    return ModelFacts(
        pad_token_id=model.pad_token_id,
        eos_token_ids=model.eos_token_ids,
        outputs=final_layer(model.module).out_features,
        pools_by_pad=model.contract.pooling == "last",
        shares_prompt=model.shares_prompt,
    )


def _encode(records: Sequence[Record], model: RewardModel, config: RunConfig) -> Encoding:
    """Raises BadRows if more records than tolerated cannot be encoded: a row that does not fit is a bad row."""
    encoding = encode_records(records, model.encoder)
    if len(encoding.unusable) > config.data.max_bad_rows:
        raise BadRows(
            f"of {len(records):,} records {encoding.complaint()}; {config.data.max_bad_rows} may be (--max-bad-rows), "
            "or raise --max-length"
        )
    if records and not encoding.examples:
        raise DataError(f"no record can be encoded: {encoding.complaint()}")
    return encoding


def _base_facts(name: str, model: RewardModel) -> dict[str, Any]:
    """Which base it was: its revision if it has a contract, and the hashes of its configuration and weights."""
    directory = model.directory
    has_contract = (directory / contracts.FILE_NAME).is_file()
    return {
        "name": name,
        "revision": contracts.read(directory).revision() if has_contract else None,
        **weights_identity(directory),
    }
