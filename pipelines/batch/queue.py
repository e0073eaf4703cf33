"""What is to be made next: rows that can share a call, claimed where others are at it, too."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import islice

from ..task import batch_key
from .claims import Claims, Lease
from .plan import Planned

Group = list[tuple[Planned, Lease | None]]


class Queue:
    """
    Args:
        rows: to be made, in this order, but for those with the same methods, which come together: putting methods in
            place may mean to read weights, and to compile.
        batch_size: rows in a call at most.
        claims: by which to divide the rows with others.
        look: at what others have made, or tried to, by now; gives whether a row is among that.
    """

    def __init__(
        self,
        rows: Sequence[Planned],
        *,
        batch_size: int = 1,
        claims: Claims | None = None,
        look: Callable[[], Callable[[Planned], bool]] = lambda: lambda row: False,
    ) -> None:
        self._batch_size, self._claims, self._look = batch_size, claims, look
        methods: dict[str, list[Planned]] = {}
        for row in rows:
            methods.setdefault(repr(row.task.configs), []).append(row)
        self._pending = {row.id: row for alike in methods.values() for row in alike}
        # Rows of one number may share a call; those without one may not.
        self._numbers: dict[str, int] = {}
        self._mates: dict[int, dict[str, Planned]] = {}
        if batch_size > 1:
            self._find_mates()

    def __len__(self) -> int:
        return len(self._pending)

    def take(self) -> tuple[Group, list[Planned]]:
        """The next rows, and those that were found finished; no rows where others have all that are left."""
        dropped: list[Planned] = []
        group = self._had(self._pending, 1, dropped)
        if group and (number := self._numbers.get(group[0][0].id)) is not None:
            group += self._had(self._mates[number], self._batch_size - 1, dropped)
        return group, dropped

    def put_back(self, rows: Sequence[Planned]) -> None:
        """`rows` failed together; each is to be tried alone, before all others."""
        self._pending = {row.id: row for row in rows} | self._pending
        for row in rows:
            self._numbers.pop(row.id, None)

    def _find_mates(self) -> None:
        numbers: dict[Hashable, int] = {}  # in place of keys, which are long
        for id, row in self._pending.items():
            if (key := batch_key(row.task)) is not None:
                self._numbers[id] = number = numbers.setdefault(key, len(numbers))
                self._mates.setdefault(number, {})[id] = row

    def _had(self, candidates: dict[str, Planned], most: int, dropped: list[Planned]) -> Group:
        """The first of `candidates` that can be had, no longer pending."""
        if self._claims is None:
            rows = list(islice(candidates.values(), most))
            for row in rows:
                self._remove(row)
            return [(row, None) for row in rows]
        group: Group = []
        finished = self._look()
        for row in tuple(candidates.values()):
            if len(group) == most:
                break
            lease = None
            if not finished(row):
                if (lease := self._claims.acquire(row.id)) is None:
                    continue
                # A claim that others had before may be free because they are done; so look after it is held.
                if not lease.first and (finished := self._look())(row):
                    lease.release()
            self._remove(row)
            if finished(row):
                dropped.append(row)
            else:
                group.append((row, lease))
        return group

    def _remove(self, row: Planned) -> None:
        del self._pending[row.id]
        if (number := self._numbers.get(row.id)) is not None:
            del self._mates[number][row.id]
