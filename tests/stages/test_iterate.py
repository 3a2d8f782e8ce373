"""One iteration, with every algorithm; and what each step of it does to the numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_runs import ppo_config, ragged_rows, sample, save_models, tokenizer

from pellucid.config import AlgoConfig
from pellucid.config.schema import KL_IN_LOSS_ONLY
from pellucid.core import AdaptiveKL, FixedKL, gae, masked_whiten
from pellucid.errors import IntegrityError, RewardError
from pellucid.execution.local import build_workers
from pellucid.rewards import FunctionReward
from pellucid.rollout import EmbeddedEngine
from pellucid.stages.advantages import ADVANTAGES
from pellucid.stages.checks import check_parity, check_start
from pellucid.stages.ppo import iterate, sampling_params, shape_rewards
from pellucid.stages.scoring import raw_scores, score_samples
from pellucid.types import Prompt, Score, collate

PROMPTS = [Prompt(i, row, "") for i, row in enumerate(ragged_rows(lengths=(3, 1, 6, 4)))]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def spread(prompts, completions, completion_ids):
    """A reward that differs from sample to sample."""
    return [ids[0] / 290 for ids in completion_ids]


class Setup:
    """One config, its workers, and iterations on them."""

    def __init__(self, models, tmp_path, reward=spread, **overrides):
        if reward is not None:
            overrides["models__reward"] = None
        self.config = ppo_config(models, tmp_path / "run", **overrides)
        source = FunctionReward(reward, tokenizer()) if reward else None
        self.workers = build_workers(self.config, source, pad_id=0, total_updates=100)
        self.kl = FixedKL(self.config.algo.kl_coef)

    def iterate(self, step=1, stop=(0, 7)):
        params = sampling_params(self.config, step, stop)
        return iterate(step, PROMPTS, params, self.workers, self.kl, self.config)


@pytest.fixture
def setup(models, tmp_path):
    return lambda **overrides: Setup(models, tmp_path, **overrides)


# ---------------------------------------------------------------- every algorithm runs


ALGORITHMS = [(a, "ppo") for a in ADVANTAGES] + [("gae", "gspo"), ("gae", "cispo"), ("grpo", "gspo"), ("grpo", "cispo")]


@pytest.mark.parametrize(("advantage", "policy_loss"), ALGORITHMS)
def test_two_iterations_of_every_algorithm(setup, advantage, policy_loss):
    kl_in = "loss" if advantage in KL_IN_LOSS_ONLY else "reward"
    run = setup(algo__advantage=advantage, algo__policy_loss=policy_loss, algo__kl_in=kl_in)
    before = [p.detach().clone() for p in run.workers.actor.model.hf.parameters()]
    frozen = [p.detach().clone() for p in run.workers.reference.model.hf.parameters()]
    for step in (1, 2):
        batch, samples, stats = run.iterate(step)
        assert all(math.isfinite(value) for value in stats.values()), stats
        assert ("critic/value_loss" in stats) == (batch.old_values is not None) == (advantage == "gae")
        assert len(samples) == len(batch) == 8
        assert set(batch.policy_version.tolist()) == {step - 1}
    after = run.workers.actor.model.hf.parameters()
    assert any(not a.equal(b) for a, b in zip(before, after, strict=True))
    assert all(a.equal(b) for a, b in zip(frozen, run.workers.reference.model.hf.parameters(), strict=True))
    assert run.workers.engine.version == 2


@pytest.mark.parametrize("kl_loss", ["k1", "k2", "k3", "k3_corrected"])
def test_the_kl_in_the_loss(setup, kl_loss):
    run = setup(algo__kl_in="loss", algo__kl_loss=kl_loss, algo__kl_coef=0.5)
    run.iterate(1)
    batch, _, stats = run.iterate(2)
    assert math.isfinite(stats["actor/kl_loss"])
    assert batch.get("rewards").sum(1).allclose(batch.get("scores"), atol=1e-6), "no KL in the reward as well"


def test_the_kl_in_the_reward(setup):
    run = setup(algo__kl_coef=0.5)
    run.iterate(1)
    batch, _, stats = run.iterate(2)
    assert "actor/kl_loss" not in stats and batch.get("kl").abs().max() > 1e-3
    expected = batch.get("scores") - 0.5 * batch.get("kl").sum(1)
    torch.testing.assert_close(batch.get("rewards").sum(1), expected, atol=1e-5, rtol=1e-5)


def test_groups_of_equal_scores_are_counted(setup):
    def three_equal_groups(prompts, completions, completion_ids):
        return [float(i) if i < 2 else 1.0 for i in range(len(prompts))]

    _, _, stats = setup(reward=three_equal_groups, algo__advantage="grpo", algo__kl_in="loss").iterate()
    assert stats["groups/degenerate"] == 3
    batch, _, stats = setup(
        reward=lambda prompts, completions: [1.0] * 8, algo__advantage="rloo", algo__kl_coef=0
    ).iterate()
    assert stats["groups/degenerate"] == 4
    assert batch.get("advantages").abs().max() == 0


def test_the_same_seed_gives_the_same_iteration(setup):
    results = []
    for seed in (0, 0, 1):
        run = setup(run__seed=seed)
        batch, _, stats = run.iterate()
        weights = torch.cat([p.detach().flatten() for p in run.workers.actor.model.hf.parameters()])
        results.append(({k: v for k, v in stats.items() if not k.startswith("time/")}, weights, batch.input_ids))
    assert results[0][0] == results[1][0] and results[0][1].equal(results[1][1])
    assert not results[0][1].equal(results[2][1])


def test_each_step_samples_anew(setup):
    config = setup().config
    assert sampling_params(config, 1, ()).request_seed(0, 0) != sampling_params(config, 2, ()).request_seed(0, 0)
    params = sampling_params(config, 3, (9,))
    assert (params.temperature, params.top_p, params.top_k) == (config.rollout.temperature, 1.0, 0)
    assert params.stop_token_ids == (9,) and params.step == 3


# ---------------------------------------------------------------- the parity gate


def test_an_engine_with_other_weights_is_fatal(setup):
    from dataclasses import replace as swapped

    from tiny_models import tiny_llama_gqa

    run = setup()
    vocabulary = run.workers.actor.model.head.weight.shape[0]
    run.workers = swapped(run.workers, engine=EmbeddedEngine(tiny_llama_gqa(3, vocab_size=vocabulary), num_slots=4))
    before = [p.detach().clone() for p in run.workers.actor.model.hf.parameters()]
    with pytest.raises(IntegrityError, match="step 1: the engine's log-probs are not the trainer's: at sample"):
        run.iterate()
    assert all(a.equal(b) for a, b in zip(before, run.workers.actor.model.hf.parameters(), strict=True))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("trainer", "step 2: the engine's log-probs are not the trainer's"),
        (
            "engine",
            "before the first update the ratio must be 1.*the engine, whose log-probs these are, sampled with other",
        ),
    ],
)
def test_an_engine_that_missed_an_update_is_fatal(setup, source, words):
    import copy

    run = setup(actor_optimizer__lr=3e-3, algo__old_logprobs=source)
    stale = EmbeddedEngine(copy.deepcopy(run.workers.actor.model.hf), num_slots=4)
    run.workers = replace(run.workers, engine=stale)
    run.iterate(1)
    with pytest.raises(IntegrityError, match=words):
        run.iterate(2)


def test_old_logprobs_are_the_engines_after_the_first_iteration(setup):
    run = setup()
    first, _, stats = run.iterate(1)
    assert "rollout/parity_max" in stats and not first.old_logprobs.equal(first.rollout_logprobs)
    second, _, stats = run.iterate(2)
    assert second.old_logprobs.equal(second.rollout_logprobs)
    assert stats["policy/entropy"] == pytest.approx(second.entropy[second.action_mask].mean().item(), rel=1e-5)
    assert stats["policy/entropy"] > 0 and "rollout/parity_max" not in stats
    assert 0 < stats["actor/first_ratio_error"] < 1e-4


@pytest.mark.parametrize("change", [{"algo__old_logprobs": "trainer"}, {"stale": True}])
def test_old_logprobs_are_the_trainers_where_the_engines_will_not_do(setup, change):
    stale = change.pop("stale", False)
    run = setup(**change)
    run.iterate(1)
    if stale:  # another version sampled: its log-probs are not of the policy before this update
        run.workers.engine.version = 0
    batch, _, stats = run.iterate(2)
    assert "rollout/parity_max" in stats and not batch.old_logprobs.equal(batch.rollout_logprobs)


def test_an_engine_at_another_temperature_is_fatal(setup):
    run = setup()
    params = replace(sampling_params(run.config, 1, ()), temperature=0.95)
    with pytest.raises(IntegrityError, match="the weights or the temperature of the two differ"):
        iterate(1, PROMPTS, params, run.workers, run.kl, run.config)


def test_parity_sees_one_token_and_names_it():
    batch = collate([sample([1, 2], [3, 4]), sample([5], [6, 7, 8])], pad_id=0)
    old = batch.rollout_logprobs.clone()
    check_parity(batch, old, "float32", 1)
    old[0, 3] -= 0.01
    with pytest.raises(IntegrityError, match=r"sample 0, token 3 -1\.00000 against -1\.01000"):
        check_parity(batch, old, "float32", 1)
    check_parity(batch, old, "bfloat16", 1)
    old[0, 3] = math.nan
    with pytest.raises(IntegrityError, match="sample 0, token 3"):
        check_parity(batch, old, "bfloat16", 1)


def test_parity_sees_a_small_gap_everywhere():
    batch = collate([sample([1, 2], [3, 4]), sample([5], [6, 7, 8])], pad_id=0)
    shifted = batch.rollout_logprobs + 5e-4 * batch.action_mask
    with pytest.raises(IntegrityError, match=r"mean gap 0\.0005"):
        check_parity(batch, shifted, "float32", 1)


def test_parity_looks_at_actions_only():
    batch = collate([sample([1, 2], [3, 4, 5], actions=[True, False, True])], pad_id=0)
    check_parity(batch, torch.where(batch.action_mask, batch.rollout_logprobs, 9.0), "float32", 1)


def test_check_start():
    check_start(torch.full((2, 3), 1e-5), "float32")
    for bad in (0.01, -0.01, math.nan):
        with pytest.raises(IntegrityError, match="the actor starts as its own reference"):
            check_start(torch.tensor([[0.0, bad]]), "float32")


# ---------------------------------------------------------------- scores, rewards, advantages


class Scripted:
    name = "scripted"

    def __init__(self, *values):
        self.values = values

    def score(self, samples):
        return [Score(value, self.name) for value in self.values]


SAMPLES = [sample([1], [2, 3]), sample([1], [2], stop_reason="length", group_id=1), sample([4], [5], group_id=2)]


def test_penalty_of_a_response_without_eos_then_the_clip(models, tmp_path):
    config = ppo_config(models, tmp_path / "run", rollout__missing_eos_penalty=2.0, reward__clip=3.0)
    assert score_samples(SAMPLES, Scripted(1.0, 1.5, 9.0), config).tolist() == [1.0, -0.5, 3.0]
    assert score_samples(SAMPLES, Scripted(-9.0, -2.5, 0.0), config).tolist() == [-3.0, -3.0, 0.0]
    assert raw_scores(SAMPLES, Scripted(1.0, 1.5, 9.0)).tolist() == [1.0, 1.5, 9.0]


def test_not_applicable_is_not_0():
    with pytest.raises(RewardError, match=r"scripted has no score for prompt 1, sample 0 \(it returned None"):
        raw_scores(SAMPLES, Scripted(1.0, None, 2.0))


def test_the_score_goes_on_the_last_action():
    batch = collate([sample([1, 2], [3, 4, 5], actions=[True, True, False]), sample([1], [2])], pad_id=0)
    zero = torch.zeros(batch.input_ids.shape)
    old = torch.where(batch.action_mask, -1.0, 0.0)
    ready = batch.having(scores=torch.tensor([2.0, -1.0]), old_logprobs=old, ref_logprobs=zero + 7)
    shaped = shape_rewards(ready, 0.1)
    assert shaped.get("kl").tolist() == [[0, 0, -8, -8, 0], [0, -8, 0, 0, 0]]
    torch.testing.assert_close(shaped.get("rewards"), torch.tensor([[0, 0, 0.8, 2.8, 0], [0, -0.2, 0, 0, 0]]))


def ready_batch():
    batch = collate([sample([1, 2], [3, 4, 5]), sample([1], [2, 3])], pad_id=0)
    random = torch.Generator().manual_seed(0)
    values = torch.randn(batch.input_ids.shape, generator=random) * batch.action_mask
    rewards = torch.randn(batch.input_ids.shape, generator=random) * batch.action_mask
    return batch.having(old_values=values, rewards=rewards)


def test_gae_is_whitened_over_the_whole_batch_and_returns_are_not():
    batch, algo = ready_batch(), AlgoConfig(gamma=0.9, gae_lambda=0.8)
    made = ADVANTAGES["gae"](batch, algo)
    raw, returns = gae(
        batch.get("rewards"), batch.get("old_values"), batch.action_mask, batch.ended, batch.bootstrap_values, 0.9, 0.8
    )
    assert made["advantages"].equal(masked_whiten(raw, batch.action_mask)) and made["returns"].equal(returns)
    assert ADVANTAGES["gae"](batch, algo.model_copy(update={"whiten_advantages": False}))["advantages"].equal(raw)


@pytest.mark.parametrize("name", ["reinforce_pp_baseline", "rloo", "grpo", "dr_grpo"])
def test_a_group_baseline_gives_every_action_of_a_sample_the_same(name):
    batch = ready_batch()
    made = ADVANTAGES[name](batch, AlgoConfig())["advantages"]
    totals = batch.get("rewards").sum(1)
    for row in range(2):
        inside = made[row][batch.action_mask[row]]
        assert (inside == inside[0]).all() and (made[row][~batch.action_mask[row]] == 0).all()
    assert (made.sum(1)[0] > 0) == (totals[0] > totals[1])


def test_the_adaptive_coefficient_moves_after_the_iteration(setup):
    run = setup(algo__kl_coef=0.1, algo__kl_target=1.0, algo__kl_horizon=100)
    run.kl = AdaptiveKL(0.1, 1.0, 100)
    _, _, stats = run.iterate()
    assert stats["kl/coef"] == 0.1
    assert run.kl.coef == pytest.approx(0.1 * (1 - 0.2 * 8 / 100)), "the KL is 0: far below its target"


@pytest.mark.parametrize("packing", [False, True])
def test_an_iteration_in_bfloat16(setup, packing):
    run = setup(run__precision="bfloat16", algo__packing=packing)
    for step in (1, 2):
        _, _, stats = run.iterate(step)
        assert all(math.isfinite(value) for value in stats.values())
    assert {p.dtype for p in run.workers.actor.model.hf.parameters()} == {torch.float32}
