"""One method, or several, in one denoiser: put in, kept in place, and taken out exactly."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .context import Clock, Context
from .errors import UnsupportedModel
from .families import FAMILIES, family_of
from .families.base import Family, Layout, NoGrid, Place, Slot, attention_layers
from .families.joint import chosen_backend
from .families.parallel import ContextParallel
from .methods import STRATEGIES
from .methods.base import Config, Strategy
from .observe import Call, Observer
from .report import Details, LayerPlan, LayerRecord, PlannedCall, Recorder

#: The attribute under which a denoiser holds what is installed in it.
ATTRIBUTE = "_attnswap"


#: By method that is to stay out of a call, why. It is given where tokens lie, the arguments, and the steps of the run.
Gate = Callable[[Mapping[str, Place], Mapping[str, Any], int | None], Mapping[str, str]]

#: What a report calls an installation without a method.
DENSE = "dense attention"


class Installation:
    """What `enable` does to one denoiser.

    Args:
        model: the denoiser.
        configs: methods that may be combined; none where `auto` chose none.
        clock: shared by the denoisers of a pipeline.
        pipeline: the pipeline that was enabled, if it was one.
        entry: the module a pipeline calls, where that is a compiled wrapper of `model`.
        gate: what leaves methods out of single calls.
    """

    def __init__(
        self,
        model: nn.Module,
        configs: Sequence[Config],
        clock: Clock,
        *,
        pipeline: Any = None,
        entry: nn.Module | None = None,
        gate: Gate | None = None,
    ) -> None:
        self.model = model
        self.family = family_of(model)
        self._pipeline_schedule: Any = None
        names = tuple(config.name for config in configs) or (DENSE,)
        _check_kind(model, self.family, names)
        config = configs[0].to_dict() if len(configs) == 1 else {c.name: c.to_dict() for c in configs}
        self.recorder = Recorder(type(model).__name__, names, config, details=self._details)
        self.context = Context(clock, self.recorder, self._schedule)
        self.strategies: list[Strategy] = [
            STRATEGIES[config.name](config, model, self.family, self.context, pipeline) for config in configs
        ]
        #: By layer, the methods that select it: who comes first has it in the calls in which it acts.
        self._claims: dict[str, list[Strategy]] = {}
        self.slots = self._plan(attention_layers(model))
        self._places = self.family.places(model)
        self._pipeline = pipeline
        self._entry = entry
        self._gate = gate
        self._observer: Observer | None = None
        self._passive = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pipeline": None}

    def prepare(self) -> None:
        """Fetch and check what the methods need, before anything is changed."""
        for strategy in self.strategies:
            strategy.prepare()

    def install(self, *, passive: bool = False) -> None:
        """Put everything in place.

        Args:
            passive: leave the processors to the user (`attn_processors`); until they are set, nothing changes.
        """
        vars(self.model)[ATTRIBUTE] = self
        self._passive = passive
        self._observer = Observer(
            self.model,
            self.context.clock,
            self._begin,
            on_end=self._rest,
            pipeline=self._pipeline,
            entry=self._entry,
        )
        self._pipeline = None  # from here on the observer knows it, weakly
        for slot in self.slots.values():
            slot.original = slot.module.processor  # while this was planned, another method may still have been in place
            self._occupy(slot, put=not passive)
        for strategy in self.strategies:
            strategy.install(passive=passive)
        self.recorder.keep_notes()

    def remove(self) -> None:
        """Take everything out: the same processor objects, no hook and no attribute is left."""
        for name, slot in self.slots.items():
            if isinstance(slot.module.processor, self.family.processor):
                set_processor(slot.module, slot.original)
            # Whoever kept our processor (a saved dictionary, say) keeps the original behaviour.
            slot.layout.plan = None
            # What `unfuse_qkv_projections` will put back, if projections were fused meanwhile.
            saved = getattr(self.model, "original_attn_processors", None) or {}
            if isinstance(ours := saved.get(f"{name}.processor"), self.family.processor):
                saved[f"{name}.processor"] = slot.original if ours.slot is None else ours.slot.original
        for strategy in reversed(self.strategies):
            strategy.remove()
        if self._observer is not None:
            self._observer.remove()
        vars(self.model).pop(ATTRIBUTE, None)

    def reset(self) -> None:
        """Forget run, counts and notes."""
        self.context.clock.reset()
        self.recorder.reset()
        for strategy in self.strategies:
            strategy.reset()

    def _rest(self) -> None:
        for strategy in self.strategies:
            strategy.rest()

    def _details(self) -> Details | None:
        found = [details for strategy in self.strategies if (details := strategy.details()) is not None]
        return found[0] if found else None

    def _schedule(self) -> Any:
        return (None, None) if self._observer is None else self._observer.schedule()

    def _plan(self, layers: Mapping[str, Any]) -> dict[str, Slot]:
        slots: dict[str, Slot] = {}
        reasons: dict[str, str] = {}
        kept: set[str] = set()
        for strategy in self.strategies:
            for name, reason in strategy.select(layers).items():
                module = layers[name]
                claims = self._claims.setdefault(name, [])
                if claims and not claims[0].gives_way_to(strategy):
                    claims.append(strategy)
                    continue
                if claims:
                    reason = f"{reason}, in place of {claims[0].config.name}"
                claims.insert(0, strategy)
                if isinstance(module.processor, nn.Module):
                    reasons[name] = f"{type(module.processor).__name__} holds weights and is kept"
                else:
                    slots[name] = Slot(module, module.processor, strategy, self.context, Layout(name))
                    reasons[name] = reason
                    original = self._seen_through(module.processor)
                    if not strategy.wraps and not self.family.exchangeable(original):
                        kept.add(name)
                        reasons[name] = f"{type(original).__name__} computes its own attention and is kept"
        self._hand_out(slots, self.strategies)
        for name in layers:
            reason = reasons.get(name) or "; ".join(dict.fromkeys(s.why_not(name) for s in self.strategies))
            self.recorder.layers[name] = LayerRecord(LayerPlan(name, name in slots and name not in kept, reason))
        return slots

    def _hand_out(self, slots: Mapping[str, Slot], at_work: Collection[Strategy]) -> None:
        """Give each layer to the first of the methods at work that selects it."""
        for name, slot in slots.items():
            slot.strategy = next((strategy for strategy in self._claims[name] if strategy in at_work), slot.strategy)
        for strategy in self.strategies:
            strategy.layers = frozenset(name for name, slot in slots.items() if slot.strategy is strategy)

    def _seen_through(self, processor: Any) -> Any:
        """The original a processor of ours stands for, or else the processor itself."""
        slot = processor.slot if isinstance(processor, self.family.processor) else None
        return processor if slot is None else slot.original

    def _occupy(self, slot: Slot, *, put: bool = True) -> Slot:
        """Give a slot a processor of its own, so that each keeps the original it stands for."""
        slot.processor = self.family.make_processor(slot.module)
        slot.processor.slot = slot
        if _names(slot.original) - _names(slot.processor):
            # `Attention.forward` hands on those arguments only that the signature of `processor.__call__` names.
            vars(slot.processor)["__call__"] = slot.original.__call__
        if put:
            set_processor(slot.module, slot.processor)
        return slot

    def _begin(self, call: Call) -> None:
        if not self._arm():
            return
        self.recorder.begin()
        if (parallel := ContextParallel.of(self.model)) is not None:
            exchanged = f"accelerated layers exchange heads for tokens over {parallel.ranks} ranks"
            self.recorder.remarks["parallel"] = f"context parallel: {exchanged}"
        self.plan(call, {name: slot.layout for name, slot in self.slots.items()})
        for name, slot in self.slots.items():
            in_graph = call.compiled or self._block_of(name)._compiled_call_impl is not None
            if in_graph and slot.layout.grid:
                tokens = slot.layout.place.tokens
                self.recorder.plan(name, PlannedCall(call.batch, tokens, slot.layout.plan))

    def plan(self, call: Call, layouts: Mapping[str, Layout]) -> None:
        """Have each method say what its layers are to do in a call.

        Args:
            layouts: by layer; those of layers that no method has only get their place.
        """
        try:
            places = self._places(call.arguments)
        except NoGrid as why:
            places = {}
            self.recorder.note(f"a call ran dense: {why}", warn=True)
        for name, layout in layouts.items():
            layout.place, layout.plan = places.get(name, Place()), None
            if name in self.slots:
                layout.backend = chosen_backend(self.slots[name].original)
        at_work = self._at_work(call, places)
        self._hand_out(self.slots, at_work)
        # Those that change the size of the maps come first, so that the others plan for what will be there.
        for strategy in sorted(at_work, key=lambda strategy: not strategy.resizes):
            strategy.begin(call, layouts)

    def _at_work(self, call: Call, places: Mapping[str, Place]) -> list[Strategy]:
        """The methods that are to act in a call: not those that it is too small for."""
        if self._gate is None or not places:
            return self.strategies
        left_out = self._gate(places, call.arguments, self.context.clock.steps)
        for strategy in self.strategies:
            if reason := left_out.get(strategy.config.name):
                self.recorder.note(f"a call ran without {strategy.config.name}: {reason}")
        return [strategy for strategy in self.strategies if strategy.config.name not in left_out]

    def _block_of(self, layer: str) -> nn.Module:
        return self.model.get_submodule(layer.rpartition(".")[0])

    def _arm(self) -> bool:
        """Make sure that the layers hold our processors; returns whether the method is to act.

        Loading an IP-Adapter re-creates processors from their class, fusing projections or slicing attention replaces
        them: neither may silently end the acceleration.
        """
        if self._passive and not any(
            isinstance(slot.module.processor, self.family.processor) for slot in self.slots.values()
        ):
            return False
        for name, slot in self.slots.items():
            current = slot.module.processor
            if current is slot.processor:
                continue
            if isinstance(current, self.family.processor):
                if current.slot is not None and current.slot.layout is slot.layout:
                    # One of our own is back, with the original it stands for: projections were unfused.
                    self.slots[name] = current.slot
                else:
                    self.recorder.note("a processor was re-created and armed again")
                    self.slots[name] = self._occupy(replace(slot))
            elif self._passive:
                continue
            elif isinstance(current, nn.Module):
                self.recorder.note(
                    f"a layer runs dense: its processor was replaced by {type(current).__name__}, which holds weights",
                    warn=True,
                )
            else:
                if current is not slot.original:
                    self.recorder.note(f"{type(current).__name__} was put in place of a processor and is now wrapped")
                self.slots[name] = self._occupy(replace(slot, original=current))
        return True


def _check_kind(model: nn.Module, family: Family, methods: Sequence[str]) -> None:
    for method in methods:
        if method != DENSE and family.kind not in STRATEGIES[method].kinds:
            fitting = [name for name, strategy in STRATEGIES.items() if family.kind in strategy.kinds]
            models = [known.model_class for known in FAMILIES if known.kind in STRATEGIES[method].kinds]
            raise UnsupportedModel(
                f"{method} does not work on {type(model).__name__}, which takes {', '.join(fitting)}; "
                f"{method} works on {', '.join(models)}"
            )


def _names(processor: Any) -> set[str]:
    return set(inspect.signature(processor.__call__).parameters)


def set_processor(module: Any, processor: Any) -> None:
    """Give an attention layer a processor, in the way its class wants it."""
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor


def check_combination(configs: Sequence[Config]) -> None:
    """Refuse methods that make no sense together.

    Raises:
        ValueError: without any.
        UnsupportedModel: naming the pair.
    """
    names = [config.name for config in configs]
    if not names:
        raise ValueError("no method given")
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if first == second:
                raise UnsupportedModel(f"{first} is given twice")
            if second not in STRATEGIES[first].yields_to and first not in STRATEGIES[second].yields_to:
                raise UnsupportedModel(
                    f"{first} and {second} cannot be combined: both decide what the same layers attend to"
                )


def installed_in(model: nn.Module) -> Installation | None:
    found: Installation | None = vars(model).get(ATTRIBUTE)
    return found
