"""Renders the training pictures: Noto Color Emoji through Pillow, subject by subject, with transparency.

Needs the font (Debian: `fonts-noto-color-emoji`, SIL OFL 1.1) and the PyPI package `emoji` for the names. Only
training imports this module; judging a trained model reads `pipelines/emoji_reference.py` instead.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FONT_SIZE = 109  # the only size the font's bitmaps exist in
FILL = 0.86  # share of the canvas the subject's longer side takes

# Saturated, far from each other and from white, so that "the colour is right" is a clear statement.
COLOURS = {
    "red": (230, 40, 40),
    "orange": (255, 145, 20),
    "yellow": (250, 225, 50),
    "green": (50, 170, 70),
    "blue": (45, 100, 230),
    "purple": (140, 60, 190),
}

# Animals, plants and food, mixed so that the first N are a fair choice; look-alikes are left out.
SUBJECTS = (
    "🦊🍌🌵🦁🍓🌻🐼🍕🐧🍎🌲🐘🍩🦉🍉🐯🌹🦒🍔🐸🍇🦓🌴🐻🥕🍄🐢🍍🐙🥑🌷🦈🍰🐺🍒🦀🍋🐨🍁🐬🍪🐌🥦🦋🍦🐝🍅🐞🥐🦄"
    "🐳🍆🐊🌽🐍🌸🐎🍐🐄🥨🐖🍭🐑🍟🐓🥞🐤🍣🐦🍙🦆🥥🦅🥝🦇🌶🐠🌳🐡🍀🐜🌺🐛🌱🦂🍺🦌🥚🦍🍞🦎🦏🥜🦔🦕🦖🦘🦙"
    "🦚🦜🦝🦢🦥🦩🐉🐫🐶🐱🐰🐒"
)


def subject_name(character: str) -> str:
    """The name in captions: the `emoji` package's English name, lower case, without the words "face"."""
    import emoji

    data = emoji.EMOJI_DATA.get(character) or emoji.EMOJI_DATA[character + "\ufe0f"]
    name = data["en"].strip(":").replace("_", " ").lower().replace("t-rex", "tyrannosaurus")
    return name.removesuffix(" face")


def render(character: str, side: int, font: str | Path = FONT) -> np.ndarray:
    """One subject, centred and as large as `FILL` allows, `[side, side, 4]` uint8 (not premultiplied)."""
    face = ImageFont.truetype(str(font), FONT_SIZE)
    glyph = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(glyph).text((8, 8), character, font=face, embedded_color=True)
    glyph = glyph.crop(glyph.getchannel("A").getbbox())
    scale = FILL * side / max(glyph.size)
    size = tuple(max(1, round(length * scale)) for length in glyph.size)
    glyph = glyph.resize(size, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(glyph, ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(canvas)


def render_reference(side: int, subjects: int | None = None, font: str | Path = FONT):
    """The first `subjects` subjects as a `Reference` of `side` pixels."""
    from ..pipelines.emoji_reference import Reference

    characters = SUBJECTS[:subjects]
    sprites = np.stack([render(character, side, font) for character in characters])
    return Reference(tuple(subject_name(character) for character in characters), sprites, COLOURS)
