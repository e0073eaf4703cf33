"""AdaSpa: block-sparse attention by masks that an exact search finds while a clip is made (arXiv 2502.21079)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from ... import kernels
from ..context import Context
from ..errors import UnsupportedModel
from ..families.base import Family, Layout, Place
from ..families.parallel import ContextParallel
from ..observe import Call
from ..report import Details
from ..stopwatch import Span, Stopwatch
from .adaspa_graph import Seat, attend_in_graph
from .adaspa_order import Arrangement, TileOrder
from .adaspa_report import details_of
from .adaspa_schedule import PUBLISHED, Phase, UnknownSteps, check_search_steps, steps_of_run
from .adaspa_state import CallShape, LayerState, Mode, SparsePlan, expected_pairs
from .base import Config, Strategy

_SIDES = (16, 32, 64, 128)
#: How far a query may have moved from its last search, down and up, before exponents of the kernels are clamped.
_LOWEST_SHIFT, _HIGHEST_SHIFT = -60.0, 59.0
#: More guidance branches without a name than any pipeline has.
_TOO_MANY_BRANCHES = 16


@dataclass(frozen=True)
class AdaSpa(Config):
    """Adaptive block-sparse attention in video and image transformers: less work for long clips; needs no training.

    Up to the first search step attention is dense. A search computes all scores exactly, block by block, and keeps in
    each row of blocks those with the largest share of the attention; later steps compute only these.

    Under context parallelism each rank has a share of the heads, and ranks these among themselves.

    Attributes:
        sparsity: share of the video's key blocks that each query does without, 0 to below 1; 0 is dense.
        block: tokens of a query block and of a key block, each 16, 32, 64 or 128.
        search_steps: steps with a search, counted from 1, or fractions of the run (floats). The default is the
            published one for 50 steps, and is scaled to runs of other lengths.
        head_adaptive: give heads that a search finds easy a higher sparsity and as many others a lower one, with the
            same mean.
        recall_threshold: a head is easy if the blocks it keeps hold more than this share of its attention.
        text_sink: attention from and to tokens outside the video's grid (text) is never dropped.
        dense_layers: layers that stay dense, by their number in the order of the model, from 0.
        reorder: "none", blocks of consecutive tokens, or "tile", blocks of neighbours in time and space (ours, not
            the paper's).
        min_tokens: shorter calls, text included, stay dense.

    Raises:
        ValueError: for a value no run could use.
    """

    name: ClassVar[str] = "adaspa"

    sparsity: float = 0.8
    block: tuple[int, int] = (64, 64)
    search_steps: tuple[int | float, ...] = PUBLISHED
    head_adaptive: bool = True
    recall_threshold: float = 0.8
    text_sink: bool = True
    dense_layers: tuple[int, ...] = ()
    reorder: Literal["none", "tile"] = "none"
    min_tokens: int = 4096

    def __post_init__(self) -> None:
        for name in ("block", "search_steps", "dense_layers"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list | tuple) else (value,))
        if not _is_number(self.sparsity) or not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be at least 0 and below 1, got {self.sparsity!r}")
        if len(self.block) != 2 or not all(_is_whole(side) and side in _SIDES for side in self.block):
            raise ValueError(f"block must be (query tokens, key tokens), each of {_SIDES}, got {self.block!r}")
        check_search_steps(self.search_steps)
        if not _is_number(self.recall_threshold) or not 0 <= self.recall_threshold <= 1:
            raise ValueError(f"recall_threshold must be from 0 to 1, got {self.recall_threshold!r}")
        for name in ("head_adaptive", "text_sink"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if any(not _is_whole(layer) or layer < 0 for layer in self.dense_layers):
            raise ValueError(f"dense_layers must be numbers of layers, from 0, got {self.dense_layers!r}")
        if self.reorder not in ("none", "tile"):
            raise ValueError(f"reorder must be 'none' or 'tile', got {self.reorder!r}")
        if not _is_whole(self.min_tokens) or self.min_tokens < 0:
            raise ValueError(f"min_tokens must be a whole number, at least 0, got {self.min_tokens!r}")


class AdaSpaStrategy(Strategy):
    """AdaSpa at work on one transformer."""

    config: AdaSpa
    kinds: ClassVar[frozenset[str]] = frozenset({"video", "image"})

    def __init__(
        self, config: AdaSpa, model: nn.Module, family: Family, context: Context, pipeline: Any = None
    ) -> None:
        super().__init__(config, model, family, context, pipeline)
        self._dense: frozenset[str] = frozenset()
        self.reset()

    def select(self, layers: Mapping[str, nn.Module]) -> dict[str, str]:
        ours = [name for name in layers if self.family.self_attention(name)]
        if not ours:
            raise UnsupportedModel(f"{type(self.model).__name__} has no self-attention over its tokens for adaspa")
        config = self.config
        if beyond := [number for number in config.dense_layers if number >= len(ours)]:
            raise ValueError(
                f"dense_layers names {', '.join(map(str, beyond))}, but {type(self.model).__name__} has "
                f"{len(ours)} self-attention layers, 0 to {len(ours) - 1}"
            )
        self._dense = frozenset(ours[number] for number in config.dense_layers)
        if config.sparsity == 0:
            self.context.recorder.remarks["sparsity"] = "sparsity 0: every layer stays dense"
        reason = f"block-sparse attention, {config.sparsity:.0%} of the blocks dropped"
        return {name: reason for name in ours if name not in self._dense}

    def why_not(self, layer: str) -> str:
        return "dense_layers names it" if layer in self._dense else "not self-attention over the picture or clip"

    def remove(self) -> None:
        self.rest()  # masks are kept for reports, which are asked for after the end of a `with` block, too

    def rest(self) -> None:
        self._texts.clear()
        for state in self._states.values():
            state.put_away()

    def reset(self) -> None:
        #: By guidance branch and layer.
        self._states: dict[tuple[int, str], LayerState] = {}
        #: Of branches without a name; held, so that no other text can get its address.
        self._texts: dict[int, Tensor | None] = {}
        self._called: set[tuple[int, int]] = set()  # step and branch
        #: Layers without numbers, dense for the run.
        self._lost: set[str] = set()
        self._watches: dict[str, Stopwatch] = {}
        self._seats: dict[str, Seat] = {}
        self._tile_orders: dict[tuple[Any, ...], TileOrder] = {}
        #: In a rehearsal, pairs by the place of a layer's tokens.
        self._expected: dict[Place, Tensor] = {}
        self._span = Span()
        self._run: int | None = None

    def details(self) -> Details:
        return details_of(sorted(self.layers | self._dense), self._states, self._watches, self._span)

    # Each call.

    def begin(self, call: Call, layouts: Mapping[str, Layout]) -> None:
        clock, recorder = self.context.clock, self.context.recorder
        hidden = call.first("hidden_states", "x", "sample")
        like = hidden[0] if isinstance(hidden, list | tuple) else hidden
        if clock.run != self._run:
            for of_a_run in (self._states, self._texts, self._called, self._lost):
                of_a_run.clear()
            self._span.begin(like.device)
            self._run = clock.run
        self._span.reach()
        if self.config.sparsity == 0:
            return
        assert clock.step is not None  # it has ticked
        try:
            search_at = steps_of_run(self.config.search_steps, clock.steps)
        except UnknownSteps as why:
            recorder.note(f"a call ran dense: {why}", warn=True)
            return
        phase = Phase.of(clock.step + 1, search_at)
        recorder.remarks["searches"] = searches_in_words(search_at, clock.steps)
        parallel = ContextParallel.of(self.model)
        if parallel is not None and self.config.head_adaptive:
            recorder.remarks["levels"] = "heads are ranked among those of a rank"
        self._give_up_where_there_are_no_numbers(parallel)
        if (clock.step, clock.branch) in self._called:
            recorder.note(
                "two calls of one step have the same text and share their masks; name them by "
                "model.cache_context(name) if they are not of the same picture",
                warn=True,
            )
        self._called.add((clock.step, clock.branch))
        if not clock.named and clock.branch >= _TOO_MANY_BRANCHES:
            recorder.note(
                "a call ran dense: each brings another text tensor, so that guidance branches cannot be told apart; "
                "pass the same one at each step, or name them by model.cache_context(name)",
                warn=True,
            )
            return
        if not clock.named:
            self._texts.setdefault(clock.branch, None if call.text is None else call.text.detach())
        least, short, late = self.config.min_tokens, set(), False
        # In the order of the model, which is the same on all ranks.
        for name, layout in layouts.items():
            if name not in self.layers or name in self._lost or not layout.grid:
                continue
            if layout.place.tokens < least:
                short.add(layout.place.tokens)
                continue
            state = self._state(name, CallShape(call.batch, layout.place, like.device, like.dtype))
            mode = self._mode(phase, state, layout.backend)
            late |= mode is Mode.FIRST and phase.step > search_at[0]
            if mode is not None:
                layout.plan = SparsePlan(mode, state, phase, self._seat(layout).number)
        for tokens in sorted(short):
            recorder.note(f"attention over {tokens} tokens ran dense: min_tokens is {least}", warn=True)
        if late:
            recorder.note(
                "a call after the first search had no mask and ran dense with a search: a transformer, a guidance "
                "branch or a size of batch that began late"
            )

    def _state(self, layer: str, shape: CallShape) -> LayerState:
        state = self._states.get((self.context.clock.branch, layer))
        if state is None or state.shape != shape:
            # Guidance that is cut off in mid-run halves the batch: the mask was for another call then.
            state = self._states[self.context.clock.branch, layer] = LayerState(shape)
        return state

    def _seat(self, layout: Layout) -> Seat:
        if layout.layer not in self._seats:
            self._seats[layout.layer] = Seat(partial(self._attend, layout))
        return self._seats[layout.layer]

    def _mode(self, phase: Phase, state: LayerState, backend: str | None) -> Mode | None:
        """None is the model's own dense attention."""
        if phase.due is None:
            return Mode.KEEP_LSE if phase.ends_warm_up and backend is None and state.shape.fuses else None
        if state.searched_at is None:
            # The first search step; or the first call of a second transformer, or of another batch.
            return Mode.FIRST
        # A cache may have left the layer out in the very step of a search.
        return Mode.AGAIN if state.searched_at < phase.due else Mode.SPARSE

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        context: Context,
        *,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        if torch.compiler.is_compiling():
            out: Tensor = attend_in_graph(query, key, value, key_mask, layout.plan.seat)
            return out
        return self._attend(layout, query, key, value, key_mask)

    def _attend(self, layout: Layout, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        plan: SparsePlan = layout.plan
        plan.ran = True
        dense = None
        if plan.mode is Mode.FIRST and layout.backend is not None:
            # The user's own kernel, as in the steps before: it gives no log-sum-exp.
            mask = None if key_mask is None else key_mask[:, None, None]
            dense = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=layout.backend)  # type: ignore[arg-type]
        arrangement = Arrangement.of(layout.place, self._tile_order(layout, query.device), key_mask)
        query, key, value = (arrangement.arrange(x) for x in (query, key, value))
        lengths = arrangement.lengths
        if plan.mode is Mode.KEEP_LSE:
            out, lse = kernels.dense_attention(query, key, value, kv_lengths=lengths, return_lse=True)
            plan.state.lse = lse.detach()
        elif plan.mode is Mode.FIRST:
            out = self._search_first(query, key, value, layout, arrangement, dense_known=dense is not None)
        else:
            if plan.mode is Mode.AGAIN:
                self._search_again(query, key, layout, arrangement)
            out = self._attend_sparsely(query, key, value, layout, lengths)
        self._span.reach()
        return arrangement.restore(out) if dense is None else dense

    def rehearse(self, layout: Layout) -> None:
        plan: SparsePlan = layout.plan
        if not plan.searches:
            return
        place, config = layout.place, self.config
        if place not in self._expected:
            text = Arrangement.of(place, self._tile_order(layout, torch.device("cpu")), None).text
            self._expected[place] = expected_pairs(
                place.tokens, config.block, config.sparsity, text if config.text_sink else ()
            )
        plan.state.pairs, plan.state.searched_at = self._expected[place], plan.phase.step

    def _search_first(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        arrangement: Arrangement,
        *,
        dense_known: bool,
    ) -> Tensor:
        """Dense attention, and the scores of its blocks: in one pass where the step before left a log-sum-exp."""
        state: LayerState = layout.plan.state
        lengths, block = arrangement.lengths, self.config.block
        watch = self._watch(layout.layer)
        reference, out = state.lse, query
        if dense_known:
            with watch.time("search", query.device):
                scores, lse = kernels.block_scores(query, key, None, block=block, kv_lengths=lengths)
        elif reference is not None:
            with watch.time("dense_search", query.device):
                out, lse, scores = kernels.dense_attention_with_scores(
                    query, key, value, reference, block=block, kv_lengths=lengths
                )
        else:
            out, reference = kernels.dense_attention(query, key, value, kv_lengths=lengths, return_lse=True)
            with watch.time("search", query.device):
                scores, lse = kernels.block_scores(query, key, reference, block=block, kv_lengths=lengths)
        self._keep(query, key, scores, lse, reference, layout, arrangement)
        return out

    def _search_again(self, query: Tensor, key: Tensor, layout: Layout, arrangement: Arrangement) -> None:
        reference, block = layout.plan.state.lse, self.config.block
        with self._watch(layout.layer).time("search", query.device):
            scores, lse = kernels.block_scores(query, key, reference, block=block, kv_lengths=arrangement.lengths)
        self._keep(query, key, scores, lse, reference, layout, arrangement)

    @torch.no_grad()
    def _keep(
        self,
        query: Tensor,
        key: Tensor,
        scores: Tensor,
        lse: Tensor,
        reference: Tensor | None,
        layout: Layout,
        arrangement: Arrangement,
    ) -> None:
        """Make the mask of a layer from the scores of its blocks."""
        plan: SparsePlan = layout.plan
        lse = lse.detach()
        with self._watch(layout.layer).time("mask", scores.device):
            selection = kernels.select_blocks(
                scores.detach(),
                sparsity=self.config.sparsity,
                block=self.config.block,
                text=arrangement.text if self.config.text_sink else (),
                kv_lengths=arrangement.lengths,
                head_adaptive=self.config.head_adaptive,
                recall_threshold=self.config.recall_threshold,
            )
            clamped = None
            if reference is not None:
                shift = lse - reference
                clamped = ((shift <= _LOWEST_SHIFT) | (shift >= _HIGHEST_SHIFT)).sum()
            # The scores would not tell: their exponents are clamped.
            finite = torch.stack([*query.aminmax(), *key.aminmax()]).isfinite().all()
        plan.state.keep(selection, lse, clamped=clamped, finite=finite, phase=plan.phase)

    def _attend_sparsely(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, lengths: Tensor | None
    ) -> Tensor:
        mask = layout.plan.state.mask_on(query.device)
        backend = kernels.explain("block_sparse_attention", query, key, value, mask, kv_lengths=lengths).backend
        self.context.recorder.ran_on(layout.layer, backend)
        out = kernels.block_sparse_attention(query, key, value, mask, kv_lengths=lengths)
        assert isinstance(out, Tensor)
        return out

    def _give_up_where_there_are_no_numbers(self, parallel: ContextParallel | None) -> None:
        """Layers in which the last search met NaN or infinity stay dense for the run, on all ranks alike. Waits for
        the device, but only once after a search."""
        found = [(name, state) for (_, name), state in self._states.items() if not state.checked]
        if not found:
            return
        finite = torch.stack([state.finite.to(found[0][1].shape.device) for _, state in found])  # type: ignore[union-attr]
        if parallel is not None:
            finite = finite.int()
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN, group=parallel.group)
        for (name, state), is_finite in zip(found, finite.tolist(), strict=True):
            state.checked = True
            if not is_finite and name not in self._lost:
                self._lost.add(name)
                self.context.recorder.note(
                    f"{name} runs dense for the rest of the run: its query or key is not finite", warn=True
                )
        for (_, name), state in self._states.items():
            if name in self._lost:
                state.give_up()

    def _tile_order(self, layout: Layout, device: torch.device) -> TileOrder | None:
        if self.config.reorder == "none":
            return None
        where = (layout.grid, device)
        if where not in self._tile_orders:
            self._tile_orders[where] = TileOrder.of(layout.grid, device)
        return self._tile_orders[where]

    def _watch(self, layer: str) -> Stopwatch:
        return self._watches.setdefault(layer, Stopwatch())


def searches_in_words(search_at: tuple[int, ...], steps: int | None) -> str:
    run = "" if steps is None else f" of {steps}"
    dense = f"dense up to step {search_at[0]}" if search_at[0] > 1 else "dense in the first step"
    return f"searches at step{'s' * (len(search_at) > 1)} {', '.join(map(str, search_at))}{run}, {dense}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
