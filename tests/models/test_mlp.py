"""The networks of environments, against torch's own distributions and against their definition."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pellucid.models import MLPPolicy, MLPValue
from pellucid.types import Batch, transitions


def policy(seed: int = 0, sharp: float = 100.0) -> MLPPolicy:
    made = MLPPolicy(3, (16, 8), 4, seed, "cpu")
    with torch.no_grad():
        made.module[-1].weight.mul_(sharp)
    return made


def batch(rows: int = 3, steps: int = 5) -> Batch:
    random = torch.Generator().manual_seed(0)
    mask = torch.rand(rows, steps, generator=random) < 0.7
    ones = torch.ones(rows, steps, dtype=torch.bool)
    return Batch(
        input_ids=torch.randint(4, (rows, steps), generator=random), attention_mask=ones,
        position_ids=torch.arange(steps).expand(rows, -1), response_mask=ones, action_mask=mask,
        rollout_logprobs=torch.zeros(rows, steps), ended=~ones, bootstrap_values=torch.zeros(rows, steps),
        group_ids=torch.arange(rows), policy_version=torch.zeros(rows, dtype=torch.int64), stop_reason=(),
        observations=torch.randn(rows, steps, 3, generator=random),
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_and_entropy_are_those_of_the_categorical_distribution(temperature: float) -> None:
    model, given = policy(), batch()
    logprobs, entropy = model.logprobs_of(given, temperature, entropy=True)
    expected = torch.distributions.Categorical(logits=model.module(given.get("observations")) / temperature)
    torch.testing.assert_close(logprobs, torch.where(given.action_mask, expected.log_prob(given.input_ids), 0))
    torch.testing.assert_close(entropy, torch.where(given.action_mask, expected.entropy(), 0))
    assert model.logprobs_of(given, temperature)[1] is None and not given.action_mask.all()


def test_a_step_gives_the_same_in_its_rollout_and_as_a_row_of_its_own() -> None:
    given = batch()
    rows = transitions(given)
    assert rows.input_ids.shape == (int(given.action_mask.sum()), 1) and rows.action_mask.all()
    for model, read in (
        (policy(), lambda m, b: m.logprobs_of(b, 1.0)[0]),
        (MLPValue(3, (8,), 0, "cpu"), MLPValue.values_of),
    ):
        torch.testing.assert_close(read(model, rows)[:, 0], read(model, given)[given.action_mask])
    assert rows.group_ids.tolist() == [i for i, row in enumerate(given.action_mask.tolist()) for taken in row if taken]
    picked = rows.select(torch.tensor([4, 1]))
    assert picked.get("observations").equal(rows.get("observations")[[4, 1]])


def by_hand(model: MLPPolicy | MLPValue, x: Tensor) -> Tensor:
    weights = [parameter.detach() for parameter in model.module.parameters()]
    for weight, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
        x = torch.tanh(x @ weight.T + bias)
    return x @ weights[-2].T + weights[-1]


def test_the_networks_are_linear_layers_with_tanh_between_them() -> None:
    x = batch().get("observations")
    torch.testing.assert_close(policy().logits(x), by_hand(policy(), x))
    value = MLPValue(3, (64, 64), 1, "cpu")
    torch.testing.assert_close(value.values(x), by_hand(value, x)[..., 0])


def test_initial_weights_are_orthogonal_with_their_scale() -> None:
    for model, last in ((MLPPolicy(3, (16, 8), 4, 0, "cpu"), 0.01), (MLPValue(3, (16, 8), 0, "cpu"), 1.0)):
        weights = [p.detach() for p in model.module.parameters() if p.dim() == 2]
        for weight, scale in zip(weights, (math.sqrt(2), math.sqrt(2), last), strict=True):
            short = weight if weight.shape[0] <= weight.shape[1] else weight.T
            torch.testing.assert_close(short @ short.T, scale**2 * torch.eye(len(short)), atol=1e-5, rtol=1e-4)
        assert not any(p.any() for p in model.module.parameters() if p.dim() == 1)


def test_the_seed_settles_the_weights_and_nothing_else_is_drawn() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = policy(1), policy(1), policy(2)
    assert torch.rand(3).equal(expected)
    assert first.module[0].weight.equal(again.module[0].weight) and not first.module[0].weight.equal(
        other.module[0].weight
    )


def test_saved_weights_are_the_module_s(tmp_path) -> None:
    model, other = policy(1), policy(2)
    model.save(tmp_path / "actor")
    other.module.load_state_dict(load_file(tmp_path / "actor/model.safetensors"))
    x = batch().get("observations")
    assert other.logits(x).equal(model.logits(x))
