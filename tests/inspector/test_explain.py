"""The inspector's arithmetic (static/explain.js) against pellucid.core and autograd.

Random ragged batches go through the library's own functions in float32, for every advantage, loss, KL variant and
aggregation; node then has to find the same numbers again from the record, and to notice each one that is changed.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from pellucid.config import AlgoConfig
from pellucid.core import aggregate, discounted_returns, dr_grpo, gae, grpo, kl_loss, rloo, value_clip
from pellucid.execution.workers import POLICY_LOSSES
from pellucid.stages.advantages import ADVANTAGES
from pellucid.stages.ppo import shape_rewards
from pellucid.types import Batch

NODE = shutil.which("node")
SUITE = Path(__file__).with_name("test_explain.js")
PROMPTS, GROUP, T, MAX_NEW_TOKENS = 3, 2, 13, 12
B = PROMPTS * GROUP
NAMES = get_args(AlgoConfig.model_fields["advantage"].annotation)
ADVANTAGE = [*({"advantage": name} for name in NAMES), {"advantage": "gae", "whiten_advantages": False}]
POLICY = [
    {"policy_loss": "ppo"},
    {"policy_loss": "ppo", "dual_clip": 1.5},
    {"policy_loss": "gspo", "clip_eps_low": 0.05, "clip_eps_high": 0.07},
    {"policy_loss": "cispo", "clip_eps_low": 0.3},
]
KL = [{"kl_in": "reward"}] + [{"kl_in": "loss", "kl_loss": kind} for kind in ("k1", "k2", "k3", "k3_corrected")]
AGGREGATE = [{"aggregate": mode} for mode in ("token", "sequence", "constant")]
TOKENS = (
    "response_mask action_mask ended bootstrap_values old_logprobs ref_logprobs kl rewards old_values advantages returns"
    " logprobs log_ratio ratio clipped logprob_grads values value_clipped value_grads"
).split()


def drawn(seed: int) -> tuple[Batch, Tensor, Tensor]:
    """A batch with gaps between actions, and the last epoch's log-probs and values. The first two samples score the same; the
    first sample's ratios lie on the edges of the clip, give or take a few roundings; others reach far beyond it."""
    g = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return torch.randn(B, T, generator=g) * scale

    columns = torch.arange(T)
    starts, lengths = torch.randint(1, 4, (B, 1), generator=g), torch.randint(7, T + 1, (B, 1), generator=g)
    response = (columns >= starts) & (columns < lengths)
    actions = response & (torch.rand(B, T, generator=g) < 0.8)
    actions[:, 4] = True
    last = (columns * actions).max(1, keepdim=True).values
    scores = torch.randn(B, generator=g)
    scores[1] = scores[0]
    old = -normal(1.5).abs() * actions
    drift = normal(0.25) + (torch.rand(B, T, generator=g) < 0.15) * normal(1.0)
    edges = torch.tensor([math.log(x) for x in (0.7, 0.8, 1.2, 1.5)]).repeat(T)[:T]
    drift[0] = edges * (1 + torch.randint(-2, 3, (T,), generator=g) * 2.0**-23)
    old_values = normal(1.0) * actions
    batch = Batch(
        input_ids=torch.zeros(B, T, dtype=torch.int64), attention_mask=columns < lengths, position_ids=columns.expand(B, T),
        response_mask=response, action_mask=actions, rollout_logprobs=old, ended=(columns == last) & actions,
        bootstrap_values=normal(1.0) * (columns == last) * actions, group_ids=torch.arange(B) // GROUP,
        policy_version=torch.zeros(B, dtype=torch.int64), stop_reason=("stop",) * B, scores=scores, old_logprobs=old,
        ref_logprobs=(old + normal(0.3)) * actions, old_values=old_values,
    )  # fmt: skip
    return batch, (old + drift) * actions, (old_values + normal(0.25)) * actions


def policy_pass(batch: Batch, logprobs: Tensor, rows: Tensor, algo: AlgoConfig) -> dict[str, Tensor]:
    """The minibatch of these rows, as ActorWorker does it, by autograd."""
    part, logprobs = batch.select(rows), logprobs[rows].requires_grad_()
    pad = T - part.input_ids.shape[1]
    mask, new = part.action_mask, logprobs[:, : T - pad]
    loss, clipped = POLICY_LOSSES[algo.policy_loss](new, part.get("old_logprobs"), part.get("advantages"), mask, algo)
    sequences = len(rows)
    denominator = {"token": mask.sum(), "sequence": sequences, "constant": sequences * MAX_NEW_TOKENS}[algo.aggregate]
    total, penalty = aggregate(loss, mask, algo.aggregate, denominator), torch.zeros_like(loss)
    if algo.kl_in == "loss":
        penalty = kl_loss(new, part.get("ref_logprobs"), algo.kl_loss)
        total = total + algo.kl_coef * aggregate(penalty, mask, algo.aggregate, denominator)
    total.backward()
    made = {"loss": loss, "clipped": clipped & mask, "kl_penalty": penalty}
    made = {k: torch.nn.functional.pad(v.detach(), (0, pad)) for k, v in made.items()}
    per_row = {
        "actor_denominator": torch.full((sequences,), float(denominator)),
        "total": total.detach().expand(sequences),
    }
    assert logprobs.grad is not None
    return made | {"logprob_grads": logprobs.grad} | per_row


def value_pass(batch: Batch, values: Tensor, rows: Tensor, algo: AlgoConfig) -> dict[str, Tensor]:
    """The minibatch of these rows, as CriticWorker does it, by autograd."""
    mask, values = batch.action_mask[rows], values[rows].requires_grad_()
    loss, clipped = value_clip(values, batch.get("old_values")[rows], batch.get("returns")[rows], algo.value_clip_eps)
    aggregate(loss, mask, "token", mask.sum()).backward()
    assert values.grad is not None
    denominator = mask.sum().float().expand(len(rows))
    return {
        "value_loss": loss.detach(),
        "value_clipped": clipped & mask,
        "value_grads": values.grad,
        "critic_denominator": denominator,
    }


def raw_advantages(batch: Batch, algo: AlgoConfig) -> Tensor:
    """(B,T), before whitening."""
    mask, rewards = batch.action_mask, batch.get("rewards")
    if algo.advantage == "gae":
        made = gae(
            rewards, batch.get("old_values"), mask, batch.ended, batch.bootstrap_values, algo.gamma, algo.gae_lambda
        )
        return made[0]
    if algo.advantage == "reinforce_pp":
        return discounted_returns(rewards, mask, torch.zeros_like(mask), torch.zeros_like(rewards), algo.gamma)
    sums, groups = rewards.sum(1), batch.group_ids
    per_sample = {"rloo": rloo, "dr_grpo": dr_grpo, "reinforce_pp_baseline": dr_grpo}
    made = grpo(sums, groups, algo.grpo_eps) if algo.advantage == "grpo" else per_sample[algo.advantage](sums, groups)
    return made[:, None].expand(B, T)


def whitening(batch: Batch, raw: Tensor, algo: AlgoConfig) -> dict[str, float] | None:
    if algo.advantage == "gae" and algo.whiten_advantages:
        of = (batch.get("returns").double() - batch.get("old_values").double())[batch.action_mask]
    elif algo.advantage.startswith("reinforce_pp"):
        of = (raw[batch.action_mask] if algo.advantage == "reinforce_pp" else raw[:, 0]).double()
    else:
        return None
    return {"mean": of.mean().item(), "variance": of.var(correction=0).item()}


def gather(pieces: list[dict[str, Tensor]], parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Minibatches back into the order of the batch."""
    back = torch.cat(parts).argsort()
    return {name: torch.cat([piece[name] for piece in pieces])[back] for name in pieces[0]}


def case(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """One step as the inspector's API gives it, and what its lines must come to."""
    whole = {"gamma": (1.0, 0.97)[seed % 2], "gae_lambda": (0.95, 1.0)[seed % 3 == 0], "kl_coef": 0.1, "num_epochs": 2}
    algo = AlgoConfig(**(whole | {"value_clip_eps": (0.2, None)[seed % 5 == 0]} | options))
    batch, logprobs, values = drawn(seed)
    batch = shape_rewards(batch, algo.kl_coef if algo.kl_in == "reward" else 0.0)
    batch = batch.having(**ADVANTAGES[algo.advantage](batch, algo))
    raw, mask = raw_advantages(batch, algo), batch.action_mask
    parts = torch.randperm(B, generator=torch.Generator().manual_seed(seed)).split(B // 2)
    made = gather([policy_pass(batch, logprobs, rows, algo) for rows in parts], parts)
    if algo.advantage == "gae":
        made |= gather([value_pass(batch, values, rows, algo) for rows in parts], parts) | {"values": values}
    log_ratio = (logprobs - batch.get("old_logprobs")) * mask
    made |= {"logprobs": logprobs, "log_ratio": log_ratio, "ratio": log_ratio.exp() * mask}
    minibatch = torch.empty(B, dtype=torch.int64)
    for i, rows in enumerate(parts):
        minibatch[rows] = i
    held = {name: made.get(name, getattr(batch, name)) for name in TOKENS}
    if algo.advantage != "gae":
        held["old_values"] = None
    scalars = {"scores": batch.get("scores"), "group_ids": batch.group_ids, "reward_sum": batch.get("rewards").sum(1)}
    scalars |= {"length": mask.sum(1), "minibatch": minibatch, "actor_denominator": made["actor_denominator"]}
    if "values" in made:
        scalars["critic_denominator"] = made["critic_denominator"]
    columns = {name: x.tolist() for name, x in scalars.items()}
    lengths = batch.attention_mask.sum(1).tolist()
    records = [
        {
            "sample": {name: column[i] for name, column in columns.items()},
            "arrays": {name: x[i, : lengths[i]].tolist() for name, x in held.items() if x is not None},
        }
        for i in range(B)
    ]
    whitened = whitening(batch, raw, algo)
    constants = algo.model_dump() | {"max_new_tokens": MAX_NEW_TOKENS}
    expected = {"raw_advantage": raw, "loss": made["loss"], "value_loss": made.get("value_loss")}
    expected["kl_penalty"] = made["kl_penalty"] if algo.kl_in == "loss" else None
    return {
        "name": " ".join(str(v) for v in options.values()),
        "manifest": {"algorithm": constants, "samples": B, "whitening": whitened},
        "check": {"whitening": whitened and whitened | {"whole": True}},
        "samples": {"rows": B, "columns": columns},
        "records": records,
        "expected": {name: x.tolist() for name, x in expected.items() if x is not None},
        "totals": made["total"].tolist(),
    }


@pytest.mark.skipif(NODE is None, reason="there is no node on this machine to run static/explain.js")
def test_the_inspector_works_out_what_the_library_computed(tmp_path):
    combinations = itertools.product(ADVANTAGE, POLICY, KL, AGGREGATE)
    cases = [case(seed, dict(e for part in parts for e in part.items())) for seed, parts in enumerate(combinations)]
    assert len(cases) == 7 * 4 * 5 * 3
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases, allow_nan=False))
    command = [str(NODE), "--test", "--test-reporter=spec", str(SUITE)]
    done = subprocess.run(command, env=os.environ | {"EXPLAIN_CASES": str(path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "skipped 0" in done.stdout, done.stdout[-2000:]
