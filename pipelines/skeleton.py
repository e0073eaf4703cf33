"""A model without its weights: enough to say what a job would be, and what a method would do to its attention."""

from __future__ import annotations

import inspect
import json
import warnings
from typing import TYPE_CHECKING, Any

import torch

from ..accel.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import nn

    from .load import Model


def skeletons(model: Model) -> dict[str, nn.Module]:
    """Component name → module on the meta device, built from its config.json alone.

    Raises:
        UnsupportedModel: a denoiser that Diffusers does not know, or without a configuration.
    """
    import diffusers

    found = {}
    for part, class_name in model.denoisers.items():
        cls = getattr(diffusers, class_name, None)
        if cls is None or model.components[part][0] != "diffusers":
            raise UnsupportedModel(f"{model.name}: {part} is a {class_name}, which is no model of Diffusers.")
        try:
            found[part] = _empty(cls, model, part)
        except OSError:
            raise UnsupportedModel(f"{model.name}: {part} ({class_name}) has no config.json.") from None
    return found


def skeleton_pipe(model: Model) -> Any:
    """A pipeline of the model's class with its denoisers and its autoencoder on the meta device, and its scheduler.

    Text encoders, tokenizers and what else Diffusers does not build from a configuration alone are None: it says what
    the pipeline would do, such as its native size, and makes nothing.

    Raises:
        UnsupportedModel: its class is none of Diffusers', or refuses to go without one of these; the whole pipeline
            has to be loaded then.
    """
    import diffusers
    from diffusers.utils import logging

    cls = getattr(diffusers, model.pipeline, None)
    if cls is None:
        raise UnsupportedModel(f"{model.name} is a {model.pipeline}, which is no pipeline of Diffusers.")
    index = json.loads((model.folder / "model_index.json").read_text(encoding="utf-8"))
    denoisers = skeletons(model)
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in model.components or parameter.default is parameter.empty:
            given[name] = denoisers[name] if name in denoisers else _part(model, name)
        elif name in index and not isinstance(index[name], list):
            given[name] = index[name]  # no part but an option, such as the boundary between two transformers
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it remarks on what is missing, which is meant
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of old settings, for whoever loads the model
            pipe = cls(**given)
    except Exception as error:  # whatever a class does with a part that is None
        raise UnsupportedModel(
            f"{model.name}: a {model.pipeline} cannot be built without its weights: {type(error).__name__}: {error}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    # As loading does it: some checkpoints are told by the name of their folder.
    pipe.register_to_config(_name_or_path=str(model.folder))
    return pipe


def _part(model: Model, name: str) -> Any:
    """A scheduler, or an empty autoencoder; None for what is not Diffusers' or cannot be built."""
    import diffusers

    library, class_name = model.components.get(name, ("", ""))
    cls = getattr(diffusers, class_name, None) if library == "diffusers" else None
    if cls is None:
        return None
    try:
        if issubclass(cls, diffusers.ModelMixin):
            return _empty(cls, model, name)
        return cls.from_pretrained(model.folder, subfolder=name, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError):
        return None


def _empty(cls: Any, model: Model, name: str) -> Any:
    """A model of Diffusers in its shape.

    Raises:
        OSError: it has no configuration.
    """
    config = cls.load_config(model.folder / name, local_files_only=True)
    with torch.device("meta"):
        module = cls.from_config(config)
    module.register_to_config(_name_or_path=str(model.folder / name))
    return module.eval()
