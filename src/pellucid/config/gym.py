"""The config of `pellucid gym`: policy gradients in vector environments, on the parts that train language models."""
# A config is frozen, so a section may narrow the keys that it takes over.
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pellucid.config.schema import AlgoConfig
from pellucid.config.sections import OptimizerConfig, Probability, RunConfig, Section, at_most


class GymRunConfig(RunConfig):
    """As [run] elsewhere; networks this small are fastest on one CPU thread."""

    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where the networks live; auto takes CUDA where there is one."""
    precision: Literal["float32"] = "float32"
    """Arithmetic of the networks."""
    threads: NonNegativeInt = 1
    """CPU threads; 0 leaves it to PyTorch. Bitwise repetition needs the same number."""
    checkpoint_every: NonNegativeInt = 50
    """Iterations between checkpoints; 0 writes one at the end only."""


class EnvConfig(Section):
    id: str = "CartPole-v1"
    """Gymnasium's name of the environment, or module:name for one that a module registers. Discrete actions, Box
    observations (flattened)."""
    num_envs: PositiveInt = 8
    """N, environments that step together."""
    max_episode_steps: PositiveInt | None = None
    """Steps after which an episode is truncated; absent keeps the environment's own limit."""
    longest_episode: PositiveInt = 100_000
    """An episode of more steps than this counts as endless, and is an error."""


class NetworkConfig(Section):
    hidden_sizes: tuple[PositiveInt, ...] = (64, 64)
    """Widths of the hidden layers, tanh after each; actor and critic have a network each."""


class GymAlgoConfig(AlgoConfig):
    """As [algo] of ppo, with a step for a token. There is no reference model, so every KL key must stay at 0 or absent."""

    advantage: Literal["gae", "reinforce"] = "gae"
    """gae: with a critic; reinforce: discounted returns, without one, from the episodes that end within the rollout."""
    policy_loss: Literal["ppo", "cispo"] = "ppo"
    """The policy loss per step. With one epoch of one minibatch, ppo's gradient is REINFORCE's, -A * grad log-prob."""
    value_clip_eps: PositiveFloat | None = None
    """How far a value may move from its rollout value before the loss stops rewarding it, in reward units."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL penalty: 0, there is no reference to be near to."""
    gamma: Probability = 0.99
    """Discount per step."""
    whiten_advantages: bool = True
    """Shift and scale the advantages to mean 0, variance 1 over the steps of the whole rollout."""
    aggregate: Literal["token"] = "token"
    """Mean over steps."""
    num_epochs: PositiveInt = 4
    """Passes over each rollout: 1 for REINFORCE and A2C."""
    minibatch_size: PositiveInt = 256
    """Steps per optimizer step; env.num_envs * steps_per_rollout takes the rollout at once, as REINFORCE and A2C do."""
    micro_batch_tokens: PositiveInt = 65_536
    """Steps per forward pass at most."""
    gradient_checkpointing: Literal[False] = False
    """Not for networks this small."""


class GymOptimizerConfig(OptimizerConfig):
    lr: PositiveFloat = 3e-4
    """Peak learning rate of Adam."""
    max_grad_norm: PositiveFloat = 0.5
    """Global gradient norm above which the gradient is scaled down."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Adam's second-moment decay."""


class GymConfig(Section):
    """`pellucid gym`: REINFORCE, A2C or PPO in Gymnasium's environments, by the code that trains language models."""

    run: GymRunConfig
    env: EnvConfig = EnvConfig()
    total_steps: PositiveInt = 500_000
    """Environment steps of the run, of all environments together, in whole rollouts."""
    steps_per_rollout: PositiveInt = 128
    """T, steps of each environment between updates."""
    algo: GymAlgoConfig = GymAlgoConfig()
    network: NetworkConfig = NetworkConfig()
    actor_optimizer: GymOptimizerConfig = GymOptimizerConfig()
    critic_optimizer: GymOptimizerConfig = GymOptimizerConfig()

    @property
    def batch_size(self) -> int:
        """Steps per iteration, N * T."""
        return self.env.num_envs * self.steps_per_rollout

    @property
    def iterations(self) -> int:
        return math.ceil(self.total_steps / self.batch_size)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        algo = self.algo
        if algo.minibatch_size > self.batch_size:
            raise ValueError(
                f"algo.minibatch_size {algo.minibatch_size} is larger than a rollout of {self.batch_size} steps "
                "(env.num_envs * steps_per_rollout)"
            )
        at_most(algo, "algo", "micro_batch_size", "minibatch_size")
        needs_reference = {"kl_coef": algo.kl_coef > 0, "kl_target": algo.kl_target, "ptx_coef": algo.ptx_coef > 0}
        for key, given in needs_reference.items():
            if given:
                raise ValueError(
                    f"algo.{key} {getattr(algo, key)}: an environment has neither a reference model nor text; leave it out"
                )
        if algo.dual_clip is not None and algo.policy_loss != "ppo":
            raise ValueError(f"algo.dual_clip is part of algo.policy_loss 'ppo'; {algo.policy_loss!r} has none")
        return self
