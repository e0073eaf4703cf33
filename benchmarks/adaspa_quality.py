"""What does AdaSpa keep? A bundled video model with paired seeds: dense, by its search, and by masks that do not look.

    python -m attnswap.benchmarks.adaspa_quality --json benchmarks/results/adaspa-quality.json \
        --pictures docs/images --page docs/adaspa.md

Every prompt is made into a clip with the same seed by every variant in turn. PSNR and SSIM are of a clip against dense
attention's; a variant with another mask at the same sparsity runs through the same kernels in the same steps, so that
only the choice of blocks differs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..accel.methods.adaspa import AdaSpa, AdaSpaStrategy
from ..accel.methods.adaspa_order import Arrangement
from ..accel.report import Report
from ..accel.swap import enabled
from ..pipelines import load, presets
from ..pipelines.emoji_reference import Reference, psnr
from ..training.distill_evaluate import ssim
from ..training.emoji_video_clips import clip_caption, sample_asks
from .chart import line_chart
from .high_resolution import write_page
from .machine import versions
from .structured import positions

DENSE = "dense"
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
# The one at which schedules are compared.
USUAL = 0.8
SCHEDULES: dict[str, tuple[float, ...]] = {
    "first only": (0.2,),
    "every tenth of the run": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
}
#: Masks that do not look at the clip, and what a clip's length counts for in them where its sides count for 1: a window
#: in time and space alike, or one that reaches far within a frame.
STATIC = {"window": 1.0, "near frames": 4.0}
SHOWN = 6


@dataclass(frozen=True)
class Variant:
    """`config` None is dense attention; `static` names a mask that does not look at the clip."""

    name: str
    group: str
    config: AdaSpa | None = None
    static: str | None = None


@dataclass
class Made:
    """What a variant has made so far, a number for each prompt."""

    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    sparse_density: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    lowest: list[float] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)


def variants(block: tuple[int, int], reorder: str = "none") -> list[Variant]:
    """All that are compared."""

    def config(sparsity: float, **changes: Any) -> AdaSpa:
        return AdaSpa(**{"sparsity": sparsity, "block": block, "min_tokens": 0, "reorder": reorder, **changes})

    found = [Variant(DENSE, DENSE)]
    for sparsity in SPARSITIES:
        found.append(Variant(f"adaspa {sparsity:g}", "adaspa", config(sparsity)))
        same = config(sparsity, head_adaptive=False)
        found.append(Variant(f"adaspa {sparsity:g}, heads alike", "adaspa, heads alike", same))
        found.append(Variant(f"window {sparsity:g}", "window", same, "window"))
    found.append(Variant(f"near frames {USUAL:g}", "near frames", config(USUAL, head_adaptive=False), "near frames"))
    found += [
        Variant(f"{name} {USUAL:g}", "schedule", config(USUAL, search_steps=steps)) for name, steps in SCHEDULES.items()
    ]
    return found


def nearness(places: Tensor, block: Sequence[int]) -> Tensor:
    """`[nQ, nK]`, larger for blocks whose tokens are nearer to each other: the box that holds half of their pairs.

    Args:
        places: `[S, 3]` of the tokens, in the order in which the kernels have them.
        block: (queries, keys).
    """
    apart = (places[:, None] - places[None]).abs().amax(-1)
    rows = [part.split(block[1], dim=1) for part in apart.split(block[0])]
    return torch.stack([torch.stack([-tile.median() for tile in row]) for row in rows])


def places_of(arrangement: Arrangement, frames_weigh: float) -> Tensor:
    """`[S, 3]`, where in a clip its tokens are, as arranged: frame, row and column from 0 to 1, the first weighed.

    Raises:
        ValueError: there are other tokens than the clip's.
    """
    place = arrangement.place
    if place.around or len(place.grid) != 3:
        raise ValueError(
            f"a static mask is for the tokens of clips alone, not for {place.tokens} of which {place.around} are others"
        )
    frames, height, width = place.grid
    places = positions((frames, height, width)) * torch.tensor([frames_weigh, 1.0, 1.0])
    return arrangement.arrange(places[None, :, None])[0, :, 0]


@contextmanager
def looking_nowhere(frames_weigh: float) -> Iterator[None]:
    """AdaSpa with masks of near blocks in place of those it has searched. The shares of attention that a report says
    they keep are of the scores, as those of AdaSpa's own masks are."""
    keep = AdaSpaStrategy._keep

    def keep_near(
        self: AdaSpaStrategy,
        query: Tensor,
        key: Tensor,
        scores: Tensor,
        lse: Tensor,
        reference: Tensor | None,
        layout: Any,
        arrangement: Arrangement,
    ) -> None:
        near = nearness(places_of(arrangement, frames_weigh), self.config.block)
        # Scores are shares of attention: none is negative.
        instead = (near - near.min() + 1).expand_as(scores).contiguous()
        keep(self, query, key, instead, lse, reference, layout, arrangement)
        state = layout.plan.state
        state.kept = (scores * state.mask.to_dense()).sum((-2, -1)) / scores.sum((-2, -1))

    with mock.patch.object(AdaSpaStrategy, "_keep", keep_near):
        yield


class Model:
    """A bundled video model that makes clips for variants."""

    def __init__(self, name: str, steps: int | None = None, frames: int | None = None) -> None:
        self.name, found = name, load.find(name)
        self.preset = presets.read(found.folder)
        self.reference = Reference.load(found.folder / "reference")
        self.pipe = load.load(found, dtype=torch.float32)
        self.pipe.set_progress_bar_config(disable=True)
        side = self.preset.native_side
        self.arguments = {
            "height": side,
            "width": side,
            "num_frames": frames or self.preset.frames,
            "num_inference_steps": steps or self.preset.steps,
            "guidance_scale": self.preset.guidance,
            "max_sequence_length": self.preset.max_sequence_length,
        }

    def make(self, variant: Variant, prompt: str, seed: int, dense: np.ndarray | None, into: Made) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        static = looking_nowhere(STATIC[variant.static]) if variant.static else nullcontext()
        method = enabled(self.pipe, variant.config) if variant.config else nullcontext()
        with static, method as handle:
            began = time.perf_counter()
            clip: np.ndarray = self.pipe(prompt, generator=generator, output_type="np", **self.arguments).frames[0]
            into.seconds.append(time.perf_counter() - began)
        if handle is not None:
            self._note(handle.report(), into)
        if dense is not None:
            into.psnr.append(psnr(clip, dense))
            into.ssim.append(ssim(clip, dense))
        into.frames.append(clip[len(clip) // 2])
        return clip

    @staticmethod
    def _note(report: Report, into: Made) -> None:
        layers = [layer for denoiser in report.denoisers for layer in denoiser["layers"] if layer["accelerated"]]
        kept = [share for layer in layers for branch in layer["branches"] for item in branch["kept"] for share in item]
        into.density.append(report.density)
        into.sparse_density.append(statistics.fmean(layer["density_accelerated"] for layer in layers))
        into.kept.append(statistics.fmean(kept))
        into.lowest.append(min(kept))


def measure(
    model: Model, prompts: Sequence[str], chosen: Sequence[Variant], *, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Make every prompt into a clip with every variant."""
    made = {variant.name: Made() for variant in chosen}
    for number, prompt in enumerate(prompts):
        dense: np.ndarray | None = None
        for variant in chosen:
            clip = model.make(variant, prompt, number, dense, made[variant.name])
            dense = clip if variant.name == DENSE else dense
        say(f"{number + 1}/{len(prompts)}: {prompt}")
    reference = made[DENSE]
    return {
        "model": model.name,
        "arguments": model.arguments,
        "prompts": list(prompts),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "variants": {variant.name: _summary(variant, made, reference) for variant in chosen},
        "frames": {name: one.frames[:SHOWN] for name, one in made.items()},
    }


def _summary(variant: Variant, made: Mapping[str, Made], dense: Made) -> dict[str, Any]:
    own = made[variant.name]
    shares = [mine / other for mine, other in zip(own.seconds, dense.seconds, strict=True)]
    found: dict[str, Any] = {
        "group": variant.group,
        "config": None if variant.config is None else variant.config.to_dict(),
        "seconds": statistics.median(own.seconds),
        "of_dense": statistics.median(shares),
    }
    if variant.config is None:
        return found
    for name in ("psnr", "ssim", "density", "sparse_density", "kept"):
        found[name] = statistics.fmean(getattr(own, name))
    found["psnr_of_each"] = own.psnr
    found["lowest"] = min(own.lowest)
    adaptive = made.get(f"adaspa {variant.config.sparsity:g}")
    if variant.static and adaptive is not None:
        found["beaten_in"] = sum(a > b for a, b in zip(adaptive.psnr, own.psnr, strict=True))
    return found


# The page.


def page_section(result: Mapping[str, Any], images: str) -> str:
    """The measured part of docs/adaspa.md."""
    arguments, rows = result["arguments"], result["variants"]
    block = next(row["config"]["block"] for row in rows.values() if row["config"])
    lines = [
        f"`{result['model']}`, {arguments['num_frames']} frames of {arguments['width']} x {arguments['height']} px, "
        f"{arguments['num_inference_steps']} steps, guidance {arguments['guidance_scale']:g}, blocks of {block[0]} x "
        f"{block[1]} tokens, prompts: {len(result['prompts'])}; CPU, threads {result['threads']}, torch "
        f"{result['versions']['torch']}. PSNR and SSIM are means over clips with the same seed as dense attention's. "
        "*Density* is the share of query-key pairs computed in the whole run; *after warm-up* that in the steps that "
        "are sparse. *Recall* is the share of the attention that the kept blocks held at the last search, in the mean "
        "and in the worst head of all prompts. *Window* and *near frames* are masks that do not look at the clip.",
        "",
        "| mask | density | after warm-up | recall | lowest | PSNR | SSIM |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_row(name, row) for name, row in rows.items() if row["config"] and row["group"] != "schedule"),
        "",
        *_against_static(rows, len(result["prompts"])),
        "",
        f"When to search, at sparsity {USUAL:g}:",
        "",
        "| searches | density | after warm-up | recall | lowest | PSNR | SSIM |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        _row("two, as published", rows[f"adaspa {USUAL:g}"]),
        *(_row(name, row) for name, row in rows.items() if row["group"] == "schedule"),
        "",
        f"![PSNR over density]({images}-psnr.png)",
        "",
        f"The middle frame of the first {SHOWN} prompts; rows: {', '.join(_shown_rows(rows))}.",
        "",
        f"![frames]({images}-frames.png)",
    ]
    return "\n".join(lines)


def _row(name: str, row: Mapping[str, Any]) -> str:
    cells = [
        name,
        f"{row['density']:.3f}",
        f"{row['sparse_density']:.3f}",
        f"{row['kept']:.3f}",
        f"{row['lowest']:.3f}",
        f"{row['psnr']:.1f} dB",
        f"{row['ssim']:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def _against_static(rows: Mapping[str, Any], prompts: int) -> list[str]:
    title = f"Clips of {prompts} in which AdaSpa is nearer to dense attention than a static mask of the same sparsity:"
    lines = []
    for group in STATIC:
        found = [row for row in rows.values() if row["group"] == group and "beaten_in" in row]
        wins = (f"{row['beaten_in']} at {row['config']['sparsity']:g}" for row in found)
        lines.append(f"- {group}: {', '.join(wins)}")
    return [title, "", *lines]


def _shown_rows(rows: Mapping[str, Any]) -> list[str]:
    return [name for name in (DENSE, *(f"{kind} {USUAL:g}" for kind in ("adaspa", *STATIC))) if name in rows]


def publish(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Write numbers, pictures, and the part of the page between its marks."""
    frames, rows = result.pop("frames"), result["variants"]
    stem = options.pictures / options.json.stem
    options.pictures.mkdir(parents=True, exist_ok=True)
    strips = [np.concatenate(frames[name], axis=1) for name in _shown_rows(rows)]
    whole = (np.concatenate(strips) * 255).round().astype(np.uint8)
    Image.fromarray(whole).quantize(128).save(f"{stem}-frames.png", optimize=True)
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows.values():
        if row["config"] and row["group"] != "schedule" and math.isfinite(row["psnr"]):
            series.setdefault(row["group"], []).append((row["sparse_density"], row["psnr"]))
    title = "Likeness to dense attention, by what the sparse steps compute"
    chart = line_chart(series, title=title, across="density of the sparse steps", upwards="PSNR in dB")
    chart.save(f"{stem}-psnr.png", optimize=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.page:
        images = f"{options.pictures.name}/{options.json.stem}"
        write_page(options.page, page_section(json.loads(options.json.read_text()), images), "adaspa")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="emoji-video")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--block", type=int, nargs=2, default=(64, 64), metavar=("QUERIES", "KEYS"))
    parser.add_argument("--reorder", default="none", choices=("none", "tile"))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--page", type=Path, help="page whose measured part is written anew")
    options = parser.parse_args()
    model = Model(options.model, options.steps, options.frames)
    asks = sample_asks(model.reference, options.prompts, seed=1)
    prompts = [clip_caption(model.reference.names[subject], motion, colour) for subject, motion, colour in asks]
    publish(measure(model, prompts, variants(tuple(options.block), options.reorder)), options)


if __name__ == "__main__":
    main()
