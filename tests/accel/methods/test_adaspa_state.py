"""What AdaSpa remembers is of one layer, guidance branch and run, and never used for anything else."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import attnswap
import pytest
import torch
from attnswap import AdaSpa
from diffusers import FluxPipeline
from diffusers.models import attention_dispatch

from .. import tiny_dit, video_models
from . import adaspa_cases as cases
from .adaspa_cases import CLOSE, SMALL, largest_difference
from .common import notes

#: Dense, dense with a search, sparse, sparse with a search, sparse.
CONFIG = replace(SMALL, search_steps=(2, 4))


def small() -> Any:
    return cases.flux(heads=2, dtype=torch.float32, num_layers=1, num_single_layers=1)


def short(**more: Any) -> cases.Steps:
    return cases.steps(**{"grid": (6, 8), "text": 7, "dtype": torch.float32, **more})


# Guidance.


@pytest.mark.parametrize("named", [True, False], ids=["named", "told by their text"])
def test_branches_of_guidance_share_nothing(named: bool) -> None:
    model, run = cases.flux(heads=2), cases.steps(branches=2, name_branches=named)
    wanted, oracle = cases.by_definition(model, run, CONFIG)
    handle = attnswap.enable(model, CONFIG)
    assert largest_difference(run.of(model, handle), wanted) <= CLOSE
    blocks = [oracle.memory[branch, 3].kept_blocks for branch in (0, 1)]
    assert not torch.equal(*blocks), "they would keep other blocks"
    assert cases.counts_of(handle) == (4, 4, 6)
    for number, layer in enumerate(cases.layers_of(handle)):
        for branch in (0, 1):
            assert layer["branches"][branch]["level"] == oracle.memory[branch, number].level.tolist()


def test_texts_made_anew_for_each_call_never_share_a_mask() -> None:
    """The second would lie where the first was, if nobody held that."""
    model, run = small(), short(count=10)
    texts = [torch.randn(1, 7, 32, dtype=torch.float64) for _ in range(2)]
    handle = attnswap.enable(model, CONFIG)
    handle.set_timesteps(run.timesteps)
    clock, seen = model._attnswap.context.clock, set()

    def call(timestep: float, which: int) -> None:
        step = {"timestep": torch.tensor([timestep]), "encoder_hidden_states": texts[which].float()}
        with torch.no_grad():
            model(**{**run.inputs, **step})
        seen.add((clock.branch, which))

    # From the seventeenth on, nothing is remembered.
    for number in range(16):
        call(run.timesteps[number // 2], number % 2)
    assert len(seen) == 16 == len({branch for branch, _ in seen})
    with pytest.warns(attnswap.AttnswapWarning, match="another text tensor, so that guidance branches cannot be told"):
        call(run.timesteps[8], 0)


@pytest.mark.filterwarnings("error::attnswap.AttnswapWarning")
def test_branches_that_have_names_may_be_many() -> None:
    """As windows of a long clip are."""
    model, run = small(), short(count=3, branches=20, name_branches=True)
    handle = attnswap.enable(model, replace(CONFIG, search_steps=(1,)))
    run.of(model, handle)
    assert cases.counts_of(handle) == (20, 20, 40)
    assert notes(handle) == {}


def test_two_calls_of_a_step_with_the_same_text_are_said_to_share_a_mask() -> None:
    """Two tiles of one picture, say."""
    model, run = small(), short()
    handle = attnswap.enable(model, CONFIG)
    handle.set_timesteps(run.timesteps)

    def steps(*names: str) -> None:
        for timestep in run.timesteps:
            for tile, name in enumerate(names):
                call = {"hidden_states": run.inputs["hidden_states"] + tile, "timestep": torch.tensor([timestep])}
                with torch.no_grad(), model.cache_context(name):
                    model(**{**run.inputs, **call})

    with warnings.catch_warnings():
        warnings.simplefilter("error", attnswap.AttnswapWarning)
        steps("first", "second")
    handle.reset()
    handle.set_timesteps(run.timesteps)
    with pytest.warns(attnswap.AttnswapWarning, match=r"share their masks; name them by model.cache_context\(name\)"):
        steps("same", "same")


def test_pictures_of_one_batch_share_nothing() -> None:
    model, run = small(), short(batch=2)
    with attnswap.enabled(model, CONFIG) as handle:
        together = run.of(model, handle)
    for item in (0, 1):
        one = {name: value[item : item + 1] if len(value) == 2 else value for name, value in run.inputs.items()}
        with attnswap.enabled(model, CONFIG) as handle:
            alone = cases.Steps(one, texts=[run.texts[0][item : item + 1]]).of(model, handle)
        assert largest_difference([x[:, item : item + 1] for x in together], alone) < 1e-5


# Runs.


class Stopped(Exception):
    """Stands for a run that is out of memory, or that somebody stopped."""


def stop(pipe: Any, step: int, timestep: Any, arguments: Any) -> Any:
    if step == 2:
        raise Stopped
    return arguments


def sample(pipe: Any, arguments: dict[str, Any], **more: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    changes = {"height": 32, "width": 48, "num_inference_steps": 5, "output_type": "latent", "generator": generator}
    out: torch.Tensor = pipe(**{**arguments, **changes, **more})[0]
    return out


def stopped(pipe: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(Stopped):
        sample(pipe, arguments, callback_on_step_end=stop)


def stopped_twice(pipe: Any, arguments: dict[str, Any]) -> None:
    stopped(pipe, arguments)
    stopped(pipe, arguments)


def of_another_size(pipe: Any, arguments: dict[str, Any]) -> None:
    sample(pipe, arguments, height=48, width=24)


def of_other_steps(pipe: Any, arguments: dict[str, Any]) -> None:
    sample(pipe, arguments, num_inference_steps=7)


def of_two_pictures(pipe: Any, arguments: dict[str, Any]) -> None:
    sample(pipe, arguments, num_images_per_prompt=2)


def without_guidance(pipe: Any, arguments: dict[str, Any]) -> None:
    sample(pipe, arguments, true_cfg_scale=1.0)


def by_another_pipeline(pipe: Any, arguments: dict[str, Any]) -> None:
    """Of the same transformer, stopped; `enable` was told of the first."""
    other = FluxPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    stopped(other, arguments)


BEFORE: list[Callable[[Any, dict[str, Any]], None]] = [
    stopped,
    stopped_twice,
    of_another_size,
    of_other_steps,
    of_two_pictures,
    without_guidance,
    by_another_pipeline,
]


@pytest.mark.parametrize("before", BEFORE, ids=lambda before: before.__name__)
def test_a_run_is_the_same_whatever_ran_before(before: Any) -> None:
    pipe, arguments = tiny_dit.flux()
    with attnswap.enabled(pipe, CONFIG) as handle:
        wanted = sample(pipe, arguments)
        assert handle.report().density < 0.9
        assert cases.counts_of(handle) == (4, 4, 6)
    handle = attnswap.enable(pipe, CONFIG)
    before(pipe, arguments)
    counts = cases.counts_of(handle)
    assert torch.equal(sample(pipe, arguments), wanted)
    assert tuple(x - y for x, y in zip(cases.counts_of(handle), counts, strict=True)) == (4, 4, 6)
    # The report tells of the searches of the last run.
    assert {len(layer["branches"]) for layer in cases.layers_of(handle)} == {2}


def test_another_pipeline_of_the_same_transformer_gets_its_own_masks() -> None:
    pipe, arguments = tiny_dit.flux()
    other = FluxPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    with attnswap.enabled(other, CONFIG):
        wanted = sample(other, arguments)
    attnswap.enable(pipe, CONFIG)
    stopped(pipe, arguments)
    assert torch.equal(sample(other, arguments), wanted)


def test_where_guidance_is_cut_off_the_half_that_is_left_searches_anew() -> None:
    """Its mask was for both halves; so is that of the second half for the first, had it been dropped."""
    model, both = small(), short(batch=2)
    half = {name: value[1:] if len(value) == 2 else value for name, value in both.inputs.items()}
    handle = attnswap.enable(model, replace(CONFIG, search_steps=(1,)))
    handle.set_timesteps(both.timesteps)
    text = both.texts[0]
    stock = small()
    for step, timestep in enumerate(both.timesteps, start=1):
        inputs = both.inputs if step < 3 else half
        clock = torch.full_like(inputs["timestep"], timestep)
        call = {**inputs, "timestep": clock, "encoder_hidden_states": text if step < 3 else text[1:]}
        with torch.no_grad():
            found, dense = model(**call)[0], stock(**call)[0]
        assert ((found - dense).abs().max() < 1e-5) == (step in (1, 3)), step
    assert cases.counts_of(handle) == (2, 2, 3)
    assert any("had no mask and ran dense with a search" in note for note in notes(handle))
    assert {len(layer["branches"][-1]["level"]) for layer in cases.layers_of(handle)} == {1}


def test_a_layer_that_a_cache_left_out_in_the_step_of_a_search_searches_in_its_next() -> None:
    model, run = small(), short()
    inputs = dict(run.inputs)
    handle = attnswap.enable(model, replace(CONFIG, search_steps=(1, 3)))
    handle.set_timesteps(run.timesteps)
    block = model.transformer_blocks[0]
    forward = block.forward

    def skip(*, hidden_states: Any, encoder_hidden_states: Any, **rest: Any) -> Any:
        return encoder_hidden_states, hidden_states

    for step, timestep in enumerate(run.timesteps, start=1):
        block.forward = skip if step in (1, 3) else forward
        with torch.no_grad():
            model(**{**inputs, "timestep": torch.tensor([timestep])})
    found = {layer["name"]: layer for layer in cases.layers_of(handle)}
    left_out, other = found["transformer_blocks.0.attn"], found["single_transformer_blocks.0.attn"]
    assert (left_out["dense_calls"], left_out["searches"], left_out["accelerated_calls"]) == (1, 2, 2)
    assert left_out["branches"][0]["searched_at"] == 4
    assert (other["dense_calls"], other["searches"], other["accelerated_calls"]) == (1, 2, 4)
    assert other["branches"][0]["searched_at"] == 3


def test_what_was_searched_leaves_the_memory_with_the_last_step() -> None:
    """All but the masks, which a report can show; and a log-sum-exp stays only for a search to come."""
    model, run = small(), short()
    handle = attnswap.enable(model, CONFIG)
    strategy = model._attnswap.strategies[0]
    held = []
    run.told = lambda step, branch: held.append({state.lse is not None for state in strategy._states.values()})
    run.of(model, handle)
    # Before each step: of the first run nothing, then the warm-up, one search, and both.
    assert held == [set(), {False}, {True}, {True}, {False}]
    assert all(state.lse is None and state.mask is not None for state in strategy._states.values())


def interrupt(pipe: Any, step: int, timestep: Any, arguments: Any) -> Any:
    pipe._interrupt = step >= 1
    return arguments


@pytest.mark.parametrize("name", ["flux", "wan"], ids=["stopped early", "two transformers"])
def test_at_the_end_of_a_pipelines_run_it_leaves_all_transformers(name: str) -> None:
    """Also those that did not get to the last step, and keep a log-sum-exp for a search to come."""
    pipe, arguments = tiny_dit.PIPELINES[name]()
    config = replace(CONFIG, search_steps=(1, 5))
    handle = attnswap.enable(pipe, config)
    more = {"callback_on_step_end": interrupt} if name == "flux" else {"height": 64, "width": 96}
    sample(pipe, arguments, **more)
    models = [pipe.transformer, *([pipe.transformer_2] if name == "wan" else [])]
    for number, model in enumerate(models):
        states = model._attnswap.strategies[0]._states.values()
        assert {state.searched_at for state in states} <= {1, 5} | ({3, 4} if number else set())
        assert states
        assert all(state.lse is None and state.mask is not None for state in states)
    assert handle.report().mask_image(0, 0) is not None


# The user's own attention backend.


def test_dense_attention_is_the_backend_the_user_chose_also_where_it_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, run, calls = small(), short(), []
    chosen = attention_dispatch.AttentionBackendName._NATIVE_MATH
    backends = attention_dispatch._AttentionBackendRegistry._backends
    kernel, now = backends[chosen], [0]

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(now[0])
        return kernel(*args, **kwargs)

    def told(step: int, branch: int) -> None:
        now[0] = step

    run.told = told
    with attnswap.enabled(model, CONFIG) as handle:
        own = run.of(model, handle)
    monkeypatch.setitem(backends, chosen, spy)
    model.set_attention_backend("_native_math")
    stock = run.of(model)
    calls.clear()
    handle = attnswap.enable(model, CONFIG)
    found = run.of(model, handle)
    assert calls == [1, 1, 2, 2], "both layers in the first two steps"
    assert all(map(torch.equal, found[:2], stock[:2]))
    assert largest_difference(found, own) < 1e-5
    assert cases.counts_of(handle) == (2, 2, 3)


# Query or key that are no numbers.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [2, 4])
def test_a_layer_without_numbers_is_reported_and_dense_for_the_rest_of_the_run(step: int, value: float) -> None:
    case = video_models.CASES["wan"]
    model = case.make()
    run = cases.Steps(case.inputs((2, 4, 6), 6, 1), 7, texts=[video_models.noise(1, 6, 16, seed=s) for s in (1, 2)])
    now, broken = [0, 0], [True]

    def told(*at: int) -> None:
        now[:] = at

    run.told = told

    def spoil(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        """One number of one query, in one branch of one step."""
        if broken[0] and now == [step, 0]:
            out = out.clone()
            out[0, 5, 3] = value
        return out

    attention = model.blocks[0].attn1
    attention.norm_q.register_forward_hook(spoil)
    attention.register_forward_hook(lambda module, args, out: out.nan_to_num(0, 0, 0))
    handle = attnswap.enable(model, CONFIG)
    with pytest.warns(attnswap.AttnswapWarning, match="blocks.0.attn1 runs dense for the rest of the run"):
        run.of(model, handle)
    [note] = notes(handle)
    assert note == "blocks.0.attn1 runs dense for the rest of the run: its query or key is not finite"
    spoilt, other = cases.layers_of(handle)
    # Found out in the next call: in step 4, two branches in step 3 and one in that step have been sparse.
    assert (spoilt["searches"], spoilt["accelerated_calls"]) == ((1, 0) if step == 2 else (3, 3))
    assert [branch["fell_back"] for branch in spoilt["branches"]] == [True, True]
    assert spoilt["branches"][0]["recall"] is None
    assert (other["searches"], other["accelerated_calls"]) == (4, 10)
    assert not any(branch["fell_back"] for branch in other["branches"])
    # Another run is another chance.
    broken[0] = False
    before = spoilt["accelerated_calls"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", attnswap.AttnswapWarning)
        run.of(model, handle)
    assert cases.layers_of(handle)[0]["accelerated_calls"] - before == 10
    assert not any(branch["fell_back"] for branch in cases.layers_of(handle)[0]["branches"])


def test_gradients_are_refused_by_the_sparse_kernels_and_not_kept_in_the_state() -> None:
    model, run = small(), short(count=2)
    handle = attnswap.enable(model, AdaSpa(sparsity=0.5, min_tokens=0, block=(16, 16), search_steps=(1,)))
    handle.set_timesteps(run.timesteps)
    for timestep in run.timesteps:
        out = model(**{**run.inputs, "timestep": torch.tensor([timestep])})[0]
    states = model._attnswap.strategies[0]._states.values()
    assert not any(state.recall.requires_grad for state in states)
    with pytest.raises(RuntimeError, match="autograd"):
        out.sum().backward()
