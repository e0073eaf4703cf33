"""What a method brings: a configuration, and a strategy made of it for one denoiser."""

from __future__ import annotations

import abc
import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from ..context import Context
    from ..families.base import Family, Layout
    from ..observe import Call
    from ..report import Details

ConfigT = TypeVar("ConfigT", bound="Config")


class Config:
    """Base of the frozen dataclasses that configure a method; checked on construction."""

    name: ClassVar[str]
    #: Settings for pictures larger than the model was trained for, with the values that leave them off.
    for_large: ClassVar[Mapping[str, Any]] = {}

    #: The setting, if any, of which both sides of a picture must be multiples, in tokens.
    grid_setting: ClassVar[str | None] = None
    #: The settings that name files to be opened.
    files: ClassVar[frozenset[str]] = frozenset()

    @property
    def grid_multiple(self) -> int:
        """Tokens of which both sides of a picture must be multiples."""
        return 1 if self.grid_setting is None else getattr(self, self.grid_setting) or 1

    @property
    def for_native_size(self) -> bool:
        """Whether it is of use where a route makes its base, a picture of the size the model was trained for."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """A JSON document from which `from_dict` makes an equal configuration."""
        document: dict[str, Any] = {"method": self.name}
        for entry in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            document[entry.name] = list(value) if isinstance(value, tuple) else value
        return document

    @classmethod
    def from_dict(cls: type[ConfigT], document: Mapping[str, Any]) -> ConfigT:
        """The configuration a document describes.

        Raises:
            ValueError: for a key that is no field, with the near matches, and for values the fields refuse.
        """
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in document.items()}
        method = values.pop("method", cls.name)
        if method != cls.name:
            raise ValueError(f"a configuration of {method!r} is not one of {cls.name!r}")
        known = [entry.name for entry in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known)
                hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
                raise ValueError(f"{cls.name} has no setting {key!r}; {hint}")
        return cls(**values)


class Plan(Protocol):
    """What a layer is to do in one call: `pairs` query-key pairs an image are computed, known after the call at the
    latest (None for all of them); `around` asks for the road that keeps the original processor; `searches` says that
    it also looks for what later calls may leave out."""

    pairs: Any
    around: bool
    searches: bool


class Strategy(abc.ABC):
    """A method at work on one denoiser.

    Args:
        config: of the method.
        model: the denoiser.
        family: its family.
        context: shared by the layers of the denoiser.
        pipeline: the pipeline that was enabled, if it was one; not to be kept.
    """

    #: The kinds of model (`Family.kind`) it works on.
    kinds: ClassVar[frozenset[str]]
    #: Names of methods that may be enabled together with this one, and then take the layers that both select.
    yields_to: ClassVar[frozenset[str]] = frozenset()
    #: Whether it can act around a processor that must be kept (`around`), or honour an attention mask that way.
    wraps: ClassVar[bool] = False
    #: Whether it may change the size of the feature maps, and so the grids of all layers, in a call.
    resizes: ClassVar[bool] = False

    def __init__(self, config: Any, model: nn.Module, family: Family, context: Context, pipeline: Any = None) -> None:
        self.config = config
        self.model = model
        self.family = family
        self.context = context
        #: The selected layers that are this method's, and not another's it was combined with.
        self.layers: frozenset[str] = frozenset()

    def gives_way_to(self, other: Strategy) -> bool:
        """Whether the other method takes a layer that both select."""
        return other.config.name in self.yields_to

    @abc.abstractmethod
    def select(self, layers: Mapping[str, nn.Module]) -> dict[str, str]:
        """The layers to accelerate, each with the reason it was chosen.

        Raises:
            UnsupportedModel: if the method cannot apply to this model.
        """

    @abc.abstractmethod
    def why_not(self, layer: str) -> str:
        """Why a layer was not selected."""

    def prepare(self) -> None:  # noqa: B027 - optional
        """Fetch and check weights, before anything is changed.

        Raises:
            WeightsError: if they cannot be found or do not fit.
        """

    def install(self, *, passive: bool) -> None:  # noqa: B027 - optional
        """Put in place what goes beyond processors; `passive` says that setting those is left to the user."""

    def remove(self) -> None:  # noqa: B027 - optional
        """Undo `install` exactly."""

    @abc.abstractmethod
    def begin(self, call: Call, layouts: Mapping[str, Layout]) -> None:
        """Before each denoiser call, outside compiled regions: plan one's own of the layers, edit the call.

        Every layer comes with its grid and no plan. A method that resizes sets the grids of all.
        """

    def project(
        self, attn: nn.Module, hidden_states: Tensor, stock: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value `[B, S, H, D]` of the image tokens, before norms and rotary positions, in a layer with a
        plan; `stock` makes them with the layer's own weights."""
        return stock(hidden_states)

    @abc.abstractmethod
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        context: Context,
        *,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention `[B, S, H, D]` of a layer that has a plan.

        `key_mask` is bool `[B, S]`, True for keys that may be attended to (text of uneven length is padded). Only
        families of transformers give one.
        """

    def output(self, attn: nn.Module, attended: Tensor, stock: Callable[[Tensor], Tensor]) -> Tensor:
        """The output projection of `[B, S, C]`; `stock` makes it with the layer's own weights."""
        return stock(attended)

    def around(
        self,
        run: Callable[[Tensor, Tensor | None], Tensor],
        hidden_states: Tensor,
        mask: Tensor | None,
        layout: Layout,
    ) -> Tensor:
        """A layer whose processor must be kept: `run` is that processor on tokens `[B, S, C]` and a key bias.

        Asked only of a method that `wraps`.
        """
        raise NotImplementedError

    def beyond_attention(self) -> str:
        """What `install` adds that processors alone cannot carry, in words; empty for nothing."""
        return ""

    def rehearse(self, layout: Layout) -> None:  # noqa: B027 - optional
        """Put in the plan of a layer what its call would find out, as far as that can be expected beforehand."""

    def reset(self) -> None:  # noqa: B027 - optional
        """Forget what belongs to a run."""

    def rest(self) -> None:  # noqa: B027 - optional
        """A pipeline's run is over: leave the device what no report needs there."""

    def details(self) -> Details | None:
        """What a report says beyond the counts of calls."""
        return None
