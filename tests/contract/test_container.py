"""The container's promises, read from the Dockerfile: no daemon is needed to see that they are kept."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Instruction:
    name: str
    value: str


def stages() -> dict[str, list[Instruction]]:
    """The instructions of each stage, by the stage's name, with the variables of the file filled in."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", " ")
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, value = line.partition(" ")
        if name == "FROM":
            current = found.setdefault(value.split(" AS ")[1], [])
        current.append(Instruction(name, " ".join(value.split())))
    return found


STAGES = stages()
RUNTIME = STAGES["runtime"]


def last(name: str) -> str:
    values = [instruction.value for instruction in RUNTIME if instruction.name == name]
    assert values, f"the runtime stage has no {name}"
    return values[-1]


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in last("ENV").split())


def test_the_runtime_stage_is_the_last() -> None:
    assert list(STAGES)[-1] == "runtime"


def test_it_does_not_run_as_root() -> None:
    assert last("USER") not in ("root", "0", "0:0")
    after_user = RUNTIME[[i.name for i in RUNTIME].index("USER") :]
    assert not any(i.name in ("RUN", "COPY", "ADD") for i in after_user)


def test_health_is_readiness_asked_without_curl() -> None:
    check = last("HEALTHCHECK")
    command = json.loads(check[check.index("CMD ") + 4 :])
    assert command[0] == "python" and "/readyz" in command[-1]
    compile(command[-1], "HEALTHCHECK", "exec")
    assert "--start-period" in check


def test_it_starts_the_command_and_not_a_module_path() -> None:
    assert json.loads(last("ENTRYPOINT")) == ["plaudit"]
    command = json.loads(last("CMD"))
    assert command[0] == "serve"
    assert command[command.index("--host") + 1] == "0.0.0.0"


def test_the_source_never_reaches_the_image_and_is_never_on_the_path() -> None:
    assert environment()["PYTHONSAFEPATH"] == "1"
    copies = [i.value for i in RUNTIME if i.name in ("COPY", "ADD")]
    assert all(value.startswith("--from=environment ") for value in copies)
    assert last("WORKDIR") not in ("/", "/source", "/opt/plaudit")


def test_caches_are_volumes() -> None:
    volumes = json.loads(last("VOLUME"))
    assert {environment()[name] for name in ("PLAUDIT_HOME", "TRITON_CACHE_DIR", "HF_HOME")} == set(volumes)


def test_the_wheel_is_installed_with_its_extra_and_the_constraints() -> None:
    runs = " ".join(i.value for i in STAGES["environment"] if i.name == "RUN")
    assert "plaudit-*.whl)[server]" in runs
    assert runs.count("--constraint /tmp/constraints.txt") == 2
    assert not any(i.name == "COPY" and i.value.startswith(".") for stage in STAGES.values() for i in stage)


def test_both_devices_have_a_base_and_cuda_has_what_triton_compiles_with() -> None:
    assert {"base-cuda", "base-cpu"} <= set(STAGES)
    cuda = " ".join(i.value for i in STAGES["base-cuda"] if i.name == "RUN")
    assert all(f" {package}" in cuda for package in ("gcc", "libc6-dev", "libpython3.12-dev"))


def copied_from_the_context() -> list[str]:
    copies = [i.value for stage in STAGES.values() for i in stage if i.name == "COPY" and "--from" not in i.value]
    return [source for value in copies for source in value.split()[:-1]]


def test_the_build_context_holds_what_is_copied_and_nothing_else() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    admitted = [line.removeprefix("!") for line in ignore if line.startswith("!")]
    assert "*" in ignore
    assert sorted(admitted) == sorted(copied_from_the_context())
    assert all((ROOT / name).exists() for name in admitted)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from no more than the Dockerfile copies."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in copied_from_the_context():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-P", "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=source, env={**os.environ, "PYTHONSAFEPATH": "1"}, check=True, capture_output=True,
    )  # fmt: skip
    (path,) = out.glob("plaudit-*.whl")
    return zipfile.ZipFile(path)


def test_what_the_dockerfile_copies_makes_the_whole_wheel(wheel: zipfile.ZipFile) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    names = set(wheel.namelist())
    for package in packages:
        sources = {path.relative_to(ROOT / package).as_posix() for path in (ROOT / package).rglob("*.py")}
        assert sources, f"{package} is empty"
        missing = {f"{Path(package).name}/{source}" for source in sources} - names
        assert not missing


def test_the_wheel_brings_nothing_generic_and_the_command(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    packages = ("compose", "kernels", "loops", "model", "server", "training")
    assert tops == {"plaudit", *(f"plaudit_{package}" for package in packages)}
    assert all(f"{top}/py.typed" in names for top in tops)
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "plaudit = plaudit.cli:main" in wheel.read(entry_points).decode()
