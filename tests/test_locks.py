"""The lock of a shared folder: one holder, dead ones found, living ones left alone, whatever clocks say."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from utils import locks
from utils.locks import Lock, Owner, Watch, is_alive, locked, make_whole, owner_in, place, started

SPAWN = multiprocessing.get_context("spawn")


def work(path: Path, times: int, seed: int) -> None:
    """Enter and leave; two inside at once would find each other's file."""
    draws = random.Random(seed)
    for _ in range(times):
        with locked(path):
            inside = os.open(path.with_name("inside"), os.O_CREAT | os.O_EXCL)
            time.sleep(draws.random() * 0.003)
            os.close(inside)
            counter = path.with_name("counter")
            counter.write_text(str(int(counter.read_text() or 0) + 1))
            path.with_name("inside").unlink()


def hold(path: Path) -> None:
    lock = Lock(path)
    lock.acquire()
    path.with_name("held").touch()
    time.sleep(600)


def holding(path: Path):
    worker = SPAWN.Process(target=hold, args=(path,))
    worker.start()
    until(path.with_name("held").exists)
    return worker


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened within {seconds} s"
        time.sleep(0.01)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "key.lock"


def left(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir() if p.name.startswith((".", "key")))


def elsewhere(path: Path, token: str = "t") -> None:
    """A holder on another machine, whose process number happens to be this one's."""
    path.write_bytes(Owner(token, "other-host/boot/pid", os.getpid(), started(os.getpid())).written())


def test_many_processes_are_inside_one_at_a_time(path: Path) -> None:
    path.with_name("counter").write_text("0")
    workers = [SPAWN.Process(target=work, args=(path, 25, seed)) for seed in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 6
    assert path.with_name("counter").read_text() == "150" and left(path) == []


def test_without_links_it_is_the_same(path: Path, monkeypatch) -> None:
    def refused(*args: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refused)
    with locked(path) as lock:
        assert lock.is_held() and not Lock(path).acquire(timeout=0.05)
    assert left(path) == []


def test_a_link_whose_answer_was_lost_counts(path: Path, monkeypatch) -> None:
    real = os.link

    def answered_twice(source: Path, target: Path) -> None:
        real(source, target)
        raise FileExistsError

    monkeypatch.setattr(os, "link", answered_twice)
    assert make_whole(path, b"x") and path.read_bytes() == b"x"


def test_waiting_has_an_end(path: Path) -> None:
    with locked(path):
        start = time.monotonic()
        assert not Lock(path).acquire(timeout=0.2)
        assert 0.15 < time.monotonic() - start < 2


def test_a_killed_holder_of_this_machine_is_found_at_once(path: Path) -> None:
    worker = holding(path)
    assert not Lock(path).acquire(timeout=0.1), "it lives"
    os.kill(worker.pid or 0, signal.SIGKILL)
    # not collected yet: a zombie must count as dead
    start = time.monotonic()
    assert Lock(path).acquire(timeout=5) and time.monotonic() - start < 1
    worker.join()


def test_a_stopped_holder_of_this_machine_keeps_its_lock(path: Path) -> None:
    worker = holding(path)
    os.kill(worker.pid or 0, signal.SIGSTOP)
    try:
        assert not Lock(path, stale_s=60).acquire(timeout=0.3)
    finally:
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join()


def test_a_number_used_again_is_another_process(path: Path) -> None:
    path.write_bytes(Owner("t", place(), os.getpid(), "1").written())
    assert Lock(path).acquire(timeout=1)
    assert is_alive(os.getpid(), started(os.getpid())) and not is_alive(os.getpid(), "1")


def test_a_silent_holder_elsewhere_is_given_up_after_its_time(path: Path) -> None:
    elsewhere(path)
    start = time.monotonic()
    assert not Lock(path, stale_s=0.6).acquire(timeout=0.3), "too early"
    assert Lock(path, stale_s=0.6).acquire(timeout=5)
    assert 0.8 < time.monotonic() - start < 4 and left(path) == ["key.lock"]


def test_signs_of_life_count_whatever_the_clock_says(path: Path) -> None:
    elsewhere(path)
    over = threading.Event()

    def beats_with_a_clock_that_goes_back() -> None:
        stamp = 4_000_000_000
        while not over.wait(0.1):
            stamp -= 3600
            os.utime(path, (stamp, stamp))

    other = threading.Thread(target=beats_with_a_clock_that_goes_back)
    other.start()
    try:
        assert not Lock(path, stale_s=0.5).acquire(timeout=1.5)
    finally:
        over.set()
        other.join()
    assert Lock(path, stale_s=0.5).acquire(timeout=5)


@pytest.mark.parametrize("clock", [lambda: 0, lambda: 10**18, lambda: -time.monotonic_ns()])
def test_every_beat_is_seen_also_of_a_clock_that_stands(path: Path, monkeypatch, clock) -> None:
    monkeypatch.setattr(locks.time, "time_ns", lambda: max(1, clock()) if clock() >= 0 else 2**60 + clock())
    lock = Lock(path, heartbeat_s=0.05)
    lock.acquire()
    seen = [path.stat().st_mtime_ns]
    changes = 0

    def changed() -> bool:
        nonlocal changes
        seen.append(path.stat().st_mtime_ns)
        changes += seen[-1] != seen[-2]
        return changes >= 4

    until(changed)
    lock.release()


def test_a_pause_of_the_observer_is_no_silence_of_the_holder(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(locks.time, "monotonic", lambda: now[0])
    watch = Watch()
    assert watch.look("a") == 0
    now[0] += 10_000
    assert watch.look("a") <= 1
    now[0] += 0.5
    assert watch.look("b") == 0, "a change starts anew"


def test_a_holder_that_lost_its_lock_knows_and_leaves_it(path: Path) -> None:
    lock = Lock(path, heartbeat_s=0.05)
    lock.acquire()
    elsewhere(path, "thief")
    os.utime(path, (1, 1))
    time.sleep(0.2)
    assert not lock.is_held() and path.stat().st_mtime == 1, "no sign of life for another's lock"
    lock.release()
    found = owner_in(path)
    assert found and found[0] and found[0].token == "thief"


def said(**changed: object) -> bytes:
    """A lock file of this process with something that no holder writes."""
    return json.dumps(vars(Owner.this()) | changed).encode()


FOREIGN = {
    "empty": b"", "half": said()[:40], "list": b"[]", "little": b'{"token": 1}', "binary": b"\xff\x00",
    "deep": b"[" * 100_000, "long": said(place="x" * 10**6), "huge number": said(pid=10**30),
    "negative number": said(pid=-1), "no number": said(pid=float("inf")), "a way out": said(token="../../x", pid=2**30),
    "long name": said(token="x" * 1000, pid=2**30), "zero in a name": said(token="a\0b", pid=2**30),
}  # fmt: skip


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_no_holder_wrote_does_not_block(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    lock = Lock(path)
    assert lock.acquire(timeout=10) and lock.is_held() and left(path) == ["key.lock"]
    lock.release()


@pytest.mark.parametrize("target", ["nowhere", "key.lock", None], ids=["to nowhere", "to itself", "a pipe"])
def test_a_link_or_a_pipe_in_its_place_does_not_block(path: Path, target: str | None) -> None:
    os.mkfifo(path) if target is None else path.symlink_to(target)
    lock = Lock(path)
    assert lock.acquire(timeout=10) and lock.is_held() and path.is_file() and not path.is_symlink()
    lock.release()


def test_a_dead_remover_does_not_block(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead = Owner("t", place(), int(done.stdout), "1")
    path.write_bytes(dead.written())
    path.with_name(".key.lock-t.broken").write_bytes(Owner("r", place(), int(done.stdout), "1").written())
    assert Lock(path).acquire(timeout=5) and left(path) == ["key.lock"]


def test_of_many_that_find_it_dead_one_takes_it(path: Path) -> None:
    """Threads stand for machines: all find the same dead holder at the same time."""
    for round_ in range(20):
        path.unlink(missing_ok=True)
        elsewhere(path, f"dead-{round_}")
        inside, most, guard = [0], [0], threading.Lock()

        def enter(inside: list[int] = inside, most: list[int] = most, guard: threading.Lock = guard) -> None:
            lock = Lock(path, stale_s=0.02)
            assert lock.acquire(timeout=30)
            with guard:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.001)
            with guard:
                inside[0] -= 1
            lock.release()

        # once the first is in, it must not look dead to the others: they are of one place and it lives
        threads = [threading.Thread(target=enter) for _ in range(5)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Watch, "look", slow_only_for_strangers)
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert most == [1]


def slow_only_for_strangers(self: Watch, now: object) -> float:
    owner = now[0] if isinstance(now, tuple) else None
    return 100.0 if isinstance(owner, Owner) and owner.place != place() else 0.0


def test_what_it_holds_says_who(path: Path) -> None:
    with locked(path):
        found = json.loads(path.read_bytes())
    assert found["pid"] == os.getpid() and found["place"] == place() and found["since"] == started(os.getpid())
