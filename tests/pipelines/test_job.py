"""What a picture remembers, and what is filled in anew when it is made again in another way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attnswap.pipelines.errors import BadInput
from attnswap.pipelines.job import ADDED, Job, again, from_record

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
