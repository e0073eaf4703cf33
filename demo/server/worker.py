"""One job at a time, each in a thread of its own, which tells how far it is and ends when nobody wants it any more."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .live import SAID, Live, Progress, Stop, without_folders

__all__ = ["SAID", "Event", "Failed", "Finished", "Progress", "Stop", "Stopped", "Worker"]

# Seconds between two looks at whether a job that waits for the device is still wanted.
WAIT = 0.1
# Seconds after which the last event is given once more, as a generator that waits cannot be closed.
BEAT = 1.0
# Seconds for which a run whose page is gone keeps the device from others who wait for it.
LINGER = 60.0
# Seconds for which whoever has run something may want to run the like again.
RECENT = 60.0
NOTHING = "Nothing of yours is running."
STOPPING = "It is being stopped already."
BROKEN = "Something broke on the server ({}), which is no fault of yours; its log says where."

T = TypeVar("T")


@dataclass(frozen=True)
class Finished:
    """`value` is what the work gave."""

    value: Any


@dataclass(frozen=True)
class Failed:
    message: str


@dataclass(frozen=True)
class Stopped:
    message: str


Event = Progress | Finished | Failed | Stopped


class Worker:
    """Runs the work of all visitors on the one device there is.

    Args:
        log: is given a line for each run that says what it is (`Live.what`), once it has ended.
    """

    def __init__(self, log: Callable[[str], None] = lambda line: None) -> None:
        self._log = log
        self._device = threading.Lock()
        self._guard = threading.Lock()
        self._runs: list[_Run] = []
        self._stopping: set[str] = set()
        self._latest: tuple[str, float] | None = None
        self._closed = False

    def run(self, visitor: str, work: Callable[[Live], T], *, background: bool = False) -> Generator[Event, None, None]:
        """Events of `work`; the last is `Finished`, `Failed` or `Stopped`.

        Whoever closes the generator stops the work, within a step, and waits for its end. But in an event loop only the
        page is gone: Gradio closes generators there. What waits is dropped then, and what runs goes on to its end, or
        for `LINGER` seconds where others wait.

        Args:
            background: nobody has asked for it. It does not begin while anything else runs or waits, and ends within a
                step when somebody comes.
        """
        run = _Run(self, visitor, work, background)
        with self._guard:
            if self._closed or (background and self._wanted()):
                run.ask()
            for other in self._runs if not background else ():
                if other.background:
                    other.ask()
            self._runs.append(run)
            run.thread.start()
        event: Event = (latest := Progress(0.0, "waiting for the one before"))
        try:
            while isinstance(event, Progress):
                try:
                    event = run.events.get(timeout=BEAT)
                except queue.Empty:
                    event = dataclasses.replace(latest, preview=None)
                if isinstance(event, Progress):
                    latest = event
                yield event
        finally:
            if _in_event_loop():
                run.leave()
            else:
                run.ask()
                run.thread.join()

    @contextmanager
    def turn(self, run: _Run) -> Iterator[bool]:
        """Whether the device is there for `run`, which waits for it; it is not where the run is to end."""
        while not self._device.acquire(timeout=WAIT):
            if run.is_asked():
                yield False
                return
        try:
            yield not (run.background and run.is_asked())
        finally:
            self._device.release()

    def is_contended(self) -> bool:
        """Whether somebody waits for the run that has the device."""
        with self._guard:
            return len(self._wanted()) > 1

    def is_for_another(self, visitor: str) -> bool:
        """Whether it was somebody else who has run something last, and that not long ago."""
        with self._guard:
            latest = self._latest
        return latest is not None and latest[0] != visitor and time.monotonic() - latest[1] < RECENT

    def _wanted(self) -> list[_Run]:
        return [run for run in self._runs if not run.background]

    def ended(self, run: _Run, line: str) -> None:
        """Forgets it.

        Args:
            line: for the log; "" for none.
        """
        with self._guard:
            self._runs.remove(run)
            if not run.background:
                self._latest = run.visitor, time.monotonic()
        if line:
            # A visitor's name is what makes somebody that visitor, so not all of it.
            self._log(f"visitor {run.visitor[:4]}: {line}")

    def busy(self, visitor: str) -> bool:
        """Whether something of this visitor's is running, or about to."""
        with self._guard:
            return any(run.visitor == visitor for run in self._runs)

    def stop(self, visitor: str) -> str:
        """Stops what this visitor has running and waits for its end; says how far it came.

        Whoever asks for the same meanwhile does not wait: Gradio has only so many threads, for everybody.
        """
        mine = self.ask(visitor)
        wanted = [run for run in mine if not run.background]
        with self._guard:
            if visitor in self._stopping:
                return STOPPING if wanted else NOTHING
            self._stopping.add(visitor)
        try:
            for run in mine:
                run.thread.join()
        finally:
            with self._guard:
                self._stopping.remove(visitor)
        return wanted[0].message if wanted else NOTHING

    def ask(self, visitor: str) -> list[_Run]:
        """Stops what this visitor has running, within a step, and does not wait for that."""
        with self._guard:
            mine = [run for run in self._runs if run.visitor == visitor]
        for run in mine:
            run.ask()
        return mine

    def close(self) -> None:
        """Stops everything, and takes nothing more."""
        with self._guard:
            self._closed = True
            runs = list(self._runs)
        for run in runs:
            run.ask()
        for run in runs:
            run.thread.join()


class _Run:
    """
    Attributes:
        background: whether nobody has asked for it.
        message: for somebody who has stopped it.
    """

    def __init__(self, worker: Worker, visitor: str, work: Callable[[Live], Any], background: bool) -> None:
        self.visitor, self.background = visitor, background
        self.events: queue.Queue[Event] = queue.Queue()
        self.message = "It was done before it could be stopped."
        self._worker, self._work = worker, work
        self._asked = False
        self._begun: float | None = None
        self._left: float | None = None
        # As a daemon: somebody who interrupts the server twice does not wait for a step.
        self.thread = threading.Thread(target=self._do, name=f"job of {visitor}", daemon=True)

    def ask(self) -> None:
        """For its end."""
        self._asked = True

    def leave(self) -> None:
        """Nobody looks at its events any more."""
        if self._begun is None:
            self.ask()
        self._left = time.monotonic()

    def is_asked(self) -> bool:
        if self._asked:
            return True
        long_ago = self._left is not None and time.monotonic() - self._left > LINGER
        return long_ago and self._worker.is_contended()

    def _do(self) -> None:
        live = Live(self.events.put, self.is_asked)
        event: Event = Failed(BROKEN.format("no more is known"))
        line = ""
        # Whatever goes wrong here, such as a log that nobody reads any more, somebody waits for the last event.
        try:
            event = self._in_turn(live)
            line = live.what and f"{live.what}: {self._ended(event)}"
        finally:
            try:
                self._worker.ended(self, line)
            finally:
                self.events.put(event)

    def _ended(self, event: Event) -> str:
        took = "" if self._begun is None else f"{time.monotonic() - self._begun:.1f} s"
        return took if isinstance(event, Finished) else f"{took}, {getattr(event, 'message', '')}"

    def _in_turn(self, live: Live) -> Event:
        with self._worker.turn(self) as mine:
            if not mine:
                self.message = live.message
                return Stopped(self.message)
            self._begun = time.monotonic()
            event = self._outcome(live)
            if isinstance(event, Failed):
                self.message = f"Not made: {event.message}"
            if not isinstance(event, Finished):
                with suppress(RuntimeError):  # after some errors of the accelerator all that follows fails
                    _let_go()
            return event

    def _outcome(self, live: Live) -> Event:
        try:
            value = self._work(live)
            if self.is_asked():
                self.message = live.message
            return Finished(value)
        except Stop:
            self.message = live.message
            return Stopped(self.message)
        except SAID as error:
            return Failed(without_folders(str(error)))
        except (MemoryError, torch.OutOfMemoryError):
            return Failed("out of memory. Try a smaller size or fewer frames.")
        except BaseException as error:
            traceback.print_exception(error, file=sys.stderr)
            return Failed(BROKEN.format(type(error).__name__))


def _in_event_loop() -> bool:
    """Whether this thread serves everybody. Gradio closes generators there, and nobody's page is to wait for a step."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _let_go() -> None:
    """Frees what a run that did not end well has left on the accelerator; its error must be gone by then."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
