"""Programs that nobody has read, run where they can do no harm. Linux.

A program runs as a process of its own namespaces (user, mount, network, process ids, System V): no network, every
file system read-only but an empty one in memory, where it starts; without capabilities; with limits of processor
time, memory, processes and output; with nothing of our environment. When its time is up, everything that it has
started dies with it. It can still read the files that this user can read, and say nothing of them to anybody.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

OUTPUT_BYTES = 1 << 20
_UNSHARE = ("unshare", "--user", "--map-root-user", "--mount", "--net", "--pid", "--ipc", "--fork", "--kill-child")
_LAUNCHER = """
import ctypes, os, resource, struct, sys
seconds, memory, isolated, source = map(int, sys.argv[1:])
libc = ctypes.CDLL(None, use_errno=True)
def must(result):
    if result:
        sys.exit("sandbox: " + os.strerror(ctypes.get_errno()))
if isolated:
    must(libc.syscall(442, -100, b"/", 0x8000, struct.pack("QQQQ", 1, 0, 0, 0), 32))
    for place in filter(os.path.isdir, ("/run", "/tmp")):
        must(libc.mount(b"plaudit", place.encode(), b"tmpfs", 6, b"size=16m"))
    os.chdir("/tmp")
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)
    must(libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)))
must(libc.prctl(38, 1, 0, 0, 0))
for limit, value in (("CPU", seconds), ("AS", memory), ("FSIZE", 1 << 20), ("NPROC", 64), ("CORE", 0), ("NOFILE", 64)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (value, value))
with open(source, "r+b") as file:
    program = file.read()
    os.ftruncate(source, 0)
sys.argv[:] = [""]
exec(compile(program, "program", "exec"), {"__name__": "__main__"})
"""
"""mount_setattr (442) makes every mount read-only at once; sockets of services lie under /run; PR_CAPBSET_DROP is 24,
PR_SET_NO_NEW_PRIVS 38."""
_PROBE = "open('/tmp/probe', 'w').close()\ntry: open('/var/tmp/probe', 'w')\nexcept OSError: print('isolated')"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended: `code` is None if its time was up. `output`: its standard output, at most 1 MiB."""

    code: int | None
    output: bytes


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Without `isolated`, only the limits hold: the program has the network, and all files of this user."""

    seconds: float
    memory_mb: int
    isolated: bool = True

    def run(self, program: str, given: bytes = b"") -> Ended:
        """Run a Python program with `given` on its standard input. Raises OSError if there is no way to run it."""
        prefix = _UNSHARE if self.isolated else ()
        numbers = [str(int(self.seconds) + 1), str(self.memory_mb << 20), str(int(self.isolated))]
        with (
            tempfile.TemporaryDirectory() as empty,
            tempfile.TemporaryFile() as source,
            tempfile.TemporaryFile() as input_,
            tempfile.TemporaryFile() as out,
        ):
            source.write(b"\n" + program.encode("utf-8", "surrogatepass"))
            source.seek(0)
            command = [*prefix, sys.executable, "-I", "-c", _LAUNCHER, *numbers, str(source.fileno())]
            input_.write(given)
            input_.seek(0)
            process = subprocess.Popen(
                command, stdin=input_, stdout=out, stderr=subprocess.DEVNULL, cwd=empty, start_new_session=True,
                pass_fds=[source.fileno()],
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp"},
            )  # fmt: skip
            try:
                code: int | None = process.wait(self.seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
            if os.fstat(source.fileno()).st_size:  # the launcher empties it once everything is in place
                raise OSError("the program was not started: its namespaces or limits could not be set up")
            out.seek(0)
            return Ended(code, out.read(OUTPUT_BYTES))


def works() -> bool:
    """Whether programs can be isolated here: not in every container may namespaces be made."""
    try:
        return Sandbox(30, 512).run(_PROBE) == Ended(0, b"isolated\n")
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Its whole process group, and by --kill-child everything in its namespaces."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
