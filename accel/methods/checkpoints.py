"""Checkpoint files: found on disk, on the Hub or among the bundled models, read safely and written whole."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import WeightsError

BUNDLED = Path(__file__).parents[2] / "pipelines" / "bundled"


@dataclass(frozen=True)
class Opened:
    """An open safetensors file.

    Attributes:
        shapes: of its tensors, by key, known before any is read.
        metadata: as it was saved with.
    """

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    _file: safe_open

    def read(self, key: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(key)
        return tensor


@contextmanager
def opened(file: Path) -> Iterator[Opened]:
    """A checkpoint to look at and read.

    Raises:
        WeightsError: it is no whole safetensors file, or holds a tensor that is not of floating point.
    """
    try:
        with safe_open(file, "pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
            for key, part in slices.items():
                if not part.get_dtype().startswith(("F", "BF")):
                    raise WeightsError(f"{file}: expected floating point in {key}, found {part.get_dtype()}")
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            yield Opened(shapes, tensors.metadata() or {}, tensors)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} is not a whole safetensors file: {first_line(error)}") from error


def on_disk(weights: str) -> Path:
    """The file or folder a name stands for on this machine, whether or not it is there.

    Raises:
        WeightsError: a file that is there is not of safetensors.
    """
    path = Path(os.path.expanduser(weights))
    if path.is_file() and path.suffix != ".safetensors":
        raise WeightsError(f"{path} is not a .safetensors file; nothing else is read, as pickles can run code")
    return path


def from_hub(name: str, method: str, patterns: Sequence[str], bundled: Iterable[str]) -> Path:
    """The folder with the files of a Hub repository that match, downloaded where they are not on this machine.

    Args:
        name: the Hub id.
        method: whose weights these are, for an error.
        patterns: of file names.
        bundled: names that would have been found without the Hub, for an error.

    Raises:
        WeightsError: no such repository, or not to be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if name.count("/") != 1 or os.path.isabs(name) or name.startswith("."):
        known = ", ".join(bundled) or "none"
        raise WeightsError(f"no {method} weights {name!r}: no such file or folder, nor bundled ({known})")
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise WeightsError(
            f"{method} weights {name} are not on this machine and not to be had: {first_line(error)}"
        ) from error


def in_cache(name: str, file: str) -> Path | None:
    """A file of a Hub repository where an earlier download has left it on this machine; never a request."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file)
    except HFValidationError:  # no name that the Hub could have
        return None
    return Path(found) if isinstance(found, str) else None


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` when the block ends well."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def dims(shape: Sequence[int] | None) -> str:
    """A shape in an error; None for a tensor that is not there."""
    return "nothing" if shape is None else "[" + ", ".join(map(str, shape)) + "]"


def listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
