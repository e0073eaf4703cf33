"""What a pipeline calls its denoiser with, told from a size, and what attention costs there."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..accel import rehearsal
from ..accel.errors import UnsupportedModel
from ..accel.families.calls import call_arguments
from . import clip, resolve
from .errors import BadInput

if TYPE_CHECKING:
    from ..accel.methods.base import Config
    from .job import Job
    from .presets import Preset

Grid = tuple[int, int, int]

#: Tokens of the published CLIP text encoders, which Stable Diffusion pads every prompt to.
CLIP_TOKENS = 77
LONGEST_TEXT = 512


def denoiser_of(pipe: Any) -> Any:
    """The first that a pipeline calls."""
    return getattr(pipe, "unet", None) or getattr(pipe, "transformer", None) or pipe.transformer_2


def grid_of(pipe: Any, width: int, height: int, frames: int | None) -> Grid:
    """(f, h, w) of the tokens of a picture or clip of a size in pixels; of a U-Net's latent."""
    if frames is not None:
        multiple = clip.size_multiple(pipe)
        return -(-clip.latent_frames(frames, pipe) // _frame_patch(pipe)), height // multiple, width // multiple
    multiple = int(pipe.vae_scale_factor) if getattr(pipe, "unet", None) else resolve.size_multiple(pipe)
    return 1, height // multiple, width // multiple


def text_tokens(pipe: Any, preset: Preset) -> int:
    """Of a prompt, at the longest that the pipeline makes it."""
    accepted = inspect.signature(pipe.__call__).parameters
    usual = accepted["max_sequence_length"].default if "max_sequence_length" in accepted else None
    longest = preset.max_sequence_length or usual or getattr(pipe, "tokenizer_max_length", None)
    if longest is None:
        longest = _clip_tokens(pipe) if getattr(pipe, "unet", None) else LONGEST_TEXT
    # Stable Diffusion 3 puts the text of its two kinds of encoders one after the other.
    return int(longest) + (_clip_tokens(pipe) if hasattr(pipe, "text_encoder_3") else 0)


def _clip_tokens(pipe: Any) -> int:
    """What the tokenizer of `pipe` pads to, or that in its folder where `pipe` is without."""
    longest = getattr(getattr(pipe, "tokenizer", None), "model_max_length", None)
    if longest is None:
        try:
            file = Path(pipe.config._name_or_path) / "tokenizer" / "tokenizer_config.json"
            longest = json.loads(file.read_text(encoding="utf-8")).get("model_max_length")
        except (OSError, ValueError, AttributeError, TypeError):  # no such file, or not as it should be
            pass
    # A tokenizer that knows of no end has a number of thirty digits.
    return longest if isinstance(longest, int) and 0 < longest <= LONGEST_TEXT else CLIP_TOKENS


def arguments_of(pipe: Any, preset: Preset, *, width: int, height: int, frames: int | None) -> dict[str, Any]:
    """Those of a call of the denoiser for one picture or clip.

    Raises:
        UnsupportedModel: the family is called with more than can be told from a size.
    """
    return call_arguments(denoiser_of(pipe), grid_of(pipe, width, height, frames), text_tokens(pipe, preset))


def _frame_patch(pipe: Any) -> int:
    """Latent frames that a token stands for."""
    config = denoiser_of(pipe).config
    patch = getattr(config, "patch_size", 1)
    return int(patch[0] if isinstance(patch, list | tuple) else getattr(config, "patch_size_t", None) or 1)


@dataclass(frozen=True)
class MethodCost:
    """What a method makes of attention in a run.

    Attributes:
        name: of the method.
        pairs: query-key pairs a call computes for one picture or clip, in the mean over the run.
        share: of those of dense attention.
        last_share: the same in the last step, when what is only done at first is over.
        density: as the report of such a run would have it.
        most: how many times fewer operations a call takes, beside what the method adds: it cannot become faster than
            that by them. None where they cannot be counted.
        notes: what the report would say.
    """

    name: str
    pairs: float
    share: float
    last_share: float
    density: float
    most: float | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cost:
    """What self-attention over a picture or clip costs in a call of the denoiser, for one of a batch, without guidance.

    Attributes:
        grid: (h, w), or (f, h, w), of the picture or clip in the longest sequence.
        tokens: of that sequence, those beside the grid included.
        layers: with self-attention over the picture or clip.
        pairs: query-key pairs of dense attention.
        operations: of dense attention.
        all_operations: of the whole call; None where a call without data cannot be run.
        methods: those that can act on the model, in the order asked for.
    """

    width: int
    height: int
    frames: int | None
    steps: int
    grid: tuple[int, ...]
    tokens: int
    layers: int
    pairs: int
    operations: float
    all_operations: float | None
    methods: tuple[MethodCost, ...]

    @property
    def attention_share(self) -> float | None:
        """Of the operations of a call."""
        return None if self.all_operations is None else self.operations / self.all_operations


def cost_of(pipe: Any, preset: Preset, job: Job, methods: Mapping[str, Sequence[Config]]) -> Cost:
    """The cost of a job that is complete.

    Args:
        pipe: without weights (`skeleton.skeleton_pipe`).
        methods: one or several together, by what to call them; those that cannot act on the model are left out.

    Raises:
        UnsupportedModel: what the denoiser is called with cannot be told from a size.
        BadInput: a method cannot act at this size or in so many steps.
    """
    assert job.width is not None
    assert job.height is not None
    assert job.steps is not None
    frames = job.window or job.frames
    denoiser = denoiser_of(pipe)
    arguments = arguments_of(pipe, preset, width=job.width, height=job.height, frames=frames)
    places = rehearsal.places(denoiser, arguments)
    longest = max(places.values(), key=lambda place: place.tokens)
    counts = rehearsal.CallOperations(denoiser, arguments)

    def run(configs: Sequence[Config]) -> rehearsal.Rehearsal:
        return rehearsal.rehearse(denoiser, configs, arguments, steps=steps, operations=counts, pipeline=pipe)

    steps = job.steps
    dense = run([])
    found = []
    for name, configs in methods.items():
        try:
            done = run(configs)
        except UnsupportedModel:
            continue
        except ValueError as error:
            raise BadInput(f"{name}: {error}") from error
        most = dense.operations / done.operations if dense.operations and done.operations else None
        mean = sum(done.pairs) / steps
        found.append(MethodCost(name, mean, done.share, done.share_of_last, done.density, most, done.notes))
    return Cost(
        job.width,
        job.height,
        job.frames,
        job.steps,
        longest.grid,
        longest.tokens,
        len(places),
        dense.dense_pairs,
        counts.attention({name: place.tokens**2 for name, place in places.items()}),
        dense.operations and dense.operations / steps,
        tuple(found),
    )
