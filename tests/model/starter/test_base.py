"""The base directory: what plain transformers makes of it, and where plaudit keeps its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from plaudit_model.starter import directory, home, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("starter") / "new" / "base"
    write_base(path, seed=0)
    return path


def test_home_is_the_environment_s_or_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLAUDIT_HOME", str(tmp_path))
    assert home() == tmp_path
    assert directory() == tmp_path / "starter"
    monkeypatch.delenv("PLAUDIT_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    assert home() == tmp_path / "user" / ".cache" / "plaudit"


def test_the_directory_holds_no_weights(base: Path) -> None:
    assert sorted(p.name for p in base.iterdir()) == ["config.json", "tokenizer.json", "tokenizer_config.json"]


def test_writing_is_deterministic_and_replaces(base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("of another base")
    write_base(tmp_path, seed=0)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in base.iterdir()}


def test_config_and_tokenizer_agree(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    settings = json.loads((base / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    assert config["vocab_size"] == tokenizer.get_vocab_size() <= 4096
    for name in ("pad", "bos", "eos"):
        assert config[f"{name}_token_id"] == tokenizer.token_to_id(settings[f"{name}_token"])
    assert config["pad_token_id"] != config["eos_token_id"]


def test_transformers_loads_it_as_a_reward_model_of_three_million_parameters(base: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(base)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    assert type(model).__name__ == "Qwen3ForSequenceClassification"
    assert model.score.weight.shape == (1, 192)
    assert 2.5e6 < sum(p.numel() for p in model.parameters()) < 3.5e6


def test_transformers_renders_and_encodes_as_the_plain_tokenizer_does(base: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(base)
    ours = Tokenizer.from_file(str(base / "tokenizer.json"))
    messages = [{"role": "user", "content": "What is 3 + 5?"}, {"role": "assistant", "content": "8 \n ok"}]
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nWhat is 3 + 5?<|im_end|>\n<|im_start|>assistant\n8 \n ok<|im_end|>\n"
    assert theirs(text)["input_ids"] == ours.encode(text).ids
    assert theirs.decode(ours.encode(text).ids) == text
    assert (theirs.pad_token, theirs.eos_token) == ("<|pad|>", "<|im_end|>")


def test_nothing_here_imports_torch_or_transformers(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from plaudit_model import starter;"
        "starter.write_base(Path(sys.argv[1]), 0);"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program, str(tmp_path)], check=False)
    assert done.returncode == 0
