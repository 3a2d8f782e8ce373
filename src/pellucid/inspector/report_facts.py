"""What a run is, in sentences and tables, from its config, its summary and its metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pellucid.inspector.report_read import Run, number
from pellucid.inspector.report_terms import METRICS, SUMMARY, term_of_summary
from pellucid.inspector.report_text import figure

ADVANTAGES = {
    "gae": "GAE advantages (a critic)",
    "reinforce_pp": "REINFORCE++ advantages",
    "reinforce_pp_baseline": "REINFORCE++ advantages with a group baseline",
    "rloo": "RLOO advantages",
    "grpo": "GRPO advantages",
    "dr_grpo": "Dr. GRPO advantages",
}
LOSSES = {"ppo": "the clipped loss of PPO", "gspo": "the loss of GSPO", "cispo": "the loss of CISPO"}
HEADINGS = {"ppo": "PPO", "sft": "Supervised fine-tuning", "rm": "Reward model", "unknown": "Run"}


class Figure(NamedTuple):
    """A row of the summary table: value with its unit, and what it means."""

    label: str
    value: str
    unit: str
    meaning: str


class Progress(NamedTuple):
    """A row of the table of metrics: (value, step) at the first and last step that has it, and at the best."""

    metric: str
    label: str
    unit: str
    first: tuple[str, int]
    last: tuple[str, int]
    best: tuple[str, int] | None
    better: str


def describe(run: Run) -> str:
    """What the run does, from config.toml. `?` stands for a key that it lacks."""
    if not run.config:
        return "What was run is not known: config.toml cannot be read."
    describers = {"ppo": _describe_ppo, "sft": _describe_sft, "rm": _describe_rm}
    return (
        " ".join(describers[run.kind](_keys(run.config), run))
        if run.kind in describers
        else "A run of an unknown kind."
    )


def setting(run: Run) -> str:
    """Seed, precision and place; "" without a config. What precision `auto` became is in the record's manifests."""
    if not run.config:
        return ""
    keys = _keys(run.config)
    threads = keys("run.threads")
    with_threads = f", {threads} thread{'s' * (threads != 1)}" if isinstance(threads, int) and threads > 0 else ""
    precision = keys("run.precision")
    used = {str(w.get("precision")) for w in run.weights.values() if w.get("precision")}
    if precision == "auto" and len(used) == 1:
        precision = f"auto ({used.pop()})"
    return f"Seed {keys('run.seed')}, precision {precision}, device {keys('run.device')}{with_threads}."


def status(run: Run) -> str:
    """How far the run got, by metrics.jsonl and by whether there is a summary."""
    total = _keys(run.config)({"ppo": "total_steps"}.get(run.kind, "learn.max_steps"))
    of = f" of {figure(total)}" if isinstance(total, int) and total > 0 else ""
    state = "Finished" if run.summary is not None else "Not finished"
    return f"{state}: {figure(run.steps_done)}{of} steps in metrics.jsonl."


def summary_table(summary: dict[str, Any]) -> list[Figure]:
    """Known figures first, in the order of SUMMARY, then what else summary.json holds."""
    keys = [key for key in SUMMARY if key in summary] + [key for key in summary if key not in SUMMARY]
    rows = []
    for key in keys:
        term, value = term_of_summary(key), summary[key]
        share = number(value) if term.unit == "share" else None
        if share is not None:
            rows.append(Figure(term.label, f"{share:.1%}", "", term.meaning))
        else:
            rows.append(Figure(term.label, figure(value), term.unit if value is not None else "", term.meaning))
    return rows


def progress_table(run: Run) -> list[Progress]:
    rows = []
    for name, term in METRICS.items():
        points = run.points.get(name)
        if not points:
            continue
        best: tuple[int, float] | None = None
        if term.better:
            best = max(points, key=lambda p: p[1]) if term.better == "higher" else min(points, key=lambda p: p[1])
        first, last, top = (p and (figure(p[1]), p[0]) for p in (points[0], points[-1], best))
        assert first and last
        rows.append(Progress(name, term.label, term.unit, first, last, top, term.better))
    return rows


def _describe_ppo(keys: Callable[[str], Any], run: Run) -> list[str]:
    advantage, loss = keys("algo.advantage"), keys("algo.policy_loss")
    prompts, group = keys("rollout.prompts_per_step"), keys("rollout.samples_per_prompt")
    batch = prompts * group if isinstance(prompts, int) and isinstance(group, int) else "?"
    function, reward = keys("reward.function", None), keys("models.reward", None)
    sentences = [
        f"Reinforcement learning with {ADVANTAGES.get(str(advantage), advantage)} and {LOSSES.get(str(loss), loss)}: "
        f"{keys('total_steps')} steps of {batch} samples ({prompts} prompts × {group}) from {keys('data.source')}, "
        f"up to {keys('rollout.max_new_tokens')} tokens each, {keys('algo.num_epochs')} passes over each rollout in "
        f"minibatches of {keys('algo.minibatch_size')}.",
        f"Actor: {keys('models.actor')}{_size(run, 'actor')}; "
        f"reference: {keys('models.reference', 'the start of the actor')}; "
        f"reward: {f'the function {function}' if function else reward or '?'}{_size(run, 'reward')}"
        + (f"; critic: {_critic(keys)}{_size(run, 'critic')}." if advantage == "gae" else "; no critic."),
    ]
    where = {"reward": "taken off the reward", "loss": "in the loss"}.get(str(keys("algo.kl_in")), "?")
    if keys("algo.kl_coef") == 0:
        return [*sentences, "No KL penalty."]
    target = keys("algo.kl_target", None)
    steered = f", steered to {figure(target)} nats per sequence" if target is not None else ""
    return [*sentences, f"KL penalty: {figure(keys('algo.kl_coef'))} per nat, {where}{steered}."]


def _describe_sft(keys: Callable[[str], Any], _: Run) -> list[str]:
    if keys("model", None) is not None:
        start = f"Starts from {keys('model')}"
    else:
        start = (
            f"Starts from a new model ({keys('new_model.num_layers')} layers, hidden size {keys('new_model.hidden_size')}, "
            f"vocabulary {keys('new_model.vocab_size')})"
        )
    return [f"{start}, on {keys('data.source')}; {_learns(keys, 'examples')}."]


def _describe_rm(keys: Callable[[str], Any], _: Run) -> list[str]:
    return [f"Starts from {keys('model')}, on the preference pairs of {keys('data.source')}; "
            f"{_learns(keys, 'pairs')}."]  # fmt: skip


def _learns(keys: Callable[[str], Any], what: str) -> str:
    steps = keys("learn.max_steps")
    length = f"{steps} steps" if steps else f"{keys('learn.num_epochs')} passes over the data"
    return f"{length}, {keys('learn.batch_size')} {what} a step, peak learning rate {figure(keys('optimizer.lr'))}"


def _critic(keys: Callable[[str], Any]) -> str:
    fallback = "the reward model" if keys("models.reward", None) is not None else "the actor with a new head"
    return f"from {keys('models.critic', fallback)}"


def _size(run: Run, role: str) -> str:
    parameters = number(run.weights.get(role, {}).get("parameters"))
    return f" ({figure(parameters / 1e6)} M parameters)" if parameters else ""


def _keys(config: dict[str, Any]) -> Callable[..., Any]:
    """keys("algo.gamma") of a nested config; the default, or "?", where it is absent."""

    def keys(path: str, default: Any = "?") -> Any:
        node: Any = config
        for part in path.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return default if node is None or node == "none" else node

    return keys
