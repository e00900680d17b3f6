"""What is scored next, and with whom. Policy only: no clock, no asyncio, no torch.

A batch is led by the oldest sequence of one client of its class. Whoever begins with the same tokens joins its leader,
from whatever request, client and class, so that a prompt whose samples arrive as separate requests is computed once;
then the next leads a family, until the token budget is full. Families cost what they cost packed: the common
prefix once. Clients take turns: a batch is led by whoever has been given nothing for longest, and what is left of it is
divided among all. Every second time a client leads not with its oldest but with the oldest of its shortest request, so
that nobody waits for the whole of a long one that came before, while requests of one length are answered in order: a
sequence waits at most two turns of its client for each sequence of that client that came before it.

When does a batch start? A worker that computes gives the queue time to fill by itself. An idle one waits
`settle` seconds for company; whoever arrives meanwhile and shares most of its tokens with those who wait starts
that silence anew, up to `max_wait` from the first arrival. So the n samples of a prompt sent as n requests, which
come within milliseconds of each other, are computed together, while a lone item, or any number of unrelated
ones, pays no more than `settle`: waiting would gain them nothing. Where nobody has had company for a while nobody
is kept waiting for it, until one has some within `settle` again: the first storm of samples after such a time
computes its prompt twice. A queue that fills a batch starts at once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Literal

from plaudit_model.packing import MIN_SHARED

from .deadlines import Deadlines
from .domain import Priority
from .prefix_index import PrefixIndex
from .waiting import Batch, Entry, Family, Job, Line

Slot = Literal["idle", "spared", "ahead", "none"]
"""What a worker can take: it has nothing to do; the same, but it is the last one standing and gets nothing deadly; it
computes and may be given one batch ahead; nothing."""

INTERACTIVE_TURNS = 4
"""Batches in a row that the interactive class may lead while the batch class waits; then it has one turn."""

_HABIT, _PATIENCE = 8, 10.0
"""Company is not waited for once so many sequences in a row had none, and none came for so many seconds. So it costs
at most one prompt, computed twice, in that time."""

_DEAR = 16
"""A prefix of more than 1/16 of the budget is dear: its family is not begun where it would have to be cut."""


@dataclass(frozen=True)
class BatchPolicy:
    """`token_budget` bounds the packed tokens of a batch; a single sequence may exceed it. `max_wait` and
    `settle` are in seconds. `look_ahead`: how many sequences that do not fit may be passed over in search of
    one that does."""

    token_budget: int = 4096
    max_wait: float = 0.05
    settle: float = 0.003
    look_ahead: int = 64


class Batcher:
    """Owns everything that is accepted and not yet answered. `token_budget` is the policy's until somebody sets it."""

    def __init__(self, policy: BatchPolicy, *, share: bool) -> None:
        self._policy, self.token_budget = policy, policy.token_budget
        self._entries: dict[bytes, Entry] = {}
        self._lines: dict[Priority, Line] = {"interactive": Line(), "batch": Line()}
        self._index = PrefixIndex(share=share)
        self._suspects: deque[Batch] = deque()
        self._deadlines = Deadlines()
        self._silent_since = float("-inf")
        self._opener: Entry | None = None  # the last to find nobody waiting
        self._alone = 0  # openers in a row that nobody came for
        self._company_at = float("-inf")
        self._interactive_turns = 0

    @property
    def empty(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._entries

    def queued_tokens(self, priority: Priority) -> int:
        """Tokens that wait, a shared prompt counted in each sequence."""
        return self._lines[priority].tokens

    def share(self, priority: Priority, client: str) -> tuple[int, int]:
        """Those of them that wait for a client, and how many clients wait, with this one."""
        return self._lines[priority].share(client)

    def add(self, job: Job) -> bool:
        """Take a job. True if its sequence is being waited for already: it will be computed once for all."""
        self._deadlines.add(job)
        entry = self._entries.get(job.key)
        if entry is not None:
            self._join(entry, job)
            return True
        entry = self._entries[job.key] = Entry.of(job)
        first = not len(self._index)
        known = self._enqueue(entry)
        if first:
            opener, self._opener = self._opener, entry
            if opener and opener.key in self._entries and job.arrived <= opener.arrived + self._policy.settle:
                known = self._index.common(opener, entry)  # company for one that was not kept waiting
        if related := 2 * known >= entry.tokens:
            self._alone, self._company_at = 0, job.arrived
        elif first:
            self._alone += 1
        if first or related:
            self._silent_since = job.arrived
        return False

    def discard(self, job: Job) -> None:
        """Nobody waits for this job any more. A sequence without jobs is not computed."""
        self._deadlines.discard(job)
        entry = self._entries.get(job.key)
        if entry is None or job not in entry.jobs:
            return
        del entry.jobs[job]
        if not entry.jobs and entry.state != "running":
            self._forget(entry)

    def expire(self, now: float) -> list[tuple[Job, bool]]:
        """Jobs whose deadline has passed, and whether their computation had begun; they are discarded."""
        expired = [(job, self._entries[job.key].state == "running") for job in self._deadlines.expired(now)]
        for job, _ in expired:
            self.discard(job)
        return expired

    def next_batch(self, now: float, slot: Slot) -> Batch | None:
        """What a worker should compute now, or None."""
        if suspects := self._next_suspects(slot):
            self._suspects.remove(suspects)
            for entry in suspects.entries:
                entry.state = "running"
            return suspects
        opens = self._opens(slot)
        return self._form() if opens is not None and opens <= now else None

    def wait(self, now: float, slot: Slot) -> float | None:
        """Seconds until there may be a batch or an expired job; None: not before something else happens."""
        suspects = now if self._next_suspects(slot) else None
        moments = [at for at in (suspects, self._opens(slot), self._deadlines.next()) if at is not None]
        return max(min(moments) - now, 0.0) if moments else None

    def answered(self, entry: Entry) -> tuple[Job, ...]:
        """Forget a sequence that has its score or its error. Returns whoever still waits for it."""
        jobs = tuple(entry.jobs)
        for job in jobs:
            self._deadlines.discard(job)
        self._forget(entry)
        return jobs

    def lost(self, batch: Batch) -> Entry | None:
        """The worker died over this batch. It is run once more as it stands, then in halves until the
        sequence that kills is alone: that one is returned, to be answered with an error."""
        if not batch.suspect:
            self._suspect(Batch(batch.families, suspect=True))
            return None
        return self.failed(replace(batch, deadly=True))

    def failed(self, batch: Batch) -> Entry | None:
        """The forward raised for this batch. It is run in halves until the sequence that raises is alone:
        that one is returned, to be answered with an error."""
        if len(batch.entries) == 1:
            return batch.entries[0]
        first, second = batch.halves()
        self._suspect(second)
        self._suspect(first)
        return None

    def put_back(self, batch: Batch) -> None:
        """This batch was given to a worker that never began it: its sequences wait again, in front."""
        if batch.suspect:
            self._suspect(batch)
            return
        for entry in reversed(batch.entries):
            if entry.jobs:
                self._enqueue(entry, front=True)
            else:
                self._forget(entry)

    def _join(self, entry: Entry, job: Job) -> None:
        entry.jobs[job] = None
        entry.size = min(entry.size, job.size)
        urgent = job.priority == "interactive" and entry.priority == "batch"
        anew = job.priority == entry.priority and not self.share(job.priority, job.client)[0]
        if urgent or (anew and not self._lines[entry.priority].leads(entry)):
            if entry.state == "waiting":
                self._lines[entry.priority].remove(entry)
            entry.priority, entry.client = job.priority, job.client  # its turn comes sooner
            if entry.state == "waiting":
                self._lines[entry.priority].add(entry)

    def _enqueue(self, entry: Entry, *, front: bool = False) -> int:
        """Returns how many of its tokens are shared with those who wait already."""
        entry.state = "waiting"
        self._lines[entry.priority].add(entry, front=front)
        return self._index.add(entry)

    def _forget(self, entry: Entry) -> None:
        del self._entries[entry.key]
        if entry.state == "waiting":
            self._lines[entry.priority].remove(entry)
            self._index.remove(entry)
        elif entry.state == "suspect":
            self._suspects = deque(wanted for batch in self._suspects if (wanted := batch.wanted()))

    def _suspect(self, batch: Batch) -> None:
        for entry in batch.entries:
            entry.state = "suspect"
            if not entry.jobs:
                self._forget(entry)
        if (wanted := batch.wanted()) is not None:
            self._suspects.appendleft(wanted)

    def _next_suspects(self, slot: Slot) -> Batch | None:
        taken = (batch for batch in self._suspects if slot == "idle" or (slot == "spared" and not batch.deadly))
        return next(taken, None)

    def _opens(self, slot: Slot) -> float | None:
        """When a batch may be formed from what waits now; None if only an event can tell."""
        full = self._index.tokens >= self.token_budget
        if slot == "none" or not len(self._index) or (slot == "ahead" and (self._suspects or not full)):
            return None  # a batch ahead that is not full only gains by waiting until the worker is free
        oldest = float("-inf") if full else min(line.oldest for line in self._lines.values())
        hopeless = self._alone > _HABIT and oldest > self._company_at + _PATIENCE
        return min(oldest + self._policy.max_wait, self._silent_since + (0.0 if hopeless else self._policy.settle))

    def _form(self) -> Batch:
        line, room, passed_over = self._next_line(), self.token_budget, 0
        families: list[Family] = []
        for leader in line.leaders(room + self._policy.look_ahead + 1):  # each takes a token, or is passed over
            if leader.state == "running":
                continue  # it has joined an older leader of this batch
            family, cost = self._family(leader, room, first=not families)
            if not family:
                passed_over += 1
                if passed_over > self._policy.look_ahead:
                    break
                continue
            for entry in family:
                self._start(entry)
            families.append(family)
            room -= cost
            if room <= 0:
                break
        return Batch(tuple(families))

    def _family(self, leader: Entry, room: int, *, first: bool) -> tuple[Family, int]:
        """The leader and its relatives as far as there is room, with what they cost packed. A relative that
        would shorten the common prefix joins if it saves more than the others lose. Empty if there is no room
        for the leader, which the first family of a batch always has."""
        members, cost, shared, passed_over = [leader], leader.tokens, leader.tokens - 1, 0
        if cost > room and not first:
            return (), 0
        for entry, common in self._index.relatives(leader):
            prefix = min(shared, common, entry.tokens - 1)
            lost = (len(members) - 1) * (shared - prefix)
            if prefix < MIN_SHARED or lost > prefix:
                break  # relatives come nearest first: nobody further out is better
            if cost + lost + entry.tokens - prefix <= room:
                members.append(entry)
                cost, shared = cost + lost + entry.tokens - prefix, prefix
                continue
            if not first and prefix * _DEAR > self.token_budget:
                return (), 0
            passed_over += 1
            if passed_over > self._policy.look_ahead:
                break
        return tuple(members), cost

    def _start(self, entry: Entry) -> None:
        self._lines[entry.priority].take(entry)
        self._index.remove(entry)
        entry.state = "running"

    def _next_line(self) -> Line:
        interactive, batch = self._lines["interactive"], self._lines["batch"]
        if not (interactive.tokens and batch.tokens):
            self._interactive_turns = 0
            return interactive if interactive.tokens else batch
        if self._interactive_turns == INTERACTIVE_TURNS:
            self._interactive_turns = 0
            return batch
        self._interactive_turns += 1
        return interactive
