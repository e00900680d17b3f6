"""Labelling a file of comparisons: both orders of each, one line each, taken up after a kill.

A row is there once its comparison is judged, or cannot be: an endpoint that does not answer stops the run instead.
`label` is what a trainer may use; it is null where the judge failed or people have to decide, and `verdict` is then
what the judge thinks. What people are asked goes to a file of its own, before the row is written, without the judge's
verdict, which would lean on theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .._bulk import Done, Tally, in_order
from .._endpoint import Endpoint, choices_of
from .._items import check, encode
from .._jsonl import Row
from .._row_files import digest, json_rows, located, take_up
from ..errors import BadRequest, InvalidInput
from ..types import ItemError, Prompt
from .constitution import Constitution
from .verdicts import Judgement, Opinion, Order, Unreadable, judge, read_opinion

KEPT = ("id", "annotator_group", "round", "tags", "time")
ORDERS: tuple[Order, ...] = ("ab", "ba")


@dataclass(frozen=True, slots=True)
class Asking:
    """How the judge is asked: `samples` answers in each order. Everything here is part of the keys."""

    model: str
    samples: int = 1
    temperature: float = 0.0
    max_tokens: int = 1024
    logprobs: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Routing:
    """What goes to people: confidence below `least`, safety, and the share `audit` of everything, by key. In a row's
    settings, but no part of its key: it is the same judgement."""

    least: float = 0.7
    audit: float = 0.05

    def low(self, confidence: float | None) -> bool:
        return confidence is not None and confidence < self.least

    def audits(self, key: str) -> bool:
        return int(key[:8], 16) < self.audit * 2**32

    def could_have_made(self, row: Mapping[str, Any]) -> bool:
        """Whether this rule sends to people what a row says that it sent."""
        says = ["low_confidence" in row["queued"], "audit" in row["queued"]]
        return says == [self.low(row["confidence"]), self.audits(row["key"])]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to a prompt, the line they stand on, and what else of the row is kept."""

    line: int
    prompt: Prompt
    a: str
    b: str
    kept: Mapping[str, Any]

    @property
    def content(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "response_a": self.a, "response_b": self.b}


@dataclass(frozen=True, slots=True)
class Heard:
    """What the judge said of a pair, or why it said nothing, and the tokens that took (None: not told)."""

    opinions: tuple[Opinion, ...] = ()
    unreadable: tuple[str, ...] = ()
    refused: BadRequest | None = None
    tokens: tuple[int, int] | None = None


class Judge:
    """A chat model behind an endpoint, with a constitution."""

    def __init__(self, endpoint: Endpoint, constitution: Constitution, how: Asking) -> None:
        self._endpoint, self.constitution, self.how = endpoint, constitution, how
        self.settings = {"constitution": constitution.sha256, **asdict(how)}

    def key(self, pair: Pair) -> str:
        """A hash of everything that the row depends on."""
        return digest([pair.content, self.settings])[:32]

    def hear(self, pair: Pair) -> Heard:
        """Ask in both orders. Raises Unavailable, Unauthorized, NotFound, ResponseInvalid."""
        opinions: list[Opinion] = []
        unreadable: list[str] = []
        used: list[tuple[int, int] | None] = []
        try:
            for order in ORDERS:
                choices: list[Mapping[str, Any]] = []
                while len(choices) < self.how.samples:
                    more, tokens = self._ask(pair, order, len(choices))
                    choices += more
                    used.append(tokens)
                for choice in choices:
                    self._read(choice, order, opinions, unreadable)
        except BadRequest as error:
            return Heard(refused=error)
        known = [one for one in used if one is not None]
        total = (sum(one[0] for one in known), sum(one[1] for one in known)) if len(known) == len(used) else None
        return Heard(tuple(opinions), tuple(unreadable), tokens=total)

    def _read(self, choice: Mapping[str, Any], order: Order, opinions: list[Opinion], unreadable: list[str]) -> None:
        known, safety = [p.id for p in self.constitution.principles], bool(self.constitution.safety)
        try:
            opinions.append(read_opinion(choice, order, known, must_name=safety))
        except Unreadable as error:
            unreadable.append(f"{order}: {error}")

    def _ask(self, pair: Pair, order: Order, have: int) -> tuple[list[Mapping[str, Any]], tuple[int, int] | None]:
        n, how = self.how.samples - have, self.how
        first, second = (pair.a, pair.b) if order == "ab" else (pair.b, pair.a)
        fields: dict[str, Any] = {
            "model": how.model,
            "messages": self.constitution.messages(pair.prompt, first, second),
            "temperature": how.temperature,
            "max_tokens": how.max_tokens,
            "n": n,
            "seed": int(digest([self.key(pair), order, have, how.seed])[:8], 16) >> 1,
        }
        if how.logprobs:
            fields |= {"logprobs": True, "top_logprobs": 20}
        return self._endpoint.ask("/v1/chat/completions", fields, lambda answer: (choices_of(answer, n), _used(answer)))


def read_pairs(lines: Iterable[bytes]) -> Iterator[Pair]:
    """The comparisons of a file: `prompt` with `response_a` and `response_b`, or with `chosen` and `rejected`, each a
    text or one assistant's turn. Raises InvalidInput for a row that is none."""
    for number, where, row in json_rows(lines):
        with located(where):
            names = ("response_a", "response_b") if "response_a" in row else ("chosen", "rejected")
            if missing := [name for name in ("prompt", *names) if name not in row]:
                raise InvalidInput(f"has no {missing[0]!r}; a row is a prompt with response_a and response_b, or with "
                                   "chosen and rejected")  # fmt: skip
            a, b = (_response(row[name]) for name in names)
            check({"prompt": row["prompt"], "responses": [a, b]})
            encode(row)
            yield Pair(number, row["prompt"], a, b, {name: row[name] for name in KEPT if name in row})


def label(
    pairs: Iterable[Pair], judge: Judge, routing: Routing, tally: Tally, ahead: int
) -> Iterator[tuple[Done, dict[str, Any]]]:
    """The rows, in order, counted, each with its line. Raises BadRequest if the judge refuses before it has answered
    anything: then it is the settings that are wrong, more likely than the pair."""
    for pair, heard in in_order(pairs, judge.hear, ahead):
        if heard.refused and tally.rows == tally.failed:
            raise heard.refused
        row = row_of(pair, heard, judge, routing)
        error = ItemError(row["error"]["code"], row["error"]["message"]) if "error" in row else None
        tally.rows += 1
        tally.failed += error is not None
        line = encode(row) + b"\n"
        yield Done(Row(pair.line, len(line), row["key"], {}), line, error), row


def row_of(pair: Pair, heard: Heard, judge_: Judge, routing: Routing) -> dict[str, Any]:
    """The row of a judged pair. It names what made it, so that it can be found again by any of that."""
    key, constitution = judge_.key(pair), judge_.constitution
    found, failure = _judgement(heard)
    principles = sorted({name for opinion in heard.opinions for name in opinion.principles})
    reasons = [] if found else ["no_verdict"]
    if found and routing.low(found.confidence):
        reasons.append("low_confidence")
    if constitution.safety & set(principles):
        reasons.append("safety")
    verdict = found.verdict if found else None
    rationale = next((o.rationale for o in heard.opinions if o.order == "ab" and o.verdict == verdict), None)
    row: dict[str, Any] = {"key": key, "line": pair.line, **pair.kept, **pair.content}
    row |= {"label": None if reasons else verdict, "verdict": verdict}
    row |= {"confidence": found.confidence if found else None, "shares": found.shares if found else None}
    row |= {"confidence_from": _evidence(found), "consistent": found.consistent if found else None}
    row |= {"rationale": rationale, "principles": principles}
    row |= {"source": "ai", "annotator": judge_.how.model, "guideline_version": constitution.guideline_version}
    row["queued"] = [*reasons, *(["audit"] if routing.audits(key) else [])]
    row |= {"opinions": [asdict(opinion) for opinion in heard.opinions]}
    row |= {"settings": judge_.settings | {"routing": asdict(routing)}}
    row |= {"tokens": heard.tokens, "cost": cost_of(heard.tokens, constitution)}
    return row | ({"error": failure} if failure else {})


def cost_of(tokens: Sequence[int] | None, constitution: Constitution) -> float | None:
    """What these tokens cost; None without tokens or a price."""
    price = constitution.price
    return None if not (tokens and price) else (tokens[0] * price.prompt + tokens[1] * price.completion) / 1e6


def queue_line(row: Mapping[str, Any]) -> bytes:
    """What people are asked about a row: `label` is theirs to fill in with a, b or tie."""
    asked = {name: row[name] for name in ("key", "id", "prompt", "response_a", "response_b") if name in row}
    about = {"queued": row["queued"], "guideline_version": row["guideline_version"]}
    return encode({**asked, "label": None, **about}) + b"\n"


def earlier_rows(
    out: Path, settings: Mapping[str, Any] | None = None, routing: Routing | None = None
) -> tuple[set[str], int]:
    """The keys that an earlier run has left in a file, and how many of its rows have an error (see `take_up`); without
    `settings`, of the queue, which people edit. One file holds the rows of one judge and one `routing`; a row of a
    version that did not write its routing may stay if this one would have sent the same to people."""

    def check(row: Mapping[str, Any]) -> str | None:
        if routing is None:
            return None
        made = dict(row.get("settings") or {})
        known = made.pop("routing", None)
        if made != settings:
            return "was made with other settings"
        same = routing.could_have_made(row) if known is None else known == asdict(routing)
        return None if same else f"was made with another --min-confidence or --audit: {known or 'not told'}"

    rows = [(row["key"], "error" in row) for row in take_up(out, check, edited=settings is None)]
    return {key for key, _ in rows}, sum(failed for _, failed in rows)


def _judgement(heard: Heard) -> tuple[Judgement | None, dict[str, str] | None]:
    if heard.refused:
        return None, {"code": heard.refused.code or "refused", "message": heard.refused.reason}
    try:
        return judge(heard.opinions), None
    except Unreadable:
        return None, {"code": "unreadable_verdict", "message": "; ".join(heard.unreadable)}


def _evidence(found: Judgement | None) -> str | None:
    return None if found is None else "logprobs" if found.soft else "agreement"


def _used(answer: Mapping[str, Any]) -> tuple[int, int] | None:
    usage = answer.get("usage") or {}
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return (prompt, completion) if isinstance(prompt, int) and isinstance(completion, int) else None


def _response(value: Any) -> str:
    match value:
        case [{"role": "assistant", "content": content}]:
            value = content
    if not isinstance(value, str):
        raise InvalidInput("a response must be a text, or a list with one assistant's turn")
    return value


def read_labels(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """The rows of a file of labels. Raises InvalidInput."""
    rows = []
    for _, where, row in json_rows(lines):
        with located(where):
            if {"key", "label", "queued", "opinions"} - row.keys():
                raise InvalidInput("is no row of `plaudit judge label`")
        rows.append(row)
    return rows
