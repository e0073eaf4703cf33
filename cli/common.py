"""What the commands share: how wrong use, names, numbers and progress look."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..pipelines.printable import printable_lines

# Said here, as asking the packages for them would load torch before --help answers.
MODELS = "emoji-flux, emoji-sd, emoji-video, a folder or a Hub id"
METHODS = "adaspa, clear, hidiffusion, linfusion"


def split_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are not numbers separated by commas") from None


def quieten(progress: bool) -> None:
    """Libraries keep to warnings about this job, and draw bars only where somebody is looking."""
    import diffusers.utils.logging
    import transformers.utils.logging

    transformers.utils.logging.set_verbosity_error()  # its advice on optional packages is not for our users
    if not progress:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


@contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """Our own warnings look like the rest of what the command says; those of libraries show where they come from."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def showwarning(message: Any, category: type[Warning], *where: Any) -> None:
            from ..accel.errors import AttnswapWarning

            if issubclass(category, AttnswapWarning):
                print(printable_lines(str(message)), file=sys.stderr)
            else:
                show(message, category, *where)

        warnings.showwarning = showwarning  # type: ignore[assignment]
        yield


def fail(message: str, status: int) -> int:
    """Says why, and is `status`. Names in `message` may come from a file that anybody has written."""
    print(f"attnswap: {printable_lines(message)}", file=sys.stderr)
    return status


class Parser(argparse.ArgumentParser):
    """Wrong use is one line, not the whole usage."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class Listing(argparse.RawDescriptionHelpFormatter):
    """For a help with a list in it, which must stay one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


class Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from .. import __version__

        print(f"attnswap {__version__}")
        parser.exit()
