"""The command line around Hydra: mistakes are found first, and exit codes say what happened.

0 done; 1 a run failed; 2 the configuration or an input is wrong.
"""

import atexit
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from evals.sweep import rebuild, write_page
from utils.compose import CommandLine, command_line_problems
from utils.errors import InputError, RunError

WRONG_INPUT, RUN_FAILED, INTERRUPTED = 2, 1, 130


def launch(main: Callable[[], None], config_dir: Path, expand: Callable[[Sequence[str]], list[str]] = list) -> None:
    """Check the whole command line, every job of a sweep included, then hand over to Hydra.

    Args:
        main: What Hydra decorated.
        config_dir: Where the configuration groups lie.
        expand: Puts overrides into the command line that an argument stands for.
    """
    try:
        sys.argv[1:] = expand(sys.argv[1:])  # where Hydra reads it
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(WRONG_INPUT)
    line = parse_command_line(sys.argv[1:], config_dir)
    if line is not None and (problems := command_line_problems(line)):
        count = "are mistakes" if len(problems) > 1 else "is a mistake"
        print(f"There {count} in the configuration, nothing was run:", file=sys.stderr)
        for problem in problems:
            print(f"  - {problem}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
    main()
    leave()


def leave() -> None:
    """End a process that did its work; Python would first take torch apart, for a second.

    Exit handlers run, and what was printed is flushed.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


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
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            rebuild(Path(HydraConfig.get().sweep.dir))
            write_page(Path(HydraConfig.get().sweep.dir))
        sys.exit(INTERRUPTED)
    except (InputError, RunError) as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            print(f"job {HydraConfig.get().job.num} failed: {error}", file=sys.stderr)
            raise
        if os.environ.get("HYDRA_FULL_ERROR"):
            traceback.print_exc()
        print(error, file=sys.stderr)
        sys.exit(WRONG_INPUT if isinstance(error, InputError) else RUN_FAILED)


def command() -> str:
    """The command that repeats the current Hydra job."""
    args = get_args_parser().parse_args(sys.argv[1:])
    named = {"--config-path": args.config_path, "--config-name": args.config_name, "--config-dir": args.config_dir}
    where = [part for flag, value in named.items() if value for part in (flag, value)]
    return shlex.join(["python", "main.py", *where, *HydraConfig.get().overrides.task])
