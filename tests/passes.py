"""A loss and its gradients through `CausalLM`, and the same from plain transformers in float64, one sequence at a time."""

from __future__ import annotations

import copy

import torch
from tiny_models import VOCAB_SIZE, tiny_llama, tiny_llama_gqa, tiny_mistral, tiny_qwen2
from torch import Tensor, nn

from pellucid.models import CausalLM


def llama_with_biases(seed: int = 0, **overrides):
    return with_noisy_biases(tiny_llama_gqa(seed, attention_bias=True, mlp_bias=True, **overrides))


def qwen2(seed: int = 0, **overrides):
    return with_noisy_biases(tiny_qwen2(seed, **overrides))


def qwen2_with_windows_in_one_layer(seed: int = 0, **overrides):
    windows = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    return tiny_qwen2(seed, **windows, **overrides)


def llama_with_yarn(seed: int = 0, **overrides):
    """Rotary tables that are scaled, by more than 1."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 8}
    return tiny_llama(seed, rope_parameters=yarn, **overrides)


def with_noisy_biases(hf):
    """Fresh biases are 0, and would hide that somebody forgets them."""
    random = torch.Generator().manual_seed(9)
    for name, parameter in hf.named_parameters():
        if name.endswith("bias"):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)
    return hf


FUSED = {
    "llama": tiny_llama,
    "llama_gqa, tied": tiny_llama_gqa,
    "qwen2": qwen2,
    "mistral": tiny_mistral,
    "llama, biases everywhere": llama_with_biases,
    "llama, yarn": llama_with_yarn,
    "qwen2, windows in some layers": qwen2_with_windows_in_one_layer,
}
EVEN = VOCAB_SIZE + 1
"""A vocabulary that bfloat16 can multiply in pairs."""


def sequences(lengths) -> list[Tensor]:
    random = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(VOCAB_SIZE, (length,), generator=random) for length in lengths]


def padded(rows: list[Tensor], side: str = "right") -> tuple[Tensor, Tensor]:
    """(ids, mask), (B,T) each."""
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    ones = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return ids, nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)


def upstream(lengths) -> list[Tensor]:
    """(2, length) of each sequence: how much its tokens' log-probs and entropies count in the loss."""
    random = torch.Generator().manual_seed(1)
    return [torch.randn(2, length, generator=random) / sum(lengths) for length in lengths]


def gradients(hf) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in hf.named_parameters() if p.grad is not None}


def our_loss(model: CausalLM, rows: list[Tensor], weights: list[Tensor], side: str = "right"):
    """(loss, [(2, length) log-probs and entropies of each sequence])."""
    ids, mask = padded(rows, side)
    both = torch.stack(model.logprobs(ids, mask, mask, 0.7, entropy=True))
    parts = [both[:, row][:, mask[row]] for row in range(len(rows))]
    return sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True)), parts


def ours(model: CausalLM, lengths, side: str = "right"):
    """(log-probs and entropies of each sequence, gradients of every parameter)."""
    model.hf.zero_grad()
    loss, parts = our_loss(model, sequences(lengths), upstream(lengths), side)
    loss.backward()
    return [part.detach() for part in parts], gradients(model.hf)


def reference(hf, lengths):
    """The same from transformers alone, in float64 and without padding. hf must not have been through CausalLM."""
    hf, parts, loss = copy.deepcopy(hf).double(), [], 0.0
    for ids, weight in zip(sequences(lengths), upstream(lengths), strict=True):
        every = (hf(input_ids=ids[None], use_cache=False).logits[0, :-1] / 0.7).log_softmax(-1)
        both = torch.stack([every.gather(1, ids[1:, None])[:, 0], -(every.exp() * every).sum(-1)])
        parts.append(nn.functional.pad(both, (1, 0)))  # nothing predicts a first token
        loss = loss + (parts[-1] * weight).sum()
    loss.backward()
    return [part.detach() for part in parts], gradients(hf)


def gap(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative distance of the whole gradient."""
    assert found.keys() == expected.keys()
    return (distance(found, expected) / distance(expected)).item()


def distance(one: dict[str, Tensor], other: dict[str, Tensor] | None = None) -> Tensor:
    gaps = [(one[name].double() - (0 if other is None else other[name].double())).flatten() for name in one]
    return torch.cat(gaps).norm()


def assert_same(found, expected, tolerance: float = 1e-5) -> None:
    for part, other in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(part.double(), other.double(), atol=2 * tolerance, rtol=tolerance)
    assert found[1].keys() == expected[1].keys()
    largest = max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        scale = gradient.abs().max() + largest / 100  # a key's bias has no gradient but noise
        assert (found[1][name].double() - gradient).abs().max() <= 2 * tolerance * scale, name
