"""The rows of a manifest made one after the other until all are, whatever happens to one of them."""

from __future__ import annotations

import contextlib
import errno
import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...accel.errors import UnsupportedModel, WeightsError
from .. import save
from ..errors import BadInput, JobFailed, NotWritten
from ..job import MAX_COMPANY, Job
from ..session import Result, Session
from . import plan, results
from .claims import Claims, Lease, alone, occupy
from .journal import RESULTS, Journal
from .plan import Planned
from .progress import Progress, Stopped
from .queue import Group, Queue
from .results import State
from .share import Share

WAIT_SECONDS = 2.0
# Why one file cannot be written where others can.
OF_ONE_FILE = (errno.ENAMETOOLONG, errno.EISDIR)


@dataclass(frozen=True)
class Batch:
    """What a batch is asked to do.

    Attributes:
        defaults: for what a row does not say; its model is that of all rows.
        folder: for the files and results.jsonl.
        share: of this process.
        resume: Skip what is finished and whole, and make the rest.
        batch_size: Rows in one call of the pipeline at most.
        max_failures: End after so many; None never does.
        dry_run: Check everything, and make nothing.
    """

    manifest: Path
    defaults: Job
    folder: Path
    share: Share = field(default_factory=Share)
    resume: bool = False
    batch_size: int = 1
    max_failures: int | None = None
    dry_run: bool = False


@dataclass
class Outcome:
    """What has come of a batch.

    Attributes:
        rows: in this process's share.
        before: were finished when it began.
        others: were finished by others meanwhile.
        others_failed: Others have failed at them, meanwhile or before this one joined.
        failures: What went wrong, on a line, by id.
        ended: Why it ended before all rows were tried; None where they were.
        interrupted: It was asked to.
    """

    rows: int
    before: int = 0
    done: int = 0
    others: int = 0
    others_failed: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    ended: str | None = None
    interrupted: bool = False

    @property
    def left(self) -> int:
        return self.rows - self.before - self.done - self.others - self.others_failed - len(self.failures)


def run(
    batch: Batch,
    *,
    bars: bool = False,
    print_line: Callable[[str], None] = lambda text: None,
    stopping: AbstractContextManager[Callable[[], bool]] | None = None,
) -> Outcome:
    """Makes what is left to be made.

    Args:
        bars: draw progress.
        print_line: is given what there is to say, a line at a time.
        stopping: is entered while rows are made; gives whether to end after the next step.

    Raises:
        BadInput, UnsupportedModel: nothing was made; the manifest is wrong, the folder in use, or the like.
        JobFailed: the model could not be loaded.
    """
    if not 0 < batch.batch_size <= MAX_COMPANY:
        raise BadInput(f"--batch-size {batch.batch_size} is out of range: 1 to {MAX_COMPANY}.")
    if batch.max_failures is not None and batch.max_failures < 1:
        raise BadInput(f"--max-failures {batch.max_failures} is out of range: 1 or more.")
    plan.check_folder(batch.folder, make=False)
    planned, model, session = plan.read(batch.manifest, batch.defaults, batch.folder)
    with contextlib.ExitStack() as stack:
        if session is not None:
            stack.callback(session.close)
        plan.check_folder(batch.folder, make=not batch.dry_run)
        place = claims = None
        try:
            if not batch.dry_run:
                place = stack.enter_context(occupy(batch.folder, batch.share))
                claims = stack.enter_context(Claims(batch.folder)) if batch.share.claim else None
            worker = _Worker(batch, planned, place, claims, print_line)
            if place and alone(batch.folder, place):
                worker.remove_leftovers()
        except OSError as error:
            raise BadInput(f"{batch.folder} cannot be used: {error.strerror or error}.") from error
        if batch.dry_run:
            return worker.outcome
        try:
            if worker.rows:
                if session is None:
                    print_line(f"loading {model.name} …")
                    session = stack.enter_context(Session(batch.defaults, model=model))
                with stopping or contextlib.nullcontext(lambda: False) as stop:
                    worker.work(session, bars=bars, stop=stop)
        finally:
            worker.end()
    return worker.outcome


class _Worker:
    """
    Args:
        planned: all rows of the manifest.
        place: in the folder; none in a dry run.
        claims: where rows are divided by claiming.

    Attributes:
        rows: those that are left to be made.

    Raises:
        BadInput: the folder holds results already, and the batch is not to go on with them.
        OSError: a file in the folder cannot be read.
    """

    def __init__(
        self,
        batch: Batch,
        planned: Sequence[Planned],
        place: Lease | None,
        claims: Claims | None,
        say: Callable[[str], None],
    ) -> None:
        self._batch, self._place, self._claims, self._say = batch, place, claims, say
        self._rows, self._order = planned, [row.id for row in planned]
        self._journal = Journal(batch.folder, batch.share.worker)
        self._before = dict(self._journal.latest())
        mine = batch.share.of(planned)
        states = {row.id: results.state(row, self._before.get(row.id)) for row in mine}
        self._refuse_to_overwrite(mine, states)
        # Whoever joins others does not repeat what they have just failed at; who resumes does.
        failed = [] if batch.resume or not batch.share.claim else [id for id in states if states[id] is State.FAILED]
        done = [id for id in states if states[id] is State.DONE]
        finished = {*done, *failed}
        self.rows = [row for row in mine if row.id not in finished]
        self.outcome = Outcome(len(mine), before=len(done), others_failed=len(failed))
        for kind in (State.FAILED, State.CHANGED, State.GONE, State.DAMAGED):
            if again := [row.id for row in self.rows if states[row.id] is kind]:
                say(f"{_rows(len(again))} made again, {kind.value}: {_few(again)}.")
        if others := sorted(set(self._before) - set(self._order)):
            say(f"{_rows(len(others))} of an earlier run, not in this manifest, left as they are: {_few(others)}.")

    def _refuse_to_overwrite(self, mine: Sequence[Planned], states: dict[str, State]) -> None:
        folder, joins = self._batch.folder, self._batch.share.claim
        if not self._batch.resume:
            allowed = (State.NEW, State.DONE, State.FAILED) if joins else (State.NEW,)
            held = [row.id for row in mine if states[row.id] not in allowed or (not joins and row.file.exists())]
            if held:
                raise BadInput(
                    f"-o {folder} holds {len(held)} of these {_rows(len(mine))} already ({_few(held)}): "
                    "go on with --resume, or name another folder."
                )
        # What a kill has left without an entry may be replaced, and nothing else.
        foreign = [row.file.name for row in mine if states[row.id] is State.NEW and results.is_foreign(row.file)]
        if foreign:
            raise BadInput(
                f"-o {folder} holds files of the same names that attnswap has not made ({_few(foreign)}): "
                "move them, or name another folder."
            )

    def work(self, session: Session, *, bars: bool, stop: Callable[[], bool]) -> None:
        """Until no row is left, or there is no going on."""
        queue = Queue(self.rows, batch_size=self._batch.batch_size, claims=self._claims, look=self._look)
        progress = Progress(self.rows, bars=bars, print_line=self._say, stop=stop, check=self._keep_place)
        try:
            if self._claims is None:
                self._remove_parts(self.rows)
            waited = False
            while len(queue):
                self._keep_place()
                group, finished = queue.take()
                self._count(finished)
                progress.drop(finished)
                if group:
                    waited = False
                    self._make(group, session, queue, progress)
                elif len(queue):
                    if not waited:
                        progress.say(f"waiting for {_rows(len(queue))} that others have claimed.")
                    waited = True
                    progress.wait(WAIT_SECONDS)
        except Stopped:
            self.outcome.interrupted, self.outcome.ended = True, "interrupted"
        except _End as end:
            self.outcome.ended = str(end)
        except OSError as error:
            self.outcome.ended = f"{self._batch.folder} cannot be written any more: {error.strerror or error}"
        finally:
            progress.close()

    def remove_leftovers(self) -> None:
        """Of whatever was killed here, as nobody else is at work."""
        journals = {path.name for path in self._batch.folder.glob("results.*.jsonl")}
        save.remove_leftovers(self._batch.folder, {row.file.name for row in self._rows} | journals | {RESULTS})

    def end(self) -> None:
        """Nothing is lost where this fails: the next worker to end does it, or the next run."""
        with contextlib.suppress(OSError, _End):
            self._keep_place()  # else another batch may be writing what a merge replaces
            self._journal.merge(self._order)

    def _make(self, group: Group, session: Session, queue: Queue, progress: Progress) -> None:
        rows = [row for row, _ in group]
        if taken_over := [row for row, lease in group if lease is not None and not lease.first]:
            self._remove_parts(taken_over)
        progress.begin_group(rows)
        try:
            made = session.make([row.task for row in rows], watch=progress, say=progress.say)
        except (Stopped, _End):
            raise
        except Exception as error:
            progress.end_group(())
            _raise_if_final(error)
            self._failed(group, error, queue, progress)
        else:
            progress.end_group(rows)
            self._done(group, made, progress)
            return
        # After the error is forgotten, which holds what was on the device.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _done(self, group: Group, made: Sequence[Result], progress: Progress) -> None:
        for (row, _), result in zip(group, made, strict=True):
            # Also of a row that was lost to others meanwhile: the file is this one's now, whoever is done already.
            self._record(results.done(row, result, batch=len(group), worker=self._batch.share.worker))
            self.outcome.done += 1
            progress.row_done(row, result.seconds)
        _release(group)

    def _failed(self, group: Group, error: Exception, queue: Queue, progress: Progress) -> None:
        rows = [row for row, _ in group]
        if len(rows) > 1:
            why = results.on_a_line(str(error))
            progress.say(f"{_few([row.id for row in rows])} failed together, and are tried one by one: {why}")
            _release(group)
            queue.put_back(rows)
            return
        [(row, lease)] = group
        expected = isinstance(error, BadInput | JobFailed | UnsupportedModel | WeightsError)
        entry = results.failed(row, error, expected=expected, worker=self._batch.share.worker)
        if lease is None or lease.held():
            self._record(entry)
        _release(group)
        self.outcome.failures[row.id] = why = results.on_a_line(entry["error"])
        progress.row_failed(row, why)
        if len(queue) and len(self.outcome.failures) == self._batch.max_failures:
            raise _End(f"--max-failures {self._batch.max_failures} reached")

    def _record(self, entry: dict[str, Any]) -> None:
        self._keep_place()
        self._journal.append(entry)

    def _keep_place(self) -> None:
        """Ends the batch where another has taken it for dead, as it was suspended, and may make the same rows now."""
        try:
            if self._place and self._place.taken_over():
                raise _End("another batch has taken over this folder")
        except OSError as error:
            raise _End(f"{self._batch.folder} cannot be read any more: {error.strerror or error}") from error

    def _count(self, finished: Sequence[Planned]) -> None:
        entries = self._journal.latest() if finished else {}
        failed = sum(entries.get(row.id, {}).get("status") == "failed" for row in finished)
        self.outcome.others_failed += failed
        self.outcome.others += len(finished) - failed

    def _remove_parts(self, rows: Sequence[Planned]) -> None:
        save.remove_leftovers(self._batch.folder, {row.file.name for row in rows})

    def _look(self) -> Callable[[Planned], bool]:
        """What others have made, or tried to, by now: whether a row is among that."""
        entries = self._journal.latest()

        def finished(row: Planned) -> bool:
            entry = entries.get(row.id)
            return entry is not None and entry != self._before.get(row.id) and entry.get("row") == row.asked

        return finished


class _End(Exception):
    """There is no going on, and why."""


def _raise_if_final(error: Exception) -> None:
    """
    Raises:
        _End: the next row would fail as well.
    """
    if isinstance(error, NotWritten) and error.errno not in OF_ONE_FILE:
        raise _End(str(error)) from error
    if isinstance(error, torch.AcceleratorError) or str(error).startswith("CUDA error"):
        raise _End(f"the device has failed: {str(error).splitlines()[0]}") from error


def _release(group: Sequence[tuple[Planned, Lease | None]]) -> None:
    for _, lease in group:
        if lease is not None:
            lease.release()


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
