"""What is compared has a name that no other has, and that a file can bear."""

from __future__ import annotations

import pytest
from attnswap.pipelines.compare.variants import DENSE, Variant, ids, parse, slug
from attnswap.pipelines.errors import BadInput


class TestParse:
    def test_one_method_with_two_settings_is_two_variants(self) -> None:
        found = parse([(["adaspa"], ["sparsity=0.8"]), (["adaspa"], ["sparsity = 0.9"])])
        assert [variant.name for variant in found] == ["adaspa sparsity=0.8", "adaspa sparsity=0.9"]
        assert [variant.methods["adaspa"]["sparsity"] for variant in found] == [0.8, 0.9]

    def test_methods_together_are_one_variant(self) -> None:
        (found,) = parse([(["hidiffusion", "linfusion"], ["t1=0.5"])])
        assert found.name == "hidiffusion+linfusion t1=0.5"
        assert found.methods == {"hidiffusion": {"t1": 0.5}, "linfusion": {}}

    def test_auto_is_left_to_the_model(self) -> None:
        assert parse([(["auto"], [])]) == (Variant("auto", {"auto": {}}),)

    @pytest.mark.parametrize(
        ("choices", "words"),
        [
            ([(["adaspar"], [])], "Did you mean adaspa"),
            ([(["adaspa"], ["sparse=0.9"])], "no such setting"),
            ([([], [])], "--method without a name"),
            ([(["auto"], ["t1=1"])], "stands alone"),
            ([(["auto", "clear"], [])], "stands alone"),
            ([(["clear"], []), (["adaspa"], []), (["clear"], [])], "clear is there 2 times"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, choices: list[tuple[list[str], list[str]]], words: str) -> None:
        with pytest.raises(BadInput, match=words):
            parse(choices)


class TestIds:
    def test_are_names_of_files(self) -> None:
        found = ids([DENSE, Variant("adaspa sparsity=0.8", {}), Variant("clear weights=../é/x", {})])
        assert list(found.values()) == ["dense", "adaspa-sparsity-0.8", "clear-weights-..-x"]

    def test_differ_where_the_names_look_alike(self) -> None:
        found = ids([Variant("a/b", {}), Variant("a b", {}), Variant("a=b", {})])
        assert len(set(found.values())) == 3

    @pytest.mark.parametrize("text", ["", "狐", "../..", "-", ".hidden", "a" * 10_000, "con\x00\n/etc"])
    def test_a_slug_goes_anywhere(self, text: str) -> None:
        found = slug(text)
        assert len(found) < 50
        assert not set(found) & set("/\\:\0\n ")
        assert not found.startswith((".", "-"))
