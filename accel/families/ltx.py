"""LTX-Video: self-attention over video tokens alone, text by cross-attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.transformers import transformer_ltx
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor
from torch import Tensor

from .base import Family, NoGrid, Place, attention_layers
from .joint import DispatchingProcessor, project
from .read_once import ReadOnce
from .video import Grid

#: It has no annotations.
_rotate: Any = transformer_ltx.apply_rotary_emb


class LTXProcessor(DispatchingProcessor, LTXVideoAttnProcessor):
    """Stock self-attention of a block, with the middle exchanged for a method's."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **others: Any,
    ) -> Any:
        slot, arguments = self.slot, (hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if slot is None:
            return super().__call__(attn, *arguments)  # type: ignore[arg-type]
        if not self.takes(hidden_states, hidden_states.shape[1], why_not(encoder_hidden_states, attention_mask)):
            return slot.original(attn, *arguments, **others)
        strategy = slot.strategy
        query, key, value = strategy.project(attn, hidden_states, partial(project, attn))
        # Norms and positions go over all heads at once.
        query, key = attn.norm_q(query.flatten(2)), attn.norm_k(key.flatten(2))
        if image_rotary_emb is not None:
            query, key = _rotate(query, image_rotary_emb), _rotate(key, image_rotary_emb)
        query, key = (x.unflatten(2, value.shape[2:]) for x in (query, key))
        attended = self.attend(query, key, value).flatten(2)
        return attn.to_out[1](strategy.output(attn, attended, attn.to_out[0]))


def why_not(others: Tensor | None, mask: Tensor | None) -> str:
    """Why a call cannot be accelerated, if it is not all tokens among themselves."""
    if others is not None:
        return "it was given other tokens to attend to"
    return "" if mask is None else f"an attention mask of shape {tuple(mask.shape)} was given"


class VideoPlaces:
    """Tells the grid from its sides, or else from the coordinates of the tokens: the packed latent does not say.

    Pipelines that condition on frames put these before or behind the video: they are further frames of the grid.

    Args:
        model: the denoiser.
        patch: frames, rows and columns of a token, as the sides are counted.
    """

    def __init__(self, model: Any, patch: Grid) -> None:
        self._layers = [name for name in attention_layers(model) if is_self_attention(name)]
        self._patch = patch
        self._coordinates = ReadOnce(frames_of)

    def __call__(self, arguments: dict[str, Any]) -> dict[str, Place]:
        return dict.fromkeys(self._layers, Place(self._grid(arguments)))

    def _grid(self, arguments: dict[str, Any]) -> Grid:
        tokens, coordinates = arguments["hidden_states"].shape[1], arguments.get("video_coords")
        sides: list[Any] = [arguments.get(name) for name in ("num_frames", "height", "width")]
        if None in sides:
            why = "without num_frames, height and width the video tokens have no frames, rows and columns"
        else:
            frames, height, width = (-(-int(side) // patch) for side, patch in zip(sides, self._patch, strict=True))
            if frames * height * width == tokens:
                return frames, height, width
            why = f"{tokens} video tokens are not a grid of {frames}x{height}x{width}"
        if coordinates is None:
            raise NoGrid(why)
        return self._coordinates.read(coordinates)


def frames_of(coordinates: Tensor) -> Grid:
    """(f, h, w) of tokens that are frames of one size, one after the other.

    Args:
        coordinates: `[B, 3, S]` or `[B, 3, S, 2]`, time, row and column of each token, or where they begin and end.

    Raises:
        NoGrid: for anything else, such as frames of another size among them.
    """
    if coordinates.ndim == 4:
        coordinates = coordinates[..., 0]
    times, rows, columns = coordinates[0].detach().to("cpu", torch.float64)
    corners = ((rows == rows[0]) & (columns == columns[0])).nonzero().flatten().tolist()
    frame = corners[1] if len(corners) > 1 else len(rows)
    width = int((rows[:frame] == rows[0]).long().cumprod(0).sum())
    height = frame // width
    expected = torch.cartesian_prod(rows[:frame:width], columns[:width]).T.repeat(1, len(rows) // frame)
    one_time = times[: len(times) // frame * frame].view(-1, frame)
    if not torch.equal(torch.stack((rows, columns)), expected) or bool((one_time != one_time[:, :1]).any()):
        raise NoGrid(f"the {len(rows)} positions of video_coords are not those of frames of one size, row by row")
    return len(rows) // frame, height, width


def layer_places(model: Any) -> VideoPlaces:
    """The sides are counted in tokens, whatever the patch."""
    return VideoPlaces(model, (1, 1, 1))


def is_self_attention(layer: str) -> bool:
    return layer.endswith(".attn1")


def is_exchangeable(processor: object) -> bool:
    return type(processor) in (LTXVideoAttnProcessor, LTXProcessor)


LTX = Family(
    name="LTX-Video",
    model_class="LTXVideoTransformer3DModel",
    kind="video",
    self_attention=is_self_attention,
    processor=LTXProcessor,
    exchangeable=is_exchangeable,
    places=layer_places,
)
