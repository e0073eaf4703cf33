"""What a message offers in place of a name that is not known."""

from __future__ import annotations

from attnswap.pipelines.errors import near


def test_names_that_are_nearly_the_same_are_offered():
    assert near("emoji-ds", ["emoji-sd", "other"]) == " Did you mean emoji-sd?"


def test_otherwise_what_there_is_is_listed_a_dozen_at_most():
    assert near("x", ["b", "a"]) == " There are: a, b."
    assert near("x", (f"picture {i:03}" for i in range(500))).endswith(", picture 011 and 488 more.")


def test_where_nothing_is_known_nothing_is_said():
    assert near("x", []) == ""
