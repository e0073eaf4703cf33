"""Compilation: by blocks where they are named, and what is missing is said before."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attnswap.pipelines import compilation, load
from attnswap.pipelines.compilation import compile_denoisers
from attnswap.pipelines.errors import BadInput
from torch import nn

from ..accel import tiny_dit
from .pictures import picture


class TestCompilation:
    @pytest.fixture
    def compiled(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
        """The class of every module that is compiled, by a compiler that only counts."""
        torch._dynamo.reset()
        seen: list[str] = []
        compile_module = nn.Module.compile

        def watched(module: nn.Module, *arguments: Any, **named: Any) -> None:
            seen.append(type(module).__name__)
            compile_module(module, *arguments, **{**named, "backend": "eager"})

        monkeypatch.setattr(nn.Module, "compile", watched)
        yield seen
        torch._dynamo.reset()

    def test_is_of_the_repeated_blocks(self, sd: Any, compiled: list[str]) -> None:
        stock = picture(sd)
        assert compile_denoisers(sd) == "unet by its BasicTransformerBlock"
        assert set(compiled) == {"BasicTransformerBlock"}
        torch.testing.assert_close(picture(sd), stock, atol=1e-4, rtol=1e-3)

    def test_is_of_every_denoiser(self, tiny_wan: Path, compiled: list[str]) -> None:
        pipe = load.load(load.find(str(tiny_wan)), dtype=torch.float32)
        assert (
            compile_denoisers(pipe)
            == "transformer by its WanTransformerBlock, transformer_2 by its WanTransformerBlock"
        )
        assert len(compiled) == 2

    def test_is_of_the_whole_where_no_blocks_are_named(self, compiled: list[str]) -> None:
        assert compile_denoisers(tiny_dit.IMAGES["sd3"]()[0]) == "transformer as a whole"
        assert compiled == ["SD3Transformer2DModel"]

    def test_needs_a_compiler(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        builder = importlib.import_module("torch._inductor.cpp_builder")
        cpu = torch.device("cpu")
        with torch._inductor.config.patch({"cpp.cxx": (str(tmp_path / "no-such-compiler"),)}):
            getattr(builder.cpp_compiler_search, "cache_clear", lambda: None)()
            with pytest.raises(BadInput, match=r"--compile needs a C\+\+ compiler such as g\+\+"):
                compilation.check_compiler(cpu)
        monkeypatch.setattr(builder, "get_cpp_compiler", lambda: "g++")
        monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
        with pytest.raises(BadInput, match=r"the headers of Python"):
            compilation.check_compiler(cpu)
        (tmp_path / "Python.h").touch()
        compilation.check_compiler(cpu)
        monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
        with pytest.raises(BadInput, match="--compile needs triton on cuda"):
            compilation.check_compiler(torch.device("cuda"))
