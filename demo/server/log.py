"""What the operator of a server is told of the jobs of its visitors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...pipelines.job import Job


def described(job: Job, methods: Sequence[str] = ()) -> str:
    """What is run, without what was typed: "emoji-sd, 128x128, 12 steps, hidiffusion".

    Args:
        job: complete.
        methods: that are compared; the job's own without.
    """
    frames = f", {job.frames} frames" if job.frames else ""
    what = f"{'comparison of ' if methods else ''}{job.model}, {job.width}x{job.height}{frames}, {job.steps} steps"
    return f"{what}, {' / '.join(methods) or '+'.join(job.methods) or 'dense'}"
