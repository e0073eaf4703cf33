"""More time for less memory, for the length of a `with` block and of any pipeline.

Everything is done by torch hooks that run a module on parts of its input: they live beside whatever offloading, LoRA
or a method has put into the module, in any order, and are gone without a trace afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .names import DENOISERS

FF_PARTS, FF_LEAST_TOKENS = 16, 1024
FEED_FORWARDS = ("FeedForward", "Flux2FeedForward")

Call = tuple[tuple[Any, ...], dict[str, Any]]


@contextmanager
def low_memory(pipe: Any) -> Iterator[list[str]]:
    """Guidance halves, where batched, one at a time, feed-forward layers in parts, autoencoder in tiles.

    The same picture to floating-point tolerance, but for the tiles, whose overlaps are blended.

    Yields:
        What is done and what could not be, as text.
    """
    said = []
    with ExitStack() as stack:
        denoisers = [module for name in DENOISERS if isinstance(module := getattr(pipe, name, None), nn.Module)]
        layers = [layer for denoiser in denoisers for layer in feed_forwards(denoiser)]
        for denoiser in denoisers:
            stack.enter_context(in_halves(denoiser))
        for layer in layers:
            stack.enter_context(in_parts_of_tokens(layer, FF_PARTS, FF_LEAST_TOKENS))
        said.append("guidance halves, where batched, one at a time")
        said.append(f"{len(layers)} feed-forward layers in up to {FF_PARTS} parts")
        if reason := untileable(pipe.vae):
            said.append(f"{type(pipe.vae).__name__} not in tiles: {reason}")
        else:
            stack.enter_context(tiled(pipe.vae))
            said.append("autoencoder in tiles" + (", encoding whole" if encodes_whole(pipe.vae) else ""))
        yield said


@contextmanager
def tiled(vae: Any, tile: int | None = None) -> Iterator[None]:
    """Autoencoder in tiles both ways, and one picture at a time.

    Args:
        tile: side in pixels; None is the autoencoder's own, as for those of which `has_tile_side` is not true.
    """
    before = {name: value for name, value in vars(vae).items() if isinstance(value, bool | int | float)}
    vae.enable_tiling()
    if is_small(vae):
        # Diffusers takes this factor from the number of colours.
        vae.spatial_scale_factor = 2 ** (len(vae.config.decoder_block_out_channels) - 1)
        vae.tile_latent_min_size = vae.tile_sample_min_size // vae.spatial_scale_factor
        if encodes_whole(vae):
            vars(vae)["_tiled_encode"] = lambda pixels: vae.encoder(pixels)
    if hasattr(vae, "enable_slicing"):
        vae.enable_slicing()
    if tile is not None and has_tile_side(vae):
        factor = vae.tile_sample_min_size // vae.tile_latent_min_size
        vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // factor
    try:
        yield
    finally:
        vars(vae).pop("_tiled_encode", None)
        for name, value in before.items():
            setattr(vae, name, value)


def has_tile_side(vae: Any) -> bool:
    """Whether its tiles are squares of a side that can be set; others have a setting for each direction, or none."""
    return hasattr(vae, "tile_sample_min_size") and hasattr(vae, "tile_latent_min_size")


def untileable(vae: Any) -> str | None:
    """Why an autoencoder cannot work in tiles; None where it can."""
    if not hasattr(vae, "enable_tiling"):
        return "it has no tiling"
    return None


def is_small(vae: Any) -> bool:
    return type(vae).__name__ == "AutoencoderTiny"


def encodes_whole(vae: Any) -> bool:
    """Whether only its decoder can work in tiles: Diffusers writes 4 channels into the encoding of the small one."""
    return is_small(vae) and vae.config.latent_channels != 4


def feed_forwards(denoiser: nn.Module) -> list[nn.Module]:
    """Those of Diffusers' own class, and of the classes that FLUX.2 and Z-Image have for it."""
    return [module for module in denoiser.modules() if type(module).__name__ in FEED_FORWARDS]


@contextmanager
def in_halves(denoiser: nn.Module) -> Iterator[None]:
    """Each call with an even batch (guidance: negative and positive) becomes two of half of it."""
    with _Parted(denoiser, _halves, _joined):
        yield


@contextmanager
def in_parts_of_tokens(layer: nn.Module, parts: int, least: int) -> Iterator[None]:
    """A layer that treats each token of [B, N, C] alone runs on at most `parts` slices of `least` tokens or more."""

    def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call]:
        if not args or args[0].ndim != 3:
            return [(args, kwargs)]
        tokens, *others = args
        return [((part, *others), kwargs) for part in tokens.split(max(least, math.ceil(tokens.shape[1] / parts)), 1)]

    with _Parted(layer, split, lambda outputs: torch.cat(outputs, 1)):
        yield


class _Parted:
    """Runs a module on all but the last part before its call, on the last in its call, and joins the outputs."""

    def __init__(
        self,
        module: nn.Module,
        split: Callable[[tuple[Any, ...], dict[str, Any]], list[Call]],
        join: Callable[[list[Any]], Any],
    ) -> None:
        self._module, self._split, self._join = module, split, join
        self._outputs: list[Any] = []
        self._inside = False

    def __enter__(self) -> None:
        # Before the hooks of others: a method is to see every part as a call of its own.
        self._hooks = [
            self._module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            self._module.register_forward_hook(self._after, prepend=True),
        ]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        if self._inside:
            return None
        *first, last = self._split(args, kwargs)
        self._inside = True
        try:
            self._outputs = [module(*part_args, **part_kwargs) for part_args, part_kwargs in first]
        finally:
            self._inside = False
        return last

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._inside or not self._outputs:
            return None
        outputs, self._outputs = [*self._outputs, output], []
        return self._join(outputs)


def _halves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call]:
    main = args[0] if args else next((kwargs[name] for name in ("sample", "hidden_states") if name in kwargs), None)
    if not isinstance(main, torch.Tensor) or main.shape[0] % 2:
        return [(args, kwargs)]
    batch = main.shape[0]
    return [
        (_sliced(args, batch, part), _sliced(kwargs, batch, part))
        for part in (slice(0, batch // 2), slice(batch // 2, batch))
    ]


def _sliced(value: Any, batch: int, part: slice) -> Any:
    """`part` of every tensor in `value` that has one entry for each in the batch."""
    if isinstance(value, torch.Tensor):
        return value[part] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {name: _sliced(entry, batch, part) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_sliced(entry, batch, part) for entry in value)
    return value


def _joined(outputs: list[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(outputs)
    if isinstance(first, tuple):
        return tuple(_joined(list(entries)) for entries in zip(*outputs, strict=True))
    return type(first)(**{name: _joined([output[name] for output in outputs]) for name in first})
