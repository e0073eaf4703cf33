"""Training data of a distillation: found, checked, cut, dealt out, or drawn by the teacher from captions."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attnswap.pipelines import load
from attnswap.pipelines.errors import BadInput, JobFailed
from attnswap.training.distill_data import (
    Example,
    Order,
    Pictures,
    generator,
    loader,
    nearest_shape,
    picture_size,
    read_captions,
    read_folder,
    same_area,
)
from attnswap.training.distill_drawing import Sampling, draw_folder
from PIL import Image


def picture(path: Path, colour: Any = "red", size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


class TestFolder:
    def test_captions_beside_the_pictures(self, tmp_path: Path) -> None:
        fox = picture(tmp_path / "a" / "fox.PNG")
        owl = picture(tmp_path / "owl.jpg")
        fox.with_suffix(".txt").write_text("a fox\n")
        owl.with_suffix(".txt").write_text("an owl")
        (tmp_path / "notes.txt").write_text("not a caption")
        assert read_folder(tmp_path) == [Example(fox, "a fox"), Example(owl, "an owl")]

    def test_metadata_of_an_imagefolder(self, tmp_path: Path) -> None:
        fox = picture(tmp_path / "train" / "fox.webp")
        entry = {"file_name": "train/fox.webp", "text": "a fox", "licence": "free"}
        (tmp_path / "metadata.jsonl").write_text(json.dumps(entry) + "\n\n")
        assert read_folder(tmp_path) == [Example(fox, "a fox")]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "line 1: expected"),
            ("[]", "line 1: expected"),
            ('{"file_name": "fox.png"}', "line 1: expected"),
            ('{"file_name": "fox.png", "text": " "}', "text not empty"),
            ('{"file_name": "owl.png", "text": "an owl"}', "owl.png does not exist"),
        ],
    )
    def test_bad_metadata_names_the_line(self, tmp_path: Path, line: str, message: str) -> None:
        picture(tmp_path / "fox.png")
        (tmp_path / "metadata.jsonl").write_text(line + "\n")
        with pytest.raises(BadInput, match=message):
            read_folder(tmp_path)

    def test_what_is_missing_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match="no such folder"):
            read_folder(tmp_path / "none")
        with pytest.raises(BadInput, match="no pictures"):
            read_folder(tmp_path)
        picture(tmp_path / "fox.png")
        picture(tmp_path / "owl.png").with_suffix(".txt").write_text("an owl")
        with pytest.raises(BadInput, match=r"1 of 2 pictures have no caption, the first is fox\.png"):
            read_folder(tmp_path)

    def test_a_file_that_is_no_picture_is_refused_at_once(self, tmp_path: Path) -> None:
        (tmp_path / "fox.png").write_bytes(b"not a picture")
        (tmp_path / "fox.txt").write_text("a fox")
        with pytest.raises(BadInput, match=r"fox\.png is not a readable picture"):
            read_folder(tmp_path)

    def test_a_mark_at_the_start_and_line_separators_inside_are_read(self, tmp_path: Path) -> None:
        fox = picture(tmp_path / "fox.png")
        entry = json.dumps({"file_name": "fox.png", "text": "a fox\u2028in snow"}, ensure_ascii=False)
        (tmp_path / "metadata.jsonl").write_text(entry + "\r\n", encoding="utf-8-sig")
        assert read_folder(tmp_path) == [Example(fox, "a fox\u2028in snow")]
        (tmp_path / "metadata.jsonl").unlink()
        fox.with_suffix(".txt").write_text("a fox", encoding="utf-8-sig")
        assert read_folder(tmp_path) == [Example(fox, "a fox")]

    @pytest.mark.parametrize("name", ["fox.txt", "metadata.jsonl"])
    def test_text_that_is_not_utf8_names_the_file(self, tmp_path: Path, name: str) -> None:
        picture(tmp_path / "fox.png")
        (tmp_path / name).write_bytes("ein Käuzchen".encode("latin-1"))
        with pytest.raises(BadInput, match=f"{name} is not a readable text file in UTF-8"):
            read_folder(tmp_path)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_damaged_picture_is_named_when_it_is_read(self, tmp_path: Path, workers: int) -> None:
        path = tmp_path / "fox.png"
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:2000])
        (tmp_path / "fox.txt").write_text("a fox")
        batches = iter(loader(Pictures(read_folder(tmp_path), [(8, 8)]), Order([range(1)], 1, seed=0), workers))
        with pytest.raises(JobFailed, match=r"fox\.png could not be read"):
            next(batches)


class TestCaptions:
    def test_one_a_line(self, tmp_path: Path) -> None:
        (tmp_path / "c.txt").write_text("a fox\n\n  an owl \n", encoding="utf-8")
        assert read_captions(tmp_path / "c.txt") == ["a fox", "an owl"]

    @pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00"])
    def test_none_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "c.txt").write_bytes(content)
        with pytest.raises(BadInput, match=r"c\.txt"):
            read_captions(tmp_path / "c.txt")


class TestPictures:
    @pytest.mark.parametrize(
        ("size", "expected"),
        [((80, 40), [40, 80, 0, 20, 40, 40]), ((20, 60), [60, 20, 40, 0, 40, 40]), ((40, 40), [40, 40, 0, 0, 40, 40])],
    )
    def test_short_side_and_centre(self, tmp_path: Path, size: tuple[int, int], expected: list[int]) -> None:
        width, height = size
        image = np.zeros((height, width, 3), np.uint8)
        image[height // 2 - 3 : height // 2 + 3, width // 2 - 3 : width // 2 + 3] = 255
        path = tmp_path / "p.png"
        Image.fromarray(image).save(path)
        item = Pictures([Example(path, "x")], [(40, 40)])[0]
        assert item["sizes"] == expected
        assert item["pixels"].shape == (3, 40, 40)
        rows, columns = (item["pixels"].mean((0, dim)) + 1 for dim in (2, 1))
        middle = torch.arange(40) - 19.5
        assert abs((rows * middle).sum() / rows.sum()) < 0.1
        assert abs((columns * middle).sum() / columns.sum()) < 0.1

    def test_range_and_transparency(self, tmp_path: Path) -> None:
        clear = picture(tmp_path / "clear.png", (255, 0, 0, 0), mode="RGBA")
        black = picture(tmp_path / "black.png", "black")
        pictures = Pictures([Example(clear, "x"), Example(black, "y")], [(8, 8)] * 2)
        assert (pictures[0]["pixels"] == 1).all()
        assert (pictures[1]["pixels"] == -1).all()

    def test_grey_of_16_bits_keeps_its_range(self, tmp_path: Path) -> None:
        grey = np.repeat(np.array([0, 32639, 65535], np.uint16), 3).reshape(3, 3)
        Image.fromarray(grey).save(tmp_path / "grey.png")
        pixels = Pictures([Example(tmp_path / "grey.png", "x")], [(3, 3)])[0]["pixels"]
        torch.testing.assert_close(pixels[0, :, 0], torch.tensor([0, 127, 255]) / 127.5 - 1)

    def test_orientation_of_a_photograph(self, tmp_path: Path) -> None:
        path = tmp_path / "p.jpg"
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by a quarter
        Image.new("RGB", (80, 40)).save(path, exif=exif)
        assert Pictures([Example(path, "x")], [(40, 40)])[0]["sizes"][:2] == [80, 40]


class TestSizes:
    def test_a_picture_covers_its_size(self, tmp_path: Path) -> None:
        item = Pictures([Example(picture(tmp_path / "p.png", size=(60, 60)), "x")], [(40, 20)])[0]
        assert item["pixels"].shape == (3, 20, 40)
        assert item["sizes"] == [60, 60, 10, 0, 20, 40]

    def test_the_nearest_shape_counts_and_not_the_size(self) -> None:
        choices = [(1024, 1024), (64, 32), (32, 64)]
        assert [nearest_shape(size, choices) for size in ((100, 90), (2000, 1100), (3, 7))] == choices

    def test_shapes_are_kept_within_a_step(self) -> None:
        assert same_area((1920, 1080), 1024, 64) == (1344, 768)
        assert same_area((1080, 1920), 1024, 64) == (768, 1344)
        assert same_area((500, 500), 1024, 64) == (1024, 1024)
        assert same_area((5000, 10), 64, 16)[1] == 16

    def test_a_photograph_on_its_side_counts_upright(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (80, 40)).save(tmp_path / "p.jpg", exif=exif)
        assert picture_size(tmp_path / "p.jpg") == (40, 80)
        assert picture_size(picture(tmp_path / "p.png", size=(80, 40))) == (80, 40)


class TestOrder:
    def test_batches_are_of_one_group_and_in_proportion(self) -> None:
        groups = [range(8), range(8, 12)]
        batches = list(itertools.islice(Order(groups, 2, seed=0), 12))
        kinds = [{index >= 8 for index in batch} for batch in batches]
        assert all(len(kind) == 1 for kind in kinds)
        assert sum(kind == {True} for kind in kinds) == 4
        assert set(Counter(itertools.chain(*batches)).values()) == {2}
        parts = [list(itertools.islice(Order(groups, 2, seed=0, process=p, processes=2), 6)) for p in (0, 1)]
        assert [batch for pair in zip(*parts, strict=True) for batch in pair] == batches
        assert list(itertools.islice(Order(groups, 2, seed=0, start=5), 7)) == batches[5:]

    def test_every_picture_once_an_epoch_in_changing_order(self) -> None:
        batches = list(itertools.islice(Order([range(6)], 4, seed=0), 6))
        indices = list(itertools.chain(*batches))
        epochs = [indices[i : i + 6] for i in range(0, 24, 6)]
        assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1

    def test_a_later_start_goes_on(self) -> None:
        whole = list(itertools.islice(Order([range(5)], 2, seed=3), 9))
        assert list(itertools.islice(Order([range(5)], 2, seed=3, start=4), 5)) == whole[4:]
        assert list(itertools.islice(Order([range(5)], 2, seed=4), 9)) != whole

    def test_processes_share_an_epoch(self) -> None:
        parts = [list(itertools.islice(Order([range(12)], 2, seed=0, process=p, processes=3), 2)) for p in range(3)]
        assert set(Counter(itertools.chain(*itertools.chain(*parts))).values()) == {1}

    def test_random_numbers_depend_on_their_purpose_and_place(self) -> None:
        drawn = [
            torch.rand(1, generator=generator(*numbers)).item()
            for numbers in ((0, 0, 1), (0, 1, 0, 0), (0, 1, 0, 1), (0, 1, 1, 0), (1, 1, 0, 0))
        ]
        assert len(set(drawn)) == 5
        assert torch.rand(1, generator=generator(0, 0, 1)).item() == drawn[0]


class TestDrawing:
    @pytest.fixture
    def pipe(self, tiny_sdxl: Path) -> Any:
        pipe = load.load(load.find(str(tiny_sdxl)), dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def test_captions_become_a_folder(self, pipe: Any, tmp_path: Path) -> None:
        captions = ["a fox", "an owl", "a kiwi"]
        draw_folder(pipe, captions, tmp_path, [Sampling(32, 32, 2, 2.0)], seed=0, batch=2)
        examples = read_folder(tmp_path)
        assert [example.caption for example in examples] == captions
        assert {Image.open(example.path).size for example in examples} == {(32, 32)}
        assert len({example.path.read_bytes() for example in examples}) == 3

    def test_shares_and_what_is_there_already_make_no_difference(self, pipe: Any, tmp_path: Path) -> None:
        captions, sampling = ["a fox", "an owl", "a kiwi"], [Sampling(32, 32, 2, 2.0)]
        whole, parted = tmp_path / "whole", tmp_path / "parted"
        draw_folder(pipe, captions, whole, sampling, seed=0, batch=1)
        counts: list[int] = []
        for process in (0, 1):
            draw_folder(pipe, captions, parted, sampling, seed=0, batch=1, process=process, processes=2)
        draw_folder(pipe, captions, parted, sampling, seed=0, batch=1, progress=counts.append)
        assert counts == [3]
        for path in whole.iterdir():
            assert (parted / path.name).read_bytes() == path.read_bytes()

    @pytest.mark.parametrize(
        ("colour", "flagged", "message"), [("black", False, "came out black"), ("red", True, "safety checker")]
    )
    def test_a_black_picture_is_no_data(self, tmp_path: Path, colour: str, flagged: bool, message: str) -> None:
        def pipe(captions: list[str], **_: Any) -> Any:
            pictures = [Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), colour)]
            return SimpleNamespace(images=pictures, nsfw_content_detected=[False, flagged])

        with pytest.raises(JobFailed, match=f"'an owl': .*{message}"):
            draw_folder(pipe, ["a fox", "an owl"], tmp_path, [Sampling(8, 8)], seed=0, batch=2)
        assert not list(tmp_path.glob("*.png"))

    def test_a_folder_of_other_pictures_is_refused(self, pipe: Any, tmp_path: Path) -> None:
        draw_folder(pipe, ["a fox"], tmp_path, [Sampling(32, 32, 1, 2.0)], seed=0, batch=1)
        for captions, sampling in ((["an owl"], Sampling(32, 32, 1, 2.0)), (["a fox"], Sampling(64, 32, 1, 2.0))):
            with pytest.raises(BadInput, match="other captions or another size"):
                draw_folder(pipe, captions, tmp_path, [sampling], seed=0, batch=1)
