"""Another scheduler in place of a model's own: which suit it, and how they are set up alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .diffusers_log import heard_from_diffusers
from .errors import BadInput

COGVIDEOX = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
# Fit for whatever `KarrasDiffusionSchedulers` are fit for, with an adapter that was distilled for them.
DISTILLED = ("LCMScheduler", "TCDScheduler")
FLOW = ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
# How many of these sample the straight paths of a pipeline as it asks them to; of others, the first is taken alone.
FLOW_SOLVERS = {
    "Flux2Pipeline": 2,
    "FluxKontextPipeline": 2,
    "FluxPipeline": 2,
    "HunyuanVideoPipeline": 2,
    "LTXPipeline": 2,
    "QwenImagePipeline": 2,
    "SanaPipeline": 3,
    "StableDiffusion3Pipeline": 3,
    "WanImageToVideoPipeline": 3,
    "WanPipeline": 3,
}


def scheduler_named(pipe: Any, name: str) -> str:
    """The class of Diffusers that a scheduler's name stands for, among those that suit `pipe`.

    Args:
        name: of the class, in any case; "Scheduler", "Discrete", "Multistep" and "FlowMatch" may be left out.

    Raises:
        BadInput: there is no such scheduler, or it does not suit the pipeline.
    """
    import diffusers

    suited = schedulers_for(pipe)
    wanted = name.lower().removesuffix("scheduler")
    by_name = {key: full for full in reversed(suited) for key in _names_of(full)}
    by_name |= {max(_names_of(full), key=len): full for full in suited}
    if (chosen := by_name.get(wanted)) is not None:
        return chosen
    if any(wanted in _names_of(other) for other in dir(diffusers)):
        problem = f"does not suit a {type(pipe).__name__} with {type(pipe.scheduler).__name__}"
    else:
        problem = "is none that Diffusers has"
    raise BadInput(f"--scheduler {name} {problem}. There are: {', '.join(suited)}.")


def use_scheduler(pipe: Any, name: str) -> None:
    """Puts another scheduler in place, set up like the present one.

    Args:
        name: as `scheduler_named` takes it.

    Raises:
        BadInput: as it does, or a library that the scheduler needs is not installed.
    """
    import diffusers

    chosen = scheduler_named(pipe, name)
    if chosen == type(pipe.scheduler).__name__:
        return
    settings = _as_flow(pipe.scheduler, chosen)
    try:
        with heard_from_diffusers():  # that the one does not know all settings of the other
            pipe.scheduler = getattr(diffusers, chosen).from_config(pipe.scheduler.config, **settings)
    except ImportError as error:
        raise BadInput(f"--scheduler {name}: {str(error).strip().splitlines()[0]}") from error


def schedulers_for(pipe: Any) -> tuple[str, ...]:
    """Names of the classes that sample what the model of `pipe` was trained for, its own among them."""
    present = type(pipe.scheduler).__name__
    compatible = {other.__name__ for other in pipe.scheduler.compatibles}
    if present in COGVIDEOX:
        suited: Sequence[str] = COGVIDEOX
    elif _is_flow(pipe.scheduler):
        suited = FLOW[: FLOW_SOLVERS.get(type(pipe).__name__, 0)] if present in FLOW else ()
    elif "DDIMScheduler" in compatible:
        # It is for models of another parametrization altogether.
        suited = sorted(compatible - {"EDMEulerScheduler"} | set(DISTILLED))
    else:
        suited = sorted(compatible)
    return tuple(dict.fromkeys((*suited, present)))


def _names_of(scheduler: str) -> set[str]:
    """What a scheduler's class may be called, in lower case."""
    full = scheduler.lower().removesuffix("scheduler")
    short = full.replace("discrete", "").replace("multistep", "")
    return {full, short, short.removeprefix("flowmatch")}


def _is_flow(scheduler: Any) -> bool:
    config = scheduler.config
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(flow) or type(scheduler).__name__.startswith("FlowMatch")


def _as_flow(scheduler: Any, chosen: str) -> dict[str, Any]:
    """What says in the configuration of `chosen` that its model's straight paths are those of `scheduler`."""
    if not _is_flow(scheduler):
        return {}
    config = scheduler.config
    shift = config.get("flow_shift", config.get("shift", 1.0))
    if chosen.startswith("FlowMatch"):
        return {"shift": shift}
    return {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
