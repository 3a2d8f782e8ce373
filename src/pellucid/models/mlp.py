"""Small networks over observations, for environments: a policy that gives log-probs, and a value function.

They offer the workers what `CausalLM` and `ScalarModel` offer, read from `batch.observations`. Column t needs no shift: the
observation there is what action t answers to.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from pellucid.files import atomic_directory
from pellucid.models.precision import Precision
from pellucid.types import Batch


class _MLP:
    """Linear layers with tanh between them, in float32. sizes: observation, hidden layers, outputs.

    Initial weights are orthogonal, scaled by √2, the last layer's by last_scale; biases are 0 [Andrychowicz et al. 2021:
    a last layer of the policy that starts small makes the first actions nearly uniform].
    """

    precision: Precision = "float32"

    def __init__(self, sizes: list[int], last_scale: float, seed: int, device: str) -> None:
        self.sizes = sizes
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for i, (inputs, outputs) in enumerate(pairwise(sizes), start=2):
                layer = nn.Linear(inputs, outputs)
                nn.init.orthogonal_(layer.weight, last_scale if i == len(sizes) else math.sqrt(2))
                nn.init.zeros_(layer.bias)
                layers += [layer, nn.Tanh()]
        self.module = nn.Sequential(*layers[:-1]).to(device)
        self._linear = [layer for layer in self.module if isinstance(layer, nn.Linear)]

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def forward(self, x: Tensor) -> Tensor:
        """(…,O) float32 -> (…,outputs) float32: `module` itself, without what calling a module costs; these are so small that
        it is a third of a step."""
        for layer in self._linear[:-1]:
            x = linear(x, layer.weight, layer.bias).tanh_()
        return linear(x, self._linear[-1].weight, self._linear[-1].bias)

    def save(self, path: Path) -> None:
        """path/model.safetensors: `0.weight`, `0.bias`, `2.weight`, … The folder is whole or absent."""
        with atomic_directory(path) as folder:
            save_file(self.module.state_dict(), folder / "model.safetensors")


class MLPPolicy(_MLP):
    """Observation -> logits over a discrete set of actions."""

    def __init__(self, observation: int, hidden: tuple[int, ...], num_actions: int, seed: int, device: str) -> None:
        super().__init__([observation, *hidden, num_actions], 0.01, seed, device)

    def logits(self, observations: Tensor) -> Tensor:
        """(…,O) float32 -> (…,A) float32."""
        return self.forward(observations)

    def logprobs_of(self, batch: Batch, temperature: float, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the batch's actions, and the entropy if asked: (B,T) in nats, 0 outside action_mask."""
        logprobs = (self.logits(batch.get("observations")) / temperature).log_softmax(-1)
        taken = logprobs.gather(-1, batch.input_ids[..., None])[..., 0]
        spread = -(logprobs.exp() * logprobs).sum(-1) * batch.action_mask if entropy else None
        return taken * batch.action_mask, spread


class MLPValue(_MLP):
    """Observation -> value of the state, in reward units."""

    def __init__(self, observation: int, hidden: tuple[int, ...], seed: int, device: str) -> None:
        super().__init__([observation, *hidden, 1], 1.0, seed, device)

    def values(self, observations: Tensor) -> Tensor:
        """(…,O) float32 -> (…) float32."""
        return self.forward(observations)[..., 0]

    def values_of(self, batch: Batch) -> Tensor:
        """Value of the state before each action: (B,T), 0 outside action_mask."""
        return self.values(batch.get("observations")) * batch.action_mask
