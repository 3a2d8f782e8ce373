"""A Python function as a reward source, called as TRL calls one: f(prompts, completions, **columns) -> list of floats."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pellucid.errors import ConfigError, RewardError
from pellucid.types import Sample, Score

LARGEST_SCORE = torch.finfo(torch.float32).max
"""Scores are trained on in float32."""


class FunctionReward:
    """Wraps f(prompts, completions, **columns).

    prompts: strings, or message lists where the data set is conversational; completions likewise. columns: the data
    set's other fields, and completion_ids, as lists with one entry a sample; only those that f names, unless it takes
    **kwargs. f returns one number, or None for "not applicable", per sample. Anything else is a RewardError that names
    the function and the sample.
    """

    def __init__(self, function: Callable[..., Any], tokenizer: Any, name: str | None = None) -> None:
        self.function, self.tokenizer = function, tokenizer
        self.name = name or getattr(function, "__name__", type(function).__name__)
        if inspect.iscoroutinefunction(function):
            raise RewardError(f"reward function {self.name} is async; give a plain function")
        self._accepts = _accepted_columns(function, self.name)

    def score(self, samples: list[Sample]) -> list[Score]:
        if not samples:
            return []
        returned = self._call(samples)
        if not _is_list(returned):
            raise RewardError(
                f"reward function {self.name} returned {type(returned).__name__} {returned!r:.60}; "
                f"it must return a list of {len(samples)} numbers, one for each sample"
            )
        if len(returned) != len(samples):
            raise RewardError(f"reward function {self.name} returned {len(returned)} scores for {len(samples)} samples")
        return [self._checked(value, sample) for value, sample in zip(returned, samples, strict=True)]

    def _call(self, samples: list[Sample]) -> Any:
        try:
            return self.function(**self._arguments(samples))
        except Exception as error:
            # The one place that meets a user's arbitrary code: whatever it raised, say where, and stop the run.
            sample = next((s for s in samples if self._raises(s)), None)
            where = f"on {_describe(sample, self._text(sample))}" if sample else f"on a batch of {len(samples)} samples"
            reason = " ".join(f"{type(error).__name__}: {error}".split())  # a message of many lines becomes one
            raise RewardError(f"reward function {self.name} raised {reason:.300} {where}") from error

    def _raises(self, sample: Sample) -> bool:
        try:
            self.function(**self._arguments([sample]))
        except Exception:
            return True
        return False

    def _checked(self, value: Any, sample: Sample) -> Score:
        if value is None:
            return Score(None, self.name)
        if hasattr(value, "item") and getattr(value, "shape", None) == ():
            value = value.item()  # a scalar of numpy or torch
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            wrong = f"{type(value).__name__} {value!r:.60}, not a number"
        elif not math.isfinite(value):
            wrong = f"{value}"
        elif abs(value) > LARGEST_SCORE:
            wrong = f"{value}, which is infinite in float32"
        else:
            return Score(float(value), self.name)
        raise RewardError(f"reward function {self.name} returned {wrong}, on {_describe(sample, self._text(sample))}")

    def _arguments(self, samples: list[Sample]) -> dict[str, Any]:
        columns = {name for sample in samples for name in sample.prompt.columns}
        arguments = {name: [s.prompt.columns.get(name) for s in samples] for name in sorted(columns)}
        arguments |= {"completion_ids": [s.response_ids for s in samples]}
        if self._accepts is not None:
            arguments = {name: value for name, value in arguments.items() if name in self._accepts}
        return arguments | {
            "prompts": [s.prompt.text for s in samples],
            "completions": [self._completion(s) for s in samples],
        }

    def _completion(self, sample: Sample) -> Any:
        text = self._text(sample)
        return text if isinstance(sample.prompt.text, str) else [{"role": "assistant", "content": text}]

    def _text(self, sample: Sample) -> str:
        return self.tokenizer.decode(sample.response_ids, skip_special_tokens=True)


def _is_list(value: Any) -> bool:
    """A list, or what stands for one: a tuple, an array, a tensor, a data frame's column. Not a set: it has no order."""
    if isinstance(value, (str, bytes, Mapping)) or getattr(value, "shape", None) == ():
        return False
    return hasattr(value, "__len__") and hasattr(value, "__getitem__")


def _accepted_columns(function: Callable[..., Any], name: str) -> set[str] | None:
    """Names of the columns that the function takes; None when it takes any."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some builtins show none
        parameters = {}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes_any and not {"prompts", "completions"} <= parameters.keys():
        raise RewardError(
            f"reward function {name}({', '.join(parameters)}) has an unknown signature; "
            "write f(prompts, completions, **columns)"
        )
    return None if takes_any else set(parameters)


def _describe(sample: Sample, text: str) -> str:
    return f"prompt {sample.prompt.id}, sample {sample.sample_index}, completion {text[:60]!r}"


def load_function(spec: str) -> Callable[..., Any]:
    """`file.py:name` or `package.module:name`. Raises ConfigError when there is no such thing."""
    module_name, colon, name = spec.rpartition(":")
    if not colon:
        raise ConfigError(f"{spec!r} is not a function; write file.py:name or package.module:name")
    is_file = module_name.endswith(".py")
    if is_file and not Path(module_name).is_file():
        raise ConfigError(f"{module_name}: no such file (for the function {name!r})")
    try:
        module = _load_file(Path(module_name)) if is_file else importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(f"{module_name}: cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{module_name} has no function {name!r}")
    return function


def _load_file(path: Path) -> Any:
    name = f"pellucid_user_{path.stem}"  # a file called json.py must not take the place of json
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "the suffix .py always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
