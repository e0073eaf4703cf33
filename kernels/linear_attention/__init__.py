"""Linear attention with ELU + 1 features. The public functions are in `attnswap.kernels`."""

from .op import linear_attention, linear_attention_apply, linear_attention_state

__all__ = ["linear_attention", "linear_attention_apply", "linear_attention_state"]
