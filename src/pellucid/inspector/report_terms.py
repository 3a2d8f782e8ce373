"""What the report's figures are called, in which unit, and what they mean. docs/metrics.md holds every metric."""

from __future__ import annotations

from typing import NamedTuple


class Term(NamedTuple):
    """better: which direction is wanted, "" where neither is."""

    label: str
    unit: str
    meaning: str
    better: str = ""


REWARD, NATS, SHARE, TOKENS = "reward units", "nats", "share", "tokens"

SUMMARY = {
    "reward_model_accuracy": Term(
        "Reward model accuracy", SHARE, "held-out pairs on which the reward model agrees with the gold preference"
    ),
    "gold_win_rate": Term(
        "Gold win rate",
        SHARE,
        "held-out prompts whose text by the trained policy the gold preference puts above the SFT policy's; ties count half",
    ),
    "kl_per_sequence": Term(
        "KL per sequence", NATS, "how far the trained policy is from the SFT policy, on its held-out texts"
    ),
    "seconds": Term("Time", "s", "wall time; in a quickstart, of its three stages together"),
    "ppo_seconds": Term("Time of PPO", "s", "wall time of the last stage"),
    "seed": Term("Seed", "", "of everything random in the run"),
    "steps": Term("Steps", "", "iterations of PPO, or optimizer steps of SFT and reward model"),
    "score_shift": Term(
        "Score shift", REWARD, "taken off every score, so that the reference's own samples score 0 on average"
    ),
    "reference_score_std": Term(
        "Spread of reference scores", REWARD, "standard deviation of those samples: the natural unit of the reward"
    ),
}
"""summary.json, in the order of the table; its other entries follow under their own names."""

METRICS = {
    "score/mean": Term("mean score", REWARD, "mean score of the samples of a step", "higher"),
    "eval/score": Term("held-out score", REWARD, "mean score on held-out prompts", "higher"),
    "eval/judge": Term("held-out judge", "judge's units", "a judge that is never trained on", "higher"),
    "kl/sequence": Term("KL per sequence", NATS, "KL from the reference, summed over a response"),
    "eval/kl": Term("held-out KL per sequence", NATS, "the same on held-out prompts"),
    "policy/entropy": Term("entropy", NATS, "mean entropy of the next-token distribution"),
    "rollout/length": Term("response length", TOKENS, "mean number of sampled tokens"),
    "rollout/stopped": Term("stopped", SHARE, "samples that ended by a stop token"),
    "actor/clip_fraction": Term("actor clip fraction", SHARE, "tokens where a bound replaced the ratio"),
    "critic/clip_fraction": Term("critic clip fraction", SHARE, "tokens where the clipped value loss is the larger"),
    "critic/explained_variance": Term("explained variance", SHARE, "of the returns, by the critic", "higher"),
    "critic/value_loss": Term("value loss", "reward units²", "of the critic", "lower"),
    "train/nll": Term("negative log-likelihood", "nats per token", "of the learned tokens", "lower"),
    "eval/nll": Term("held-out negative log-likelihood", "nats per token", "of held-out tokens", "lower"),
    "train/pair_loss": Term("pair loss", "nats per pair", "-log σ(chosen - rejected)", "lower"),
    "eval/pair_loss": Term(
        "held-out pair loss", "nats per pair", "-log σ(chosen - rejected) on held-out pairs", "lower"
    ),
    "train/accuracy": Term("accuracy", SHARE, "pairs with chosen above rejected", "higher"),
    "eval/accuracy": Term("held-out accuracy", SHARE, "held-out pairs with chosen above rejected", "higher"),
    "train/margin": Term("margin", REWARD, "mean of chosen - rejected"),
    "eval/margin": Term("held-out margin", REWARD, "mean of chosen - rejected on held-out pairs"),
    "optimizer/grad_norm": Term("gradient norm", "", "before clipping"),
    "time/step": Term("time of a step", "s", "wall time of an optimizer step"),
}
"""The main metrics, in the order of the table of first, last and best."""


def term_of_summary(key: str) -> Term:
    """Also for `best eval/score` and for metrics that a summary repeats; a stranger keeps its name."""
    if key in SUMMARY:
        return SUMMARY[key]
    if key.startswith("best ") and key.removeprefix("best ") in METRICS:
        metric = METRICS[key.removeprefix("best ")]
        return Term(f"Best {metric.label}", metric.unit, f"highest of the evaluations after step 0: {metric.meaning}")
    if key in METRICS:
        metric = METRICS[key]
        return Term(metric.label[0].upper() + metric.label[1:], metric.unit, f"at the end: {metric.meaning}")
    return Term(key, "", "")
