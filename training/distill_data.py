"""Pictures with captions for a distillation: found in a folder, checked, cut to size, dealt out in a fixed order."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from ..pipelines.errors import BadInput, JobFailed

METADATA = "metadata.jsonl"
Size = tuple[int, int]
# What random numbers are for, so that no two purposes share any.
ORDER, NOISE = 0, 1
SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp"])


@dataclass(frozen=True)
class Example:
    """A picture on disk and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Batch:
    """Pictures `[B, 3, H, W]` in -1..1, their captions, and SDXL's six numbers of each, `[B, 6]`: original height and
    width, top and left of the crop, height and width of the result."""

    pictures: Tensor
    captions: list[str]
    sizes: Tensor


def read_folder(folder: Path, *, progress: bool = False) -> list[Example]:
    """The pictures of a folder: by its metadata.jsonl (`file_name`, `text`), as Hugging Face's imagefolder has it, or
    every picture below it with a caption beside it (`fox.png`, `fox.txt`).

    Args:
        progress: draw a bar, should it take longer.

    Raises:
        BadInput: nothing is there, a caption is missing or not UTF-8, or a file is not a picture.
    """
    if not folder.is_dir():
        raise BadInput(f"--data {folder}: no such folder.")
    metadata = folder / METADATA
    examples = _listed(metadata) if metadata.is_file() else _with_captions_beside(folder)
    if not examples:
        raise BadInput(f"--data {folder}: no pictures ({', '.join(sorted(SUFFIXES))}).")
    for example in tqdm(examples, "checking pictures", disable=not progress, delay=2):
        _check_header(example.path)
    return examples


def read_captions(file: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        BadInput: no such file, none in it, or no text.
    """
    captions = [line.strip() for line in _text(file).split("\n") if line.strip()]
    if not captions:
        raise BadInput(f"--data {file}: no caption in it; one a line is expected.")
    return captions


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadInput(f"{file} is not a readable text file in UTF-8 ({error}).") from error


def _listed(metadata: Path) -> list[Example]:
    examples = []
    # Not splitlines: JSON may have U+2028 and its like inside a string.
    for number, line in enumerate(_text(metadata).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except (ValueError, KeyError, TypeError):
            raise BadInput(f'{metadata}, line {number}: expected {{"file_name": …, "text": …}}.') from None
        if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
            raise BadInput(f"{metadata}, line {number}: file_name and text must be text, and text not empty.")
        if not (metadata.parent / name).is_file():
            raise BadInput(f"{metadata}, line {number}: {name} does not exist.")
        examples.append(Example(metadata.parent / name, text.strip()))
    return examples


def _with_captions_beside(folder: Path) -> list[Example]:
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    beside = {path: path.with_suffix(".txt") for path in pictures}
    captions = {path: _text(file).strip() if file.is_file() else "" for path, file in beside.items()}
    bare = [path for path, text in captions.items() if not text]
    if bare:
        raise BadInput(
            f"--data {folder}: {len(bare)} of {len(pictures)} pictures have no caption, the first is {bare[0].name}; "
            f"put it in {bare[0].stem}.txt beside it, or all of them in {METADATA}."
        )
    return [Example(path, text) for path, text in captions.items()]


def _check_header(path: Path) -> None:
    try:
        with Image.open(path):
            pass
    except (OSError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path} is not a readable picture ({error}).") from error


def picture_size(path: Path) -> Size:
    """Width and height of a picture held upright."""
    with Image.open(path) as opened:
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return opened.size if not turned else (opened.height, opened.width)


def nearest_shape(size: Size, choices: Sequence[Size]) -> Size:
    """The one of `choices` whose sides are most nearly in proportion to those of `size`."""
    return min(choices, key=lambda other: abs(math.log(size[0] * other[1] / (size[1] * other[0]))))


def same_area(size: Size, side: int, step: int) -> Size:
    """About the shape of `size` with the area of a square of `side`, in multiples of `step`."""
    ratio = math.sqrt(size[0] / size[1])
    width, height = (max(step, round(length / step) * step) for length in (side * ratio, side / ratio))
    return width, height


class Pictures(Dataset[dict[str, Any]]):
    """Examples at (width, height) in pixels: scaled until they cover it, centre kept, transparency on white."""

    def __init__(self, examples: Sequence[Example], sizes: Sequence[Size]) -> None:
        self.examples, self.sizes = examples, sizes

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example, size = self.examples[index], self.sizes[index]
        try:
            with Image.open(example.path) as opened:
                image = _on_white(ImageOps.exif_transpose(opened))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise JobFailed(f"{example.path} could not be read: {error}") from error
        scale = max(wanted / length for wanted, length in zip(size, image.size, strict=True))
        left, top = (
            round(max(0.0, length * scale - wanted) / 2) for wanted, length in zip(size, image.size, strict=True)
        )
        cut = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 127.5 - 1
        numbers = [image.height, image.width, top, left, size[1], size[0]]
        return {"pixels": pixels, "caption": example.caption, "sizes": numbers}


class Order(Sampler[list[int]]):
    """Indices of one process's batches without end, from batch `start` on.

    Pictures of one batch are of one group (a size); each group has batches in proportion to its pictures. The order
    depends on the seed and the groups alone, so a resumed run goes on where it was. Each pass over a group has another
    order.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        batch: int,
        *,
        seed: int,
        process: int = 0,
        processes: int = 1,
        start: int = 0,
    ) -> None:
        self.groups, self.batch, self.seed = groups, batch, seed
        self.process, self.processes, self.start = process, processes, start

    def __iter__(self) -> Iterator[list[int]]:
        dealt = [0] * len(self.groups)
        passes = [_Pass(self.seed, group, members) for group, members in enumerate(self.groups)]
        for number in itertools.count():
            chosen = min(range(len(dealt)), key=lambda group: (dealt[group] + 1) / len(self.groups[group]))
            first = dealt[chosen] * self.batch
            dealt[chosen] += 1
            if number % self.processes == self.process and number // self.processes >= self.start:
                yield [passes[chosen][place] for place in range(first, first + self.batch)]


class _Pass:
    """The members of a group, pass after pass, each in an order of its own."""

    def __init__(self, seed: int, group: int, members: Sequence[int]) -> None:
        self.seed, self.group, self.members = seed, group, members
        self.epoch, self.permutation = -1, torch.empty(0)

    def __getitem__(self, place: int) -> int:
        epoch, within = divmod(place, len(self.members))
        if epoch != self.epoch:
            self.epoch = epoch
            random = generator(self.seed, ORDER, epoch, self.group)
            self.permutation = torch.randperm(len(self.members), generator=random)
        return self.members[int(self.permutation[within])]


def loader(pictures: Pictures, batches: Iterable[list[int]], workers: int) -> Iterator[Batch]:
    """`Batch` after `Batch`, prepared by `workers` processes; 0 prepares them when they are asked for.

    Raises:
        JobFailed: a picture could not be read.
    """
    try:
        yield from DataLoader(pictures, batch_sampler=batches, num_workers=workers, collate_fn=_collate)
    except JobFailed as error:
        # A worker process hands on the whole traceback as the message.
        raise JobFailed(str(error).strip().splitlines()[-1].removeprefix(f"{JobFailed.__module__}.")) from error


def generator(*numbers: int) -> torch.Generator:
    """Random numbers on the CPU that are the same for the same `numbers`, whatever was drawn before."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


def _collate(items: list[dict[str, Any]]) -> Batch:
    return Batch(
        torch.stack([item["pixels"] for item in items]),
        [item["caption"] for item in items],
        torch.tensor([item["sizes"] for item in items]),
    )


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would cut off all above 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
