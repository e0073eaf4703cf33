"""LinFusion checkpoints in the published layout: found, checked against a U-Net by its layers, read and written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..errors import WeightsError
from .checkpoints import BUNDLED, dims, first_line, from_hub, in_cache, listing, on_disk, opened, whole
from .linfusion_layer import PUBLISHED

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# Diffusers' version that wrote the published files; theirs are otherwise what this module writes.
_FORMAT = {"_class_name": "LinFusion", "_diffusers_version": "0.30.0"}


@dataclass(frozen=True)
class LayerShape:
    """One self-attention layer as a checkpoint describes it.

    Attributes:
        module_name: dotted name in the U-Net.
        dim_n: channels.
        projection_mid_dim: width of the MLPs: None for `dim_n`, -1 for no MLP.
    """

    module_name: str
    dim_n: int
    heads: int
    projection_mid_dim: int | None = None

    def __post_init__(self) -> None:
        numbers = (self.dim_n, self.heads, self.projection_mid_dim if self.projection_mid_dim is not None else -1)
        if not isinstance(self.module_name, str) or not all(isinstance(number, int) for number in numbers):
            raise TypeError(f"a layer is a name and whole numbers, found {self}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by its published name, in the published order."""
        width, mid = self.dim_n, self.projection_mid_dim if self.projection_mid_dim is not None else self.dim_n
        mlp = {"0.weight": (mid, width), "3.weight": (width, mid), "3.bias": (width,)}
        found: dict[str, tuple[int, ...]] = {}
        for name in PUBLISHED:
            branch, _, rest = name.partition(".")
            if branch in ("to_q_", "to_k_"):
                if mid != -1:
                    found[name] = mlp.get(rest, (mid,))
            else:
                found[name] = (width,) if rest.endswith("bias") else (width, width)
        return found


def layers_of(attention: Mapping[str, Any], mid: int | None = None) -> list[LayerShape]:
    """The description of a U-Net's self-attention layers, in the order of its modules: down, up, mid."""
    return [LayerShape(name, attn.to_q.in_features, attn.heads, mid) for name, attn in attention.items()]


def signature(layers: Sequence[LayerShape]) -> str:
    """By what a base is recognised: its layers counted by channels and heads."""
    counts = Counter((layer.dim_n, layer.heads) for layer in layers)
    kinds = ", ".join(f"{count} of {width} channels and {heads} heads" for (width, heads), count in counts.items())
    return f"{len(layers)} layers ({kinds})"


# By the signature, so that every fine-tuned model of a base finds the weights, whatever it is called.
_PUBLISHED_FOR = {
    "16 layers (5 of 320 channels and 8 heads, 5 of 640 channels and 8 heads, 6 of 1280 channels and 8 heads)": (
        "Yuanshi/LinFusion-1-5"
    ),
    "16 layers (5 of 320 channels and 5 heads, 5 of 640 channels and 10 heads, 6 of 1280 channels and 20 heads)": (
        "Yuanshi/LinFusion-2-1"
    ),
    "70 layers (10 of 640 channels and 10 heads, 60 of 1280 channels and 20 heads)": "Yuanshi/LinFusion-XL",
}


def automatic(layers: Sequence[LayerShape]) -> str | None:
    """What "auto" stands for: a bundled name, or the Hub id published for this base; None if there is none."""
    for name, folder in _bundled().items():
        if _same_places(_read_config(folder / CONFIG), layers):
            return name
    return _PUBLISHED_FOR.get(signature(layers))


def load(weights: str, layers: Sequence[LayerShape], model: str) -> list[dict[str, Tensor]]:
    """The tensors of each of `layers` by their published names.

    Args:
        weights: a bundled name, a file, a folder or a Hub id.
        layers: of the U-Net the weights are for.
        model: what to call that U-Net in an error.

    Raises:
        WeightsError: with the file, what was expected and what was found.
    """
    file, config = _locate(weights)
    found = _read_config(config) if config else None
    if found is not None and not _same_places(found, layers):
        raise WeightsError(f"{config} is for another U-Net: {_difference(found, layers, model)}")
    with opened(file) as checkpoint:  # what does not fit is said before a gigabyte is read
        described = found or _described_by(checkpoint.shapes, layers)
        names = _check(file, checkpoint.shapes, described, model)
        return [{name: checkpoint.read(key) for name, key in layer.items()} for layer in names]


def is_here(weights: str) -> bool:
    """Whether `load` finds them without a request."""
    if weights in _bundled() or on_disk(weights).exists():
        return True
    return in_cache(weights, CONFIG) is not None and in_cache(weights, WEIGHTS) is not None


def lacks_config(weights: str) -> bool:
    """Whether nothing says for which base a checkpoint is: the shapes of those for SD 1.5 and SD 2.1 are alike."""
    path = on_disk(weights)
    return path.is_file() and not _is_linfusion(path.parent / CONFIG)


def save(folder: Path, layers: Sequence[LayerShape], tensors: Sequence[Mapping[str, Tensor]]) -> None:
    """Write a checkpoint in the published layout, each file whole or not at all.

    Raises:
        OSError, SafetensorError: it could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document = {**_FORMAT, "modules_list": [vars(layer) for layer in layers]}
    with whole(folder / CONFIG) as part:
        part.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    flat = {f"{i}.{name}": tensor.contiguous() for i, layer in enumerate(tensors) for name, tensor in layer.items()}
    with whole(folder / WEIGHTS) as part:
        save_file(flat, part, {"format": "pt"})


def _bundled() -> dict[str, Path]:
    return {path.parents[1].name: path.parent for path in sorted(BUNDLED.glob(f"*/linfusion/{CONFIG}"))}


def _locate(weights: str) -> tuple[Path, Path | None]:
    """The safetensors file, and its config where there is one."""
    if (bundled := _bundled().get(weights)) is not None:
        return bundled / WEIGHTS, bundled / CONFIG
    path = on_disk(weights)
    if path.is_file():
        beside = path.parent / CONFIG
        return path, beside if _is_linfusion(beside) else None
    if not path.is_dir():
        path = _from_hub(weights)
    return _in_folder(path)


def _in_folder(folder: Path) -> tuple[Path, Path]:
    config = folder / CONFIG
    if not config.is_file():
        raise WeightsError(
            f"{folder} holds no LinFusion weights: expected {CONFIG} and {WEIGHTS}, found {listing(folder)}"
        )
    files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise WeightsError(f"{folder}: expected {WEIGHTS} beside {CONFIG}, found {listing(folder)}")
    return files[0], config


def _from_hub(name: str) -> Path:
    return from_hub(name, "LinFusion", [CONFIG, "*.safetensors"], _bundled())


def _read_config(path: Path) -> list[LayerShape]:
    try:
        return [LayerShape(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["modules_list"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path} is no LinFusion config with a modules_list: {first_line(error)}") from error


def _is_linfusion(config: Path) -> bool:
    """A single file may lie in any folder, beside the config of something else."""
    try:
        return "modules_list" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _same_places(found: Sequence[LayerShape], layers: Sequence[LayerShape]) -> bool:
    return [(x.module_name, x.dim_n, x.heads) for x in found] == [(x.module_name, x.dim_n, x.heads) for x in layers]


def _difference(found: Sequence[LayerShape], layers: Sequence[LayerShape], model: str) -> str:
    if signature(found) != signature(layers):
        return f"expected {signature(layers)} as {model} has, found {signature(found)}"
    here, there = next((a, b) for a, b in zip(layers, found, strict=True) if not _same_places([a], [b]))
    return f"expected {here.module_name} ({here.dim_n}) as {model} has, found {there.module_name} ({there.dim_n})"


def _described_by(shapes: Mapping[str, tuple[int, ...]], layers: Sequence[LayerShape]) -> list[LayerShape]:
    """Without a config: the base's layers in their order, with the MLP width that the file itself shows."""
    described = []
    for i, layer in enumerate(layers):
        first = shapes.get(f"{i}.to_q_.0.weight") or shapes.get(f"{layer.module_name}.to_q_.0.weight")
        mid = -1 if first is None else None if first[0] == layer.dim_n else first[0]
        described.append(LayerShape(layer.module_name, layer.dim_n, layer.heads, mid))
    return described


def _check(
    file: Path, shapes: Mapping[str, tuple[int, ...]], layers: Sequence[LayerShape], model: str
) -> list[dict[str, str]]:
    """For each layer, published name → key in the file. Layers are keyed by index, or by their dotted names."""
    by_name = f"{layers[0].module_name}.to_q.weight" in shapes
    names = [
        {name: f"{layer.module_name if by_name else i}.{name}" for name in layer.shapes()}
        for i, layer in enumerate(layers)
    ]
    for layer, keys in zip(layers, names, strict=True):
        for name, shape in layer.shapes().items():
            found = shapes.get(keys[name])
            if found != shape:
                raise WeightsError(
                    f"{file} does not fit {model}: {layer.module_name} needs {keys[name]} {dims(shape)}, found "
                    f"{dims(found)}; the U-Net has {signature(layers)}"
                )
    # Fusing projections leaves copies that add nothing.
    extra = sorted(
        key for key in shapes.keys() - {key for keys in names for key in keys.values()} if "to_qkv" not in key
    )
    if extra:
        raise WeightsError(
            f"{file} does not fit {model}: expected {sum(map(len, names))} tensors, found also {extra[0]}"
        )
    return names
