"""The reward model's shift: scores are defined up to a constant, so put the reference's own samples at 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pellucid.config import RMConfig
from pellucid.data import locate
from pellucid.models import ScalarModel, load_causal_lm, resolve_device, resolve_precision
from pellucid.rewards import ModelReward
from pellucid.rollout import EmbeddedEngine
from pellucid.stages.inputs import load_prompts, require_room, stop_ids
from pellucid.stages.scoring import raw_scores
from pellucid.types import Sample, SamplingParams, derive_seed


def reference_samples(config: RMConfig, tokenizer: Any) -> list[Sample]:
    """One sample of the reference policy for each of config.center_prompts prompts; [] when that is 0.

    They do not depend on the reward model, so they are drawn before its training: what is wrong with the reference or
    the prompts is said then, and not hours later.
    """
    if not config.center_prompts:
        return []
    path = config.reference or config.model
    locate(path, "reference", ("config.json",))
    device = resolve_device(config.run.device)
    reference = load_causal_lm(path, device, resolve_precision(config.run.precision, device))
    data = config.center_data or config.data
    prompts = load_prompts(data, tokenizer, config.run.seed, lambda _: None)[: config.center_prompts]
    params = SamplingParams(
        max_new_tokens=config.max_new_tokens,
        stop_token_ids=stop_ids(tokenizer, reference),
        seed=derive_seed(config.run.seed, "centering"),
    )
    require_room(prompts, params, reference, data)
    return EmbeddedEngine(reference.hf, num_slots=64).generate(prompts, params)


def center_scores(model: ScalarModel, samples: list[Sample], say: Callable[[str], None]) -> dict[str, float]:
    """Set the model's shift so that these samples of the reference policy score 0 on average.

    Returns {"score_shift", "reference_score_std"}, or {} when there are none. The spread of those samples' scores is
    the natural unit of the reward.
    """
    if not samples:
        return {}
    scores = raw_scores(samples, ModelReward(model, batch_size=64))
    model.set_shift(model.shift + scores.mean().item())
    std = scores.std(correction=0).item()
    say(f"score shift {model.shift:.4f}: {len(samples)} samples of the reference now score 0 on average, std {std:.4f}")
    return {"score_shift": model.shift, "reference_score_std": std}
