"""The recorded numbers follow from one another: each formula of the design again, in numpy or by autograd, from the rows."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

Row = dict[str, Any]
PASSES = ["score", "old_logprobs", "alternatives", "ref_logprobs", "values"]
PHASES = ["generate", *PASSES, "advantages", "update_critic", "update_actor"]


def rows(run, step: int = 1) -> list[Row]:
    """Lists as float64 (or bool, or int) arrays, floats as floats."""
    found = run.frame(step).to_dict("records")
    return [{name: wide(value) for name, value in row.items()} for row in found]


def wide(value: Any) -> Any:
    return value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype == np.float32 else value


def acted(row: Row, name: str) -> np.ndarray:
    return row[name][row["action_mask"]]


# ---------------------------------------------------------------- summaries, whitening, minibatches


@pytest.fixture(scope="module", params=["gae", "rloo"])
def run(request, record_run):
    overrides = {"trace__alternatives": 3, "rollout__temperature": 0.7, "algo__num_epochs": 1}
    return record_run(algo__advantage=request.param, **overrides)


def test_summary_columns_are_sums_over_the_actions(run):
    for row in rows(run):
        sums = dict.fromkeys(("kl", "rewards", "advantages", "entropy", "clipped"), 0.0)
        count = 0
        for t, action in enumerate(row["action_mask"]):
            if action:
                count += 1
                for name in sums:
                    sums[name] += float(row[name][t])
        assert row["length"] == count > 0
        expected = {
            "kl_sequence": sums["kl"], "reward_sum": sums["rewards"], "advantage_mean": sums["advantages"] / count,
            "entropy_mean": sums["entropy"] / count, "clipped_share": sums["clipped"] / count,
        }  # fmt: skip
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_each_token_follows_from_the_others(run):
    for step in (1, 2):
        for row in rows(run, step):
            mask, last = row["action_mask"], np.flatnonzero(row["action_mask"])[-1]
            assert row["attention_mask"].all() and not mask[0]
            assert row["position_ids"].tolist() == list(range(len(mask)))
            assert (row["response_mask"] >= mask).all() and np.flatnonzero(row["ended"]).tolist() == [last]
            score = np.where(np.arange(len(mask)) == last, row["scores"], 0)
            kl = row["old_logprobs"] - row["ref_logprobs"]
            np.testing.assert_allclose(row["kl"], np.where(mask, kl, 0), atol=1e-6)
            np.testing.assert_allclose(row["rewards"], score - 0.05 * row["kl"], atol=1e-6)
            np.testing.assert_allclose(row["log_ratio"], row["logprobs"] - row["old_logprobs"], atol=1e-6)
            np.testing.assert_allclose(row["ratio"], np.where(mask, np.exp(row["log_ratio"]), 0), rtol=1e-6)
            for name in "old_logprobs ref_logprobs logprobs entropy clipped logprob_grads advantages".split():
                assert not row[name][~mask].any(), name


def test_minibatches_and_their_denominators(run):
    """Eight samples in minibatches of four; "token" divides by the minibatch's action tokens."""
    for step in (1, 2):
        found = rows(run, step)
        for which in (0, 1):
            members = [row for row in found if row["minibatch"] == which]
            tokens = sum(int(row["action_mask"].sum()) for row in members)
            assert len(members) == 4 and {row["actor_denominator"] for row in members} == {tokens}
            assert {row.get("critic_denominator", tokens) for row in members} == {tokens}


def test_numbers_are_from_before_the_optimizer_step_that_they_led_to(run):
    """With one epoch the first minibatch still has the policy that sampled it, and the second one no more."""
    for row in rows(run):
        off = np.abs(acted(row, "log_ratio")).max()
        assert off < 1e-4 if row["minibatch"] == 0 else off > 1e-3
        if "values" in row:
            off = np.abs(acted(row, "values") - acted(row, "old_values")).max()
            assert off < 1e-4 if row["minibatch"] == 0 else off > 1e-3


def test_of_several_passes_the_last_is_recorded(record_run):
    """Each sample has then been through an optimizer step, those of the pass's first minibatch too."""
    for row in rows(record_run(total_steps=1, algo__num_epochs=3)):
        assert np.abs(acted(row, "log_ratio")).max() > 1e-3
        assert np.abs(acted(row, "values") - acted(row, "old_values")).max() > 1e-3


def test_one_pass_over_everything_has_ratio_1_and_clips_nothing(record_run):
    run = record_run(algo__num_epochs=1, algo__minibatch_size=8)
    for step in (1, 2):
        for row in rows(run, step):
            np.testing.assert_allclose(acted(row, "ratio"), 1, atol=1e-4)
            np.testing.assert_allclose(acted(row, "values"), acted(row, "old_values"), atol=1e-4)
            assert not row["clipped"].any() and not row["value_clipped"].any()
            assert acted(row, "logprob_grads").any() and (row["clipped_share"], row["minibatch"]) == (0, 0)


def whiten(raw: np.ndarray, manifest: Row) -> np.ndarray:
    assert manifest["whitening"] == pytest.approx({"mean": raw.mean(), "variance": raw.var()}, rel=1e-5, abs=1e-7)
    return (raw - raw.mean()) / np.sqrt(raw.var() + 1e-8)


@pytest.mark.parametrize("step", [1, 2])
def test_whitening_reproduces_the_advantages_of_gae(record_run, step):
    run = record_run(algo__gamma=0.9, rollout__missing_eos_penalty=0.5)
    found = rows(run, step)
    raw = np.concatenate([acted(row, "returns") - acted(row, "old_values") for row in found])
    whitened = whiten(raw, run.manifest(step))
    np.testing.assert_allclose(np.concatenate([acted(row, "advantages") for row in found]), whitened, atol=1e-5)
    for row in found:  # the recursion, backwards over a sample's actions
        rewards, values, advantage, following = acted(row, "rewards"), acted(row, "old_values"), 0.0, 0.0
        for t in reversed(range(len(rewards))):
            advantage = rewards[t] + 0.9 * following - values[t] + 0.9 * 0.95 * advantage
            following = values[t]
            assert acted(row, "returns")[t] == pytest.approx(advantage + values[t], abs=1e-5)


def test_whitening_of_discounted_returns(record_run):
    run = record_run(total_steps=1, algo__advantage="reinforce_pp", algo__gamma=0.8)
    raw = []
    for row in rows(run):
        rewards = acted(row, "rewards")
        raw += [sum(0.8 ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]
    whitened = whiten(np.array(raw), run.manifest(1))
    np.testing.assert_allclose(np.concatenate([acted(row, "advantages") for row in rows(run)]), whitened, atol=1e-5)


def test_whitening_over_samples(record_run):
    run = record_run(total_steps=1, algo__advantage="reinforce_pp_baseline", algo__kl_in="loss")
    found = rows(run)
    groups = {row["group_ids"] for row in found}
    means = {g: np.mean([row["rewards"].sum() for row in found if row["group_ids"] == g]) for g in groups}
    whitened = whiten(np.array([row["rewards"].sum() - means[row["group_ids"]] for row in found]), run.manifest(1))
    for row, advantage in zip(found, whitened, strict=True):
        np.testing.assert_allclose(acted(row, "advantages"), advantage, atol=1e-5)


def test_where_nothing_is_whitened(record_run):
    plain = record_run(total_steps=1, algo__whiten_advantages=False)
    assert plain.manifest(1)["whitening"] is None
    for row in rows(plain):
        np.testing.assert_allclose(row["advantages"], row["returns"] - row["old_values"], atol=1e-6)
    grouped = record_run(total_steps=1, algo__advantage="dr_grpo", algo__kl_in="loss")
    assert grouped.manifest(1)["whitening"] is None
    for one, two in zip(rows(grouped)[::2], rows(grouped)[1::2], strict=True):
        np.testing.assert_allclose(acted(one, "advantages"), (one["scores"] - two["scores"]) / 2, atol=1e-6)


# ---------------------------------------------------------------- gradients of the last epoch


def policy_slope(row: Row, loss: str, dual_clip: float | None) -> tuple[np.ndarray, np.ndarray]:
    """(d loss / d logprobs, clipped) of each action; clip range 0.2 on both sides."""
    log_ratio, advantages = acted(row, "logprobs") - acted(row, "old_logprobs"), acted(row, "advantages")
    if loss == "gspo":
        log_ratio = np.full_like(log_ratio, log_ratio.mean())
    ratio = np.exp(log_ratio)
    limited = np.clip(ratio, 0.8, 1.2)
    if loss == "cispo":
        return -limited * advantages, limited != ratio
    clipped = -limited * advantages > -ratio * advantages
    if dual_clip:
        clipped |= (advantages < 0) & (ratio > dual_clip)
    return np.where(clipped, 0, -ratio * advantages), clipped


def kl_slope(row: Row, kind: str) -> np.ndarray:
    off = acted(row, "logprobs") - acted(row, "ref_logprobs")
    return {"k1": np.ones_like(off), "k2": off, "k3": 1 - np.exp(-off), "k3_corrected": off}[kind]


MODES = ("token", "sequence", "constant")
LOSSES = [
    *({"policy_loss": loss, "aggregate": mode} for loss in ("ppo", "gspo", "cispo") for mode in MODES),
    *({"dual_clip": 1.1, "aggregate": mode} for mode in ("token", "sequence")),
    *({"kl_in": "loss", "kl_loss": kind, "kl_coef": 0.5} for kind in ("k1", "k2", "k3", "k3_corrected")),
    {"policy_loss": "gspo", "aggregate": "sequence", "kl_in": "loss", "kl_loss": "k2", "kl_coef": 0.5, "num_epochs": 3},
]  # fmt: skip


@pytest.mark.parametrize("algo", LOSSES, ids=lambda algo: "-".join(map(str, algo.values())))
def test_gradients_of_the_actor_are_the_formulas(record_run, algo):
    run = record_run(total_steps=1, actor_optimizer__lr=4e-3, **{f"algo__{key}": value for key, value in algo.items()})
    found, mode, all_clipped = rows(run), algo.get("aggregate", "token"), []
    for row in found:
        members = [other for other in found if other["minibatch"] == row["minibatch"]]
        tokens, length = sum(int(other["action_mask"].sum()) for other in members), row["action_mask"].sum()
        divided = {"token": (tokens, 1), "sequence": (len(members), length), "constant": (len(members) * 6, 1)}
        denominator, per_sequence = divided[mode]  # six is max_new_tokens
        assert row["actor_denominator"] == denominator
        slope, clipped = policy_slope(row, algo.get("policy_loss", "ppo"), algo.get("dual_clip"))
        if algo.get("kl_in") == "loss":
            slope = slope + 0.5 * kl_slope(row, algo["kl_loss"])
        assert acted(row, "clipped").tolist() == clipped.tolist()
        slope = slope / denominator / per_sequence
        np.testing.assert_allclose(acted(row, "logprob_grads"), slope, rtol=1e-4, atol=1e-7)
        all_clipped += clipped.tolist()
    assert 0 < sum(all_clipped) < len(all_clipped)


def test_dual_clip_is_met(record_run):
    """In the runs above, and not for want of a case."""
    run = record_run(total_steps=1, actor_optimizer__lr=4e-3, algo__dual_clip=1.1)
    cases = [acted(row, "clipped")[(acted(row, "advantages") < 0) & (acted(row, "ratio") > 1.1)] for row in rows(run)]
    cases = np.concatenate(cases)
    assert len(cases) and cases.all()


@pytest.mark.parametrize("value_clip_eps", [0.2, 0.01, "none"])
def test_gradients_of_the_critic_are_autograds(record_run, value_clip_eps):
    run = record_run(total_steps=1, critic_optimizer__lr=3e-3, algo__value_clip_eps=value_clip_eps)
    clipped = []
    for row in rows(run):
        now, old, returns = (torch.tensor(acted(row, name)) for name in ("values", "old_values", "returns"))
        now.requires_grad_()
        loss = 0.5 * (now - returns) ** 2
        if value_clip_eps != "none":
            limited = torch.minimum(torch.maximum(now, old - value_clip_eps), old + value_clip_eps)
            loss = torch.maximum(loss, 0.5 * (limited - returns) ** 2)
        (loss.sum() / row["critic_denominator"]).backward()
        np.testing.assert_allclose(acted(row, "value_grads"), now.grad.numpy(), rtol=1e-4, atol=1e-7)
        clipped += acted(row, "value_clipped").tolist()
        assert (acted(row, "value_grads")[acted(row, "value_clipped")] == 0).all() and not row["value_grads"][0]
    assert any(clipped) == (value_clip_eps != "none")


# ---------------------------------------------------------------- against the models that the run began with


def whole_logits(hf: torch.nn.Module, ids: Any) -> Tensor:
    with torch.no_grad():
        return hf(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0].double()


def test_the_first_step_is_that_of_the_initial_models(run, models):
    """Log-probs, entropies and alternatives against the full log-softmax of Hugging Face's own model; values likewise."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    actor = AutoModelForCausalLM.from_pretrained(models / "actor").eval()
    reward = AutoModelForSequenceClassification.from_pretrained(models / "reward").eval()
    close = {"atol": 5e-5, "rtol": 1e-4}
    for row in rows(run):
        ids = row["input_ids"]
        logprobs = (whole_logits(actor, ids) / 0.7).log_softmax(-1).numpy()
        with torch.no_grad():
            hidden = reward.base_model(input_ids=torch.tensor(ids)[None]).last_hidden_state
            values = reward.score(hidden)[0, :, 0].numpy() - 0.25  # the shift that the reward model carries
        assert row["scores"] == pytest.approx(values[-1], abs=1e-4)
        for t in np.flatnonzero(row["action_mask"]):
            before = logprobs[t - 1]
            for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs"):
                np.testing.assert_allclose(row[name][t], before[ids[t]], **close)
            np.testing.assert_allclose(row["entropy"][t], -(np.exp(before) * before).sum(), **close)
            np.testing.assert_allclose(row["top_logprobs"][t], np.sort(before)[:-4:-1], **close)
            np.testing.assert_allclose(before[row["top_ids"][t]], np.sort(before)[:-4:-1], **close)
            assert row["old_logprobs"][t] <= row["top_logprobs"][t][0] + 1e-5
            if "old_values" in row:
                np.testing.assert_allclose(row["old_values"][t], values[t - 1], **close)


def test_alternatives_of_a_later_step_are_the_actors(run):
    """Where the sampled token is among them, it has its own log-prob there, and not the reference's."""
    off = []
    for row in rows(run, 2):
        for t in np.flatnonzero(row["action_mask"]):
            for token, logprob in zip(row["top_ids"][t], row["top_logprobs"][t], strict=True):
                if token == row["input_ids"][t]:
                    assert logprob == pytest.approx(row["old_logprobs"][t], abs=1e-4)
                    off.append(abs(logprob - row["ref_logprobs"][t]))
    assert max(off) > 1e-2


# ---------------------------------------------------------------- who made it


@pytest.mark.parametrize(
    ("overrides", "of_engine"),
    [({}, True), ({"run__precision": "bfloat16"}, False), ({"algo__old_logprobs": "trainer"}, False)],
    ids=["float32", "bfloat16", "trainer"],
)
def test_producers_phases_and_versions(record_run, overrides, of_engine):
    run = record_run(trace__alternatives=2, **overrides)
    roles = {"generate": "rollout", "score": "reward", "ref_logprobs": "reference", "advantages": "driver"}
    roles |= {"values": "critic", "update_critic": "critic"}
    for step in (1, 2):
        tensors = run.manifest(step)["tensors"]
        made = {tensor["name"]: tensor["phase"] for tensor in tensors}
        engine = of_engine and step == 2
        expected = {
            "generate": "group_ids policy_version input_ids attention_mask position_ids response_mask action_mask ended "
            "bootstrap_values rollout_logprobs", "score": "scores", "old_logprobs": "" if engine else "old_logprobs entropy",
            "alternatives": "top_ids top_logprobs", "ref_logprobs": "ref_logprobs", "values": "old_values",
            "advantages": "kl rewards advantages returns",
            "update_critic": "values value_clipped value_grads critic_denominator",
            "update_actor": "logprobs log_ratio ratio clipped logprob_grads minibatch actor_denominator",
        }  # fmt: skip
        if engine:
            expected["generate"] += " old_logprobs"
            expected["update_actor"] += " entropy"
        assert made == {name: phase for phase, names in expected.items() for name in names.split()}
        order = [PHASES.index(tensor["phase"]) for tensor in tensors]
        assert order == sorted(order), "in the order of production"
        for tensor in tensors:
            phase = tensor["phase"]
            assert tensor["producer"] == f"{roles.get(phase, 'actor')}/0"
            assert tensor["weight_version"] == (0 if phase in ("score", "ref_logprobs") else step - 1)
            epoch = 1 if tensor["name"] == "entropy" else 2
            assert tensor.get("epoch") == (epoch if phase.startswith("update") else None)
        frame = run.frame(step)
        same = all((a == b).all() for a, b in zip(frame.old_logprobs, frame.rollout_logprobs, strict=True))
        assert same == engine
        if step == 2:  # what the actor was after the step before, it samples with
            assert not all((a == b).all() for a, b in zip(frame.old_logprobs, frame.ref_logprobs, strict=True))


def weights_hash(weights: dict[str, np.ndarray], names: list[str]) -> str:
    """One number a tensor, the sum of its squared bits, all of them through BLAKE2b; arithmetic of 32 bits wraps."""
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        bits = weights[name].view(np.int32)
        digest.update(int((bits * bits).sum(dtype=np.int64)).to_bytes(8, "little", signed=True))
    return digest.hexdigest()


def test_weights_are_those_after_the_step(record_run, models):
    from transformers import AutoConfig, AutoModelForCausalLM

    run = record_run()
    entries = [{entry["role"]: entry for entry in run.manifest(step)["weights"]} for step in (1, 2)]
    for step, found in enumerate(entries, 1):
        assert {role: entry["version"] for role, entry in found.items()} == {
            "actor": step, "critic": step, "reference": 0, "reward": 0,
        }  # fmt: skip
    for role in ("reference", "reward"):
        assert entries[0][role] == entries[1][role]
    assert all(entries[0][role]["hash"] != entries[1][role]["hash"] for role in ("actor", "critic"))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(models / "actor"))
    names = [name for name, _ in model.named_parameters()]
    for entry, folder in ((entries[1]["actor"], run.dir / "actor"), (entries[0]["reference"], models / "actor")):
        weights = load_file(folder / "model.safetensors")
        assert entry["hash"] == weights_hash(weights, names)
        assert entry["parameters"] == sum(weight.size for weight in weights.values())
        assert (entry["bytes"], entry["dtype"], entry["precision"]) == (4 * entry["parameters"], "float32", "float32")


def test_constants_are_those_of_the_step(record_run):
    """An adaptive coefficient among them: the one that this step's rewards were made with."""
    adaptive = {"algo__kl_coef": 0.3, "algo__kl_target": 0.01, "algo__kl_horizon": 20}
    run = record_run(total_steps=3, reward__clip=0.4, rollout__temperature=0.9, **adaptive)
    used = [run.manifest(step)["algorithm"] for step in (1, 2, 3)]
    assert [row["kl/coef"] for row in run.metrics()] == [algorithm["kl_coef"] for algorithm in used]
    assert used[0]["kl_coef"] == 0.3 and len({algorithm["kl_coef"] for algorithm in used}) == 3
    for step, algorithm in enumerate(used, 1):
        for row in rows(run, step):
            last = row["ended"]
            np.testing.assert_allclose(row["rewards"][~last], -algorithm["kl_coef"] * row["kl"][~last], atol=1e-6)
            assert abs(row["scores"]) <= 0.4 + 1e-6 and algorithm["reward_clip"] == 0.4
        config = run.config.algo.model_dump(exclude={"kl_coef"})
        shared = config.keys() & algorithm.keys()
        assert len(shared) == 16 and {key: algorithm[key] for key in shared} == {key: config[key] for key in shared}
        assert (algorithm["temperature"], algorithm["max_new_tokens"], algorithm["missing_eos_penalty"]) == (0.9, 6, 0)
