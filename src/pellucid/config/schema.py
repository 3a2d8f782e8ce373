"""The config of every stage: pydantic models over the shared sections. Contradictions between keys are refused here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pellucid.config.sections import (
    DataConfig,
    LearnConfig,
    NewModelConfig,
    OptimizerConfig,
    PassConfig,
    Probability,
    RunConfig,
    Section,
    at_most,
)

Engine = Literal["embedded", "generate"]


class SupervisedConfig(Section):
    """What SFT and reward-model training share."""

    run: RunConfig
    data: DataConfig
    eval_data: DataConfig | None = None
    learn: LearnConfig = LearnConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    @model_validator(mode="after")
    def _micro_divides(self) -> Self:
        at_most(self.learn, "learn", "micro_batch_size", "batch_size")
        return self


class SFTConfig(SupervisedConfig):
    """`pellucid sft`: supervised fine-tuning of a causal language model."""

    model: str | None = None
    """Folder or Hub name of the model to fine-tune; or leave it out and give [new_model]."""
    new_model: NewModelConfig | None = None
    """Shape of a model to train from scratch."""

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.model is None) == (self.new_model is None):
            raise ValueError("give exactly one of model and new_model")
        return self


class RMConfig(SupervisedConfig):
    """`pellucid rm`: a reward model from preference pairs, then shifted to score 0 on the reference's own samples."""

    model: str
    """Folder or Hub name of the model that it starts from, usually the SFT policy."""
    reference: str | None = None
    """Whose samples score 0 on average afterwards; the starting model if absent."""
    center_prompts: NonNegativeInt = 128
    """Prompts to sample for the shift; 0 leaves the scores where training put them."""
    center_data: DataConfig | None = None
    """Where those prompts come from; the training pairs' own prompts if absent."""
    max_new_tokens: PositiveInt = 64
    """Length of those samples, in tokens."""


class ModelsConfig(Section):
    """The four roles. Each is a folder or a Hub name."""

    actor: str
    """The policy that is trained."""
    reference: str | None = None
    """The policy that the KL penalty holds it to; the actor's start if absent."""
    reward: str | None = None
    """The reward model; absent when a function gives the reward."""
    critic: str | None = None
    """Where the critic starts; the reward model if absent, else the actor with a new head."""


class RolloutConfig(Section):
    prompts_per_step: PositiveInt = 64
    """P, prompts per iteration."""
    samples_per_prompt: PositiveInt = 1
    """G, samples of each prompt; at least 2 for the group baselines."""
    max_new_tokens: PositiveInt = 48
    """Longest response, in tokens."""
    temperature: PositiveFloat = 1.0
    """Divides the logits, for the sampler and for every log-prob that is trained on."""
    engine: Engine = "embedded"
    """embedded: our own, for models whose attention goes through transformers' interface; generate: any model, slower."""
    num_slots: PositiveInt = 64
    """Sequences decoded at once; changes speed and memory only."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Taken off the score of a response that was cut by length, in reward units."""


class RewardConfig(Section):
    function: str | None = None
    """A Python reward, `file.py:name` or `package.module:name`, called as f(prompts, completions, **columns)."""
    clip: PositiveFloat | None = None
    """Scores are clipped to [-clip, clip]; absent means not."""
    batch_size: PositiveInt = 64
    """Samples per forward pass of the reward model."""


Advantage = Literal["gae", "reinforce_pp", "reinforce_pp_baseline", "rloo", "grpo", "dr_grpo"]
KL_IN_LOSS_ONLY = ("reinforce_pp_baseline", "grpo", "dr_grpo")
GROUP_ADVANTAGES = ("reinforce_pp_baseline", "rloo", "grpo", "dr_grpo")


class AlgoConfig(PassConfig):
    advantage: Advantage = "gae"
    """How a score becomes per-token advantages; only gae has a critic."""
    policy_loss: Literal["ppo", "gspo", "cispo"] = "ppo"
    """The policy loss per token."""
    clip_eps_low: NonNegativeFloat = 0.2
    """The ratio is clipped below at 1 - this."""
    clip_eps_high: NonNegativeFloat = 0.2
    """The ratio is clipped above at 1 + this."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """c of dual-clip PPO: bounds the loss at -c * A where A < 0; absent means off."""
    value_clip_eps: PositiveFloat | None = 0.2
    """How far a value may move from its rollout value before the loss stops rewarding it, in reward units."""
    kl_coef: NonNegativeFloat = 0.05
    """Weight of the KL penalty, reward units per nat."""
    kl_in: Literal["reward", "loss"] = "reward"
    """reward: -kl_coef * k1 per token, detached; loss: kl_coef * an estimator, differentiated."""
    kl_loss: Literal["k1", "k2", "k3", "k3_corrected"] = "k2"
    """Estimator when kl_in = loss. On on-policy samples the gradient of k1 is 0 in expectation, k2's is that of
    KL(actor || reference), which is wanted; k3's is that of KL(reference || actor), unless corrected by the live ratio."""
    kl_target: PositiveFloat | None = None
    """Nats per sequence that an adaptive coefficient steers to; absent keeps kl_coef fixed."""
    kl_horizon: PositiveInt = 10_000
    """Samples over which the adaptive coefficient reacts."""
    gamma: Probability = 1.0
    """Discount per token."""
    gae_lambda: Probability = 0.95
    """Lambda of GAE: 0 trusts the critic, 1 the return."""
    whiten_advantages: bool = True
    """Shift and scale gae's advantages to mean 0, variance 1 over the action tokens of the whole batch."""
    grpo_eps: PositiveFloat = 1e-4
    """Added to the group's standard deviation."""
    aggregate: Literal["token", "sequence", "constant"] = "token"
    """Mean over action tokens, over sequences of their mean, or the sum over samples * max_new_tokens."""
    num_epochs: PositiveInt = 4
    """Passes over each rollout."""
    minibatch_size: PositiveInt = 32
    """Samples per optimizer step."""
    old_logprobs: Literal["auto", "engine", "trainer"] = "auto"
    """Where old_logprobs come from after the first iteration. engine: what was recorded at sampling, checked against the
    trainer's on the first minibatch; trainer: another pass over the batch; auto: engine in float32, trainer in bfloat16."""
    ptx_coef: NonNegativeFloat = 0.0
    """Weight of the supervised loss on [ptx_data] in the actor's loss."""


class PPOEvalConfig(Section):
    every: NonNegativeInt = 10
    """Iterations between evaluations; 0 evaluates before the first and after the last only."""
    num_prompts: PositiveInt = 64
    """Held-out prompts, one sample each."""
    judge: str | None = None
    """A Python function like reward.function, reported and never trained on."""
    best_metric: str = "eval/score"
    """Of the evaluations after step 0, the actor with the highest value of this metric is kept in best/."""


class TraceConfig(Section):
    """What is recorded of every token, for `pellucid view` and `pellucid replay`. Changes no number of the run."""

    record: bool = True
    """Write rollouts/, manifests/ and spans.json."""
    every: PositiveInt = 1
    """Steps between records; the first and the last step are always recorded."""
    samples: NonNegativeInt = 1024
    """Samples of a step that are recorded, in whole groups; 0 records all."""
    keep: NonNegativeInt = 0
    """How many of the newest recorded steps stay on disk; 0 keeps all."""
    alternatives: NonNegativeInt = 0
    """Likeliest tokens recorded beside each sampled one, at the cost of one more pass of the actor; 0 records none."""


class PPOConfig(Section):
    """`pellucid ppo`: reinforcement learning from a reward, with four models."""

    run: RunConfig
    models: ModelsConfig
    data: DataConfig
    eval_data: DataConfig | None = None
    ptx_data: DataConfig | None = None
    total_steps: PositiveInt = 50
    """Iterations: each is one rollout and num_epochs passes over it."""
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    algo: AlgoConfig = AlgoConfig()
    eval: PPOEvalConfig = PPOEvalConfig()
    trace: TraceConfig = TraceConfig()
    actor_optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5)
    critic_optimizer: OptimizerConfig = OptimizerConfig(lr=2e-5)

    @property
    def batch_size(self) -> int:
        """B = P * G."""
        return self.rollout.prompts_per_step * self.rollout.samples_per_prompt

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        algo, rollout = self.algo, self.rollout
        if algo.minibatch_size > self.batch_size:
            raise ValueError(
                f"algo.minibatch_size {algo.minibatch_size} is larger than the batch of {self.batch_size} samples "
                "(rollout.prompts_per_step * rollout.samples_per_prompt)"
            )
        at_most(algo, "algo", "micro_batch_size", "minibatch_size")
        if algo.advantage in GROUP_ADVANTAGES and rollout.samples_per_prompt < 2:
            raise ValueError(
                f"algo.advantage {algo.advantage!r} compares samples of one prompt: "
                f"rollout.samples_per_prompt is {rollout.samples_per_prompt}, it must be at least 2"
            )
        if algo.advantage in KL_IN_LOSS_ONLY and algo.kl_in == "reward" and algo.kl_coef > 0:
            raise ValueError(
                f"algo.advantage {algo.advantage!r} compares scores alone, so that a group of equal scores teaches "
                "nothing; put the KL penalty into the loss (algo.kl_in = 'loss') or set algo.kl_coef = 0"
            )
        if algo.dual_clip is not None and algo.policy_loss != "ppo":
            raise ValueError(f"algo.dual_clip is part of algo.policy_loss 'ppo'; {algo.policy_loss!r} has none")
        if algo.kl_target is not None and self.batch_size >= 5 * algo.kl_horizon:
            raise ValueError(
                f"algo.kl_horizon {algo.kl_horizon} is too short for batches of {self.batch_size} samples: the coefficient "
                "could turn negative in one step; it must be above a fifth of the batch"
            )
        if algo.ptx_coef > 0 and self.ptx_data is None:
            raise ValueError(f"algo.ptx_coef {algo.ptx_coef} needs [ptx_data]")
        if algo.kl_target is not None and algo.kl_coef == 0:
            raise ValueError("algo.kl_target cannot steer algo.kl_coef 0: it is changed by factors, start above 0")
        if self.models.critic and algo.advantage != "gae":
            raise ValueError(f"models.critic is set, but algo.advantage {algo.advantage!r} has no critic")
        return self


class GenerateConfig(Section):
    """`pellucid generate`: sample from a saved policy."""

    model: str
    """Folder or Hub name of the policy."""
    prompt: tuple[str, ...] = ()
    """A prompt, given once or several times on the command line; or give [data]."""
    as_chat: bool = False
    """Put each prompt through the model's chat template, as a user's message."""
    data: DataConfig | None = None
    """A prompt-only data set."""
    output: Path | None = None
    """JSONL file for the samples; printed if absent."""
    samples_per_prompt: PositiveInt = 1
    """Samples of each prompt."""
    max_new_tokens: PositiveInt = 64
    """Longest response, in tokens."""
    temperature: NonNegativeFloat = 1.0
    """Divides the logits; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the likeliest tokens up to this probability."""
    top_k: NonNegativeInt = 0
    """Keep this many likeliest tokens; 0 keeps all."""
    engine: Engine = "embedded"
    """embedded: our own, for models whose attention goes through transformers' interface; generate: any model, slower."""
    num_slots: PositiveInt = 64
    """Sequences decoded at once."""
    seed: NonNegativeInt = 0
    """Seed of the samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model lives."""

    @model_validator(mode="after")
    def _some_prompt(self) -> Self:
        if bool(self.prompt) == (self.data is not None):
            raise ValueError("give either prompt or [data]")
        return self


class QuickstartConfig(Section):
    """`pellucid quickstart`: SFT, reward model and PPO on the built-in corpus."""

    run: RunConfig
    sft_steps: PositiveInt = 300
    """Optimizer steps of supervised fine-tuning."""
    rm_steps: PositiveInt = 100
    """Optimizer steps of reward-model training."""
    ppo_steps: PositiveInt = 28
    """PPO iterations."""
