"""The reward model's shift: scores are defined up to a constant, so put the reference's own samples at 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pellucid.config import RMConfig
from pellucid.models import ScalarModel, load_causal_lm, resolve_device, resolve_precision
from pellucid.rewards import ModelReward
from pellucid.rollout import EmbeddedEngine
from pellucid.stages.inputs import load_prompts, stop_ids
from pellucid.stages.scoring import raw_scores
from pellucid.types import SamplingParams, derive_seed


def center_scores(config: RMConfig, model: ScalarModel, tokenizer: Any, say: Callable[[str], None]) -> dict[str, float]:
    """Set the model's shift so that samples of the reference policy score 0 on average.

    Returns {"score_shift", "reference_score_std"}, or {} when config.center_prompts is 0. The spread of those samples'
    scores is the natural unit of the reward.
    """
    if not config.center_prompts:
        return {}
    device = resolve_device(config.run.device)
    path = config.reference or config.model
    reference = load_causal_lm(path, device, resolve_precision(config.run.precision, device))
    prompts = load_prompts(config.center_data or config.data, tokenizer, config.run.seed, lambda _: None)
    params = SamplingParams(
        max_new_tokens=config.max_new_tokens,
        stop_token_ids=stop_ids(tokenizer, reference),
        seed=derive_seed(config.run.seed, "centering"),
    )
    samples = EmbeddedEngine(reference.hf, num_slots=64).generate(prompts[: config.center_prompts], params)
    scores = raw_scores(samples, ModelReward(model, batch_size=64))
    model.set_shift(model.shift + scores.mean().item())
    say(
        f"score shift {model.shift:.4f}: {len(samples)} samples of {path} now score 0 on average, std {scores.std():.4f}"
    )
    return {"score_shift": model.shift, "reference_score_std": scores.std().item()}
