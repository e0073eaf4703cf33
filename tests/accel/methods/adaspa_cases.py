"""AdaSpa by its definition (arXiv 2502.21079), dense and slow, inside any stock transformer; and short runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import attnswap
import torch
import torch.nn.functional as F
from attnswap import AdaSpa
from attnswap.accel.families.base import Place
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..families import image_models

#: Of a whole transformer in fp64 against the definition.
CLOSE = 1e-8
GRID, TEXT = (9, 14), 11
#: 137 tokens of FLUX in 9 blocks, the last of which has 9; the first holds the text and five tokens of the picture.
PLACE = Place(GRID, start=TEXT, around=TEXT)
SMALL = AdaSpa(sparsity=0.5, min_tokens=0, block=(16, 16), search_steps=(2, 4), recall_threshold=0.6)


def flux(*, heads: int = 4, sharpness: float = 2.0, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Two double blocks and two single ones, whose attention is not as even as that of random weights."""
    model = image_models.flux(**{"num_layers": 2, "num_attention_heads": heads, **changes}).to(dtype)
    return sharpen(model, sharpness)


def sharpen(model: Any, factor: float) -> Any:
    """Multiply the logits of a transformer that normalises queries."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("norm_q.weight", "norm_added_q.weight")):
                weight.mul_(factor)
    return model


@dataclass
class Steps:
    """A short run: a loop that follows the predictions of a model.

    Attributes:
        inputs: the arguments of a call.
        count: of its steps.
        texts: for each guidance branch, what it has in place of `encoder_hidden_states`.
        name_branches: call the model in a cache context.
    """

    inputs: dict[str, Any]
    count: int = 5
    texts: Sequence[Tensor] = ()
    name_branches: bool = False
    told: Callable[[int, int], None] = field(default=lambda step, branch: None)

    @property
    def timesteps(self) -> list[float]:
        whole = 1000 if self.inputs[self._clock].max() > 1 else 1
        return [whole * (1 - i / self.count) for i in range(self.count)]

    @property
    def _clock(self) -> str:
        return "t" if "t" in self.inputs else "timestep"

    def of(self, model: nn.Module, handle: attnswap.Handle | None = None, *, until: int | None = None) -> list[Tensor]:
        """The predictions, those of all branches of a step together; `told` hears of each call before it is made."""
        if handle is not None:
            handle.set_timesteps(self.timesteps)
        inputs = dict(self.inputs)
        latent = next(name for name in ("x", "hidden_states") if name in inputs)
        texts = list(self.texts) or [inputs.get("encoder_hidden_states")]
        found = []
        for step, timestep in enumerate(self.timesteps[:until], start=1):
            inputs[self._clock] = torch.full_like(self.inputs[self._clock], timestep)
            predictions = []
            for branch, text in enumerate(texts):
                self.told(step, branch)
                if text is not None:
                    inputs["encoder_hidden_states"] = text
                with torch.no_grad(), _context(model, branch if self.name_branches else None):
                    predictions.append(model(**inputs, return_dict=False)[0])
            found.append(torch.stack([_stacked(x) for x in predictions]))
            mean = found[-1].mean(0)
            if isinstance(inputs[latent], list):
                inputs[latent] = [x - 0.3 * change for x, change in zip(inputs[latent], mean, strict=True)]
            elif inputs[latent].shape == mean.shape:
                inputs[latent] = inputs[latent] - 0.3 * mean
            else:  # some have channels that they are given and do not predict
                inputs[latent] = inputs[latent] - 0.3 * mean.mean()
        return found


def _stacked(prediction: Any) -> Tensor:
    return torch.stack(prediction) if isinstance(prediction, list) else prediction


@contextmanager
def _context(model: Any, branch: int | None) -> Iterator[None]:
    if branch is None:
        yield
    else:
        with model.cache_context(f"branch {branch}"):
            yield


def steps(count: int = 5, *, batch: int = 1, grid: tuple[int, int] = GRID, text: int = TEXT, **more: Any) -> Steps:
    """Of `flux`; `branches` of guidance with texts of their own."""
    branches, dtype = more.pop("branches", 1), more.pop("dtype", torch.float64)
    inputs = in_dtype(image_models.flux_inputs(grid, text, batch), dtype)
    texts = [image_models.noise(batch, text, 32, seed=10 + branch).to(dtype) for branch in range(branches)]
    return Steps(inputs, count, texts, **more)


def in_dtype(inputs: Any, dtype: torch.dtype) -> Any:
    """The same arguments with all floating-point tensors in another precision."""
    if isinstance(inputs, dict):
        return {name: in_dtype(value, dtype) for name, value in inputs.items()}
    if isinstance(inputs, list):
        return [in_dtype(value, dtype) for value in inputs]
    floating = isinstance(inputs, Tensor) and inputs.is_floating_point()
    return inputs.to(dtype) if floating else inputs


@dataclass
class Memory:
    """What the definition remembers of a layer in a guidance branch: by query and key token, and block by block."""

    sees: Tensor | None = None
    lse: Tensor | None = None
    kept_blocks: Tensor | None = None
    recall: Tensor | None = None
    kept: Tensor | None = None
    level: Tensor | None = None
    searched_at: list[int] = field(default_factory=list)


class ByDefinition(TorchFunctionMode):
    """All attention of stock models over `place` by the definition, one step after the other.

    Args:
        search_at: steps of searches, counted from 1.
        layers: how many layers over the grid a call goes through.
        one_pass: the first search goes by the log-sum-exp of the step before.
        ranks: heads are shared out among so many, and ranked by each for itself.
    """

    def __init__(
        self,
        config: AdaSpa,
        place: Place,
        search_at: Sequence[int],
        layers: int,
        *,
        one_pass: bool = False,
        ranks: int = 1,
    ) -> None:
        super().__init__()
        self.one_pass, self.ranks = one_pass, ranks
        self.config, self.place, self.search_at, self.layers = config, place, search_at, layers
        #: By branch and number of the layer.
        self.memory: dict[tuple[int, int], Memory] = {}
        self.step, self.branch, self.calls = 0, 0, 0

    def tell(self, step: int, branch: int) -> None:
        """Before each call of the model."""
        assert self.calls in (0, self.layers), f"{self.calls} layers in the last call"
        self.step, self.branch, self.calls = step, branch, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        query = args[0] if args else (kwargs or {}).get("query")
        if func is not F.scaled_dot_product_attention or {x.shape[-2] for x in (query, _key(args, kwargs))} != {
            self.place.tokens
        }:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        """`[B, H, S, D]`."""
        layer, self.calls = self.calls, self.calls + 1
        batch, _, tokens, width = query.shape
        seen = torch.ones(batch, tokens, dtype=torch.bool)
        if attn_mask is not None:
            seen = attn_mask.expand(batch, 1, tokens, tokens).any(2)[:, 0]
        logits = query @ key.mT / math.sqrt(width)
        logits = logits.masked_fill(~seen[:, None, None], -math.inf)
        memory = self.memory.setdefault((self.branch, layer), Memory())
        if self.one_pass and self.step == self.search_at[0] - 1:
            memory.lse = logits.logsumexp(-1)
        arranged = self.config.reorder == "tile" or (attn_mask is not None and not self.place.hidden_last)
        dense = self.step <= self.search_at[0] or layer in self.config.dense_layers
        if self.step in self.search_at and layer not in self.config.dense_layers:
            memory.searched_at.append(self.step)
            orders = [self._order(seen[item]) if arranged else list(range(tokens)) for item in range(batch)]
            found = [self._search(logits[i], seen[i], memory.lse, i, orders[i]) for i in range(batch)]
            memory.sees, memory.kept_blocks, memory.recall, memory.kept, memory.level = (
                torch.stack(tensors) for tensors in zip(*found, strict=True)
            )
            memory.lse = logits.logsumexp(-1)
        if not dense:
            assert memory.sees is not None
            logits = logits.masked_fill(~memory.sees, -math.inf)
        return logits.softmax(-1) @ value

    def _search(
        self, logits: Tensor, seen: Tensor, lse: Tensor | None, item: int, order: list[int]
    ) -> tuple[Tensor, ...]:
        """Of one item, `[H, S, S]`: which keys each query sees and which blocks these are, recall, kept and level."""
        (rows, columns), tokens = self.config.block, len(order)
        reference = logits.logsumexp(-1) if lse is None else lse[item]
        weights = (logits - reference[..., None]).exp() * seen[:, None]
        weights = weights[:, order][:, :, order]
        visible = int(seen.sum())
        is_text = [position not in self._grid for position in order]
        row_of, column_of = [i // rows for i in range(tokens)], [i // columns for i in range(tokens)]
        query_blocks, key_blocks = row_of[-1] + 1, column_of[-1] + 1
        mass = torch.stack(
            [
                torch.stack([tile.sum((1, 2)) for tile in strip.split(columns, dim=2)], -1)
                for strip in weights.split(rows, dim=1)
            ],
            dim=1,
        )
        listed = mass.tolist()
        sink = self.config.text_sink
        text_rows = {row_of[i] for i in range(tokens) if sink and is_text[i]}
        text_columns = {column_of[i] for i in range(tokens) if sink and is_text[i]}
        within = {column_of[i] for i in range(visible)}
        video = sorted(within - text_columns)
        assert video

        def keep(head: int, sparsity: float) -> Tensor:
            count = min(max(math.ceil((1 - sparsity) * len(video) - 1e-6), 1), len(video))
            kept = [[False] * key_blocks for _ in range(query_blocks)]
            for p, row in enumerate(listed[head]):
                best = sorted(video, key=lambda q: -row[q])[:count]
                for q in within if p in text_rows else {*best, *(text_columns & within)}:
                    kept[p][q] = True
            return torch.tensor(kept)

        def recall(head: int, kept: Tensor) -> float:
            return float(mass[head][kept].sum() / mass[head].sum())

        heads, base = range(len(logits)), self.config.sparsity
        recalls = [recall(head, keep(head, base)) for head in heads]
        level = [0] * len(heads)
        for group in torch.arange(len(heads)).tensor_split(self.ranks) if self.config.head_adaptive else ():
            easy = sum(recalls[head] > self.config.recall_threshold for head in group.tolist())
            many = min(easy, len(group) // 2)
            ranking = sorted(group.tolist(), key=lambda head: (-recalls[head], head))
            for head in ranking[:many]:
                level[head] = 1
            for head in ranking[len(group) - many :]:
                level[head] = -1
        lower = max(0.0, (3 * base - 1) / 2)
        sparsities = {-1: lower, 0: base, 1: 2 * base - lower}
        blocks = torch.stack([keep(head, sparsities[level[head]]) for head in heads])
        by_token = blocks[:, row_of][:, :, column_of]
        sees = torch.zeros_like(by_token)
        sees[:, torch.tensor(order)[:, None], torch.tensor(order)[None]] = by_token
        kept = torch.tensor([recall(head, blocks[head]) for head in heads])
        return sees, blocks, torch.tensor(recalls), kept, torch.tensor(level)

    @property
    def _grid(self) -> range:
        return range(self.place.start, self.place.start + math.prod(self.place.grid))

    def _order(self, seen: Tensor) -> list[int]:
        """Tokens in the order in which blocks are made of them."""
        sides = {2: (8, 8), 3: (4, 4, 4)}[len(self.place.grid)]
        tiled = self.config.reorder == "tile"

        def place(token: int) -> Any:
            if token not in self._grid:
                # After the grid, what follows it first, and of all that the hidden tokens last.
                return (1, not bool(seen[token]), token < self.place.start, token)
            at = _coordinates(token - self.place.start, self.place.grid)
            return (0, [x // side for x, side in zip(at, sides, strict=True)] if tiled else [], token)

        return sorted(range(self.place.tokens), key=place)


def _key(args: Any, kwargs: Any) -> Tensor:
    key: Tensor = args[1] if len(args) > 1 else kwargs["key"]
    return key


def _coordinates(number: int, grid: Sequence[int]) -> list[int]:
    found = []
    for side in reversed(grid):
        number, at = divmod(number, side)
        found.append(at)
    return found[::-1]


def by_definition(
    model: Any,
    run: Steps,
    config: AdaSpa,
    place: Place = PLACE,
    *,
    search_at: Sequence[int] = (2, 4),
    layers: int = 4,
    **more: Any,
) -> tuple[list[Tensor], ByDefinition]:
    """The predictions of a copy of a stock model, and what the definition remembers."""
    oracle = ByDefinition(config, place, search_at, layers, **more)
    listening = copy.copy(run)
    listening.told = oracle.tell
    stock = copy.deepcopy(model)
    attnswap.disable(stock)
    with oracle:
        return listening.of(stock), oracle


def largest_difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    assert len(found) == len(wanted)
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


def layers_of(handle: attnswap.Handle, denoiser: int = 0) -> list[dict[str, Any]]:
    """Of the report, those that are accelerated."""
    found = handle.report().to_dict()["denoisers"][denoiser]["layers"]
    return [layer for layer in found if layer["accelerated"]]


def counts_of(handle: attnswap.Handle, denoiser: int = 0) -> tuple[int, int, int]:
    """(dense, searched, sparse) calls of each layer, of which all have had the same."""
    found = {
        (layer["dense_calls"], layer["searches"], layer["accelerated_calls"]) for layer in layers_of(handle, denoiser)
    }
    [counts] = found
    return counts
