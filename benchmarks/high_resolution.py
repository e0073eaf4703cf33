"""Does HiDiffusion help? A bundled emoji model above its native size, direct against each part and both.

    python -m attnswap.benchmarks.high_resolution --json benchmarks/results/high-resolution.json \
        --pictures docs/images --page docs/hidiffusion.md

Every prompt is drawn with the same seed by every variant in turn, so that a busy machine hits all alike. Accuracy is
the share of pictures, reduced to the native size, whose nearest neighbour among all subjects is the one asked for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..accel.methods.hidiffusion import HiDiffusion
from ..accel.swap import enabled
from ..pipelines import load, presets
from ..pipelines.emoji_reference import Reference, caption, judge, sample_captions
from .machine import versions

# Changes to the model's preset; None is stock.
VARIANTS: dict[str, dict[str, bool] | None] = {
    "direct": None,
    "windows only": {"raunet": False},
    "RAU only": {"window_attention": False},
    "HiDiffusion (both)": {},
}
SHOWN = 8
THUMBNAIL = 96


def measure(model_name: str, factors: list[int], prompts: int, steps: int | None) -> dict[str, Any]:
    """Draw every prompt at every size with every variant.

    Args:
        model_name: a bundled emoji model.
        factors: sides as multiples of the native one.
        prompts: how many captions, sampled with a fixed seed.
        steps: denoising steps; None takes the model's preset.
    """
    model = load.find(model_name)
    preset = presets.read(model.folder)
    reference = Reference.load(model.folder / "reference")
    pipe = load.load(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    asked = sample_captions(reference, prompts, seed=1)
    settings = {"num_inference_steps": steps or preset.steps, "guidance_scale": preset.guidance}
    sizes = {}
    for factor in factors:
        side = factor * reference.side
        seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        pictures: dict[str, list[np.ndarray]] = {name: [] for name in VARIANTS}
        for number, (subject, colour) in enumerate(asked):
            for name, parts in VARIANTS.items():
                config = None if parts is None else HiDiffusion(**preset.settings_of("hidiffusion", side, side) | parts)
                began = time.perf_counter()
                picture = _draw(pipe, config, caption(reference.names[subject], colour), side, number, settings)
                seconds[name].append(time.perf_counter() - began)
                pictures[name].append(picture)
            print(f"{side} px: {number + 1}/{prompts}", flush=True)
        sizes[side] = {
            name: {
                **vars(judge(np.stack([reduced(p, reference.side) for p in pictures[name]]), asked, reference)),
                "seconds": statistics.median(seconds[name]),
                "speed_up": statistics.median(
                    direct / own for direct, own in zip(seconds["direct"], seconds[name], strict=True)
                ),
                "pictures": pictures[name][:SHOWN],
            }
            for name in VARIANTS
        }
    return {
        "model": model_name,
        "native_side": reference.side,
        "prompts": prompts,
        "settings": settings,
        "presets": {
            factor * reference.side: preset.settings_of("hidiffusion", *[factor * reference.side] * 2)
            for factor in factors
        },
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "sizes": sizes,
    }


def _draw(
    pipe: Any, config: HiDiffusion | None, prompt: str, side: int, seed: int, settings: dict[str, Any]
) -> np.ndarray:
    arguments = {**settings, "height": side, "width": side, "generator": torch.Generator().manual_seed(seed)}
    if config is None:
        image: np.ndarray = pipe(prompt, output_type="np", **arguments).images[0]
    else:
        with enabled(pipe, config):
            image = pipe(prompt, output_type="np", **arguments).images[0]
    return image


def reduced(picture: np.ndarray, side: int) -> np.ndarray:
    """`picture` [H, W, 3] in 0..1 at `side` x `side`, each pixel the mean of those it covers."""
    image = Image.fromarray((picture * 255).round().astype(np.uint8)).resize((side, side), Image.Resampling.BOX)
    return np.asarray(image, np.float32) / 255


def contact_sheet(rows: dict[str, dict[str, Any]]) -> Image.Image:
    """One row a variant, one column a prompt."""
    thumbnails = [[reduced(picture, THUMBNAIL) for picture in row.pop("pictures")] for row in rows.values()]
    whole = np.concatenate([np.concatenate(row, axis=1) for row in thumbnails], axis=0)
    # A palette keeps the page's pictures small.
    return Image.fromarray((whole * 255).round().astype(np.uint8)).quantize(128)


def page_section(result: dict[str, Any], images: str) -> str:
    """The measured part of docs/hidiffusion.md."""
    settings = result["settings"]
    lines = [
        f"`{result['model']}` (native {result['native_side']} px), {result['prompts']} prompts, "
        f"{settings['num_inference_steps']} steps, guidance {settings['guidance_scale']:g}, CPU, "
        f"threads {result['threads']}, torch {result['versions']['torch']}. "
        "Times are medians per picture; the speed-up is the median of "
        "the ratios to direct generation of the same prompt.",
    ]
    for side, rows in result["sizes"].items():
        lines += [
            "",
            f"### {side} px, {int(side) // result['native_side']}x the native side",
            "",
            f"The model's preset for this size: `{json.dumps(result['presets'][side])}`.",
            "",
            "| | nearest neighbour right | in the first five | background right | seconds | speed-up |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {row['nearest']:.0%} | {row['nearest_of_five']:.0%} | {row['colour']:.0%} | "
            f"{row['seconds']:.1f} | {row['speed_up']:.2f}x |"
            for name, row in rows.items()
        ]
        lines += ["", f"Rows as in the table, the first {SHOWN} prompts:", "", f"![{side} px]({images}-{side}.png)"]
    return "\n".join(lines)


def write_page(page: Path, section: str, name: str) -> None:
    """Put the section between the page's two marks of this name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    page.write_text(f"{head}{begin}\n{section}\n{end}{tail}", encoding="utf-8")


def add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True, help="folder for the contact sheets")
    parser.add_argument("--page", type=Path, help="page whose measured part is written anew")


def publish(
    result: dict[str, Any], arguments: argparse.Namespace, section: Callable[[dict[str, Any], str], str], name: str
) -> None:
    """Write what `add_outputs` asks for: contact sheets, JSON, and the part of a page between the marks `name`."""
    arguments.pictures.mkdir(parents=True, exist_ok=True)
    for side, rows in result["sizes"].items():
        contact_sheet(rows).save(arguments.pictures / f"{arguments.json.stem}-{side}.png", optimize=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.page:
        relative = f"{arguments.pictures.name}/{arguments.json.stem}"
        write_page(arguments.page, section(json.loads(arguments.json.read_text()), relative), name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji-sd")
    parser.add_argument("--factors", type=int, nargs="+", default=[2, 4], help="sides, as multiples of the native one")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--steps", type=int)
    add_outputs(parser)
    arguments = parser.parse_args()
    result = measure(arguments.model, arguments.factors, arguments.prompts, arguments.steps)
    publish(result, arguments, page_section, "measured")


if __name__ == "__main__":
    main()
