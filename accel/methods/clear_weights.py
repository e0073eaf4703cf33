"""CLEAR checkpoints in the published layout: found, checked against a transformer layer by layer, read and written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..errors import WeightsError
from .checkpoints import BUNDLED, dims, from_hub, in_cache, listing, on_disk, opened, whole
from .clear_layer import POOLING, PROJECTIONS
from .replacement import base_layer, own_tensors

_FILE_NAME = re.compile(r"clear_local_(?P<radius>\d+(?:\.\d+)?)(?:_down_\d+)?\.safetensors")
Shapes = dict[str, tuple[int, ...]]
#: For FLUX.1-dev.
_PUBLISHED = "Huage001/CLEAR"
_PUBLISHED_RADII = (16, 32, 8)


def file_name(radius: float, down_factor: int | None = None) -> str:
    """As the published files are called: clear_local_16.safetensors, clear_local_8_down_4.safetensors."""
    return f"clear_local_{radius:g}" + ("" if down_factor is None else f"_down_{down_factor}") + ".safetensors"


def shapes_of(attn: Any, layer: str = "the layer") -> Shapes:
    """The shape of each projection in a layer that a checkpoint replaces, by its published name.

    Raises:
        WeightsError: for a layer that projects otherwise.
    """
    shapes: Shapes = {}
    for name in PROJECTIONS:
        path, _, index = name.partition(".")
        found = getattr(attn, path, None)
        if found is None:
            if path == "to_out":
                continue
            raise WeightsError(
                f"CLEAR weights replace to_q, to_k and to_v: {layer}, of {type(attn).__name__}, has no {path}; "
                "without weights clear works there"
            )
        projection = base_layer(found[int(index)] if index else found)
        # Quantised weights have a shape of their own.
        shapes[f"{name}.weight"] = (projection.out_features, projection.in_features)
        if projection.bias is not None:
            shapes[f"{name}.bias"] = (projection.out_features,)
    return shapes


def from_stock(attn: Any, down_factor: int | None = None) -> dict[str, Tensor]:
    """Where distillation starts: a layer's own projections, and cells that are pooled to their mean.

    Args:
        attn: an attention layer of Diffusers.
        down_factor: side of the cells, None for no far field.

    Raises:
        WeightsError: for projections that are quantised, have an adapter fused into them, or are not to_q, to_k, to_v.
    """
    tensors = own_tensors(attn, shapes_of(attn))
    if down_factor is not None:
        tensors[POOLING] = tensors["to_q.weight"].new_full(_pooling_shape(down_factor), down_factor**-2)
    return tensors


def is_here(weights: str, radius: float, down_factor: int | None) -> bool:
    """Whether `locate` finds them without a request."""
    if weights in _bundled() or on_disk(weights).exists():
        return True
    return in_cache(weights, file_name(radius, down_factor)) is not None


def automatic(attention: Mapping[str, Any], *, is_flux_dev: bool) -> tuple[str, float] | None:
    """Weights on this machine that were trained for a model with these layers, and for which radius.

    Bundled ones are known by the shapes of all their tensors, as no other model has them. Those of FLUX.1-dev would fit
    FLUX.1-schnell, too: so one must say which it is.
    """
    try:
        expected = shapes_by_layer(attention)
    except WeightsError:
        return None
    files = [(name, file) for name, folder in _bundled().items() for file in sorted(folder.glob("*.safetensors"))]
    if is_flux_dev:
        published = (in_cache(_PUBLISHED, file_name(radius)) for radius in _PUBLISHED_RADII)
        files += [(_PUBLISHED, file) for file in published if file is not None]
    for name, file in files:
        with opened(file) as checkpoint:
            fits = checkpoint.shapes == _flat(expected)
        if fits and (radius := trained_radius(file)) is not None:
            return name, radius
    return None


def locate(weights: str, radius: float, down_factor: int | None) -> Path:
    """The safetensors file that `Clear.weights` stands for with these settings.

    Raises:
        WeightsError: there is none, or it is not to be had.
    """
    name = file_name(radius, down_factor)
    bundled = _bundled()
    if weights in bundled:
        return _in_folder(bundled[weights], name)
    path = on_disk(weights)
    if path.is_file():
        return path
    if path.is_dir():
        return _in_folder(path, name)
    # By name alone: the published repository has a file of 3.6 GB for each radius.
    file = from_hub(weights, "CLEAR", [name], bundled) / name
    if not file.is_file():
        raise WeightsError(
            f"CLEAR weights {weights} have no {name}: choose a radius and down_factor that were published, or give "
            "a file as weights"
        )
    return file


def shapes_by_layer(attention: Mapping[str, Any], down_factor: int | None = None) -> dict[str, Shapes]:
    """The tensors a checkpoint must have for layers, by their dotted names and then by published ones.

    Raises:
        WeightsError: for a layer that checkpoints of this layout cannot describe.
    """
    pooling = {} if down_factor is None else {POOLING: _pooling_shape(down_factor)}
    return {name: {**shapes_of(attn, name), **pooling} for name, attn in attention.items()}


def read(file: Path, expected: Mapping[str, Shapes], model: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer by their published names.

    Args:
        file: a safetensors file.
        expected: what it must have, no more and no less.
        model: what to call the transformer it is for in an error.

    Raises:
        WeightsError: the file cannot be read, or does not fit, with what was expected and what was found.
    """
    with opened(file) as checkpoint:  # what does not fit is said before gigabytes are read
        _check(file, checkpoint.shapes, expected, model)
        return {
            layer: {name: checkpoint.read(f"{layer}.{name}") for name in shapes} for layer, shapes in expected.items()
        }


def trained_radius(file: Path) -> float | None:
    """The radius a file was trained for, where it says so itself or its name does."""
    with opened(file) as checkpoint:
        said = checkpoint.metadata.get("radius")
    named = _FILE_NAME.fullmatch(file.name)
    said = said or (named and named["radius"])
    try:
        return float(said) if said else None
    except ValueError as error:
        raise WeightsError(f"{file}: expected a number as its radius, found {said!r}") from error


def save(file: Path, layers: Mapping[str, Mapping[str, Tensor]], *, radius: float | None = None) -> None:
    """Write a checkpoint in the published layout, whole or not at all.

    Args:
        file: to be called as `file_name` has it, to be found in a folder.
        layers: tensors by their published names, by the dotted name of their layer.
        radius: they were trained for, kept in the file.

    Raises:
        OSError, SafetensorError: it could not be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    flat = {
        f"{layer}.{name}": tensor.detach().contiguous()
        for layer, tensors in layers.items()
        for name, tensor in tensors.items()
    }
    metadata = {"format": "pt"} if radius is None else {"format": "pt", "radius": f"{radius:g}"}
    with whole(file) as part:
        save_file(flat, part, metadata)


def _bundled() -> dict[str, Path]:
    return {path.parent.name: path for path in sorted(BUNDLED.glob("*/clear"))}


def _flat(layers: Mapping[str, Shapes]) -> Shapes:
    return {f"{layer}.{name}": shape for layer, shapes in layers.items() for name, shape in shapes.items()}


def _pooling_shape(side: int) -> tuple[int, ...]:
    return (1, 1, 1, side, 1, side, 1)


def _in_folder(folder: Path, name: str) -> Path:
    if (folder / name).is_file():
        return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise WeightsError(f"{folder}: expected {name}, or a single .safetensors file, found {listing(folder)}")
    return files[0]


def _check(file: Path, found: Shapes, expected: Mapping[str, Shapes], model: str) -> None:
    wanted = _flat(expected)
    trained, asked = _down_factor(found), _down_factor(wanted)
    if trained != asked:  # which all layers show: said once, and what it takes
        raise WeightsError(
            f"{file} was trained with {trained}, and {asked} was asked for; weights None are the model's own"
        )
    for key, shape in wanted.items():
        if found.get(key) != shape:
            raise WeightsError(
                f"{file} does not fit {model}: expected {key} {dims(shape)}, found {dims(found.get(key))}"
            )
    if extra := sorted(found.keys() - wanted.keys()):
        raise WeightsError(f"{file} does not fit {model}: expected {len(wanted)} tensors, found also {extra[0]}")


def _down_factor(shapes: Shapes) -> str:
    sides = sorted({shape[3] for key, shape in shapes.items() if key.endswith(POOLING) and len(shape) == 7})
    return f"down_factor {', '.join(map(str, sides)) or None}"
