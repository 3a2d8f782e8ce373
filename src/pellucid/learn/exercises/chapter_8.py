"""Exercises of chapter 8: the graph from the record, the critical path, the memory of a role."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch

from pellucid.learn.chapter_8_data_flow import chain
from pellucid.learn.exercises import Exercise


def check_waits_for(waits_for: Callable[..., Any]) -> None:
    made_by = {"input_ids": "generate", "scores": "score", "old_values": "values", "returns": "advantages"}
    reads = {
        "generate": (),
        "score": ("input_ids",),
        "advantages": ("scores", "old_values"),
        "update_critic": ("old_values", "returns"),
    }
    got = {phase: set(before) for phase, before in waits_for(made_by, reads).items()}
    assert got.keys() == reads.keys(), (
        f"every phase has an entry, one that waits for nothing an empty one; got {sorted(got)}"
    )
    for phase, names in reads.items():
        right = {made_by[name] for name in names}
        assert got[phase] == right, (
            f"{phase} waits for the makers of {list(names)}: {sorted(right)}, not {sorted(got[phase])}"
        )


def check_critical_seconds(critical_seconds: Callable[..., Any]) -> None:
    random = Random(8)
    for n in (1, 2, 5, 9):
        names = [f"phase {i}" for i in range(n)]
        waits = {name: {names[j] for j in range(i) if random.random() < 0.4} for i, name in enumerate(names)}
        seconds = {name: random.random() for name in names}
        right = max(chain(name, seconds, waits)[0] for name in names)
        got = float(critical_seconds(seconds, waits))
        assert got < sum(seconds.values()) + 1e-9, "it cannot be more than all phases one after the other"
        assert abs(got - right) < 1e-9, (
            f"{got:.4f} instead of {right:.4f} s: a phase ends its own seconds after the last of those it waits for, and the "
            "path is as long as the latest end"
        )


def check_role_bytes(role_bytes: Callable[..., Any]) -> None:
    model = torch.nn.Linear(7, 5, bias=False)  # the real thing, counted
    adam = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 7)).sum().backward()
    adam.step()
    weight = model.weight
    assert weight.grad is not None
    moments = [v for v in adam.state[weight].values() if v.shape == weight.shape]
    trained = sum(t.nbytes for t in (weight, weight.grad, *moments))
    frozen, got = weight.nbytes, float(role_bytes(weight.numel(), False))
    assert got == frozen, f"a frozen model of 35 parameters in float32 takes {frozen} bytes, not {got:g}"
    got = float(role_bytes(weight.numel(), True))
    assert got == trained, (
        f"trained, 35 parameters take {trained} bytes, not {got:g}: weights, their gradient, and Adam's two moments, "
        "float32 each"
    )


EXERCISES = (
    Exercise(
        "waits_for",
        "A manifest says which phase made each tensor; you know which tensors each phase reads. Return, for each phase, the "
        "set of phases that it waits for.",
        "manifest 记录了每个张量由哪个阶段产生；每个阶段读哪些张量是已知的。对每个阶段，返回它要等待的阶段的集合。",
        "def waits_for(made_by: dict[str, str], reads: dict[str, tuple[str, ...]]) -> dict[str, set[str]]:\n"
        '    """made_by: tensor -> phase. reads: phase -> tensors."""\n'
        "    ...\n",
        check_waits_for,
    ),
    Exercise(
        "critical_seconds",
        "Phases take some seconds and wait for each other. How long does an iteration take with as many workers as one could "
        "wish for?",
        "各阶段耗时已知，相互等待关系已知。如果 worker 要多少有多少，一次迭代需要多少秒？",
        "def critical_seconds(seconds: dict[str, float], waits: dict[str, set[str]]) -> float:\n"
        '    """waits: phase -> the phases that must have ended before it starts; there are no circles."""\n'
        "    ...\n",
        check_critical_seconds,
    ),
    Exercise(
        "role_bytes",
        "How many bytes does a role of so many parameters hold, activations apart, all in float32: only its weights if it is "
        "frozen; if Adam trains it, what else?",
        "一个角色有这么多参数，全部用 float32。不算激活值，它占多少字节：冻结的只有权重；用 Adam 训练的还有什么？",
        "def role_bytes(parameters: int, trained: bool) -> int:\n"
        '    """Bytes of weights and, where trained, of everything that the optimizer keeps per parameter."""\n'
        "    ...\n",
        check_role_bytes,
    ),
)
