"""What a picture remembers, and what is filled in anew when it is made again in another way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attnswap.pipelines.errors import BadInput
from attnswap.pipelines.job import ADDED, Companions, Job, again, from_record, is_another

ASKED = Job(prompt="a fox", output=Path(), width=128, height=128, route="ladder", methods={"hidiffusion": {"t2": 0.1}})


@pytest.fixture
def record() -> dict[str, Any]:
    """Of a job that asked for a size, a route and one setting; the rest was filled in."""
    resolved = {
        "steps": 12,
        "guidance": 2.0,
        "strengths": [0.4],
        "dtype": "float32",
        "methods": {"hidiffusion": {"t1": 1.0, "t2": 0.1}},
    }
    return ASKED.to_record() | resolved | {"asked": ASKED.to_record(), "device": "cpu", "versions": {}}


class TestUnchanged:
    def test_everything_is_as_it_was_resolved(self, record: dict[str, Any]) -> None:
        fields = again(record, {})
        assert fields == from_record(record)
        assert (fields["steps"], fields["strengths"]) == (12, (0.4,))
        assert fields["asked"] == record["asked"]

    @pytest.mark.parametrize("same", [{"width": 128}, {"model": "emoji-sd"}, {"route": "ladder"}])
    def test_also_where_the_same_is_asked_again(self, record: dict[str, Any], same: dict[str, Any]) -> None:
        assert again(record, same) == from_record(record)

    def test_another_seed_moves_nothing_else(self, record: dict[str, Any]) -> None:
        fields = again(record, {"seed": 5})
        assert fields.pop("asked") == record["asked"] | {"seed": 5}
        before = from_record(record)
        del before["asked"]
        assert fields == before | {"seed": 5}

    def test_settings_of_methods_are_merged(self, record: dict[str, Any]) -> None:
        fields = again(record, {"methods": {"hidiffusion": {"t1": 0.3}}})
        assert fields["methods"] == {"hidiffusion": {"t1": 0.3, "t2": 0.1}}
        assert fields["asked"]["methods"] == {"hidiffusion": {"t1": 0.3, "t2": 0.1}}


class TestFilledInAnew:
    @pytest.mark.parametrize(
        "change",
        [{"width": 256}, {"height": 256}, {"model": "b"}, {"route": "superres"}, {"route": "direct"}, {"steps": 4}],
    )
    def test_with_another_size_model_route_or_number_of_steps(
        self, record: dict[str, Any], change: dict[str, Any]
    ) -> None:
        fields = again(record, change)
        assert (fields["steps"], fields["guidance"], fields["strengths"]) == (change.get("steps"), None, None)
        assert fields["dtype"] == "auto"
        assert fields["methods"] == {"hidiffusion": {"t2": 0.1}}  # what was asked for stays
        assert fields | change == fields
        assert fields["asked"] | change == fields["asked"]

    def test_not_where_the_picture_does_not_know_what_was_asked(self, record: dict[str, Any]) -> None:
        del record["asked"]
        fields = again(record, {"width": 256})
        assert (fields["steps"], fields["width"], fields["asked"]) == (12, 256, None)

    def test_with_another_window_the_overlap(self, record: dict[str, Any]) -> None:
        clip = record | {"route": "windows", "strengths": None, "frames": 17, "window": 9, "overlap": 4}
        assert again(clip, {"window": 5})["overlap"] is None
        assert again(clip, {"window": 9})["overlap"] == 4


class TestStrengthsThatWereAskedFor:
    @pytest.fixture(params=[True, False], ids=["known", "of an earlier version"])
    def asked(self, request: pytest.FixtureRequest, record: dict[str, Any]) -> dict[str, Any]:
        record["asked"] = record["asked"] | {"strengths": [0.4]} if request.param else None
        return record

    @pytest.mark.parametrize("route", ["direct", "superres"])
    def test_stay_with_their_route(self, asked: dict[str, Any], route: str) -> None:
        fields = again(asked, {"route": route})
        assert (fields["route"], fields["strengths"]) == (route, None)
        assert fields["asked"] is None or fields["asked"]["strengths"] is None

    def test_are_kept_on_it(self, asked: dict[str, Any]) -> None:
        assert again(asked, {"route": "ladder", "steps": 4})["strengths"] == (0.4,)

    def test_give_way_to_others(self, asked: dict[str, Any]) -> None:
        assert again(asked, {"route": "superres", "strengths": (0.3,)})["strengths"] == (0.3,)


class TestCompanions:
    COMPANY = (("a fox", None, 0), ("a dog", None, 7))

    @pytest.fixture
    def record(self, record: dict[str, Any]) -> dict[str, Any]:
        batch = Companions(0, self.COMPANY).to_record()
        return record | {"route": "direct", "strengths": None, "batch": batch}

    @pytest.mark.parametrize(
        "same",
        [
            {},
            {"device": "cpu"},
            {"cpu_offload": "model"},
            {"seed": 0},
            {"prompt": "a fox", "width": 128},
            {"methods": {"hidiffusion": {"t1": 1.0}}},
        ],
    )
    def test_are_kept_by_the_same_picture(self, record: dict[str, Any], same: dict[str, Any]) -> None:
        assert again(record, same)["batch"] == Companions(0, self.COMPANY)
        assert not is_another(record, same)

    @pytest.mark.parametrize("change", [{"seed": 1}, {"device": "cpu", "steps": 4}, {"methods": {}}])
    def test_are_not_kept_by_another(self, record: dict[str, Any], change: dict[str, Any]) -> None:
        assert again(record, change)["batch"] is None
        assert is_another(record, change)

    def test_settings_that_are_repeated_are_no_change(self, record: dict[str, Any]) -> None:
        record["methods"] = {"hidiffusion": {"windows": [4, 4]}}
        assert not is_another(record, {"methods": {"hidiffusion": {"windows": (4, 4)}}})

    @pytest.mark.parametrize(
        "other",
        [
            {"seed": True},
            {"seed": -1},
            {"seed": 2**63},
            {"seed": None},
            {"prompt": "half of a pair: \ud800"},
            {"prompt": None},
            {"negative": 5},
            {"negative": "for one alone"},
        ],
    )
    def test_written_by_anybody_are_checked(self, record: dict[str, Any], other: dict[str, Any]) -> None:
        record["batch"]["of"][1] |= other
        with pytest.raises(BadInput, match=r"metadata does not say how .*: batch has"):
            from_record(record)

    @pytest.mark.parametrize(
        "batch",
        [
            {},
            {"index": True},
            {"index": 2},
            {"index": -2},
            {"index": 1},  # the place of another prompt
            {"of": []},
            {"of": "ab"},
            {"of": [1, 2]},
            {"of": [{"prompt": "a fox", "negative": None, "seed": 0}] * 1025},
        ],
    )
    def test_are_a_list_with_the_pictures_own_place(self, record: dict[str, Any], batch: dict[str, Any]) -> None:
        record["batch"] = record["batch"] | batch if batch else {}
        with pytest.raises(BadInput, match=r"metadata does not say how .*: batch"):
            from_record(record)

    @pytest.mark.parametrize("other", [{"route": "ladder"}, {"route": "superres"}, {"image": "a.png"}])
    def test_go_neither_by_routes_nor_from_images(self, record: dict[str, Any], other: dict[str, Any]) -> None:
        with pytest.raises(BadInput, match="batch goes neither by a route nor from an image"):
            from_record(record | other)

    def test_may_all_have_a_negative_prompt(self, record: dict[str, Any]) -> None:
        company = (("a dog", "", 1), ("a fox", "blurry", 0))
        record |= {"negative": "blurry", "batch": Companions(1, company).to_record()}
        assert from_record(record)["batch"] == Companions(1, company)


class TestRecord:
    def test_of_an_earlier_version_went_the_direct_way(self, record: dict[str, Any]) -> None:
        for name in (*ADDED, "asked"):
            del record[name]
        fields = from_record(record)
        assert (fields["route"], fields["strengths"], fields["low_memory"]) == ("direct", None, False)

    def test_is_json(self, record: dict[str, Any]) -> None:
        job = Job(**from_record(record), output=Path())
        assert job.strengths == (0.4,)
        assert json.loads(json.dumps(job.to_record())) == job.to_record()

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("route", 1),
            ("strengths", ["much"]),
            ("strengths", [True]),
            ("low_memory", "yes"),
            ("asked", []),
            ("asked", {"prompt": 1}),
            ("loras", [{"id": 1}]),
        ],
    )
    def test_written_by_anybody_is_checked(self, record: dict[str, Any], field: str, value: object) -> None:
        with pytest.raises(BadInput, match="metadata does not say how"):
            from_record(record | {field: value})

    @pytest.mark.parametrize("field", ["width", "height", "steps", "guidance"])
    def test_may_leave_open_what_was_not_asked_only(self, record: dict[str, Any], field: str) -> None:
        asked = record["asked"] | {field: None}
        assert from_record(record | {"asked": asked})["asked"][field] is None
        with pytest.raises(BadInput, match=field):
            from_record(record | {field: None})
