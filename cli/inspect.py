"""`attnswap inspect`: what attention costs in a model, and what a method would do about it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .common import METHODS, MODELS, quieten, split_names

if TYPE_CHECKING:
    from ..pipelines.attention_cost import Cost
    from ..pipelines.inspection import ModelInspection

_UNITS = ((1e15, "quadrillion"), (1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand"))


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show what attention costs at a size, and what each method or auto would do",
        description="A dry run that reads no weights: what self-attention costs, what each method would leave of it, "
        "what auto would choose and why, and which layers (+) each method takes, with the settings of the model's "
        "preset.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODELS)
    parser.add_argument("--method", metavar="NAME[,NAME]", help=f"auto, or of {METHODS} (default: all)")
    parser.add_argument("--width", type=int, metavar="PX", help="default: the native size")
    parser.add_argument("--height", type=int, metavar="PX")
    parser.add_argument("--frames", type=int, metavar="N", help="of a clip")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    parser.add_argument("--device", default="auto", help="to choose for (default: the accelerator, else the CPU)")
    parser.add_argument("--layers", action="store_true", help="list every attention layer, as --method does")
    parser.add_argument("--json", action="store_true", help="all of it as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from .. import methods
    from ..pipelines import inspection, load, presets, settings

    names = split_names(options.method) if options.method is not None else list(methods())
    settings.parse(names, [])
    quieten(sys.stderr.isatty())
    model = load.find(options.model, weights=False)
    found = inspection.inspect_model(
        model,
        presets.read(model.folder),
        names,
        load.pick_device(options.device),
        width=options.width,
        height=options.height,
        frames=options.frames,
        steps=options.steps,
    )
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print("\n".join(_text(found, all_layers=options.layers or options.method is not None)))
    return 0


def _text(found: ModelInspection, *, all_layers: bool) -> Iterator[str]:
    if found.cost is None:
        yield f"{found.model.name}: what attention costs cannot be told: {found.why_no_cost}"
    else:
        yield from _cost(found.model.name, found.cost)
    if found.auto is not None:
        yield found.auto.why
    yield ""
    for part, inspection in found.layers:
        lines = str(inspection).splitlines()
        yield f"{part}: {lines[0]}"
        yield from lines[1:] if all_layers else lines[1 : 1 + len(inspection.remarks)]
    for refusal in found.refusals:
        reason = refusal.reason if all_layers else refusal.reason.partition(";")[0]
        yield f"{refusal.part}: {refusal.method}: does not apply. {reason}"
    if not all_layers:
        yield "--layers lists every attention layer, taken (+) or not (-), and why."


def _cost(model: str, cost: Cost) -> Iterator[str]:
    frames = "" if cost.frames is None else f", {cost.frames} frames"
    grid = "x".join(map(str, cost.grid))
    beside = cost.tokens - math.prod(cost.grid)
    yield f"{model} at {cost.width}x{cost.height} px{frames}, {cost.steps} steps:"
    yield (
        f"self-attention in {cost.layers} layers, over up to {cost.tokens:,} tokens ({grid}"
        f"{f' and {beside} of text' if beside else ''}), for one of a batch"
    )
    yield ""
    width = max(len("dense"), *(len(method.name) for method in cost.methods)) if cost.methods else len("dense")
    yield f"  {'':{width}}  query-key pairs a call  of dense  in the last step  a call faster, at most"
    rows: list[tuple[str, float, float, float, float | None]] = [("dense", cost.pairs, 1.0, 1.0, 1.0)]
    rows += [(method.name, method.pairs, method.share, method.last_share, method.most) for method in cost.methods]
    for name, pairs, share, last, most in rows:
        faster = "unknown" if most is None else f"{most:.2f}x"
        yield f"  {name:{width}}  {_number(pairs):>22}  {share:>8.1%}  {last:>16.1%}  {faster:>22}"
    for method in cost.methods:
        yield from (f"  {method.name}: {note}" for note in method.notes)
    yield ""
    if cost.all_operations is None or cost.attention_share is None:
        yield "What the rest of a call costs cannot be told without its data."
    else:
        yield (
            f"Dense, this is {cost.attention_share:.0%} of the {_number(cost.all_operations)} operations of a call: "
            f"{1 / (1 - cost.attention_share):.1f}x faster without any of it."
        )


def _number(value: float) -> str:
    for size, word in _UNITS:
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:.0f}"
