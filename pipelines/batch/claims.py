"""Who works on what in a shared folder: claims as files, without a server and without locks of the file system.

The claims that were ever made on a name are the files NAME.lock.0, NAME.lock.1 and so on; the last one counts. It holds
as long as its owner lives and touches it; the next one may be made when its owner has let go of it or is gone.

Why no two processes can hold a name at once:

- A file is created exclusively (O_CREAT | O_EXCL), which one process succeeds in, on network file systems too.
- A file is never deleted or renamed, so the numbers have no holes, NAME.lock.5 is made once for all time, and who makes
  it has the name. Deleting a stale lock instead would be a race: between looking at it and deleting it, it may have
  become the fresh lock of somebody else. Letting go is a time of change in 1970, as stale as can be.
- Who was taken for dead but was only suspended finds the next file there: `Lease.held` is False from then on.

Who is suspended for over a minute loses the rows that it claimed: others wait for them, and a row that is made twice
costs no more than time. It keeps its place in the folder (`occupy`) for as long as its process is known to be there,
which it is on its own machine: a batch that went on beside a second one would cost results.

It costs an inode a claim, in a hidden folder that may be deleted when no batch is at work.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from ..errors import BadInput
from .share import Share, machine

FOLDER = ".attnswap-locks"
BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0  # a dozen missed beats: a network file system may show a time of change half a minute late
HALF_WRITTEN_SECONDS = 10.0  # from the creation of a file to the line in it

_LET_GO = (0, 0)
_LONG_AGO = 1e9  # 2001: a file system that cannot go back to 1970 goes as far as it can
_SLACK = 2.0  # of `_started`


@dataclass(frozen=True)
class Owner:
    """A process, so that it is known again on this machine and on others; `started` is by `_started`."""

    machine: str
    pid: int
    started: float
    token: str

    @property
    def host(self) -> str:
        return self.machine.partition(" ")[0]


class Lease:
    """A claim on a name. As a context manager, it is let go at the end.

    Attributes:
        first: Nobody has ever claimed the name before.
    """

    def __init__(self, claims: Claims, name: str, path: Path, following: Path, token: str, *, first: bool) -> None:
        self.name, self.first = name, first
        self._claims, self._path, self._following, self._token = claims, path, following, token
        self._released = False

    def held(self) -> bool:
        """Whether the name was neither let go nor taken over.

        False as well where the folder of the locks was deleted, since others can no longer see the claim.

        Raises:
            OSError: the folder cannot be read now.
        """
        return not self._released and _exists(self._path) and not self.taken_over()

    def taken_over(self) -> bool:
        """Whether somebody else has claimed the name since.

        Raises:
            OSError: the folder cannot be read now.
        """
        try:
            owner, _ = _read(self._path)
        except FileNotFoundError:
            return False
        # Another's token: the folder of the locks was deleted, and the name claimed anew.
        return owner is None or owner.token != self._token or _exists(self._following)

    def release(self) -> None:
        """Lets the name go, for others to have at once. Nothing where it is lost already."""
        self._released = True
        self._claims._let_go(self._path)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()


class Claims:
    """The claims of this process on names in `folder`. As a context manager, all are let go at the end.

    Args:
        folder: of the batch; the files are in a hidden folder in it.
        kind: claims of different kinds do not meet.
        patient: Take no name from a process that is known to be there, however long it has been suspended.

    Raises:
        OSError: the folder is not there or cannot be written; the same for every method.
    """

    def __init__(self, folder: Path, kind: str = "lock", *, patient: bool = False) -> None:
        self._folder, self._kind, self._patient = folder / FOLDER, kind, patient
        self._folder.mkdir(exist_ok=True)
        self._machine = machine()
        self._started = _started(os.getpid())
        self._lock = threading.Lock()
        self._held: set[Path] = set()
        self._beating = False

    def acquire(self, name: str) -> Lease | None:
        """The claim on `name`, or None where somebody else has it or this process has it already.

        A name that was let go may be a row that is finished: look into the journal after, not before.

        Args:
            name: without path separators, of 200 bytes at most.
        """
        number = self._following(name)
        if number and not self._stale(self._path(name, number - 1)):
            return None
        path, token = self._path(name, number), secrets.token_hex(8)
        owner = Owner(self._machine, os.getpid(), self._started, token)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:  # somebody else came first
            return None
        try:
            os.write(descriptor, json.dumps(asdict(owner)).encode())
        finally:
            os.close(descriptor)
        lease = Lease(self, name, path, self._path(name, number + 1), token, first=number == 0)
        self._keep(path)
        if not lease.held():  # suspended before the line was written, and taken for dead
            lease.release()
            return None
        return lease

    def owner(self, name: str) -> Owner | None:
        """Whose the last claim on `name` is, whether it still holds or not; None where nobody can be named."""
        number = self._following(name)
        return _read(self._path(name, number - 1))[0] if number else None

    def names(self) -> list[str]:
        """Of all claims of this kind ever made."""
        pattern = re.compile(rf"(.+)\.{self._kind}\.0")
        return sorted(match[1] for file in os.listdir(self._folder) if (match := pattern.fullmatch(file)))

    def ended(self, name: str) -> bool:
        """Whether the last claim on `name` was let go, or its process is known to have ended."""
        number = self._following(name)
        if not number:
            return True
        owner, changed = _read(self._path(name, number - 1))
        return changed < _LONG_AGO or (owner is not None and self._lives(owner) is False)

    def close(self) -> None:
        """Lets all names go."""
        for path in tuple(self._held):
            self._let_go(path)

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _path(self, name: str, number: int) -> Path:
        return self._folder / f"{name}.{self._kind}.{number}"

    def _following(self, name: str) -> int:
        """The number of the next claim. By name and not by a listing, which need not show what is made meanwhile."""
        return next(number for number in itertools.count() if not _exists(self._path(name, number)))

    def _stale(self, path: Path) -> bool:
        owner, changed = _read(path)
        if changed < _LONG_AGO:
            return True
        lives = self._lives(owner) if owner else None
        if lives is False:
            return True
        if lives and self._patient:
            return False
        return self._now() - changed > (STALE_SECONDS if owner else HALF_WRITTEN_SECONDS)

    def _lives(self, owner: Owner) -> bool | None:
        """Whether the process is there, suspended perhaps; None where that is not known, as of other machines."""
        if owner.machine != self._machine:
            return None
        if not psutil.pid_exists(owner.pid):
            return False
        try:
            if abs(_started(owner.pid) - owner.started) > _SLACK:  # nobody gets a number again so soon
                return False
            return psutil.Process(owner.pid).status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):  # hidden from other users (hidepid), or ended this moment
            return None

    def _now(self) -> float:
        """The time by the clock that gives the locks theirs, which on a network file system is the server's."""
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix="clock.") as probe:
            os.utime(probe.name)
            return os.stat(probe.name).st_mtime

    def _keep(self, path: Path) -> None:
        with self._lock:
            self._held.add(path)
            if not self._beating:
                self._beating = True
                threading.Thread(target=self._beat, name="attnswap-locks", daemon=True).start()

    def _beat(self) -> None:
        pause = threading.Event()
        while True:
            pause.wait(BEAT_SECONDS)
            # Under the lock, so that no claim is touched after it was let go.
            with self._lock:
                if not self._held:
                    self._beating = False
                    return
                for path in self._held:
                    try:
                        os.utime(path)
                    except OSError:  # a server that is away for now; if it is for long, `held` will tell
                        continue

    def _let_go(self, path: Path) -> None:
        with self._lock:
            if path not in self._held:
                return
            self._held.discard(path)
            try:
                os.utime(path, _LET_GO)
            except FileNotFoundError:
                return


def occupy(folder: Path, share: Share) -> Lease:
    """Takes a place in `folder` for a batch, to be held until the batch ends.

    Workers with --claim may meet there, and so may different shards of one count; nothing else may. Each takes its
    place first and looks at the others then, so of two that collide one at least sees the other, and gives way. Both
    may, when they begin at the same moment; the places free themselves.

    A place whose batch was killed is free: at once on the machine it ran on, after a minute elsewhere. That of a batch
    which is only suspended is not free on its machine; from elsewhere, it looks as if it was killed, and its `Lease`
    tells it so.

    Raises:
        BadInput: another batch is at work there that would make the same rows.
        OSError: the folder is not there or cannot be written.
    """
    places = _places(folder)
    lease = None
    for place in _suitable(share):
        if lease := places.acquire(place):
            break
    if lease is None:
        raise _occupied(folder, place, places.owner(place))
    try:
        for other in places.names():
            if _kind(other) == _kind(place) or places.ended(other):
                continue
            # Without a sign of life. Taking its place tells it so, should it only be suspended and wake.
            if (fence := places.acquire(other)) is None:
                raise _occupied(folder, other, places.owner(other))
            fence.release()
    except BaseException:
        lease.release()
        raise
    return lease


def alone(folder: Path, place: Lease) -> bool:
    """Whether all batches have ended that ever had a place in `folder`, but for that at `place`.

    Raises:
        OSError: the folder cannot be read.
    """
    places = _places(folder)
    return all(places.ended(name) for name in places.names() if name != place.name)


def _places(folder: Path) -> Claims:
    return Claims(folder, "batch", patient=True)


def _suitable(share: Share) -> Iterator[str]:
    """The places that would do; of workers that claim, there may be any number."""
    if share.claim:
        yield from (f"{number}-claim" for number in itertools.count())
    else:
        yield share.worker or "single"


def _kind(place: str) -> str:
    """ "claim", "of-4" for a shard, "" for a single batch: places of one kind can be held side by side."""
    return place.partition("-")[2]


def _occupied(folder: Path, place: str, owner: Owner | None) -> BadInput:
    who = f"process {owner.pid} on {owner.host}" if owner else "a process that has just begun"
    number, _, kind = place.partition("-")
    how = {"": "", "claim": " with --claim"}.get(kind, f" as shard {number}/{kind.removeprefix('of-')}")
    dead = ""
    if owner and owner.machine != machine():
        dead = f"; if it was killed, the folder is free {STALE_SECONDS:.0f} seconds after its last sign of life"
    return BadInput(
        f"{folder}: another batch is at work there{how}, {who}{dead}. Wait for it, stop it, or name another folder; "
        "to share one, start all with --claim, or all with --shard I/N, with the same N and each with its own I."
    )


def _started(pid: int) -> float:
    """When a process began: on Linux in ticks since the boot, elsewhere in seconds since 1970.

    On Linux, seconds since 1970 are counted from the boot, whose time moves whenever the clock is set.

    Raises:
        psutil.Error, OSError: it cannot be seen.
    """
    if not psutil.LINUX:
        return psutil.Process(pid).create_time()
    # The 22nd field; the second is a name in brackets, with whatever in it.
    return float(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])


def _exists(path: Path) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def _read(path: Path) -> tuple[Owner | None, float]:
    """Whose a claim is, None where it is not (yet) written in full, and when it was touched last.

    By a descriptor: opening a file makes a network file system ask for its time anew, looking at it need not.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        text, changed = os.read(descriptor, 4096), os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
    try:
        return Owner(**json.loads(text)), changed
    except (ValueError, TypeError):
        return None, changed
