"""`method="auto"`: which methods to use, by the kind of model, the size of its calls and what is installed here.

Dense attention stays below measured break-even points: there a method costs more than it saves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    """

    method: str
    device: str
    tokens: int
    measured: str


#: As `python -m attnswap.benchmarks.break_even` measured them. HiDiffusion has a rule of its own, by area.
BREAK_EVEN = (
    BreakEven("adaspa", "cpu", 2048, "emoji-video, calls of a whole run of 12 steps"),
    BreakEven("clear", "cpu", 1024, "emoji-flux, a call"),
    BreakEven("linfusion", "cpu", 1024, "emoji-sd, a call"),
)

#: In the order of preference; those of a row act together.
PREFERENCES: dict[str, tuple[tuple[str, ...], ...]] = {
    "unet": (("hidiffusion", "linfusion"),),
    "image": (("clear",), ("adaspa",)),
    "video": (("adaspa",),),
}


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


def break_even(method: str, device: str) -> tuple[int, str]:
    """The tokens from which a method is faster than dense attention, and where that was measured, in words."""
    known = {entry.device: entry for entry in BREAK_EVEN if entry.method == method}
    if device in known:
        return known[device].tokens, f"measured on {device}"
    return known["cpu"].tokens, f"measured on the CPU alone, and not on {device}"


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
    for together in PREFERENCES[kind]:
        for method in together:
            config, about = candidates[method].config, candidates[method].about
            if config is None:
                reasons.append(f"{method}: {about}")
            elif isinstance(config, AdaSpa) and size is not None and not _has_sparse_steps(config, size.steps):
                reasons.append(f"adaspa: a run of {size.steps} steps has none after its first search")
            elif isinstance(config, HiDiffusion):
                areas = None if size is None else size.area / candidates[method].native_area
                reasons.append(_by_area(config, areas))
                if areas is None or areas > config.active_above:
                    configs.append(config)
            else:
                known, where = break_even(method, device)
                # AdaSpa knows such a number, too, and for some models a larger one is wise.
                least[method] = max(known, getattr(config, "min_tokens", 0))
                reasons.append(_by_tokens(method, least[method], where if least[method] == known else "", size))
                if size is None or size.tokens >= least[method]:
                    configs.append(replace(config, min_tokens=least[method]) if isinstance(config, AdaSpa) else config)
                    reasons[-1] += f", weights {about} are here" if about else ""
        if configs:
            break
    names = " + ".join(config.name for config in configs) or "dense attention"
    return Choice(tuple(configs), f"auto: {names}: {'; '.join(reasons)}", {} if size else least)


def _has_sparse_steps(config: AdaSpa, steps: int | None) -> bool:
    return steps is None or steps_of_run(config.search_steps, steps)[0] < steps


def _by_area(config: HiDiffusion, areas: float | None) -> str:
    acts = f"hidiffusion acts above {config.active_above:g} times"
    return f"{acts} the native area" if areas is None else f"{areas:.3g} times the native area, {acts}"


def _by_tokens(method: str, least: int, where: str, size: Size | None) -> str:
    breaks_even = f"{method} breaks even at {least:,} ({where})" if where else f"{method} acts from {least:,}"
    return f"{breaks_even} tokens" if size is None else f"{size.tokens:,} tokens, {breaks_even}"


def choose_for(model: nn.Module, pipeline: Any = None) -> Choice:
    """The methods for a denoiser whose calls are to come.

    Raises:
        UnsupportedModel: none can act.
    """
    device = getattr(pipeline, "_execution_device", None) or next(model.parameters()).device
    return choose(family_of(model).kind, candidates(model, pipeline=pipeline), device.type)


def candidates(
    model: nn.Module, *, pipeline: Any = None, settings: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Candidate]:
    """The methods that take a model, with what is on this machine; nothing is changed or fetched.

    Args:
        model: a denoiser.
        pipeline: it belongs to.
        settings: by method, those that differ from its defaults.

    Raises:
        UnsupportedModel: none can act, with the reasons.
    """
    kind = family_of(model).kind
    methods = [method for together in PREFERENCES[kind] for method in together]
    found = {method: _candidate(method, (settings or {}).get(method, {}), model, pipeline) for method in methods}
    if all(candidate.config is None for candidate in found.values()):
        why = "; ".join(f"{method}: {candidate.about}" for method, candidate in found.items())
        raise UnsupportedModel(f"auto finds no method for {type(model).__name__}: {why}")
    return found


def _candidate(method: str, settings: Mapping[str, Any], model: nn.Module, pipeline: Any) -> Candidate:
    if method == AdaSpa.name:
        settings = {"min_tokens": 0, **settings}
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
