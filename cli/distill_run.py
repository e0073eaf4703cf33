"""What every `attnswap distill METHOD` does once its arguments are read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .common import quieten

if TYPE_CHECKING:
    from ..training.distill_settings import Settings


def train(kind: type[Settings], options: argparse.Namespace) -> int:
    """Distil with the settings of this kind that were given, and write the report."""
    from ..training.distill import distill
    from ..training.distill_report import write_report

    given = {
        name: value for name, value in vars(options).items() if name not in ("run", "arguments") and value is not None
    }
    progress = sys.stderr.isatty()
    quieten(progress)
    finished = distill(
        kind(**{**given, "output": Path(options.output)}),
        progress=progress,
        say=lambda text: print(f"attnswap: {text}", file=sys.stderr, flush=True),
    )
    if finished is None:  # not the first of several processes
        return 0
    report = write_report(finished)
    psnr = f", {report['psnr_to_teacher']} dB to the teacher's pictures" if "psnr_to_teacher" in report else ""
    print(f"{options.output}: {report['steps']} steps, {report['pictures']} pictures, {report['seconds']:.0f} s{psnr}")
    return 0
