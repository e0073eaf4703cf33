"""What the measurement of AdaSpa compares, counts and writes down; the model is a tiny random one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attnswap.accel.families.base import Place
from attnswap.accel.methods.adaspa import AdaSpa, AdaSpaStrategy
from attnswap.accel.methods.adaspa_order import Arrangement, TileOrder, tile_order
from attnswap.accel.report import Report
from attnswap.benchmarks import adaspa_quality
from attnswap.benchmarks.adaspa_quality import DENSE, STATIC, looking_nowhere, nearness, places_of, variants
from attnswap.benchmarks.structured import positions
from attnswap.pipelines.emoji_reference import Reference

BLOCK = (16, 16)
TOKENS = 5 * 4 * 4  # of a clip of 9 frames, 32 px


@pytest.fixture(scope="module")
def emoji(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random model with the reference of an emoji model of its size."""
    import shutil

    folder = Path(shutil.copytree(tiny_wan, tmp_path_factory.mktemp("models") / "tiny-emoji-video"))
    sprites = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 4), np.uint8)
    Reference(("fox", "owl"), sprites, {"blue": (0, 0, 255)}).save(folder / "reference")
    return folder


@pytest.fixture(scope="module")
def model(emoji: Path) -> adaspa_quality.Model:
    return adaspa_quality.Model(str(emoji), steps=2)


def searched(model: adaspa_quality.Model, static: str | None = None) -> Report:
    """Of a clip whose two transformers both search in a dense call, so that nothing follows from a mask."""
    config = AdaSpa(sparsity=0.5, block=BLOCK, min_tokens=0, search_steps=(1,), head_adaptive=False)
    variant = adaspa_quality.Variant("any", "any", config, static)
    reports = []

    def note(report: Report, into: Any) -> None:
        reports.append(report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_note", note)
        model.make(variant, "a fox", 0, None, adaspa_quality.Made())
    return reports[0]


@pytest.fixture(scope="module")
def reports(model: adaspa_quality.Model) -> dict[str | None, Report]:
    """Of AdaSpa (None) and of each static mask."""
    return {static: searched(model, static) for static in (None, *STATIC)}


def masks(report: Report) -> dict[Any, Any]:
    found = {(number, *where): mask for number, part in enumerate(report.details) for where, mask in part.masks.items()}
    assert len(found) == 4  # two transformers of a layer, two guidance branches
    return found


def kept(report: Report) -> torch.Tensor:
    """`[transformers, branches, heads]`."""
    branches = [[b["kept"][0] for b in d["layers"][0]["branches"]] for d in report.denoisers]
    return torch.tensor(branches)


@pytest.mark.parametrize("static", STATIC)
def test_a_static_mask_keeps_as_many_blocks_in_each_row_as_the_search_with_heads_alike(reports, static):
    ours, theirs = masks(reports[None]), masks(reports[static])
    for where, mask in ours.items():
        assert torch.equal(mask.counts, theirs[where].counts)
        assert mask.counts.unique().tolist() == [3]  # half of 5, rounded up
        assert not torch.equal(mask.bits, theirs[where].bits)
    one, *others = theirs.values()
    assert all(torch.equal(one.bits, other.bits) for other in others)  # whatever the clip is
    assert (one.bits == one.bits[:, :1]).all()  # and the head


def test_a_static_mask_keeps_a_share_of_the_attention_not_of_its_own_nearness(model, monkeypatch):
    shares = []
    keep = AdaSpaStrategy._keep

    def note(self, query, key, scores, lse, reference, layout, arrangement):
        keep(self, query, key, scores, lse, reference, layout, arrangement)
        weights = (query[0].movedim(1, 0) @ key[0].movedim(1, 0).mT * query.shape[-1] ** -0.5).softmax(-1)
        seen = layout.plan.state.mask.to_dense()[0].repeat_interleave(16, 1).repeat_interleave(16, 2)
        shares.append((weights * seen).sum((1, 2)) / TOKENS)

    monkeypatch.setattr(AdaSpaStrategy, "_keep", note)
    found = kept(searched(model, "window"))
    # Of the first step one transformer, both branches; of the second the other.
    torch.testing.assert_close(found.flatten(0, 1), torch.stack(shares))


def test_the_search_keeps_at_least_as_much_as_any_static_mask_of_its_density(reports):
    for static in STATIC:
        assert (kept(reports[None]) > kept(reports[static])).all()


def test_after_a_static_mask_the_method_is_as_it_was(model):
    keep = AdaSpaStrategy._keep
    with looking_nowhere(1.0):
        assert AdaSpaStrategy._keep is not keep
    assert AdaSpaStrategy._keep is keep


def test_near_blocks_are_those_of_near_tokens():
    near = nearness(positions((4, 4, 4)), BLOCK)  # a frame is a block
    assert near.shape == (4, 4)
    assert (near.diagonal() == near.amax(-1)).all()
    assert near[0].argsort(descending=True).tolist() == [0, 1, 2, 3]
    ragged = nearness(positions((3, 3, 3)), BLOCK)
    assert ragged.shape == (2, 2)


def test_time_that_counts_for_more_leaves_the_frames_of_a_clip_further_apart():
    wide, narrow = (nearness(positions((4, 4, 4)) * torch.tensor([weigh, 1.0, 1.0]), BLOCK) for weigh in (1.0, 8.0))
    assert torch.equal(wide.diagonal(), narrow.diagonal())
    assert (wide[0, 1:] > narrow[0, 1:]).all()


def test_a_static_mask_goes_by_where_tokens_are_and_not_by_their_order():
    grid = (4, 8, 4)
    tiles = TileOrder.of(grid, torch.device("cpu"))
    arranged = places_of(Arrangement(Place(grid), tiles), 2.0)
    assert torch.equal(arranged, positions(grid)[tile_order(grid)] * torch.tensor([2.0, 1.0, 1.0]))


@pytest.mark.parametrize("place", [Place((4, 8, 4), around=12), Place((8, 16), around=12)], ids=["text", "picture"])
def test_a_static_mask_is_refused_where_there_are_others_than_a_clips_tokens(place):
    with pytest.raises(ValueError, match="not for 140 of which 12 are others"):
        places_of(Arrangement(place), 1.0)


def test_only_the_mask_differs_between_variants_of_a_sparsity():
    for variant in variants(BLOCK):
        if variant.static:
            alike = next(v for v in variants(BLOCK) if v.name == f"adaspa {variant.config.sparsity:g}, heads alike")
            assert variant.config == alike.config
    assert len({variant.name for variant in variants(BLOCK)}) == len(variants(BLOCK))


@pytest.fixture(scope="module")
def result(emoji: Path) -> dict[str, Any]:
    """Of the command, with its page, at fewer sparsities."""
    page = emoji / "page.md"
    page.write_text("a\n<!-- adaspa: begin -->x<!-- adaspa: end -->\nb\n")
    line = f"adaspa_quality --model {emoji} --prompts 2 --steps 6 --frames 5 --block 16 16"
    outputs = ["--json", f"{emoji}/q.json", "--pictures", f"{emoji}/images", "--page", f"{page}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaspa_quality, "SPARSITIES", (0.5, 0.8))
        patch.setattr(sys, "argv", [*line.split(), *outputs])
        adaspa_quality.main()
    return {**json.loads((emoji / "q.json").read_text()), "page": page.read_text()}


def test_every_variant_is_compared_with_dense_attention_for_the_same_prompt(result: dict[str, Any]) -> None:
    rows = result["variants"]
    assert rows[DENSE]["of_dense"] == 1
    assert "psnr" not in rows[DENSE]
    assert len(result["prompts"]) == 2
    for name, row in rows.items():
        if name != DENSE:
            assert len(row["psnr_of_each"]) == 2
            assert 0 < row["sparse_density"] < row["density"] < 1, name
            assert 0 < row["lowest"] <= row["kept"] < 1, name
    alike = rows["adaspa 0.5, heads alike"]
    assert alike["sparse_density"] == rows["window 0.5"]["sparse_density"]
    assert alike["psnr"] != rows["window 0.5"]["psnr"]
    assert 0 <= rows["window 0.5"]["beaten_in"] <= 2
    assert "beaten_in" not in rows["adaspa 0.5"]


def test_the_page_has_its_tables_and_pictures_between_the_marks(result: dict[str, Any], emoji: Path) -> None:
    page = result["page"]
    assert page.startswith("a\n<!-- adaspa: begin -->\n")
    assert page.endswith("<!-- adaspa: end -->\nb\n")
    assert "5 frames of 32 x 32 px, 6 steps, guidance 2, blocks of 16 x 16 tokens, prompts: 2" in page
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert {row.count("|") for row in rows} == {8}
    named = [row.split("|")[1].strip() for row in rows]
    assert "window 0.8" in named
    assert f"- window: {result['variants']['window 0.5']['beaten_in']} at 0.5, " in page
    assert named[-2:] == ["first only 0.8", "every tenth of the run 0.8"]
    assert {path.name for path in (emoji / "images").iterdir()} == {"q-psnr.png", "q-frames.png"}
    assert "![frames](images/q-frames.png)" in page
