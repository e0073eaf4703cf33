"""Which argument of a pipeline `--guidance` is: a transformer may be guided from inside, by a second call, or both."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from .errors import BadInput
from .job import Job


def is_true(pipe: Any) -> bool:
    """Whether a pipeline that knows both kinds of guidance has only the true one, by a second call.

    FLUX.1-dev was trained on its guidance scale; FLUX.1-schnell, Qwen-Image and the like take the argument, and nothing
    comes of it.
    """
    if "true_cfg_scale" not in inspect.signature(pipe.__call__).parameters:
        return False
    return not getattr(pipe.transformer.config, "guidance_embeds", False)


def complete(job: Job, pipe: Any, default: float | None) -> Job:
    """`job` with its guidance given.

    Args:
        default: of the preset.

    Raises:
        BadInput: `pipe` has no such guidance, or the negative prompt would count for nothing.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    name, true = type(pipe).__name__, is_true(pipe)
    argument = "true_cfg_scale" if true else "guidance_scale"
    if argument not in accepted:
        if job.guidance is not None:
            raise BadInput(f"--guidance {job.guidance:g}: {name} takes no guidance scale.")
        return dataclasses.replace(job, guidance=0.0)
    if job.true_cfg is not None and (true or "true_cfg_scale" not in accepted):
        raise BadInput(f"--true-cfg {job.true_cfg:g}: {name} has one kind of guidance here, --guidance.")
    guidance = next(x for x in (job.guidance, default, accepted[argument].default, 1.0) if x is not None)
    if job.negative is not None and "true_cfg_scale" in accepted:
        flag, scale = ("--guidance", guidance) if true else ("--true-cfg", job.true_cfg or 1.0)
        if scale <= 1:
            raise BadInput(
                f"--negative: in a {name} of this kind it counts with {flag} above 1, which is {scale:g}; "
                "each step then takes two calls."
            )
    return dataclasses.replace(job, guidance=guidance)


def arguments(job: Job, pipe: Any) -> dict[str, Any]:
    """What a complete job gives `pipe` for its guidance, beside what `pipe` does not know."""
    true = job.guidance if is_true(pipe) else job.true_cfg
    if true is None:
        return {"guidance_scale": job.guidance, "negative_prompt": job.negative}
    # Without any negative prompt, these pipelines leave true guidance out.
    negative = (job.negative or "") if true > 1 else None
    return {
        "true_cfg_scale": true,
        "negative_prompt": negative,
        **({} if is_true(pipe) else {"guidance_scale": job.guidance}),
    }
