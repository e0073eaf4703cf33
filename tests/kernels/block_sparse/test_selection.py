"""Which blocks are kept: the rule of AdaSpa, on attention with structure and on random scores."""

from __future__ import annotations

import itertools

import pytest
import torch
from attnswap import kernels
from attnswap.benchmarks.structured import Structured
from attnswap.kernels.block_sparse import head_levels, selection
from torch._dynamo.testing import CompileCounterWithBackend

BLOCK = (64, 64)


@pytest.fixture(scope="module")
def structured():
    """Scores and log-sum-exps of 8 heads, 2,048 tokens in 32 blocks, from spread out to sharp."""
    query, key, _ = Structured().tensors()
    return kernels.block_scores(query, key, None)


def random_scores(batch=1, heads=4, query_blocks=10, key_blocks=10, *, seed=0):
    return torch.rand((batch, heads, query_blocks, key_blocks), generator=torch.Generator().manual_seed(seed))


def select(scores, sparsity=0.5, block=BLOCK, **call):
    return kernels.select_blocks(scores, sparsity=sparsity, block=block, **call)


class TestRecall:
    @pytest.mark.parametrize(
        ("sparsity", "kept", "expected"),
        [
            (0.7, 10, [0.675, 0.912, 0.975, 0.989, 0.995, 0.999, 1, 1]),
            (0.8, 7, [0.544, 0.856, 0.958, 0.985, 0.994, 0.999, 0.999, 1]),
            (0.9, 4, [0.360, 0.724, 0.900, 0.971, 0.991, 0.998, 0.999, 1]),
        ],
    )
    def test_of_structured_attention_is_high_at_low_density(self, structured, sparsity, kept, expected):
        found = select(structured[0], sparsity, head_adaptive=False)
        assert (found.mask.counts == kept).all()
        torch.testing.assert_close(found.recall[0], torch.tensor(expected), atol=0.001, rtol=0)
        assert torch.equal(found.recall, found.kept)

    def test_is_a_share_of_what_there_is_when_the_reference_is_old(self, structured):
        """Old references change the scores, up to a hundredfold here, and hardly the recall."""
        query, key, _ = Structured(amplitude=0.1).tensors()
        stale, lse = kernels.block_scores(query, key, structured[1])
        fresh, _ = kernels.block_scores(query, key, None)
        assert (lse - structured[1]).mean() == pytest.approx(3.0, abs=0.05)
        assert stale.sum() > 10 * fresh.sum()
        old, new = (select(scores, 0.8, head_adaptive=False) for scores in (stale, fresh))
        torch.testing.assert_close(old.recall, new.recall, atol=0.025, rtol=0)
        held = (fresh * old.mask.to_dense()).sum((-2, -1)) / fresh.sum((-2, -1))
        torch.testing.assert_close(held, new.recall, atol=1e-3, rtol=0)

    def test_of_an_old_mask_falls_with_the_pattern_and_a_new_search_mends_it(self, structured):
        old = select(structured[0], 0.8, head_adaptive=False).mask.to_dense()
        query, key, _ = Structured(pattern=0.1).tensors()
        scores, _ = kernels.block_scores(query, key, None)
        held = (scores * old).sum((-2, -1)) / scores.sum((-2, -1))
        assert held.mean() == pytest.approx(0.67, abs=0.01)
        assert select(scores, 0.8, head_adaptive=False).recall.mean() == pytest.approx(0.88, abs=0.01)

    def test_grows_with_the_density(self):
        scores = random_scores()
        recalls = [select(scores, sparsity, head_adaptive=False).recall for sparsity in (0.9, 0.7, 0.5, 0.3, 0)]
        assert all((less < more).all() for less, more in itertools.pairwise(recalls))
        torch.testing.assert_close(recalls[-1], torch.ones(1, 4))

    def test_is_that_of_the_mask(self):
        scores = random_scores(batch=2)
        found = select(scores, text=((600, 640),), recall_threshold=0.6)
        held = (scores * found.mask.to_dense()).sum((-2, -1)) / scores.sum((-2, -1))
        torch.testing.assert_close(found.kept, held)

    def test_of_rows_that_compete_is_at_least_as_high(self, structured):
        for sparsity in (0.7, 0.8, 0.9):
            uniform, free = (
                select(structured[0], sparsity, head_adaptive=False, row_uniform=rows) for rows in (True, False)
            )
            assert (free.kept >= uniform.kept - 1e-6).all()
            assert (free.kept <= uniform.kept + 0.011).all()
            assert torch.equal(free.mask.counts.sum(-1), uniform.mask.counts.sum(-1))

    def test_of_no_other_mask_with_equal_rows_is_higher(self):
        scores = random_scores()
        found = select(scores, 0.7, head_adaptive=False)
        for seed in range(1, 21):
            other = random_scores(seed=seed).topk(3, -1).indices
            assert (scores.gather(-1, other).sum((-2, -1)) <= found.kept * scores.sum((-2, -1))).all()

    def test_a_nan_is_seen_in_its_head_and_counts_as_nothing(self):
        scores = random_scores()
        scores[0, 1, 2, 3] = float("nan")
        found = select(scores, 0.7)
        assert found.recall[0].isnan().tolist() == [False, True, False, False]
        assert not found.mask.to_dense()[0, 1, 2, 3]
        assert (found.mask.counts[0, 1] == found.mask.counts[0, 1, 0]).all()


class TestHeadLevels:
    @pytest.mark.parametrize("sparsity", [0, 0.1, 1 / 3, 0.5, 0.8, 0.9, 0.99])
    def test_the_mean_of_lower_and_higher_is_the_base(self, sparsity):
        lower, base, higher = head_levels(sparsity)
        assert base == sparsity
        assert (lower + higher) / 2 == pytest.approx(sparsity)
        assert 0 <= lower <= sparsity <= higher < 1

    def test_those_of_the_paper(self):
        assert head_levels(0.8) == pytest.approx((0.7, 0.8, 0.9))

    @pytest.mark.parametrize("heads", [1, 6, 7])
    @pytest.mark.parametrize("covered", [0, 2, 3, 4, 6])
    def test_as_many_heads_are_lowered_as_raised_and_the_best_are_raised(self, heads, covered):
        """`covered` heads have a recall near 1; the first two of them, and the last two heads, are exactly alike."""
        covered = min(covered, heads)
        scores = torch.rand((1, heads, 10, 10), generator=torch.Generator().manual_seed(3)) * 0.01 + 1
        scores[:, :covered, :, ::4] += 1000
        if covered > 1:
            scores[0, 1] = scores[0, 0]
        if heads - covered > 1:
            scores[0, -1] = scores[0, -2]
        found = select(scores, 0.7, recall_threshold=0.8)
        recall, level = found.recall[0], found.level[0].tolist()
        assert int((recall > 0.8).sum()) == covered
        shifted = min(covered, heads // 2)
        order = sorted(range(heads), key=lambda head: (-recall[head].item(), head))
        expected = [0] * heads
        for head in order[:shifted]:
            expected[head] = 1
        for head in order[heads - shifted :]:
            expected[head] = -1
        assert level == expected
        assert found.mask.counts[0, :, 0].tolist() == [{-1: 5, 0: 3, 1: 2}[x] for x in level]

    def test_each_sample_has_its_own(self):
        scores = torch.cat((random_scores(heads=2), random_scores(heads=2).flip(1)))
        scores[0, 0, :, 0] += 100
        scores[1, 1, :, 0] += 100
        assert select(scores, 0.8).level.tolist() == [[1, -1], [-1, 1]]

    def test_off_means_all_alike(self, structured):
        found = select(structured[0], 0.8, head_adaptive=False)
        assert (found.level == 0).all()
        assert found.mask.counts.unique().tolist() == [7]

    def test_on_keeps_the_density_and_covers_the_worst_heads_better(self, structured):
        """Seven of the eight heads are covered well: more than half, so four go up and four go down."""
        plain, adaptive = (select(structured[0], 0.8, head_adaptive=on) for on in (False, True))
        assert int((plain.recall > 0.8).sum()) == 7
        assert adaptive.level.tolist() == [[-1] * 4 + [1] * 4]
        assert adaptive.mask.density() == plain.mask.density()
        assert adaptive.kept.min() > plain.kept.min() + 0.1


class TestKeptBlocks:
    @pytest.mark.parametrize(
        ("blocks", "counts"),
        [(10, (3, 2, 1)), (32, (10, 7, 4)), (100, (30, 20, 10)), (1856, (557, 372, 186)), (1861, (559, 373, 187))],
    )
    def test_are_the_share_rounded_up_but_not_by_the_error_of_doubles(self, blocks, counts):
        for sparsity, count in zip((0.7, 0.8, 0.9), counts, strict=True):
            assert selection.kept_blocks(sparsity, blocks) == count
            assert selection._kept_counts([sparsity], blocks)[0, -1] == count

    def test_the_table_is_the_rule_for_every_number_of_blocks(self):
        levels = [0, 0.3, 0.7, 0.85, 0.999]
        table = selection._kept_counts(levels, 300)
        assert table.tolist() == [[selection.kept_blocks(level, count) for count in range(301)] for level in levels]

    def test_are_at_least_one(self):
        assert (select(random_scores(), 0.999, head_adaptive=False).mask.counts == 1).all()

    def test_are_all_at_sparsity_zero(self):
        for adaptive in (True, False):
            assert select(random_scores(), 0, head_adaptive=adaptive).mask.density() == 1

    def test_are_those_of_the_highest_scores(self):
        scores = random_scores()
        kept = select(scores, 0.7, head_adaptive=False).mask.to_dense()
        assert torch.equal(kept, scores >= scores.topk(3, -1).values[..., -1:])

    @pytest.mark.parametrize("row_uniform", [True, False])
    def test_the_capacity_is_at_least_their_number(self, row_uniform):
        for seed in range(6):
            scores = random_scores(batch=2, heads=5, seed=seed) ** (seed + 1)
            call = {"text": ((0, 10),)} if seed % 2 else {"kv_lengths": torch.tensor([640, 200])}
            found = select(scores, 0.15 * (seed + 1), recall_threshold=0.3, row_uniform=row_uniform, **call)
            assert found.mask.counts.sum() <= found.mask.capacity
            if seed % 2:
                assert found.mask.capacity <= 1.1 * found.mask.counts.sum()


class TestText:
    @pytest.mark.parametrize(
        ("text", "blocks"),
        [
            (((600, 640),), [9]),
            (((0, 65),), [0, 1]),
            (((0, 10), (575, 640)), [0, 8, 9]),
            (((100, 101), (120, 200)), [1, 2, 3]),
            (((64, 64),), []),
        ],
    )
    def test_blocks_that_hold_text_are_kept_by_all_and_keep_all(self, text, blocks):
        found = select(random_scores(), 0.7, text=text, head_adaptive=False)
        kept = found.mask.to_dense()
        assert kept[..., blocks].all()
        assert kept[..., blocks, :].all()
        video = [block for block in range(10) if block not in blocks]
        rows = kept[..., video, :]
        assert (rows[..., video].sum(-1) == selection.kept_blocks(0.7, len(video))).all()

    def test_alone_is_dense(self):
        assert select(random_scores(), 0.9, text=((0, 640),)).mask.density() == 1

    def test_is_found_for_queries_and_keys_by_their_own_blocks(self):
        kept = select(random_scores(query_blocks=5, key_blocks=20), 0.9, (128, 32), text=((510, 515),)).mask.to_dense()
        assert [row for row in range(5) if kept[0, 0, row].all()] == [3, 4]
        assert kept[..., [15, 16]].all()


class TestLengths:
    def test_blocks_past_the_length_are_never_kept(self):
        lengths = torch.tensor([640, 200, 64, 0])
        found = select(random_scores(batch=4), 0.7, kv_lengths=lengths, head_adaptive=False)
        kept = found.mask.to_dense()
        for sample, seen in enumerate((10, 4, 1, 0)):
            assert not kept[sample, ..., seen:].any()
            assert (found.mask.counts[sample] == (selection.kept_blocks(0.7, seen) if seen else 0)).all()
        assert torch.equal(found.recall[3], torch.ones(4))

    def test_text_past_the_length_is_not_kept(self):
        kept = select(random_scores(), 0.7, kv_lengths=torch.tensor([600]), text=((550, 640),)).mask.to_dense()
        assert kept[..., 8].all()
        assert kept[..., 9].all()
        kept = select(random_scores(), 0.7, kv_lengths=torch.tensor([570]), text=((550, 640),)).mask.to_dense()
        assert not kept[..., 9].any()
        assert kept[..., 8:, :9].all()

    @pytest.mark.parametrize("row_uniform", [True, False])
    def test_rows_that_hold_text_keep_what_is_seen_and_no_more(self, row_uniform):
        """300 of 640 keys are seen: 5 blocks of 10, of which a row of video keeps 4."""
        call = {"text": ((600, 640),), "kv_lengths": torch.tensor([300]), "row_uniform": row_uniform}
        found = select(random_scores(), 0.3, head_adaptive=False, **call)
        kept = found.mask.to_dense()
        assert kept[..., 9, :5].all()
        assert (found.mask.counts[..., 9] == 5).all()
        assert not kept[..., 5:].any()


def test_heads_looked_at_in_parts_give_the_same(monkeypatch):
    scores = random_scores(batch=2, heads=5)
    call = {"text": ((0, 30),), "recall_threshold": 0.5}
    whole = select(scores, 0.6, **call)
    monkeypatch.setattr(selection, "CHUNK", 300)
    parts = select(scores, 0.6, **call)
    assert torch.equal(whole.mask.bits, parts.mask.bits)
    assert torch.equal(whole.kept, parts.kept)


def test_it_compiles_to_one_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def chosen(scores, **call):
        found = kernels.select_blocks(scores, sparsity=0.7, block=BLOCK, **call)
        return found.mask.bits, found.mask.counts, found.recall, found.kept, found.level

    scores, call = random_scores(batch=2), {"text": ((600, 640),), "kv_lengths": torch.tensor([640, 300])}
    compiled = torch.compile(chosen, backend=counter, fullgraph=True)
    for one, other in zip(compiled(scores, **call), chosen(scores, **call), strict=True):
        assert torch.equal(one, other)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"sparsity": 1}, "sparsity must be a number from 0 and below 1, got 1"),
        ({"sparsity": -0.1}, "sparsity .* got -0.1"),
        ({"sparsity": float("nan")}, "sparsity .* got nan"),
        ({"sparsity": "0.8"}, "sparsity .* got '0.8'"),
        ({"recall_threshold": 1.5}, "recall_threshold must be a number from 0 and at most 1, got 1.5"),
        ({"block": (0, 64)}, r"block must be at least 1 along each axis, got \(0, 64\)"),
        ({"block": (64, 32)}, "10 blocks of 64 queries and 10 blocks of 32 keys cannot be of the same number of tok"),
        ({"text": ((600, 641),)}, "must lie within 640 tokens, got 600 to 641"),
        ({"text": ((30, 20),)}, "got 30 to 20"),
        ({"text": (3,)}, "a range of text must be two integers, got 3"),
        ({"kv_lengths": torch.tensor([641])}, "kv_lengths must be 0 to 640, .* entry 0 is 641"),
        ({"kv_lengths": torch.tensor([1, 2])}, r"int32 or int64 \[batch\] = \[1\], got torch.int64 \[2\]"),
        ({"scores": torch.ones(3, 3)}, r"scores must be \[batch, .* got \[3, 3\]"),
        ({"scores": torch.ones(1, 1, 3, 3, dtype=torch.bfloat16)}, "float32 or float64, got torch.bfloat16"),
        ({"scores": None}, "got NoneType"),
    ],
)
def test_what_does_not_fit_is_refused(call, said):
    scores = call.pop("scores", random_scores())
    with pytest.raises(ValueError, match=said):
        kernels.select_blocks(scores, **{"sparsity": 0.8, "block": BLOCK} | call)
