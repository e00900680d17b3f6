"""The load tests are scripts beside each other, not a package: their folder is put on the path as Locust does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "loadtests"))
