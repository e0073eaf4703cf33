"""What a comparison leaves in its folder beside the pictures."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from PIL import Image

from .. import save, video_writer
from . import page, sheet, stitch
from .figures import Comparison
from .metrics import middle_frame, read_picture

JSON, PAGE, SHEET, STITCHED = "compare.json", "compare.html", "sheet.png", "stitched"  # and the ending of the clips


def write(comparison: Comparison, folder: Path, frames_of: Callable[[str], Path]) -> None:
    """Writes the figures, the sheet, the page, and of clips one of all side by side; each whole or not at all.

    Args:
        frames_of: the folder with the frames of a clip as PNGs, by the name of its file.

    Raises:
        OSError, JobFailed: one could not be written.
    """

    def picture_of(file: str) -> Image.Image:
        return middle_frame(frames_of(file)) if comparison.frames else read_picture(folder / file)

    record = comparison.to_dict()
    save.write_json(record, folder / JSON)
    save.write_png(sheet.draw(comparison, picture_of), folder / SHEET, {"compare": record})
    stitched = _stitch(comparison, folder, frames_of) if comparison.frames else None
    with save.atomic(folder / PAGE) as file:
        file.write(page.render(comparison, folder, stitched).encode())


def _stitch(comparison: Comparison, folder: Path, frames_of: Callable[[str], Path]) -> str | None:
    """The name of the clip of all variants; None where there is not one clip."""
    files = [outcome.file for outcome in comparison.outcomes.values() if outcome.file]
    if not files or comparison.fps is None:
        return None
    path = folder / f"{STITCHED}{Path(files[0]).suffix}"
    record = {"compare": comparison.to_dict()}
    with video_writer.writers(path, None, fps=Fraction(comparison.fps), record=record) as (writer,):
        for shot in comparison.begun:
            for frame in stitch.scene(comparison, shot, frames_of):
                writer.add(frame)
    return path.name
