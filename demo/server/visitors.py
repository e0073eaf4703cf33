"""Who looks at the pages, and what each has made."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import GifImagePlugin, Image

from ...pipelines import save
from ...pipelines.compare.variants import slug

if TYPE_CHECKING:
    from ...accel.report import Details, Report
    from ...pipelines.compare.figures import Comparison
    from ...pipelines.job import Job
    from ...pipelines.session import Result
    from .worker import Worker

MAX_VISITORS, MAX_ENTRIES = 64, 40
THUMBNAIL = 256  # pixels a side, at most
# Of the entries of all visitors, those whose block masks can be looked at: a long clip has hundreds of MB of them.
WITH_MASKS = 8
# Seconds after which a visitor who has left is forgotten. A phone that is locked for a while comes back as the same.
AWAY = 1800.0
#: Who asks without a browser.
LOCAL = "local"

# By layer and guidance branch.
Masks = dict[tuple[str, int], Any]
# The entries with block masks, the oldest first: whose and the number. Who is forgotten leaves no masks behind.
Masked = list[tuple["weakref.ref[Visitor]", int]]


@dataclass(frozen=True)
class Entry:
    """
    Attributes:
        number: from 1, as its file is called.
        clip: whether it is one.
        file: PNG, MP4 or GIF.
        thumbnail: PNG; of a clip its first frame.
        caption: what it shows and how it was made, in a line.
        result: without its picture, which is in the file; of older entries without block masks, too.
    """

    number: int
    clip: bool
    file: Path
    thumbnail: Path
    caption: str
    result: Result


class Visitor:
    """
    Args:
        masked: of all visitors.

    Attributes:
        name: of the session in the browser.
        folder: of this visitor alone.
        entries: what was made, the oldest first.
        comparison: the last one and its folder.
    """

    def __init__(self, name: str, folder: Path, masked: Masked | None = None) -> None:
        self.name, self.folder = name, folder
        self._masked = masked if masked is not None else []
        self.entries: list[Entry] = []
        self.comparison: tuple[Comparison, Path] | None = None
        self._numbers = itertools.count(1)
        self._folder_of_comparison: Path | None = None

    def new_file(self, suffix: str, job: Job) -> Path:
        """Where the next picture or clip is to go: "3-a-fox-seed-0.png"."""
        words = (str(next(self._numbers)), slug(job.prompt), f"seed-{job.seed}")
        return self.folder / f"{'-'.join(filter(None, words))}{suffix}"

    def new_folder(self) -> Path:
        """For a comparison, yet to be made; that of the one before is removed."""
        if self._folder_of_comparison is not None:
            shutil.rmtree(self._folder_of_comparison, ignore_errors=True)
        self.comparison = None
        self._folder_of_comparison = self.folder / f"comparison-{next(self._numbers)}"
        return self._folder_of_comparison

    def keep(self, result: Result) -> Entry:
        """Adds what was made to the entries; of more than `MAX_ENTRIES` the oldest goes, with its files."""
        file = result.job.output
        assert file is not None
        thumbnail = file.with_name(f"{file.stem}-small.png")
        image = result.image.copy() if result.image is not None else _first_frame(file)
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        image.save(thumbnail)
        entry = Entry(
            number=int(file.name.partition("-")[0]),
            clip=result.job.frames is not None,
            file=file,
            thumbnail=thumbnail,
            caption=_caption(result.job),
            result=dataclasses.replace(result, image=None, report=_with_masks(result.report, _on_cpu)),
        )
        self.entries.append(entry)
        for old in self.entries[:-MAX_ENTRIES]:
            old.file.unlink(missing_ok=True)
            old.thumbnail.unlink(missing_ok=True)
        del self.entries[:-MAX_ENTRIES]
        if _has_masks(entry.result.report):
            self._masked.append((weakref.ref(self), entry.number))
        for one, number in self._masked[:-WITH_MASKS]:
            if (visitor := one()) is not None:
                visitor._forget_masks(number)
        del self._masked[:-WITH_MASKS]
        return entry

    def _forget_masks(self, number: int) -> None:
        for place, entry in enumerate(self.entries):
            if entry.number == number:
                report = _with_masks(entry.result.report, lambda masks: {})
                result = dataclasses.replace(entry.result, report=report)
                self.entries[place] = dataclasses.replace(entry, result=result)

    def keep_compared(self, result: Result) -> Entry:
        """As `keep`, with a copy of the file: that of a comparison goes with it."""
        file = result.job.output
        assert file is not None
        own = self.new_file(file.suffix, result.job)
        shutil.copyfile(file, own)
        return self.keep(dataclasses.replace(result, job=dataclasses.replace(result.job, output=own)))


class Visitors:
    """
    Args:
        folder: for what they make.
        worker: who has something running is not forgotten.
    """

    def __init__(self, folder: Path, worker: Worker) -> None:
        self._folder, self._worker = folder, worker
        self._guard = threading.Lock()
        self._visitors: dict[str, Visitor] = {}  # the longest idle first
        self._masked: Masked = []
        self._left: dict[str, float] = {}

    def of(self, request: Any) -> Visitor:
        """Who asks; a new one where nobody of this name has been here.

        Args:
            request: a `gr.Request`; its session's name is whatever the client says, and no path is made of it.
        """
        name = str(getattr(request, "session_hash", None) or LOCAL)
        with self._guard:
            self._left.pop(name, None)
            visitor = self._visitors.pop(name, None)
            if visitor is None:
                self._make_room()
                folder = Path(tempfile.mkdtemp(prefix="visitor-", dir=self._folder))
                visitor = Visitor(name, folder, self._masked)
            self._visitors[name] = visitor
            return visitor

    def gone(self, request: Any) -> None:
        """Nobody listens at the page any more; the visitor is forgotten, with the folder, unless back before long.

        Gradio tells of this whenever the connection breaks. A tab in the background keeps it, a locked phone loses it
        and has the same page with the same name later. So what is running goes on (`worker.LINGER` has how long), and
        is in the history of who comes back.
        """
        name = str(getattr(request, "session_hash", None) or LOCAL)
        with self._guard:
            if name in self._visitors:
                self._left[name] = time.monotonic()
            self._make_room(for_new=0)

    def _make_room(self, for_new: int = 1) -> None:
        """Forgets those who left long ago, and of more than `MAX_VISITORS` first who has left, then who has made
        nothing, then the longest idle."""
        now = time.monotonic()
        idle = [name for name in self._visitors if not self._worker.busy(name)]
        forgotten = [name for name in idle if now - self._left.get(name, now) > AWAY]
        surplus = len(self._visitors) - len(forgotten) + for_new - MAX_VISITORS
        candidates = [name for name in idle if name not in forgotten]
        candidates.sort(key=lambda name: (name not in self._left, bool(self._visitors[name].entries)))
        forgotten += candidates[: max(0, surplus)]
        for name in forgotten:
            self._left.pop(name, None)
            shutil.rmtree(self._visitors.pop(name).folder, ignore_errors=True)


def _with_masks(report: Report | None, change: Callable[[Masks], Masks]) -> Report | None:
    """A report with other block masks, and with all figures that were read off its own."""

    def changed(details: Details | None) -> Details | None:
        return details and dataclasses.replace(details, masks=change(details.masks))

    return report and dataclasses.replace(report, details=tuple(map(changed, report.details)))


def _has_masks(report: Report | None) -> bool:
    return report is not None and any(details and details.masks for details in report.details)


def _on_cpu(masks: Masks) -> Masks:
    return {
        place: dataclasses.replace(mask, bits=mask.bits.cpu(), counts=mask.counts.cpu())
        for place, mask in masks.items()
    }


def _first_frame(file: Path) -> Image.Image:
    if file.suffix == ".mp4":
        with save.open_mp4(file) as container:
            frame: Image.Image = next(container.decode(video=0)).to_image()
            return frame
    with GifImagePlugin.GifImageFile(file) if file.suffix == ".gif" else save.open_png(file) as image:
        return image.convert("RGB")


def _caption(job: Job) -> str:
    size = f"{job.width}x{job.height}" + (f", {job.frames} frames" if job.frames else "")
    return ", ".join([job.prompt, size, "+".join(job.methods) or "dense", f"seed {job.seed}"])
