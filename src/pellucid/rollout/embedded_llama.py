"""The forward of Llama's family, written out: Llama, Mistral, Qwen2, Qwen3 and what else has their decoder layer.

    x += out(attention(rope(qkv(norm(x)))))
    x += down(silu(gate(norm(x))) * up(norm(x)))

It does what transformers does with a third of the operations, which is what a decode step of a small model spends its time
on. Nothing relies on a model's name: `LlamaModel.serves` looks at its parts, and the engine compares the logits with
transformers' before it uses this.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from pellucid.models import Precision, Serving, adopt, forward, is_llama_like, serving_attention
from pellucid.models.attention import Probe
from pellucid.rollout.embedded_cache import SlotCache
from pellucid.rollout.embedded_models import serving_dtype


class Linear(Protocol):
    """x (N, in) -> (N, out)."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """total (N, out) += the outputs."""
        ...


Angles = tuple[Tensor, Tensor]
"""Cosines and sines of the tokens' positions, (N, 1, dim / 2) each."""


class Layer(NamedTuple):
    """One decoder layer: the weights of its norms, and its products. Those that read the same input are one."""

    norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    window: int | None


class LlamaModel:
    """A ServedModel. Its weights are copies, taken before every rollout; x stays float32, products are in `precision`."""

    any_rows = False

    def __init__(self, model: PreTrainedModel, precision: Precision) -> None:
        self.dtype = serving_dtype(model, precision)
        self._model, self._base = model, model.base_model
        attention = self._base.layers[0].self_attn
        self._dim: int = attention.head_dim
        self._scale: float = attention.scaling
        self._heads = attention.q_proj.out_features // self._dim
        self._kv_heads = attention.k_proj.out_features // self._dim
        self._eps: float = model.config.rms_norm_eps
        adopt(model)
        token, probe = torch.zeros((1, 1), dtype=torch.int64, device=model.device), Probe((1,))
        forward(self._base, token, token, probe, use_cache=False)
        self._windows = probe.windows
        self._parts: dict[str, Any] = {}

    @staticmethod
    def serves(model: PreTrainedModel) -> bool:
        return is_llama_like(model.base_model)

    def refresh(self, length: int) -> None:
        self._embed = self._base.embed_tokens.weight.detach()
        self._norm = self._settle("norm", _weight(self._base.norm))
        self._head = self._settle("head", self._linear(self._model.get_output_embeddings()))
        layers = zip(self._base.layers, self._windows, strict=True)
        self._layers = [self._settle(f"layer {index}", self._take(*pair)) for index, pair in enumerate(layers)]
        columns = torch.arange(length, device=self._embed.device)[None]
        # Each of a head's two halves is rotated by the same angles: (length, 1, dim / 2).
        tables = self._base.rotary_emb(self._embed, columns)
        halves = tuple(table[0, :, None, : self._dim // 2].float() for table in tables)
        self._cos, self._sin = self._settle("angles", halves)

    def _settle(self, name: str, part: Any) -> Any:
        """part; or, if that of the rollout before was not released, that one with part's numbers in it: graphs read it where
        it is. Only for copies: the memory of the trainer's own weights may have become another's."""
        old = self._parts.get(name)
        if old is None or not _copy(part, old):
            self._parts[name] = old = part
        return old

    def reads(self) -> list[Tensor]:
        """See embedded_graphs.FixedModel."""
        return [self._embed, *(tensor for part in self._parts.values() for tensor in _tensors(part))]

    def release(self) -> None:
        self._parts.clear()
        del self._head, self._layers

    def _take(self, layer: Any, window: int | None) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return Layer(
            norm=_weight(layer.input_layernorm),
            qkv=self._linear(attention.q_proj, attention.k_proj, attention.v_proj),
            q_norm=_weight(getattr(attention, "q_norm", None)),
            k_norm=_weight(getattr(attention, "k_norm", None)),
            out=self._linear(attention.o_proj),
            mlp_norm=_weight(layer.post_attention_layernorm),
            gate_up=self._linear(mlp.gate_proj, mlp.up_proj),
            down=self._linear(mlp.down_proj),
            window=window,
        )

    def logits(self, tokens: Tensor, positions: Tensor, layout: Serving, cache: SlotCache) -> Tensor:
        x = F.embedding(tokens, self._embed).float()
        angles = self._cos[positions], self._sin[positions]
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(self._normed(x, layer.norm))
            layer.out.add_to(x, self._attention(qkv, layer, index, angles, layout, cache))
            layer.down.add_to(x, self._gated(layer.gate_up(self._normed(x, layer.mlp_norm))))
        if layout.prompts.lengths:
            x = x[layout.last_tokens()]
        return self._head(self._normed(x, self._norm))

    def _linear(self, *modules: nn.Linear) -> Linear:
        """The layers' outputs side by side, from a copy of their weights."""
        weight, bias = joined(self.dtype, *modules)
        return TorchLinear(weight, bias)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.float(), weight.shape, weight, self._eps).to(self.dtype)

    def _gated(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=1)
        return F.silu(gate).mul_(up)

    def _attention(
        self, qkv: Tensor, layer: Layer, index: int, angles: Angles, layout: Serving, cache: SlotCache
    ) -> Tensor:
        """qkv: (N, (heads + 2 * kv_heads) * dim) of the last N tokens of the step. Returns (N, heads * dim)."""
        counts = (self._heads, self._kv_heads, self._kv_heads)
        every = qkv.view(len(qkv), sum(counts), self._dim)
        query, key, value = every.split(counts, dim=1)
        if layer.q_norm is None or layer.k_norm is None:
            rotated = _rotate(every[:, : self._heads + self._kv_heads], *angles)
        else:
            normed = self._normed(query, layer.q_norm), self._normed(key, layer.k_norm)
            rotated = _rotate(torch.cat(normed, dim=1), *angles)
        query, key = rotated.split(counts[:2], dim=1)
        cache.layers[index].write(key, value)
        heads = (part.transpose(0, 1)[None] for part in (query, key, value))
        return serving_attention(*heads, layout, index, self._scale, layer.window).reshape(len(qkv), -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions [Su et al. 2021], halves form. x: (N, heads, dim); cos, sin: (N, 1, dim / 2)."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _weight(norm: nn.Module | None) -> Any:
    """A copy of a norm's, in float32."""
    return None if norm is None else norm.weight.detach().to(torch.float32, copy=True)


def _pieces(part: Any) -> Any:
    return (part.weight, part.bias) if isinstance(part, TorchLinear) else part


def _copy(source: Any, target: Any) -> bool:
    """Copy every tensor of a part into another such part. False if they differ in shape: then the target is spoilt."""
    source, target = _pieces(source), _pieces(target)
    if isinstance(source, tuple):
        return len(source) == len(target) and all(map(_copy, source, target))
    if not isinstance(source, Tensor):
        return source == target
    fits = isinstance(target, Tensor) and source.shape == target.shape and source.dtype == target.dtype
    if fits:
        target.copy_(source)
    return fits


def _tensors(part: Any) -> list[Tensor]:
    """Those with an address, which weights in oneDNN's layout have not."""
    part = _pieces(part)
    if isinstance(part, tuple):
        return [tensor for piece in part for tensor in _tensors(piece)]
    return [part] if isinstance(part, Tensor) and not part.is_mkldnn else []


TYPICAL_ROWS = 64
"""Tokens in a step, for which packed weights are laid out. Others work as well, a little slower."""


def joined(dtype: torch.dtype, *modules: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Copies of the layers' weights and biases, one below the other: (sum of out, in) and (sum of out,)."""
    biases = [module.bias.detach() for module in modules if module.bias is not None]
    weight = torch.cat([module.weight.detach() for module in modules])
    return weight.to(dtype), torch.cat(biases).to(dtype) if biases else None


class TorchLinear:
    """On a CPU the weight is kept in oneDNN's own layout: a plain product brings it into such a layout every time, which for
    the few tokens of a decode step is a third of its time."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.bias, self.packed = bias, _packs(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS) if self.packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def add_to(self, total: Tensor, x: Tensor) -> None:
        total += self(x)


def _packs(weight: Tensor) -> bool:
    """The two operators are those that PyTorch's compiler uses on CPUs; not every build has them."""
    has = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and torch.backends.mkldnn.is_available()
    fast = weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.device.type == "cpu" and has and fast
