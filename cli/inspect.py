"""`attnswap inspect`: which attention layers a method would accelerate."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .common import METHODS, MODELS, quieten, split_names


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show which attention layers a method would accelerate",
        description="A dry run: every attention layer, accelerated (+) or not (-), and why, "
        "with the settings of the model's preset. Reads no weights.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODELS)
    parser.add_argument("--method", metavar="NAME[,NAME]", help=f"{METHODS} (default: all)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from .. import inspect, methods
    from ..accel.errors import UnsupportedModel
    from ..pipelines import load, presets, settings, skeleton

    names = split_names(options.method) if options.method is not None else list(methods())
    settings.parse(names, [])
    quieten(sys.stderr.isatty())
    model = load.find(options.model, weights=False)
    preset = presets.read(model.folder)
    configs = settings.build({name: preset.settings_of(name) for name in names})
    denoisers = skeleton.skeletons(model)
    applicable = 0
    for part, denoiser in denoisers.items():
        for config in configs:
            try:
                text = str(inspect(denoiser, config))
                applicable += 1
            except UnsupportedModel as error:
                text = f"{config.name}: does not apply. {error}"
            print(f"{part}: {text}")
    if not applicable:
        raise UnsupportedModel(f"no method applies to {model.name} ({', '.join(model.denoisers.values())}).")
    return 0
