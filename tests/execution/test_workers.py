"""Actor and critic on tiny problems: they learn, they say when something is wrong, and each loss is what it says."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_llama, tiny_llama_gqa
from tiny_runs import ragged_rows, random_batch, sample

from pellucid.config import AlgoConfig, OptimizerConfig
from pellucid.core import aggregate, kl_loss, nll, ppo_clip
from pellucid.errors import IntegrityError
from pellucid.execution.learner import Gathered, MicroBatchLimits
from pellucid.execution.workers import ActorWorker, CriticWorker, ReferenceWorker
from pellucid.models import CausalLM, ScalarModel
from pellucid.types import Batch, collate, collate_supervised


def actor(lr: float = 1e-3, total: int = 100, temperature: float = 1.0, **algo) -> ActorWorker:
    config = AlgoConfig(**({"num_epochs": 1, "minibatch_size": 8, "micro_batch_size": 8} | algo))
    model = CausalLM(tiny_llama_gqa(), packing=config.packing)
    return ActorWorker(model, temperature, config, OptimizerConfig(lr=lr, anneal=False), total, max_new_tokens=8)


def critic(lr: float = 1e-2, **algo) -> CriticWorker:
    from transformers import LlamaForSequenceClassification

    config = AlgoConfig(**({"num_epochs": 1, "minibatch_size": 8, "micro_batch_size": 8} | algo))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ScalarModel(LlamaForSequenceClassification(tiny_llama(num_labels=1, pad_token_id=0).config))
    return CriticWorker(model, config, OptimizerConfig(lr=lr, anneal=False), total_updates=100)


def on_policy(worker: ActorWorker, batch: Batch | None = None) -> Batch:
    """The batch with old_logprobs as the worker gives them now."""
    from dataclasses import replace

    batch = batch or random_batch()
    return replace(batch, old_logprobs=worker.logprobs(batch)[0])


def weights(worker) -> list[torch.Tensor]:
    return [p.detach().clone() for p in worker.model.hf.parameters()]


def gradients(worker, work) -> list[torch.Tensor]:
    """The gradient that work accumulates, without the step."""
    worker.learner.step = dict
    work()
    return [p.grad.clone() for p in worker.model.hf.parameters()]


# ---------------------------------------------------------------- reading


def test_logprobs_come_back_in_the_order_of_the_batch():
    worker, batch = actor(micro_batch_size=2), random_batch()
    logprobs, entropy = worker.logprobs(batch, entropy=True)
    whole, spread = worker.model.logprobs(batch.input_ids, batch.attention_mask, batch.action_mask, 1.0, entropy=True)
    torch.testing.assert_close(logprobs, whole.detach())
    torch.testing.assert_close(entropy, spread.detach())
    assert not logprobs.requires_grad and worker.logprobs(batch)[1] is None


def test_the_reference_reads_at_the_actors_temperature():
    batch = random_batch()
    worker = ReferenceWorker(CausalLM(tiny_llama_gqa()), 0.7, MicroBatchLimits(32))
    torch.testing.assert_close(worker.logprobs(batch)[0], actor(temperature=0.7).logprobs(batch)[0])
    assert (worker.logprobs(batch)[0] - actor().logprobs(batch)[0]).abs().max() > 0.1


def test_values_come_back_in_the_order_of_the_batch():
    worker, batch = critic(micro_batch_size=2), random_batch()
    whole = worker.model.values(batch.input_ids, batch.attention_mask, batch.action_mask)
    torch.testing.assert_close(worker.values(batch), whole.detach())


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("policy_loss", ["ppo", "gspo", "cispo"])
def test_an_update_raises_the_probability_of_rewarded_tokens_and_lowers_the_others(policy_loss):
    # Sequences of one action after one prompt each, so that no gradient of another sequence is in the way.
    samples = [sample(row, [token]) for row, token in zip(ragged_rows(), (3, 4, 3, 4), strict=True)]
    batch = collate(samples, pad_id=0)
    good = torch.tensor([1.0, -1.0, 1.0, -1.0])
    worker = actor(policy_loss=policy_loss, num_epochs=2)
    before = worker.logprobs(batch)[0]
    batch = batch.having(old_logprobs=before, advantages=good[:, None] * batch.action_mask)
    worker.update(batch, kl_coef=0.0, seed=0)
    change = (worker.logprobs(batch)[0] - before)[batch.action_mask]
    assert (change * good > 0).all()


def test_the_clip_holds_the_ratio_back():
    batch = collate([sample(row, [3]) for row in ragged_rows()], pad_id=0)
    moved = []
    for eps in (0.2, 1e9):
        worker = actor(num_epochs=20, clip_eps_high=eps)
        before = worker.logprobs(batch)[0]
        ready = batch.having(old_logprobs=before, advantages=1.0 * batch.action_mask)
        clip_fraction = worker.update(ready, kl_coef=0.0, seed=0)[0]["actor/clip_fraction"]
        assert clip_fraction > 0.3 if eps == 0.2 else clip_fraction == 0
        moved.append((worker.logprobs(batch)[0] - before).sum().item())
    assert 0 < moved[0] < 0.7 * moved[1]


def test_the_critic_learns_the_returns():
    worker, batch = critic(value_clip_eps=None, num_epochs=40), random_batch()
    from dataclasses import replace

    batch = replace(batch, old_values=worker.values(batch))
    error = ((worker.values(batch) - batch.get("returns"))[batch.action_mask] ** 2).mean()
    worker.update(batch, seed=0)
    after = ((worker.values(batch) - batch.get("returns"))[batch.action_mask] ** 2).mean()
    assert after < 0.2 * error


def test_the_critics_loss_and_gradient_are_the_formula():
    worker, batch = critic(), random_batch()
    ours = gradients(worker, lambda: worker.update(batch, seed=0))
    plain = critic()
    values = plain.model.values(batch.input_ids, batch.attention_mask, batch.action_mask)
    old, returns = batch.get("old_values"), batch.get("returns")
    clipped = old + (values - old).clamp(-0.2, 0.2)
    loss = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)[batch.action_mask].mean()
    loss.backward()
    theirs = [p.grad for p in plain.model.hf.parameters()]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert worker.update(batch, seed=0)[0]["critic/value_loss"] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("mode", ["token", "sequence", "constant"])
def test_each_aggregation_divides_by_its_own_count(mode):
    """Tokens, sequences, or sequences * max_new_tokens (8), of the whole minibatch."""
    worker, batch = actor(aggregate=mode), random_batch()
    mask = batch.action_mask
    new = worker.logprobs(batch)[0]
    loss, _ = ppo_clip(new, batch.get("old_logprobs"), batch.get("advantages"), 0.2, 0.2)
    sums = (loss * mask).sum(1)
    expected = {
        "token": sums.sum() / mask.sum(),
        "sequence": (sums / mask.sum(1)).mean(),
        "constant": sums.sum() / (6 * 8),
    }[mode]
    stats, _ = worker._minibatch(batch, 0.0, None, Gathered(batch))
    assert stats["policy_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_metrics_of_an_update():
    worker = actor(num_epochs=2, minibatch_size=3, micro_batch_size=2)
    stats, _ = worker.update(on_policy(worker), kl_coef=0.0, seed=0)
    assert all(math.isfinite(value) for value in stats.values())
    assert set(stats) == {
        "actor/policy_loss", "actor/approx_kl", "actor/clip_fraction", "actor/ratio", "actor/grad_norm", "actor/lr",
        "policy/entropy",
        "actor/tensors_moved", "actor/first_ratio_error", "actor/log_ratio_max",
    }  # fmt: skip
    assert stats["actor/tensors_moved"] == 1.0 and worker.learner.updates == 4
    assert stats["actor/first_ratio_error"] < 1e-4 < stats["actor/log_ratio_max"]


def test_gradient_checkpointing_changes_no_update():
    results = []
    for on in (False, True):
        worker = actor(gradient_checkpointing=on)
        worker.update(on_policy(worker), kl_coef=0.0, seed=0)
        results.append(weights(worker))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- what is added to the loss


def test_the_kl_in_the_loss_is_kl_coef_times_the_estimator():
    batch, coef = random_batch(), 0.3
    for kind in ("k1", "k2", "k3", "k3_corrected"):
        worker = actor(kl_in="loss", kl_loss=kind)
        ours = gradients(worker, lambda worker=worker: worker._minibatch(batch, coef, None, Gathered(batch)))
        plain = actor()
        mask = batch.action_mask
        new, _ = plain.model.logprobs(batch.input_ids, batch.attention_mask, mask, 1.0)
        loss, _ = ppo_clip(new, batch.get("old_logprobs"), batch.get("advantages"), 0.2, 0.2)
        penalty = kl_loss(new, batch.get("ref_logprobs"), kind)
        (loss[mask].mean() + coef * penalty[mask].mean()).backward()
        torch.testing.assert_close(ours, [p.grad for p in plain.model.hf.parameters()], atol=1e-5, rtol=1e-4)


def test_no_kl_in_the_loss_when_it_is_in_the_reward():
    worker, batch = actor(kl_in="reward"), random_batch()
    assert "kl_loss" not in worker._minibatch(batch, 0.3, None, Gathered(batch))[0]
    worker = actor(kl_in="loss")
    assert worker._minibatch(batch, 0.3, None, Gathered(batch))[0]["kl_loss"] != 0


@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_ptx_adds_ptx_coef_times_the_nll_of_its_batch(micro_batch_size):
    batch, coef = random_batch(), 0.5
    rows = ragged_rows(seed=5)
    text = collate_supervised(rows, [[False] + [True] * (len(row) - 1) for row in rows], pad_id=0)
    worker = actor(ptx_coef=coef, micro_batch_size=micro_batch_size)
    results = []
    with_ptx = gradients(worker, lambda: results.append(worker._minibatch(batch, 0.0, text, Gathered(batch))))
    without = gradients(worker, lambda: worker._minibatch(batch, 0.0, None, Gathered(batch)))
    plain = actor()
    logprobs, _ = plain.model.logprobs(text.input_ids, text.attention_mask, text.loss_mask, 1.0)
    loss = aggregate(nll(logprobs), text.loss_mask, "token")
    loss.backward()
    expected = [g + coef * p.grad for g, p in zip(without, plain.model.hf.parameters(), strict=True)]
    torch.testing.assert_close(with_ptx, expected, atol=1e-5, rtol=1e-4)
    assert results[0][0]["ptx_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_ptx_takes_one_batch_for_each_minibatch():
    worker = actor(ptx_coef=0.5, num_epochs=2, minibatch_size=3, micro_batch_size=3)
    text = collate_supervised([[1, 2, 3]], [[False, True, True]], pad_id=0)
    endless = iter([text] * 5)
    stats, _ = worker.update(on_policy(worker), kl_coef=0.0, seed=0, ptx=endless)
    assert len(list(endless)) == 1
    assert 0 < stats["actor/ptx_loss"] < 3 * math.log(VOCAB_SIZE)


# ---------------------------------------------------------------- what is fatal


@pytest.mark.parametrize("shift", [0.01, -0.01, 3.0])
def test_a_first_ratio_that_is_not_1_is_fatal(shift):
    from dataclasses import replace

    worker = actor()
    batch = on_policy(worker)
    batch = replace(batch, old_logprobs=batch.get("old_logprobs") + shift * batch.action_mask)
    with pytest.raises(IntegrityError, match=r"before the first update the ratio must be 1, but \|log ratio\| reaches"):
        worker.update(batch, kl_coef=0.0, seed=0)


def test_one_wrong_old_logprob_is_enough():
    from dataclasses import replace

    worker = actor()
    batch = on_policy(worker)
    old = batch.get("old_logprobs").clone()
    row, column = batch.action_mask.nonzero()[0]
    old[row, column] += 0.01
    with pytest.raises(IntegrityError, match="the ratio must be 1"):
        worker.update(replace(batch, old_logprobs=old), kl_coef=0.0, seed=0)


def test_another_temperature_is_fatal():
    worker = actor(temperature=0.9)
    with pytest.raises(IntegrityError, match="the ratio must be 1"):
        worker.update(on_policy(actor(temperature=1.0)), kl_coef=0.0, seed=0)


def test_the_ratio_may_leave_1_after_the_first_minibatch():
    worker = actor(lr=0.05, num_epochs=3, minibatch_size=2, micro_batch_size=2)
    stats, _ = worker.update(on_policy(worker), kl_coef=0.0, seed=0)
    assert stats["actor/log_ratio_max"] > 0.1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_a_loss_that_is_not_finite_is_fatal_and_leaves_the_weights(role, bad):
    worker = actor() if role == "actor" else critic(value_clip_eps=None)
    batch = on_policy(worker) if role == "actor" else random_batch()
    spoiled = batch.get("advantages" if role == "actor" else "returns")
    row, column = batch.action_mask.nonzero()[-1]
    spoiled[row, column] = bad
    before = weights(worker)
    with pytest.raises(IntegrityError, match=f"{role}: the loss is (nan|inf|-inf)"):
        worker.update(batch, 0.0, 0) if role == "actor" else worker.update(batch, 0)
    for old, new in zip(before, weights(worker), strict=True):
        assert old.equal(new)


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_an_optimizer_that_does_not_step_is_fatal(role, monkeypatch):
    worker = actor() if role == "actor" else critic()
    monkeypatch.setattr(worker.learner._adam, "step", lambda: None)
    with pytest.raises(IntegrityError, match=f"{role}: update 1 left .* as it was"):
        worker.update(on_policy(worker), 0.0, 0) if role == "actor" else worker.update(random_batch(), 0)


def test_what_stands_outside_the_action_mask_does_not_count():
    """Numbers there may be anything, nan included."""
    from dataclasses import replace

    results = []
    for junk in (0.0, math.nan):
        worker = actor()
        batch = on_policy(worker)
        fields = ("old_logprobs", "advantages", "ref_logprobs")
        spoiled = {name: torch.where(batch.action_mask, batch.get(name), junk) for name in fields}
        worker.update(replace(batch, **spoiled), kl_coef=0.1, seed=0)
        results.append(weights(worker))
    for a, b in zip(*results, strict=True):
        assert a.equal(b)
