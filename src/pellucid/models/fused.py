"""The training pass of Llama's family on a CPU, written out over kernels in C: Llama, Mistral, Qwen2 and what else has their
decoder layer. Forward, per layer, for N tokens of sequences end to end:

    h1 = norm(x);  qkv = h1 Wqkv;  turn queries and keys;  att = attention(qkv);  x += att Wo
    h2 = norm(x);  gu = h2 Wgu;  a = silu(gate) * up;  x += a Wd

`_Layer` keeps x, x after attention, qkv, att and gu; its backward recomputes h1, h2 and a, which are cheap. The residual
stream, every sum and every gradient of a weight are float32; in bfloat16 only the two sides of a product are rounded, and
what is kept of qkv, att and gu. Weights are laid out for the products once after each change, not once a pass.

Nothing relies on a model's name: `fuse` looks at its parts, and compares with transformers' own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pellucid.models.attention import Probe, adopt, forward
from pellucid.models.native import ops
from pellucid.models.precision import Precision
from pellucid.models.weights import Weight, kernel_dtype

PARTS = {
    "": {"embed_tokens", "layers", "norm", "rotary_emb"},
    "layers.0": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "layers.0.mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
    "layers.0.self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
}
"""The submodules of each part of a decoder of Llama's family; an attention may also have the norms q_norm and k_norm."""
ROPES = ("default", "linear", "llama3", "yarn")
AGREEMENT = 1e-4
"""Largest difference from transformers' hidden states in float32, relative to the largest of them."""


def is_llama_like(base: Any) -> bool:
    """Whether the decoder is made of the parts that are written out here and in the engine."""
    config = base.config
    children = {name: {child for child, _ in part.named_children()} for name, part in base.named_modules()}
    if any(children.get(name, set()) - {"q_norm", "k_norm"} != parts for name, parts in PARTS.items()):
        return False
    attention, rope = base.layers[0].self_attn, getattr(config, "rope_parameters", None) or {}
    if not (hasattr(config, "rms_norm_eps") and hasattr(attention, "head_dim") and hasattr(attention, "scaling")):
        return False
    if rope.get("llama_4_scaling_beta") is not None:  # scales queries far into the sequence
        return False
    return config.hidden_act in ("silu", "swish") and rope.get("rope_type") in ROPES


class Linear:
    """Layers that read the same input, as one product."""

    def __init__(self, dtype: torch.dtype, *modules: nn.Linear) -> None:
        self.modules, self.weight = modules, Weight(dtype, *modules)
        self.sizes = [module.out_features for module in modules]
        self.biased = modules[0].bias is not None

    def parameters(self) -> list[Tensor]:
        biases = [module.bias for module in self.modules if module.bias is not None]
        return [*(module.weight for module in self.modules), *biases]

    def bias(self) -> Tensor | None:
        return torch.cat([module.bias.detach() for module in self.modules]) if self.biased else None

    def __call__(self, x: Tensor, **kwargs: Any) -> Tensor:
        return ops.product(x, self.weight.packed(), self.bias(), **kwargs)

    def back(self, dy: Tensor, **kwargs: Any) -> Tensor:
        """The gradient of the input."""
        return ops.product(dy, self.weight.packed(transposed=True), **kwargs)

    def gradients(self, dy: Tensor, x: Tensor) -> list[Tensor]:
        """Of `parameters`, in their order."""
        weights = ops.weight_gradient(dy, x).split(self.sizes)
        return [*weights, *(dy.float().sum(0).split(self.sizes) if self.biased else ())]


class Layout:
    """What every layer of a pass needs to know of its tokens."""

    def __init__(self, lengths: tuple[int, ...], cos: Tensor, sin: Tensor) -> None:
        self.ends = torch.tensor(lengths).cumsum(0)
        self.cos, self.sin = cos, sin


class DecoderLayer:
    """One layer's products and norms, and its forward and backward."""

    def __init__(self, layer: Any, dtype: torch.dtype, window: int | None, eps: float) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        dim = attention.head_dim
        counts = (module.out_features // dim for module in (attention.q_proj, attention.k_proj))
        self.heads = ops.Heads(*counts, dim, window or 0, attention.scaling)
        self.dtype, self.eps, self.module = dtype, eps, layer
        self.norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
        self.qkv = Linear(dtype, attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = Linear(dtype, attention.o_proj)
        self.gate_up = Linear(dtype, mlp.gate_proj, mlp.up_proj)
        self.down = Linear(dtype, mlp.down_proj)

    def __call__(self, x: Tensor, layout: Layout) -> Tensor:
        linears = (self.qkv, self.out, self.gate_up, self.down)
        return _Layer.apply(x, self, layout, *self.norms, *(p for linear in linears for p in linear.parameters()))

    def forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        """x: (N,H) float32. Returns the next x, and what `backward` needs."""
        n, (h, kv, dim, *_) = len(x), self.heads
        qkv = self.qkv(ops.rms_norm(x, self.norms[0].detach(), self.eps, self.dtype)).view(n, h + 2 * kv, dim)
        qkv = ops.rotated(qkv, h + kv, layout.cos, layout.sin, self.dtype)
        att, log_norms = ops.packed_attention(qkv, self.heads, layout.ends)
        middle = self.out(att, out=x.clone(), add=True)
        gate_up = self.gate_up(ops.rms_norm(middle, self.norms[1].detach(), self.eps, self.dtype), dtype=self.dtype)
        end = self.down(ops.gated(gate_up, self.dtype), out=middle.clone(), add=True)
        return end, x, middle, qkv, att, log_norms, gate_up

    def backward(self, dend: Tensor, layout: Layout, saved: tuple[Tensor, ...]) -> list[Tensor]:
        """The gradient of x, then of the norms, then of each linear's parameters."""
        x, middle, qkv, att, log_norms, gate_up = saved
        first, second = (norm.detach() for norm in self.norms)

        d = ops.rounded(dend, self.dtype)
        dgate_up, a = ops.gated_backward(self.down.back(d), gate_up)
        of_down = self.down.gradients(d, a)
        of_gate_up = self.gate_up.gradients(dgate_up, ops.rms_norm(middle, second, self.eps, self.dtype))
        dmiddle, of_second = ops.rms_norm_backward(self.gate_up.back(dgate_up), middle, second, self.eps, onto=dend)

        d = ops.rounded(dmiddle, self.dtype)
        of_out = self.out.gradients(d, att)
        datt = self.out.back(d, dtype=self.dtype)
        dqkv = ops.packed_attention_backward(
            datt, qkv, att, log_norms, self.heads, layout.ends, layout.cos, layout.sin
        ).view(len(x), -1)
        of_qkv = self.qkv.gradients(dqkv, ops.rms_norm(x, first, self.eps, self.dtype))
        dx, of_first = ops.rms_norm_backward(self.qkv.back(dqkv), x, first, self.eps, onto=dmiddle)
        return [dx, of_first, of_second, *of_qkv, *of_out, *of_gate_up, *of_down]


class _Layer(torch.autograd.Function):
    """The parameters come as arguments so that autograd hands their gradients on; the products read their packed copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: DecoderLayer, layout: Layout, *parameters: Tensor) -> Tensor:
        end, *saved = layer.forward(x, layout)
        ctx.save_for_backward(*saved, *parameters)  # parameters too: autograd then notices if they change in between
        ctx.layer, ctx.layout, ctx.kept = layer, layout, len(saved)
        return end

    @staticmethod
    def backward(ctx: Any, dend: Tensor) -> Any:
        saved = ctx.saved_tensors[: ctx.kept]
        dx, *gradients = ctx.layer.backward(dend.contiguous(), ctx.layout, saved)
        return dx, None, None, *gradients


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return ops.rms_norm(x, weight.detach(), eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return *ops.rms_norm_backward(dy.contiguous(), x, weight.detach(), ctx.eps), None


class FusedDecoder:
    """The hidden states of a decoder, from its own parameters."""

    def __init__(self, base: Any, dtype: torch.dtype, windows: list[int | None]) -> None:
        self.base, self.eps = base, base.config.rms_norm_eps
        pairs = zip(base.layers, windows, strict=True)
        self.layers = [DecoderLayer(layer, dtype, window, self.eps) for layer, window in pairs]

    def __call__(self, input_ids: Tensor, position_ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """input_ids, position_ids: (N,), sequences of these lengths end to end. Returns (N,H) float32."""
        x = F.embedding(input_ids, self.base.embed_tokens.weight)
        half = self.layers[0].heads.dim // 2
        with torch.no_grad():
            angles = self.base.rotary_emb(x[None], position_ids[None])
            layout = Layout(lengths, *(table[0, :, :half].float().contiguous() for table in angles))
        for layer in self.layers:
            run: Callable[..., Tensor] = layer
            if layer.module.gradient_checkpointing and layer.module.training and torch.is_grad_enabled():
                x = checkpoint(run, x, layout, use_reentrant=False)
            else:
                x = run(x, layout)
        return _Norm.apply(x, self.base.norm.weight, self.eps)


def fuse(hf: Any, precision: Precision) -> FusedDecoder | None:
    """The model's decoder over the kernels, or None where they do not serve it or give other hidden states than its own.

    These are compared in float32, whatever the precision: rounding would hide a layer that adds little.
    """
    base = hf.base_model
    if not is_llama_like(base) or hasattr(base.layers[0].self_attn, "q_norm"):
        return None
    linears = [module for module in base.layers.modules() if isinstance(module, nn.Linear)]
    weights = [linear.weight for linear in linears]
    dtype = kernel_dtype(weights[0].device, precision, *weights)
    if dtype is None or any(
        type(linear) is not nn.Linear for linear in linears
    ):  # an adapter does more than its weight
        return None
    adopt(hf)
    probe, lengths = Probe((5, 2)), (5, 2)
    with torch.no_grad():
        ids = (torch.arange(7) * 5 + 1) % base.embed_tokens.num_embeddings
        positions = torch.tensor([0, 1, 2, 3, 4, 0, 1])
        expected = forward(base, ids[None], positions[None], probe, use_cache=False).last_hidden_state[0]
        gap = (FusedDecoder(base, torch.float32, probe.windows)(ids, positions, lengths) - expected).abs().max().item()
    agrees = gap <= AGREEMENT * max(expected.abs().max().item(), 1.0)
    return FusedDecoder(base, dtype, probe.windows) if agrees else None
