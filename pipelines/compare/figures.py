"""What a comparison found: an outcome for every variant of every shot, and their medians."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from .metrics import Likeness
from .variants import DENSE, Variant


@dataclass(frozen=True)
class Shot:
    """A prompt with a seed, of which every variant makes a picture or clip."""

    number: int
    prompt: str
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What came of one variant of a shot.

    Attributes:
        error: why there is nothing; the other fields are empty then.
        file: the name of the picture or clip.
        peak_bytes: the most memory held.
        peak_since_start: not in this run, but ever.
        density: share of the query-key pairs that were computed, in the layers that the method accelerates.
        likeness: to dense attention; None where that failed, and for dense attention itself.
        report: `Report.summary()`.
        notes: what was done that nobody asked for.
    """

    error: str | None = None
    file: str | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    peak_since_start: bool = False
    density: float | None = None
    likeness: Likeness | None = None
    report: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Summary:
    """A variant over all shots: medians, the highest peak of memory, and how many were made, failed, and identical.

    `speedup` is that of the shots which dense attention made as well; `error` is the first.
    """

    made: int
    failed: int
    seconds: float | None
    speedup: float | None
    peak_bytes: int | None
    density: float | None
    psnr: float | None
    ssim: float | None
    worst_psnr: float | None
    worst_ssim: float | None
    identical: int
    error: str | None


@dataclass
class Comparison:
    """Everything that is shown and written.

    Attributes:
        variants: dense attention first.
        outcomes: by the number of the shot and the name of the variant; what was never begun is missing.
        size: width and height in pixels.
        frames: of each clip; None for pictures.
        fps: of the clips, as text.
        about: the model and its settings, in words, in the order in which they are shown.
        record: how the pictures of dense attention were made, prompt and seed apart.
        command: what was typed.
        date: and time, in ISO 8601.
        settings: by the name of the variant, all settings of its methods, those that nobody named included.
        notes: what is to be known of the figures.
        warm_up_steps: that every variant ran before, which are not counted.
    """

    shots: tuple[Shot, ...]
    variants: tuple[Variant, ...]
    size: tuple[int, int]
    frames: int | None = None
    fps: str | None = None
    about: dict[str, str] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    date: str = ""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warm_up_steps: int = 0
    outcomes: dict[tuple[int, str], Outcome] = field(default_factory=dict)

    @property
    def interrupted(self) -> bool:
        """Not all was run."""
        return len(self.outcomes) < len(self.shots) * len(self.variants)

    @property
    def begun(self) -> tuple[Shot, ...]:
        """Those of which there is something to show."""
        numbers = {number for number, _ in self.outcomes}
        return tuple(shot for shot in self.shots if shot.number in numbers)

    def outcome(self, shot: Shot, variant: Variant) -> Outcome | None:
        return self.outcomes.get((shot.number, variant.name))

    def of(self, variant: Variant) -> dict[int, Outcome]:
        """Its outcomes by the number of the shot."""
        return {number: found for (number, name), found in self.outcomes.items() if name == variant.name}

    def speedup(self, shot: Shot, variant: Variant) -> float | None:
        """How many times faster than dense attention in the same shot."""
        dense, other = self.outcome(shot, DENSE), self.outcome(shot, variant)
        if not dense or not other or not dense.seconds or not other.seconds:
            return None
        return dense.seconds / other.seconds

    def summary(self, variant: Variant) -> Summary:
        found = self.of(variant)
        made = {number: outcome for number, outcome in found.items() if outcome.error is None}
        errors = [outcome.error for outcome in found.values() if outcome.error is not None]
        alike = [outcome.likeness for outcome in made.values() if outcome.likeness]
        both = [number for number, outcome in self.of(DENSE).items() if outcome.error is None and number in made]
        dense, own = (_median(self.of(each)[number].seconds for number in both) for each in (DENSE, variant))
        return Summary(
            made=len(made),
            failed=len(errors),
            seconds=_median(outcome.seconds for outcome in made.values()),
            speedup=dense / own if dense and own else None,
            peak_bytes=max((outcome.peak_bytes for outcome in made.values() if outcome.peak_bytes), default=None),
            density=_median(outcome.density for outcome in made.values()),
            psnr=_median(likeness.psnr for likeness in alike),
            ssim=_median(likeness.ssim for likeness in alike),
            worst_psnr=min((likeness.worst_psnr for likeness in alike), default=None),
            worst_ssim=min((each.worst_ssim for each in alike if each.worst_ssim is not None), default=None),
            identical=sum(likeness.identical for likeness in alike),
            error=errors[0] if errors else None,
        )

    def notes_of(self, variant: Variant) -> list[str]:
        """Each once, in the order in which they came up."""
        found = self.of(variant).values()
        return list(dict.fromkeys(note for outcome in found for note in outcome.notes))

    def to_dict(self) -> dict[str, Any]:
        """A JSON document; an infinite PSNR is null, with `identical` true."""
        return {
            "command": self.command,
            "date": self.date,
            "about": self.about,
            "made_with": self.record,
            "notes": self.notes,
            "warm_up_steps": self.warm_up_steps,
            "interrupted": self.interrupted,
            "variants": [
                {
                    "name": variant.name,
                    "asked": variant.methods,
                    "settings": self.settings.get(variant.name),
                    **_finite(vars(self.summary(variant))),
                    "notes": self.notes_of(variant),
                }
                for variant in self.variants
            ],
            "shots": [
                {**vars(shot), "outcomes": [self._outcome_dict(shot, variant) for variant in self.variants]}
                for shot in self.shots
            ],
        }

    def _outcome_dict(self, shot: Shot, variant: Variant) -> dict[str, Any]:
        outcome = self.outcome(shot, variant)
        if outcome is None or outcome.error is not None:
            return {"variant": variant.name, "error": outcome.error if outcome else "not run"}
        likeness = outcome.likeness
        nearness = {**_finite(vars(likeness)), "identical": likeness.identical} if likeness else None
        rest = {name: value for name, value in vars(outcome).items() if name != "likeness"}
        return {"variant": variant.name, **rest, "speedup": self.speedup(shot, variant), "likeness": nearness}


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and math.isinf(value) else value for name, value in values.items()}
