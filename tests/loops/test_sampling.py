"""Samples of a local policy: a function of prompt, settings and index, whatever happened to the run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from plaudit import ConfigurationError, cli
from plaudit.bon import generate as generation
from plaudit.bon.samples import Sampling, sample_key
from plaudit_loops.sampling import LocalPolicy, draw

ENTRIES = {"bon": EntryPoint("bon", "plaudit.bon.cli:app", cli.GROUP)}
LOCAL = EntryPoint("torch", "plaudit_loops.sampling:LocalPolicy", generation.LOCAL_GROUP)


@pytest.fixture(scope="session")
def policy_dir(write_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random language model whose next token depends on what came before."""
    import shutil

    from transformers import AutoConfig, AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("policy") / "tiny"
    shutil.copytree(write_base("qwen3"), directory)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
        model.lm_head.weight[2] *= 3  # the end of text comes now and then
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def sample(policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """`sample(OUT, *options)` runs `bon generate` over five prompts and gives what the file then holds."""
    monkeypatch.setattr(generation, "entry_points", lambda group: [LOCAL])
    monkeypatch.chdir(tmp_path)
    prompts: list[Any] = ["one", "two two", [{"role": "user", "content": "three"}], "four", "five " * 30]
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))

    def call(out: str, *options: str) -> bytes:
        arguments = ("bon", "generate", "p.jsonl", "--policy", str(policy_dir), "--out", out, "--batch-size", "4")
        assert cli.run((*arguments, "--max-new-tokens", "12", *options), ENTRIES) == 0
        return Path(out).read_bytes()

    return call


def test_a_resumed_or_sharded_run_gives_the_same_samples(sample: Callable[..., bytes]) -> None:
    whole = sample("whole.jsonl", "--n", "6")
    rows = [json.loads(line) for line in whole.splitlines()]
    assert len(rows) == 30 and len({row["response"] for row in rows}) > 25
    lines = whole.splitlines(keepends=True)
    for kept in (0, 1, 5, 17, 29):  # killed between the blocks, within one, and in the middle of a line
        Path("out.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][: 7 * kept])
        assert sample("out.jsonl", "--n", "6") == whole
    for part in (0, 1):
        sample(f"{part}.jsonl", "--n", "3", "--shard", f"{part}/2")
        sample(f"{part}.jsonl", "--n", "6", "--shard", f"{part}/2")  # more samples later: the first ones stay
    assert cli.run(("bon", "merge", "1.jsonl", "0.jsonl", "--out", "merged.jsonl"), ENTRIES) == 0
    assert Path("merged.jsonl").read_bytes() == whole


def test_settings_make_other_samples(sample: Callable[..., bytes]) -> None:
    first, again, other = (sample(f"{seed}{n}.jsonl", "--seed", seed, "--n", "4") for n, seed in enumerate("334"))
    responses = [[json.loads(line)["response"] for line in own.splitlines()] for own in (first, again, other)]
    assert first == again and responses[0] != responses[2]
    greedy = [json.loads(line) for line in sample("g.jsonl", "--n", "1", "--temperature", "0").splitlines()]
    assert greedy[0]["sampling"]["temperature"] == 0 and greedy[0]["sampling"]["policy"].startswith("tiny@")
    assert all(row["tokens"] <= 12 and row["finish_reason"] in ("stop", "length") for row in greedy)
    assert {row["finish_reason"] for row in map(json.loads, first.splitlines())} == {"stop", "length"}


def test_greedy_is_what_transformers_generates(policy_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = LocalPolicy(str(policy_dir), Sampling(temperature=0, max_new_tokens=16, batch_size=2))
    tokenizer = AutoTokenizer.from_pretrained(policy_dir)
    model = AutoModelForCausalLM.from_pretrained(policy_dir)
    for prompt in ("What is best?", "a", "read and speak " * 9):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
        expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert policy.sample(prompt, ["00"])[0].response == expected


def test_the_draw_follows_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    many, places = 20_000, torch.linspace(0, 1, 20_001)[:-1].tolist()
    for how in (Sampling(), Sampling(temperature=0.5), Sampling(top_p=0.8), Sampling(temperature=2.0, top_p=0.9)):
        tempered = (logits[0].double() / how.temperature).softmax(-1)
        before = tempered.cumsum(-1) - tempered
        kept = tempered.where(before < how.top_p, 0)
        drawn = Counter(draw(logits.expand(many, -1), places, how))
        for token, expected in enumerate((kept / kept.sum()).tolist()):
            assert drawn[token] / many == pytest.approx(expected, abs=2 / many)
    assert draw(logits, [0.999], Sampling(temperature=0)) == [0]
    assert draw(torch.tensor([[0.0, -float("inf")]]), [0.9999999], Sampling()) == [0]


def test_a_sample_does_not_depend_on_its_neighbours(policy_dir: Path) -> None:
    """The same key alone in its block gives the same text: rows that nobody wants are computed all the same."""
    how = Sampling(max_new_tokens=10, batch_size=4)
    policy = LocalPolicy(str(policy_dir), how)
    keys = [sample_key("p", {}, n) for n in range(4)]
    block = policy.sample("p", keys)
    assert policy.sample("p", keys[:1]) == block[:1] and policy.sample("p", keys[:3]) == block[:3]


def test_a_prompt_that_does_not_fit_is_said(policy_dir: Path) -> None:
    made = LocalPolicy(str(policy_dir), Sampling(max_new_tokens=600)).sample("long " * 20, ["0a", "0b"])
    assert [one.response for one in made] == [None, None]
    assert made[0].failure is not None and "do not fit into 640" in made[0].failure["message"]


def test_raw_prompts_need_no_template(policy_dir: Path, tmp_path: Path) -> None:
    import shutil

    raw = LocalPolicy(str(policy_dir), Sampling(raw=True, max_new_tokens=4))
    assert raw.sample("Once", ["0a"])[0].response is not None
    bare = shutil.copytree(policy_dir, tmp_path / "bare")
    config = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": None}))
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ConfigurationError, match="pass --raw"):
        LocalPolicy(str(bare), Sampling())
    dated = "{{ strftime_now('%d %b %Y') }}" + config["chat_template"]
    (bare / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": dated}))
    with pytest.raises(ConfigurationError, match="today's date"):
        LocalPolicy(str(bare), Sampling())
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        LocalPolicy(str(tmp_path / "nowhere"), Sampling())


def test_the_name_tells_the_weights(policy_dir: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    first = LocalPolicy(str(policy_dir), Sampling()).name
    copy = shutil.copytree(policy_dir, tmp_path / "tiny")
    assert LocalPolicy(str(copy), Sampling()).name == first
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert LocalPolicy(str(copy), Sampling()).name != first
