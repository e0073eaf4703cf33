"""The picture that a job begins with: how it is read, which pipeline takes it, and at what size."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps

from . import clip
from .errors import BadInput
from .job import MAX_SIDE, Job
from .names import expanded

PICTURES = ("PNG", "JPEG", "WEBP")
# Pipelines that make nothing without a picture, though the calls of most have a default for it.
FROM_PICTURES = re.compile("ImageToVideo|I2V|VideoToWorld|2Img|ImageToImage|Edit|Pix2Pix|ControlNet|Upscale")
SIDEWAYS = (5, 6, 7, 8)  # EXIF's orientations in which width and height change places


def read(path: Path) -> Image.Image:
    """The picture upright, in RGB.

    Raises:
        BadInput: there is none that can be read.
    """
    with _opened(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of the picture upright, by its header alone.

    Raises:
        BadInput: there is none that can be read.
    """
    with _opened(path) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS else (width, height)


def check_file(path: Path) -> Path:
    """`path` without "~".

    Raises:
        BadInput: reading it might never come to an end.
    """
    file = expanded(path)
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise BadInput(f"--image {path} is no file but a pipe or a device.")
    return file


def taker(job: Job, pipe: Any) -> Any:
    """The pipeline that is called for `job`: `pipe`, or the one that changes pictures with its parts.

    Raises:
        BadInput: there is none for a picture, or none for a job without.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    name = type(pipe).__name__
    is_a = f"{job.model} is a {name}, which"
    takes = "image" in accepted
    if job.image is None:
        sized = "height" in accepted or clip.frames_argument(pipe)
        if takes and (not sized or accepted["image"].default is inspect.Parameter.empty or FROM_PICTURES.search(name)):
            raise BadInput(f"{is_a} begins with a picture: give --image.")
        return pipe
    if job.route != "direct":
        raise BadInput(f"--image: --route {job.route} begins with noise; leave one of them out.")
    if takes:
        return pipe
    if clip.frames_argument(pipe):
        raise BadInput(f"--image: {is_a} makes clips of a prompt alone; those named ImageToVideo begin with a picture.")
    return image_to_image(pipe)


def image_to_image(pipe: Any, flag: str = "--image") -> Any:
    """The image-to-image pipeline that shares every component with `pipe`.

    Args:
        flag: what asks for it.

    Raises:
        BadInput: Diffusers has none for it, or one that knows no strength, or whose scheduler cannot.
    """
    from diffusers import AutoPipelineForImage2Image

    name = type(pipe).__name__
    try:
        made = AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError as error:
        raise BadInput(f"{flag}: {name} has no image-to-image form in Diffusers.") from error
    if "strength" not in inspect.signature(made.__call__).parameters:
        raise BadInput(f"{flag}: {name}'s image-to-image form, {type(made).__name__}, takes no strength.")
    if made.scheduler.config.get("use_flow_sigmas") and not hasattr(made.scheduler, "scale_noise"):
        scheduler = type(made.scheduler).__name__
        raise BadInput(f"{flag}: {type(made).__name__} cannot begin with a picture by {scheduler}; try FlowMatchEuler.")
    return made


def size(job: Job, pipe: Any, area: tuple[int, int] | None, multiple: int) -> tuple[int, int]:
    """Width and height of what is made of the picture, where the job does not give both.

    A side that is not given follows from the other by the picture's aspect ratio. Where none is, a picture keeps its
    size, and a clip gets the area that its model has where nothing is asked for.

    Args:
        pipe: that takes the picture.
        area: what its clips have, as width and height; None for pictures.
        multiple: pixels of which both are to be multiples; they are rounded down.

    Raises:
        BadInput: the picture cannot be read, or another size is asked for than the pipeline gives it.
    """
    assert job.image is not None
    width, height = size_of(job.image)
    if (own := _own_size(pipe, width, height)) is not None:
        if (job.width or own[0], job.height or own[1]) != own:
            raise BadInput(
                f"{job.model} is a {type(pipe).__name__}, which makes {own[0]}x{own[1]} of a picture of "
                f"{width}x{height}: leave --width and --height out."
            )
        return own
    if job.width or job.height:
        scale = job.width / width if job.width else (job.height or 0) / height
    elif area is not None:
        scale = math.sqrt(area[0] * area[1] / (width * height))
    else:
        scale = min(1.0, MAX_SIDE / max(width, height))
    usual = (max(multiple, int(side * scale + 1e-6) // multiple * multiple) for side in (width, height))
    return tuple(given or side for given, side in zip((job.width, job.height), usual, strict=True))  # type: ignore[return-value]


def argument(image: Image.Image, pipe: Any, width: int, height: int) -> Image.Image:
    """The picture as `pipe` is to have it: of the size that is made, but for those that only look at it."""
    accepted = inspect.signature(pipe.__call__).parameters
    looks = "strength" not in accepted and "height" in accepted and not clip.frames_argument(pipe)
    return image if looks else image.resize((width, height), Image.Resampling.LANCZOS)


def _own_size(pipe: Any, width: int, height: int) -> tuple[int, int] | None:
    """What HunyuanVideo 1.5 makes of a picture of this size; None where the caller has the choice."""
    target = getattr(pipe, "target_size", None)
    if "width" in inspect.signature(pipe.__call__).parameters or target is None:
        return None
    rows, columns = pipe.video_processor.calculate_default_height_width(height, width, target)
    return int(columns), int(rows)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    file = check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=PICTURES) as image:
                yield image
    except FileNotFoundError:
        raise BadInput(f"--image {path}: there is no such file.") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadInput(f"--image {path} has more than {Image.MAX_IMAGE_PIXELS} pixels.") from None
    except Image.UnidentifiedImageError:
        raise BadInput(f"--image {path} is no PNG, JPEG or WebP.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise BadInput(f"--image {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
