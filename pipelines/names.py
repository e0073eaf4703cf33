"""What things are called: in a pipeline folder, on the Hub and on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import BadInput
from .printable import printable

DENOISERS = ("unet", "transformer", "transformer_2")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Of a name that is too long to be one.
SHOWN = 100


def expanded(name: str | Path) -> Path:
    """The path that `name` stands for, whether or not anything is there; "~" is the home folder.

    Raises:
        BadInput: nothing could be there: nobody's home folder, or too long.
    """
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (RuntimeError, OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"{printable(str(name), SHOWN)} cannot be looked up: {why}") from error
    return path
