"""With everything that moves weights about: offloading whole models, layers or groups, and casting layerwise."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import attnswap
import pytest
import torch
from accelerate import disk_offload
from attnswap.accel.observe import Observer
from diffusers.hooks import apply_group_offloading
from torch import nn

from . import tiny_dit
from .slim import sample, slim
from .watching import Watch

CPU = torch.device("cpu")


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe: Any) -> None:
    """The hooks of `enable_sequential_cpu_offload`, from disk: from CPU to CPU accelerate cannot tell the two apart."""
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            disk_offload(module, tempfile.mkdtemp(), execution_device="cpu")


def group_offload(pipe: Any, **how: Any) -> None:
    apply_group_offloading(pipe.unet, onload_device=CPU, offload_device=CPU, **how)


def leaves(pipe: Any) -> None:
    group_offload(pipe, offload_type="leaf_level")


def blocks(pipe: Any) -> None:
    group_offload(pipe, offload_type="block_level", num_blocks_per_group=1)


def casting(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


MOVERS: list[Callable[[Any], None]] = [model_offload, sequential_offload, leaves, blocks, casting]


CASES = [
    (name, mover) for mover in MOVERS for name in ("sd15", "sdxl") if (name, mover) != ("sdxl", sequential_offload)
]


@pytest.mark.parametrize("order", ["mover first", "method first"])
@pytest.mark.parametrize(("name", "mover"), CASES, ids=[f"{name}-{mover.__name__}" for name, mover in CASES])
def test_moving_weights_changes_neither_what_is_enabled_nor_the_way_back(name: str, mover: Any, order: str) -> None:
    pipe = slim(name)
    if mover is casting:  # weights lose bits: compare with the rounded ones
        with torch.no_grad():
            for parameter in pipe.unet.parameters():
                parameter.copy_(parameter.bfloat16())
    steps = 1 if mover is sequential_offload else 3  # it takes a second a step
    stock = sample(pipe, steps=steps)
    with attnswap.enabled(pipe, "hidiffusion") as handle:
        enabled, report = sample(pipe, steps=steps), handle.report().to_dict()
    if order == "mover first":
        mover(pipe)
        assert torch.equal(sample(pipe, steps=steps), stock)
        handle = attnswap.enable(pipe, "hidiffusion")
    else:
        handle = attnswap.enable(pipe, "hidiffusion")
        mover(pipe)
    # Two runs, because offloading puts its hooks anew at the end of each.
    for _ in range(2):
        handle.reset()
        assert torch.equal(sample(pipe, steps=steps), enabled)
        assert handle.report().to_dict() == report
    handle.disable()
    assert torch.equal(sample(pipe, steps=steps), stock)
    assert not ours_left_in(pipe.unet)


def ours_left_in(model: nn.Module) -> list[str]:
    left = [name for name in ("_attnswap", "_reset_stateful_cache", "_infer_parameters") if name in vars(model)]
    for name, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        left += [f"{name}: {hook}" for hook in hooks if "attnswap" in type(getattr(hook, "__self__", hook)).__module__]
    return left


def test_the_search_for_leftovers_finds_them(pipe: Any) -> None:
    attnswap.enable(pipe, "hidiffusion")
    assert len(ours_left_in(pipe.unet)) > 4


@pytest.mark.parametrize("mover", [model_offload, sequential_offload, leaves], ids=lambda mover: mover.__name__)
def test_removing_the_offload_leaves_the_method(mover: Any) -> None:
    pipe = slim("sd15")
    with attnswap.enabled(pipe, "hidiffusion"):
        enabled = sample(pipe, steps=1)
    attnswap.enable(pipe, "hidiffusion")
    mover(pipe)
    sample(pipe, steps=1)
    if mover is leaves:
        for module in pipe.unet.modules():
            if hasattr(module, "_diffusers_hook"):
                for name in list(module._diffusers_hook.hooks):
                    module._diffusers_hook.remove_hook(name, recurse=False)
    else:
        pipe.remove_all_hooks()
    assert torch.equal(sample(pipe, steps=1), enabled)


DITS = ["wan", "flux", "ltx"]


def on_top(pipe: Any, how: str) -> None:
    if how == "accelerate":
        pipe.enable_model_cpu_offload(device="cpu")
    elif how == "sequential":
        sequential_offload(pipe)
    else:
        apply_group_offloading(pipe.transformer, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


@pytest.mark.parametrize("how", ["accelerate", "sequential", "leaves"])
@pytest.mark.parametrize("name", DITS)
def test_the_hook_for_cache_contexts_comes_out_from_under_others(name: str, how: str) -> None:
    """What was put on top of it meanwhile survives and works."""
    pipe, arguments = tiny_dit.PIPELINES[name]()

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        output = pipe(**arguments, num_inference_steps=2, output_type="latent", generator=generator)
        return output[0]

    watch = Watch(pipe)
    wanted = run()
    on_top(pipe, how)
    torch.testing.assert_close(run(), wanted)
    others = hooks_of(pipe.transformer) - {"attnswap_carrier"}
    assert others
    calls = watch.of(run)
    assert {call.steps for call in calls} == {2}
    watch.remove()
    assert hooks_of(pipe.transformer) == others
    assert watch.of(run) == []
    torch.testing.assert_close(run(), wanted)


def hooks_of(model: nn.Module) -> set[str]:
    found = {type(module._hf_hook).__name__ for module in model.modules() if hasattr(module, "_hf_hook")}
    for module in model.modules():
        if hasattr(module, "_diffusers_hook"):
            found |= set(module._diffusers_hook.hooks)
    return found


@pytest.mark.parametrize("name", sorted(tiny_dit.PIPELINES.keys() - {"sd3", "z_image"}))
def test_what_carries_is_a_module_that_offloading_leaves_alone(name: str) -> None:
    pipe, _ = tiny_dit.PIPELINES[name]()
    Watch(pipe)
    [(path, carrier)] = [(n, m) for n, m in pipe.transformer.named_modules() if "attnswap_carrier" in own(m)]
    assert not any(True for _ in (*carrier.parameters(), *carrier.buffers()))
    assert "blocks." not in path


def own(module: nn.Module) -> list[str]:
    return list(module._diffusers_hook.hooks) if hasattr(module, "_diffusers_hook") else []


def test_a_reset_of_ones_own_on_the_model_is_kept() -> None:
    pipe, _ = tiny_dit.sd3()
    resets: list[int] = []
    pipe.transformer._reset_stateful_cache = lambda: resets.append(1)
    observer = Observer(pipe.transformer, Watch(tiny_dit.sd3()[0]).clock, lambda call: None)
    pipe.maybe_free_model_hooks()
    assert resets == [1]
    observer.remove()
    pipe.maybe_free_model_hooks()
    assert resets == [1, 1]
