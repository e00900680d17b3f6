"""The line budget: a product that is read is small.

Counts lines of code outside tests and benchmarks: what is left without blank lines, comments and docstrings, so that
explaining costs nothing (docs/decisions/004-line-budget.md). Exits 1 when a folder has too many, or a file is too long.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

BUDGETS = {"kernels": 3046, "model": 4760, "training": 3245, "server": 4570, "clients": 7345, "loadtests": 440}
LONGEST_FILE = 400


def code_lines(text: str) -> int:
    """Lines that hold code."""
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documentation.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for n, line in lines if line.strip() and not line.strip().startswith("#") and n not in documentation)


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    over = False
    for folder, budget in BUDGETS.items():
        texts = {
            path.relative_to(root): path.read_text(encoding="utf-8") for path in sorted((root / folder).rglob("*.py"))
        }
        lines = sum(code_lines(text) for text in texts.values())
        long = [path for path, text in texts.items() if text.count("\n") > LONGEST_FILE]
        over |= bool(long) or lines > budget
        physical = sum(text.count("\n") for text in texts.values())
        print(f"{folder:10} {lines:6} lines of code of {budget:6}, {physical:6} with comments, docstrings and blanks")
        for path in long:
            print(f"{path} is longer than {LONGEST_FILE} lines")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
