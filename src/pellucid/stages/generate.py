"""Samples from a saved policy."""

from __future__ import annotations

import json
import sys
from typing import Any

from pellucid.config import DataConfig, GenerateConfig
from pellucid.data import Rows, as_chat, prompts_from
from pellucid.files import atomic_write
from pellucid.metrics import Reporter
from pellucid.models import load_causal_lm, resolve_device
from pellucid.rollout import local_engine
from pellucid.stages.inputs import load_prompts, load_run_tokenizer, stop_ids
from pellucid.types import SamplingParams


def generate(config: GenerateConfig, reporter: Reporter | None = None) -> list[dict[str, Any]]:
    """One dict per sample: prompt, completion, logprob (nats, of the whole response), tokens, stop_reason.

    Prints them, or writes them to config.output as JSONL. Raises PellucidError for a model or prompt it cannot use.
    """
    reporter = reporter or Reporter()
    device = resolve_device(config.device)
    data = config.data or DataConfig(source="command line")
    tokenizer = load_run_tokenizer(config.model, data)
    model = load_causal_lm(config.model, device, "float32", packing=False)
    if config.data:
        prompts = load_prompts(config.data, tokenizer, config.seed, reporter.say)
    else:
        rows = Rows([{"prompt": text} for text in config.prompt], "--prompt")
        prompts, _ = prompts_from(as_chat(rows) if config.as_chat else rows, tokenizer, sys.maxsize)
    params = SamplingParams(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop_token_ids=stop_ids(tokenizer, model),
        samples_per_prompt=config.samples_per_prompt,
        seed=config.seed,
    )
    samples = local_engine(config.engine, model.hf, config.num_slots, "float32").generate(prompts, params)
    rows = [
        {
            "prompt": sample.prompt.text,
            "completion": tokenizer.decode(sample.response_ids, skip_special_tokens=True),
            "logprob": sum(sample.rollout_logprobs),
            "tokens": len(sample.response_ids),
            "stop_reason": sample.stop_reason,
        }
        for sample in samples
    ]
    if config.output:
        atomic_write(config.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        reporter.say(f"{len(rows)} samples in {config.output}")
    else:
        for row in rows:
            figures = f"{row['tokens']} tokens, {row['logprob']:.2f} nats"
            reporter.say(f"{_spoken(row['prompt'])}│{row['completion']}\n  {figures}\n")
    return rows


def _spoken(prompt: str | list[dict[str, Any]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt) + "\n"
