"""LinFusion by its formulas (arXiv 2409.02097), plain and slow, and random checkpoints in the published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attnswap
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def random_tensors(width: int, mid: int | None = None, seed: int = 0) -> Tensors:
    """The tensors of a layer by their published names; `mid` as in a config: None for `width`, -1 for no MLP."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    found = {f"{name}.weight": normal(width, width) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    found["to_out.0.bias"] = normal(width)
    if mid == -1:
        return found
    m = width if mid is None else mid
    for branch in ("to_q_", "to_k_"):
        found |= {
            f"{branch}.0.weight": normal(m, width),
            f"{branch}.0.bias": normal(m),
            f"{branch}.1.weight": 1 + 0.3 * normal(m),
            f"{branch}.1.bias": 0.3 * normal(m),
            f"{branch}.3.weight": normal(width, m),
            f"{branch}.3.bias": normal(width),
        }
    return found


def mlp(tensors: Tensors, branch: str) -> nn.Module:
    """The refinement of one branch, in fp64; without its tensors, the identity."""
    if f"{branch}.0.weight" not in tensors:
        return nn.Identity()
    mid, width = tensors[f"{branch}.0.weight"].shape
    module = nn.Sequential(nn.Linear(width, mid), nn.LayerNorm(mid), nn.LeakyReLU(), nn.Linear(mid, width))
    module.load_state_dict({key.removeprefix(f"{branch}."): x for key, x in tensors.items() if key.startswith(branch)})
    return module.double()


def phi(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.exp())


def queries_keys_values(tensors: Tensors, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, S, C]` each, in fp64."""
    x = tokens.double()
    query = (x + mlp(tensors, "to_q_")(x)) @ tensors["to_q.weight"].double().T
    key = (x + mlp(tensors, "to_k_")(x)) @ tensors["to_k.weight"].double().T
    return query, key, x @ tensors["to_v.weight"].double().T


def attended(query: Tensor, key: Tensor, value: Tensor, heads: int, eps: float = 1e-4) -> Tensor:
    """Linear attention of `[B, S, C]`, both means over the keys."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    state = (phi(key)[..., :, None] * value[..., None, :]).mean(-3)
    mean_key = phi(key).mean(-2)
    weights = phi(query) @ mean_key[..., None]
    return (phi(query) @ state / (weights + eps)).transpose(1, 2).flatten(-2)


def layer(tensors: Tensors, tokens: Tensor, heads: int, eps: float = 1e-4) -> Tensor:
    """A whole layer, from hidden states `[B, S, C]` to what the stock processor returns."""
    out = attended(*queries_keys_values(tensors, tokens), heads, eps)
    return out @ tensors["to_out.0.weight"].double().T + tensors["to_out.0.bias"].double()


def as_published(tensors: Tensors, tokens: Tensor, heads: int) -> Tensor:
    """The released code's order of operations, all of them in the dtype of the tokens."""
    refined = [tokens + mlp(tensors, branch).to(tokens.dtype)(tokens) for branch in ("to_q_", "to_k_")]
    query, key = (x @ tensors[f"{to}.weight"].T for x, to in zip(refined, ("to_q", "to_k"), strict=True))
    value = tokens @ tensors["to_v.weight"].T
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    query, key = nn.functional.elu(query) + 1, nn.functional.elu(key) + 1
    weights = query @ key.mean(-2, keepdim=True).transpose(-2, -1) + 1e-4
    root = key.shape[-2] ** -0.5
    out = query @ ((key.transpose(-2, -1) * root) @ (value * root)) / weights
    return out.transpose(1, 2).flatten(-2) @ tensors["to_out.0.weight"].T + tensors["to_out.0.bias"]


class ByDefinition:
    """A processor that computes a layer by the formulas."""

    def __init__(self, tensors: Tensors, eps: float = 1e-4) -> None:
        self.tensors, self.eps = tensors, eps

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        assert encoder_hidden_states is None
        assert attention_mask is None
        with torch.no_grad():
            return layer(self.tensors, hidden_states, attn.heads, self.eps).to(hidden_states.dtype)


def self_attention(unet: nn.Module) -> dict[str, Any]:
    """In the order of the published index."""
    return {name: module for name, module in unet.named_modules() if name.split(".")[-1] == "attn1"}


def random_weights(unet: nn.Module, mid: int | None = None, seed: int = 0) -> list[Tensors]:
    layers = self_attention(unet).values()
    return [random_tensors(attn.to_q.in_features, mid, 100 * seed + i) for i, attn in enumerate(layers)]


def own_weights(unet: nn.Module) -> list[Tensors]:
    """Linear attention with a U-Net's own projections: MLPs that add nothing."""
    found = random_weights(unet)
    for tensors, attn in zip(found, self_attention(unet).values(), strict=True):
        own = {key: value for key, value in attn.state_dict().items() if key in tensors}
        assert len(own) == 5
        last = {key: torch.zeros_like(value) for key, value in tensors.items() if "_.3." in key}
        tensors |= own | last
    return found


def config(unet: nn.Module, mid: int | None = None) -> dict[str, Any]:
    layers = [
        {"module_name": name, "dim_n": attn.to_q.in_features, "heads": attn.heads, "projection_mid_dim": mid}
        for name, attn in self_attention(unet).items()
    ]
    return {"_class_name": "LinFusion", "_diffusers_version": "0.30.0", "modules_list": layers}


def write(
    folder: Path, unet: nn.Module, mid: int | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensors]:
    """A checkpoint of random weights in a folder; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_weights(unet, mid, seed)
    (folder / "config.json").write_text(json.dumps(config(unet, mid)))
    flat = {f"{i}.{key}": value.to(dtype) for i, tensors in enumerate(weights) for key, value in tensors.items()}
    save_file(flat, folder / "diffusion_pytorch_model.safetensors")
    return weights


def linfusion(folder: Path, unet: nn.Module, mid: int | None = None, **settings: Any) -> attnswap.LinFusion:
    """The configuration for a random checkpoint that is written into `folder`."""
    write(folder, unet, mid)
    return attnswap.LinFusion(weights=str(folder), **settings)


def put_by_definition(unet: nn.Module, weights: list[Tensors], eps: float = 1e-4) -> None:
    for attn, tensors in zip(self_attention(unet).values(), weights, strict=True):
        attn.set_processor(ByDefinition(tensors, eps))
