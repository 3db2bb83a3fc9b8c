"""Runs of main.py with a fault at a chosen moment, in forks of a process that has everything imported.

A moment is the n-th event of a kind: `file` (a write half done, before and after it is flushed, moved, linked or
removed) or `call` (a module of a network is called). `python -m tests.faults` reads one JSON line a run, and answers
each by one.
"""

import atexit
import errno
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parent.parent
Kind = Literal["file", "call"]
# seconds after which a run is killed
LONGEST = 600
SIGNALS = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT, "terminate": signal.SIGTERM}


@dataclass(frozen=True)
class Fault:
    """What happens, and when.

    Attributes:
        what: `kill`, `interrupt` or `terminate`; or the name of an error number, which the system call fails with.
        at: At which event of the kind, from 1.
        kind: Of which events.
        lasting: Whether all later ones fail as well, as on a full disk.
        inside: Only events whose path has this in it.
    """

    what: str
    at: int
    kind: Kind = "file"
    lasting: bool = False
    inside: str = ""


@dataclass(frozen=True)
class Done:
    """How a run ended: exit code (minus the signal's number if one killed it), what it printed, its events."""

    code: int
    out: str
    err: str
    events: dict[str, int]


class Runner:
    """Starts runs, one at a time or several at once."""

    def __init__(self, root: Path = ROOT) -> None:
        command = [sys.executable, "-m", "tests.faults"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=root, stdin=pipe, stdout=pipe, text=True)

    def run(
        self,
        folder: Path,
        arguments: Sequence[str],
        fault: Fault | None = None,
        at_once: int = 1,
        whole: bool = False,
        environments: Sequence[Mapping[str, str]] = (),
    ) -> list[Done]:
        """Run `python main.py <arguments>` in a folder, in so many processes at once.

        Args:
            folder: Where; results of a run that is not `whole` lie in its `out<number>`.
            arguments: Overrides.
            fault: What happens.
            at_once: How many.
            whole: With Hydra and its command line, and pictures drawn: that takes longer than the run itself.
            environments: Variables that each process has beside those of this one; `PYTHONPATH` is gone by, too.
        """
        folder.mkdir(exist_ok=True)
        asked = {"folder": str(folder), "arguments": [*arguments], "fault": asdict(fault) if fault else None}
        asked |= {"whole": whole, "at_once": at_once, "environments": [dict(each) for each in environments]}
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return [Done(**found) for found in json.loads(self.process.stdout.readline())]

    def close(self) -> None:
        """End it."""
        self.process.communicate(timeout=300)


@contextmanager
def runner(root: Path = ROOT) -> Iterator[Runner]:
    """A runner of the `main.py` in a folder, for the time of a `with`."""
    found = Runner(root)
    try:
        yield found
    finally:
        found.close()


def serve() -> None:
    """Answer requests until there are no more."""
    _import_everything()
    for line in sys.stdin:
        asked = json.loads(line)
        children = [_forked(number, asked) for number in range(asked["at_once"])]
        print(json.dumps([_ended(pid, Path(asked["folder"]), number) for number, pid in enumerate(children)]))
        sys.stdout.flush()
    gc.unfreeze()


def _import_everything() -> None:
    import fvcore.nn  # noqa: F401
    import hydra.core.override_parser.overrides_parser  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import plotly.graph_objects  # noqa: F401
    import torch._dynamo  # noqa: F401  (what torch itself imports once an optimizer is made)
    from hydra.core.plugins import Plugins

    import data.digits  # noqa: F401
    import evals.accuracy  # noqa: F401
    import evals.macs  # noqa: F401
    import evals.report  # noqa: F401
    import evals.sweep_page  # noqa: F401
    import evals.terminal  # noqa: F401
    import models.toy_encoder  # noqa: F401
    import prune.rankers.fisher  # noqa: F401
    import prune.rankers.optin  # noqa: F401
    import prune.recipe  # noqa: F401
    import prune.recovery.finetune  # noqa: F401
    import prune.rounds  # noqa: F401
    import prune.search  # noqa: F401

    Plugins.instance()
    # else every fork would go through what is imported again, and copy the memory that it lies in
    gc.collect()
    gc.freeze()


def _forked(number: int, asked: dict[str, Any]) -> int:
    if pid := os.fork():
        return pid
    code, folder = 1, Path(asked["folder"])
    events = _Events(Fault(**asked["fault"]) if asked["fault"] else None, folder / f".events{number}")
    try:
        for name, stream in (("out", 1), ("err", 2)):
            os.dup2(os.open(folder / f".{name}{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.chdir(folder)
        _take_environment(dict(enumerate(asked["environments"])).get(number, {}))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(LONGEST)
        events.install()
        if asked["whole"]:
            sys.argv = [str(ROOT / "main.py"), *asked["arguments"]]
            runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
        else:
            _only_run(asked["arguments"], folder / f"out{number}")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    events.write()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _take_environment(variables: dict[str, str]) -> None:
    os.environ.update(variables)
    sys.path[1:1] = variables.get("PYTHONPATH", "").split(os.pathsep) if variables.get("PYTHONPATH") else []


def _only_run(arguments: list[str], out: Path) -> None:
    """What the command line does once it is checked."""
    from hydra import compose, initialize_config_dir
    from matplotlib.figure import Figure

    from main import run

    def undrawn(self: Figure, fname: Any, **how: Any) -> None:
        fname.write(b"a picture")

    Figure.savefig = undrawn
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("config", arguments)
    run(cfg, out)


def _ended(pid: int, folder: Path, number: int) -> dict[str, Any]:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = [(folder / f".{name}{number}").read_text(errors="replace") for name in ("out", "err")]
    path = folder / f".events{number}"
    events = json.loads(path.read_text()) if path.exists() else {}
    path.unlink(missing_ok=True)
    return {"code": code, "out": texts[0], "err": texts[1], "events": events}


class _Events:
    """Counts events, and makes the fault happen at one of them."""

    def __init__(self, fault: Fault | None, log: Path) -> None:
        self.fault, self.log = fault, log
        self.counts = {"file": 0, "call": 0}
        self.owner = os.getpid()

    def install(self) -> None:
        """Watch the system calls that change files, and the calls of modules."""
        from torch.nn.modules.module import register_module_forward_pre_hook

        atexit.register(self.write)
        for name in ("fsync", "replace", "link", "unlink"):
            # what is written can be taken away again on a full disk, too
            if name != "unlink" or self.fault is None or self.fault.what in SIGNALS:
                setattr(os, name, self._watched(getattr(os, name)))
        os.fdopen = self._halving(os.fdopen)
        register_module_forward_pre_hook(lambda module, args: self.happened("call", ""))

    def happened(self, kind: str, path: object) -> None:
        """Count one, and fail if it is the one."""
        if os.getpid() != self.owner:
            return
        fault = self.fault
        if fault is not None and (fault.kind != kind or fault.inside not in str(path)):
            return
        self.counts[kind] += 1
        if fault is None or self.counts[kind] < fault.at or (self.counts[kind] > fault.at and not fault.lasting):
            return
        if fault.what in SIGNALS:
            os.kill(os.getpid(), SIGNALS[fault.what])
            return
        number = getattr(errno, fault.what)
        raise OSError(number, os.strerror(number))

    def _watched(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            path = _named(args[0])
            self.happened("file", path)
            found = real(*args, **kwargs)
            if self.fault is None or self.fault.what == "kill":
                self.happened("file", path)
            return found

        return call

    def _halving(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Files whose first half is there when the event happens."""

        def opened(descriptor: int, *args: Any, **kwargs: Any) -> Any:
            file = real(descriptor, *args, **kwargs)
            path, write = _named(descriptor), file.write

            def in_halves(content: Any) -> int:
                write(content[: len(content) // 2])
                file.flush()
                self.happened("file", path)
                return write(content[len(content) // 2 :])

            class Halving:
                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *given: Any) -> Any:
                    return file.__exit__(*given)

                def __getattr__(self, name: str) -> Any:
                    return getattr(file, name)

                write = staticmethod(in_halves)

            return Halving() if not args or "w" in args[0] else file

        return opened

    def write(self) -> None:
        """Leave word of what was counted."""
        if os.getpid() == self.owner:
            self.log.write_text(json.dumps(self.counts))


def _named(path: Any) -> str:
    return os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)


if __name__ == "__main__":
    serve()
