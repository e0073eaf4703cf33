"""Attention operations on plain tensors, heads-last `[B, S, H, D]`. Needs PyTorch, takes Triton where there is one."""

# With a checkout as the current directory, transformers finds this folder when it looks for Hugging Face's package
# `kernels` and imports it under that name. That second copy stays empty: it would register every operator again and
# so destroy the first registration.
if __name__ != "kernels":
    from .block_sparse import (
        BlockMask,
        Selection,
        block_scores,
        block_sparse_attention,
        dense_attention,
        dense_attention_with_scores,
        select_blocks,
    )
    from .dispatch import Explanation, explain, ops, use_backend

    # A sub-package and its function share a name: `kernels.window_attention` is the function, while
    # `from attnswap.kernels.window_attention import ...` still reaches the sub-package.
    from .linear_attention import linear_attention, linear_attention_apply, linear_attention_state
    from .local_attention import local_attention, pool_tokens
    from .window_attention import window_attention

    __all__ = [
        "BlockMask",
        "Explanation",
        "Selection",
        "block_scores",
        "block_sparse_attention",
        "dense_attention",
        "dense_attention_with_scores",
        "explain",
        "linear_attention",
        "linear_attention_apply",
        "linear_attention_state",
        "local_attention",
        "ops",
        "pool_tokens",
        "select_blocks",
        "use_backend",
        "window_attention",
    ]
