"""Measures distilled weights against dense attention: the same captions and seeds, PSNR, SSIM, and what is recognised.

    python -m attnswap.training.distill_evaluate [--model M] [--method NAME] [--set KEY=VALUE] [--weights WEIGHTS] …

Prints JSON. For a bundled model the captions are its own, and its reference pictures judge both kinds of attention.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from skimage.metrics import structural_similarity

from ..accel.errors import AttnswapWarning, UnsupportedModel
from ..accel.methods.base import Config
from ..accel.methods.linfusion import AUTO, LinFusion
from ..accel.swap import enabled
from ..pipelines import load, presets, settings
from ..pipelines.emoji_reference import Reference, caption, judge, psnr, sample_captions
from ..pipelines.errors import BadInput, JobFailed
from ..pipelines.resolve import check_side, native_side, size_multiple
from .distill_data import read_captions
from .distill_drawing import DEFAULT_STEPS, Sampling, draw

START = "none"  # the model's own projections, where distillation starts
Figures = dict[str, Any]


@dataclass(frozen=True)
class Captions:
    """What is drawn, and what a bundled model's reference knows of it (subject and colour of each)."""

    texts: list[str]
    asked: list[tuple[int, str | None]]
    reference: Reference | None


def ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Mean structural similarity of pictures `[N, H, W, 3]` in 0..1 (Wang et al. 2004, uniform windows of 7 px)."""
    pairs = zip(first, second, strict=True)
    return float(np.mean([structural_similarity(a, b, channel_axis=-1, data_range=1.0) for a, b in pairs]))


def evaluate(
    model: str,
    weights: Sequence[str | None],
    *,
    method: str = LinFusion.name,
    options: Mapping[str, Any] | None = None,
    count: int = 60,
    captions: Path | None = None,
    size: int | None = None,
    batch: int = 8,
    seed: int = 0,
    device: str = "auto",
) -> Figures:
    """Figures for dense attention and for each of `weights` (None for the start of a distillation).

    Args:
        model: bundled name, folder or Hub id.
        method, options: by name, and its settings other than the weights; else the model's preset has them.
        count: captions that are used.
        captions: a text file, one a line; needed where the model has no reference pictures.
        size: side in pixels; None is the model's own.
        batch: pictures drawn together.
        seed: of the choice of captions, and of the first picture.

    Raises:
        BadInput, UnsupportedModel, WeightsError: the request cannot be met.
        JobFailed: a picture came out black.
    """
    found = load.find(model)
    preset = presets.read(found.folder)
    methods = {}
    for name in weights:
        values = {**preset.settings_of(method), **(options or {}), "weights": name}
        (methods[name or START],) = settings.build({method: values})
    where = load.pick_device(device)
    pipe = load.load(found, dtype=load.pick_dtype("auto", where, found)).to(where)
    pipe.set_progress_bar_config(disable=True)
    side = size or preset.native_side or native_side(pipe) or 0
    check_side("--size", side, size_multiple(pipe))
    steps = preset.steps or DEFAULT_STEPS
    sampling = Sampling(side, side, steps, preset.guidance, preset.max_sequence_length)
    chosen = captions_of(found, captions, count, seed)
    return {"model": model, **measure(pipe, methods, chosen, sampling, batch=batch, seed=seed)}


def measure(
    pipe: Any, methods: Mapping[str, Config], captions: Captions, sampling: Sampling, *, batch: int = 8, seed: int = 0
) -> Figures:
    """Figures for dense attention and for each of `methods`, by its name there.

    Raises:
        JobFailed: a picture came out black.
    """
    texts, reference = captions.texts, captions.reference

    def pictures() -> np.ndarray:
        made = []
        for first in range(0, len(texts), batch):
            part = texts[first : first + batch]
            made += draw(pipe, part, range(seed + first, seed + first + len(part)), sampling)
        return np.stack([np.asarray(picture, np.float32) / 255 for picture in made])

    def judged(drawn: np.ndarray) -> Figures:
        # The reference is of the native size; other sizes are compared with dense attention alone.
        fits = reference and (reference.side, reference.side) == (sampling.width, sampling.height)
        return vars(judge(drawn, captions.asked, reference)) if reference and fits else {}

    dense = pictures()
    figures: Figures = {**vars(sampling), "captions": len(texts), "dense": judged(dense)}
    for name, config in methods.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AttnswapWarning)  # that the start draws poor pictures is what is measured
            with enabled(pipe, config):
                drawn = pictures()
        likeness = {"psnr": round(psnr(drawn, dense), 2), "ssim": round(ssim(drawn, dense), 4)}
        figures[name] = judged(drawn) | likeness
    return figures


def captions_of(model: load.Model, file: Path | None, count: int, seed: int) -> Captions:
    """`count` captions from a file, or else from the model's reference.

    Raises:
        BadInput: it has none.
    """
    if file is not None:
        return Captions(read_captions(file)[:count], [], None)
    folder = model.folder / "reference"
    if not folder.is_dir():
        raise BadInput(f"{model.name} comes with no captions: give --captions FILE, one a line.")
    reference = Reference.load(folder)
    asked = sample_captions(reference, count, seed)
    return Captions([caption(reference.names[subject], colour) for subject, colour in asked], asked, reference)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="emoji-sd", help="bundled name, folder or Hub id")
    parser.add_argument(
        "--weights",
        action="append",
        help=f"name, folder or Hub id; again for more; {START} for the start of a distillation "
        f"(default: {AUTO}, or what the model ships)",
    )
    parser.add_argument("--method", default=LinFusion.name, help=f"default: {LinFusion.name}")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting; again for more")
    parser.add_argument("--count", type=int, default=60, help="captions")
    parser.add_argument("--captions", type=Path, help="text file, one a line, for a model that comes with none")
    parser.add_argument("--size", type=int, help="side in pixels (default: the model's own)")
    parser.add_argument("--batch", type=int, default=8, help="pictures drawn together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    options = vars(parser.parse_args())
    default = AUTO if options["method"] == LinFusion.name else options["model"]
    weights = [None if name == START else name for name in options.pop("weights") or [default]]
    try:
        options["options"] = settings.parse([options["method"]], options.pop("set"))[options["method"]]
        print(json.dumps(evaluate(options.pop("model"), weights, **options), indent=1))
    except (BadInput, UnsupportedModel, JobFailed, ValueError) as error:
        print(f"distill_evaluate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
