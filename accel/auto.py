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
from .families.base import Place
from .families.unet import latent_size
from .install import Installation
from .methods import CONFIGS, clear_weights, linfusion_weights
from .methods.adaspa import AdaSpa
from .methods.adaspa_schedule import steps_of_run
from .methods.base import Config
from .methods.clear import Clear, ClearStrategy
from .methods.hidiffusion import HiDiffusion, HiDiffusionStrategy
from .methods.linfusion import LinFusionStrategy

#: The name that stands for what this module chooses.
AUTO = "auto"


@dataclass(frozen=True)
class BreakEven:
    """From how many tokens on a method is faster than dense attention, on a kind of device.

    Attributes:
        tokens: of the longest sequence that attention sees in a call (`tokens_for`).
        measured: with what.
        radius: of CLEAR's circle.
        beside: a method that acts in the same calls, which are faster already.
        sparse: share of the steps that are neither dense nor search, of AdaSpa's run.
    """

    method: str
    device: str
    tokens: int
    measured: str
    radius: float = 0.0
    beside: str = ""
    sparse: float = 0.0


#: As `python -m attnswap.benchmarks.break_even` measured them. HiDiffusion has a rule of its own, by area.
BREAK_EVEN = (
    BreakEven("adaspa", "cpu", 679, "emoji-video, a run of 50 steps", sparse=0.78),
    BreakEven("adaspa", "cpu", 1602, "emoji-video, a run of 4 steps", sparse=0.5),
    BreakEven("clear", "cpu", 923, "emoji-flux, a call", radius=3),
    BreakEven("clear", "cpu", 2216, "emoji-flux, a call", radius=16),
    BreakEven("linfusion", "cpu", 557, "emoji-sd, a call"),
    BreakEven("linfusion", "cpu", 1543, "emoji-sd, a call", beside="hidiffusion"),
)

# Runs differ by this much from a measured one and are still called alike: steps are whole.
_ALIKE = 0.05

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
        text: of the tokens, those that lie outside the grid of the picture or clip.
    """

    tokens: int
    area: int = 0
    steps: int | None = None
    text: int = 0


@dataclass(frozen=True)
class Choice:
    """What to use, and why.

    Attributes:
        configs: of the methods; none is dense attention.
        why: a line.
        left_out: by method that is not used, why.
        gate: what leaves methods out call by call, where the size of the calls was not known.
    """

    configs: tuple[Config, ...]
    why: str
    left_out: Mapping[str, str] = field(default_factory=dict)
    gate: Gate | None = None


@dataclass(frozen=True)
class Gate:
    """Chooses again for each call, as it would have been chosen for its size; the arguments are those of `choose`."""

    kind: str
    candidates: Mapping[str, Candidate]
    device: str

    def __call__(
        self, places: Mapping[str, Place], arguments: Mapping[str, Any], steps: int | None
    ) -> Mapping[str, str]:
        """The methods that stay out of a call with tokens at these places, each with the reason."""
        size = _size(self.kind, places, arguments, steps)
        left_out = choose(self.kind, self.candidates, self.device, size).left_out
        # HiDiffusion is to see every call: below its area it does nothing, but puts the maps back to their size.
        return {method: why for method, why in left_out.items() if method != HiDiffusion.name}


def break_even(config: Config, device: str, beside: Sequence[str] = (), sparse: float = 1.0) -> tuple[int, str]:
    """The tokens from which a method makes calls faster, and where that was measured, in words.

    Args:
        beside: names of methods that act there, too; dense attention without.
        sparse: share of the steps that are, of AdaSpa's run; the largest measured one without.
    """
    known = [entry for entry in BREAK_EVEN if entry.method == config.name and entry.beside == "".join(beside)]
    here = [entry for entry in known if entry.device == device]
    where = f"measured on {device}" if here else f"a guess: measured on the CPU, and not on {device}"
    known = here or known
    if isinstance(config, AdaSpa):
        nearest = max((entry for entry in known if entry.sparse <= sparse + _ALIKE), key=lambda entry: entry.sparse)
        return nearest.tokens, f"{where}, {nearest.measured.rpartition(', ')[2]}"
    if not isinstance(config, Clear) or config.radius is None:
        return known[0].tokens, where
    # The larger the circle, the later: of those measured the next larger one, else the largest, by area.
    known = sorted(known, key=lambda entry: entry.radius)
    nearest = next((entry for entry in known if entry.radius >= config.radius), known[-1])
    tokens = math.ceil(nearest.tokens * max(1.0, config.radius / nearest.radius) ** 2)
    return tokens, where if config.radius == nearest.radius else f"{where}, at radius {nearest.radius:g}"


def choose(kind: str, candidates: Mapping[str, Candidate], device: str, size: Size | None = None) -> Choice:
    """The methods to use.

    Args:
        kind: of the model (`Family.kind`).
        candidates: by method, all that take such a model.
        device: its type, such as "cuda".
        size: of the calls to come; None where it is not known yet, so that each call has to tell.
    """
    configs: list[Config] = []
    reasons: dict[str, str] = {}
    for method in TAKEN[kind]:
        found = candidates[method]
        config: Config | None = None
        if found.config is None:
            reasons[method] = f"{method}: {found.about}"
        elif isinstance(found.config, HiDiffusion):
            config, reasons[method] = _by_area(found.config, found.native_area, size)
        else:
            beside = [other.name for other in configs]
            config, reasons[method] = _by_tokens(found.config, found.about, device, beside, size)
        configs += [] if config is None else [config]
    names = [config.name for config in configs]
    why = f"auto: {' + '.join(names) or 'dense attention'}: {'; '.join(reasons.values())}"
    left_out = {method: reason for method, reason in reasons.items() if method not in names}
    return Choice(tuple(configs), why, left_out, None if size else Gate(kind, candidates, device))


def _by_area(config: HiDiffusion, native_area: int, size: Size | None) -> tuple[HiDiffusion | None, str]:
    acts = f"hidiffusion acts above {config.active_above:g} times"
    if size is None:
        return config, f"{acts} the native area"
    areas = size.area / native_area
    return config if areas > config.active_above else None, f"{areas:.3g} times the native area, {acts}"


def _by_tokens(
    config: Config, about: str, device: str, beside: Sequence[str], size: Size | None
) -> tuple[Config | None, str]:
    """The method if it is to be used, and why, in words.

    Args:
        about: the weights it would take.
        beside: names of methods that are used with it.
    """
    sparse = 1.0
    if isinstance(config, AdaSpa) and size is not None and size.steps is not None:
        sparse, fewest = _sparse_share(config, size.steps), min(entry.sparse for entry in BREAK_EVEN if entry.sparse)
        if sparse < fewest - _ALIKE:
            steps = f"{round(sparse * size.steps)} of {size.steps} steps"
            return None, f"adaspa: {steps} would be sparse, fewer than the {fewest:.0%} it was measured with"
    least, where = break_even(config, device, beside, sparse)
    acts = f"{config.name} breaks even at"
    # For the sake of the picture, AdaSpa has such a number itself.
    if isinstance(config, AdaSpa):
        if config.min_tokens > least:
            least, where, acts = config.min_tokens, "its min_tokens", "adaspa acts from"
        config = replace(config, min_tokens=least)
    where += f", beside {beside[0]}" if beside else ""
    kind = "image tokens" if isinstance(config, Clear) else "tokens"
    weights = f", weights {about} are here" if about else ""
    if size is None:
        alone = f", without it at {break_even(config, device)[0]:,}" if beside else ""
        return config, f"{acts} {least:,} {kind} ({where}){alone}{weights}"
    tokens = tokens_for(config.name, size)
    reason = f"{tokens:,} {kind}, {acts} {least:,} ({where})"
    return (None, reason) if tokens < least else (config, f"{reason}{weights}")


def _sparse_share(config: AdaSpa, steps: int) -> float:
    """Of the steps of a run, those that neither come before its first search nor search."""
    try:
        first, *later = steps_of_run(config.search_steps, steps)
    except ValueError:  # one is beyond the run
        return 0.0
    return (steps - first - len(later)) / steps


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
    return _size(family.kind, family.places(model)(dict(arguments)), arguments)


def _size(kind: str, places: Mapping[str, Place], arguments: Mapping[str, Any], steps: int | None = None) -> Size:
    longest = max(places.values(), key=lambda place: place.tokens)
    area = math.prod(latent_size(dict(arguments))) if kind == "unet" else 0
    return Size(longest.tokens, area, steps, longest.around)


def tokens_for(method: str, size: Size) -> int:
    """Those that its break-even point counts."""
    # Text is outside CLEAR's circles, and much of it hides how little of the picture there is.
    return size.tokens - size.text if method == Clear.name else size.tokens
