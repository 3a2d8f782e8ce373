"""One model's optimizer: gradient clipping, the learning-rate schedule, and the audits that are fatal when they fail."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.config import OptimizerConfig
from pellucid.errors import IntegrityError
from pellucid.types import Batch

ADAM_EPS = 1e-5


class Learner:
    """Adam over a module's parameters.

    A step is `zero_grad`, any number of `backward` by the caller, then `step`. `updates` counts the steps taken and is
    all that the schedule depends on.
    """

    def __init__(self, role: str, module: nn.Module, config: OptimizerConfig, total_updates: int) -> None:
        self.role, self.module, self.config, self.total_updates = role, module, config, total_updates
        self.updates = 0
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._named = named
        groups = [
            {"params": [p for _, p in named if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=config.lr,
            betas=(0.9, config.beta2),
            eps=ADAM_EPS,
            fused=True,
        )
        self._fingerprints = [_fingerprint(p) for _, p in named]

    def zero_grad(self) -> None:
        self._adam.zero_grad(set_to_none=True)

    def rate(self) -> float:
        """Learning rate of the next step: linear warm-up, then linear to 0 at total_updates."""
        config, step = self.config, self.updates + 1
        if step <= config.warmup_steps:
            return config.lr * step / config.warmup_steps
        if not config.anneal:
            return config.lr
        left = self.total_updates - self.updates
        return config.lr * max(left, 0) / max(self.total_updates - config.warmup_steps, 1)

    def step(self) -> dict[str, float]:
        """Clip, check, update, audit. Returns grad_norm (before clipping), lr, and tensors_moved.

        Raises IntegrityError, the weights untouched, when the gradient is not finite; and after the update when a
        tensor with a gradient to speak of did not move.
        """
        weights = [p for _, p in self._named if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in weights])
        grad_norm = norm.item()
        if not math.isfinite(grad_norm):
            culprit = next(
                (n for n, p in self._named if p.grad is not None and not p.grad.isfinite().all()), "its norm"
            )
            raise IntegrityError(f"{self.role}: the gradient of {culprit} is not finite at update {self.updates + 1}")
        torch.nn.utils.clip_grads_with_norm_(weights, self.config.max_grad_norm, norm)
        rate = self.rate()
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        # PyTorch's fused Adam leaves the weights' versions as they are, and by these a packed copy knows that it is stale.
        torch.autograd.graph.increment_version(weights)
        self.updates += 1
        return {"grad_norm": grad_norm, "lr": rate, "tensors_moved": self._audit(rate)}

    def _audit(self, rate: float) -> float:
        """Share of the tensors whose bits changed. One that Adam moves by more than rounding must be among them."""
        moved = 0
        for i, (name, parameter) in enumerate(self._named):
            fingerprint = _fingerprint(parameter)
            if fingerprint != self._fingerprints[i]:
                moved += 1
            elif self._ought_to_move(parameter, rate):
                raise IntegrityError(
                    f"{self.role}: update {self.updates} left {name} as it was, although it has a gradient; "
                    "the optimizer is not training this model"
                )
            self._fingerprints[i] = fingerprint
        return moved / len(self._named)

    @torch.no_grad()
    def _ought_to_move(self, parameter: nn.Parameter, rate: float) -> bool:
        """Whether Adam's step is above the spacing of floats at some weight; below half of it, the step rounds away.

        So it does for all of a norm's weights (about 1) at the end of annealing, and for the key bias of an attention
        layer, whose gradient is rounding noise.
        """
        if parameter.grad is None or not parameter.grad.any():
            return False
        state = self._adam.state.get(parameter)
        if not state:
            return True  # a gradient, and Adam has never seen this tensor
        step = rate * state["exp_avg"].abs() / (state["exp_avg_sq"].sqrt() + ADAM_EPS)
        return bool((step > parameter.abs() * 2**-23 + 1e-30).any())

    def fingerprint(self) -> str:
        """32 hexadecimal digits that stand for the weights as they are after the last step."""
        return _combined(self._fingerprints)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.module.state_dict(), "adam": self._adam.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["weights"])
        self._adam.load_state_dict(state["adam"])
        self.updates = state["updates"]
        self._fingerprints = [_fingerprint(p) for _, p in self._named]


def _fingerprint(parameter: Tensor) -> int:
    """Sum of the squared bits, read as integers. The plain sum will not do: weights of one binade that Adam's first
    step moves by the same amount, half of them up and half down, cancel in it (a norm of 32 weights: one time in 7)."""
    bits = parameter.detach().view(torch.int32)
    return int((bits * bits).sum(dtype=torch.int64))


def fingerprint(module: nn.Module) -> str:
    """As `Learner.fingerprint`, of a module that nobody trains."""
    return _combined([_fingerprint(p) for p in module.parameters()])


def _combined(fingerprints: list[int]) -> str:
    return hashlib.blake2b(
        b"".join(n.to_bytes(8, "little", signed=True) for n in fingerprints), digest_size=16
    ).hexdigest()


def minibatches(n: int, size: int, seed: int) -> Iterator[Tensor]:
    """Rows 0..n-1 in an order drawn from the seed, in pieces of size (the last may be smaller)."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    yield from order.split(size)


@dataclass(frozen=True)
class MicroBatchLimits:
    """How much goes through a model at once. tokens: at most, though one sequence always goes; size: sequences."""

    tokens: int
    size: int | None = None


def micro_batches(lengths: Tensor, limits: MicroBatchLimits) -> list[Tensor]:
    """Rows in as few groups as the limits allow, with about as many tokens each. lengths: (n,), in tokens.

    Longest first, each to the group that has the fewest tokens so far and room for one more [Graham 1969, LPT]. Within a
    group rows of one length are neighbours, and so share one call of the attention kernel.
    """
    longest_first = lengths.argsort(descending=True, stable=True)
    order, sizes, most = longest_first.tolist(), lengths.tolist(), limits.size or max(len(lengths), 1)
    count = max(math.ceil(sum(sizes) / limits.tokens), math.ceil(len(order) / most))
    if count == 1:
        return [longest_first]
    while count < len(order):
        groups: list[list[int]] = [[] for _ in range(count)]
        lightest = [(0, group) for group in range(count)]  # a heap of (tokens, group), without the groups that are full
        for row in order:
            tokens, group = heapq.heappop(lightest)
            groups[group].append(row)
            if tokens + sizes[row] > limits.tokens and len(groups[group]) > 1:
                break
            if len(groups[group]) < most:
                heapq.heappush(lightest, (tokens + sizes[row], group))
        else:
            return [torch.tensor(group) for group in groups]
        count += 1
    return [torch.tensor([row]) for row in order]


class Gathered:
    """What micro-batches make of their rows, laid out over the whole batch: tensors (B,) or (B,T), 0 where nothing was put.
    A later piece replaces an earlier one, so after several passes they hold the last."""

    def __init__(self, batch: Batch, rows: Tensor | None = None, tensors: dict[str, Tensor] | None = None) -> None:
        self._batch, self._rows = batch, rows
        self.tensors: dict[str, Tensor] = {} if tensors is None else tensors

    def of(self, rows: Tensor) -> Gathered:
        """The same tensors, for someone who counts rows within these."""
        return Gathered(self._batch, rows, self.tensors)

    def put(self, rows: Tensor, **pieces: Tensor | None) -> None:
        """pieces: name -> (n,) or (n,T') for the n rows, None for what was not made."""
        rows = rows if self._rows is None else self._rows[rows]
        for name, piece in pieces.items():
            if piece is None:
                continue
            if name not in self.tensors:
                shape = self._batch.input_ids.shape[: piece.dim()]
                self.tensors[name] = torch.zeros(*shape, *piece.shape[2:], dtype=piece.dtype)
            columns = () if piece.dim() == 1 else (slice(piece.shape[1]),)
            self.tensors[name][(rows, *columns)] = piece.detach().cpu()


class Means:
    """Running weighted means of metrics over the updates of an iteration."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, metrics: dict[str, float], weight: float = 1.0) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * weight
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def result(self, prefix: str = "") -> dict[str, float]:
        return {prefix + name: self._sums[name] / self._weights[name] for name in self._sums}
