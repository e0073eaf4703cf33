"""Latents of a clip → its frames, chunk by chunk, in memory that does not grow with their number.

Each kind of autoencoder goes its own road, always through its public `decode`, so that offloading and tiles work as
ever:

- Wan and CogVideoX keep what their causal convolutions must remember of earlier frames. Handing it from chunk to
  chunk, a cache for each tile, gives bit for bit what decoding the whole gives.
- HunyuanVideo decodes overlapping pieces and blends them; the same pieces, one at a time, give the same bits.
- LTX, Mochi and HunyuanVideo 1.5 have no way to hand their memory on: each chunk is decoded together with the latent
  frames around it (before it, in the last two, which are causal), whose frames are dropped. What is farther away
  counts for nothing. LTX's own framewise decoding is not used: from its second piece on it is a frame late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

#: Latents [1, C, F, H, W] → frames [1, 3, frames, H, W] in -1..1, as `vae.decode`.
Decode = Callable[[torch.Tensor], torch.Tensor]

# Latent frames that are new in a chunk, and those on a side of them that are decoded once more. With small random
# autoencoders, eight leave a mean difference of at most 3 % of the pixels' deviation, four one of up to 17 %.
CHUNK, CONTEXT = 8, 8


def chunks(vae: Any, decode: Decode, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """The frames of `latents`, in order.

    Args:
        vae: whose `streams` is true.
        decode: its `decode`, with whatever it needs beside latents.
        latents: [1, C, F, H, W], as `decode` takes them.

    Yields:
        [1, 3, frames, H, W] in -1..1, as many at a time as the autoencoder makes of a few latent frames.
    """
    return _ROADS[type(vae).__name__](vae, decode, latents)


def streams(vae: Any) -> bool:
    """Whether `chunks` knows a road for it."""
    return type(vae).__name__ in _ROADS


def remark(vae: Any, latents: torch.Tensor) -> str | None:
    """How the chunks of these latents differ from the whole; None where they are the same, bit for bit."""
    name = type(vae).__name__
    if name not in (*_CAUSAL, *_SYMMETRIC) or latents.shape[2] <= _held(vae):
        return None
    where = "before" if name in _CAUSAL else "on each side of"
    return (
        f"{name}: {CHUNK} latent frames at a time, with {CONTEXT} {where} them; "
        "close to what decoding the whole gives, but not the same"
    )


def _wan(vae: Any, decode: Decode, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """As `AutoencoderKLWan._decode`: a latent frame at a time, with the features its convolutions keep."""
    caches: list[list[torch.Tensor | None]] = []
    ready: list[torch.Tensor] = []

    def all_at_once(layer: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
        """Not a frame at a time: the layer's result for one may depend on how many there are, by a rounding."""
        if not ready:
            ready.extend(layer.forward(latents).split(1, 2))
        return ready.pop(0)

    def remember(tile: int, arguments: dict[str, Any]) -> dict[str, Any]:
        first = len(caches) == tile
        if first:
            caches.append([None] * vae._cached_conv_counts["decoder"])
        return {**arguments, "feat_cache": caches[tile], "first_chunk": first}

    with ExitStack() as stack:
        stack.callback(vae.clear_cache)
        if not _in_tiles(vae, latents):
            stack.callback(vae.post_quant_conv.register_forward_hook(all_at_once).remove)
        begin = stack.enter_context(_with_tiles_counted(vae.decoder, remember))
        for frame in latents.split(1, 2):
            begin()
            yield decode(frame)


def _cogvideox(vae: Any, decode: Decode, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """As `AutoencoderKLCogVideoX._decode`: two latent frames at a time, the first time three of an odd number."""
    caches: dict[int, Any] = {}
    size, frames = vae.num_latent_frames_batch_size, latents.shape[2]
    first = min(frames, size + frames % size)

    def remember(tile: int, arguments: dict[str, Any]) -> dict[str, Any]:
        return {**arguments, "conv_cache": caches.get(tile)}

    def keep(tile: int, output: Any) -> None:
        caches[tile] = output[1]

    with _with_tiles_counted(vae.decoder, remember, keep) as begin:
        for part in (latents[:, :, :first], *latents[:, :, first:].split(size, 2)):
            if part.shape[2]:
                begin()
                yield decode(part)


def _hunyuan_video(vae: Any, decode: Decode, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """As `AutoencoderKLHunyuanVideo._temporal_tiled_decode`, with two pieces in memory."""
    ratio, frames = vae.temporal_compression_ratio, latents.shape[2]
    length, stride = vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames
    if not vae.use_framewise_decoding or frames <= length // ratio:
        yield decode(latents)
        return
    before: torch.Tensor | None = None
    for start in range(0, frames, stride // ratio):
        with _as_one_piece(vae):
            piece = decode(latents[:, :, start : start + length // ratio + 1])
        if before is None:
            yield piece[:, :, : stride + 1]
        else:
            # The first frame is that of a clip that begins here.
            piece = vae.blend_t(before, piece[:, :, 1:], length - stride)
            if piece.shape[2]:
                yield piece[:, :, :stride]
        before = piece


def _with_context(vae: Any, decode: Decode, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """A few latent frames at a time, together with those around them."""
    ratio, frames = vae.temporal_compression_ratio, latents.shape[2]
    if frames <= _held(vae):
        yield decode(latents)
        return
    after = CONTEXT if type(vae).__name__ in _SYMMETRIC else 0
    for start in range(0, frames, CHUNK):
        end, first = min(start + CHUNK, frames), max(0, start - CONTEXT)
        decoded = decode(latents[:, :, first : end + after])
        # The first latent frame of whatever is decoded becomes one frame, any other `ratio` of them.
        yield decoded[:, :, (start - first - 1) * ratio + 1 if start else 0 : (end - first - 1) * ratio + 1]


_CAUSAL = ("AutoencoderKLHunyuanVideo15", "AutoencoderKLMochi")
_SYMMETRIC = ("AutoencoderKLLTXVideo", "AutoencoderKLLTX2Video")
_ROADS: dict[str, Callable[[Any, Decode, torch.Tensor], Iterator[torch.Tensor]]] = {
    "AutoencoderKLWan": _wan,
    "AutoencoderKLCogVideoX": _cogvideox,
    "AutoencoderKLHunyuanVideo": _hunyuan_video,
    **dict.fromkeys((*_CAUSAL, *_SYMMETRIC), _with_context),
}


def _held(vae: Any) -> int:
    """Latent frames that are decoded at a time; a clip of no more is decoded whole."""
    return CHUNK + CONTEXT * (2 if type(vae).__name__ in _SYMMETRIC else 1)


def _in_tiles(vae: Any, latents: torch.Tensor) -> bool:
    ratio, (height, width) = vae.spatial_compression_ratio, latents.shape[3:]
    limits = vae.tile_sample_min_height // ratio, vae.tile_sample_min_width // ratio
    return bool(vae.use_tiling) and (height > limits[0] or width > limits[1])


@contextmanager
def _as_one_piece(vae: Any) -> Iterator[None]:
    before, vae.use_framewise_decoding = vae.use_framewise_decoding, False
    try:
        yield
    finally:
        vae.use_framewise_decoding = before


@contextmanager
def _with_tiles_counted(
    decoder: torch.nn.Module,
    before: Callable[[int, dict[str, Any]], dict[str, Any]],
    after: Callable[[int, Any], None] = lambda tile, output: None,
) -> Iterator[Callable[[], None]]:
    """Each call of `decoder` gets its named arguments from `before`, and gives its output to `after`.

    Both are told which tile of the chunk it is; what is yielded begins a chunk.
    """
    tile = -1

    def begin() -> None:
        nonlocal tile
        tile = -1

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal tile
        tile += 1
        return args, before(tile, kwargs)

    hooks = [
        decoder.register_forward_pre_hook(enter, with_kwargs=True),
        decoder.register_forward_hook(lambda module, args, output: after(tile, output)),
    ]
    try:
        yield begin
    finally:
        for hook in hooks:
            hook.remove()
