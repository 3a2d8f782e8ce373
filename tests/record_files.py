"""The files of a synthetic run directory, one writer each; see `records.py`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Arrays = dict[str, np.ndarray]

PAD, END = 0, 1
WORDS = (
    " the a lamp is on it of and light window shade bulb switch desk bright warm quiet buy good very not this that with for"
    " price box table paper room night read small large green blue old new broken cheap best never always"
).split()
PHASES = (  # name, role, kind, microseconds per token
    ("generate", "rollout", "token by token", 400), ("score", "reward", "all at once", 20),
    ("old_logprobs", "actor", "all at once", 25), ("ref_logprobs", "reference", "all at once", 25),
    ("values", "critic", "all at once", 22), ("advantages", "driver", "driver", 1), ("update_critic", "critic", "update", 90),
    ("update_actor", "actor", "update", 100), ("sync_weights", "rollout", "driver", 2),
)  # fmt: skip
LATE_PHASES = (
    ("evaluate", "rollout", "token by token", 100), ("record", "driver", "driver", 5), ("checkpoint", "driver", "driver", 9),
)  # fmt: skip
ROLES = ("driver", "rollout", "actor", "reference", "critic", "reward")
TENSORS = (  # producer, phase, names, whether of the last epoch
    ("rollout/0", "generate", "input_ids attention_mask position_ids response_mask action_mask ended bootstrap_values "
     "rollout_logprobs", False),
    ("reward/0", "score", "scores", False), ("actor/0", "old_logprobs", "old_logprobs entropy", False),
    ("reference/0", "ref_logprobs", "ref_logprobs", False), ("critic/0", "values", "old_values", False),
    ("driver/0", "advantages", "kl rewards advantages returns", False),
    ("critic/0", "update_critic", "values value_clipped value_grads", True),
    ("actor/0", "update_actor", "logprobs log_ratio ratio clipped logprob_grads", True),
)  # fmt: skip
FIRST_SECOND = 1_700_000_000
"""When the synthetic runs start, in seconds since the epoch."""


def where(mask: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x, as float32, where the mask is True; 0 elsewhere."""
    return np.where(mask, x, 0).astype(np.float32)


def vocabulary(texts: list[str]) -> list[bytes]:
    """Bytes of each token: two special ones, the texts, all single bytes, some words, and characters cut in two."""
    hostile = [text.encode("utf-8", "surrogatepass") for text in texts]
    words = [f" {word}".encode() for word in WORDS] + [b".", b",", b"\n"]
    cut = [b"\xe2\x82", b"\xac", " 灯".encode(), b" \xf0\x9f", b"\x92\xa1", "é".encode()]
    return [b"<|pad|>", b"<|end|>", *hostile, *(bytes([i]) for i in range(256)), *words, *cut]


def write_vocabulary(path: Path, pieces: list[bytes]) -> None:
    special = [i in (PAD, END) for i in range(len(pieces))]
    pq.write_table(pa.table({"id": range(len(pieces)), "bytes": pieces, "special": special}), path)


def write_rollout(path: Path, t: Arrays, rows: np.ndarray, pieces: list[bytes], step: int, alternatives: int) -> None:
    """The step's Parquet file: a row per sample, row groups of 64."""
    n, count, full = len(rows), t["length"][rows], t["attention_mask"][rows]
    named = ("prompt_id", "group_ids", "sample_index", "policy_version", "stop_reason", "scores")
    columns: dict[str, Any] = {name: t[name][rows] for name in named} | {
        "schema_version": np.full(n, 1, np.int32), "step": np.full(n, step, np.int32), "row": rows.astype(np.int32),
        "prompt": texts(t, rows, "prompt", pieces), "response": texts(t, rows, "response", pieces),
        "num_action_tokens": np.full(n, t["action_mask"].sum()), "length": count,
        "kl_sequence": t["kl"][rows].sum(1), "reward_sum": t["rewards"][rows].sum(1),
        "advantage_mean": t["advantages"][rows].sum(1) / count, "entropy_mean": t["entropy"][rows].sum(1) / count,
        "clipped_share": t["clipped"][rows].sum(1) / count, "minibatch": t["minibatch"][rows],
    }  # fmt: skip
    columns = {k: v.astype(np.float32) if getattr(v, "dtype", None) == np.float64 else v for k, v in columns.items()}
    columns |= {k: t[k][rows] for k in ("actor_denominator", "critic_denominator") if k in t}
    offsets = pa.array(np.concatenate([[0], np.cumsum(full.sum(1))]), pa.int32())
    for name, x in t.items():
        if x.ndim == 2:
            columns[name] = pa.ListArray.from_arrays(offsets, pa.array(x[rows][full]))
    if alternatives:
        ids, old, mask = (t[name][rows][full] for name in ("input_ids", "old_logprobs", "action_mask"))
        ids, logprobs = likeliest(ids, old, mask, alternatives, len(pieces))
        inner = pa.array(np.arange(len(ids) + 1) * alternatives, pa.int32())
        for name, x in (("top_ids", ids), ("top_logprobs", logprobs)):
            columns[name] = pa.ListArray.from_arrays(offsets, pa.ListArray.from_arrays(inner, pa.array(x.ravel())))
    table = pa.table(columns).replace_schema_metadata({"pellucid.schema_version": "1", "pellucid.version": "0.1.0"})
    pq.write_table(table, path, row_group_size=64, compression="zstd", use_dictionary=["stop_reason"])


def texts(t: Arrays, rows: np.ndarray, part: str, pieces: list[bytes]) -> list[str]:
    """The prompt or the response of each row, without special tokens."""
    bytes_of = [b"", b"", *pieces[2:]]
    middle, end = t["prompt_length"], t["prompt_length"] + t["length"]
    parts = [slice(0, middle[i]) if part == "prompt" else slice(middle[i], end[i]) for i in rows]
    ids = (t["input_ids"][i, tokens].tolist() for i, tokens in zip(rows, parts, strict=True))
    return [b"".join([bytes_of[k] for k in row]).decode("utf-8", "replace") for row in ids]


def likeliest(
    ids: np.ndarray, logprobs: np.ndarray, mask: np.ndarray, k: int, num_pieces: int
) -> tuple[np.ndarray, np.ndarray]:
    """(N,k) ids and log-probs, likeliest first: the sampled token among others that share what probability it leaves."""
    share = 0.5 ** np.arange(1, k + 1)
    others = np.maximum(1 - np.exp(logprobs.astype(np.float64)), 1e-9)[:, None] * share
    all_ids = np.concatenate([ids[:, None], (ids[:, None] + 1 + 7 * np.arange(k)) % num_pieces], 1)
    all_logprobs = np.concatenate([logprobs[:, None], np.log(others)], 1)
    order = np.argsort(-all_logprobs, 1)[:, :k]
    top_ids, top = np.take_along_axis(all_ids, order, 1), np.take_along_axis(all_logprobs, order, 1)
    return np.where(mask[:, None], top_ids, 0), where(mask[:, None], top)


def manifest_of(
    t: Arrays,
    step: int,
    recorded: int,
    a: dict[str, Any],
    whitening: dict[str, float] | None,
    metrics: dict[str, float],
) -> dict[str, Any]:
    """The step's manifest. The weights are invented; their hash differs from version to version."""
    B, T = t["input_ids"].shape
    tensors = []
    for producer, phase, names, of_last_epoch in TENSORS:
        version = 0 if phase in ("score", "ref_logprobs") else step - 1
        source = {"producer": producer, "phase": phase, "weight_version": version}
        source |= {"epoch": a["num_epochs"]} if of_last_epoch else {}
        tensors += [entry(t, name, source) for name in names.split() if name in t]
    size = {"parameters": 7_160_000, "bytes": 28_640_000, "dtype": "float32", "precision": "bfloat16"}
    versions = {"actor": step, "reference": 0, "critic": step, "reward": 0}
    weights = [
        {"role": role, "version": version, "hash": digest(f"{role} {version}".encode())} | size
        for role, version in versions.items()
        if role != "critic" or "values" in t
    ]
    return {
        "schema_version": 1, "pellucid": "0.1.0", "step": step, "samples": B, "recorded": recorded,
        "num_action_tokens": int(t["action_mask"].sum()), "width": T, "algorithm": a, "whitening": whitening,
        "tensors": tensors, "weights": weights, "metrics": metrics,
    }  # fmt: skip


def entry(t: Arrays, name: str, source: dict[str, Any]) -> dict[str, Any]:
    """A tensor of the manifest: figures over actions for (B,T), over samples for (B,); the hash is over unpadded values."""
    x = t[name]
    used = x[t["action_mask"]] if x.ndim == 2 else x
    unpadded = np.ascontiguousarray(x[t["attention_mask"]] if x.ndim == 2 else x)
    figures: dict[str, Any] = dict.fromkeys(("mean", "std", "min", "max", "histogram")) | {"count": len(used)}
    if x.dtype == bool:
        figures["mean"] = float(used.mean())
    elif x.dtype.kind == "f":
        low, high = float(used.min()), float(used.max())
        edges = (low, high) if high > low else (low - 0.5, low + 0.5)
        counts, edges = np.histogram(used.astype(np.float64), 48, edges)
        mean, std = float(used.mean(dtype=np.float64)), float(used.std(dtype=np.float64))
        figures |= {"mean": mean, "std": std, "min": low, "max": high}
        figures["histogram"] = {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}
    size = {"dtype": str(x.dtype), "shape": list(x.shape), "bytes": x.nbytes, "hash": digest(unpadded.tobytes())}
    return {"name": name} | source | size | figures


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class Spans:
    """spans.json as it grows: one row of the timeline per role."""

    def __init__(self) -> None:
        self.now = 0
        self.events: list[dict[str, Any]] = []
        for pid, role in enumerate(ROLES):
            self.events.append({"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": role}})
            self.events.append({"name": "thread_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": "rank 0"}})

    def step(self, step: int, tokens: int, evaluates: bool, critic: bool) -> dict[str, float]:
        """Adds the phases of a step, one after the other; returns their seconds."""
        seconds = {}
        for name, role, kind, per_token in (*PHASES, *(LATE_PHASES if evaluates else LATE_PHASES[1:2])):
            if role == "critic" and not critic:
                continue
            args = {"step": step, "role": role, "rank": 0, "kind": kind, "tokens": tokens}
            span = {"name": name, "cat": "phase", "ph": "X", "pid": ROLES.index(role), "tid": 0}
            self.events.append(span | {"ts": FIRST_SECOND * 10**6 + self.now, "dur": tokens * per_token, "args": args})
            self.now += tokens * per_token + 150
            seconds[name] = tokens * per_token / 1e6
        return seconds

    def text(self, closed: bool) -> str:
        return "[\n" + ",\n".join(json.dumps(event) for event in self.events) + ("\n]\n" if closed else ",\n")


def evaluation(path: Path, step: int, seed: int) -> dict[str, float]:
    """Writes eval/step-NNNNNN.jsonl; returns its metrics."""
    scores = np.random.default_rng((seed, step, 1)).normal(0.2 * step, 1, 16)
    same = {"completion": " the lamp is warm", "kl": 0.1 * step, "tokens": 5, "stop_reason": "stop"}
    rows = [same | {"prompt": f"prompt {i}", "score": float(score)} for i, score in enumerate(scores)]
    (path / f"eval/step-{step:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"eval/score": float(scores.mean()), "eval/kl": 0.1 * step, "eval/length": 5.0, "eval/stopped": 1.0}


def config_toml(
    name: str, a: dict[str, Any], steps: int, samples: int, seed: int, recorded: int, alternatives: int
) -> str:
    """A resolved config; "none" stands for an absent key, as TOML has no null."""
    outside = ("temperature", "max_new_tokens", "missing_eos_penalty", "reward_clip")
    sections: dict[str, dict[str, Any]] = {
        "run": {"dir": f"runs/{name}", "seed": seed},
        "models": {"actor": "sft/actor", "reward": "reward_model"},
        "data": {"source": "corpus:prompts"},
        "rollout": {"prompts_per_step": samples} | {key: a[key] for key in outside[:3]},
        "reward": {"clip": a["reward_clip"]},
        "algo": {key: value for key, value in a.items() if key not in outside},
        "trace": {"samples": recorded, "alternatives": alternatives},
    }
    lines = [f"total_steps = {steps}"]
    for section, keys in sections.items():
        lines += ["", f"[{section}]", *(f"{key} = {json.dumps('none' if v is None else v)}" for key, v in keys.items())]
    return "\n".join(lines) + "\n"


def write_stage(path: Path, metric: str, seed: int) -> None:
    """A run directory of a stage before PPO: metrics, no rollouts."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.toml").write_text(f'[run]\ndir = "{path.name}"\nseed = {seed}\n')
    rows = [{"step": k, metric: 3 / k, "optimizer/lr": 1e-3} for k in range(1, 11)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "summary.json").write_text(json.dumps({"steps": 10, "seconds": 1.0, "seed": seed}))
