"""From a name to a directory, and from a directory to its contract. Imports no torch.

A checkpoint without `reward.json` gets an inferred contract, from its configuration files alone. What cannot
be known from them is refused with the reason, never guessed.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from . import contract as contracts
from .contract import ADAPTER_FILE, Head, RewardContract, Serving, Template
from .errors import AdapterError, CheckpointError, ContractError
from .store import hash_files, weights_identity
from .template import PAIR_PROMPT, compile_source, writes_date

logger = logging.getLogger("plaudit.model")

ENCODERS = frozenset({"bert", "roberta", "modernbert", "deberta-v2", "electra", "xlm-roberta", "distilbert"})
"""Model types that read a text pair and pool their first token."""


TOKENIZER_FILE = "tokenizer.json"

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_GRAPH_FILES = ["model.onnx", "model.onnx.data"]  # of an exported model; other graphs of a repository are not ours
_NO_LIMIT = 1 << 20
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(name: str | Path, revision: str | None = None) -> Path:
    """The local directory of a model: a path, the word `starter`, or a Hub id (which is downloaded here, at
    `revision` if that is given).

    Raises CheckpointError if there is no such thing.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if str(name) == "starter":
        return _starter()
    if path.is_absolute() or str(name).startswith(".") or not _HUB_ID.fullmatch(str(name)):
        raise CheckpointError(f"there is no directory {name} (and a Hub id has the form owner/name)")
    return _download(str(name), revision)


def is_adapter(directory: Path) -> bool:
    """Whether the directory holds a PEFT adapter, an addition to the weights of a base that lies elsewhere."""
    return (directory / ADAPTER_FILE).is_file()


def base_of(directory: Path) -> Path:
    """The directory with the configuration and the whole weights: an adapter's base, else the directory itself. A
    base whose path is of another machine is looked for beside the adapter.

    Raises AdapterError for an adapter that is not a reward model's LoRA adapter, or whose base is not to be had.
    """
    if not is_adapter(directory):
        return directory
    settings = read_json(directory / ADAPTER_FILE)
    kind, task, name = (settings.get(key) for key in ("peft_type", "task_type", "base_model_name_or_path"))
    if kind != "LORA" or task not in ("SEQ_CLS", None) or settings.get("megatron_config"):
        raise AdapterError(f"{directory} is a {kind} adapter for {task}; what is read are LORA adapters for SEQ_CLS")
    if not name:
        raise AdapterError(f"{directory} does not name its base: set base_model_name_or_path in {ADAPTER_FILE}")
    beside = directory.absolute().parent / Path(name).name
    if Path(name).is_absolute() and not Path(name).is_dir() and beside.is_dir():
        logger.warning("%s is not there: the base of %s is taken to be %s", name, directory, beside)
        name = str(beside)
    try:
        base = resolve(name, settings.get("revision"))
    except CheckpointError as error:
        raise AdapterError(f"{directory} is an adapter of {name}, which is not to be had: {error}") from error
    if is_adapter(base):
        raise AdapterError(f"{directory} is an adapter of {name}, itself an adapter: merge that one first")
    return base


def check_base(directory: Path, contract: RewardContract) -> None:
    """Raise AdapterError unless an adapter's base is, byte for byte, the one that its contract's lineage names."""
    if is_adapter(directory) and contract.base != weights_identity(base := base_of(directory)):
        raise AdapterError(
            f"{base} is not the base that {directory} was trained on (sha256 differs): bring that one back"
        )


def tokenizer_home(directory: Path) -> Path:
    """The directory with the tokenizer's files: an adapter may leave them to its base."""
    return directory if (directory / TOKENIZER_FILE).is_file() else base_of(directory)


def contract_for(directory: Path) -> RewardContract:
    """The contract in `directory`, or one inferred from its configuration.

    Raises ContractError where the configuration does not say what a score is.
    """
    if (directory / contracts.FILE_NAME).is_file():
        contract = contracts.read(directory)
    else:
        contract = infer_contract(directory)
        logger.warning("%s has no reward.json; this contract was inferred: %s", directory, _summary(contract))
    if writes_date(contract.template.source):
        raise ContractError(
            "the chat template writes today's date, so scores would change overnight; save a contract with a fixed "
            f"date: plaudit info {directory} --save-contract --pin-date '26 Jul 2024'"
        )
    compile_source(contract.template.source)
    return contract


def infer_template(directory: Path) -> Template | None:
    """The chat template of a tokenizer directory, the pair rule of an encoder, or None."""
    config = read_json(base_of(directory) / "config.json")
    if config.get("model_type") in ENCODERS:
        return Template.of("pair", PAIR_PROMPT)
    home = tokenizer_home(directory)
    path = home / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else _tokenizer_template(home)
    return Template.of("chat", source) if source else None


def max_length(directory: Path) -> int:
    """The longest sequence that both the model's positions and its tokenizer admit."""
    config = read_json(base_of(directory) / "config.json")
    tokenizer = _read_optional(tokenizer_home(directory) / "tokenizer_config.json")
    limits = [config.get("max_position_embeddings"), tokenizer.get("model_max_length")]
    if "roberta" in config.get("model_type", "") and limits[0]:
        limits[0] -= (config.get("pad_token_id") or 0) + 1  # its first positions are taken by padding
    known = [int(limit) for limit in limits if isinstance(limit, (int, float)) and 0 < limit < _NO_LIMIT]
    if not known:
        raise ContractError(
            f"{directory} does not say how long a sequence may be (max_position_embeddings in config.json)"
        )
    return min(known)


def has_token_types(directory: Path) -> bool:
    """Whether a model tells the tokens of one text from those of another by their type. One that does not say may."""
    return int(_read_optional(base_of(directory) / "config.json").get("type_vocab_size", 2) or 0) > 1


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError if the file is missing or is something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        below = path.parent / "model"  # where `plaudit train` writes it in the folder of its run
        raise CheckpointError(f"{path} is missing" + f": name {below}?" * (below / path.name).is_file()) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return data


def infer_contract(directory: Path) -> RewardContract:
    """A contract from `config.json` and the tokenizer's files alone, with the hashes of all files: other weights
    are another revision. An adapter's base is noted in its lineage. Raises ContractError where the files do not say
    what a score is."""
    base = base_of(directory)
    config = read_json(base / "config.json")
    architecture = (config.get("architectures") or [""])[0]
    if base != directory and architecture:
        architecture = _classifier(architecture)
    if not architecture.endswith("ForSequenceClassification"):
        raise ContractError(
            f"{directory} is {architecture or 'of no stated architecture'}: it has no score head. Train one with "
            f"`plaudit train DATA --base {directory}`"
        )
    template = infer_template(directory)
    if template is None:
        raise ContractError(f"{directory} has no chat template, so it is unknown what it was trained to read")
    labels = config.get("id2label") or {str(i): "" for i in range(config.get("num_labels", 2))}
    if base == directory and len(labels) != 1:  # an adapter brings its own head; loading counts its outputs
        raise ContractError(
            f"{directory} has {len(labels)} outputs; which of them is the score? Write a reward.json that names them "
            "(its schema: plaudit info --schema)"
        )
    return RewardContract(
        architecture=architecture,
        template=template,
        max_length=max_length(directory),
        head=Head(),
        pooling="first" if template.kind == "pair" else "last",
        serving=Serving(dtype="bfloat16" if _dtype(config) == "bfloat16" else "float32"),
        files=hash_files(directory, _FILES),
        lineage={} if base == directory else {"base": {"name": str(base), **weights_identity(base)}},
    )


def _classifier(architecture: str) -> str:
    """The sequence classifier on the trunk of another architecture: `Qwen3ForCausalLM` has Qwen3's."""
    stem = re.sub(r"(For[A-Z]\w*|(LMHead)?Model)$", "", architecture)
    return f"{'Gemma3Text' if stem == 'Gemma3' else stem}ForSequenceClassification"


def _dtype(config: dict[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _tokenizer_template(directory: Path) -> str:
    value = _read_optional(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(value, list):  # several named templates; "default" is the one apply_chat_template takes
        value = {entry["name"]: entry["template"] for entry in value}.get("default")
    return value if isinstance(value, str) else ""


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _summary(contract: RewardContract) -> str:
    return (
        f"{contract.architecture}, {contract.template.kind} template {contract.template.sha256[:12]}, "
        f"{contract.pooling}-token pooling, at most {contract.max_length} tokens, raw logit as the score"
    )


def _starter() -> Path:
    from . import starter  # the generator of tasks is not needed to find other models

    directory = starter.directory()
    if not (directory / contracts.FILE_NAME).is_file():
        raise CheckpointError("the starter model is not fitted yet: run `plaudit train starter`")
    return directory


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*_FILES, *_GRAPH_FILES]))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        what = getattr(error, "strerror", None) or type(error).__name__
        absent = isinstance(error, RepositoryNotFoundError)
        why = "the Hub has no such model, or not for everybody" if absent else f"the Hub could not be reached ({what})"
        raise CheckpointError(f"there is no directory {name}, and as a Hub id it could not be had: {why}") from error
