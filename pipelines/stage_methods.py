"""The methods of a job in place, with the settings of the stage that runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..accel.report import Details, Report
from ..accel.swap import disable, enable

if TYPE_CHECKING:
    from ..accel.methods.base import Config
    from ..accel.swap import Handle
    from .routes import Stage

#: What a report says of one denoiser.
Entry = tuple[dict[str, Any], Details | None]


class StageMethods:
    """Methods that are for larger pictures only rest in the base stage of a route, which has the native size.

    Args:
        configs: of the methods; with none, nothing is ever put in place.
        say: is told which rest.
        remarks: for the report, of why these.

    Raises:
        UnsupportedModel, WeightsError: a method cannot apply to `pipe`, those that rest at first included.

    Attributes:
        handle: of what is in place.
    """

    def __init__(
        self, pipe: Any, configs: Sequence[Config], say: Callable[[str], None], *, remarks: Sequence[str] = ()
    ) -> None:
        self._pipe, self._configs, self._say, self._remarks = pipe, list(configs), say, list(remarks)
        # All at once, so that what cannot be had, such as weights, is missed before the first stage.
        self.handle: Handle | None = enable(pipe, self._configs) if configs else None
        self._in_place = self._configs
        self._remark = ""
        self._past: tuple[Entry, ...] = ()

    def again(self, configs: Sequence[Config], remarks: Sequence[str], say: Callable[[str], None]) -> bool:
        """Begin another run with what is in place, if that is what `configs` ask for; returns whether it is."""
        if list(configs) != self._configs or self._in_place != self._configs:
            return False
        if self.handle and not self.handle.active:
            return False  # others were put into the same pipeline since
        self._say, self._remarks, self._remark, self._past = say, list(remarks), "", ()
        if self.handle:
            self.handle.reset()
        return True

    def enter(self, stage: Stage) -> None:
        """Put in place what `stage` needs, before it runs."""
        configs = self._configs
        if stage.total > 1 and stage.number == 1:
            configs = [config for config in configs if config.for_native_size]
            if resting := [config.name for config in self._configs if not config.for_native_size]:
                names = " and ".join(resting)
                self._remark = f"the base (stage 1/{stage.total}) runs without {names}: only larger pictures need it"
                self._say(f"{self._remark}.")
        if configs != self._in_place:
            self._past += tuple(entry for entry in self._present() if entry[0]["calls"])
            self.close()
            self.handle = enable(self._pipe, configs) if configs else None
            self._in_place = configs

    def report(self) -> Report | None:
        """Of all stages so far; those with every method first, as theirs is the configuration it gives."""
        entries = self._present() + self._past
        return Report(*zip(*entries, strict=True)) if entries else None

    def close(self) -> None:
        """Take the methods out."""
        if self.handle:
            disable(self._pipe)
            self.handle = None
        self._in_place = []

    def _present(self) -> tuple[Entry, ...]:
        """What the report says of what is in place now."""
        if not self.handle:
            return ()
        report = self.handle.report()
        remarks = [*self._remarks, self._remark] if self._remark else self._remarks
        denoisers = ({**each, "remarks": [*each["remarks"], *remarks]} for each in report.denoisers)
        return tuple(zip(denoisers, report.details, strict=True))
