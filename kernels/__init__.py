"""Attention operations on plain tensors, heads-last `[B, S, H, D]`. Needs PyTorch, takes Triton where there is one."""

from .dispatch import Explanation, explain, ops, use_backend

# The sub-package and its function share a name: `kernels.window_attention` is the function, while
# `from attnswap.kernels.window_attention import ...` still reaches the sub-package.
from .window_attention import window_attention

__all__ = ["Explanation", "explain", "ops", "use_backend", "window_attention"]
