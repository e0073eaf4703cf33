"""One job at a time, each in a thread of its own, which tells how far it is and ends when nobody wants it any more."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ...accel.errors import UnsupportedModel, WeightsError
from ...pipelines.errors import BadInput, JobFailed
from .live import Live, Progress, Stop, without_folders

__all__ = ["Event", "Failed", "Finished", "Progress", "Stop", "Stopped", "Worker"]

# Of the visitor's making or the machine's, so that the message says it all.
SAID = (BadInput, JobFailed, UnsupportedModel, WeightsError)
# Seconds between two looks at whether a job that waits for the device is still wanted.
WAIT = 0.1
# Seconds after which the last event is given once more, as a generator that waits cannot be closed.
BEAT = 1.0
NOTHING = "Nothing of yours is running."

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
    """Runs the work of all visitors on the one device there is."""

    def __init__(self) -> None:
        self._device = threading.Lock()
        self._guard = threading.Lock()
        self._runs: list[_Run] = []
        self._closed = False

    def run(self, visitor: str, work: Callable[[Live], T]) -> Generator[Event, None, None]:
        """Events of `work`; the last is `Finished`, `Failed` or `Stopped`.

        Whoever closes the generator stops the work, within a step, and waits for its end.
        """
        run = _Run(visitor, work, self._device, self._forget)
        with self._guard:
            if self._closed:
                run.ask()
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
            run.ask()
            if not _in_event_loop():
                run.thread.join()

    def _forget(self, run: _Run) -> None:
        with self._guard:
            self._runs.remove(run)

    def busy(self, visitor: str) -> bool:
        """Whether something of this visitor's is running, or about to."""
        with self._guard:
            return any(run.visitor == visitor for run in self._runs)

    def stop(self, visitor: str) -> str:
        """Stops what this visitor has running and waits for its end; says how far it came."""
        with self._guard:
            mine = [run for run in self._runs if run.visitor == visitor]
        for run in mine:
            run.ask()
        for run in mine:
            run.thread.join()
        return mine[0].message if mine else NOTHING

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
        message: for somebody who has stopped it.
    """

    def __init__(
        self, visitor: str, work: Callable[[Live], Any], device: threading.Lock, forget: Callable[[_Run], None]
    ) -> None:
        self.visitor = visitor
        self.events: queue.Queue[Event] = queue.Queue()
        self.message = "It was done before it could be stopped."
        self._work, self._device, self._forget = work, device, forget
        self._asked = threading.Event()
        # As a daemon: somebody who interrupts the server twice does not wait for a step.
        self.thread = threading.Thread(target=self._do, name=f"job of {visitor}", daemon=True)

    def ask(self) -> None:
        """For its end."""
        self._asked.set()

    def _do(self) -> None:
        try:
            event = self._in_turn(Live(self.events.put, self._asked.is_set))
        finally:
            self._forget(self)
        self.events.put(event)

    def _in_turn(self, live: Live) -> Event:
        while not self._device.acquire(timeout=WAIT):
            if self._asked.is_set():
                self.message = live.message
                return Stopped(self.message)
        try:
            event = self._outcome(live)
            if not isinstance(event, Finished):
                _let_go()
            return event
        finally:
            self._device.release()

    def _outcome(self, live: Live) -> Event:
        try:
            value = self._work(live)
            if self._asked.is_set():
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
            return Failed(f"{type(error).__name__}: a defect; the server's log has its place.")


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
