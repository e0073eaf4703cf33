"""`attnswap doctor`: versions, devices and backends."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="show versions, devices and which backends would run")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..pipelines import doctor

    print(doctor.screen())
    return 0
