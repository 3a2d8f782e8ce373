"""TRL's PPOTrainer on the learning task: one run is the whole training of one seed, and returns every batch's mean score.

The workload's seeds: a list of {"seed", "actor", "critic", "batches"}, of which each run takes the next; batches: the prompts
of each iteration. options: algo, micro_batch_size, rollout_batch_size: see `ppo_trl.py`.
"""

from __future__ import annotations

import time
from typing import Any

from learning_task import State, even_module, prepare
from ppo_trl import make_state
from worker import serve


def measure(state: State) -> dict[str, Any]:
    spec, task = state.next_task()
    reward = even_module(prompt_length=len(task["batches"][0][0]))
    trainer = make_state(spec, state.workload, task["batches"], reward, task["seed"])
    start = time.perf_counter()
    trainer.trainer.train()
    seconds = time.perf_counter() - start
    tokens = sum(map(len, task["batches"])) * state.workload["max_new_tokens"]
    return {"seconds": seconds, "tokens": tokens, "seed": task["seed"], "scores": trainer.scores}


if __name__ == "__main__":
    serve(prepare, measure)
