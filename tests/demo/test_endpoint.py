"""What pops up on the page."""

from __future__ import annotations

import gradio as gr
import pytest
from attnswap.demo import endpoint
from attnswap.demo.forms import reading

LEAK = "<img src=http://localhost:19999/leak>"


def test_a_message_is_no_html_and_goes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(gr, "Warning", lambda text, duration: said.append(text))
    endpoint.told(f"one\n{LEAK}", warn=True)
    error = endpoint.message(LEAK)
    assert said == [f"one<br>{error.message}"]
    assert "<" not in error.message
    assert error.duration == 10


def test_markdown_of_what_somebody_wrote_is_neither_picture_nor_link() -> None:
    assert reading.plain("![x](http://a.b)") == r"!\[x\](http\://a.b)"


def test_what_only_the_operator_can_do_is_left_out() -> None:
    said = "Try a smaller size, fewer frames, --low-memory, --vae-tiling or --cpu-offload model. Try --dtype float32."
    assert reading.in_words(said) == "Try a smaller size or fewer frames."
