"""When each named phase of an iteration began, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Clock:
    """`clock("values", critic.values, batch)` calls critic.values(batch) and books its seconds under time/values.

    phases: (name, start in seconds since the epoch, seconds), in the order in which they ended.
    """

    def __init__(self) -> None:
        self.phases: list[tuple[str, float, float]] = []

    def __call__(self, phase: str, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        began, start = time.time(), time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            self.phases.append((phase, began, time.perf_counter() - start))

    def metrics(self) -> dict[str, float]:
        return {f"time/{phase}": seconds for phase, _, seconds in self.phases}
