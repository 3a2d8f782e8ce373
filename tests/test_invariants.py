"""The invariants of the design, each a test by name. ("Each formula equals a brute-force reference" is tests/core.)"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama, tiny_llama_gqa, tiny_qwen2, tiny_qwen3
from tiny_runs import padded, ppo_config, ragged_rows, random_batch, save_models
from torch import Tensor

from pellucid.config import AlgoConfig, OptimizerConfig
from pellucid.execution.learner import Gathered
from pellucid.execution.local import Workers, build_workers
from pellucid.execution.workers import ActorWorker, CriticWorker
from pellucid.models import CausalLM, ScalarModel
from pellucid.rollout import EmbeddedEngine
from pellucid.stages.ppo import FixedKL, iterate, sampling_params
from pellucid.types import Batch, Prompt, SamplingParams, collate

ARCHITECTURES = {"llama": tiny_llama_gqa, "qwen2": tiny_qwen2, "gpt2": tiny_gpt2}
every_architecture = pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES)


def scalar_model(make, packing: bool = False) -> ScalarModel:
    from transformers import AutoModelForSequenceClassification

    config = make(num_labels=1, pad_token_id=0).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return ScalarModel(AutoModelForSequenceClassification.from_config(config), packing=packing)


# ---------------------------------------------------------------- the first iteration


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def first_iteration(models, tmp_path, **overrides) -> tuple[Batch, dict[str, float], Workers]:
    config = ppo_config(models, tmp_path / "run", **overrides)
    workers = build_workers(config, None, pad_id=0, total_updates=10)
    prompts = [Prompt(i, row, "") for i, row in enumerate(ragged_rows(lengths=(3, 1, 6, 4)))]
    params = sampling_params(config, 1, (0, 7))
    batch, _, stats = iterate(1, prompts, params, workers, FixedKL(config.algo.kl_coef), config)
    return batch, stats, workers


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_minibatch_ratio_is_1_and_approx_kl_0(models, tmp_path, packing, temperature):
    """One epoch of one minibatch: every ratio is taken before the first update."""
    once = {"algo__num_epochs": 1, "algo__minibatch_size": 8}
    _, stats, _ = first_iteration(models, tmp_path, **once, algo__packing=packing, rollout__temperature=temperature)
    assert stats["actor/ratio"] == pytest.approx(1, abs=1e-5)
    assert stats["actor/approx_kl"] == pytest.approx(0, abs=1e-6)
    assert stats["actor/first_ratio_error"] < 1e-4 and stats["actor/clip_fraction"] == 0


def test_kl_to_reference_is_0_at_step_0(models, tmp_path):
    batch, stats, _ = first_iteration(models, tmp_path)
    assert batch.get("kl").abs().max() < 1e-5
    assert stats["kl/sequence"] == pytest.approx(0, abs=1e-5) and stats["kl/token"] == pytest.approx(0, abs=1e-5)
    # So the rewards are the scores, on the last action.
    assert batch.get("rewards").sum(1).allclose(batch.get("scores"), atol=1e-5)
    assert ((batch.get("rewards").abs() > 1e-4) <= batch.ended).all()


def test_every_metric_of_the_first_iteration_is_finite(models, tmp_path):
    batch, stats, _ = first_iteration(models, tmp_path)
    assert {name for name, value in stats.items() if not math.isfinite(value)} == set()
    assert {
        "critic/explained_variance", "critic/value_loss", "score/mean", "policy/entropy", "rollout/parity_max",
        "groups/degenerate", "kl/coef", "time/generate",
    } <= set(stats)  # fmt: skip
    assert stats["critic/explained_variance"] <= 1
    assert 0 < stats["policy/entropy"] <= math.log(290)
    assert stats["rollout/tokens"] == batch.action_mask.sum()


# ---------------------------------------------------------------- padding and packing


@every_architecture
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("extra", [0, 1, 7])
def test_padding_side_and_amount_change_no_logprob(make, side, extra):
    """Nor a value, nor a score. The pad is a token that also occurs inside."""
    rows = [*ragged_rows(), [5, 5, 8, 5]]
    policy, reward = CausalLM(make()), scalar_model(make)
    ids, mask = padded(rows, side, extra, pad_id=5)
    with torch.no_grad():
        logprobs, entropy = policy.logprobs(ids, mask, mask, 0.7, entropy=True)
        values, scores = reward.values(ids, mask, mask), reward.scores(ids, mask)
        for i, row in enumerate(rows):
            alone, ones = torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool)
            expected, spread = policy.logprobs(alone, ones, ones, 0.7, entropy=True)
            close = {"atol": 2e-5, "rtol": 1e-4}
            torch.testing.assert_close(logprobs[i, mask[i]], expected[0], **close)
            torch.testing.assert_close(entropy[i, mask[i]], spread[0], **close)
            torch.testing.assert_close(values[i, mask[i]], reward.values(alone, ones, ones)[0], **close)
            torch.testing.assert_close(scores[i], reward.scores(alone, ones)[0], **close)
    assert (logprobs[~mask] == 0).all() and (values[~mask] == 0).all()


@every_architecture
@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_equals_padded(make, side):
    """Log-probs, entropies, values, scores, and the gradient of each weight through them."""
    ids, mask = padded([*ragged_rows(), [9], [4, 5]], side)
    results: list[list[Tensor]] = []
    for packing in (False, True):
        policy, reward = CausalLM(make(), packing=packing), scalar_model(make, packing)
        logprobs, entropy = policy.logprobs(ids, mask, mask, 0.7, entropy=True)
        values, scores = reward.values(ids, mask, mask), reward.scores(ids, mask)
        (logprobs.sin().sum() + entropy.sum()).backward()
        (values.sin().sum() + scores.sum()).backward()
        grads = [p.grad for p in [*policy.hf.parameters(), *reward.hf.parameters()]]
        results.append([x.detach() for x in (logprobs, entropy, values, scores)] + grads)
    for padded_one, packed_one in zip(*results, strict=True):
        scale = padded_one.abs().max().item()
        torch.testing.assert_close(packed_one, padded_one, atol=3e-5 * max(scale, 1), rtol=1e-4)


# ---------------------------------------------------------------- splitting


def actor(micro_batch_size: int, **algo) -> ActorWorker:
    config = AlgoConfig(minibatch_size=6, micro_batch_size=micro_batch_size, **algo)
    optimizer = OptimizerConfig()
    return ActorWorker(CausalLM(tiny_llama(), packing=config.packing), 0.9, config, optimizer, 10, max_new_tokens=9)


def critic(micro_batch_size: int, **algo) -> CriticWorker:
    config = AlgoConfig(minibatch_size=6, micro_batch_size=micro_batch_size, **algo)
    return CriticWorker(scalar_model(tiny_llama, config.packing), config, OptimizerConfig(), 10)


def gradients(worker: ActorWorker | CriticWorker, batch: Batch) -> list[Tensor]:
    """What one optimizer step would see. Fresh tensors, never None."""
    worker.learner.step = dict
    if isinstance(worker, ActorWorker):
        worker._minibatch(batch, 0.2, None, Gathered(batch))
    else:
        worker._minibatch(batch, Gathered(batch))
    return [p.grad.clone() for p in worker.model.hf.parameters()]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert max(g.abs().max() for g in theirs) > 1e-4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-3)


def training_batch(worker: ActorWorker) -> Batch:
    """Ratios around 1, some of them clipped."""
    batch = random_batch(6)
    now = worker.logprobs(batch)[0]
    drift = torch.randn(now.shape, generator=torch.Generator().manual_seed(3)) * 0.2
    return replace(batch, old_logprobs=now + drift * batch.action_mask, ref_logprobs=now - drift * batch.action_mask)


ACTOR_LOSSES = [
    {"aggregate": mode, "policy_loss": loss}
    for mode in ("token", "sequence", "constant")
    for loss in ("ppo", "gspo", "cispo")
] + [{"kl_in": "loss", "kl_loss": "k3_corrected", "dual_clip": 1.5, "packing": True}]


@pytest.mark.parametrize("algo", ACTOR_LOSSES, ids=lambda algo: "-".join(map(str, algo.values())))
def test_splitting_into_micro_batches_changes_no_gradient(algo):
    whole = actor(6, **algo)
    batch = training_batch(whole)
    expected = gradients(whole, batch)
    for size in (1, 4):
        assert_same(gradients(actor(size, **algo), batch), expected)


@pytest.mark.parametrize("algo", ACTOR_LOSSES, ids=lambda algo: "-".join(map(str, algo.values())))
def test_splitting_into_ranks_changes_no_gradient(algo):
    """Two ranks of unequal numbers of tokens: each divides by the global denominator, and gradients are summed."""
    whole = actor(6, **algo)
    batch = training_batch(whole)
    expected = gradients(whole, batch)
    ranks = []
    for rows in (torch.tensor([0, 3]), torch.tensor([1, 2, 4, 5])):
        worker = actor(2, **algo)
        worker._denominator = lambda mask: whole._denominator(batch.action_mask)
        ranks.append(gradients(worker, batch.select(rows)))
    assert_same([a + b for a, b in zip(*ranks, strict=True)], expected)


@pytest.mark.parametrize("algo", [{}, {"value_clip_eps": None}, {"packing": True}], ids=str)
def test_splitting_into_micro_batches_changes_no_gradient_of_the_critic(algo):
    batch = random_batch(6)
    expected = gradients(critic(6, **algo), batch)
    for size in (1, 4):
        assert_same(gradients(critic(size, **algo), batch), expected)


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_splitting_into_micro_batches_changes_no_metric(micro_batch_size):
    whole = actor(6)
    batch = training_batch(whole)
    whole.learner.step = dict
    split = actor(micro_batch_size)
    split.learner.step = dict
    expected, worst = whole._minibatch(batch, 0.2, None, Gathered(batch))
    ours, our_worst = split._minibatch(batch, 0.2, None, Gathered(batch))
    assert ours == pytest.approx(expected, abs=1e-5) and our_worst == pytest.approx(worst, abs=1e-5)


# ---------------------------------------------------------------- sampler and trainer


@pytest.mark.parametrize("make", [*ARCHITECTURES.values(), tiny_qwen3], ids=[*ARCHITECTURES, "qwen3"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("packing", [False, True])
def test_sampler_logprobs_equal_trainers(make, temperature, packing):
    model = CausalLM(make(), packing=packing)
    prompts = [Prompt(i, row, "") for i, row in enumerate(ragged_rows(lengths=(3, 8, 1)))]
    params = SamplingParams(12, temperature, stop_token_ids=tuple(range(40, 48)), samples_per_prompt=12)
    samples = EmbeddedEngine(model.hf, num_slots=9).generate(prompts, params)
    assert {s.stop_reason for s in samples} == {"stop", "length"}
    batch = collate(samples, pad_id=3)
    with torch.no_grad():
        logprobs, _ = model.logprobs(batch.input_ids, batch.attention_mask, batch.action_mask, temperature)
    torch.testing.assert_close(logprobs, batch.rollout_logprobs, atol=1e-4, rtol=0)
    assert batch.action_mask.equal(batch.response_mask)
