"""Decode steps as CUDA graphs.

A decode step is some thirty small kernels a layer, and the host takes longer to launch them than a GPU takes to run them. A
graph is a step's kernels recorded once, with the addresses that they read and write, and launched as one. So that few are
recorded, a step is rounded up in both directions, to more slots and to more columns of the cache:

    slots    1, 2, 4, 8, 16, 24, ... 64, 80, 96, ...        columns    128, 256, ... 1024, 1280, ...

A step with prompts in it runs as it would without graphs.

Addresses must stay. Recording a graph takes as long as several steps, and a rollout is some hundred, so graphs serve many
rollouts: the cache is kept between them, and weights are copied to where they were (`LlamaModel.refresh`). Training does not
get that memory, so this is done only where the cache is at most an eighth of the GPU's (`KEPT`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from pellucid.models import Packed, Serving
from pellucid.rollout.embedded_cache import LayerShape, SlotCache, cache_bytes
from pellucid.rollout.embedded_checks import available_bytes, check_memory
from pellucid.rollout.embedded_models import ServedModel

LOG = logging.getLogger(__name__)
KEPT = 8
"""A cache of more than this part of the GPU's memory is not kept. GPUs take some three milliseconds to read an eighth, about
what the host takes to launch a step: with a larger cache it is not launches that a full step waits for."""
SLOTS, COLUMNS = 8, 128
"""What slots and columns are rounded up to multiples of."""


class Recorder(Protocol):
    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Returns what does again, on the same memory, what `step` does. It may run `step` several times."""
        ...


class FixedModel(ServedModel, Protocol):
    """A ServedModel that can be recorded."""

    def reads(self) -> list[Tensor]:
        """All that `logits` reads besides its arguments. It stays where it is from refresh to refresh, as far as it can."""
        ...


def graphed(served: FixedModel, device: torch.device) -> ServedModel:
    """The same model, with graphs if it is on a GPU."""
    if device.type != "cuda":
        return served
    memory = torch.cuda.get_device_properties(device).total_memory
    return GraphedModel(served, lambda: CudaRecorder(device), memory // KEPT)


class GraphedModel:
    """A ServedModel. Logits of a decode step are good until the next one.

    new_recorder: called for every set of graphs. keep: bytes of the largest cache that is kept.
    """

    any_rows = False

    def __init__(self, inner: FixedModel, new_recorder: Callable[[], Recorder], keep: int) -> None:
        self.dtype = inner.dtype
        self.captures = 0
        self.failure: str | None = None
        """Why there are no graphs any more."""
        self._inner, self._new_recorder, self._keep = inner, new_recorder, keep
        self._graphs: _Graphs | None = None
        self._too_large = False
        self._addresses: list[int] = []

    @property
    def status(self) -> str:
        """For people: what has come of the graphs so far."""
        why_not = "the cache is too large to be kept" if self._too_large else self.failure
        return f"{self.captures} captured" + (f", none any more: {why_not}" if why_not else "")

    def cache(self, layers: list[LayerShape], num_slots: int, length: int, device: torch.device) -> SlotCache:
        """For a rollout of so many slots and tokens: the kept one if it is large enough, cleared, or a new one.

        Raises ConfigError if it would not fit into memory.
        """
        rows, columns = num_slots, _multiple(length, COLUMNS)
        if self._graphs is not None:
            cache = self._graphs.cache
            if num_slots <= cache.num_slots and length <= cache.length:
                cache.clear()
                return cache
            # Large enough for both, or two kinds of rollout in turn would drive out each other's.
            rows, columns = max(rows, cache.num_slots), max(columns, cache.length)
            del cache
            self._graphs = None  # before memory for a larger one is asked for
        available = available_bytes(device)
        room = self._keep if available is None else min(self._keep, available)
        self._too_large = cache_bytes(layers, rows, columns) > room
        if self.failure is None and not self._too_large:
            self._graphs = _Graphs(SlotCache(layers, rows, columns, device), self._inner, self._new_recorder())
            return self._graphs.cache
        check_memory(layers, num_slots, length, device)
        return SlotCache(layers, num_slots, length, device)

    def refresh(self, length: int) -> None:
        self._inner.refresh(length)
        addresses = [tensor.data_ptr() for tensor in self._inner.reads()]
        if self._graphs is not None and addresses != self._addresses:
            self._graphs = _Graphs(self._graphs.cache, self._inner, self._new_recorder())
        self._addresses = addresses

    def release(self) -> None:
        """Only where no graph will read it again."""
        if self._graphs is None:
            self._inner.release()

    def logits(self, tokens: Tensor, positions: Tensor, layout: Serving, cache: SlotCache) -> Tensor:
        graphs, rows = self._graphs, cache.aim.rows
        if layout.prompts.lengths or graphs is None or cache is not graphs.cache:
            return self._inner.logits(tokens, positions, layout, cache)
        shape = graphs.take(tokens, positions, layout.length)
        if shape not in graphs.replays:
            try:
                graphs.capture(shape)
            except Exception as error:  # whatever it is: without graphs the step is right, or raises it again
                self._give_up(error)
                cache.aim.rows, cache.aim.positions = rows, positions
                return self._inner.logits(tokens, positions, layout, cache)
            self.captures += 1
        return graphs.replay(shape)[: len(tokens)]

    def _give_up(self, error: Exception) -> None:
        """For good: what a failed capture leaves behind in PyTorch does not make a second one likelier to succeed."""
        first = error.__context__ or error  # ending a capture that went wrong raises once more
        self.failure = f"{type(first).__name__}: {(str(first).splitlines() or [''])[0]}"
        self._graphs = None
        LOG.warning(
            "rollout: a decode step cannot be captured as a CUDA graph (%s). Sampling goes on without graphs, as right and "
            "slower.",
            self.failure,
        )


class _Graphs:
    """The graphs over one cache and one set of weights, and the memory through which they are given their inputs."""

    def __init__(self, cache: SlotCache, inner: ServedModel, recorder: Recorder) -> None:
        device, count = cache.layers[0].keys.device, cache.num_slots
        self.cache, self.replays = cache, dict[tuple[int, int], Callable[[], None]]()
        self._inner, self._recorder = inner, recorder
        self._tokens, self._positions = (torch.zeros(count, dtype=torch.int64, device=device) for _ in range(2))
        self._rows = torch.arange(count, device=device)
        self._logits: Tensor | None = None

    def take(self, tokens: Tensor, positions: Tensor, length: int) -> tuple[int, int]:
        """The inputs of a step over the rows 0..n-1. Returns the (slots, columns) that it is rounded up to.

        The rows that are added are free ones. They write to their own column 0, which the next request in the row overwrites
        before anything else reads it. And they see that column, for a row that saw none would write the NaN of an empty
        softmax to the cache, where 0 * NaN spoils every later request.
        """
        n = len(tokens)
        shape = rounded(n, length, self.cache)
        self._tokens[:n].copy_(tokens)
        self._positions[:n].copy_(positions)
        self._positions[n:].zero_()
        return shape

    def capture(self, shape: tuple[int, int]) -> None:
        # The step runs before it is recorded, on this step's inputs: it writes to the cache what the step is to write.
        self.replays[shape] = self._recorder.capture(partial(self._step, *shape))

    def replay(self, shape: tuple[int, int]) -> Tensor:
        """(slots, V), with the rows that were added."""
        self.replays[shape]()
        assert self._logits is not None
        return self._logits[: shape[0]]

    def _step(self, slots: int, columns: int) -> None:
        """What is recorded: nothing here may depend on anything but the shape and what is at fixed addresses."""
        tokens, positions = self._tokens[:slots], self._positions[:slots]
        self.cache.aim.rows, self.cache.aim.positions = self._rows[:slots], positions
        # A new layout each time, for it remembers its bias, which is to be made from the positions of the replay.
        layout = Serving(positions, columns, True, Packed(()), self.cache.views(slots, columns))
        logits = self._inner.logits(tokens, positions, layout, self.cache)
        if self._logits is None:
            self._logits = logits.new_empty(len(self._rows), logits.shape[1])
        # One memory for all graphs: each would otherwise keep logits of its own, gigabytes with a large vocabulary.
        self._logits[:slots].copy_(logits)


def rounded(n: int, length: int, cache: SlotCache) -> tuple[int, int]:
    """n slots and `length` columns, rounded up as the head of this file says, within the cache."""
    slots = min(1 << (n - 1).bit_length(), _multiple(n, SLOTS), cache.num_slots)
    return slots, min(_multiple(length, COLUMNS), cache.length)


def _multiple(count: int, grain: int) -> int:
    """count, rounded up to a multiple of grain; from 8 grains on in four steps from one power of two to the next."""
    grain = max(grain, 1 << max((count - 1).bit_length() - 3, 0))
    return -(-count // grain) * grain


class CudaRecorder:
    """Its graphs share one memory pool: they never run at the same time, and none reads there what another has left.

    A pool cannot be used again once all its graphs are gone, so a set of graphs has a recorder of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                step()  # libraries set themselves up on the first call, which cannot be recorded
                with _no_waiting():
                    step()
        finally:
            current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # The outer context, because torch.cuda.graph leaves its stream the current one if the capture fails at its end. Other
        # threads may do what they like: their work is not recorded.
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            step()
        return graph.replay


@contextmanager
def _no_waiting() -> Iterator[None]:
    """RuntimeError where the host waits for the GPU, which a graph cannot. Found here, it leaves PyTorch intact; found by a
    capture, it leaves the allocator and the random state as if the capture went on."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that it does not find everything
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
