"""What our kernels are measured against: PyTorch's own attention, each of its backends by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .registry import Case, Contender, Inputs, Prepared

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# The math backend keeps the whole score matrix: out of reach at GPU sizes, the plain alternative on a CPU.
SDPA_BACKENDS: Mapping[str, Mapping[str, SDPBackend]] = {
    "cuda": {
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
}
MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def heads_first(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heads-last `[B, S, H, D]` as the `[B, H, S, D]` view that PyTorch's attention takes, as Diffusers does."""
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def dense_sdpa(device: torch.device) -> tuple[Contender, ...]:
    """Full attention over `query`, `key` and `value` of the inputs, once per SDPA backend."""

    def prepare(backend: SDPBackend, case: Case, inputs: Inputs) -> Prepared:
        tensors = heads_first(inputs["query"], inputs["key"], inputs["value"])
        return Prepared(
            call=lambda: scaled_dot_product_attention(*tensors),
            restore=lambda output: output.transpose(1, 2),
            around=lambda: sdpa_kernel(backend),
        )

    return tuple(
        Contender(f"dense SDPA, {name}", "dense", partial(prepare, backend))
        for name, backend in SDPA_BACKENDS[device.type].items()
    )


def flex_attention(
    inputs: Inputs,
    mask_mod: MaskMod | None,
    block_mask: BlockMask | None = None,
    kernel_options: Any = None,
) -> Prepared:
    """Compiled FlexAttention over the tokens in their own order; compiling and the block mask are not timed.

    `block_mask` is made from `mask_mod` where it is None, which looks at every pair of tokens. `kernel_options` are
    FlexAttention's own.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, value = heads_first(inputs["query"], inputs["key"], inputs["value"])
    # Each size compiles anew. Without the reset, the limit on recompiling is reached after some cases.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    if block_mask is None:
        queries, keys = query.shape[2], key.shape[2]
        block_mask = create_block_mask(mask_mod, B=None, H=None, Q_LEN=queries, KV_LEN=keys, device=query.device)
    return Prepared(
        call=lambda: compiled(query, key, value, block_mask=block_mask, kernel_options=kernel_options),
        restore=lambda output: output.transpose(1, 2),
    )
