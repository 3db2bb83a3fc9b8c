"""A lock that any shared POSIX folder can hold: one file, made whole, that says who holds it.

The kernel's own locks are not seen by other machines on every network file system. Here the lock is a file that
`link` (or, without links, an exclusive create) makes in one step, also over NFS. Its holder touches it every few
seconds. A holder that died is found at once on its own machine, by its process; elsewhere by a file that no longer
changes while the observer's own monotonic clock goes on. Clocks are never compared, so they may differ or go back.
"""

import errno
import json
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

# how often a holder shows that it lives, and for how long others believe one that does not
HEARTBEAT_S, STALE_S = 5.0, 60.0
# a file that no holder wrote: one left by an older version, or half made where there are no links
UNREADABLE_S = 1.0
FIRST_LOOK_S, SLOWEST_LOOK_S = 0.01, 0.5
# what a holder writes: bytes, and its acquisition's name
LONGEST, TOKEN = 4096, re.compile(r"[\w-]{1,64}", re.ASCII)


def place() -> str:
    """Where process numbers mean the same: a machine since it started, and its process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = namespace = ""
    return f"{platform.node()}/{boot}/{namespace}"


def started(pid: int) -> str | None:
    """When a process of this machine started, in ticks; a number that is used again has another start."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def is_alive(pid: int, since: str | None) -> bool:
    """Whether a process of this place still runs; one that ended and was not collected yet does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return not Path("/proc/self/stat").exists()
    return state not in "ZX" and (since is None or rest[18] == since)


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        token: One acquisition's own name.
        place: Where its process number means something.
        pid: Its process.
        since: When that process started.
    """

    token: str
    place: str
    pid: int
    since: str | None

    @classmethod
    def this(cls) -> "Owner":
        """This process, for one acquisition."""
        return cls(uuid.uuid4().hex, place(), os.getpid(), started(os.getpid()))

    def written(self) -> bytes:
        """The content of a lock file."""
        return json.dumps(vars(self)).encode()

    def is_dead(self) -> bool:
        """Whether the process certainly ended; of another place nobody can say."""
        return self.place == place() and not is_alive(self.pid, self.since)


def owner_in(path: Path) -> tuple[Owner | None, int] | None:
    """Read a lock file: its owner (None where that cannot be read) and when it last changed; None if there is none."""
    try:
        # opening asks a network file system for the file as it is now; a bare `stat` may answer from memory
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return None, os.lstat(path).st_mtime_ns  # a link, which no holder makes
    try:
        return owner_of(os.read(file, LONGEST + 1)), os.fstat(file).st_mtime_ns
    finally:
        os.close(file)


def owner_of(content: bytes) -> Owner | None:
    """Whom the content of a lock file names; None for anything that no holder has written."""
    try:
        found = json.loads(content) if len(content) <= LONGEST else {}
        owner = Owner(str(found["token"]), str(found["place"]), int(found["pid"]), found["since"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    # the token becomes part of a file's name
    return owner if TOKEN.fullmatch(owner.token) and 0 < owner.pid < 2**31 else None


@dataclass
class Watch:
    """How long a file has been seen not to change, by the observer's monotonic clock."""

    seen: object = None
    unchanged_s: float = 0.0
    looked: float = field(default_factory=time.monotonic)

    def look(self, now: object) -> float:
        """Take in what the file is now; returns for how many seconds it has been so.

        A pause of the observer counts for little: whoever it watches may have paused with it.
        """
        passed, self.looked = time.monotonic() - self.looked, time.monotonic()
        self.unchanged_s = self.unchanged_s + min(passed, 2 * SLOWEST_LOOK_S) if now == self.seen else 0.0
        self.seen = now
        return self.unchanged_s


@dataclass
class Lock:
    """One holder at a time over all processes and machines that see the folder.

    Attributes:
        path: The file that stands for it; there while it is held.
        heartbeat_s: Seconds between two signs of life.
        stale_s: Seconds without one after which a holder on another machine counts as dead.
    """

    path: Path
    heartbeat_s: float = HEARTBEAT_S
    stale_s: float = STALE_S

    def __post_init__(self) -> None:
        self._owner: Owner | None = None
        self._released = threading.Event()

    def acquire(self, timeout: float | None = None) -> bool:
        """Wait until this is the holder.

        Args:
            timeout: Seconds to wait at most; None: without end.

        Returns:
            Whether it is; False once the time is over.

        Raises:
            OSError: If the folder can't be written.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        watch, pause = Watch(), FIRST_LOOK_S
        while True:
            # looking is cheap for the server of a shared folder, making is not
            found = owner_in(self.path)
            if found is None and self._made():
                break
            if found is not None and self._left_behind(found, watch):
                continue
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, SLOWEST_LOOK_S)
        self._released = threading.Event()
        threading.Thread(target=self._beat, args=(self._owner, self._released), daemon=True).start()
        return True

    def is_held(self) -> bool:
        """Whether it is still this one's: a machine that slept for minutes may have lost it."""
        found = owner_in(self.path)
        return found is not None and found[0] is not None and found[0] == self._owner

    def release(self) -> None:
        """Give it up, if it is still this one's."""
        self._released.set()
        if self.is_held():
            self.path.unlink(missing_ok=True)
        self._owner = None

    def _made(self) -> bool:
        owner = Owner.this()
        if not make_whole(self.path, owner.written()):
            return False
        self._owner = owner
        return True

    def _left_behind(self, found: tuple[Owner | None, int], watch: Watch) -> bool:
        """Take a dead holder's file away; returns whether to try again at once."""
        owner, unchanged = found[0], watch.look(found)
        dead = unchanged > UNREADABLE_S if owner is None else owner.is_dead() or unchanged > self.stale_s
        return dead and _taken_away(self.path, owner, watch, self.stale_s)

    def _beat(self, owner: Owner, released: threading.Event) -> None:
        """Change the file's time until it is released, or no longer this one's."""
        last = 0
        while not released.wait(self.heartbeat_s):
            with suppress(OSError):
                found = owner_in(self.path)
                if found is None or found[0] != owner:
                    return
                # also where the clock stands still or is coarse, every sign is another one
                now = time.time_ns()
                last = now if abs(now - last) > 1_000_000 else last + 2_000_000_000
                os.utime(self.path, ns=(last, last))


def make_whole(path: Path, content: bytes) -> bool:
    """Create a file with its content in one step; False if it is there already.

    Raises:
        OSError: If the folder can't be written.
    """
    draft = path.with_name(f".{path.name}-{platform.node()}-{os.getpid()}-{uuid.uuid4().hex}")
    try:
        with draft.open("xb") as file:
            file.write(content)
        try:
            os.link(draft, path)
        except FileExistsError:
            # a server that answers twice says so to the one who made it, too
            return os.stat(draft).st_nlink == 2
        except OSError:
            return _made_exclusively(path, content)
        return True
    finally:
        draft.unlink(missing_ok=True)


def _made_exclusively(path: Path, content: bytes) -> bool:
    """The same where a file system has no links."""
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _taken_away(path: Path, owner: Owner | None, watch: Watch, stale_s: float) -> bool:
    """Remove a dead holder's file, at most once whoever else finds it dead; a lock taken since is left alone."""
    grave = path.with_name(f".{path.name}-{owner.token if owner else 'unreadable'}.broken")
    if not make_whole(grave, Owner.this().written()):
        found = owner_in(grave)
        if found and (watch.unchanged_s > 2 * stale_s or (found[0] is not None and found[0].is_dead())):
            grave.unlink(missing_ok=True)  # who was to remove it died as well
        return False
    try:
        found = owner_in(path)
        if found is not None and found[0] == owner:
            path.unlink(missing_ok=True)
        return True
    finally:
        grave.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[Lock]:
    """Hold a lock for the block."""
    lock = Lock(path)
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()
