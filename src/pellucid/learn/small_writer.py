"""The quickstart's small language model after supervised fine-tuning: where the chapters on language models begin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pellucid.config import QuickstartConfig, RunConfig
from pellucid.data import (
    PreferenceExample,
    corpus_rows,
    ensure_pad,
    load_tokenizer,
    preference_examples,
    prompts_from,
)
from pellucid.metrics import Reporter
from pellucid.models import CausalLM, ScalarModel, load_causal_lm, load_scalar_model
from pellucid.stages.quickstart import stage_configs
from pellucid.stages.supervised import train_sft
from pellucid.types import Prompt, Sample, SamplingParams, derive_seed

MAX_NEW_TOKENS = 56
CONTEXT = 128


class Writer:
    """folder: the model and its tokenizer, which has seen the corpus's replies and no reward."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.tokenizer = load_tokenizer(folder)
        ensure_pad(self.tokenizer)

    def policy(self) -> CausalLM:
        """A copy of the language model."""
        return load_causal_lm(str(self.folder), "cpu", "float32")

    def scalar_model(self, seed: int) -> ScalarModel:
        """Another copy, with a new head for one number where the LM head was."""
        return load_scalar_model(str(self.folder), "cpu", "float32", self.tokenizer.pad_token_id, seed=seed)

    def prompts(self, name: str, count: int) -> list[Prompt]:
        """name: of a part of the corpus, "prompts" or "prompts_heldout"."""
        return prompts_from(corpus_rows(name, self.seed, count), self.tokenizer, CONTEXT)[0]

    def pairs(self, name: str, count: int) -> list[PreferenceExample]:
        """name: "preferences", a tenth of whose labels is swapped, or "preferences_heldout"."""
        return preference_examples(corpus_rows(name, self.seed, count), self.tokenizer, CONTEXT)[0]

    def params(self, purpose: str, step: int = 0, **changes: Any) -> SamplingParams:
        """How to sample; purpose and step settle the random numbers."""
        usual = {"max_new_tokens": MAX_NEW_TOKENS, "stop_token_ids": (self.tokenizer.eos_token_id,)}
        return SamplingParams(**usual | changes, seed=derive_seed(self.seed, purpose), step=step)

    def text(self, sample: Sample) -> str:
        return self.tokenizer.decode(sample.response_ids, skip_special_tokens=True)


@contextmanager
def small_writer(seed: int, steps: int) -> Iterator[Writer]:
    """A new model after `steps` updates on the corpus, as the quickstart makes one; its folder lives as long as the block."""
    with TemporaryDirectory() as folder:
        run = RunConfig(dir=Path(folder), seed=seed, device="cpu", precision="float32")
        sft, _, _ = stage_configs(QuickstartConfig(run=run, sft_steps=steps))
        train_sft(sft, reporter=Reporter(quiet=True))
        yield Writer(sft.run.dir / "actor", seed)
