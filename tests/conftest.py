"""Fixtures for every test: where real data lies, and tiny models of each family."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from .standing_by import StandingBy, possible

# Several test processes share the cores, and so do the workers that they start: threads that spin while they wait
# for a core that another has cost ten times what they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a GPU Triton interprets its kernels. It reads this when it is imported, which transformers does early.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples everywhere, and no limit on the time of one: a process may stand still for seconds.
settings.register_profile("ours", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ours")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real preference data. Skips where it is absent; a CI that sets the variable must have it."""
    named = os.environ.get("PLAUDIT_SHARED_DATA")
    path = Path(named) if named else ROOT.parent / "shared" / "data"
    if not path.is_dir():
        assert not named, f"PLAUDIT_SHARED_DATA names {path}, which is not there"
        pytest.skip(f"no real data at {path}; set PLAUDIT_SHARED_DATA")
    return path


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """`with full_disk(n)` no file of this process becomes longer than n bytes, as under a quota."""
    import resource

    @contextmanager
    def limited(most: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        try:
            yield
        finally:  # at once: the tests' own output may go to a file
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> None:
    """Kernels that are interpreted in this process take half as long."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from .quick_interpreter import install

        install()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`kernels("triton")`, and operations from then on are those of that implementation."""
    from plaudit_kernels import select

    def use(implementation: str) -> None:
        monkeypatch.setenv("PLAUDIT_KERNELS", implementation)
        select.cache_clear()

    yield use
    monkeypatch.undo()
    select.cache_clear()


@pytest.fixture
def fused(kernels: Callable[[str], None]) -> Callable[[], None]:
    """Call it, and operations on the CPU from then on are fused kernels in Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is a GPU: the interpreter is off")
    return lambda: kernels("triton")


@pytest.fixture
def rowwise_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies tiles by numpy, whose libraries on some machines give a row other bits at another
    place of its tile. Row by row they do not: what is left is what the kernel decides."""
    import numpy as np

    def matmul(a: Any, b: Any, dtype: Any = None) -> Any:
        return np.stack([np.dot(row.astype(dtype), b.astype(dtype)) for row in a])

    monkeypatch.setattr(np, "matmul", matmul)


@pytest.fixture(scope="session")
def write_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`write_base("qwen3")` is a directory with a tiny untrained base of that family: configuration and tokenizer."""
    from transformers import AutoConfig

    made: dict[str, Path] = {}

    def write(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(f"base-{family}")
            _write_tokenizer(made[family], family)
            AutoConfig.for_model(family, **SHAPES[family]).save_pretrained(made[family])
        return made[family]

    return write


@pytest.fixture(scope="session")
def reward_model_dir(
    write_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`reward_model_dir("qwen3")` is a saved reward model of that family with random weights and its contract."""
    from plaudit_model.reward_model import RewardModel

    made: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in made:
            model = RewardModel.from_base(write_base(family), seed=3)
            _spread(model)
            made[family] = tmp_path_factory.mktemp("models") / family
            model.save(made[family], model.contract)
        return made[family]

    return save


@dataclass(frozen=True)
class Running:
    """A `plaudit serve` that is ready. `said` is what it printed, `log` is where its log lines go."""

    url: str
    process: Any
    said: str
    log: Path

    def end(self) -> int:
        """Ask it to leave; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def hosts(self) -> list[int]:
        """The process of each model that forks its workers."""
        return _children(self.process.pid)

    def workers(self) -> list[int]:
        """The processes that compute."""
        return [worker for host in self.hosts() for worker in _children(host)]

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """The workers compute nothing meanwhile: what they were given stays in flight, the rest in the queue."""
        workers = self.workers()
        assert workers
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        try:
            yield
        finally:
            for worker in workers:
                with suppress(ProcessLookupError):  # one that an earlier test has ended may be collected only now
                    os.kill(worker, signal.SIGCONT)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="session")
def standing_by() -> Iterator[StandingBy]:
    """Where servers and tests take the first host of workers from."""
    standing = StandingBy()
    yield standing
    standing.close()


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Callable[..., Running]]:
    """`serve(MODEL, "--option", ..., VARIABLE=value)` runs the real command on a free port until the tests end. With
    `alone` it starts all of its processes itself, as everywhere but here."""
    started: list[Running] = []

    def run(*arguments: str | Path, alone: bool = False, **environment: str) -> Running:
        log = tmp_path_factory.mktemp("serve") / "log"
        command = ["serve", "--port", "0", *map(str, arguments)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
        with log.open("w") as errors:
            if possible() and not alone:
                process: Any = request.getfixturevalue("standing_by").serve(command, environment, errors.fileno())
            else:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-c", "from plaudit.cli import main; main()", *command],
                    stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
                )  # fmt: skip
        said = ""
        while line := process.stdout.readline():
            said += line
            if line.startswith("ready: "):
                started.append(Running(line.split()[1], process, said, log))
                return started[-1]
        process.stdout.close()
        raise AssertionError(f"exit code {process.wait()}: {said}{log.read_text()}")

    yield run
    for running in started:
        running.process.kill()
        running.process.wait()
        running.process.stdout.close()


# A process that has imported everything and forks one child for each command line: a training run then starts in
# a moment, in a process of its own that can be killed. It runs single-threaded until it forks.
_COMMANDS = """
import json, os, runpy, sys
import peft, torch, torch.utils.tensorboard
import plaudit_training.run, plaudit_training.quality, plaudit_training.starter_fit, plaudit_server.cli
from plaudit.cli import main
torch.set_num_threads(1)
runpy.run_path(sys.argv[1])["load"]()
for line in sys.stdin:
    arguments, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
        sys.argv = ["plaudit", *arguments]
        try:
            main()
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code)  # taking torch down in good order costs a second
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Commands:
    """Runs `plaudit` command lines, one at a time, each in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMANDS, str(Path(__file__).with_name("standing_by.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=os.environ | {"PLAUDIT_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"},
        )

    def start(self, *arguments: str | Path) -> int:
        """The process id of the command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([[str(a) for a in arguments], str(self.folder)]) + "\n")
        self._process.stdin.flush()
        return self._number()

    def wait(self) -> int:
        """Its exit code, negative for a signal."""
        return self._number()

    def run(self, *arguments: str | Path) -> int:
        self.start(*arguments)
        return self.wait()

    def stopped(self, *arguments: str | Path, out: Path, steps: int) -> int:
        """The exit code of a run that is asked to stop once it has taken so many steps. One that was done before the
        signal came begins again: the test may have stood still meanwhile."""
        while True:
            process, metrics = self.start(*arguments, "--out", out), out / "metrics.jsonl"
            while not metrics.exists() or metrics.read_bytes().count(b"\n") < steps:
                time.sleep(0.001)
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
            if code := self.wait():
                return code
            shutil.rmtree(out)

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def close(self) -> None:
        self._process.communicate()

    def _number(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


@pytest.fixture(scope="session")
def plaudit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """The `plaudit` command, in a directory and with a PLAUDIT_HOME of its own."""
    commands = Commands(tmp_path_factory.mktemp("plaudit"))
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def foreign_dir(write_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`foreign_dir("distilbert")` is a checkpoint of transformers' own making: no contract, scores well apart."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    made: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("foreign") / family
            shutil.copytree(write_base("bert"), made[family])
            shape = {"pad_token_id": 0, "num_labels": 1, **FOREIGN_SHAPES[family]}
            torch.manual_seed(0)
            module = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **shape))
            _spread(SimpleNamespace(module=module))
            module.save_pretrained(made[family])
        return made[family]

    return save


@pytest.fixture(scope="session")
def served_url(serve: Callable[..., Running], reward_model_dir: Callable[[str], Path]) -> Callable[[str], str]:
    """`served_url("qwen3")` is where a reward model of that family is served, to all who only ask for scores."""
    return functools.cache(lambda family: serve(reward_model_dir(family)).url)


_SIZES = {
    "vocab_size": 700, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 640,
}  # fmt: skip
FOREIGN_SHAPES: dict[str, dict[str, object]] = {  # heads that are not computed here
    "modernbert": {**_SIZES, "classifier_pooling": "mean", "cls_token_id": 3, "sep_token_id": 4, "bos_token_id": 3,
                   "eos_token_id": 4},
}  # fmt: skip

_COMMON = {
    "vocab_size": 700, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 640, "pad_token_id": 0,
}  # fmt: skip
_DECODER = {**_COMMON, "num_key_value_heads": 2, "eos_token_id": 2, "bos_token_id": None}
_GEMMA = {**_DECODER, "head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 24}
_TWO = {**_DECODER, "num_hidden_layers": 2}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
SHAPES: dict[str, dict[str, object]] = {
    "llama": _TWO,
    "mistral": {**_DECODER, "sliding_window": 40},
    "qwen2": {**_DECODER, "use_sliding_window": True, "sliding_window": 24, "layer_types": _SLIDING},
    "qwen3": {**_TWO, "head_dim": 16},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 1.5, "layer_types": _SLIDING},
    "gemma3_text": {**_GEMMA, "layer_types": _SLIDING},
    "olmo2": _TWO,
    "olmo3": {**_TWO, "sliding_window": 24, "layer_types": _SLIDING[:2]},
    "phi3": {**_TWO, "sliding_window": 40},
    "gpt_neox": {**_TWO, "rotary_pct": 0.25},
    "stablelm": {**_TWO, "partial_rotary_factor": 0.5},
    "starcoder2": {**_TWO, "sliding_window": 24},
    "gpt2": {"vocab_size": 700, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 640, "pad_token_id": 0,
             "eos_token_id": 2, "bos_token_id": None},
    "deepseek_v3": {**_TWO, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
                    "qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": 8, "n_group": 1, "topk_group": 1,
                    "first_k_dense_replace": 1, "n_routed_experts": 6, "num_experts_per_tok": 2,
                    "moe_intermediate_size": 48},
    "mixtral": {**_TWO, "intermediate_size": 48, "num_local_experts": 32, "router_jitter_noise": 0.1},
    "qwen2_moe": {**_TWO, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
                  "shared_expert_intermediate_size": 48},
    "gpt_oss": {**_TWO, "head_dim": 16, "sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "jamba": {**_TWO, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8, "use_mamba_kernels": False},
    "electra": {**_SIZES, "pad_token_id": 0, "embedding_size": 32},
    "distilbert": {"vocab_size": 700, "dim": 64, "hidden_dim": 160, "n_layers": 2, "n_heads": 4, "pad_token_id": 0,
                   "max_position_embeddings": 640},
    "deberta-v2": {**_SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0,
                   "pad_token_id": 0},
    "bert": _COMMON,
    "roberta": {**_COMMON, "pad_token_id": 1, "type_vocab_size": 1},
    "modernbert": {**_COMMON, "global_attn_every_n_layers": 2, "local_attention": 48, "cls_token_id": 3,
                   "sep_token_id": 4, "bos_token_id": 3, "eos_token_id": 4},
}  # fmt: skip


def _spread(model: object) -> None:
    """Larger weights than an initialisation has, so that scores differ by more than rounding."""
    import torch

    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.module.parameters():  # type: ignore[attr-defined]
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)


def _write_tokenizer(directory: Path, family: str) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from plaudit_model.infer import ENCODERS
    from plaudit_model.template import CHATML

    words = ["Human: what is the best way to learn a language?", "Assistant: practise daily, read, and speak."]
    special = ["[PAD]", "<|im_start|>", "<|im_end|>", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(words * 20, trainer)
    config: dict[str, object] = {
        "pad_token": "[PAD]",
        "model_max_length": 512,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if family in ENCODERS:
        config |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
        if family == "roberta":  # no token types, and two tokens between the texts
            config["model_input_names"] = ["input_ids", "attention_mask"]
            tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", 4), ("[CLS]", 3), add_prefix_space=False)
        else:
            config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
            tokenizer.post_processor = processors.TemplateProcessing(
                single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
            )
    else:
        config |= {"eos_token": "<|im_end|>", "chat_template": CHATML}
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


BUDGET_SECONDS = {
    "kernels": 135, "model": 85, "training": 110, "server": 150, "clients": 80, "contract": 90, "loadtests": 10,
    "loops": 55, "compose": 20, "benchmarks": 45,
}  # fmt: skip
_spent: dict[str, float] = {}


LONG = (
    "sm90_attention", "gpu_dry_run", "attention_triton", "onnx", "sm90_rows", "serve_cli", "end_to_end", "train_cli",
    "worker", "lora", "run", "lanes", "engine", "resume", "gluon_attention", "reward_model", "best_of_n", "served",
)  # fmt: skip
"""Modules of ten seconds and more: they begin first, so that no process still has one when the other is done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long by design has its own limit, however the tests are started and whatever else the machine does."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.timeout(3600))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    package = report.nodeid.split("/")[1] if report.nodeid.count("/") > 1 else "other"
    _spent[package] = _spent.get(package, 0.0) + report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Seconds a package took, beside its budget: the suite must stay short enough to be run."""
    terminalreporter.section("time by package")
    for package, seconds in sorted(_spent.items(), key=lambda entry: -entry[1]):
        budget = BUDGET_SECONDS.get(package, 10)
        note = "  OVER BUDGET: make it faster or mark the long ones `soak`" if seconds > budget else ""
        terminalreporter.write_line(f"{package:10} {seconds:7.1f} s of {budget} s{note}")
