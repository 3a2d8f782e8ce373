"""Small environments whose every number is known beforehand, under names that Gymnasium can make."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete

LENGTHS, TRUNCATES = (3, 2, 4), (False, True, False)
"""Of episodes 0, 1, 2, 3, …, in turn."""


class Scripted(gymnasium.Env):
    """Episode e has LENGTHS[e % 3] steps, and is truncated if TRUNCATES[e % 3], else it terminates. Observation: (e, steps so
    far). Reward of step k: 10 * e + k + the action. fault: what goes wrong, in the third step of episode 2."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Discrete(2)

    def __init__(self, fault: str = "") -> None:
        self.fault, self.episode, self.k = fault, -1, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.k = self.episode + 1, 0
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = 10.0 * self.episode + self.k + int(action)
        self.k += 1
        ends, truncates = self.k >= LENGTHS[self.episode % 3], TRUNCATES[self.episode % 3]
        observation = self._observation()
        if (self.episode, self.k) == (2, 3):
            if self.fault == "raises":
                raise RuntimeError("out of fuel")
            if self.fault == "nan reward":
                reward = float("nan")
            if self.fault == "nan observation":
                observation = observation * np.nan
        if self.fault == "endless":
            ends = False
        return observation, reward, ends and not truncates, ends and truncates, {}

    def _observation(self) -> Any:
        return np.array([self.episode, self.k], dtype=np.float32)


class Walk(gymnasium.Env):
    """A seeded random walk that ends when it is far away: all that it does follows from its seed and the actions. Actions
    are 5 and 6; observations are a (2, 2) box."""

    observation_space = Box(-np.inf, np.inf, (2, 2), np.float64)
    action_space = Discrete(2, start=5)
    forgets = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=None if self.forgets else seed)
        self.place = self.np_random.normal(size=(2, 2))
        return self.place.copy(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action in (5, 6), action
        self.place += self.np_random.normal(size=(2, 2)) + (int(action) - 5.5)
        return self.place.copy(), float(self.place[0, 0]), bool(abs(self.place).max() > 5), False, {}


class Forgetful(Walk):
    """One whose seed does not settle what happens."""

    forgets = True


class OddSpaces(Scripted):
    def __init__(self, which: str) -> None:
        super().__init__()
        if which == "actions":
            self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        else:
            self.observation_space = Dict({"place": Scripted.observation_space})


def register() -> None:
    made = {
        "Scripted-v0": (Scripted, {}), "Walk-v0": (Walk, {}), "Forgetful-v0": (Forgetful, {}),
        "ContinuousActions-v0": (OddSpaces, {"which": "actions"}),
        "DictObservations-v0": (OddSpaces, {"which": "observations"}),
    }  # fmt: skip
    faults = ("raises", "nan reward", "nan observation", "endless")
    made |= {f"{fault.title().replace(' ', '')}-v0": (Scripted, {"fault": fault}) for fault in faults}
    for name, (entry, arguments) in made.items():
        if name not in gymnasium.registry:
            gymnasium.register(name, entry_point=entry, kwargs=arguments)
