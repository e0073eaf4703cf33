"""What things are called in a pipeline folder and on the Hub."""

from __future__ import annotations

import re

DENOISERS = ("unet", "transformer", "transformer_2")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
