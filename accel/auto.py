"""`method="auto"`: which methods to use, by the kind of model, the size of its calls and what is installed here.

Dense attention stays below measured break-even points: there a method costs more than it saves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .context import Clock
from .errors import UnsupportedModel
from .families import family_of
from .families.unet import latent_size
from .install import Installation
from .methods import CONFIGS, clear_weights, linfusion_weights
from .methods.adaspa import AdaSpa
from .methods.adaspa_schedule import steps_of_run
from .methods.base import Config
from .methods.clear import ClearStrategy
from .methods.hidiffusion import HiDiffusion, HiDiffusionStrategy
from .methods.linfusion import LinFusionStrategy

#: The name that stands for what this module chooses.
AUTO = "auto"


@dataclass(frozen=True)
class BreakEven:
    """From how many tokens on a method is faster than dense attention, on a kind of device.

    Attributes:
        tokens: of the longest sequence that attention sees in a call, text included.
        measured: with what.
        radius: of CLEAR's circle.
        beside: a method that acts in the same calls, which are faster already.
    """

    method: str
    device: str
    tokens: int
    measured: str
    radius: float = 0.0
    beside: str = ""


#: As `python -m attnswap.benchmarks.break_even` measured them. HiDiffusion has a rule of its own, by area.
BREAK_EVEN = (
    BreakEven("adaspa", "cpu", 630, "emoji-video, a run of 50 steps"),
    BreakEven("clear", "cpu", 646, "emoji-flux, a call", radius=3),
    BreakEven("clear", "cpu", 1641, "emoji-flux, a call", radius=16),
    BreakEven("linfusion", "cpu", 580, "emoji-sd, a call"),
    BreakEven("linfusion", "cpu", 2325, "emoji-sd, a call", beside="hidiffusion"),
)

#: By kind of model, the methods that are taken, together where each can act. What AdaSpa does to pictures has not been
#: measured, as it has for clips: who wants it there can name it.
TAKEN: dict[str, tuple[str, ...]] = {"unet": ("hidiffusion", "linfusion"), "image": ("clear",), "video": ("adaspa",)}


@dataclass(frozen=True)
class Candidate:
    """A method that could be used on a model.

    Attributes:
        config: None where it cannot.
        about: the weights it would take, or why it cannot be used.
        native_area: of a U-Net's latent, for a method that acts by it.
    """

    config: Config | None
    about: str = ""
    native_area: int = 0


@dataclass(frozen=True)
class Size:
    """Of a call.

    Attributes:
        tokens: of the longest sequence that attention sees, text included.
        area: of a U-Net's latent.
        steps: of the run, where it is known.
    """

    tokens: int
    area: int = 0
    steps: int | None = None


@dataclass(frozen=True)
class Choice:
    """What to use, and why.

    Attributes:
        configs: of the methods; none is dense attention.
        why: a line.
        least: by method, tokens below which a call is to run dense, where its size was not known.
    """

    configs: tuple[Config, ...]
    why: str
    least: Mapping[str, int] = field(default_factory=dict)


def break_even(config: Config, device: str, beside: Sequence[str] = ()) -> tuple[int, str]:
    """The tokens from which a method makes calls faster, and where that was measured, in words.

    Args:
        beside: names of methods that act there, too; dense attention without.
    """
    radius = getattr(config, "radius", None) or 0.0
    known = [entry for entry in BREAK_EVEN if entry.method == config.name and entry.beside == "".join(beside)]
    here = [entry for entry in known if entry.device == device]
    where = f"measured on {device}" if here else f"measured on the CPU, and not on {device}"
    # The larger the circle, the later: of those measured the next larger one, else the largest.
    known = sorted(here or known, key=lambda entry: entry.radius)
    nearest = next((entry for entry in known if entry.radius >= radius), known[-1])
    return nearest.tokens, where


def choose(kind: str, candidates: Mapping[str, Candidate], device: str, size: Size | None = None) -> Choice:
    """The methods to use.

    Args:
        kind: of the model (`Family.kind`).
        candidates: by method, all that take such a model.
        device: its type, such as "cuda".
        size: of the calls to come; None where it is not known yet, so that each call has to tell.
    """
    configs: list[Config] = []
    reasons: list[str] = []
    least: dict[str, int] = {}
    for method in TAKEN[kind]:
        config, about = candidates[method].config, candidates[method].about
        if config is None:
            reasons.append(f"{method}: {about}")
        elif isinstance(config, AdaSpa) and size is not None and not _has_sparse_steps(config, size.steps):
            reasons.append(f"adaspa: no step of {size.steps} is after its first search")
        elif isinstance(config, HiDiffusion):
            areas = None if size is None else size.area / candidates[method].native_area
            reasons.append(_by_area(config, areas))
            if areas is None or areas > config.active_above:
                configs.append(config)
        else:
            least[method], acts, why = _least(config, device, [other.name for other in configs])
            point = f"{acts} {least[method]:,}"
            reasons.append(f"{size.tokens:,} tokens, {point} ({why})" if size else f"{point} tokens ({why})")
            if size is None or size.tokens >= least[method]:
                configs.append(replace(config, min_tokens=least[method]) if isinstance(config, AdaSpa) else config)
                reasons[-1] += f", weights {about} are here" if about else ""
    names = " + ".join(config.name for config in configs) or "dense attention"
    return Choice(tuple(configs), f"auto: {names}: {'; '.join(reasons)}", {} if size else least)


def _has_sparse_steps(config: AdaSpa, steps: int | None) -> bool:
    try:
        return steps is None or steps_of_run(config.search_steps, steps)[0] < steps
    except ValueError:  # one is beyond the run
        return False


def _by_area(config: HiDiffusion, areas: float | None) -> str:
    acts = f"hidiffusion acts above {config.active_above:g} times"
    return f"{acts} the native area" if areas is None else f"{areas:.3g} times the native area, {acts}"


def _least(config: Config, device: str, beside: Sequence[str]) -> tuple[int, str, str]:
    """The tokens from which a method is to act; what it does there, and why, in words."""
    point, where = break_even(config, device, beside)
    # For the sake of the picture, AdaSpa has such a number itself.
    if isinstance(config, AdaSpa) and config.min_tokens > point:
        return config.min_tokens, f"{config.name} acts from", "its min_tokens"
    return point, f"{config.name} breaks even at", f"{where}{f', beside {beside[0]}' if beside else ''}"


def choose_for(model: nn.Module, pipeline: Any = None) -> Choice:
    """The methods for a denoiser whose calls are to come."""
    device = getattr(pipeline, "_execution_device", None) or next(model.parameters()).device
    # One without weights has no place to run yet.
    kind = "cpu" if device.type == "meta" else device.type
    return choose(family_of(model).kind, candidates(model, pipeline=pipeline), kind)


def candidates(
    model: nn.Module, *, pipeline: Any = None, settings: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Candidate]:
    """The methods that take a model, with what is on this machine; nothing is changed or fetched.

    Args:
        model: a denoiser.
        pipeline: it belongs to.
        settings: by method, those that differ from its defaults.
    """
    return {
        method: _candidate(method, (settings or {}).get(method, {}), model, pipeline)
        for method in TAKEN[family_of(model).kind]
    }


def _candidate(method: str, settings: Mapping[str, Any], model: nn.Module, pipeline: Any) -> Candidate:
    config = CONFIGS[method].from_dict(settings)
    try:
        [strategy] = Installation(model, [config], Clock(), pipeline=pipeline).strategies
    except UnsupportedModel as error:
        return Candidate(None, str(error))
    if isinstance(strategy, LinFusionStrategy):
        return _linfusion(strategy)
    if isinstance(strategy, HiDiffusionStrategy):
        return Candidate(config, native_area=math.prod(strategy.structure.native_size))
    return _clear(strategy) if isinstance(strategy, ClearStrategy) else Candidate(config)


def _linfusion(strategy: LinFusionStrategy) -> Candidate:
    if strategy.source is None:
        return Candidate(None, "no weights for these layers are known")
    if not linfusion_weights.is_here(strategy.source):
        return Candidate(None, f"its weights {strategy.source} are not on this machine")
    return Candidate(strategy.config, strategy.source)


def _clear(strategy: ClearStrategy) -> Candidate:
    config, model = strategy.config, strategy.model
    if config.weights is None:
        is_dev = type(model).__name__.startswith("Flux") and getattr(model.config, "guidance_embeds", False)
        found = clear_weights.automatic(strategy.attention, is_flux_dev=bool(is_dev))
        if found is None:
            return Candidate(None, "no weights that were distilled for this model are here")
        weights, radius = found
        return Candidate(replace(config, weights=weights, radius=radius), weights)
    assert config.radius is not None  # a configuration with weights has one
    if not clear_weights.is_here(config.weights, config.radius, config.down_factor):
        return Candidate(None, f"its weights {config.weights} are not on this machine")
    return Candidate(config, config.weights)


def size_of(model: nn.Module, arguments: Mapping[str, Any]) -> Size:
    """Of a call with these arguments.

    Raises:
        NoGrid: the tokens of the picture or clip form no grid that can be told.
    """
    family = family_of(model)
    tokens = max(place.tokens for place in family.places(model)(dict(arguments)).values())
    return Size(tokens, math.prod(latent_size(dict(arguments))) if family.kind == "unet" else 0)
