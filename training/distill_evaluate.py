"""Measures distilled weights against dense attention: the same captions and seeds, PSNR, SSIM, and what is recognised.

    python -m attnswap.training.distill_evaluate [--model M] [--weights WEIGHTS] [--count 60] [--size PX]

Prints JSON. For a bundled model the captions are its own, and its reference pictures judge both kinds of attention.
SSIM comes from scikit-image: `pip install "attnswap[train]"`.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..accel.errors import AttnswapWarning, UnsupportedModel
from ..accel.methods.linfusion import AUTO, LinFusion
from ..accel.swap import enable
from ..pipelines import load, presets
from ..pipelines.emoji_reference import Reference, caption, judge, psnr, sample_captions
from ..pipelines.errors import BadInput, JobFailed
from ..pipelines.resolve import check_side, size_multiple
from .distill_data import read_captions
from .distill_drawing import DEFAULT_STEPS, Sampling, draw

START = "none"  # the U-Net's own projections, where distillation starts


def ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Mean structural similarity of pictures `[N, H, W, 3]` in 0..1 (Wang et al. 2004, uniform windows of 7 px)."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        raise BadInput('SSIM needs scikit-image: pip install "attnswap[train]".') from None
    pairs = zip(first, second, strict=True)
    return float(np.mean([structural_similarity(a, b, channel_axis=-1, data_range=1.0) for a, b in pairs]))


def evaluate(
    model: str,
    weights: Sequence[str | None],
    *,
    count: int = 60,
    captions: Path | None = None,
    size: int | None = None,
    batch: int = 8,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Figures for dense attention and for each of `weights` (None for the start of a distillation).

    Args:
        model: bundled name, folder or Hub id.
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
    where = load.pick_device(device)
    pipe = load.load(found, dtype=load.pick_dtype("auto", where, found)).to(where)
    pipe.set_progress_bar_config(disable=True)
    preset = presets.read(found.folder)
    native = preset.native_side or pipe.unet.config.sample_size * pipe.vae_scale_factor
    sampling = Sampling(size or native, preset.steps or DEFAULT_STEPS, preset.guidance)
    check_side("--size", sampling.side, size_multiple(pipe))
    prompts, asked, reference = _prompts(found, captions, count, seed)

    def pictures() -> np.ndarray:
        made = []
        for first in range(0, len(prompts), batch):
            part = prompts[first : first + batch]
            made += draw(pipe, part, range(seed + first, seed + first + len(part)), sampling)
        return np.stack([np.asarray(picture, np.float32) / 255 for picture in made])

    def judged(drawn: np.ndarray) -> dict[str, Any]:
        # The reference is of the native size; other sizes are compared with dense attention alone.
        return vars(judge(drawn, asked, reference)) if reference and reference.side == sampling.side else {}

    dense = pictures()
    figures: dict[str, Any] = {"model": model, **vars(sampling), "captions": len(prompts), "dense": judged(dense)}
    for chosen in weights:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AttnswapWarning)  # that the start draws poor pictures is what is measured
            handle = enable(pipe, LinFusion(weights=chosen))
        drawn = pictures()
        handle.disable()
        likeness = {"psnr": round(psnr(drawn, dense), 2), "ssim": round(ssim(drawn, dense), 4)}
        figures[chosen or START] = judged(drawn) | likeness
    return figures


def _prompts(
    model: load.Model, captions: Path | None, count: int, seed: int
) -> tuple[list[str], list[tuple[int, str | None]], Reference | None]:
    if captions is not None:
        return read_captions(captions)[:count], [], None
    folder = model.folder / "reference"
    if not folder.is_dir():
        raise BadInput(f"{model.name} comes with no captions: give --captions FILE, one a line.")
    reference = Reference.load(folder)
    asked = sample_captions(reference, count, seed)
    return [caption(reference.names[subject], colour) for subject, colour in asked], asked, reference


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="emoji-sd", help="bundled name, folder or Hub id")
    parser.add_argument(
        "--weights",
        action="append",
        help=f"name, folder or Hub id; again for more; {START} for the start of a distillation (default: {AUTO})",
    )
    parser.add_argument("--count", type=int, default=60, help="captions")
    parser.add_argument("--captions", type=Path, help="text file, one a line, for a model that comes with none")
    parser.add_argument("--size", type=int, help="side in pixels (default: the model's own)")
    parser.add_argument("--batch", type=int, default=8, help="pictures drawn together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    options = vars(parser.parse_args())
    weights = [None if name == START else name for name in options.pop("weights") or [AUTO]]
    try:
        print(json.dumps(evaluate(options.pop("model"), weights, **options), indent=1))
    except (BadInput, UnsupportedModel, JobFailed, ValueError) as error:
        print(f"distill_evaluate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
