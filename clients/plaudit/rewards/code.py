"""The `code` term: the program in a response against the tests of its reference.

Expected outputs never enter the program's process. Assertions do: they run in it after the program, and what says that
they held is a word of this run's, so that a program that exits early has not passed; a program made to search its own
memory for that word could forge it. Where that matters, give inputs and outputs.
"""

from __future__ import annotations

import re
import secrets
from threading import Event
from typing import Any

from .config import Code
from .sandbox import Sandbox
from .terms import TermError

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_ASSERTED = """
import os, sys
_word, _program, _tests = {word!r}, {program!r}, {tests!r}
_names = {{"__name__": "__main__"}}
exec(compile(_program, "program", "exec"), _names)
exec(compile(_tests, "tests", "exec"), _names)
sys.__stdout__.flush()
os.write(1, b"\\n" + _word.encode())
"""


def program_of(response: str) -> str:
    """The last ``` block, else the whole response."""
    blocks = _BLOCK.findall(response)
    return str(blocks[-1]) if blocks else response


def code(term: Code, response: str, reference: Any, unwanted: Event, *, isolated: bool) -> float:
    """The share of the tests that pass; none is begun once it is unwanted. Raises TermError for a reference that holds
    none, or without a sandbox."""
    sandbox, program = Sandbox(term.seconds, term.memory_mb, isolated), program_of(response)
    try:
        if isinstance(reference, str) and reference.strip():
            word = secrets.token_hex(16)
            ended = sandbox.run(_ASSERTED.format(word=word, program=program, tests=reference))
            return float(ended.code == 0 and ended.output.endswith(b"\n" + word.encode()))
        tests = _tests(term, reference)
        passed = [_passes(sandbox, program, test) for test in tests if not unwanted.is_set()]
    except (OSError, ValueError) as error:
        raise TermError("unavailable", f"{term.name}: the sandbox cannot run: {error}") from None
    return sum(passed) / len(tests)


def _tests(term: Code, reference: Any) -> list[dict[str, str]]:
    tests = reference if isinstance(reference, list) else []
    fit = (isinstance(test, dict) and all(isinstance(test.get(k), str) for k in ("input", "output")) for test in tests)
    if not tests or not all(fit):
        raise TermError("bad_reference", f"{term.name}: tests are a list of {{input, output}}, or a text of assertions")
    return tests


def _passes(sandbox: Sandbox, program: str, test: dict[str, str]) -> bool:
    """Outputs are compared line by line, without white space at their ends."""
    ended = sandbox.run(program, test["input"].encode("utf-8", "surrogatepass"))
    said, wanted = (text.rstrip().splitlines() for text in (ended.output.decode(errors="replace"), test["output"]))
    return ended.code == 0 and [line.rstrip() for line in said] == [line.rstrip() for line in wanted]
