"""Configurations made to hurt: refused soon, by name, with nothing expanded, imported or called."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hydra_plugins.pare.cluster import knock
from tests.test_config import problems
from utils.check import MOST_VALUES
from utils.cli import heed_interrupts
from utils.compose import printable
from utils.config_files import MOST_BYTES, config_file_problems, searched_folders, why_too_large
from utils.files import why_not_writable
from utils.secrets import redacted, why_secret
from utils.targets import engine_refusals

MOST_SECONDS = 3.0
TARGET = "_target_: prune.rankers.fisher.Fisher\n"
LAUGHS = TARGET + "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
REFERENCES = TARGET + "a0: [x]\n" + "".join(
    f"a{n}: [{', '.join([repr('${prune.a' + str(n - 1) + '}')] * 10)}]\n" for n in range(1, 12)
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < MOST_SECONDS


def option(folder: Path, text: str) -> Path:
    (folder / "prune").mkdir()
    (folder / "prune" / "x.yaml").write_text(text)
    return folder


@pytest.mark.parametrize("text", [LAUGHS, TARGET + "a: " + "[" * 5000, "".join(f"{' ' * n}a:\n" for n in range(300))])
def test_a_file_that_stands_for_too_much_is_refused(text: str, tmp_path: Path) -> None:
    option(tmp_path, text)
    for line in (("--config-dir", str(tmp_path)), (f"hydra.searchpath=[file://{tmp_path}]",)):
        (found,) = problems(*line, "prune=x")
        assert found.startswith(f"{tmp_path}/prune/x.yaml: must be at most {MOST_VALUES} values, at most 64 deep")


def test_anchors_are_counted_as_often_as_they_are_named() -> None:
    fine = "a: &a [1, 2, 3]\n" + "".join(f"b{n}: *a\n" for n in range(800))
    assert why_too_large(fine) is None and why_too_large("a: [1") is None and why_too_large("") is None
    assert why_too_large("a: &a [1, 2, 3]\n" + "".join(f"b{n}: *a\n" for n in range(5000)))


def test_references_that_stand_for_too_much_are_refused(tmp_path: Path) -> None:
    found = problems("--config-dir", str(option(tmp_path, REFERENCES)), "prune=x")
    assert any("with all references followed" in line for line in found)


def test_files_that_are_none_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pipe.yaml").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\x00")
    (tmp_path / "large.yaml").write_bytes(b"#" * (MOST_BYTES + 1))
    (tmp_path / "fine.yaml").write_text("a: 1\n")
    found = "\n".join(config_file_problems(tmp_path))
    for name, why in [("pipe", "an ordinary file"), ("fifo", "an ordinary file"), ("large", f"at most {MOST_BYTES}")]:
        assert any(f"{name}.yaml: " in line and why in line for line in found.splitlines()), name
    assert "loop.yaml: cannot be read" in found and "bytes.yaml: cannot be read" in found and "fine" not in found


def test_a_primary_configuration_names_further_folders(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("hydra: {searchpath: ['file:///a/b', 'pkg://c', 5]}\n")
    assert searched_folders(path) == [Path("/a/b")]
    for text in ("hydra: 1", "- a", "a: [", LAUGHS):
        path.write_text(text)
        assert searched_folders(path) == []


@pytest.mark.parametrize(
    "override",
    [
        "+prune.x=" + "{a:" * 100 + "1" + "}" * 100, "+prune.x=" + "[" * 3000 + "]" * 3000, "prune.ratio=" + "9" * 5000,
        "+prune." + ".".join(["a"] * 3000) + "=1", "name=" + "a" * 2_000_000, "prune.ratio=" + "choice(" * 300,
        "prune=\x1b[31mfisher", "prune=fi\u202esher", "prune=a\nb", "prune.ratio=\0", "name=\udcff", "",
    ],
)  # fmt: skip
def test_odd_texts_are_refused_in_plain_letters(override: str) -> None:
    (found,) = problems(override)
    assert "cannot be read; it must be key=value" in found and found.isprintable()


def test_what_steers_a_terminal_is_shown_by_its_code() -> None:
    assert printable("a\x1b[2J\u202e\n") == "a\\x1b[2J\\u202e\\n" and printable("plain é 漢") == "plain é 漢"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+prune._partial_=true", "prune._partial_=true: must be false"),
        ("evals=[accuracy] +evals.accuracy._partial_=true", "evals.accuracy._partial_=true: must be false"),
        ("+prune._args_=[1]", "prune._args_=[1]: is not taken"),
        ("+prune._args_=[{_target_:os.system}]", "prune._args_[0]._target_=os.system: must be a component"),
        ("+prune._convert_=nope", "prune._convert_=nope: must be one of"),
        ("+prune._recursive_=7", "prune._recursive_=7: must be true or false"),
        ("prune._target_=tests.test_cli.call", "prune._target_=tests.test_cli.call: must be a component of prune"),
        ("+hydra.callbacks.x=${model}", "hydra.callbacks.x._target_=models.toy_encoder.toy_encoder: must be"),
        ("+hydra.callbacks.x=text", "hydra.callbacks.x=text: must be a mapping"),
        ("+hydra.callbacks.x={_target_:evals.sweep.SweepReport,a:1}", "hydra.callbacks.x.a: "),
        ("+hydra.callbacks.x._target_=nosuch.module.Thing", "hydra.callbacks.x._target_=nosuch.module.Thing: must be"),
        ("hydra.job_logging.root.level=NOPE", "hydra.job_logging.root.level=NOPE: must be a level"),
        ("hydra.job_logging.root.handlers=[nosuch]", "hydra.job_logging.root.handlers=[nosuch]: must be handlers"),
        ("hydra.job_logging.version=7", "hydra.job_logging.version=7: must be 1"),
        ("hydra.verbose=7", "hydra.verbose=7: must be true, false"),
        ("+hydra.job.env_set.LD_PRELOAD=/x", "hydra.job.env_set.LD_PRELOAD=/x: must not be set"),
    ],
)  # fmt: skip
def test_what_would_be_called_is_refused(override: str, message: str) -> None:
    assert any(line.startswith(message) for line in problems(*override.split(" "))), override


@pytest.mark.parametrize(
    "target",
    [
        "hydra_plugins.pare.search.import_module", "hydra.experimental.callbacks.pickle.loads", "pathlib.Path",
        "hydra_plugins.pare.resume.Path", "hydra._internal.core_plugins.zsh_completion.os.system",
        "hydra_plugins.pare.search.logging.os.system", "evals.sweep.SweepReport.x", "optuna.samplers.os.system",
    ],
)  # fmt: skip
def test_names_inside_of_modules_are_no_engines(target: str) -> None:
    if target.startswith("optuna"):
        pytest.importorskip("optuna")
    assert len(list(engine_refusals({"sweeper": {"_target_": target}}))) == 1


@pytest.mark.parametrize("name", ["logging.os.system", "logging.config.listen", "logging.handlers.pickle.loads"])
@pytest.mark.parametrize("key", ["class", "()", "queue"])
def test_names_inside_of_logging_are_no_handlers(name: str, key: str) -> None:
    for part in ("handlers", "formatters", "filters"):
        assert len(list(engine_refusals({"job_logging": {part: {"x": {key: name}}}}))) == 1


def test_shipped_engines_and_handlers_are_taken() -> None:
    samplers = {name: {"_target_": f"optuna.samplers.{name}Sampler"} for name in ("TPE", "Random", "Grid", "NSGAII")}
    ours = {name: {"_target_": f"hydra_plugins.pare.{name}"} for name in ("search.Search", "cluster.Cluster")}
    handlers = {name: {"class": f"logging.{name}"} for name in ("StreamHandler", "FileHandler", "NullHandler")}
    assert list(engine_refusals({"sweeper": samplers | ours, "job_logging": {"handlers": handlers}})) == []


@pytest.mark.parametrize("text", ["a" * 1_000_000, "a://" * 250_000, "&a" * 500_000, "${ " * 300_000])
def test_long_texts_are_searched_for_secrets_at_once(text: str) -> None:
    assert redacted(text) == text and why_secret(text) is None


def test_a_place_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    assert why_not_writable(tmp_path / "a" / "b") is None and list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "x", Path("/proc/x/y"), tmp_path / ("n" * 300)):
        assert why_not_writable(place) or place.name.startswith("n")


def test_nobody_at_an_address_is_noticed_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(ConnectionError):
            knock(f"127.0.0.1:{port}")
        taken.listen()
        knock(f"127.0.0.1:{port}")
    for address in (None, "local", "auto", "somewhere"):
        knock(address)


def test_an_interrupt_without_a_terminal_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    before = signal.getsignal(signal.SIGINT)
    try:
        for terminal, heeded in ((True, False), (False, True)):
            monkeypatch.setattr("utils.cli._has_terminal", lambda there=terminal: there)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            heed_interrupts()
            assert (signal.getsignal(signal.SIGINT) is signal.default_int_handler) == heeded
    finally:
        signal.signal(signal.SIGINT, before)
