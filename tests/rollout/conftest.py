"""Prompts and models shared by the rollout tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_llama_gqa
from transformers import PreTrainedModel

from pellucid.types import Prompt


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and lose much to them where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each architecture in turn."""
    return ARCHITECTURES[request.param]()


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_llama_gqa()


@pytest.fixture
def ragged_prompts() -> Callable[..., list[Prompt]]:
    """n prompts of 1 to `longest` random tokens."""

    def make(n: int, longest: int = 9) -> list[Prompt]:
        random = torch.Generator().manual_seed(n)
        lengths = torch.randint(1, longest + 1, (n,), generator=random).tolist()
        return [
            Prompt(i, torch.randint(VOCAB_SIZE, (length,), generator=random).tolist(), "")
            for i, length in enumerate(lengths)
        ]

    return make
