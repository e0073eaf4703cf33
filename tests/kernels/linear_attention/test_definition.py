"""What linear attention means, on every backend the machine has; the triton backend runs in its interpreter."""

from __future__ import annotations

import pytest
import torch
from attnswap import kernels
from attnswap.kernels import dispatch

SHAPES = [  # queries, keys, batch, heads, head_dim
    pytest.param(1, 1, 1, 1, 8, id="one token"),
    pytest.param(65, 65, 2, 2, 8, id="65 tokens"),
    pytest.param(40, 96, 3, 1, 8, id="fewer queries than keys"),
    pytest.param(96, 40, 1, 1, 40, id="more queries than keys"),
    pytest.param(100, 100, 1, 2, 64, id="head dimension 64"),
    pytest.param(33, 33, 1, 1, 80, id="head dimension 80"),
    pytest.param(33, 33, 1, 1, 160, id="head dimension 160"),
    pytest.param(17, 101, 1, 8, 8, id="8 heads"),
]


def features(x):
    return torch.where(x > 0, x + 1, x.exp())


def weighted_means(query, key, value, eps=1e-4, key_mask=None):
    """The definition, pair by pair, in fp64: weights phi(q)·phi(k), and their sum plus N eps below."""
    query, key, value = (x.double() for x in (query, key, value))
    weights = torch.einsum("bqhd,bkhd->bhqk", features(query), features(key))
    count = torch.full((len(key),), key.shape[1]) if key_mask is None else key_mask.sum(1)
    if key_mask is not None:
        weights = weights * key_mask[:, None, None, :]
    total = weights.sum(-1) + eps * count.clamp(min=1)[:, None, None]
    return torch.einsum("bhqk,bkhd->bqhd", weights / total[..., None], value)


@pytest.mark.parametrize(("queries", "keys", "batch", "heads", "head_dim"), SHAPES)
def test_the_output_is_a_weighted_mean_of_the_values(backend, tensors, queries, keys, batch, heads, head_dim):
    qkv = tensors(queries, keys=keys, batch=batch, heads=heads, head_dim=head_dim)
    out = kernels.linear_attention(*qkv)
    torch.testing.assert_close(out.double(), weighted_means(*qkv), atol=5e-7, rtol=0)
    assert out.is_contiguous()
    assert out.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the branch not taken, in the interpreter
def test_large_inputs_of_mixed_signs_keep_their_digits(backend, tensors):
    query, key, value = tensors(100, std=30)
    expected = weighted_means(query, key, value)
    torch.testing.assert_close(kernels.linear_attention(query, key, value).double(), expected, atol=1e-4, rtol=0)


def test_one_key_gives_its_value_less_what_eps_takes(backend, tensors):
    query, key, value = tensors(5, keys=1)
    weight = (features(query) * features(key)).sum(-1, keepdim=True)
    torch.testing.assert_close(kernels.linear_attention(query, key, value, eps=0.5), value * weight / (weight + 0.5))


def test_equal_keys_give_the_mean_of_the_values(backend, tensors):
    query, key, value = tensors(50)
    key = key[:, :1].expand_as(key)
    weight = (features(query) * features(key)).sum(-1, keepdim=True)
    expected = value.mean(1, keepdim=True) * weight / (weight + 1e-4)
    torch.testing.assert_close(kernels.linear_attention(query, key, value), expected, atol=1e-6, rtol=0)


def test_eps_belongs_to_the_mean_and_not_to_the_sum(backend, tensors):
    """Every key twice changes no mean, and so nothing; an eps beside the sums would count half."""
    query, key, value = tensors(20)
    once = kernels.linear_attention(query, key, value, eps=1.0)
    twice = kernels.linear_attention(query, *(torch.cat((x, x), dim=1) for x in (key, value)), eps=1.0)
    torch.testing.assert_close(twice, once, atol=1e-6, rtol=0)


def test_a_query_without_features_gives_zero(backend, tensors):
    query, key, value = tensors(10)
    out = kernels.linear_attention(torch.full_like(query, -200.0), key, value)
    assert (out == 0).all()
    assert kernels.linear_attention(torch.full_like(query, -15.0), key, value).abs().max() < 0.1


def test_zeros_everywhere_give_zeros(backend, tensors):
    zeros = [torch.zeros_like(x) for x in tensors(7)]
    assert (kernels.linear_attention(*zeros) == 0).all()


def test_rows_of_zeros_count_as_keys_unless_masked(backend, tensors):
    query, key, value = tensors(30)
    padded = [torch.cat((x, torch.zeros_like(x[:, :9])), dim=1) for x in (key, value)]
    expected = kernels.linear_attention(query, key, value)
    mask = (torch.arange(39) < 30)[None]
    torch.testing.assert_close(kernels.linear_attention(query, *padded, key_mask=mask), expected, atol=1e-6, rtol=0)
    assert (kernels.linear_attention(query, *padded) - expected).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_masked_key_has_no_influence_whatever_it_holds(backend, tensors, dtype):
    query, key, value = tensors(70, keys=90, batch=2, dtype=dtype)
    mask = torch.rand(2, 90, generator=torch.Generator().manual_seed(1)) > 0.4
    dirty = [x.masked_fill(~mask[:, :, None, None], float("nan")) for x in (key, value)]
    out = kernels.linear_attention(query, *dirty, key_mask=mask)
    alone = kernels.linear_attention(query[:1], key[:1, mask[0]], value[:1, mask[0]])
    torch.testing.assert_close(out[:1], alone, atol=1e-6 if dtype == torch.float32 else 2e-3, rtol=0)


def test_a_sample_without_keys_gives_zero(backend, tensors):
    query, key, value = tensors(12, batch=2)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1] = False
    out = kernels.linear_attention(query, key, value, key_mask=mask)
    assert (out[1] == 0).all()
    torch.testing.assert_close(out[:1], kernels.linear_attention(query[:1], key[:1], value[:1]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("broken", [0, 1, 2], ids=["query", "key", "value"])
def test_a_nan_stays_in_its_sample_and_head(backend, tensors, broken):
    qkv = tensors(20, batch=2, heads=2)
    qkv[broken][1, 3, 0] = float("nan")
    finite = kernels.linear_attention(*qkv).isfinite()
    assert not finite[1, 3, 0].any()
    assert finite[0].all()
    assert finite[1, :, 1].all()


def test_strided_inputs_equal_contiguous_ones(backend, tensors):
    """One fused QKV tensor, heads first in memory, part of a longer sequence, and a head dimension with a stride."""
    query, key, value = tensors(37, batch=2, heads=2)
    expected = kernels.linear_attention(query, key, value)
    strided = (
        torch.stack((query, key, value), dim=2)[:, :, 0],
        key.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat((value, value), dim=1)[:, :37],
    )
    assert not any(x.is_contiguous() for x in strided)
    torch.testing.assert_close(kernels.linear_attention(*strided), expected, atol=1e-6, rtol=0)
    transposed = query.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert transposed.stride(-1) != 1
    torch.testing.assert_close(kernels.linear_attention(transposed, key, value), expected, atol=1e-6, rtol=0)


def test_two_runs_give_the_same_bits(backend, tensors):
    qkv = tensors(40, batch=2)
    assert torch.equal(kernels.linear_attention(*qkv), kernels.linear_attention(*qkv))


def test_a_batch_entry_does_not_depend_on_its_neighbours(backend, tensors):
    qkv = tensors(64, batch=3)
    alone = kernels.linear_attention(*(x[1:2] for x in qkv))
    torch.testing.assert_close(kernels.linear_attention(*qkv)[1:2], alone, atol=1e-6, rtol=0)


def test_autocast_does_not_change_the_dtype_of_the_computation(backend, tensors):
    qkv = [x.requires_grad_() for x in tensors(24)]
    expected = kernels.linear_attention(*qkv)
    gradients = torch.autograd.grad(expected.sum(), qkv)
    with torch.autocast("cpu", torch.bfloat16):
        out = kernels.linear_attention(*qkv)
        found = torch.autograd.grad(out.sum(), qkv)
    assert torch.equal(out, expected)
    for one, other in zip(found, gradients, strict=True):
        assert torch.equal(one, other)


def test_state_and_apply_are_linear_attention_in_two_steps(backend, tensors):
    query, key, value = tensors(30, keys=45, batch=2, heads=2)
    state, key_sum, count = kernels.linear_attention_state(key, value)
    assert (state.shape, key_sum.shape, count) == ((2, 2, 8, 8), (2, 2, 8), 45)
    assert state.dtype == key_sum.dtype == torch.float32
    torch.testing.assert_close(key_sum, features(key).sum(1), atol=1e-5, rtol=0)
    out = kernels.linear_attention_apply(query, state, key_sum, count)
    assert torch.equal(out, kernels.linear_attention(query, key, value))


def test_a_count_of_one_number_is_for_every_sample_whether_an_integer_or_a_tensor(backend, tensors):
    query, key, value = tensors(30, keys=45, batch=2, heads=2)
    state, key_sum, count = kernels.linear_attention_state(key, value)
    out = kernels.linear_attention_apply(query, state, key_sum, torch.tensor(count))
    assert torch.equal(out, kernels.linear_attention_apply(query, state, key_sum, count))


def test_the_state_of_masked_keys_has_a_count_for_each_sample(backend, tensors):
    query, key, value = tensors(20, batch=2)
    mask = torch.arange(20)[None] < torch.tensor([[20], [7]])
    state, key_sum, count = kernels.linear_attention_state(key, value, key_mask=mask)
    assert (count.dtype, count.tolist()) == (torch.int64, [20, 7])
    out = kernels.linear_attention_apply(query, state, key_sum, count)
    assert torch.equal(out, kernels.linear_attention(query, key, value, key_mask=mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_sums_are_kept_in_fp32_or_better(tensors, dtype):
    _, key, value = tensors(20, dtype=dtype)
    state, key_sum, _ = kernels.linear_attention_state(key, value)
    assert state.dtype == key_sum.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=str)
def test_sums_of_unequal_parts_add_up_in_any_order(backend, tensors, order):
    query, key, value = tensors(70)
    parts = list(zip(key.split((40, 1, 29), dim=1), value.split((40, 1, 29), dim=1), strict=True))
    states, key_sums, counts = zip(*(kernels.linear_attention_state(*parts[i]) for i in order), strict=True)
    out = kernels.linear_attention_apply(query, sum(states), sum(key_sums), sum(counts))
    torch.testing.assert_close(out, kernels.linear_attention(query, key, value), atol=1e-6, rtol=0)


def test_each_part_of_the_work_explains_its_backend(backend, tensors):
    query, key, value = tensors(4)
    sums = kernels.linear_attention_state(key, value)
    assert kernels.explain("linear_attention", query, key, value).backend == backend
    assert kernels.explain("linear_attention_state", key, value).backend == backend
    assert kernels.explain("linear_attention_apply", query, *sums).backend == backend


def test_triton_refuses_what_it_cannot_compute(tensors):
    if not dispatch.triton_interprets():
        pytest.skip("TRITON_INTERPRET is not set")
    with kernels.use_backend("triton"):
        with pytest.raises(ValueError, match="float64 is for the reference and eager backends"):
            kernels.linear_attention(*tensors(4, dtype=torch.float64))
        with pytest.raises(ValueError, match="head dimension 168 is above 160"):
            kernels.linear_attention(*tensors(4, head_dim=168))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"eps": 0.0}, "eps must be finite and at least 1.18e-38, the smallest normal fp32, got 0.0"),
        ({"eps": float("inf")}, "got inf"),
        ({"key_mask": torch.ones(1, 15, dtype=torch.bool)}, r"\[1, 16\], got torch.bool \[1, 15\]"),
        ({"key_mask": torch.ones(1, 16)}, "got torch.float32"),
        ({"group": "ranks"}, "group must be a torch.distributed process group of this rank, got 'ranks'"),
    ],
    ids=["eps of 0", "infinite eps", "mask length", "mask dtype", "group"],
)
def test_what_does_not_fit_is_refused_with_the_numbers(tensors, call, message):
    with pytest.raises(ValueError, match=message):
        kernels.linear_attention(*tensors(16), **call)


def test_tensors_that_do_not_match_are_refused(tensors):
    query, key, value = tensors(16, heads=2)
    attend = kernels.linear_attention
    with pytest.raises(ValueError, match=r"key is \[1, 16, 2, 8\] but value is \[1, 15, 2, 8\]"):
        attend(query, key, value[:, 1:])
    with pytest.raises(ValueError, match=r"query is \[1, 16, 1, 8\] but key is \[1, 16, 2, 8\]; batch, heads"):
        attend(query[:, :, :1], key, value)
    with pytest.raises(ValueError, match=r"query is torch.float16 but key is torch.float32"):
        attend(query.half(), key, value)
    with pytest.raises(ValueError, match=r"not empty, got \[1, 0, 2, 8\]"):
        attend(query, key[:, :0], value[:, :0])
    with pytest.raises(ValueError, match=r"got \[16, 2, 8\]"):
        attend(query[0], key[0], value[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count must be at least 1 key, got 0"),
        ({"count": 1.5}, "count must be an integer or an int64 tensor"),
        ({"count": torch.tensor([1, 2])}, r"int64 \[batch\] = \[1\], got torch.int64 \[2\]"),
        ({"state": torch.zeros(1, 1, 8, 7)}, r"state must be torch.float32 \[1, 1, 8, 8\], got .* \[1, 1, 8, 7\]"),
        ({"key_sum": torch.zeros(1, 1, 8).half()}, r"key_sum must be torch.float32 \[1, 1, 8\], got torch.float16"),
    ],
    ids=["no keys", "fraction", "count shape", "state shape", "key sum dtype"],
)  # fmt: skip
def test_sums_that_do_not_fit_the_query_are_refused(tensors, change, message):
    query, key, value = tensors(4)
    sums = dict(zip(("state", "key_sum", "count"), kernels.linear_attention_state(key, value), strict=True))
    with pytest.raises(ValueError, match=message):
        kernels.linear_attention_apply(query, **(sums | change))
