"""The registry of methods: a configuration and a strategy each."""

from __future__ import annotations

import difflib

from .adaspa import AdaSpa, AdaSpaStrategy
from .base import Config, Strategy
from .clear import Clear, ClearStrategy
from .hidiffusion import HiDiffusion, HiDiffusionStrategy
from .linfusion import LinFusion, LinFusionStrategy

CONFIGS: dict[str, type[Config]] = {config.name: config for config in (AdaSpa, Clear, HiDiffusion, LinFusion)}
STRATEGIES: dict[str, type[Strategy]] = {
    AdaSpa.name: AdaSpaStrategy,
    Clear.name: ClearStrategy,
    HiDiffusion.name: HiDiffusionStrategy,
    LinFusion.name: LinFusionStrategy,
}


def methods() -> tuple[str, ...]:
    """Names of the methods `attnswap.enable` takes."""
    return tuple(sorted(CONFIGS))


def config_of(method: str | Config) -> Config:
    """A method's configuration, from its name with default settings or as it is.

    Raises:
        ValueError: for an unknown name, with the near matches.
        TypeError: for anything that is neither a name nor a configuration.
    """
    if isinstance(method, Config):
        return method
    if not isinstance(method, str):
        raise TypeError(f"a method is a name or a configuration, not {type(method).__name__}")
    if method not in CONFIGS:
        near = difflib.get_close_matches(method, CONFIGS)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(methods())}"
        raise ValueError(f"no method {method!r}; {hint}")
    return CONFIGS[method]()
