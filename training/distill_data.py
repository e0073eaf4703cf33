"""Pictures with captions for a distillation: found in a folder, checked, cut to size, dealt out in a fixed order."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from ..pipelines.errors import BadInput, JobFailed

METADATA = "metadata.jsonl"
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
    """Pictures `[B, 3, side, side]` in -1..1, their captions, and SDXL's six numbers of each, `[B, 6]`: original
    height and width, top and left of the crop, height and width of the result."""

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


class Pictures(Dataset[dict[str, Any]]):
    """Examples as squares of `side` pixels: short side resized, centre kept, transparency on white."""

    def __init__(self, examples: list[Example], side: int) -> None:
        self.examples, self.side = examples, side

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example, side = self.examples[index], self.side
        try:
            with Image.open(example.path) as opened:
                image = _on_white(ImageOps.exif_transpose(opened))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise JobFailed(f"{example.path} could not be read: {error}") from error
        width, height = image.size
        scale = side / min(width, height)
        top, left = (round(max(0.0, length * scale - side) / 2) for length in (height, width))
        square = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1
        return {"pixels": pixels, "caption": example.caption, "sizes": [height, width, top, left, side, side]}


class Order(Sampler[list[int]]):
    """Indices of one process's batches without end, from batch `start` on.

    The order depends on the seed and the number of pictures alone, so a resumed run goes on where it was. Each pass
    over the data has another order.
    """

    def __init__(
        self, count: int, batch: int, *, seed: int, process: int = 0, processes: int = 1, start: int = 0
    ) -> None:
        self.count, self.batch, self.seed = count, batch, seed
        self.process, self.processes, self.start = process, processes, start

    def __iter__(self) -> Iterator[list[int]]:
        current, permutation = -1, torch.empty(0)
        for number in itertools.count(self.start):
            indices = []
            for place in range(self.batch):
                epoch, within = divmod((number * self.processes + self.process) * self.batch + place, self.count)
                if epoch != current:
                    current = epoch
                    permutation = torch.randperm(self.count, generator=generator(self.seed, ORDER, epoch))
                indices.append(int(permutation[within]))
            yield indices


def loader(pictures: Pictures, order: Order, workers: int) -> Iterable[Batch]:
    """`Batch` after `Batch`, prepared by `workers` processes; 0 prepares them between the steps."""
    return DataLoader(pictures, batch_sampler=order, num_workers=workers, collate_fn=_collate)


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
