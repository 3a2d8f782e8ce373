"""Gymnasium's vector environments as a source of batches: rows are environments, columns are steps, a token is an action.

Environments come in two kinds. `SeparateEnvironments` steps any environment, one after the other. `JointEnvironments` uses an
environment's own vector implementation where there is one: all of them in one array. Both can be taken up again exactly
where a checkpoint left them, without asking the environments for their state.
"""

from __future__ import annotations

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pellucid.config import EnvConfig
from pellucid.errors import CheckpointError, ConfigError, DataError, IntegrityError
from pellucid.types import Batch, derive_seed

Step = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]
"""What N environments answered: observations after the step and before any reset (N,O); rewards, terminated, truncated (N,);
and taken (N,), False where this step only reset the environment, and the action did nothing."""


class Environments(ABC):
    """N environments of one kind. observations: (N,O) float32, what the next actions answer to. returns (reward units) and
    lengths (steps): (N,), of the episodes that are running. limit: the most steps an episode can have, None where none is
    set."""

    observations: NDArray[np.float32]

    def __init__(self, config: EnvConfig, spec: Any, observation_space: Any, action_space: Any) -> None:
        self.name, self.num_envs, self.longest_episode = config.id, config.num_envs, config.longest_episode
        self.num_actions, self.observation_size = _sizes(config.id, observation_space, action_space)
        self.limit: int | None = config.max_episode_steps or spec.max_episode_steps
        self._first_action = int(action_space.start)
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.int64)

    def step(self, actions: NDArray[np.int64]) -> Step:
        """actions: (N,), from 0. Raises DataError for whatever the environment raises."""
        try:
            return self._step(actions + self._first_action)
        except Exception as error:
            raise DataError(f"env.id {self.name}: a step raised {type(error).__name__}: {error}") from error

    def state_dict(self) -> dict[str, Any]:
        own = {"returns": torch.from_numpy(self.returns), "lengths": torch.from_numpy(self.lengths)}
        return own | {"observations": torch.from_numpy(self.observations)} | self._state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when the environments do not come back to the observations that they were left with."""
        self._restore(state)
        if not np.array_equal(self.observations, state["observations"].numpy()):
            raise CheckpointError(
                f"env.id {self.name}: from the same seeds and actions it gives other observations than before; its run "
                "cannot be resumed"
            )
        self.returns, self.lengths = state["returns"].numpy().copy(), state["lengths"].numpy().copy()

    @abstractmethod
    def _step(self, actions: NDArray[np.int64]) -> Step: ...

    @abstractmethod
    def _state(self) -> dict[str, Any]: ...

    @abstractmethod
    def _restore(self, state: dict[str, Any]) -> None: ...


class SeparateEnvironments(Environments):
    """Each episode starts from a seed of its own, of (run seed, environment, episode). So a checkpoint needs no more than the
    running episodes' seeds and actions: taking them again leads to the same state, which is compared."""

    def __init__(self, config: EnvConfig, spec: Any, make: Callable[[], Any], seed: int) -> None:
        self._envs, self._seed = [make() for _ in range(config.num_envs)], seed
        first = self._envs[0]
        super().__init__(config, spec, first.observation_space, first.action_space)
        self._episodes = [0] * self.num_envs
        self._actions: list[list[int]] = [[] for _ in self._envs]
        self.observations = np.zeros((self.num_envs, self.observation_size), dtype=np.float32)
        for i in range(self.num_envs):
            self._begin(i, 0)

    def _begin(self, i: int, episode: int) -> None:
        self._episodes[i], self._actions[i] = episode, []
        seed = derive_seed(self._seed, i, episode) % 2**32
        self.observations[i] = np.ravel(self._envs[i].reset(seed=seed)[0])

    def _step(self, actions: NDArray[np.int64]) -> Step:
        after = np.empty_like(self.observations)
        rewards, ended = np.empty(self.num_envs), np.empty((2, self.num_envs), dtype=bool)
        for i, (env, action) in enumerate(zip(self._envs, actions.tolist(), strict=True)):
            observation, rewards[i], ended[0, i], ended[1, i], _ = env.step(action)
            after[i] = observation.ravel()
            self._actions[i].append(action)
        self.observations = after.copy()
        for i in ended.any(0).nonzero()[0].tolist():
            self._begin(i, self._episodes[i] + 1)
        return after, rewards, ended[0], ended[1], np.ones(self.num_envs, dtype=bool)

    def _state(self) -> dict[str, Any]:
        return {"episodes": self._episodes, "actions": self._actions}

    def _restore(self, state: dict[str, Any]) -> None:
        for i, (episode, actions) in enumerate(zip(state["episodes"], state["actions"], strict=True)):
            self._begin(i, episode)
            for action in actions:
                self.observations[i] = np.ravel(self._envs[i].step(action)[0])
            self._actions[i] = list(actions)


class JointEnvironments(Environments):
    """An environment's vector implementation, which resets what has ended in the step after (Gymnasium's "next step"). Its
    state is the arrays and numbers that it holds, and its generator."""

    def __init__(self, config: EnvConfig, spec: Any, vector: Any, seed: int) -> None:
        super().__init__(config, spec, vector.single_observation_space, vector.single_action_space)
        self._vector, self._ended = vector, np.zeros(self.num_envs, dtype=bool)
        self.observations = self._flat(vector.reset(seed=seed % 2**32)[0])

    @staticmethod
    def serves(vector: Any) -> bool:
        """Whether it resets in the next step, and its whole state can be read off."""
        from gymnasium import Space
        from gymnasium.envs.registration import EnvSpec

        mode = getattr(vector.metadata.get("autoreset_mode"), "value", None)
        known = (np.ndarray, np.generic, np.random.Generator, bool, int, float, str, Space, EnvSpec, type(None))
        return mode == "NextStep" and all(isinstance(value, known) for value in vars(vector).values())

    def _step(self, actions: NDArray[np.int64]) -> Step:
        observations, rewards, terminated, truncated, _ = self._vector.step(actions)
        taken, self._ended = ~self._ended, terminated | truncated
        self.observations = self._flat(observations)
        return self.observations, rewards, terminated, truncated, taken

    def _flat(self, observations: NDArray[Any]) -> NDArray[np.float32]:
        return np.ascontiguousarray(observations.reshape(self.num_envs, -1), dtype=np.float32)

    def _state(self) -> dict[str, Any]:
        values = vars(self._vector).items()
        arrays = {name: torch.from_numpy(value) for name, value in values if isinstance(value, np.ndarray)}
        numbers = {name: value for name, value in values if isinstance(value, (bool, int, float))}
        generator = json.dumps(self._vector.np_random.bit_generator.state)
        return {"arrays": arrays, "numbers": numbers, "generator": generator, "ended": torch.from_numpy(self._ended)}

    def _restore(self, state: dict[str, Any]) -> None:
        for name, value in state["arrays"].items():
            setattr(self._vector, name, value.numpy().copy())
        for name, value in state["numbers"].items():
            setattr(self._vector, name, value)
        self._vector.np_random.bit_generator.state = json.loads(state["generator"])
        self._ended = state["ended"].numpy().copy()
        self.observations = state["observations"].numpy().copy()


def make_environments(config: EnvConfig, seed: int) -> Environments:
    """Raises ConfigError for an environment that is not there or whose spaces do not fit, DataError when a package that it
    needs is missing."""
    if importlib.util.find_spec("gymnasium") is None:
        raise DataError("environments need the package gymnasium: pip install 'pellucid[gym]'")
    import gymnasium

    limit = {} if config.max_episode_steps is None else {"max_episode_steps": config.max_episode_steps}
    try:
        spec = gymnasium.spec(config.id)
        if spec.vector_entry_point is not None and not spec.additional_wrappers:
            vector = gymnasium.make_vec(config.id, config.num_envs, "vector_entry_point", **limit)
            if JointEnvironments.serves(vector):
                return JointEnvironments(config, spec, vector, seed)
        # Its checker looks at the first step alone; `collect` looks at all of them.
        make = partial(gymnasium.make, config.id, disable_env_checker=True, **limit)
        return SeparateEnvironments(config, spec, make, seed)
    except (gymnasium.error.DependencyNotInstalled, ModuleNotFoundError) as error:
        raise DataError(
            f"env.id {config.id}: {error}; pip install 'pellucid[gym]' brings what Gymnasium's own need"
        ) from None
    except gymnasium.error.Error as error:
        raise ConfigError(f"env.id {config.id}: {' '.join(str(error).split())}") from None


class Policy(Protocol):
    """What can act: logits (…,A) over the actions for observations (…,O)."""

    @property
    def device(self) -> torch.device: ...

    def logits(self, observations: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Rollout:
    """T steps of N environments.

    batch: (N,T) with observations and rewards; bootstrap_values are still 0. after: (N,T,O), the observation after each step,
    before any reset. terminated: (N,T); batch.ended is terminated or truncated. episodes: (return, length) of each that
    ended, in the order in which they did.
    """

    batch: Batch
    after: Tensor
    terminated: Tensor
    episodes: list[tuple[float, int]]


@torch.no_grad()
def collect(environments: Environments, policy: Policy, num_steps: int, seed: int, version: int) -> Rollout:
    """num_steps of each environment under the policy, whose weights have this version. The seed settles every action.

    Raises IntegrityError where an environment returns a number that is not finite, or an episode does not end.
    """
    n, size = environments.num_envs, environments.observation_size
    # The likeliest action after Gumbel noise is one drawn from the softmax [Maddison et al. 2014]; all noise at once.
    noise = torch.empty(num_steps, n, environments.num_actions)
    noise = noise.exponential_(generator=torch.Generator().manual_seed(seed)).log_().neg_().to(policy.device)
    observations, after = (np.empty((num_steps, n, size), dtype=np.float32) for _ in range(2))
    rewards, lengths = np.empty((num_steps, n), dtype=np.float32), np.empty((num_steps, n), dtype=np.int64)
    terminated, truncated, taken = (np.empty((num_steps, n), dtype=bool) for _ in range(3))
    logits, actions = torch.empty_like(noise), torch.empty(num_steps, n, dtype=torch.int64)
    episodes: list[tuple[float, int]] = []
    for t in range(num_steps):
        observations[t], lengths[t] = environments.observations, environments.lengths
        logits[t] = policy.logits(torch.from_numpy(environments.observations).to(policy.device))
        actions[t] = (logits[t] + noise[t]).argmax(-1)
        after[t], rewards[t], terminated[t], truncated[t], taken[t] = environments.step(actions[t].numpy())
        environments.returns += rewards[t]
        environments.lengths += taken[t]
        ended = terminated[t] | truncated[t]
        if ended.any():
            episodes += zip(environments.returns[ended].tolist(), environments.lengths[ended].tolist(), strict=True)
            environments.returns[ended], environments.lengths[ended] = 0, 0
    returned = {"an observation": after, "a reward": rewards[..., None], "a first observation": observations}
    _require_finite(environments, returned, lengths)
    if lengths.max() >= environments.longest_episode:
        raise IntegrityError(
            f"env.id {environments.name}: an episode has not ended after {environments.longest_episode} steps "
            "(env.longest_episode); set env.max_episode_steps to truncate it"
        )
    by_row = {
        "observations": observations, "rewards": rewards, "position_ids": lengths, "action_mask": taken,
        "response_mask": taken, "ended": terminated | truncated,
    }  # fmt: skip
    actions = actions.T.contiguous()
    logprobs = logits.cpu().log_softmax(-1).transpose(0, 1).gather(-1, actions[..., None])[..., 0]
    batch = Batch(
        input_ids=actions,
        attention_mask=torch.ones_like(actions, dtype=torch.bool),
        rollout_logprobs=logprobs * _rows(taken),
        bootstrap_values=torch.zeros(n, num_steps),
        group_ids=torch.arange(n),
        policy_version=torch.full((n,), version),
        stop_reason=(),
        **{name: _rows(array) for name, array in by_row.items()},
    )
    return Rollout(batch, _rows(after), _rows(terminated), episodes)


def _rows(by_step: NDArray[Any]) -> Tensor:
    """(T,N,…) -> (N,T,…)."""
    return torch.from_numpy(by_step).transpose(0, 1).contiguous()


def _require_finite(environments: Environments, returned: dict[str, NDArray[Any]], lengths: NDArray[np.int64]) -> None:
    for what, values in returned.items():
        bad = ~np.isfinite(values).all(-1)
        if bad.any():
            t, i = np.argwhere(bad)[0]
            raise IntegrityError(
                f"env.id {environments.name}: environment {i} returned {what} that is not finite in step "
                f"{lengths[t, i] + 1} of its episode: {values[t, i].tolist()}"
            )


def _sizes(name: str, observation_space: Any, action_space: Any) -> tuple[int, int]:
    """(number of actions, length of a flattened observation)."""
    from gymnasium.spaces import Box, Discrete

    if not isinstance(action_space, Discrete):
        raise ConfigError(f"env.id {name}: its actions are {action_space}; only Discrete ones are supported")
    if not isinstance(observation_space, Box):
        raise ConfigError(f"env.id {name}: its observations are {observation_space}; only a Box is supported")
    return int(action_space.n), int(np.prod(observation_space.shape))
