"""Pictures of finished stages beside the output, from which the same command goes on."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

from . import save
from .errors import BadInput, NotWritten
from .routes import Stage

_STAGE = re.compile(r"\d+-\d+x\d+\.png")


class StageFolder:
    """A hidden folder beside the output with one PNG a finished stage, the last (the output itself) excepted.

    Args:
        output: the picture that the stages lead to.
        job: what its record will say; a stage of another job is never used.
    """

    def __init__(self, output: Path, job: dict[str, Any]) -> None:
        self.output = output
        self.path = output.with_name(f".{output.name}.stages")
        self._job = json.loads(json.dumps(job))

    def latest(self, stages: tuple[Stage, ...]) -> tuple[Stage, Image.Image, dict[str, Any]] | None:
        """The last stage there is, its picture, and what was carried on with it."""
        for stage in reversed(stages[:-1]):
            path = self.file(stage)
            try:
                record = save.read_record(path)
                if record.get("job") != self._job or record.get("stage") != stage.number:
                    continue
                with save.open_png(path) as image:
                    if image.size != (stage.width, stage.height):
                        continue
                    return stage, image.convert("RGB"), record["carried"]
            except (BadInput, KeyError, OSError, SyntaxError):  # not there, half-written or another program's
                continue
        return None

    def keep(self, stage: Stage, image: Image.Image, carried: dict[str, Any]) -> None:
        try:
            self.path.mkdir(exist_ok=True)
            save.write_png(image, self.file(stage), {"stage": stage.number, "job": self._job, "carried": carried})
        except OSError as error:
            raise NotWritten(self.file(stage), error) from error

    def remove(self) -> None:
        """Take away the stages of this job, and the folder if nothing else is in it."""
        with contextlib.suppress(OSError):
            for file in self.path.iterdir():
                if _STAGE.fullmatch(file.name) and self._is_of_this_job(file):
                    file.unlink()
            self.path.rmdir()

    def _is_of_this_job(self, file: Path) -> bool:
        with contextlib.suppress(BadInput):
            return bool(save.read_record(file).get("job") == self._job)
        return False

    def file(self, stage: Stage) -> Path:
        return self.path / f"{stage.number}-{stage.width}x{stage.height}.png"
