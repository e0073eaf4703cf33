"""An unfinished distillation on disk: one safetensors file, and one line a step of what the losses were."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..pipelines import save
from ..pipelines.errors import BadInput, JobFailed

STATE, LOSSES = "state.safetensors", "losses.jsonl"


@dataclass(frozen=True)
class Checkpoint:
    """The folder of a run's state. Random numbers need none: they depend on the seed and the step."""

    folder: Path

    def exists(self) -> bool:
        return (self.folder / STATE).is_file()

    def facts(self) -> dict[str, Any]:
        """What `write` was given as facts.

        Raises:
            BadInput: the file is damaged.
        """
        try:
            with safe_open(self.folder / STATE, "pt") as file:
                facts: dict[str, Any] = json.loads(file.metadata()["facts"])
                return facts
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{self.folder / STATE} is no checkpoint of a distillation ({error}).") from error

    def write(
        self,
        facts: Mapping[str, Any],
        student: Mapping[str, nn.Parameter],
        average: Mapping[str, Tensor] | None,
        optimizer: torch.optim.Optimizer,
        losses: list[dict[str, float]],
    ) -> None:
        """Replace the checkpoint in one move; `losses` are those since the last one.

        Raises:
            JobFailed: it could not be written; the one before is still there.
        """
        tensors = {f"student.{name}": parameter.detach() for name, parameter in student.items()}
        tensors |= {f"average.{name}": tensor for name, tensor in (average or {}).items()}
        for name, parameter in student.items():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
        with writing(self.folder / LOSSES):
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / LOSSES).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in losses)
        with writing(self.folder / STATE), save.atomic(self.folder / STATE) as part:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                part.name,
                {"facts": json.dumps(dict(facts))},
            )

    def read(
        self,
        student: Mapping[str, nn.Parameter],
        average: Mapping[str, Tensor] | None,
        optimizer: torch.optim.Optimizer,
    ) -> dict[str, Any]:
        """Fill what is given from the checkpoint; returns its facts."""
        tensors = load_file(self.folder / STATE)
        with torch.no_grad():
            for name, parameter in student.items():
                parameter.copy_(tensors[f"student.{name}"])
                prefix = f"optimizer.{name}."
                state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                optimizer.state[parameter] = {
                    key: value if key == "step" else torch.empty_like(parameter).copy_(value)
                    for key, value in state.items()
                }
            for name, tensor in (average or {}).items():
                tensor.copy_(tensors[f"average.{name}"])
        return self.facts()

    def losses(self, steps: int) -> list[dict[str, float]]:
        """The rows of the first `steps` steps; later ones, from a run that ended without a checkpoint, are dropped.

        Nothing is read from the first damaged line on, which a run killed while writing leaves: some may be missing.

        Raises:
            JobFailed: the file could not be written anew.
        """
        path = self.folder / LOSSES
        if not path.is_file():
            return []
        rows = {}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if row["step"] <= steps:
                rows[row["step"]] = row
        kept = [rows[step] for step in sorted(rows)]
        with writing(path), save.atomic(path) as file:
            file.writelines((json.dumps(row) + "\n").encode() for row in kept)
        return kept


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """For a block that writes `path`.

    Raises:
        JobFailed: the block failed on a full disk, a missing right and the like.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise JobFailed(f"{path} could not be written: {reason}") from error
