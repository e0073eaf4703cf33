"""What window attention means, on every backend the machine has; the triton backend runs in its interpreter."""

from __future__ import annotations

import pytest
import torch
from attnswap import kernels
from attnswap.kernels import dispatch
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = [
    "reference",
    "eager",
    pytest.param(
        "triton", marks=pytest.mark.skipif(not dispatch.triton_interprets(), reason="TRITON_INTERPRET is not set")
    ),
]
CUTS = [
    pytest.param((8, 8), (2, 2), (1, 3), id="even"),
    pytest.param((7, 9), (2, 2), (3, 2), id="odd both ways"),
    pytest.param((6, 32), (3, 2), (-1, 50), id="thin, 3x2, negative and large shift"),
    pytest.param((9, 8), (1, 3), (5, 1), id="1x3"),
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with kernels.use_backend(request.param):
        yield request.param


def on(backend, *tensors, **call):
    with kernels.use_backend(backend):
        return kernels.window_attention(*tensors, **call)


def sdpa(query, key, value, mask=None):
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask).transpose(
        1, 2
    )


def same_window(grid, windows, shift):
    """bool [S, S]: query token and key token are in one window, by the definition of the shift."""
    number = torch.empty(grid, dtype=torch.int64)
    for i, rows in enumerate(torch.arange(grid[0]).tensor_split(windows[0])):
        for j, columns in enumerate(torch.arange(grid[1]).tensor_split(windows[1])):
            for y in rows.tolist():
                for x in columns.tolist():
                    number[(y + shift[0]) % grid[0], (x + shift[1]) % grid[1]] = i * windows[1] + j
    flat = number.flatten()
    return flat[:, None] == flat[None, :]


@pytest.mark.parametrize(("grid", "windows", "shift"), CUTS)
def test_it_is_dense_attention_masked_to_the_window(backend, qkv, grid, windows, shift):
    tensors = qkv(grid, batch=2, heads=2)
    expected = sdpa(*tensors, same_window(grid, windows, shift))
    out = kernels.window_attention(*tensors, grid=grid, windows=windows, shift=shift)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)
    assert out.is_contiguous()


def test_a_shifted_window_attends_across_the_border_it_wraps_over(backend, qkv):
    query, key, value = qkv((4, 4))
    changed = value.clone()
    changed[:, 0] += 1  # the top left token
    call = {"grid": (4, 4), "windows": (2, 2)}

    def reached(shift):
        difference = kernels.window_attention(query, key, changed, shift=shift, **call) - kernels.window_attention(
            query, key, value, shift=shift, **call
        )
        return set(difference.abs().amax((0, 2, 3)).nonzero().flatten().tolist())

    assert reached((0, 0)) == {0, 1, 4, 5}
    assert reached((1, 1)) == {0, 3, 12, 15}  # the four corners of the picture


def test_one_window_is_dense_attention(backend, qkv):
    tensors = qkv((5, 7), batch=2, heads=2)
    out = kernels.window_attention(*tensors, grid=(5, 7), windows=(1, 1), shift=(2, 3))
    torch.testing.assert_close(out, sdpa(*tensors), atol=2e-6, rtol=0)


def test_one_window_in_eager_is_sdpa_bit_for_bit(qkv):
    tensors = qkv((5, 7), batch=2, heads=2, dtype=torch.bfloat16)
    assert torch.equal(on("eager", *tensors, grid=(5, 7), windows=(1, 1), shift=(2, 3)), sdpa(*tensors))


def test_as_many_windows_as_tokens_return_the_value(backend, qkv):
    query, key, value = qkv((3, 4))
    torch.testing.assert_close(kernels.window_attention(query, key, value, grid=(3, 4), windows=(3, 4)), value)


@pytest.mark.parametrize("shift", [(0, 0), (3, -5), (700, 2)], ids=str)
def test_a_shift_tensor_means_the_same_as_integers(backend, qkv, shift):
    tensors = qkv((7, 6))
    by_tensor = kernels.window_attention(*tensors, grid=(7, 6), shift=torch.tensor(shift))
    assert torch.equal(by_tensor, kernels.window_attention(*tensors, grid=(7, 6), shift=shift))


def test_the_scale_is_applied_to_the_scores(backend, qkv):
    query, key, value = qkv((4, 4))
    out = kernels.window_attention(query, key, value, grid=(4, 4), scale=0.7)
    expected = kernels.window_attention(query * 0.7 * 8**0.5, key, value, grid=(4, 4))
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


def test_strided_inputs_equal_contiguous_ones(backend, qkv):
    """One fused QKV tensor, part of a longer sequence, and a head dimension that is not contiguous."""
    query, key, value = qkv((5, 6), batch=2, heads=2)
    expected = kernels.window_attention(query, key, value, grid=(5, 6), shift=(1, 1))
    strided = (
        torch.stack((query, key, value), dim=2)[:, :, 0],
        key.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat((value, value), dim=1)[:, :30],
    )
    assert not strided[0].is_contiguous()
    assert not strided[1].is_contiguous()
    assert torch.equal(kernels.window_attention(*strided, grid=(5, 6), shift=(1, 1)), expected)
    transposed = query.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert transposed.stride(-1) != 1
    assert torch.equal(kernels.window_attention(transposed, key, value, grid=(5, 6), shift=(1, 1)), expected)


@pytest.mark.parametrize(("grid", "windows", "shift"), CUTS)
def test_a_masked_key_has_no_influence_whatever_it_holds(backend, qkv, grid, windows, shift):
    query, key, value = qkv(grid, batch=2)
    mask = torch.rand(2, grid[0] * grid[1], generator=torch.Generator().manual_seed(1)) > 0.4
    allowed = same_window(grid, windows, shift)[None, None] & mask[:, None, None, :]
    expected = sdpa(query, key, value, allowed)
    key[~mask], value[~mask] = float("nan"), float("inf")
    out = kernels.window_attention(query, key, value, grid=grid, windows=windows, shift=shift, key_mask=mask)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


def test_a_row_without_keys_is_zero(backend, qkv):
    tensors = qkv((4, 4), batch=2)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[0, :2, :2] = False  # the first window of the first image
    mask[1] = False
    out = kernels.window_attention(*tensors, grid=(4, 4), key_mask=mask.flatten(1)).view(2, 4, 4, -1)
    assert (out[0, :2, :2] == 0).all()
    assert (out[1] == 0).all()
    assert (out[0, 2:] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_error_is_at_most_twice_that_of_pytorch_in_the_same_dtype(backend, qkv, dtype):
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly; see the tests marked gpu")
    tensors = qkv((10, 12), heads=2, head_dim=40, dtype=dtype)
    call = {"grid": (10, 12), "shift": (2, 5)}
    truth = on("reference", *(x.double() for x in tensors), **call)
    pytorch = sdpa(*tensors, same_window((10, 12), (2, 2), (2, 5)))
    allowed = 2 * (pytorch.double() - truth).abs().max() + 1e-7
    assert (on(backend, *tensors, **call).double() - truth).abs().max() <= allowed


def test_large_scores_stay_finite(backend, qkv):
    query, key, value = qkv((6, 6), dtype=torch.float16)
    out = kernels.window_attention(query * 60, key * 60, value, grid=(6, 6), shift=(1, 0))
    expected = on("reference", query * 60, key * 60, value, grid=(6, 6), shift=(1, 0))
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("head_dim", [1, 40, 80, 160])
def test_any_head_dimension(qkv, head_dim):
    if not dispatch.triton_interprets():
        pytest.skip("TRITON_INTERPRET is not set")
    tensors = qkv((5, 4), head_dim=head_dim)
    expected = on("reference", *tensors, grid=(5, 4), shift=(1, 1))
    torch.testing.assert_close(on("triton", *tensors, grid=(5, 4), shift=(1, 1)), expected, atol=2e-6, rtol=0)


def test_windows_longer_than_a_key_tile_end_in_a_partial_tile(qkv):
    """11 x 13 = 143 keys: several tiles of 32, the row and column of each carried on from the last, and a tail."""
    if not dispatch.triton_interprets():
        pytest.skip("TRITON_INTERPRET is not set")
    tensors = qkv((11, 25), batch=1)
    call = {"grid": (11, 25), "windows": (1, 2), "shift": (4, 7)}
    torch.testing.assert_close(on("triton", *tensors, **call), on("reference", *tensors, **call), atol=2e-6, rtol=0)


def test_a_batch_entry_does_not_depend_on_its_neighbours(backend, qkv):
    tensors = qkv((6, 5), batch=3)
    together = kernels.window_attention(*tensors, grid=(6, 5), shift=(1, 1))
    alone = kernels.window_attention(*(x[1:2] for x in tensors), grid=(6, 5), shift=(1, 1))
    torch.testing.assert_close(together[1:2], alone, atol=1e-6, rtol=0)


def test_autocast_does_not_change_the_dtype_of_the_computation(backend, qkv):
    tensors = qkv((4, 6))
    expected = kernels.window_attention(*tensors, grid=(4, 6))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernels.window_attention(*tensors, grid=(4, 6)), expected)


REFUSED = [
    pytest.param({"grid": (4, 5)}, "grid 4x5 holds 20 tokens, but there are 16", id="grid and tokens"),
    pytest.param({"grid": (4, 4), "windows": (5, 2)}, "4x4 tokens cannot be cut into 5x2 windows", id="windows"),
    pytest.param({"grid": (0, 4)}, "grid must be at least 1", id="empty grid"),
    pytest.param({"grid": 16}, "grid must be two integers, got 16", id="grid of one number"),
    pytest.param({"grid": (4, 4), "shift": (0.5, 1)}, "shift must be two integers", id="fractional shift"),
    pytest.param({"grid": (4, 4), "shift": torch.zeros(3)}, r"int64 \[2\], got torch.float32 \[3\]", id="shift tensor"),
    pytest.param({"grid": (4, 4), "scale": 0.0}, "positive and finite, got 0.0", id="scale"),
    pytest.param({"grid": (4, 4), "key_mask": torch.ones(1, 15, dtype=torch.bool)}, r"\[1, 16\]", id="mask length"),
    pytest.param({"grid": (4, 4), "key_mask": torch.ones(1, 16)}, "torch.float32", id="mask dtype"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_does_not_fit_is_refused_with_the_numbers(qkv, call, message):
    with pytest.raises(ValueError, match=message):
        kernels.window_attention(*qkv((4, 4)), **call)


def test_tensors_that_do_not_match_are_refused(qkv):
    query, key, value = qkv((4, 4), heads=2)
    with pytest.raises(ValueError, match=r"query is \[1, 16, 2, 8\] but key is \[1, 16, 1, 8\]"):
        kernels.window_attention(query, key[:, :, :1], value, grid=(4, 4))
    with pytest.raises(ValueError, match=r"query is torch.float32 but value is torch.float16"):
        kernels.window_attention(query, key, value.half(), grid=(4, 4))
    with pytest.raises(ValueError, match=r"got \[16, 2, 8\]"):
        kernels.window_attention(query[0], key[0], value[0], grid=(4, 4))
    with pytest.raises(ValueError, match=r"query has dtype torch.int64"):
        kernels.window_attention(query.long(), key.long(), value.long(), grid=(4, 4))
