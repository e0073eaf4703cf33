"""Likeness is what scikit-image says, in little memory, and has an answer for every picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from attnswap.pipelines.compare import metrics
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity


def pair(height: int, width: int, by: int = 40) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(height * width)
    dense = random.integers(0, 256, (height, width, 3), np.uint8)
    return np.clip(dense + random.integers(-by, by + 1, dense.shape), 0, 255).astype(np.uint8), dense


class TestPictures:
    @pytest.mark.parametrize(("height", "width"), [(64, 48), (7, 31), (33, 8)])
    def test_the_figures_are_those_of_scikit_image(self, height: int, width: int) -> None:
        picture, dense = pair(height, width)
        found = metrics.of_pictures(picture, dense)
        assert found.psnr == pytest.approx(peak_signal_noise_ratio(dense, picture, data_range=255), abs=1e-9)
        whole = structural_similarity(dense, picture, channel_axis=-1, data_range=255)
        assert found.ssim == pytest.approx(whole, abs=1e-12)

    @pytest.mark.parametrize("band", [1, 5, 58, 59])
    def test_bands_change_nothing(self, band: int, monkeypatch: pytest.MonkeyPatch) -> None:
        picture, dense = pair(64, 16)
        monkeypatch.setattr(metrics, "BAND", band)
        whole = structural_similarity(dense, picture, channel_axis=-1, data_range=255)
        assert metrics.ssim(picture, dense) == pytest.approx(whole, abs=1e-12)

    def test_a_large_picture_takes_no_more_memory_at_a_time_than_a_band(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = []

        def noted(dense: np.ndarray, *_: object, **__: object) -> float:
            rows.append(len(dense))
            return 1.0

        monkeypatch.setattr(metrics, "structural_similarity", noted)
        metrics.ssim(*pair(1600, 8))
        assert max(rows) == metrics.BAND + metrics.WINDOW - 1
        assert sum(rows) == 1600 + (len(rows) - 1) * (metrics.WINDOW - 1)

    def test_the_same_picture_is_identical(self) -> None:
        picture, _ = pair(16, 16)
        found = metrics.of_pictures(picture, picture.copy())
        assert (found.psnr, found.ssim, found.identical) == (math.inf, 1.0, True)

    def test_one_value_that_differs_is_not_identical(self) -> None:
        picture, _ = pair(16, 16)
        other = picture.copy()
        other[3, 4, 1] ^= 1
        found = metrics.of_pictures(other, picture)
        assert not found.identical
        assert found.psnr == pytest.approx(10 * math.log10(255**2 * 16 * 16 * 3))

    @pytest.mark.parametrize(("height", "width"), [(6, 6), (3, 9), (4, 64)])
    def test_a_small_picture_is_seen_through_a_smaller_window(self, height: int, width: int) -> None:
        picture, dense = pair(height, width)
        found = metrics.of_pictures(picture, dense).ssim
        assert found is not None
        assert found < 1

    def test_a_picture_without_room_for_a_window_has_no_ssim(self) -> None:
        picture, dense = pair(2, 64)
        found = metrics.of_pictures(picture, dense)
        assert found.ssim is None
        assert found.psnr > 0

    def test_pictures_of_different_sizes_are_no_pair(self) -> None:
        with pytest.raises(ValueError, match="dimensions"):
            metrics.of_pictures(pair(8, 8)[0], pair(8, 9)[1])


class TestClips:
    @pytest.fixture
    def clips(self, tmp_path: Path) -> tuple[Path, Path]:
        """Of three frames: the first is the same, the last is farthest off."""
        folders = tmp_path / "clip", tmp_path / "dense"
        for folder in folders:
            folder.mkdir()
        for number, by in enumerate((0, 10, 60), 1):
            for folder, frame in zip(folders, pair(16, 16, by), strict=True):
                Image.fromarray(frame).save(folder / f"frame-{number:05}.png")
        return folders

    def test_psnr_is_over_all_frames_together_and_of_the_worst(self, clips: tuple[Path, Path]) -> None:
        found = metrics.of_clips(*clips)
        frames, dense = (np.stack(list(metrics.read_frames(folder))) for folder in clips)
        assert found.psnr == pytest.approx(peak_signal_noise_ratio(dense, frames, data_range=255))
        assert found.worst_psnr == pytest.approx(peak_signal_noise_ratio(dense[2], frames[2], data_range=255))
        assert not found.identical

    def test_ssim_is_the_mean_of_the_frames_and_the_worst(self, clips: tuple[Path, Path]) -> None:
        found = metrics.of_clips(*clips)
        each = [metrics.ssim(*frames) for frames in zip(*map(metrics.read_frames, clips), strict=True)]
        assert found.ssim == pytest.approx(sum(each) / 3)
        assert found.worst_ssim == min(each)

    def test_a_clip_that_is_shorter_is_no_pair(self, clips: tuple[Path, Path]) -> None:
        (clips[0] / "frame-00003.png").unlink()
        with pytest.raises(ValueError, match="longer"):
            metrics.of_clips(*clips)

    def test_frames_come_in_order_however_many_there_are(self, tmp_path: Path) -> None:
        for number in (100000, 99999, 2):
            Image.new("RGB", (1, 1), (number % 256, 0, 0)).save(tmp_path / f"frame-{number:05}.png")
        assert [frame[0, 0, 0] for frame in metrics.read_frames(tmp_path)] == [2, 99999 % 256, 100000 % 256]
        assert metrics.middle_frame(tmp_path).getpixel((0, 0)) == (99999 % 256, 0, 0)
