"""What do the high-resolution routes give, and cost? A bundled emoji model, every route and the direct way.

    python -m attnswap.benchmarks.routes --json benchmarks/results/routes.json \
        --pictures docs/images --page docs/linfusion.md
    python -m attnswap.benchmarks.routes --variants ladder+hidiffusion --factors 8 --prompts 2 \
        --json routes-8.json --pictures .

A variant is a route, or a route and a method such as `ladder+hidiffusion`. Every prompt is drawn with the same seed by
every variant in turn, so that a busy machine hits all alike. Accuracy is the share of pictures, reduced to the native
size, whose nearest neighbour among all subjects is the one asked for. The first prompt runs in a process of its own,
whose largest resident memory is given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..pipelines import load, presets
from ..pipelines.emoji_reference import Reference, caption, judge, sample_captions
from ..pipelines.generate import generate
from ..pipelines.job import Job
from .high_resolution import SHOWN, add_outputs, publish, reduced
from .machine import versions

VARIANTS = ("direct", "direct+hidiffusion", "ladder", "superres", "superres-ladder")


def measure(model: str, factors: list[int], prompts: int, variants: list[str]) -> dict[str, Any]:
    """Draw every prompt at every size with every variant.

    Args:
        model: a bundled emoji model.
        factors: sides as multiples of the native one.
        prompts: how many captions, sampled with a fixed seed.
        variants: `route` or `route+method`.
    """
    folder = load.find(model).folder
    reference = Reference.load(folder / "reference")
    asked = sample_captions(reference, prompts, seed=1)
    sizes = {}
    for factor in factors:
        side = factor * reference.side
        drawn: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
        for number, (subject, colour) in enumerate(asked):
            for name in variants:
                prompt = caption(reference.names[subject], colour)
                drawn[name].append(_draw(model, name, prompt, side, number, apart=number == 0))
            print(f"{side} px: {number + 1}/{prompts}", flush=True)
        sizes[side] = {name: _summary(drawn[name], drawn[variants[0]], asked, reference) for name in variants}
    preset = presets.read(folder)
    return {
        "model": model,
        "native_side": reference.side,
        "prompts": prompts,
        "steps": preset.steps,
        "guidance": preset.guidance,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "sizes": sizes,
    }


def _draw(model: str, variant: str, prompt: str, side: int, seed: int, *, apart: bool) -> dict[str, Any]:
    """Picture, seconds and strengths; the peak memory too where it is drawn `apart`, in a process of its own."""
    route, _, method = variant.partition("+")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "picture.png")
        if apart:
            command = [sys.executable, "-m", "attnswap.cli", "generate", prompt, "--model", model, "--report", "-"]
            command += ["--width", str(side), "--height", str(side), "--route", route, "--seed", str(seed)]
            command += ["--device", "cpu", "--output", str(output), *(["--method", method] if method else [])]
            done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            seconds, strengths, peak = done["seconds"], done["job"]["strengths"], done["peak_bytes"]
        else:
            methods: dict[str, dict[str, Any]] = {method: {}} if method else {}
            job = Job(prompt, output, model, width=side, height=side, route=route, seed=seed, methods=methods)
            result = generate(job)
            seconds, strengths, peak = result.seconds, list(result.job.strengths or ()), None
        with Image.open(output) as image:
            picture = np.asarray(image.convert("RGB"), np.float32) / 255
    return {"picture": picture, "seconds": seconds, "strengths": strengths, "peak_bytes": peak}


def _summary(
    drawn: list[dict[str, Any]], first: list[dict[str, Any]], asked: list[Any], reference: Reference
) -> dict[str, Any]:
    pictures = [one["picture"] for one in drawn]
    return {
        **vars(judge(np.stack([reduced(picture, reference.side) for picture in pictures]), asked, reference)),
        "seconds": statistics.median(one["seconds"] for one in drawn),
        "share_of_first": statistics.median(
            one["seconds"] / other["seconds"] for one, other in zip(drawn, first, strict=True)
        ),
        "peak_bytes": drawn[0]["peak_bytes"],
        "strengths": drawn[0]["strengths"],
        "pictures": pictures[:SHOWN],
    }


def page_section(result: dict[str, Any], images: str) -> str:
    """The measured part of a page: a table and a picture a size."""
    lines = [
        f"`{result['model']}` (native {result['native_side']} px), {result['prompts']} prompts, {result['steps']} "
        f"steps, guidance {result['guidance']:g}, CPU, threads {result['threads']}, "
        f"torch {result['versions']['torch']}. Times are medians per picture without loading; the share is the median "
        "of the ratios for the same prompt.",
    ]
    for side, rows in result["sizes"].items():
        first = next(iter(rows))
        lines += [
            "",
            f"### {side} px, {(int(side) // result['native_side']) ** 2}x the native area",
            "",
            f"| | strengths | nearest neighbour right | background right | seconds | of {first} | peak memory |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {', '.join(f'{value:.2g}' for value in row['strengths'] or ())} | {row['nearest']:.0%} | "
            f"{row['colour']:.0%} | {row['seconds']:.1f} | {row['share_of_first']:.2f} | "
            f"{row['peak_bytes'] / 2**20:.0f} MiB |"
            for name, row in rows.items()
        ]
        lines += ["", f"Rows as in the table, the first {SHOWN} prompts:", "", f"![{side} px]({images}-{side}.png)"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji-sd")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="ROUTE[+METHOD]")
    parser.add_argument("--factors", type=int, nargs="+", default=[2, 4], help="sides, as multiples of the native one")
    parser.add_argument("--prompts", type=int, default=12)
    add_outputs(parser)
    arguments = parser.parse_args()
    result = measure(arguments.model, arguments.factors, arguments.prompts, arguments.variants)
    publish(result, arguments, page_section, "routes")


if __name__ == "__main__":
    main()
