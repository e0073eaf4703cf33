"""`attnswap distill METHOD`: training the weights of a method, one module a method."""

from __future__ import annotations

from typing import Any

from . import distill_clear, distill_linfusion

# Each adds its own parser; another method is another module here.
METHODS = (distill_linfusion, distill_clear)


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "distill",
        help="train the weights of a method for a model of yours",
        description="Train the weights of a method for a model, by the model's own example. The model stays as it is.",
        epilog="Each has its own options: attnswap distill METHOD --help",
    )
    methods = parser.add_subparsers(title="methods", metavar="METHOD", required=True)
    for method in METHODS:
        method.add(methods)
