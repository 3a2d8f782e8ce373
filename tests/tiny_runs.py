"""Tiny batches, tokenizers, model folders and configs, for the tests above the floor of `core`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import VOCAB_SIZE
from torch import Tensor

from pellucid.config import PPOConfig
from pellucid.types import Batch, Prompt, Sample, collate

TEXTS = [
    "the cat sat on the mat and slept",
    "a dog ran over the hill to the sea",
    "we sat by the sea and ate the bread",
    "the hill is green and the sea is blue",
]


def ragged_rows(seed: int = 0, lengths: tuple[int, ...] = (5, 9, 2, 7)) -> list[list[int]]:
    """One list of random token ids for each length."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB_SIZE, (n,), generator=random).tolist() for n in lengths]


def padded(rows: list[list[int]], side: str = "right", extra: int = 0, pad_id: int = 5) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), each (B,T), with `extra` more columns of padding than the longest row needs."""
    width = max(map(len, rows)) + extra
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, columns], mask[i, columns] = torch.tensor(row), True
    return ids, mask


def sample(
    prompt_ids: list[int],
    response_ids: list[int],
    actions: list[bool] | None = None,
    group_id: int = 0,
    stop_reason: str = "stop",
    **prompt: Any,
) -> Sample:
    """One sample; all response tokens are actions unless told otherwise."""
    actions = [True] * len(response_ids) if actions is None else actions
    return Sample(
        prompt=Prompt(id=group_id, input_ids=prompt_ids, text=prompt.pop("text", ""), **prompt),
        group_id=group_id,
        sample_index=0,
        input_ids=prompt_ids + response_ids,
        action_mask=[False] * len(prompt_ids) + actions,
        rollout_logprobs=[0.0] * len(prompt_ids) + [-1.0 if a else 0.0 for a in actions],
        stop_reason=stop_reason,
        policy_version=0,
    )


def random_batch(n: int = 6, seed: int = 0, drift: float = 0.1) -> Batch:
    """n ragged samples with gaps in their actions, and random numbers in every field that an update reads.

    drift: spread of old_logprobs around a level that a tiny random model gives, so that some ratios are clipped.
    """
    random = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=random).tolist()

    samples = []
    for i in range(n):
        response = integers(0, VOCAB_SIZE, integers(2, 9, 1)[0])
        actions = [bool(x) for x in integers(0, 4, len(response) - 1)] + [True]
        samples.append(sample(integers(0, VOCAB_SIZE, integers(1, 6, 1)[0]), response, actions, group_id=i // 2))
    batch = collate(samples, pad_id=0)

    def noise(scale: float = 1.0) -> Tensor:
        return torch.randn(batch.input_ids.shape, generator=random) * scale * batch.action_mask

    return batch.having(
        scores=torch.randn(n, generator=random),
        old_logprobs=noise(drift) - 4.0 * batch.action_mask,
        ref_logprobs=noise(drift) - 4.0 * batch.action_mask,
        old_values=noise(),
        advantages=noise(),
        returns=noise(),
    )


def tokenizer() -> Any:
    """A byte-level BPE tokenizer over TEXTS; its pad is not its EOS."""
    from pellucid.data import train_bpe

    return train_bpe(TEXTS, 290)


def save_models(folder: Path) -> Path:
    """A policy in folder/actor and a reward model in folder/reward, random weights, with their tokenizer."""
    from tiny_models import tiny_llama_gqa

    from pellucid.models import load_scalar_model

    words = tokenizer()
    eos, pad = words.eos_token_id, words.pad_token_id
    tiny_llama_gqa(vocab_size=len(words), eos_token_id=eos, pad_token_id=pad).save_pretrained(folder / "actor")
    reward = load_scalar_model(str(folder / "actor"), "cpu", "float32", pad, seed=3)
    reward.set_shift(0.25)
    reward.hf.save_pretrained(folder / "reward")
    for name in ("actor", "reward"):
        words.save_pretrained(folder / name)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    import json

    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ppo_config(models: Path, run_dir: Path, **overrides: Any) -> PPOConfig:
    """Two iterations of PPO over four prompts. Overrides are dotted with "__": algo__num_epochs=1; None drops a key."""
    prompts = run_dir.parent / "prompts.jsonl"
    if not prompts.exists():
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(prompts, [{"prompt": text[:12], "answer": i} for i, text in enumerate(TEXTS)])
    values: dict[str, Any] = {
        "run": {"dir": run_dir, "threads": 1, "device": "cpu", "precision": "float32"},
        "models": {"actor": str(models / "actor"), "reward": str(models / "reward")},
        "data": {"source": str(prompts)},
        "total_steps": 2,
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 6, "num_slots": 3},
        "algo": {"num_epochs": 2, "minibatch_size": 4, "micro_batch_size": 3},
        "actor_optimizer": {"lr": 1e-3},
        "critic_optimizer": {"lr": 1e-3},
    }
    for key, value in overrides.items():
        section, _, name = key.rpartition("__")
        place = values.setdefault(section, {}) if section else values
        place[name] = value
        if value is None:
            del place[name]
    return PPOConfig.model_validate(values)
