"""`plaudit bon generate` and `merge` against a server that speaks the OpenAI protocol."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from plaudit._bulk import Tally
from plaudit.bon.generate import generate, settings_of
from plaudit.bon.samples import Generated, PromptRow, Sampling, sample_key, take_up

if TYPE_CHECKING:
    from conftest import WireServer

Bon = Callable[..., tuple[int, str, str]]
Write = Callable[..., str]
Read = Callable[[str], list[dict[str, Any]]]
PROMPTS = [{"prompt": f"question {n}", "id": n} for n in range(12)]


@pytest.fixture
def openai(server: WireServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[WireServer]:
    """The wire server, speaking chat completions: an answer is a function of the prompt, the seed and its place. It
    gives at most `most` choices, and refuses a prompt with the word LONG."""
    server.most = 99  # type: ignore[attr-defined]

    def answer(seen: Any) -> tuple[int, Any]:
        body = seen.body
        chat = seen.path == "/v1/chat/completions"
        prompt = "|".join(turn["content"] for turn in body["messages"]) if chat else body["prompt"]
        if "LONG" in prompt:
            error = {"message": "too many tokens", "type": "invalid_request_error", "code": "context_length_exceeded"}
            return 400, {"error": error}
        choices, seed = [], body["seed"]
        for index in range(min(body["n"], server.most)):  # type: ignore[attr-defined]
            text = f"{prompt} -> {random.Random(f'{prompt} {seed} {index}').random():.6f}"
            said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choices.append({"index": index, "finish_reason": "stop", **said})
        return 200, {"choices": choices[::-1], "usage": {"completion_tokens": 7 * len(choices)}}

    monkeypatch.setattr(server, "_answer", answer)
    yield server


def options(server: WireServer, *more: str, n: int = 5) -> tuple[str, ...]:
    """The arguments behind the file of prompts."""
    return ("--out", "out.jsonl", "--n", str(n), "--endpoint", server.url + "/v1", "--model", "m", *more)


def test_samples_come_in_order_with_their_keys(openai: WireServer, bon: Bon, write: Write, read: Read) -> None:
    code, _, err = bon("generate", write("p.jsonl", PROMPTS), *options(openai, "--temperature", "0.7"))
    rows = read("out.jsonl")
    assert code == 0 and err == "60 rows, 0 failed, 0 from an earlier run\n"
    assert [(row["line"], row["index"]) for row in rows] == [(p + 1, i) for p in range(12) for i in range(5)]
    assert all(row["response"].startswith(row["prompt"] + " -> ") and row["finish_reason"] == "stop" for row in rows)
    assert len({row["response"] for row in rows}) == len({row["key"] for row in rows}) == 60
    assert rows[7]["source"] == {"id": 1} and rows[7]["sampling"]["policy"] == "m"
    assert rows[7]["key"] == sample_key("question 1", rows[7]["sampling"], 2)
    body = openai.seen[0].body
    assert body is not None and "deadline_ms" not in body and body.pop("seed") < 2**31
    assert body.pop("messages")[0]["content"] in {row["prompt"] for row in rows}
    assert body == {"model": "m", "temperature": 0.7, "top_p": 1.0, "max_tokens": 512, "n": 5}
    assert len(openai.paths()) == 12 and set(openai.paths()) == {"/v1/chat/completions"}


def test_a_file_that_was_cut_is_completed_alike(openai: WireServer, bon: Bon, write: Write) -> None:
    arguments = ("generate", write("p.jsonl", PROMPTS[:3]), *options(openai, "--batch-size", "2"))
    assert bon(*arguments)[0] == 0
    whole = Path("out.jsonl").read_bytes()
    for cut in (len(whole) // 2, whole.rindex(b"\n", 0, -1) + 1):
        Path("out.jsonl").write_bytes(whole[:cut])
        assert bon(*arguments)[0] == 0
        assert Path("out.jsonl").read_bytes() == whole


def test_shards_and_a_larger_n_merge_to_what_one_run_writes(
    openai: WireServer, bon: Bon, write: Write, read: Read
) -> None:
    source = write("p.jsonl", PROMPTS)
    assert bon("generate", source, *options(openai, "--batch-size", "4", n=8))[0] == 0
    for part in range(3):
        for n in ("4", "8"):  # more samples later
            arguments = ("--out", f"{part}.jsonl", "--shard", f"{part}/3", *options(openai, "--batch-size", "4")[4:])
            assert bon("generate", source, "--n", n, *arguments)[0] == 0
    parts = [read(f"{part}.jsonl") for part in range(3)]
    assert sum(map(len, parts)) == 96 and all(parts)
    code, _, err = bon("merge", "2.jsonl", "0.jsonl", "1.jsonl", "0.jsonl", "--out", "merged.jsonl")
    assert code == 0 and err == f"96 samples, {len(parts[0])} copies left out\n"
    assert Path("merged.jsonl").read_bytes() == Path("out.jsonl").read_bytes()


def test_a_shard_that_was_forgotten_or_is_not_finished_is_missed(
    openai: WireServer, bon: Bon, write: Write, read: Read
) -> None:
    source = write("p.jsonl", PROMPTS + PROMPTS[:1])
    for part in range(3):
        arguments = ("--out", f"{part}.jsonl", "--shard", f"{part}/3", *options(openai, n=4)[2:])
        assert bon("generate", source, *arguments)[0] == 0
    Path("0.jsonl").write_bytes(b"".join(Path("0.jsonl").read_bytes().splitlines(keepends=True)[:-6]))  # killed
    sizes = [len(read(f"{part}.jsonl")) for part in range(3)]
    code, _, err = bon("merge", "0.jsonl", "1.jsonl", "2.jsonl", "--out", "m.jsonl")
    assert code == 1 and len(read("m.jsonl")) == sum(sizes) == 42
    assert err.endswith("1 prompts have no sample, 1 prompts have too few samples: is a shard forgotten, or not "
                        "finished? Run it again, then merge\n")  # fmt: skip
    code, _, err = bon("merge", "0.jsonl", "1.jsonl", "--out", "m.jsonl")
    assert code == 1 and f"{1 + sizes[2] // 4} prompts have no sample" in err
    old = [{name: value for name, value in row.items() if name != "prompts"} for row in read("1.jsonl")]
    code, _, err = bon("merge", write("old.jsonl", old), "--out", "m.jsonl")
    assert code == 0 and err == f"{len(old)} samples, 0 copies left out\n", "rows that do not say how many there are"
    begun = [old[0], *read("1.jsonl")[1:], *read("0.jsonl"), *read("2.jsonl")]  # begun by a version that did not say
    _, _, err = bon("merge", write("begun.jsonl", begun), "--out", "m.jsonl")
    assert "1 prompts have no sample, 1 prompts have too few samples" in err, "an older row is a sample too"
    several = [{**row, "prompts": 1} for row in read("2.jsonl")]  # of files of one prompt each
    hot = [{**row, "key": f"{row['key']}!", "sampling": {}, "prompts": sizes[2] // 4 + 1} for row in several]
    _, _, err = bon("merge", write("several.jsonl", several), write("hot.jsonl", hot), "--out", "m.jsonl")
    assert "\n1 prompts have no sample:" in err, "of one policy, however many another one has"


def test_equal_samples_are_copies_also_where_the_prompts_have_become_more(
    openai: WireServer, bon: Bon, write: Write, read: Read
) -> None:
    for name, count in (("few", 2), ("more", 3)):
        arguments = ("--out", f"{name}.jsonl", *options(openai)[2:])
        assert bon("generate", write("p.jsonl", PROMPTS[:count]), *arguments)[0] == 0
    code, _, err = bon("merge", "few.jsonl", "more.jsonl", "--out", "m.jsonl")
    assert code == 0 and err == "15 samples, 10 copies left out\n"


def test_a_server_that_ignores_n_is_asked_again(openai: WireServer, bon: Bon, write: Write, read: Read) -> None:
    openai.most = 1  # type: ignore[attr-defined]
    assert bon("generate", write("p.jsonl", PROMPTS[:2]), *options(openai, n=4))[0] == 0
    rows = read("out.jsonl")
    assert len({row["response"] for row in rows}) == 8 and len(openai.paths()) == 8
    assert all(row["tokens"] == 7 for row in rows if row["index"] == 3)


def test_retries_and_retry_after(openai: WireServer, bon: Bon, write: Write) -> None:
    openai.fail({"status": 429, "headers": {"retry-after": "0.05"}, "body": {"error": {"message": "slow"}}})
    openai.fail({"kind": "reset"}, {"status": 500, "body": {"error": {"message": "oops"}}}, {"kind": "truncate"})
    assert bon("generate", write("p.jsonl", PROMPTS[:2]), *options(openai, "--concurrency", "1"))[0] == 0
    assert len(openai.paths()) == 6


def test_an_endpoint_that_was_there_is_waited_for(
    openai: WireServer, bon: Bon, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plaudit._client.time.sleep", lambda seconds: None)
    away = {"status": 503, "body": {"error": {"message": "loading"}}}
    openai.fail(*[away] * 40)
    code, _, err = bon("generate", write("p.jsonl", PROMPTS[:2]), *options(openai, "--concurrency", "1"))
    assert code == 69 and "retries; 11 attempts" in err, "a URL that was mistyped is an error soon"
    openai.faults.clear()
    openai.fail({}, *[away] * 40)
    assert bon("generate", "p.jsonl", *options(openai, "--concurrency", "1"))[0] == 0


def test_a_refused_prompt_is_kept_and_counted(openai: WireServer, bon: Bon, write: Write, read: Read) -> None:
    source = write("p.jsonl", [PROMPTS[0], {"prompt": "LONG"}, PROMPTS[1]])
    code, out, err = bon("generate", source, *options(openai, "--json"))
    rows = read("out.jsonl")
    assert "line 2: context_length_exceeded: too many tokens" in err
    assert code == 1 and json.loads(out)["failed"] == 5 and [row["response"] is None for row in rows].count(True) == 5
    assert rows[5]["failure"] == {"code": "context_length_exceeded", "message": "too many tokens"}
    asked = len(openai.paths())
    assert bon("generate", source, *options(openai))[0] == 1 and len(openai.paths()) == asked
    code, _, err = bon("generate", write("q.jsonl", [{"prompt": "LONG"}, PROMPTS[0]]), *options(openai), "--seed", "1")
    assert code == 65 and "use another --out" in err
    Path("out.jsonl").unlink()
    code, _, err = bon("generate", "q.jsonl", *options(openai))
    assert code == 65 and "too many tokens" in err and Path("out.jsonl").read_bytes() == b""


def test_the_key_is_the_endpoints_own(
    openai: WireServer, bon: Bon, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLAUDIT_API_KEY", "ours")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    source = write("p.jsonl", PROMPTS[:1])
    assert bon("generate", source, *options(openai))[0] == 0
    assert "authorization" not in openai.seen[-1].headers
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    assert bon("generate", source, *options(openai, n=6))[0] == 0
    assert openai.seen[-1].headers["authorization"] == "Bearer theirs"
    openai.fail({"status": 401, "body": {"error": {"message": "bad key"}}})
    code, _, err = bon("generate", source, *options(openai, n=7))
    assert code == 78 and "bad key; set OPENAI_API_KEY" in err


def test_raw_prompts_are_continued(openai: WireServer, bon: Bon, write: Write, read: Read) -> None:
    source = write("p.jsonl", [{"text": "Once"}, {"text": "Once"}])
    code, _, err = bon("generate", source, *options(openai, "--raw", "--prompt-field", "text", n=2))
    assert code == 0 and "1 repeated prompts left out" in err and openai.paths() == ["/v1/completions"]
    assert [row["sampling"]["raw"] for row in read("out.jsonl")] == [True, True]
    turns = [{"role": "user", "content": "x"}]
    code, _, err = bon("generate", write("m.jsonl", [{"prompt": turns}]), *options(openai, "--raw"))
    assert code == 65 and "line 1: --raw continues text" in err


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"choices": []}, "5 choices were asked for and 0 came back"),
        ({"choices": [{"index": i, "text": "x"} for i in range(6)]}, "and 6 came back"),
        ({"error": "no"}, "'choices' must be a list"),
        (b"<html>", "is this an OpenAI-compatible endpoint?"),
        ({"choices": [{"message": {"content": 7}}]}, "'text' must be a text"),
    ],
)
def test_answers_that_cannot_be_used(body: Any, said: str, openai: WireServer, bon: Bon, write: Write) -> None:
    openai.fail({"body": body})
    code, _, err = bon("generate", write("p.jsonl", PROMPTS[:1]), *options(openai))
    assert code == 69 and said in err


def test_a_choice_without_text_is_no_empty_response(openai: WireServer, bon: Bon, write: Write, read: Read) -> None:
    openai.fail({"body": {"choices": [{"message": {"content": None}}, {"message": {"content": ""}}]}})
    assert bon("generate", write("p.jsonl", PROMPTS[:1]), *options(openai, n=2))[0] == 1
    assert [(row["response"], "failure" in row) for row in read("out.jsonl")] == [(None, True), ("", False)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: Expecting property name"),
        ("[1]", "line 2: not a JSON object, but list"),
        ('{"question": "x"}', "line 2: 'prompt' must be a text"),
        ('{"prompt": [{"role": "user"}]}', "line 2: 'prompt' must be a text or a list of messages"),
    ],
)
def test_a_bad_prompt_stops_before_anything_is_asked(
    line: str, said: str, openai: WireServer, bon: Bon, write: Write
) -> None:
    Path("p.jsonl").write_text(json.dumps(PROMPTS[0]) + "\n" + line + "\n")
    code, _, err = bon("generate", "p.jsonl", *options(openai))
    assert code == 65 and said in err and not openai.paths() and not Path("out.jsonl").exists()


def test_options_are_checked(openai: WireServer, bon: Bon, write: Write) -> None:
    source = write("p.jsonl", PROMPTS[:1])
    for wrong in (("--temperature", "0"), ("--shard", "4/4"), ("--shard", "x"), ("--policy", "dir")):
        assert bon("generate", source, *options(openai), *wrong)[0] == 2
    assert bon("generate", source, "--out", "o.jsonl")[0] == 2
    assert bon("generate", source, "--out", "o.jsonl", "--endpoint", openai.url)[0] == 2


def test_a_file_of_something_else_is_left_alone(openai: WireServer, bon: Bon, write: Write, tmp_path: Path) -> None:
    source = write("p.jsonl", PROMPTS[:1])
    assert bon("generate", source, *options(openai))[0] == 0
    whole = Path("out.jsonl").read_bytes()
    line = whole.splitlines(keepends=True)[0]
    forged = line.replace(b'"index":0', b'"index":1')
    for other in (b"notes", b'{"a": 1}\n', whole + line, forged, b'{"keys": 1'):
        Path("out.jsonl").write_bytes(other)
        code, _, err = bon("generate", source, *options(openai))
        assert code == 65 and "out.jsonl:" in err and Path("out.jsonl").read_bytes() == other


def test_one_writer_at_a_time(openai: WireServer, bon: Bon, write: Write) -> None:
    import fcntl

    source = write("p.jsonl", PROMPTS[:1])
    with Path("out.jsonl").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, err = bon("generate", source, *options(openai))
    assert code == 65 and "is being written by another run" in err
    assert bon("generate", source, *options(openai))[0] == 0


def test_merge_refuses_what_does_not_belong_together(openai: WireServer, bon: Bon, write: Write, samples: Any) -> None:
    rows = samples(2, 2)
    write("a.jsonl", rows)
    write("b.jsonl", [{**rows[0], "response": "another"}])
    Path("torn.jsonl").write_bytes(Path("a.jsonl").read_bytes()[:-1])
    write("foreign.jsonl", [{"prompt": "p", "response": "r"}])
    for name, said in (("b", "differs from it"), ("torn", "no whole line"), ("foreign", "no whole line")):
        code, _, err = bon("merge", "a.jsonl", f"{name}.jsonl", "--out", "m.jsonl")
        assert code == 65 and said in err and f"{name}.jsonl:" in err and not Path("m.jsonl").exists()
    assert bon("merge", "missing.jsonl", "--out", "m.jsonl")[0] == 2
    assert [path.name for path in Path().glob(".*")] == []  # nothing half-written is left


class Failing:
    """A policy in this process that is stopped after a number of calls."""

    name, ahead = "failing", 1

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def sample(self, prompt: Any, keys: Any) -> list[Generated]:
        self.calls -= 1
        if self.calls < 0:
            raise InterruptedError
        return [Generated(f"{prompt}:{key[:4]}") for key in keys]

    def close(self) -> None: ...


def test_a_kill_at_any_byte_costs_one_block(tmp_path: Path) -> None:
    rows, how, out = [PromptRow(1, "a"), PromptRow(2, "b")], Sampling(batch_size=2), tmp_path / "o.jsonl"

    def lines(calls: int, have: set[str]) -> bytes:
        return b"".join(done.line for done in generate(rows, Failing(calls), how, 3, have, Tally()))

    whole = lines(4, set())
    for cut in range(len(whole) + 1):
        out.write_bytes(whole[:cut])
        have, _ = take_up(out, settings_of(Failing(0), how))
        there = out.read_bytes()
        assert there == whole[: whole.rfind(b"\n", 0, cut) + 1] and len(have) == there.count(b"\n")
        blocks = [{0, 1}, {2}, {3, 4}, {5}]  # of each prompt's three samples: two, and the third
        unfinished = sum(not block <= set(range(len(have))) for block in blocks)
        assert there + lines(unfinished, have) == whole  # not a call more
