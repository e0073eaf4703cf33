"""Gradients of linear attention in closed form, a chunk of tokens at a time; whichever backend ran forward.

With S the state, mu the sum of the key features, z the denominator, g the gradient of an output row o and c = g·o:

    dphi(q) = (S g - c mu) / z      dS = sum phi(q) (g / z)^T      dmu = -sum phi(q) c / z
    dphi(k) = dS v + dmu            dv = dS^T phi(k)

and phi'(x) = 1 for x > 0, else exp(x) = phi(x).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .counts import scaled_eps
from .eager import chunks, feature_map, pairwise


def apply_backward(
    grad: Tensor, query: Tensor, state: Tensor, key_sum: Tensor, count: int | Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the query, the state and the key sum."""
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_state, grad_key_sum = torch.empty_like(state), torch.empty_like(key_sum)
    bias = scaled_eps(count, eps, key_sum)
    for sample in range(query.shape[0]):

        def sums(tokens: slice, sample: int = sample) -> tuple[Tensor, Tensor]:
            features = feature_map(query[sample, tokens].to(state.dtype)).transpose(0, 1)
            denominator = torch.bmm(features, key_sum[sample, :, :, None]).add_(bias[sample])
            scaled = grad[sample, tokens].to(state.dtype).transpose(0, 1) / denominator
            # g S^T, and with phi(q) once more c = phi(q)·(S g) / z: the output itself need not be kept.
            through_state = torch.bmm(scaled, state[sample].mT)
            share = (features * through_state).sum(-1, keepdim=True).div_(denominator)
            slope = features.clamp(max=1)
            grad_features = through_state.sub_(share * key_sum[sample, :, None, :])
            grad_query[sample, tokens] = grad_features.mul_(slope).transpose(0, 1)
            return torch.bmm(features.mT, scaled), -(features * share).sum(1)

        grad_state[sample], grad_key_sum[sample] = pairwise(sums, list(chunks(query)))
    return grad_query, grad_state, grad_key_sum


def state_backward(
    grad_state: Tensor, grad_key_sum: Tensor, key: Tensor, value: Tensor, *, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of the key and the value."""
    grad_key = torch.empty_like(key, memory_format=torch.contiguous_format)
    grad_value = torch.empty_like(value, memory_format=torch.contiguous_format)
    for sample in range(key.shape[0]):
        for tokens in chunks(key):
            features = feature_map(key[sample, tokens].to(grad_state.dtype)).transpose(0, 1)
            values = value[sample, tokens].to(grad_state.dtype).transpose(0, 1)
            grad_features = torch.bmm(values, grad_state[sample].mT).add_(grad_key_sum[sample, :, None, :])
            grad_values = torch.bmm(features, grad_state[sample])
            grad_keys = grad_features.mul_(features.clamp(max=1))
            if key_mask is not None:
                hidden = ~key_mask[sample, None, tokens, None]
                grad_keys.masked_fill_(hidden, 0)
                grad_values.masked_fill_(hidden, 0)
            grad_key[sample, tokens] = grad_keys.transpose(0, 1)
            grad_value[sample, tokens] = grad_values.transpose(0, 1)
    return grad_key, grad_value
