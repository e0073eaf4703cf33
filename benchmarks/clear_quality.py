"""What does CLEAR keep, and cost? A bundled emoji DiT at its native size against dense attention, and above it.

    python -m attnswap.benchmarks.clear_quality --json benchmarks/results/clear-quality.json \
        --pictures docs/images --page docs/clear.md
    python -m attnswap.benchmarks.clear_quality --local radius=4 weights=FOLDER --pooled radius=2 down_factor=4 …

Every prompt is drawn with the same seed by every variant in turn, so that a busy machine hits all alike. Accuracy is
the share of pictures, reduced to the native size, whose nearest neighbour among all subjects is the one asked for. At
the native size all pictures are also compared with dense attention's, by PSNR and SSIM.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..accel.errors import AttnswapWarning, WeightsError
from ..accel.methods.clear import Clear
from ..accel.swap import enabled
from ..pipelines import load, presets, settings
from ..pipelines.emoji_reference import Reference, caption, judge, psnr, sample_captions
from ..pipelines.generate import generate
from ..pipelines.job import Job
from ..training.distill_evaluate import ssim
from .high_resolution import SHOWN, add_outputs, publish, reduced
from .machine import versions
from .models import Size, pipeline_arguments
from .table import density_text

DENSE = "dense"
DOWN_FACTOR = 4
# As published for pictures above the native size.
NTK_FACTOR = 10.0
Settings = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """`settings` of `Clear`; None is dense attention."""

    name: str
    settings: Settings | None = None
    route: str = "direct"


@dataclass
class Drawn:
    """What a variant has drawn so far."""

    pictures: list[np.ndarray] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    density: float = 1.0


def native_variants(local: Settings, pooled: Settings) -> list[Variant]:
    return [
        Variant(DENSE),
        Variant("clear, no weights", local | {"weights": None}),
        Variant("clear, distilled", local),
        Variant("pooled, no weights", pooled | {"weights": None}),
        Variant("pooled, distilled", pooled),
    ]


def large_variants(local: Settings, ntk_factor: float) -> list[Variant]:
    plain: Settings = {**local, **Clear.for_large}
    ntk = {"ntk_factor": ntk_factor}
    return [
        Variant(DENSE),
        Variant("clear", plain),
        Variant(f"clear, ntk {ntk_factor:g}", plain | ntk),
        Variant(f"clear, ntk {ntk_factor:g} decaying", plain | ntk | {"ntk_decay": True}),
        Variant("clear, proportional", plain | {"proportional_attention": True}),
        Variant(f"clear, ntk {ntk_factor:g}, proportional", plain | ntk | {"proportional_attention": True}),
        Variant("ladder", None, "ladder"),
        Variant("ladder, clear", plain, "ladder"),
    ]


class Model:
    """A bundled emoji model that draws for variants."""

    def __init__(self, name: str, steps: int | None = None) -> None:
        self.name, found = name, load.find(name)
        self.preset = presets.read(found.folder)
        self.reference = Reference.load(found.folder / "reference")
        self.pipe = load.load(found, dtype=torch.float32)
        self.pipe.set_progress_bar_config(disable=True)
        self.steps = steps or self.preset.steps or 1

    def refusals(self, variants: Sequence[Variant]) -> dict[str, str]:
        """The variants whose weights are not there, with the reason."""
        found = {}
        for variant in variants:
            if variant.settings is not None:
                try:
                    with enabled(self.pipe, Clear(**variant.settings)):
                        pass
                except WeightsError as error:
                    found[variant.name] = str(error)
        return found

    def draw(self, variant: Variant, prompt: str, side: int, seed: int, into: Drawn) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AttnswapWarning)  # that a picture may be poor is what is measured
            by_route = self._by_route if variant.route != "direct" else self._direct
            by_route(variant, prompt, side, seed, into)

    def _direct(self, variant: Variant, prompt: str, side: int, seed: int, into: Drawn) -> None:
        arguments = pipeline_arguments(self.pipe, self.preset, Size("", side, side), self.steps) | {"prompt": prompt}
        generator = torch.Generator().manual_seed(seed)
        with ExitStack() as stack:
            clear = None if variant.settings is None else Clear(**variant.settings)
            handle = stack.enter_context(enabled(self.pipe, clear)) if clear else None
            began = time.perf_counter()
            into.pictures.append(self.pipe(**arguments, generator=generator, output_type="np").images[0])
            into.seconds.append(time.perf_counter() - began)
            if handle:
                into.density = handle.report().density

    def _by_route(self, variant: Variant, prompt: str, side: int, seed: int, into: Drawn) -> None:
        methods = {} if variant.settings is None else {Clear.name: variant.settings}
        with tempfile.TemporaryDirectory() as folder:
            job = Job(
                prompt,
                Path(folder, "picture.png"),
                self.name,
                width=side,
                height=side,
                steps=self.steps,
                route=variant.route,
                seed=seed,
                methods=methods,
                device="cpu",
            )
            result = generate(job)
        into.pictures.append(np.asarray(result.image.convert("RGB"), np.float32) / 255)
        into.seconds.append(result.seconds)
        if result.report:
            into.density = result.report.density


def measure(
    model: Model, variants: dict[int, list[Variant]], prompts: dict[int, int], *, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Draw every prompt at every size with every variant.

    Args:
        variants: by the multiple of the native side.
        prompts: how many captions, sampled with a fixed seed, by the same.
        say: is told how far it is.
    """
    reference = model.reference
    sizes, left_out = {}, {}
    for factor, wanted in variants.items():
        side = factor * reference.side
        refused = model.refusals(wanted)
        chosen = [variant for variant in wanted if variant.name not in refused]
        drawn = {variant.name: Drawn() for variant in chosen}
        asked = sample_captions(reference, prompts[factor], seed=1)
        for number, (subject, colour) in enumerate(asked):
            for variant in chosen:
                model.draw(variant, caption(reference.names[subject], colour), side, number, drawn[variant.name])
            say(f"{side} px: {number + 1}/{len(asked)}")
        sizes[side] = {
            variant.name: _summary(drawn[variant.name], drawn[DENSE], asked, reference, native=factor == 1)
            | {"settings": variant.settings}
            for variant in chosen
        }
        if refused:
            left_out[side] = refused
    return {
        "model": model.name,
        "native_side": reference.side,
        "steps": model.steps,
        "guidance": model.preset.guidance,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "left_out": left_out,
        "sizes": sizes,
    }


def _summary(
    drawn: Drawn, dense: Drawn, asked: list[tuple[int, str | None]], reference: Reference, *, native: bool
) -> dict[str, Any]:
    small = np.stack([reduced(picture, reference.side) for picture in drawn.pictures])
    shares = [own / other for own, other in zip(drawn.seconds, dense.seconds, strict=True)]
    likeness: dict[str, float] = {}
    if native and drawn is not dense:
        likeness = {
            "psnr": psnr(np.stack(drawn.pictures), np.stack(dense.pictures)),
            "ssim": ssim(np.stack(drawn.pictures), np.stack(dense.pictures)),
        }
    return {
        **vars(judge(small, asked, reference)),
        **likeness,
        "density": drawn.density,
        "seconds": statistics.median(drawn.seconds),
        "of_dense": statistics.median(shares),
        "pictures": drawn.pictures[:SHOWN],
    }


def page_section(result: dict[str, Any], images: str) -> str:
    """The measured part of docs/clear.md: a table and a picture a size."""
    lines = [
        f"`{result['model']}` (native {result['native_side']} px), {result['steps']} steps, guidance "
        f"{result['guidance']:g}, CPU, threads {result['threads']}, torch {result['versions']['torch']}. Every variant "
        "drew the same prompts with the same seeds. Seconds are medians per picture without loading; the share of "
        "dense is the median of the ratios for the same prompt. Density is the share of dense attention's query-key "
        "pairs that was computed. PSNR and SSIM are against dense attention's pictures. "
        f"*clear* is `{_in_words(result['local'])}`, *pooled* is `{_in_words(result['pooled'])}`; without weights they "
        "are the model's own.",
    ]
    for side, rows in result["sizes"].items():
        factor = int(side) // result["native_side"]
        native = factor == 1
        count = next(iter(rows.values()))["count"]
        title = "the native size" if native else f"{factor}x the native side"
        columns = ["", "nearest neighbour right", "background right", *["PSNR", "SSIM"] * native]
        columns += ["density", "seconds", "of dense"]
        lines += ["", f"### {side} px, {title}, prompts: {count}", "", _row(columns), _row(["---"] * len(columns))]
        lines += [_row([name, *_cells(row, native)]) for name, row in rows.items()]
        if missing := result["left_out"].get(side):
            lines += ["", *(f"- {name}: left out, {reason}" for name, reason in missing.items())]
        shown = f"Rows as in the table, prompts shown: {min(SHOWN, count)}."
        lines += ["", shown, "", f"![{side} px]({images}-{side}.png)"]
    return "\n".join(lines)


def _cells(row: dict[str, Any], native: bool) -> list[str]:
    alike = [f"{row['psnr']:.1f} dB", f"{row['ssim']:.3f}"] if "psnr" in row else ["–", "–"] * native
    return [
        f"{row['nearest']:.0%}",
        f"{row['colour']:.0%}",
        *alike,
        density_text(row["density"]),
        f"{row['seconds']:.1f}",
        f"{row['of_dense']:.2f}",
    ]


def _in_words(values: Settings) -> str:
    """Those that differ from the method's own."""
    config = Clear(**values).to_dict()
    default = Clear().to_dict()
    return ", ".join(f"{name}={value}" for name, value in config.items() if value != default[name]) or "its own"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="emoji-flux")
    parser.add_argument("--local", nargs="+", default=[], metavar="KEY=VALUE", help="settings other than the model's")
    parser.add_argument(
        "--pooled", nargs="+", default=[], metavar="KEY=VALUE", help="the same for the pooled far field"
    )
    parser.add_argument("--ntk-factor", type=float, default=NTK_FACTOR)
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 2, 4], help="multiples of the native side")
    parser.add_argument("--prompts", type=int, nargs="+", default=[24, 4, 3], help="for each of the factors")
    parser.add_argument("--steps", type=int)
    add_outputs(parser)
    options = parser.parse_args()
    if len(options.factors) != len(options.prompts):
        parser.error(f"{len(options.factors)} factors and {len(options.prompts)} numbers of prompts")
    model = Model(options.model, options.steps)
    own = {"weights": options.model, **model.preset.settings_of(Clear.name)}
    local, pooled = (
        defaults | settings.parse([Clear.name], given)[Clear.name]
        for defaults, given in (
            (own | {"down_factor": None}, options.local),
            ({**own, "down_factor": own.get("down_factor") or DOWN_FACTOR}, options.pooled),
        )
    )
    variants = {
        factor: native_variants(local, pooled) if factor == 1 else large_variants(local, options.ntk_factor)
        for factor in options.factors
    }
    result = measure(model, variants, dict(zip(options.factors, options.prompts, strict=True)))
    result |= {"local": local, "pooled": pooled}
    publish(result, options, page_section, "clear")


if __name__ == "__main__":
    main()
