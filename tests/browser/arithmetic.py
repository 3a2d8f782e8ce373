"""The arithmetic of every token of a step worked out from its Parquet file: DESIGN's formulas, float64, plain loops.

For the quickstart's algorithm: gae, ppo without a dual clip, the KL in the reward, a loss divided by tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq


class Line(NamedTuple):
    """What a line of the page should say. result: worked out; recorded: what the record holds for it, None where nothing."""

    result: float | bool
    recorded: float | bool | None = None

    @property
    def agrees(self) -> bool:
        if self.recorded is None:
            return True
        if isinstance(self.result, bool):
            return self.result == self.recorded
        return abs(self.result - self.recorded) <= 2e-5 * max(abs(self.result), abs(self.recorded)) + 1e-9


class Step:
    """A recorded step. samples: a dict a row of the file, lists as arrays."""

    def __init__(self, run_dir: Path, step: int) -> None:
        self.path = run_dir / f"rollouts/step-{step:06d}.parquet"
        self.manifest = json.loads((run_dir / f"manifests/step-{step:06d}.json").read_text())
        self.algorithm: dict[str, Any] = self.manifest["algorithm"]
        names = {"advantage": "gae", "policy_loss": "ppo", "kl_in": "reward", "aggregate": "token", "dual_clip": None}
        assert names.items() <= self.algorithm.items() and self.algorithm["whiten_advantages"]
        rows = pq.read_table(self.path).to_pylist()
        self.samples = [{k: np.array(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
        assert len(self.samples) == self.manifest["samples"]
        whitened = np.concatenate(
            [(s["returns"] - s["old_values"].astype(float))[s["action_mask"]] for s in self.samples]
        )
        self.mean, self.variance = float(whitened.mean()), float(whitened.var())
        self.chains = [self._gae(sample) for sample in self.samples]

    def _gae(self, sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(next value, delta, advantage before whitening) of each token; 0 where it is no action."""
        gamma, lam = self.algorithm["gamma"], self.algorithm["gae_lambda"]
        rewards, values, mask = (
            sample["rewards"].astype(float),
            sample["old_values"].astype(float),
            sample["action_mask"],
        )
        follows, deltas, advantages = np.zeros((3, len(mask)))
        next_value, advantage = float(sample["bootstrap_values"][-1]), 0.0
        for t in reversed(range(len(mask))):
            if sample["ended"][t]:
                next_value, advantage = float(sample["bootstrap_values"][t]), 0.0
            if mask[t]:
                follows[t], deltas[t] = next_value, rewards[t] + gamma * next_value - values[t]
                advantages[t] = advantage = deltas[t] + gamma * lam * advantage
                next_value = values[t]
        return follows, deltas, advantages

    def raw_advantages(self) -> np.ndarray:
        """Of all actions of the step, by the recursion."""
        return np.concatenate([c[2][s["action_mask"]] for c, s in zip(self.chains, self.samples, strict=True)])

    def actions(self, row: int) -> list[int]:
        return np.flatnonzero(self.samples[row]["action_mask"]).tolist()

    def lines(self, row: int, t: int) -> dict[str, Line]:
        """Every line of an action, by the page's ids, in the order of the page."""
        s, a = self.samples[row], self.algorithm
        x = {name: float(s[name][t]) for name in s if isinstance(s[name], np.ndarray) and s[name].ndim == 1}
        follows, deltas, raw = (part[t] for part in self.chains[row])
        is_last = t == self.actions(row)[-1]
        adv, n = x["advantages"], self._tokens_of_minibatch(s["minibatch"])
        unclipped = -x["ratio"] * adv
        bounded = -min(max(x["ratio"], 1 - a["clip_eps_low"]), 1 + a["clip_eps_high"]) * adv
        clipped, loss = bounded > unclipped, max(unclipped, bounded)
        return {
            "kl": Line(x["old_logprobs"] - x["ref_logprobs"], x["kl"]),
            "reward": Line(-a["kl_coef"] * x["kl"] + (s["scores"] if is_last else 0.0), x["rewards"]),
            "next_value": Line(follows), "delta": Line(deltas), "raw_advantage": Line(raw),
            "return": Line(raw + x["old_values"], x["returns"]),
            "mean": Line(self.mean, self.manifest["whitening"]["mean"]),
            "variance": Line(self.variance, self.manifest["whitening"]["variance"]),
            "advantage": Line((raw - self.mean) / np.sqrt(self.variance + 1e-8), adv),
            "log_ratio": Line(x["logprobs"] - x["old_logprobs"], x["log_ratio"]),
            "ratio": Line(float(np.exp(x["log_ratio"])), x["ratio"]),
            "unclipped": Line(unclipped), "bounded": Line(bounded), "loss": Line(loss),
            "clipped": Line(clipped, bool(x["clipped"])), "denominator": Line(n, s["actor_denominator"]),
            "loss_share": Line(loss / n), "gradient": Line(0.0 if clipped else unclipped / n, x["logprob_grads"]),
        } | self._critic(x, n, s["critic_denominator"])  # fmt: skip

    def _critic(self, x: dict[str, float], n: int, recorded_denominator: float) -> dict[str, Line]:
        eps = self.algorithm["value_clip_eps"]
        bound = x["old_values"] + min(max(x["values"] - x["old_values"], -eps), eps)
        square, square_bound = (x["values"] - x["returns"]) ** 2 / 2, (bound - x["returns"]) ** 2 / 2
        clipped = square_bound > square
        return {
            "value_bound": Line(bound), "square": Line(square), "square_bound": Line(square_bound),
            "value_loss": Line(max(square, square_bound)), "value_clipped": Line(clipped, bool(x["value_clipped"])),
            "critic_denominator": Line(n, recorded_denominator),
            "value_gradient": Line(0.0 if clipped else (x["values"] - x["returns"]) / n, x["value_grads"]),
        }  # fmt: skip

    def _tokens_of_minibatch(self, minibatch: int) -> int:
        return sum(int(s["action_mask"].sum()) for s in self.samples if s["minibatch"] == minibatch)
