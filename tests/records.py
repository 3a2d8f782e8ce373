"""Synthetic run directories: an independent statement of the record's schema, version 1, with numpy and pyarrow alone.

    python tests/records.py OUT --steps 3 --samples 64 --max-tokens 60

Log-probs, entropies, values and scores are drawn at random; everything that follows from them (KL, rewards, advantages,
ratios, clips, gradients, hashes, histograms, metrics) is worked out here from the formulas, so a reader can be held to it.
Axes: B samples, T tokens; column t describes token t; 0 or False where a quantity is not defined.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from record_files import (
    END,
    PAD,
    PHASES,
    Arrays,
    Spans,
    config_toml,
    evaluation,
    manifest_of,
    vocabulary,
    where,
    write_rollout,
    write_stage,
    write_vocabulary,
)

Algorithm = dict[str, Any]
ALGORITHM: Algorithm = {
    "advantage": "gae", "policy_loss": "ppo", "clip_eps_low": 0.2, "clip_eps_high": 0.2, "dual_clip": None,
    "value_clip_eps": 0.2, "kl_coef": 0.1, "kl_in": "reward", "kl_loss": "k2", "gamma": 1.0, "gae_lambda": 0.95,
    "whiten_advantages": True, "aggregate": "token", "num_epochs": 2, "minibatch_size": 32, "grpo_eps": 1e-4,
    "temperature": 1.0, "max_new_tokens": 45, "missing_eos_penalty": 3.0, "reward_clip": None, "ptx_coef": 0.0,
}  # fmt: skip

HOSTILE = [
    "<script>alert(1)</script>", "</script><img src=x onerror=alert(2)>", "\u202edesrever\u202c", "a\u2028b\u2029c",
    "\x00\x1b[31m", "\ud800",
]  # fmt: skip
"""Texts that a page must show as they are; the last has no UTF-8."""


def write_run(
    path: Path | str,
    steps: int = 3,
    samples: int = 64,
    max_tokens: int = 60,
    seed: int = 0,
    critic: bool = True,
    alternatives: int = 0,
    finished: bool = True,
    algorithm: dict[str, Any] | None = None,
    texts: list[str] | None = None,
    recorded: int | None = None,
    quickstart: bool = False,
    full: bool = False,
) -> Path:
    """Write a whole run directory and return it.

    max_tokens: longest sequence, prompt and response. alternatives: likeliest tokens recorded per action. finished: whether
    there is a summary and spans.json is closed. algorithm: overrides of the manifest's. texts: each becomes a token, the
    first of a prompt and of a response in turn. recorded: rows kept of each batch. quickstart: adds sft/ and rm/.
    full: every sequence has max_tokens tokens, max_new_tokens of them actions.
    """
    path = Path(path)
    for name in ("rollouts", "manifests", "eval"):
        (path / name).mkdir(parents=True, exist_ok=True)
    a = ALGORITHM | {"minibatch_size": max(samples // 2, 1), "max_new_tokens": max_tokens - max(max_tokens // 4, 2)}
    a |= ({} if critic else {"advantage": "grpo", "kl_in": "loss"}) | (algorithm or {})
    pieces = vocabulary(texts or [])
    write_vocabulary(path / "vocabulary.parquet", pieces)
    (path / "config.toml").write_text(config_toml(path.name, a, steps, samples, seed, recorded or 0, alternatives))
    lines, spans = [{"step": 0} | evaluation(path, 0, seed)], Spans()
    for step in range(1, steps + 1):
        rng = np.random.default_rng((seed, step))
        t = batch(rng, samples, max_tokens, len(pieces), len(texts or []), a, full)
        first_passes(rng, t, step, a)
        whitening = learn(rng, t, step, a)
        rows = np.sort(rng.choice(samples, recorded, replace=False)) if recorded else np.arange(samples)
        write_rollout(path / f"rollouts/step-{step:06d}.parquet", t, rows, pieces, step, alternatives)
        metrics = step_metrics(t, a)
        seconds = spans.step(step, int(t["action_mask"].sum()), step % 2 == 0 or step == steps, "old_values" in t)
        metrics |= {f"time/{name}": value for name, value in seconds.items() if name in {phase[0] for phase in PHASES}}
        manifest = manifest_of(t, step, len(rows), a, whitening, metrics)
        (path / f"manifests/step-{step:06d}.json").write_text(json.dumps(manifest))
        held_out = evaluation(path, step, seed) if step % 2 == 0 or step == steps else {}
        lines.append({"step": step} | metrics | held_out)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "spans.json").write_text(spans.text(closed=finished))
    if finished:
        summary = {"steps": steps, "seconds": round(spans.now / 1e6, 1), "seed": seed, "best eval/score": 1.0}
        (path / "summary.json").write_text(json.dumps(summary))
    if quickstart:
        write_stage(path / "sft", "train/nll", seed)
        write_stage(path / "rm", "train/pair_loss", seed)
    return path


def batch(
    rng: np.random.Generator,
    samples: int,
    max_tokens: int,
    num_pieces: int,
    texts: int,
    a: Algorithm,
    full: bool = False,
) -> Arrays:
    """What sampling gives: (B,T) tensors and (B,) columns. texts: how many tokens after the special ones are a test's own."""
    group = 4 if a["advantage"] in ("rloo", "grpo", "dr_grpo", "reinforce_pp_baseline") else 1
    group_ids = np.arange(samples) // group
    prompts = np.arange(group_ids[-1] + 1)
    prompt_ids = rng.choice(len(prompts) * 3 // 2 + 1, len(prompts), replace=False)[group_ids]
    prompt_length = (2 + prompt_ids % max(max_tokens // 4 - 1, 1)).astype(np.int64)
    action_length = np.minimum(rng.integers(1, a["max_new_tokens"] * 5 // 4 + 1, samples), a["max_new_tokens"])
    if full:
        action_length[:] = a["max_new_tokens"]
        prompt_length[:] = max_tokens - a["max_new_tokens"]
    length = prompt_length + action_length
    columns = np.arange(length.max())[None]
    attention = columns < length[:, None]
    action = attention & (columns >= prompt_length[:, None])
    first_word = 2 + texts + 256
    ids = first_word + (rng.random(action.shape) ** 2 * (num_pieces - first_word)).astype(np.int64)
    prompt_words = np.random.default_rng(7).integers(first_word, num_pieces, (int(prompt_ids.max()) + 1, ids.shape[1]))
    ids = np.where(action, ids, prompt_words[prompt_ids])
    if texts:
        which = 2 + np.arange(samples) % texts
        ids[:, 0] = which
        ids[np.arange(samples), prompt_length] = which
    stopped = (action_length < a["max_new_tokens"]) | (rng.random(samples) < 0.2)
    last = columns == length[:, None] - 1
    ids = np.where(last & stopped[:, None], END, ids)
    return {
        "input_ids": np.where(attention, ids, PAD), "attention_mask": attention,
        "position_ids": np.where(attention, columns, 0), "response_mask": action, "action_mask": action,
        "ended": last & action, "bootstrap_values": where(action, np.zeros(1)),
        "prompt_id": prompt_ids, "group_ids": group_ids, "sample_index": (np.arange(samples) % group).astype(np.int32),
        "length": action_length.astype(np.int32), "prompt_length": prompt_length,
        "stop_reason": np.where(stopped, "stop", "length"),
    }  # fmt: skip


def first_passes(rng: np.random.Generator, t: Arrays, step: int, a: Algorithm) -> None:
    """The sampler's log-probs, the scores and what actor, reference and critic say before the update, added to t."""
    action, B = t["action_mask"], len(t["length"])
    old = -rng.exponential(1.5, action.shape)
    scores = rng.normal(0.2 * step, 1, B) - a["missing_eos_penalty"] * (t["stop_reason"] == "length")
    limit = np.inf if a["reward_clip"] is None else a["reward_clip"]
    t |= {
        "rollout_logprobs": where(action, np.minimum(old + rng.normal(0, 1e-6, action.shape), 0)),
        "old_logprobs": where(action, old), "entropy": where(action, rng.gamma(4, 0.4, action.shape)),
        "ref_logprobs": where(action, np.minimum(old - rng.normal(0.02 * step, 0.1 * step, action.shape), 0)),
        "scores": np.clip(scores, -limit, limit).astype(np.float32), "policy_version": np.full(B, step - 1),
    }  # fmt: skip
    if a["advantage"] == "gae":
        t["old_values"] = where(action, 0.6 * t["scores"][:, None] + rng.normal(0, 0.3, action.shape))


def learn(rng: np.random.Generator, t: Arrays, step: int, a: Algorithm) -> dict[str, float] | None:
    """Rewards, advantages and the last epoch's pass, added to t. Returns the whitening, or None."""
    mask, B = t["action_mask"], len(t["scores"])
    t["kl"] = where(mask, t["old_logprobs"] - t["ref_logprobs"])
    shaped = -a["kl_coef"] * t["kl"] if a["kl_in"] == "reward" else np.zeros(1)
    t["rewards"] = where(mask, shaped + t["ended"] * t["scores"][:, None])
    raw, per_token = raw_advantages(t, a)
    whitening = None
    if (a["advantage"] == "gae" and a["whiten_advantages"]) or a["advantage"].startswith("reinforce_pp"):
        over = raw[mask] if per_token else raw[:, 0]
        mean, variance = float(over.mean(dtype=np.float64)), float(over.var(dtype=np.float64))
        t["advantages"] = where(mask, (raw - mean) / np.sqrt(variance + 1e-8))
        whitening = {"mean": mean, "variance": variance}
    else:
        t["advantages"] = where(mask, raw)
    order = rng.permutation(B)
    t["minibatch"] = np.empty(B, np.int32)
    t["minibatch"][order] = np.arange(B) // a["minibatch_size"]
    drift = rng.normal(0, 0.12, mask.shape) + (rng.random(mask.shape) < 0.02) * rng.normal(0, 1.5, mask.shape)
    # The first minibatch of all sees the weights that sampled.
    untouched = (t["minibatch"] == 0)[:, None] & (a["num_epochs"] == 1)
    t["logprobs"] = where(mask, np.minimum(t["old_logprobs"] + np.where(untouched, 0, drift), 0))
    policy_pass(t, a)
    if "old_values" in t:
        t["values"] = where(mask, t["old_values"] + np.where(untouched, 0, rng.normal(0, 0.15, mask.shape)))
        value_pass(t, a["value_clip_eps"])
    return whitening


def raw_advantages(t: Arrays, a: Algorithm) -> tuple[np.ndarray, bool]:
    """(advantages before whitening in float64, (B,T) or (B,1), whether they differ by token). Adds returns for gae.

    A plain backward loop: in a synthetic batch the actions of a row are contiguous, and end with the row.
    """
    mask, rewards = t["action_mask"], t["rewards"].astype(np.float64)
    if a["advantage"] in ("gae", "reinforce_pp"):
        gae = a["advantage"] == "gae"
        values = t["old_values"].astype(np.float64) if gae else np.zeros(mask.shape)
        raw, later, next_value = np.zeros(mask.shape), np.zeros(len(mask)), np.zeros(len(mask))
        decay = a["gamma"] * a["gae_lambda"] if gae else a["gamma"]
        for k in reversed(range(mask.shape[1])):
            delta = rewards[:, k] + a["gamma"] * next_value - values[:, k]
            later = np.where(mask[:, k], delta + decay * later, 0)
            next_value = np.where(mask[:, k], values[:, k], 0)
            raw[:, k] = later
        if gae:
            t["returns"] = where(mask, raw + values)
        return raw, True
    scores, groups = rewards.sum(1), t["group_ids"]
    size = np.bincount(groups)[groups]
    deviation = scores - (np.bincount(groups, scores) / np.bincount(groups))[groups]
    if a["advantage"] == "rloo":
        deviation = deviation * size / np.maximum(size - 1, 1)
    if a["advantage"] == "grpo":
        std = np.sqrt(np.bincount(groups, deviation**2)[groups] / np.maximum(size - 1, 1))
        deviation = deviation / (std + a["grpo_eps"])
    return deviation[:, None], False


def policy_pass(t: Arrays, a: Algorithm) -> None:
    """Ratio, clip, denominator and the gradient of the aggregated loss by logprobs, of the last epoch."""
    mask, advantages, lengths = t["action_mask"], t["advantages"], np.maximum(t["length"], 1)[:, None]
    t["log_ratio"] = where(mask, t["logprobs"] - t["old_logprobs"])
    t["ratio"] = where(mask, np.exp(t["log_ratio"]))
    low, high = 1 - a["clip_eps_low"], 1 + a["clip_eps_high"]
    sequence_ratio = np.exp(t["log_ratio"].sum(1, keepdims=True) / lengths)
    weight = np.where(mask, sequence_ratio if a["policy_loss"] == "gspo" else t["ratio"], 1)
    loss, bound = -weight * advantages, -np.clip(weight, low, high) * advantages
    clipped = bound > loss
    if a["dual_clip"] is not None:
        clipped |= (advantages < 0) & (np.maximum(loss, bound) > -a["dual_clip"] * advantages)
    grads = np.where(clipped, 0, loss)
    if a["policy_loss"] == "cispo":
        clipped, grads = (weight < low) | (weight > high), bound
    t["clipped"] = clipped & mask
    if a["kl_in"] == "loss":
        gap = np.where(mask, t["logprobs"] - t["ref_logprobs"], 0)
        slope = {"k1": 1, "k2": gap, "k3": 1 - np.exp(-gap), "k3_corrected": gap}[a["kl_loss"]]
        grads = grads + a["kl_coef"] * slope
    counted = {"token": t["length"], "sequence": 1, "constant": a["max_new_tokens"]}[a["aggregate"]] * np.ones(
        len(mask)
    )
    t["actor_denominator"] = np.bincount(t["minibatch"], counted)[t["minibatch"]].astype(np.float32)
    share = t["actor_denominator"][:, None] * (lengths if a["aggregate"] == "sequence" else 1)
    t["logprob_grads"] = where(mask, grads / share)


def value_pass(t: Arrays, eps: float | None) -> None:
    """Clip, denominator and gradient of the critic's loss, of the last epoch."""
    error, moved = t["values"] - t["returns"], t["values"] - t["old_values"]
    t["critic_denominator"] = np.bincount(t["minibatch"], t["length"])[t["minibatch"]].astype(np.float32)
    limit = np.inf if eps is None else eps
    limited = t["old_values"] + np.clip(moved, -limit, limit) - t["returns"]
    t["value_clipped"] = (np.abs(moved) > limit) & (limited**2 > error**2) & t["action_mask"]
    t["value_grads"] = where(t["action_mask"] & ~t["value_clipped"], error / t["critic_denominator"][:, None])


def step_metrics(t: Arrays, a: Algorithm) -> dict[str, float]:
    """Of the rollout, and of the last epoch's pass in place of all passes."""
    m = t["action_mask"]
    ratio, log_ratio, stop = t["ratio"][m], t["log_ratio"][m], t["stop_reason"] == "stop"
    metrics = {
        "score/mean": t["scores"].mean(), "score/std": t["scores"].std(), "score/max": t["scores"].max(),
        "kl/sequence": t["kl"].sum(1).mean(), "kl/token": t["kl"][m].mean(), "kl/coef": a["kl_coef"],
        "policy/entropy": t["entropy"][m].mean(), "rollout/length": t["length"].mean(), "rollout/tokens": m.sum(),
        "rollout/stopped": stop.mean(), "advantages/abs": np.abs(t["advantages"][m]).mean(), "actor/ratio": ratio.mean(),
        "actor/approx_kl": (ratio - 1 - log_ratio).mean(), "actor/clip_fraction": t["clipped"][m].mean(),
        "actor/log_ratio_max": np.abs(log_ratio).max(), "actor/first_ratio_error": 0.0, "actor/lr": 1e-5,
    }  # fmt: skip
    if "values" in t:
        returns, gap = t["returns"][m], t["returns"][m] - t["old_values"][m]
        metrics |= {
            "critic/value": t["old_values"][m].mean(), "critic/return": returns.mean(),
            "critic/explained_variance": 1 - gap.var() / returns.var(), "critic/clip_fraction": t["value_clipped"][m].mean(),
        }  # fmt: skip
    return {name: float(value) for name, value in metrics.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    for name, default in (("steps", 3), ("samples", 64), ("max-tokens", 60), ("seed", 0), ("alternatives", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("no-critic", "running", "quickstart", "full"):
        parser.add_argument(f"--{name}", action="store_true")
    o = parser.parse_args()
    options = {"critic": not o.no_critic, "finished": not o.running, "quickstart": o.quickstart, "full": o.full}
    print(write_run(o.out, o.steps, o.samples, o.max_tokens, o.seed, alternatives=o.alternatives, **options))


if __name__ == "__main__":
    main()
