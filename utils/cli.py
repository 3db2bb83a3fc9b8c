"""The command line around Hydra: mistakes are found first, and exit codes say what happened.

0 done; 1 a run failed; 2 the configuration or an input is wrong; 130 interrupted (Ctrl-C); 143 terminated.
"""

import atexit
import logging
import os
import pickle
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from evals.sweep import close
from utils.compose import CommandLine, command_line_problems
from utils.engines import reach_workers
from utils.errors import InputError, RunError
from utils.files import full_disks_named
from utils.launched import (
    follower_arguments,
    heed_termination,
    launched,
    leave_after_first,
    note_termination,
    speaks,
)
from utils.secrets import cover_output
from utils.sweeping import Sweep, prepared, take_resume

log = logging.getLogger(__name__)
CONFIGS = Path(__file__).parent.parent / "configs"
KEPT = "interrupted; what was finished is kept"

DONE, RUN_FAILED, WRONG_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


def launch(main: Callable[[], None], config_dir: Path, expand: Callable[[Sequence[str]], list[str]] = list) -> None:
    """Check the whole command line, every job of a sweep included, then hand over to Hydra.

    Args:
        main: What Hydra decorated.
        config_dir: Where the configuration groups lie.
        expand: Puts overrides into the command line that an argument stands for.
    """
    cover_output()
    heed_interrupts()
    logging.raiseExceptions = False  # a log file on a full disk: the run says it once, in its own message
    asked = [] if speaks() else note_termination()
    try:
        typed, resume = take_resume(sys.argv[1:])
        sys.argv[1:] = expand(typed)  # where Hydra reads it
    except InputError as error:
        refuse([str(error)], asked)
    if not speaks():
        sys.argv[1:] = follower_arguments(sys.argv[1:])
    line = parse_command_line(sys.argv[1:], config_dir)
    if launched() and line is None and not speaks():
        return  # the first process shows it
    if launched() and line is not None and line.multirun:
        rule = "start torchrun once a job, or the sweep without it (hydra/launcher=joblib runs jobs side by side)"
        refuse([f"-m: a sweep can't be started by torchrun, which does one run in all its processes; {rule}"], asked)
    if line is not None and (problems := command_line_problems(line)):
        count = "are mistakes" if len(problems) > 1 else "is a mistake"
        said = f"There {count} in the configuration, nothing was run:"
        refuse([said, *(f"  - {problem}" for problem in problems)], asked)
    try:
        sweep = prepared(line, resume) if line is not None else None
    except InputError as error:
        refuse([str(error)], asked)
    if not speaks():
        heed_termination(asked)
    elif launched() is None:
        end_on_termination()
    if sweep is None:
        try:
            main()
        except KeyboardInterrupt:  # before or after the run itself
            _say(KEPT)
            sys.exit(INTERRUPTED)
        leave()
    else:
        sys.argv[1:] = sweep.told(sys.argv[1:])
        reach_workers(config_dir.parent)
        os.environ |= sweep.environment
        code = swept(main, sweep)
        if sweep.in_process:
            leave(code)
        sys.exit(code)  # a launcher's idle workers must be told in Python's own order


def swept(main: Callable[[], None], sweep: Sweep) -> int:
    """Run a sweep, and leave its table whole however it ends; returns the exit code."""
    code = DONE
    try:
        if sweep.left != 0:
            main()
    except KeyboardInterrupt:
        print(KEPT, file=sys.stderr)
        code = INTERRUPTED
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else RUN_FAILED
        if code == TERMINATED:
            print(KEPT.replace("interrupted", "terminated"), file=sys.stderr)
    good = _closed(sweep.folder)
    return code if code != DONE or good else RUN_FAILED


def _closed(sweep: Path) -> bool:
    """Whether a sweep's tables could be made and all its jobs are well."""
    try:
        with full_disks_named():
            return close(sweep)
    except RunError as error:
        again = f"python -m evals.report {shlex.quote(str(sweep))}"
        print(f"{error}: the sweep's tables are not made; with room, {again} makes them", file=sys.stderr)
        return False


def end_on_termination() -> None:
    """Let SIGTERM, which schedulers send before they kill, end a run as Ctrl-C does: what it has is written."""

    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is being done
        raise SystemExit(TERMINATED)

    signal.signal(signal.SIGTERM, end)


def heed_interrupts() -> None:
    """Let SIGINT interrupt where a shell has a background process ignore it, unless a terminal may send it.

    Without a terminal nobody presses Ctrl-C for another process: whoever sends it means this one.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and not _has_terminal():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def refuse(lines: Sequence[str], asked: Sequence[int] = ()) -> NoReturn:
    """Say what is wrong with the command line, once for all processes of a run, and end with exit code 2."""
    if not speaks():
        leave_after_first(WRONG_INPUT, asked)
    print("\n".join(lines), file=sys.stderr, flush=True)
    sys.exit(WRONG_INPUT)


def leave(code: int = DONE) -> NoReturn:
    """End a process that did its work; Python would first take torch apart, for a second.

    Exit handlers run, and what was printed is flushed.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def parse_command_line(arguments: list[str], config_dir: Path) -> CommandLine | None:
    """Read what decides the configuration; None where nothing is to be run (`--help`, `--cfg`, …)."""
    args = get_args_parser().parse_args(arguments)
    only_shows = (args.help, args.hydra_help, args.cfg, args.info, args.shell_completion, args.experimental_rerun)
    if any(only_shows):
        return None
    return CommandLine(
        config_dir=config_dir / args.config_path if args.config_path else config_dir,
        config_name=(args.config_name or "config").removesuffix(".yaml"),
        overrides=args.overrides,
        extra_dir=args.config_dir,
        multirun=args.multirun,
    )


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn a known error into its message and exit code.

    In a sweep it is raised on instead, since leaving the process would end the other jobs.
    """
    cover_output()
    try:
        with full_disks_named():
            yield
    except KeyboardInterrupt:
        _say(KEPT)
        sys.exit(INTERRUPTED)
    except SystemExit as end:
        if end.code == TERMINATED:
            _say(KEPT.replace("interrupted", "terminated"))
        raise
    except (InputError, RunError) as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            _say_failed(error)
            raise
        if os.environ.get("HYDRA_FULL_ERROR"):
            traceback.print_exc()
        _say(error)
        sys.exit(WRONG_INPUT if isinstance(error, InputError) else RUN_FAILED)
    except Exception as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            log.exception("%s", type(error).__name__)  # Hydra shows the first job's only
            _say_failed(error)
            if not _travels(error):
                # the sweep's other jobs must not be lost with what can't be sent to it
                raise RunError(f"{type(error).__name__}: {error}") from None
        raise


def _say_failed(error: Exception) -> None:
    """Name the job by its folder: a sweep that is taken up again numbers launches anew."""
    job = Path(HydraConfig.get().runtime.output_dir).name
    print(f"job {job} failed: {error}", file=sys.stderr, flush=True)


def _travels(error: Exception) -> bool:
    """Whether an error arrives at another process as what it is."""
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False


def _say(what: object) -> None:
    """Print to stderr; of a run in several processes the first one does."""
    if speaks():
        print(what, file=sys.stderr, flush=True)


def command() -> str:
    """The command that repeats the current Hydra job; a worker's own arguments would not tell it."""
    hydra = HydraConfig.get()
    sources = {source.provider: source.path for source in hydra.runtime.config_sources if source.schema == "file"}
    where = []
    if Path(sources.get("main", CONFIGS)).resolve() != CONFIGS.resolve():
        where += ["--config-path", sources["main"]]
    if hydra.job.config_name != "config":
        where += ["--config-name", hydra.job.config_name]
    if "command-line" in sources:
        where += ["--config-dir", sources["command-line"]]
    return shlex.join(["python", "main.py", *where, *hydra.overrides.task])
