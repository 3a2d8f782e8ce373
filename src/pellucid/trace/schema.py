"""What is recorded, column by column. docs/record.md is drawn from this table, and the Parquet files follow it.

A change of a column's meaning, type or unit raises SCHEMA_VERSION; a new column does not.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

SCHEMA_VERSION = 1
READABLE_VERSIONS = (1,)
ROWS_PER_GROUP = 64
"""Rows of a Parquet row group: what a reader of one sample has to take in."""

Per = Literal["sample", "token", "alternative"]


class Column(NamedTuple):
    """per: one value a sample, one a token of the whole sequence (index t describes token t), or K a token."""

    name: str
    dtype: str
    per: Per
    unit: str
    meaning: str
    phase: str = ""
    """The phase of the iteration that makes it; empty for what is not a tensor of the batch."""


COLUMNS = (
    Column("schema_version", "int32", "sample", "", "version of this table"),
    Column("step", "int32", "sample", "", "the iteration, from 1"),
    Column("row", "int32", "sample", "", "the sample's row in the step's batch, from 0"),
    Column("prompt_id", "int64", "sample", "", "the prompt's position in its data set, the same in every step"),
    Column("group_ids", "int64", "sample", "", "the prompt's index in this step: samples of a group share it", "generate"),
    Column("sample_index", "int32", "sample", "", "which of the prompt's samples, from 0"),
    Column("policy_version", "int64", "sample", "", "version of the weights that sampled it", "generate"),
    Column("stop_reason", "string", "sample", "", "stop: a stop token was sampled; length: cut at max_new_tokens"),
    Column("scores", "float32", "sample", "reward", "the reward source's score, after missing_eos_penalty and clip", "score"),
    Column("prompt", "string", "sample", "", "the prompt's tokens as text"),
    Column("response", "string", "sample", "", "the response's tokens as text"),
    Column("num_action_tokens", "int64", "sample", "tokens", "action tokens of the whole batch"),
    Column("length", "int32", "sample", "tokens", "the sample's action tokens"),
    Column("kl_sequence", "float32", "sample", "nats", "sum of kl"),
    Column("reward_sum", "float32", "sample", "reward", "sum of rewards"),
    Column("advantage_mean", "float32", "sample", "", "mean of advantages over the actions"),
    Column("entropy_mean", "float32", "sample", "nats", "mean of entropy over the actions"),
    Column("clipped_share", "float32", "sample", "share", "actions that are clipped / actions"),
    Column("minibatch", "int32", "sample", "", "which optimizer step of the last epoch held it, from 0", "update_actor"),
    Column("actor_denominator", "float32", "sample", "", "what that minibatch's actor loss was divided by", "update_actor"),
    Column("critic_denominator", "float32", "sample", "tokens", "what its value loss was divided by", "update_critic"),
    Column("input_ids", "int64", "token", "", "token ids, prompt then response", "generate"),
    Column("attention_mask", "bool", "token", "", "true on every token of the sequence", "generate"),
    Column("position_ids", "int64", "token", "", "position in the sequence, from 0", "generate"),
    Column("response_mask", "bool", "token", "", "tokens after the prompt", "generate"),
    Column("action_mask", "bool", "token", "", "tokens that the policy sampled and is trained on", "generate"),
    Column("ended", "bool", "token", "", "the episode stops after this token", "generate"),
    Column("bootstrap_values", "float32", "token", "reward", "value beyond an end; 0 when terminated", "generate"),
    Column("rollout_logprobs", "float32", "token", "nats", "log-prob by the engine, when it sampled the token", "generate"),
    Column("old_logprobs", "float32", "token", "nats", "log-prob under the actor before this step's updates", "old_logprobs"),
    Column("entropy", "float32", "token", "nats", "entropy of the actor's whole distribution over this token: before the "
           "updates, or in their first epoch where old_logprobs are the engine's", "old_logprobs"),
    Column("top_ids", "int64", "alternative", "", "the likeliest tokens at this place, before the updates", "alternatives"),
    Column("top_logprobs", "float32", "alternative", "nats", "their log-probs", "alternatives"),
    Column("ref_logprobs", "float32", "token", "nats", "log-prob under the reference", "ref_logprobs"),
    Column("old_values", "float32", "token", "reward", "critic's value of the state before the token, at rollout", "values"),
    Column("kl", "float32", "token", "nats", "k1: old_logprobs - ref_logprobs", "advantages"),
    Column("rewards", "float32", "token", "reward", "-kl_coef * kl, and the score on the last action", "advantages"),
    Column("advantages", "float32", "token", "", "as trained on: whitened where algo.whiten_advantages is set", "advantages"),
    Column("returns", "float32", "token", "reward", "advantages before whitening + old_values", "advantages"),
    Column("values", "float32", "token", "reward", "critic's value in the last epoch", "update_critic"),
    Column("value_clipped", "bool", "token", "", "the value loss's clipped term was larger: no gradient", "update_critic"),
    Column("value_grads", "float32", "token", "", "d value loss / d values, by autograd", "update_critic"),
    Column("logprobs", "float32", "token", "nats", "log-prob under the actor in the last epoch", "update_actor"),
    Column("log_ratio", "float32", "token", "nats", "logprobs - old_logprobs", "update_actor"),
    Column("ratio", "float32", "token", "", "exp(log_ratio)", "update_actor"),
    Column("clipped", "bool", "token", "", "a bound took over in the policy loss: no gradient, but in cispo", "update_actor"),
    Column("logprob_grads", "float32", "token", "", "d actor loss / d logprobs, by autograd; without ptx", "update_actor"),
)  # fmt: skip
BY_NAME = {column.name: column for column in COLUMNS}

PRODUCERS = {
    "generate": "rollout",
    "score": "reward",
    "old_logprobs": "actor",
    "alternatives": "actor",
    "ref_logprobs": "reference",
    "values": "critic",
    "advantages": "driver",
    "update_critic": "critic",
    "update_actor": "actor",
    "sync_weights": "rollout",
    "evaluate": "rollout",
    "record": "driver",
    "checkpoint": "driver",
}
"""Which role does the work of a phase."""

KINDS = {
    "generate": "token by token",
    "evaluate": "token by token",
    "score": "all at once",
    "old_logprobs": "all at once",
    "alternatives": "all at once",
    "ref_logprobs": "all at once",
    "values": "all at once",
    "update_critic": "update",
    "update_actor": "update",
}
"""How a phase goes over tokens; what is not here is the driver's own."""
