"""Reference pictures and the measures taken against them."""

import json

import numpy as np
import pytest
from attnswap.pipelines.emoji_reference import (
    Reference,
    background_colour,
    caption,
    judge,
    psnr,
    rank_of_subject,
    sample_captions,
)

COLOURS = {"red": (230, 40, 40), "blue": (45, 100, 230)}


@pytest.fixture
def reference():
    random = np.random.default_rng(0)
    sprites = random.integers(0, 256, (5, 16, 16, 4), np.uint8)
    sprites[:, :2, :, 3] = sprites[:, -2:, :, 3] = sprites[:, :, :2, 3] = sprites[:, :, -2:, 3] = 0
    return Reference(("fox", "owl", "bread", "ewe", "unicorn"), sprites, COLOURS)


def test_captions_read_naturally():
    assert caption("fox") == "a fox"
    assert caption("owl", "orange") == "an owl on an orange background"
    assert [caption(name) for name in ("bread", "ewe", "unicorn")] == ["bread", "a ewe", "a unicorn"]


def test_atlas_survives_the_disk(reference, tmp_path):
    reference.save(tmp_path)
    again = Reference.load(tmp_path)
    assert again.names == reference.names
    assert again.colours == reference.colours
    assert again.plain == (255, 255, 255)
    for subject in range(5):
        np.testing.assert_array_equal(again.compose(subject, "red"), reference.compose(subject, "red"))


def test_atlas_too_small_for_its_names_is_refused(reference, tmp_path):
    reference.save(tmp_path)
    about = json.loads((tmp_path / "subjects.json").read_text())
    (tmp_path / "subjects.json").write_text(json.dumps({**about, "subjects": ["x"] * 99}))
    with pytest.raises(ValueError, match="99 sprites"):
        Reference.load(tmp_path)


def test_compose_shows_the_colour_where_the_subject_is_transparent(reference):
    picture = reference.compose("fox", "blue")
    np.testing.assert_allclose(picture[0, 0] * 255, COLOURS["blue"], atol=1e-4)
    assert picture.min() >= 0
    assert picture.max() <= 1


def test_perfect_pictures_score_one_and_swapped_ones_do_not(reference):
    asked = sample_captions(reference, 10)
    assert len(set(asked)) == 10
    pictures = np.stack([reference.compose(*pair) for pair in asked])
    score = judge(pictures, asked, reference)
    assert (score.nearest, score.nearest_of_five, score.colour, score.count) == (1, 1, 1, 10)
    wrong = [((subject + 1) % 5, colour) for subject, colour in asked]
    assert (rank_of_subject(pictures, wrong, reference) > 0).all()
    assert judge(pictures, wrong, reference).colour == 1


@pytest.mark.parametrize("colour", [None, "red", "blue"])
def test_background_is_read_from_the_border(reference, colour):
    noisy = reference.compose("owl", colour) + np.random.default_rng(1).normal(0, 0.1, (16, 16, 3))
    assert background_colour(noisy, reference) == colour


def test_psnr():
    ones = np.ones((1, 4, 4, 3))
    assert psnr(ones, ones) == float("inf")
    assert psnr(ones, ones * 0.9) == pytest.approx(20)
