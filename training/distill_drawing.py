"""Pictures drawn by a pipeline from captions: training data where there is none, and the pairs of a report."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..pipelines import save
from ..pipelines.errors import BLACKED_OUT, BadInput, JobFailed
from .distill_checkpoint import writing
from .distill_data import METADATA

DEFAULT_STEPS = 25


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; None is the pipeline's own. The last is the number of tokens a caption is padded to."""

    width: int
    height: int
    steps: int = DEFAULT_STEPS
    guidance: float | None = None
    max_sequence_length: int | None = None


def draw(pipe: Any, captions: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> list[Image.Image]:
    """One picture a caption; each depends on its seed and not on the others in the batch.

    Raises:
        JobFailed: one is black, which nobody should learn from or be compared with.
    """
    more: dict[str, Any] = {} if sampling.guidance is None else {"guidance_scale": sampling.guidance}
    if sampling.max_sequence_length is not None:
        more["max_sequence_length"] = sampling.max_sequence_length
    output = pipe(
        list(captions),
        height=sampling.height,
        width=sampling.width,
        num_inference_steps=sampling.steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **more,
    )
    pictures: list[Image.Image] = output.images
    flags = getattr(output, "nsfw_content_detected", None) or [False] * len(pictures)
    for caption, picture, flagged in zip(captions, pictures, flags, strict=True):
        if flagged:
            raise JobFailed(f"{caption!r}: {BLACKED_OUT}")
        if not picture.getbbox():
            raise JobFailed(f"{caption!r}: the picture came out black, not-a-number most likely. Try bf16 or fp32.")
    return pictures


def draw_folder(
    pipe: Any,
    captions: Sequence[str],
    folder: Path,
    samplings: Sequence[Sampling],
    *,
    seed: int,
    batch: int,
    process: int = 0,
    processes: int = 1,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Draw captions into a folder of pictures with a metadata.jsonl; what an earlier run has drawn is kept.

    Args:
        samplings: taken in turn.
        seed: that of the first caption, the next ones follow.
        batch: pictures drawn together.
        process, processes: which share of the captions to draw, so that several processes can divide them.
        progress: told how many more are there.

    Raises:
        BadInput: the folder holds pictures of other captions or another size.
        JobFailed: a picture came out black or could not be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:06d}.png" for number in range(len(captions))]
    lines = [{"file_name": name, "text": text} for name, text in zip(names, captions, strict=True)]
    document = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    recipe = {"samplings": [vars(sampling) for sampling in samplings], "seed": seed}
    for name, text in ((METADATA, document), ("recipe.json", json.dumps(recipe) + "\n")):
        _agree(folder / name, text, process)
    share = range(process, len(names), processes)
    missing: dict[Sampling, list[int]] = defaultdict(list)
    for number in share:
        if not (folder / names[number]).exists():
            missing[samplings[number % len(samplings)]].append(number)
    progress(len(share) - sum(map(len, missing.values())))
    parts = [(s, numbers[i : i + batch]) for s, numbers in missing.items() for i in range(0, len(numbers), batch)]
    for sampling, part in parts:
        pictures = draw(pipe, [captions[number] for number in part], [seed + number for number in part], sampling)
        for number, picture in zip(part, pictures, strict=True):
            with writing(folder / names[number]), save.atomic(folder / names[number]) as file:
                picture.save(file, format="PNG")
        progress(len(part))


def _agree(path: Path, text: str, process: int) -> None:
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise BadInput(f"{path.parent} holds pictures of other captions or another size: give another output folder.")
    if process == 0 and not path.exists():
        with writing(path), save.atomic(path) as file:
            file.write(text.encode())
