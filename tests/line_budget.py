"""The line budget: a product that is read is small. Exits 1 when the source outside tests and benchmarks exceeds it."""

from __future__ import annotations

import sys
from pathlib import Path

BUDGET = 14_000
LONGEST_FILE = 400
FOLDERS = ("kernels", "model", "training", "server", "clients", "loadtests")


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    counts = {
        path.relative_to(root): path.read_text(encoding="utf-8").count("\n")
        for folder in FOLDERS
        for path in (root / folder).rglob("*.py")
    }
    total = sum(counts.values())
    long = [
        f"{path} has {lines} lines, at most {LONGEST_FILE}" for path, lines in counts.items() if lines > LONGEST_FILE
    ]
    for complaint in long:
        print(complaint)
    print(f"{total} lines of source in {len(counts)} files (budget {BUDGET})")
    return int(bool(long) or total > BUDGET)


if __name__ == "__main__":
    sys.exit(main())
