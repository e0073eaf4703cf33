"""Clips on disk, frame by frame: H.264 in MP4, GIF, or a folder of PNGs; whole or not at all, with their record."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import GifImagePlugin, Image

from . import save
from .errors import BadInput, NotWritten

#: A picture, [H, W, 3].
Frame = NDArray[np.uint8]

KINDS = (".mp4", ".gif")
# What an MP4 remembers beside its record: the SHA-256 of its frames before they were encoded.
FRAMES = f"{save.KEY}_frames"
# GIF counts in hundredths of a second, and players take 1 for 10.
GIF_FASTEST = 50
# Of x264. Without the last, it takes for its macroblock tree what is fastest on the processor, which rounds in another
# way, and with AVX-512 in another way each time.
ENCODER = {"crf": "18", "preset": "medium", "x264-params": "cpu-independent=1"}
# Another number is another result; left alone, it is that of the processor's cores.
ENCODER_THREADS = 4


class Writer(Protocol):
    def add(self, frame: Frame) -> None: ...


def check(output: Path | None, frames_dir: Path | None) -> None:
    """Says now what would fail after the work.

    Raises:
        BadInput: MP4 without PyAV, a folder for frames that cannot be made or replaced, or that holds the clip.
    """
    if output is not None and output.suffix.lower() == ".mp4":
        save.require_av(output, ", or name a .gif, or use --frames-dir")
    if frames_dir is None:
        return
    folder = frames_dir.resolve()
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"--frames-dir {frames_dir} is a file.")
    if folder.is_dir() and any(folder.iterdir()):
        raise BadInput(f"--frames-dir {frames_dir} is not empty.")
    # A new folder takes the place of an empty one, which none of these two can be made to leave.
    if os.path.ismount(folder):
        raise BadInput(f"--frames-dir {frames_dir} is a mount point; name a folder in it.")
    if folder == Path.cwd():
        raise BadInput(f"--frames-dir {frames_dir} is the current folder; name one in it.")
    if output is not None and folder in (clip := output.resolve(), clip.parent):
        raise BadInput(f"-o {output} and --frames-dir {frames_dir} would be the same, or one in the other.")
    save.check_folder(folder)


def check_fps(output: Path | None, fps: Fraction) -> None:
    """
    Raises:
        BadInput: a GIF too fast for players.
    """
    if output is not None and output.suffix.lower() == ".gif" and fps > GIF_FASTEST:
        raise BadInput(f"{output}: a GIF has at most {GIF_FASTEST} frames a second, not {float(fps):g}.")


@contextmanager
def writers(
    output: Path | None, frames_dir: Path | None, *, fps: Fraction, record: dict[str, Any]
) -> Iterator[list[Writer]]:
    """What writes each frame where it is wanted; files come to be when the block ends well.

    Args:
        output: .mp4 or .gif; None writes no clip.
        frames_dir: a folder that is not there or empty, for PNGs; None writes none.
        record: what a clip remembers of its job; `save.read_record` reads it.

    Raises:
        NotWritten: a disk that is full, or the like.
    """
    with ExitStack() as stack:
        opened: list[Writer] = []
        if output is not None:
            kind = mp4 if output.suffix.lower() == ".mp4" else gif
            opened.append(stack.enter_context(_said_in_a_line(kind(output, fps, record), output)))
        if frames_dir is not None:
            opened.append(stack.enter_context(_said_in_a_line(pngs(frames_dir, record), frames_dir)))
        yield opened


@contextmanager
def _said_in_a_line(writer: AbstractContextManager[Writer], path: Path) -> Iterator[Writer]:
    """`writer`, its errors of files, and not those of the block, as `JobFailed` with the name of what it writes."""
    of_the_block: BaseException | None = None
    try:
        with writer as opened:
            try:
                yield _InALine(opened, path)
            except BaseException as error:
                of_the_block = error
                raise
    except OSError as error:
        if error is of_the_block:
            raise
        raise NotWritten(path, error) from error


class _InALine:
    def __init__(self, writer: Writer, path: Path) -> None:
        self._writer, self._path = writer, path

    def add(self, frame: Frame) -> None:
        try:
            self._writer.add(frame)
        except OSError as error:  # PyAV's errors of files are of this kind, too
            raise NotWritten(self._path, error) from error


@contextmanager
def mp4(path: Path, fps: Fraction, record: dict[str, Any]) -> Iterator[Writer]:
    """H.264 as browsers play it: yuv420p in BT.709, the index before the frames, sides padded to even.

    The same frames become the same file, with any number of cores, of one version of FFmpeg and x264.
    """
    import av

    options = {"movflags": "+faststart+use_metadata_tags"}
    with save.atomic_path(path) as part, av.open(str(part), "w", format="mp4", options=options) as container:
        container.metadata[save.KEY] = json.dumps(record, ensure_ascii=False)
        writer = _Mp4(container, fps)
        yield writer
        writer.finish()


class _Mp4:
    def __init__(self, container: Any, fps: Fraction) -> None:
        self._container, self._fps = container, fps
        self._stream: Any = None
        self._count = 0
        self._digest = hashlib.sha256()
        # Metadata go before the first packet, and those of the frames are known after the last.
        self._packets: list[Any] = []

    def add(self, frame: Frame) -> None:
        import av
        from av.video.reformatter import Colorspace

        self._digest.update(f"{frame.shape}".encode() + frame.tobytes())
        frame = padded_to_even(frame)
        if self._stream is None:
            self._stream = self._open(*frame.shape[:2])
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709
        )
        picture.pts, picture.time_base = self._count, 1 / self._fps
        self._packets += self._stream.encode(picture)
        self._count += 1

    def finish(self) -> None:
        if self._stream is not None:
            self._packets += self._stream.encode()  # what the encoder still holds
            self._container.metadata[FRAMES] = self._digest.hexdigest()
            self._container.mux(self._packets)

    def _open(self, height: int, width: int) -> Any:
        stream = self._container.add_stream("libx264", rate=self._fps, options=ENCODER)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = 1 / self._fps
        context.thread_count, context.thread_type = ENCODER_THREADS, "FRAME"
        # 1 is BT.709 in each of these, and the limited range of video; players would guess by the size.
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        return stream


@contextmanager
def gif(path: Path, fps: Fraction, record: dict[str, Any]) -> Iterator[Writer]:
    """Frames of 256 colours each, for ever; Pillow's own `save` would hold them all."""
    with save.atomic(path) as file:
        writer = _Gif(file, fps, record)
        yield writer
        file.write(b";")


class _Gif:
    def __init__(self, file: Any, fps: Fraction, record: dict[str, Any]) -> None:
        self._file, self._fps = file, fps
        self._comment = json.dumps(record, ensure_ascii=False).encode()
        self._count = 0

    def add(self, frame: Frame) -> None:
        image = Image.fromarray(frame).quantize(256)
        if self._count == 0:
            header, _ = GifImagePlugin.getheader(image, info={"loop": 0, "comment": self._comment})
            self._file.writelines(header)
        # Whole hundredths of a second, so that no error adds up.
        begin, end = (round(100 * count / self._fps) for count in (self._count, self._count + 1))
        self._file.writelines(GifImagePlugin.getdata(image, duration=10 * (end - begin), include_color_table=True))
        self._count += 1


@contextmanager
def pngs(folder: Path, record: dict[str, Any]) -> Iterator[Writer]:
    """frame-00001.png and so on, lossless, in a folder that appears with the last of them."""
    folder = folder.resolve()  # a link stays one, to the folder that is replaced
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        yield _Pngs(part, record)
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()  # empty; a full one is refused before the work, and here
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


class _Pngs:
    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self._folder, self._record = folder, record
        self._count = 0

    def add(self, frame: Frame) -> None:
        self._count += 1
        save.write_png(Image.fromarray(frame), self._folder / f"frame-{self._count:05}.png", self._record)


def padded_to_even(frame: Frame) -> Frame:
    """With the last row and column once more where their number is odd, as yuv420p cannot have it."""
    height, width = frame.shape[:2]
    return np.ascontiguousarray(np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))
