"""Files with bytes changed at random lead to rows or to one kind of error, never to a traceback."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from attnswap.pipelines.batch.fields import why_no_picture
from attnswap.pipelines.batch.manifest import BadManifest, read
from attnswap.pipelines.errors import BadInput
from attnswap.pipelines.job import Job
from PIL import Image


def mutated(data: bytes, chance: random.Random) -> bytes:
    """`data` with a few bytes changed, cut out, doubled or put in."""
    damaged = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        start = chance.randrange(len(damaged) + 1)
        end = min(len(damaged), start + chance.randint(0, 12))
        with_what = (
            b"",
            chance.randbytes(end - start),
            bytes(damaged[start:end]) * 2,
            chance.choice(
                [b'"', b"\n", b"\r", b"\0", b",", b"{", b"[", b"\\u", b"\xff", b"-", b"=", b"\xef\xbb\xbf", b"1e9"]
            ),
        )
        damaged[start:end] = chance.choice(with_what)
    return bytes(damaged)


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".txt"])
def test_no_bytes_whatsoever_lead_to_anything_but_rows_or_bad_input(tmp_path: Path, kind: str) -> None:
    chance, path = random.Random(kind), tmp_path / f"rows{kind}"
    rows: list[dict[str, Any]] = [
        {"prompt": 'a "red" füchslein', "seed": 3, "fps": 23.976, "guidance": 7.5, "id": "fox", "width": 64},
        {"prompt": "a dog, large", "method": "clear", "settings": "radius=8; ntk_factor=1.5", "steps": 12},
        {"prompt": "狐", "method": "hidiffusion", "settings": "windows=(2,2); t1=none", "image": "fox.png"},
    ]
    Image.new("RGB", (8, 8)).save(tmp_path / "fox.png")
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[str(row.get(name, "")).replace('"', '""') for name in names] for row in rows]
    whole = {
        ".jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        ".csv": "\n".join([",".join(names), *(",".join(f'"{cell}"' for cell in row) for row in cells)]),
        ".txt": "\n".join(row["prompt"] for row in rows),
    }[kind].encode()
    outcomes = set()
    for _ in range(400):
        try:
            path.write_bytes(mutated(whole, chance))
            outcomes.add(bool(read(path, Job(""))))
        except BadInput as refusal:
            str(refusal).encode()
            outcomes.add(type(refusal))
    assert outcomes == {True, BadInput, BadManifest}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_damaged_picture_is_read_or_refused_with_a_reason(tmp_path: Path, kind: str) -> None:
    chance, path = random.Random(kind), tmp_path / "fox"
    Image.new("RGB", (16, 16), "red").save(path, kind)
    whole = path.read_bytes()
    reasons = set()
    for _ in range(100):
        path.write_bytes(mutated(whole, chance))
        reasons.add(why_no_picture(path))
    assert len(reasons) > 1
