"""The three traffic shapes against a server of its own: `make loadtest`.

Serves the starter model (or --model), runs Locust with a profile whose objectives can fail, and exits with its code.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import inputs
from processes import free_port, plaudit_command, serving
from rows import circumstances

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--profile", default="cpu", help="a name in loadtests/profiles")
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--seconds", type=int, default=60)
    arguments = parser.parse_args()
    inputs.check("locust", *["starter"] * (arguments.model == "starter"))
    facts = circumstances()
    port = free_port()
    with serving(plaudit_command(Path(arguments.model), port), port) as url:
        locust = [str(Path(sys.executable).with_name("locust")), "--headless", "--host", url, "--only-summary"]
        traffic = ["--users", str(arguments.users), "--spawn-rate", str(arguments.users)]
        traffic += ["--run-time", f"{arguments.seconds}s", "--load", f"profiles/{arguments.profile}.toml"]
        report = ["--report", str(ROOT / "benchmarks" / "results" / "loadtest.csv"), "--commit", str(facts["commit"])]
        report += ["--hardware", f"{facts['cpu']}, {facts['cores']} cores"]
        return subprocess.run([*locust, *traffic, *report], cwd=ROOT / "loadtests", check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
