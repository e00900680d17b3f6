"""The root of the command, over verbs written into a temporary package."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import click
import pytest

from plaudit import _config, cli
from plaudit._extras import install
from plaudit._summaries import summary
from plaudit.errors import ConfigurationError

VERBS = '''
    from __future__ import annotations
    import typer
    from typing import Annotated

    class Failed(Exception):
        exit_code = 75

    app = typer.Typer(help="Group of things [all]. More of it.")

    @app.command()
    def inspect(depth: int = 1) -> None:
        """Look into it."""
        typer.echo(f"depth={depth}")

    @app.command("to-disk")
    def to_disk(rows: int = 1) -> None:
        """Keep it."""
        typer.echo(f"rows={rows}")

    lone = typer.Typer()

    @lone.callback()
    def lone_root() -> None:
        """Only one command below."""

    @lone.command()
    def show() -> None:
        typer.echo("shown")

    def greet(
        name: Annotated[str, typer.Argument()] = "you",
        times: Annotated[int, typer.Option(min=1)] = 1,
        tags: Annotated[list[str] | None, typer.Option()] = None,
        max_length: int = 7,
        loud: bool = False,
    ) -> None:
        """Say hello to plaudit[train]. And more.

        At length.
        """
        typer.echo(f"{name} {times} {tags} {max_length} {loud}")

    def fail(how: str) -> None:
        """Fail."""
        if how == "known":
            raise Failed("first line\\nsecond line")
        if how == "interrupt":
            raise KeyboardInterrupt
        if how == "extra":
            import no_such_library
        if how == "exit":
            raise typer.Exit(3)
        raise RuntimeError("a bug")

    def silent() -> None:
        raise typer.Abort
'''


@pytest.fixture
def verbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, EntryPoint]]:
    """Entry points into a package made for one test. The current directory is empty but for it."""
    package = tmp_path / "plaudit_training_verbs"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "cli.py").write_text(textwrap.dedent(VERBS), encoding="utf-8")
    (package / "heavy.py").write_text('import no_such_library\n\ndef lift() -> None:\n    """Lift it."""\n')
    (package / "broken.py").write_text('import plaudit.no_such_module\n\ndef lift() -> None:\n    """Lift it."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(cli.EXTRAS, "plaudit_training_verbs", "train")
    names = {name: f"cli:{name}" for name in ("greet", "fail", "lone", "silent")}
    names |= {"group": "cli:app", "lift": "heavy:lift", "broken": "broken:lift", "gone": "nowhere:lift"}
    yield {name: EntryPoint(name, f"plaudit_training_verbs.{target}", cli.GROUP) for name, target in names.items()}
    for module in [name for name in sys.modules if name.startswith("plaudit_training_verbs")]:
        del sys.modules[module]


@pytest.fixture
def run(verbs: dict[str, EntryPoint], capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`run(*args)` is (exit code, standard output, standard error)."""

    def call(*args: str) -> tuple[int, str, str]:
        code = cli.run(args, verbs)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_help_lists_every_verb_and_imports_none(run: Callable[..., Any]) -> None:
    code, out, _ = run("--help")
    lines = {line.split()[0]: line.split(None, 1)[1:] for line in out.splitlines() if line.startswith("  ")}
    assert code == 0
    assert lines["greet"] == ["Say hello to plaudit[train]."] and lines["group"] == ["Group of things [all]."]
    assert lines["lone"] == ["Only one command below."] and lines["lift"] == ["Lift it."]
    assert lines["gone"] == [] and lines["silent"] == []
    assert not [name for name in sys.modules if name.startswith("plaudit_training_verbs.")]
    assert run() == (code, out, "")


def test_help_of_a_verb_keeps_its_brackets(run: Callable[..., Any]) -> None:
    code, out, _ = run("greet", "-h")
    assert code == 0 and "plaudit[train]" in out and "At length." in out and "PLAUDIT_GREET_MAX_LENGTH" in out


def test_the_version_is_shown(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAUDIT_VERSION", "9.9")  # a deployment's variable, not our option
    assert run("--version")[1].startswith("plaudit ")
    assert run("greet")[0] == 0


def test_groups_and_functions_run(run: Callable[..., Any]) -> None:
    assert run("greet", "me", "--times", "2", "--tags", "a", "--tags", "b")[:2] == (0, "me 2 ['a', 'b'] 7 False\n")
    assert run("group", "inspect", "--depth", "4")[:2] == (0, "depth=4\n")
    assert run("lone", "show")[:2] == (0, "shown\n")


def test_an_option_comes_from_the_line_else_the_environment_else_the_file(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("plaudit.toml").write_text('[greet]\ntimes = 3\nmax-length = 30\ntags = ["x", "y"]\nloud = true\n')
    assert run("greet")[1] == "you 3 ['x', 'y'] 30 True\n"
    monkeypatch.setenv("PLAUDIT_GREET_TIMES", "4")
    monkeypatch.setenv("PLAUDIT_GREET_LOUD", "false")
    assert run("greet")[1] == "you 4 ['x', 'y'] 30 False\n"
    assert run("greet", "--times", "5", "--max-length", "50")[1] == "you 5 ['x', 'y'] 50 False\n"


def test_a_variable_with_a_typo_is_told_and_others_are_not(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for fine in ("GREET_TIMES", "API_KEY", "GROUP_TO_DISK_ROW", "RUN", "SERVICE_HOST", "TIMEOUT"):
        monkeypatch.setenv(f"PLAUDIT_{fine}", "4")
    assert run("greet")[2] == ""
    for name in ("GREET_TIME", "GRET_LOUD", "APIKEY", "GREET_SERVICE_HOST", "GREET_NAME"):
        monkeypatch.setenv(f"PLAUDIT_{name}", "5")
    code, out, err = run("greet")
    assert code == 0 and out.startswith("you 4")
    assert err == (
        "warning: `plaudit greet` does not read PLAUDIT_APIKEY (did you mean PLAUDIT_API_KEY?), PLAUDIT_GREET_NAME, "
        "PLAUDIT_GREET_SERVICE_HOST, PLAUDIT_GREET_TIME (did you mean PLAUDIT_GREET_TIMES?), PLAUDIT_GRET_LOUD "
        "(did you mean PLAUDIT_GREET_LOUD?)\n"
    )
    assert "(did you mean PLAUDIT_GROUP_TO_DISK_ROWS?)" in run("group", "to-disk")[2]


def test_what_kubernetes_says_of_a_service_of_our_name_is_no_typo() -> None:
    serve = click.Command("serve", params=[click.Option([f"--{name}"]) for name in ("host", "port")])
    ours = [f"PLAUDIT_{name}" for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT_8000_TCP_PORT")]
    assert _config.unread([*ours, "PLAUDIT_SERV_PORT"], serve, "serve", ["serve"]) == [
        "PLAUDIT_SERV_PORT (did you mean PLAUDIT_SERVE_PORT?)"
    ]


def test_a_subcommand_has_its_own_table(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("plaudit.toml").write_text("[group.inspect]\ndepth = 8\n[group.to-disk]\nrows = 9\n")
    assert run("group", "inspect")[1] == "depth=8\n" and run("group", "to-disk")[1] == "rows=9\n"
    monkeypatch.setenv("PLAUDIT_GROUP_TO_DISK_ROWS", "10")
    assert run("group", "to-disk")[1] == "rows=10\n"


def test_another_file_can_be_named(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("plaudit.toml").write_text("[greet]\ntimes = 3\n")
    Path("other.toml").write_text("[greet]\ntimes = 6\n")
    assert run("--config-file", "other.toml", "greet")[1].startswith("you 6")
    monkeypatch.setenv("PLAUDIT_CONFIG_FILE", "other.toml")
    assert run("greet")[1].startswith("you 6")
    assert run("--config-file", "none.toml", "greet")[0] == 78


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[greet]\ntime = 3\n", "[greet] has the unknown key 'time'; known: "),
        ("[gret]\ntimes = 3\n", "unknown table [gret]; verbs: "),
        ("greet = 3\n", "'greet' must be a table"),
        ("times = 3\n", "unknown table [times]"),
        ("[greet\n", "cannot be read as TOML"),
    ],
)
def test_a_configuration_with_a_mistake_stops_the_verb(run: Callable[..., Any], text: str, reason: str) -> None:
    Path("plaudit.toml").write_text(text)
    code, out, err = run("greet")
    assert (code, out) == (78, "") and err.startswith("error: plaudit.toml") and reason in err


def test_a_mistake_in_a_subcommands_table_is_found(run: Callable[..., Any]) -> None:
    Path("plaudit.toml").write_text("[group.inspect]\ndeep = 8\n")
    assert "[group.inspect] has the unknown key 'deep'" in run("group", "inspect")[2]
    Path("plaudit.toml").write_text("[group]\nother = 8\n")
    assert "known: inspect, to-disk" in run("group", "inspect")[2]
    Path("plaudit.toml").write_text('[greet]\ntimes = "often"\n')
    assert run("greet")[0] == 2


def test_known_errors_are_one_line_and_their_exit_code(run: Callable[..., Any]) -> None:
    assert run("fail", "known") == (75, "", "error: first line second line\n")
    assert run("fail", "exit") == (3, "", "")
    assert run("fail", "interrupt")[:2] == (130, "")
    assert run("silent")[0] == 130


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("gret",), "No such command 'gret'. Did you mean 'greet'?"),
        (("greet", "--tims", "1"), "No such option: --tims"),
        (("greet", "--times", "0"), "--times"),
        (("fail",), "Missing argument"),
        (("group",), "Missing command"),
        (("--nope",), "No such option: --nope"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(run: Callable[..., Any], args: tuple[str, ...], reason: str) -> None:
    code, out, err = run(*args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and reason in err and "--help`)" in err


def test_an_error_that_nobody_foresaw_keeps_its_traceback_and_exits_70(
    verbs: dict[str, EntryPoint], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plaudit", "fail", "bug"])
    monkeypatch.setattr(cli, "entry_points", lambda group: verbs.values())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    err = capsys.readouterr().err
    assert ended.value.code == 70 and "Traceback" in err and err.endswith("RuntimeError: a bug\n")


@pytest.mark.parametrize("args", [("lift",), ("lift", "--help"), ("fail", "extra")])
def test_a_missing_extra_names_the_line_that_brings_it(run: Callable[..., Any], args: tuple[str, ...]) -> None:
    code, _, err = run(*args)
    assert code == 78
    expected = f"needs no_such_library, which is not installed: {install('train')}\n"
    assert err == f"error: `plaudit {args[0]}` {expected}"


def test_a_module_of_ours_that_is_missing_is_a_bug_not_an_extra(run: Callable[..., Any]) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        run("broken")


def test_a_verb_can_be_loaded_alone(verbs: dict[str, EntryPoint]) -> None:
    root = cli.build(verbs)
    assert [p.name for p in root.load("greet").params] == ["name", "times", "tags", "max_length", "loud"]
    with pytest.raises(ConfigurationError, match="plaudit lift"):
        root.load("lift")


def test_a_summary_of_what_cannot_be_found_is_empty() -> None:
    for target in ("no_such_package.cli:run", "plaudit.cli:no_such_function", "plaudit.cli:GROUP"):
        assert summary(EntryPoint("x", target, cli.GROUP)) == ""


def test_the_installed_command_lists_its_verbs_without_their_libraries() -> None:
    code = "import sys; from plaudit import cli; sys.argv = ['plaudit', '--help']\ntry:\n cli.main()\nfinally:\n "
    code += "sys.stderr.write(','.join({'torch', 'numpy', 'fastapi', 'transformers', 'httpx2'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    installed = {entry.name for entry in entry_points(group=cli.GROUP)}
    assert (run.returncode, run.stderr) == (0, "")
    assert installed and installed <= {line.split()[0] for line in run.stdout.splitlines() if line.strip()}
