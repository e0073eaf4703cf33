"""Which method runs on which model, as the code has it: the table of docs/support.md.

`python -m attnswap.accel.support --write docs/support.md` writes the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from torch import nn

from .families import FAMILIES
from .families.base import Family
from .methods import CONFIGS, STRATEGIES
from .swap import inspect

# Those that are known, by method and model class.
PUBLISHED = {
    ("clear", "FluxTransformer2DModel"): ("Huage001/CLEAR (FLUX.1-dev)",),
    ("linfusion", "UNet2DConditionModel"): (
        "Yuanshi/LinFusion-1-5 (SD 1.5)",
        "Yuanshi/LinFusion-2-1 (SD 2.1)",
        "Yuanshi/LinFusion-XL (SDXL)",
    ),
}
COLUMNS = (
    "model class",
    "family",
    "method",
    "layers",
    "weights published for it",
    "settings for large pictures",
    "regional compile",
    "context parallel",
)
PAGE = """# What runs on what

Written by `python -m attnswap.accel.support --write docs/support.md` from the code itself; a test holds it to that.

{table}

- **layers**: attention layers the method accelerates, of those in the model class as Diffusers configures it by
  default. `attnswap inspect MODEL` lists those of a checkpoint, each with the reason.
- **weights published for it**: Hub ids known to hold weights of the method for a model of this class; they are not
  part of attnswap.
- **settings for large pictures**: those of the method for pictures larger than the model was trained for. The base
  stage of a `--route`, which has the native size, runs dense.
- **regional compile**: Diffusers names the blocks for `compile_repeated_blocks`. `torch.compile` of the whole model
  works with or without.
- **context parallel**: Diffusers has a plan by which `enable_parallelism` shares out the model's tokens. Without one,
  a model of which the tokens are split is refused.
"""


@dataclass(frozen=True)
class Row:
    """One method on one family, each cell as text."""

    model_class: str
    family: str
    method: str
    layers: str
    weights: str
    for_large: str
    regional_compile: str
    context_parallel: str


def rows() -> Iterator[Row]:
    """Every method on every family whose kind it takes."""
    for family in FAMILIES:
        model = skeleton(family)
        for method, strategy in sorted(STRATEGIES.items()):
            if family.kind in strategy.kinds:
                yield _row(family, method, model)


def skeleton(family: Family) -> nn.Module:
    """A model of the family in its default configuration, without memory."""
    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, family.model_class)()
    return model


def _row(family: Family, method: str, model: nn.Module) -> Row:
    seen = inspect(model, method)
    return Row(
        f"`{family.model_class}`",
        family.name,
        f"`{method}`",
        f"{seen.accelerated} of {len(seen.layers)}",
        ", ".join(PUBLISHED.get((method, family.model_class), ("none",))) if _takes_weights(method) else "needs none",
        ", ".join(f"`{name}`" for name in _for_large(family, method)) or "—",
        "yes" if getattr(model, "_repeated_blocks", None) else "no",
        "yes" if getattr(model, "_cp_plan", None) else "no",
    )


def _for_large(family: Family, method: str) -> list[str]:
    """The settings of a method for large pictures that can act on a family: those of positions need some to act on."""
    return [name for name in CONFIGS[method].for_large if family.rope is not None or not name.startswith("ntk_")]


def _takes_weights(method: str) -> bool:
    return any(setting.name == "weights" for setting in dataclasses.fields(CONFIGS[method]))  # type: ignore[arg-type]


def table() -> str:
    """The Markdown table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(dataclasses.astuple(row) for row in rows())]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def page() -> str:
    """The whole of docs/support.md."""
    return PAGE.format(table=table())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m attnswap.accel.support", description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the page there (default: show the table)")
    options = parser.parse_args(arguments)
    if options.write is None:
        print(table())
    else:
        options.write.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
