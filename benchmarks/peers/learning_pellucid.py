"""Pellucid's PPO on the learning task: one run is the whole training of one seed, and returns every batch's mean score.

options: algo. The workload's seeds: see `learning_trl.py`.
"""

from __future__ import annotations

from typing import Any

from learning_task import State, even_share, prepare
from ppo_pellucid import iteration, make_state, to_prompts
from worker import serve


class EvenShare:
    name = "even_share"

    def score(self, samples: list[Any]) -> list[Any]:
        from pellucid.types import Score

        return [Score(even_share(s.response_ids), self.name) for s in samples]


def measure(state: State) -> dict[str, Any]:
    spec, task = state.next_task()
    learner = make_state(spec, {**state.workload, "prompts": task["batches"][0]}, EvenShare(), task["seed"])
    runs = [iteration(learner, to_prompts(prompts)) for prompts in task["batches"]]
    return {
        "seconds": sum(run["seconds"] for run in runs),
        "tokens": sum(run["tokens"] for run in runs),
        "seed": task["seed"],
        "scores": [run["score"] for run in runs],
    }


if __name__ == "__main__":
    serve(prepare, measure)
