"""The road from a policy gradient to the full pipeline: eight chapters that run on the library's own code.

A chapter is a module with `run(lesson)`: it reads from top to bottom, measures the claims that it makes, and draws them. Its
text is docs/learn, in English and Chinese; its exercises are in `exercises/`.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple


class Chapter(NamedTuple):
    """seconds: how long it takes on two cores, about. threads: None for as many as there are cores; 1 where the networks are
    so small that others would only wait, and then the figures do not depend on the number of cores."""

    number: int
    module: str
    title: str
    title_zh: str
    seconds: int
    threads: int | None = None

    @property
    def slug(self) -> str:
        """The name of its pages in docs/learn and of its folder of results, such as 4-ppo."""
        return f"{self.number}-{self.module.removeprefix('chapter_')[2:].replace('_', '-')}"

    def load(self) -> Any:
        return importlib.import_module(f"pellucid.learn.{self.module}")


CHAPTERS = (
    Chapter(
        1,
        "chapter_1_trajectory",
        "Policy, trajectory, reward, state, action",
        "策略、轨迹、奖励、状态、动作",
        5,
        threads=1,
    ),
    Chapter(2, "chapter_2_policy_gradient", "Policy gradient", "策略梯度", 20, threads=1),
    Chapter(3, "chapter_3_actor_critic", "Value function and actor-critic", "价值函数与 actor-critic", 10, threads=1),
    Chapter(4, "chapter_4_ppo", "PPO", "PPO", 90, threads=1),
    Chapter(5, "chapter_5_language_model", "A language model as a policy", "把语言模型看成策略", 20),
    Chapter(6, "chapter_6_reward_model", "The reward model", "奖励模型", 60),
    Chapter(7, "chapter_7_kl", "The KL penalty", "KL 惩罚", 120),
    Chapter(8, "chapter_8_data_flow", "The whole data flow", "完整的数据流", 20),
)
