"""Batches for ever, in an order that three numbers describe: seed, epoch, cursor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import torch

from pellucid.errors import DataError

T = TypeVar("T")


class Loader(Generic[T]):
    """Endless batches of `batch_size` items.

    The order of an epoch is a permutation derived from (seed, epoch) alone, or the given order without
    `shuffle`. A batch that reaches the end of an epoch is filled up from the next one, so every batch is full
    and each item is seen once per epoch. A batch larger than the data set spans several epochs and holds
    items more than once.

    epoch, cursor: where the next batch starts. Because they say everything, batch_size may change on resume.
    Raises DataError for no items, and on load_state_dict for a state of other data or another seed.
    """

    def __init__(self, items: Sequence[T], seed: int, batch_size: int, shuffle: bool = True) -> None:
        if not items:
            raise DataError("the loader has no items: the data set is empty, or every row was skipped")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, must be at least 1")
        self.items, self.seed, self.batch_size, self.shuffle = items, seed, batch_size, shuffle
        self.epoch, self.cursor = 0, 0
        self._order = self._permutation()

    def __iter__(self) -> Iterator[list[T]]:
        return self

    def __next__(self) -> list[T]:
        batch: list[T] = []
        while len(batch) < self.batch_size:
            if self.cursor == len(self.items):
                self.epoch, self.cursor = self.epoch + 1, 0
                self._order = self._permutation()
            taken = self._order[self.cursor : self.cursor + self.batch_size - len(batch)]
            self.cursor += len(taken)
            batch += [self.items[i] for i in taken]
        return batch

    def _permutation(self) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.items)))
        digest = hashlib.blake2b(f"{self.seed}/{self.epoch}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randperm(len(self.items), generator=generator).tolist()

    def state_dict(self) -> dict[str, int]:
        """Plain integers, for a checkpoint."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "cursor": self.cursor,
            "size": len(self.items),
            "shuffle": int(self.shuffle),
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where the state was taken."""
        for name, here in self.state_dict().items():
            if name in ("seed", "size", "shuffle") and state[name] != here:
                raise DataError(
                    f"cannot resume the data order: {name} was {state[name]} when the state was saved, "
                    f"and is {here} now"
                )
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        self._order = self._permutation()
