"""Watching a denoiser's own calls, so that no pipeline has to be changed to know where a run stands.

A plain torch forward pre-hook survives every order of offloading, LoRA and compilation of blocks. Diffusers' own hook
registry is used only to receive what it alone hands out: the cache context's name and step, and the end of a run.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from .context import Clock, Schedule

_CARRIER = "attnswap_carrier"
_TIMESTEPS = ("timestep", "t")
_TEXTS = ("encoder_hidden_states", "cap_feats")


@dataclass
class Call:
    """One call of a denoiser, its arguments by name.

    `edited` says that a method has changed one, `compiled` that the whole denoiser runs as a compiled graph.
    """

    arguments: dict[str, Any]
    edited: bool = False
    compiled: bool = False

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        # The class's own signature: offloading replaces `forward` on the instance.
        names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
        return cls({**dict(zip(names, args, strict=False)), **kwargs})

    def first(self, *names: str) -> Any:
        return next((self.arguments[name] for name in names if self.arguments.get(name) is not None), None)

    def set(self, name: str, value: Any) -> None:
        self.arguments[name] = value
        self.edited = True

    @property
    def timestep(self) -> torch.Tensor | float:
        found: torch.Tensor | float | None = self.first(*_TIMESTEPS)
        if found is None:
            raise ValueError(f"a denoiser call without {' or '.join(_TIMESTEPS)}: {sorted(self.arguments)}")
        return found

    @property
    def batch(self) -> int:
        return len(self.first("sample", "hidden_states", "x"))

    @property
    def text(self) -> torch.Tensor | None:
        """The text tensor, the first one of a list."""
        text = self.first(*_TEXTS)
        text = text[0] if isinstance(text, list | tuple) else text
        return text if isinstance(text, torch.Tensor) else None

    @property
    def text_address(self) -> int:
        """Where the text tensor lives: it alternates between guidance branches and stays when a step repeats."""
        return 0 if self.text is None else self.text.data_ptr()


class _NoState(BaseState):
    def reset(self) -> None:
        pass


class _Carrier(ModelHook):
    """Passes everything through; Diffusers hands cache contexts and resets to hooks of its registry only."""

    _is_stateful = True

    def __init__(self, on_end: Callable[[], None]) -> None:
        super().__init__()
        self.manager = StateManager(_NoState)  # type: ignore[arg-type]
        self._on_end = on_end

    @property
    def context(self) -> CacheContext | None:
        return self.manager._context

    def reset_state(self, module: nn.Module) -> nn.Module:
        self._on_end()
        return module


class _Announced:
    """A model compiled in place (`model.compile()`), with a word to the observer before each call."""

    def __init__(self, observer: Observer, compiled: Callable[..., Any]) -> None:
        self._observer = observer
        self.compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._observer._announce(self._observer.model, args, kwargs)
        return self.compiled(*args, **kwargs)


class Observer:
    """Ticks a clock at each call of `model` and then tells `on_call`, outside any compiled region.

    Args:
        model: the denoiser.
        clock: shared by the denoisers of a pipeline.
        on_call: gets the `Call` and may edit it.
        on_end: is told when Diffusers says that a pipeline's run is over.
        pipeline: asked for its scheduler's list of timesteps; held weakly.
        entry: the module whose call is watched, where it is not `model` (the wrapper that `torch.compile` returns).
    """

    def __init__(
        self,
        model: nn.Module,
        clock: Clock,
        on_call: Callable[[Call], None],
        *,
        on_end: Callable[[], None] | None = None,
        pipeline: Any = None,
        entry: nn.Module | None = None,
    ) -> None:
        self.model = model
        self.clock = clock
        self._on_call = on_call
        self._on_end = on_end
        self._pipeline = None if pipeline is None else _weakly(pipeline)
        self._carrier: _Carrier | None = None
        self._undo: list[tuple[nn.Module, str]] = []
        self._compiled_entry = entry is not None
        self._announced = False
        self._announced_timestep: object = None
        self._watch_compiled()
        self._hook = (model if entry is None else entry).register_forward_pre_hook(self._before, with_kwargs=True)
        if hasattr(model, "cache_context"):
            self._install_carrier()
        elif not hasattr(model, "_reset_stateful_cache"):
            # `DiffusionPipeline.maybe_free_model_hooks` calls this at the end of a run if it is there.
            vars(model)["_reset_stateful_cache"] = self._end

    def __getstate__(self) -> dict[str, Any]:
        # A copied or unpickled model belongs to no pipeline yet.
        return {**vars(self), "_pipeline": None}

    @property
    def pipeline(self) -> Any:
        return None if self._pipeline is None else self._pipeline()

    def remove(self) -> None:
        self._hook.remove()
        self._unwatch_compiled()
        if self._carrier is not None:
            self._remove_carrier()
        if vars(self.model).get("_reset_stateful_cache") == self._end:
            del self.model._reset_stateful_cache

    def schedule(self) -> tuple[Schedule | None, int | None]:
        """The pipeline's list of timesteps and how many of them it says it runs."""
        pipeline = self.pipeline
        timesteps = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
        if not isinstance(timesteps, torch.Tensor) or timesteps.ndim != 1 or timesteps.numel() == 0:
            return None, None
        steps = getattr(pipeline, "_num_timesteps", None)
        steps = steps if isinstance(steps, int) else None
        # The pipeline's number may be that of an earlier run, before another pipeline took over: the list itself is
        # surer, except where SDXL stops before its end.
        stops_early = getattr(pipeline, "denoising_end", None) is not None
        return Schedule(timesteps, at_most=steps if stops_early else None), steps

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        announced, self._announced = self._announced, False
        if torch.compiler.is_compiling():
            if not announced:
                raise RuntimeError(
                    "attnswap cannot see the denoising step from inside a compiled graph: use torch.compile(model) or "
                    "compile_repeated_blocks(), or call model.compile() before enabling"
                )
            return None
        # Where compiling is off for a while, the announced call comes here; one whose graph failed never did.
        if announced and self._announced_timestep is Call.of(self.model, args, kwargs).timestep:
            return None
        call = self._tick(args, kwargs, compiled=self._compiled_entry)
        return ((), call.arguments) if call.edited else None

    def _announce(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The same from outside a graph that holds the whole model, where the hook itself is traced."""
        if any(isinstance(x, FakeTensor) for x in (*args, *kwargs.values())):
            return  # being traced as a part of something larger
        call = self._tick(args, kwargs, compiled=True)
        if call.edited:
            kwargs.update({name: value for name, value in call.arguments.items() if name in kwargs})
        self._announced, self._announced_timestep = True, call.timestep

    def _tick(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, compiled: bool) -> Call:
        call = Call.of(self.model, args, kwargs)
        call.compiled = compiled
        official = None if self._carrier is None else self._carrier.context
        schedule, steps = self.schedule()
        self.clock.tick(
            call.timestep,
            call.text_address if official is None else official.name,
            schedule=schedule,
            steps=steps if official is None or official.num_inference_steps is None else official.num_inference_steps,
            step_index=None if official is None else official.step_index,
        )
        self._on_call(call)
        return call

    def _end(self) -> None:
        self.clock.reset()
        if self._on_end is not None:
            self._on_end()

    def _watch_compiled(self) -> None:
        """Be told of calls of a whole compiled model before its graph runs."""
        attributes = vars(self.model)
        if (compiled := attributes.get("_compiled_call_impl")) is not None:
            attributes["_compiled_call_impl"] = _Announced(self, compiled)
        # What a later `torch.compile(model)` asks of a lazy module before each call, outside the graph.
        attributes["_initialize_hook"] = True
        attributes["_infer_parameters"] = self._announce

    def _unwatch_compiled(self) -> None:
        attributes = vars(self.model)
        if isinstance(wrapped := attributes.get("_compiled_call_impl"), _Announced):
            attributes["_compiled_call_impl"] = wrapped.compiled
        for name in ("_initialize_hook", "_infer_parameters"):
            attributes.pop(name, None)

    def _install_carrier(self) -> None:
        child = _carrier_child(self.model)
        for module, name in ((self.model, "_diffusers_hook"), (child, "_diffusers_hook"), (child, "forward")):
            if name not in vars(module):
                self._undo.append((module, name))
        self._carrier = _Carrier(self._end)
        HookRegistry.check_if_exists_or_initialize(child).register_hook(self._carrier, _CARRIER)
        HookRegistry.check_if_exists_or_initialize(self.model).invalidate_child_registries_cache()

    def _remove_carrier(self) -> None:
        registry = HookRegistry.check_if_exists_or_initialize(self.model)
        registry.remove_hook(_CARRIER, recurse=True)
        registry.invalidate_child_registries_cache()
        # Registering leaves an empty registry and a bound `forward` on the instance: take away what was not there.
        for module, name in self._undo:
            left = vars(module).get(name)
            in_use = (
                left.hooks
                if isinstance(left, HookRegistry)
                else "_diffusers_hook" in vars(module) and (vars(module)["_diffusers_hook"].hooks)
            )
            if not in_use:
                vars(module).pop(name, None)
        self._carrier = None


def forget_cached_features(model: nn.Module) -> None:
    """Empty Diffusers' caches: what they keep of earlier calls has other sizes from now on."""
    for module in model.modules():
        registry = vars(module).get("_diffusers_hook")
        for name, hook in registry.hooks.items() if registry is not None else ():
            if hook._is_stateful and name != _CARRIER:
                hook.reset_state(module)


def _weakly(target: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(target)
    except TypeError:  # a plain holder of a denoiser
        return lambda: target


def _carrier_child(model: nn.Module) -> nn.Module:
    """A module outside the repeated blocks that nobody else hooks: one without tensors, else the first child.

    Not one whose positions a method may change: in a copy of the model a hooked forward is still the original's.
    """
    children = [child for child in model.children() if not isinstance(child, nn.ModuleList)]
    for child in children:
        for module in child.modules():
            own = any(True for _ in (*module.parameters(), *module.buffers(), *module.children()))
            if not own and not hasattr(module, "theta"):
                return module
    for child in children:
        if any(True for _ in child.parameters()):
            return child
    raise ValueError(f"{type(model).__name__} has no module outside its blocks to carry the cache context")
