"""The workers of the four roles, each with typed methods. Where they live is `local.py`'s business (or Ray's).

actor: log-probs and update. reference: log-probs. critic: values and update. The reward model is a reward source
(`pellucid.rewards`). Every method takes a whole Batch and splits it into micro-batches itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from pellucid.config import AlgoConfig, OptimizerConfig, PassConfig
from pellucid.core import aggregate, cispo, gspo, kl_loss, masked_mean, nll, ppo_clip, value_clip
from pellucid.errors import IntegrityError
from pellucid.execution.learner import Gathered, Learner, Means, MicroBatchLimits, micro_batches, minibatches
from pellucid.models import CausalLM, MLPPolicy, MLPValue, ScalarModel, enable_gradient_checkpointing
from pellucid.types import Batch, StepStats, SupervisedBatch

RATIO_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}
"""How far |log ratio| may be from 0 on a token before the first update: rounding between two batch shapes."""

PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor, AlgoConfig], tuple[Tensor, Tensor]]
POLICY_LOSSES: dict[str, PolicyLoss] = {
    "ppo": lambda new, old, adv, mask, a: ppo_clip(new, old, adv, a.clip_eps_low, a.clip_eps_high, a.dual_clip),
    "gspo": lambda new, old, adv, mask, a: gspo(new, old, adv, mask, a.clip_eps_low, a.clip_eps_high),
    "cispo": lambda new, old, adv, mask, a: cispo(new, old, adv, a.clip_eps_low, a.clip_eps_high),
}


class ReferenceWorker:
    """A frozen policy that gives log-probs, and entropies, of what was sampled."""

    def __init__(self, model: CausalLM | MLPPolicy, temperature: float, limits: MicroBatchLimits) -> None:
        self.model, self.temperature, self.limits = model, temperature, limits

    @torch.no_grad()
    def logprobs(self, batch: Batch, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """(logprobs, entropy or None), each (B,T), 0 outside action_mask."""
        made = Gathered(batch)
        for rows, micro in split(batch, self.limits, self.model.device):
            new, ent = self.model.logprobs_of(micro, self.temperature, entropy)
            made.put(rows, logprobs=new, entropy=ent)
        return made.tensors["logprobs"], made.tensors.get("entropy")

    @torch.no_grad()
    def top_tokens(self, batch: Batch, k: int) -> dict[str, Tensor]:
        """The k likeliest tokens at each action: top_ids and top_logprobs, each (B,T,K), 0 outside action_mask."""
        made = Gathered(batch)
        for rows, micro in split(batch, self.limits, self.model.device):
            ids, logprobs = self.model.top_tokens(
                micro.input_ids, micro.attention_mask, micro.action_mask, self.temperature, k
            )
            made.put(rows, top_ids=ids, top_logprobs=logprobs)
        return made.tensors


class ActorWorker(ReferenceWorker):
    """The policy that is trained."""

    def __init__(
        self,
        model: CausalLM | MLPPolicy,
        temperature: float,
        algo: AlgoConfig,
        optimizer: OptimizerConfig,
        total_updates: int,
        max_new_tokens: int,
    ) -> None:
        super().__init__(model, temperature, limits_of(algo))
        self.algo, self.max_new_tokens = algo, max_new_tokens
        if algo.gradient_checkpointing:
            enable_gradient_checkpointing(model.hf)
        self.learner = Learner("actor", model.module, optimizer, total_updates)

    def update(
        self, batch: Batch, kl_coef: float, seed: int, ptx: Iterator[SupervisedBatch] | None = None
    ) -> tuple[StepStats, dict[str, Tensor]]:
        """num_epochs passes of minibatches over the batch. Returns metrics, named in docs/metrics.md, and what the last
        pass made: logprobs, log_ratio, ratio, clipped, logprob_grads (B,T), minibatch and actor_denominator (B,); and
        entropy (B,T), of the first pass, if the batch has none yet.

        ptx: supervised batches, one per minibatch, weighted by ptx_coef. Raises IntegrityError when the first
        minibatch's ratio is not 1, a loss or gradient is not finite, or weights do not move.
        """
        means, made, first, worst = Means(), Gathered(batch), None, 0.0
        for epoch in range(self.algo.num_epochs):
            watching = epoch == 0 and batch.entropy is None
            for i, rows in enumerate(minibatches(len(batch), self.algo.minibatch_size, seed + epoch)):
                part, supervised = made.of(rows), next(ptx) if ptx else None
                stats, log_ratio = self._minibatch(
                    batch.select(rows), kl_coef, supervised, part, is_first=first is None, watching=watching
                )
                made.put(rows, minibatch=torch.full(rows.shape, i, dtype=torch.int32))
                first = log_ratio if first is None else first
                worst = max(worst, log_ratio)
                means.add(stats)
        stats = means.result("actor/") | {"actor/first_ratio_error": first or 0.0, "actor/log_ratio_max": worst}
        if "entropy" in made.tensors:
            stats["policy/entropy"] = masked_mean(made.tensors["entropy"], batch.action_mask).item()
        return stats, made.tensors

    def _minibatch(
        self,
        batch: Batch,
        kl_coef: float,
        ptx: SupervisedBatch | None,
        made: Gathered,
        is_first: bool = False,
        watching: bool = False,
    ) -> tuple[StepStats, float]:
        """One optimizer step. Returns (metrics, largest |log ratio|). made: where what it makes of each token goes, the
        entropy too if it is watching. is_first: the ratio must still be 1."""
        self.learner.zero_grad()
        denominator = self._denominator(batch.action_mask)
        num_tokens = batch.action_mask.sum().item()
        means, totals, worst = Means(), {"policy_loss": 0.0}, 0.0
        for rows, micro in split(batch, self.limits, self.model.device):
            mask = micro.action_mask
            logprobs, entropy = self.model.logprobs_of(micro, self.temperature, watching)
            logprobs.retain_grad()
            loss, clipped = POLICY_LOSSES[self.algo.policy_loss](
                logprobs, micro.get("old_logprobs"), micro.get("advantages"), mask, self.algo
            )
            total = aggregate(loss, mask, self.algo.aggregate, denominator)
            totals["policy_loss"] += total.item()
            if self.algo.kl_in == "loss" and kl_coef > 0:
                penalty = kl_loss(logprobs, micro.get("ref_logprobs"), self.algo.kl_loss)
                penalty = aggregate(penalty, mask, self.algo.aggregate, denominator)
                totals["kl_loss"] = totals.get("kl_loss", 0.0) + penalty.item()
                total = total + kl_coef * penalty
            _require_finite("actor", total)
            total.backward()
            log_ratio = (logprobs - micro.get("old_logprobs")).detach()
            made.put(rows, logprobs=logprobs, log_ratio=log_ratio, ratio=log_ratio.exp() * mask, entropy=entropy)
            made.put(rows, clipped=clipped & mask, logprob_grads=logprobs.grad)
            made.put(rows, actor_denominator=torch.full(rows.shape, float(denominator)))
            worst = max(worst, log_ratio[mask].abs().max().item())
            means.add(_ratio_metrics(log_ratio, clipped, mask), mask.sum().item() / num_tokens)
        if is_first:
            self._check_first_ratio(worst, of_engine=watching)
        if ptx is not None:
            totals["ptx_loss"] = self._ptx(ptx)
        return means.result() | totals | self.learner.step(), worst

    def _ptx(self, batch: SupervisedBatch) -> float:
        """Back-propagate ptx_coef * NLL of a supervised batch; returns the NLL per token."""
        total = 0.0
        denominator = batch.loss_mask.sum()
        for _, micro in split(batch, self.limits, self.model.device):
            logprobs, _ = self.model.logprobs(micro.input_ids, micro.attention_mask, micro.loss_mask, 1.0)
            loss = aggregate(nll(logprobs), micro.loss_mask, "token", denominator)
            _require_finite("actor (ptx)", loss)
            (self.algo.ptx_coef * loss).backward()
            total += loss.item()
        return total

    def _denominator(self, mask: Tensor) -> float:
        """What the whole minibatch's loss is divided by, whatever micro-batches it is split into."""
        if self.algo.aggregate == "token":
            return mask.sum().item()
        sequences = mask.any(1).sum().item()
        return sequences if self.algo.aggregate == "sequence" else sequences * self.max_new_tokens

    def _check_first_ratio(self, log_ratio: float, of_engine: bool) -> None:
        tolerance = RATIO_TOLERANCE[self.model.precision]
        if not log_ratio <= tolerance:
            reason = "the log-probs of this pass and of old_logprobs disagree"
            if of_engine:
                reason = "the engine, whose log-probs these are, sampled with other weights or another temperature"
            raise IntegrityError(
                f"actor: before the first update the ratio must be 1, but |log ratio| reaches {log_ratio:.3g} "
                f"(tolerance {tolerance:g}): {reason}"
            )


class CriticWorker:
    """The value function that is trained beside the actor."""

    def __init__(
        self, model: ScalarModel | MLPValue, algo: AlgoConfig, optimizer: OptimizerConfig, total_updates: int
    ) -> None:
        self.model, self.algo, self.limits = model, algo, limits_of(algo)
        if algo.gradient_checkpointing:
            enable_gradient_checkpointing(model.hf)
        self.learner = Learner("critic", model.module, optimizer, total_updates)

    @torch.no_grad()
    def values(self, batch: Batch) -> Tensor:
        """(B,T): value of the state before each action, 0 elsewhere."""
        made = Gathered(batch)
        for rows, micro in split(batch, self.limits, self.model.device):
            made.put(rows, values=self.model.values_of(micro))
        return made.tensors["values"]

    def update(self, batch: Batch, seed: int) -> tuple[StepStats, dict[str, Tensor]]:
        """num_epochs passes of minibatches over the batch. Returns metrics as in docs/metrics.md, and what the last pass
        made: values, value_clipped, value_grads (B,T) and critic_denominator (B,)."""
        means, made = Means(), Gathered(batch)
        for epoch in range(self.algo.num_epochs):
            for rows in minibatches(len(batch), self.algo.minibatch_size, seed + epoch):
                means.add(self._minibatch(batch.select(rows), made.of(rows)))
        return means.result("critic/"), made.tensors

    def _minibatch(self, batch: Batch, made: Gathered) -> StepStats:
        self.learner.zero_grad()
        denominator = batch.action_mask.sum().item()
        value_loss, clip_fraction = 0.0, 0.0
        for rows, micro in split(batch, self.limits, self.model.device):
            mask = micro.action_mask
            values = self.model.values_of(micro)
            values.retain_grad()
            loss, clipped = value_clip(values, micro.get("old_values"), micro.get("returns"), self.algo.value_clip_eps)
            total = aggregate(loss, mask, "token", denominator)
            _require_finite("critic", total)
            total.backward()
            value_loss += total.item()
            clip_fraction += (clipped & mask).sum().item() / denominator
            made.put(rows, values=values, value_clipped=clipped & mask, value_grads=values.grad)
            made.put(rows, critic_denominator=torch.full(rows.shape, float(denominator)))
        return {"value_loss": value_loss, "clip_fraction": clip_fraction} | self.learner.step()


Rows = TypeVar("Rows", Batch, SupervisedBatch)


def limits_of(section: PassConfig) -> MicroBatchLimits:
    return MicroBatchLimits(section.micro_batch_tokens, section.micro_batch_size)


def split(batch: Rows, limits: MicroBatchLimits, device: torch.device) -> Iterator[tuple[Tensor, Rows]]:
    """(rows, micro-batch on the device)."""
    groups = micro_batches(batch.attention_mask.sum(1), limits)
    for rows in groups:
        whole = len(groups) == 1 and batch.attention_mask.shape[1] == 1  # nothing to sort, nothing to cut
        yield rows, (batch if whole else batch.select(rows)).to(device)


def _ratio_metrics(log_ratio: Tensor, clipped: Tensor, mask: Tensor) -> dict[str, float]:
    """approx_kl is the k3 estimate of KL(old || current), Schulman's; all are means over action tokens."""
    ratio = log_ratio.exp()
    figures = torch.stack([ratio - 1 - log_ratio, clipped.float(), ratio]).flatten(1)
    means = masked_mean(figures, mask.flatten().expand_as(figures), dim=1).tolist()
    return dict(zip(("approx_kl", "clip_fraction", "ratio"), means, strict=True))


def _require_finite(role: str, loss: Tensor) -> None:
    if not loss.isfinite():
        raise IntegrityError(f"{role}: the loss is {loss.item()}")
