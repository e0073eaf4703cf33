"""Clips on disk: what players, browsers and other programs find in them, and nothing half-written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnswap.pipelines import save, video_writer
from attnswap.pipelines.errors import BadInput, JobFailed
from PIL import Image

RECORD = {"prompt": "ein Füchslein 🦊 " * 700, "seed": 7}


def frames(count: int = 12, height: int = 48, width: int = 64) -> Iterator[video_writer.Frame]:
    y, x = np.mgrid[:height, :width]
    for number in range(count):
        yield np.stack([x * 3, y * 4, (x + y + 4 * number) % 256], -1).astype(np.uint8)


def foliage(count: int = 9, height: int = 160, width: int = 208) -> Iterator[video_writer.Frame]:
    """Patches of all sizes, moving: not what an encoder could describe in a few words."""
    random = np.random.default_rng(0)
    scales = [(random.random((height // side + 2, width // side + 20, 3)), side) for side in (1, 4, 16, 40)]
    for number in range(count):
        patches = [
            np.kron(values, np.ones((side, side, 1)))[:height, number : number + width] for values, side in scales
        ]
        yield (np.mean(patches, axis=0) * 255).astype(np.uint8)


def write(path: Path | None, shown: Any = None, *, fps: Any = 16, frames_dir: Path | None = None) -> None:
    with video_writer.writers(path, frames_dir, fps=Fraction(fps), record=RECORD) as writers:
        for frame in frames() if shown is None else shown:
            for writer in writers:
                writer.add(frame)


class TestMp4:
    @pytest.fixture
    def av(self) -> Any:
        return pytest.importorskip("av")

    @pytest.mark.parametrize("fps", [Fraction(16), Fraction(24000, 1001), Fraction(25, 2)])
    def test_has_the_frame_rate_exactly(self, av: Any, tmp_path: Path, fps: Fraction) -> None:
        write(tmp_path / "a.mp4", fps=fps)
        with av.open(str(tmp_path / "a.mp4")) as container:
            stream = container.streams.video[0]
            times = sorted(frame.pts * frame.time_base for frame in container.decode(stream))
        assert stream.average_rate == fps
        assert times == [number / fps for number in range(12)]

    def test_is_what_browsers_play(self, av: Any, tmp_path: Path) -> None:
        write(tmp_path / "a.mp4")
        with av.open(str(tmp_path / "a.mp4")) as container:
            context = container.streams.video[0].codec_context
            assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        content = (tmp_path / "a.mp4").read_bytes()
        assert content.find(b"moov") < content.find(b"mdat")  # it starts before it has come whole

    def test_looks_like_the_frames(self, av: Any, tmp_path: Path) -> None:
        write(tmp_path / "a.mp4")
        with av.open(str(tmp_path / "a.mp4")) as container:
            found = [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]
        error = np.mean([(one - other) ** 2 for one, other in zip(found, frames(), strict=True)])
        assert 10 * np.log10(255**2 / error) > 38

    def test_says_and_keeps_to_the_colours_of_hd(self, av: Any, tmp_path: Path) -> None:
        red = np.zeros((16, 16, 3), np.uint8)
        red[..., 0] = 255
        write(tmp_path / "a.mp4", [red])
        with av.open(str(tmp_path / "a.mp4")) as container:
            frame = next(container.decode(video=0))
        assert frame.colorspace == 1
        assert abs(int(frame.to_ndarray()[8, 8]) - (16 + 219 * 0.2126)) <= 1  # Y of BT.709, limited range

    def test_of_an_odd_size_repeats_its_last_row_and_column(self, av: Any, tmp_path: Path) -> None:
        write(tmp_path / "a.mp4", frames(2, 31, 47))
        with av.open(str(tmp_path / "a.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.width, stream.height) == (48, 32)
        frame = next(frames(1, 31, 47))
        padded = video_writer.padded_to_even(frame)
        assert np.array_equal(padded[:31, :47], frame)
        assert np.array_equal(padded[31], padded[30])
        assert np.array_equal(padded[:, 47], padded[:, 46])

    def test_remembers_a_long_prompt_in_any_script(self, av: Any, tmp_path: Path) -> None:
        write(tmp_path / "a.mp4")
        assert save.read_record(tmp_path / "a.mp4") == RECORD

    def test_is_the_same_file_for_the_same_frames(self, av: Any, tmp_path: Path) -> None:
        for name in ("a.mp4", "b.mp4"):
            write(tmp_path / name)
        assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()

    def test_is_the_same_file_on_a_processor_with_other_instructions(
        self, av: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path / "a.mp4", foliage())
        monkeypatch.setattr(video_writer, "ENCODER", video_writer.ENCODER | {"x264-params": "asm=0"})
        write(tmp_path / "b.mp4", foliage())
        assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()

    def test_is_encoded_in_as_many_threads_on_any_processor(self, av: Any, tmp_path: Path) -> None:
        write(tmp_path / "a.mp4")  # x264 itself notes how it was set
        assert b" threads=4 lookahead_threads=1 sliced_threads=0 " in (tmp_path / "a.mp4").read_bytes()

    def test_remembers_its_frames_as_they_were_before_encoding(self, av: Any, tmp_path: Path) -> None:
        def remembered(shown: Iterator[video_writer.Frame]) -> str:
            write(tmp_path / "a.mp4", shown)
            with av.open(str(tmp_path / "a.mp4")) as container:
                return str(container.metadata["attnswap_frames"])

        one_off = list(frames())
        one_off[3][0, 0, 0] += 1
        assert len({remembered(shown) for shown in (frames(), frames(), iter(one_off), frames(11))}) == 3

    def test_of_another_program_or_none_at_all_is_refused(self, av: Any, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match="does not exist"):
            save.read_record(tmp_path / "a.mp4")
        (tmp_path / "a.mp4").write_bytes(b"no clip")
        with pytest.raises(BadInput, match=r"a\.mp4 is not a readable MP4"):
            save.read_record(tmp_path / "a.mp4")

    def test_without_pyav_names_what_to_install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(save, "has_av", lambda: False)
        with pytest.raises(BadInput, match=r'pip install "attnswap\[video\]", or name a \.gif, or use --frames-dir\.'):
            video_writer.check(tmp_path / "a.mp4", None)
        with pytest.raises(BadInput, match=r'pip install "attnswap\[video\]"\.'):
            save.read_record(tmp_path / "a.mp4")
        video_writer.check(tmp_path / "a.gif", None)


class TestGif:
    def test_lasts_as_long_as_the_clip_for_ever(self, tmp_path: Path) -> None:
        write(tmp_path / "a.gif")
        with Image.open(tmp_path / "a.gif") as image:
            durations = []
            for number in range(image.n_frames):
                image.seek(number)
                durations.append(image.info["duration"])
        assert image.info["loop"] == 0
        assert len(durations) == 12
        assert set(durations) == {60, 70}  # 62.5 ms cannot be said
        assert sum(durations) == 12 * 1000 / 16

    def test_looks_like_the_frames(self, tmp_path: Path) -> None:
        write(tmp_path / "a.gif")
        with Image.open(tmp_path / "a.gif") as image:
            for number, frame in enumerate(frames()):
                image.seek(number)
                assert np.abs(np.asarray(image.convert("RGB")).astype(int) - frame).mean() < 8

    def test_of_few_colours_is_exact(self, tmp_path: Path) -> None:
        y, x = np.mgrid[:40, :40]
        plain = [np.stack([x // 10 * 60, y // 10 * 60, 0 * x + 20 * number], -1).astype(np.uint8) for number in (1, 2)]
        write(tmp_path / "a.gif", plain)
        with Image.open(tmp_path / "a.gif") as image:
            for number, frame in enumerate(plain):
                image.seek(number)
                assert np.array_equal(np.asarray(image.convert("RGB")), frame)

    def test_remembers_its_job(self, tmp_path: Path) -> None:
        write(tmp_path / "a.gif")
        assert save.read_record(tmp_path / "a.gif") == RECORD

    def test_too_fast_for_players_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match="at most 50 frames a second, not 60"):
            video_writer.check_fps(tmp_path / "a.gif", Fraction(60))


class TestFrames:
    def test_are_the_very_pixels(self, tmp_path: Path) -> None:
        write(None, frames_dir=tmp_path / "frames")
        files = sorted((tmp_path / "frames").iterdir())
        assert [file.name for file in files] == [f"frame-{number:05}.png" for number in range(1, 13)]
        for file, frame in zip(files, frames(), strict=True):
            assert np.array_equal(np.asarray(Image.open(file)), frame)
        assert save.read_record(files[3]) == RECORD

    def test_beside_a_clip(self, tmp_path: Path) -> None:
        write(tmp_path / "a.gif", frames_dir=tmp_path / "frames")
        assert sorted(os.listdir(tmp_path)) == ["a.gif", "frames"]

    def test_may_go_into_an_empty_folder_but_not_among_others(self, tmp_path: Path) -> None:
        folder = tmp_path / "frames"
        folder.mkdir()
        video_writer.check(None, folder)
        write(None, frames_dir=folder)
        with pytest.raises(BadInput, match="is not empty"):
            video_writer.check(None, folder)

    def test_may_go_to_where_a_link_leads(self, tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        link = tmp_path / "link"
        link.symlink_to("disk", target_is_directory=True)
        video_writer.check(None, link)
        write(None, frames_dir=link)
        assert link.is_symlink()
        assert len(os.listdir(tmp_path / "disk")) == 12
        assert sorted(os.listdir(tmp_path)) == ["disk", "link"]

    @pytest.mark.parametrize("name", [".", "../here", "link"])
    def test_do_not_replace_the_current_folder(
        self, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "here").mkdir()
        (tmp_path / "link").symlink_to("here", target_is_directory=True)
        monkeypatch.chdir(tmp_path / "here")
        folder = tmp_path / name if name == "link" else Path(name)
        with pytest.raises(BadInput, match="is the current folder"):
            video_writer.check(None, folder)

    def test_do_not_replace_a_mount_point(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
        with pytest.raises(BadInput, match="is a mount point"):
            video_writer.check(None, tmp_path)

    @pytest.mark.parametrize("clip", ["a.gif", "a.gif/b.gif", "link"])
    def test_and_the_clip_are_not_the_same_nor_one_in_the_other(self, tmp_path: Path, clip: str) -> None:
        (tmp_path / "link").symlink_to("a.gif")
        with pytest.raises(BadInput, match="would be the same, or one in the other"):
            video_writer.check(tmp_path / clip, tmp_path / "a.gif")

    def test_need_a_folder_to_be_in(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match=r"the folder .*no does not exist"):
            video_writer.check(None, tmp_path / "no" / "frames")


class TestNothingHalfWritten:
    @pytest.mark.parametrize("name", ["a.mp4", "a.gif", "frames"])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, JobFailed])
    def test_after_an_interruption(self, tmp_path: Path, name: str, error: type[BaseException]) -> None:
        def stopped() -> Iterator[video_writer.Frame]:
            yield from frames(5)
            raise error

        output, folder = (None, tmp_path / name) if name == "frames" else (tmp_path / name, None)
        with pytest.raises(error):
            write(output, stopped(), frames_dir=folder)
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
    def test_the_old_clip_stays_until_the_new_one_is_whole(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"old")
        for number, frame in enumerate(frames()):
            if number == 0:
                context = video_writer.writers(tmp_path / name, None, fps=Fraction(16), record=RECORD)
                (writer,) = context.__enter__()
            writer.add(frame)
        assert (tmp_path / name).read_bytes() == b"old"
        context.__exit__(None, None, None)
        assert save.read_record(tmp_path / name) == RECORD

    @pytest.mark.parametrize("name", ["a.gif", "frames"])
    def test_on_a_full_disk_which_is_said_in_a_line(
        self, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Image.Image, "quantize", full)
        monkeypatch.setattr(Image.Image, "save", full)
        output, folder = (None, tmp_path / name) if name == "frames" else (tmp_path / name, None)
        with pytest.raises(JobFailed, match=f"{name} could not be written: No space left"):
            write(output, frames_dir=folder)
        assert os.listdir(tmp_path) == []

    def test_and_the_one_of_two_that_failed_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Image.Image, "save", full)
        with pytest.raises(JobFailed, match=r"frames could not be written"):
            write(tmp_path / "a.gif", frames_dir=tmp_path / "frames")
        assert os.listdir(tmp_path) == []

    def test_and_what_fails_elsewhere_is_not_taken_for_a_full_disk(self, tmp_path: Path) -> None:
        def compiled() -> Iterator[video_writer.Frame]:
            yield from frames(2)
            raise FileNotFoundError(2, "No such file or directory", "gcc")

        with pytest.raises(FileNotFoundError, match="gcc"):
            write(tmp_path / "a.gif", compiled(), frames_dir=tmp_path / "frames")
        assert os.listdir(tmp_path) == []

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
    def test_of_an_mp4_on_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("av")
        monkeypatch.setattr(os, "getpid", lambda: "no")
        monkeypatch.setattr("secrets.token_hex", lambda _: "space")
        (tmp_path / ".a.mp4.no-space.part").symlink_to("/dev/full")
        with pytest.raises(JobFailed, match=r"a\.mp4 could not be written: No space left"):
            write(tmp_path / "a.mp4")
        assert os.listdir(tmp_path) == []
