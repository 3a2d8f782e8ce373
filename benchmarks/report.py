"""docs/benchmarks.md, made from benchmarks/results/*.json and from nothing else.

python -m benchmarks.report             writes the page
python -m benchmarks.report --check     exit code 2 if the page is not what the results say
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, BenchmarkError, main

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
TITLES = {
    "rollout": "Rollout",
    "ppo_iteration": "One PPO iteration",
    "grpo_iteration": "One GRPO iteration",
    "learner": "Learner",
    "learning": "Learning per sample",
    "memory": "Memory",
    "scaling": "Cost growth",
    "gym": "Environments",
    "gym_returns": "Returns in environments",
    "trace": "The record",
    "inspector": "The page",
    "gpu": "GPU",
}
"""In the order of the page."""
ORDER = tuple(TITLES)
HEAD = """# Benchmarks

Made by `python -m benchmarks.report` from the JSON files in [benchmarks/results](../benchmarks/results); not edited by hand.
How to run each benchmark, and how the peers are set up: [benchmarks/README.md](../benchmarks/README.md).

Figures are medians over the rounds, with the least and the greatest in parentheses. Contestants run in turn, one at a
time. A ratio is taken in every round, and its median is given; above 1, Pellucid is the faster.
"""


def command(arguments: list[str]) -> None:
    if arguments not in ([], ["--check"]):
        raise BenchmarkError(f"benchmarks.report knows --check and nothing else, not {' '.join(arguments)!r}")
    text = page(results(RESULTS))
    if not arguments:
        PAGE.write_text(text)
        print(f"written: {PAGE}")
    elif not PAGE.exists() or PAGE.read_text() != text:
        raise BenchmarkError(f"{PAGE} is not what the results say; run python -m benchmarks.report")


def results(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, in the order of the page. Raises BenchmarkError for a file that is not a result."""
    found = []
    for path in folder.glob("*.json"):
        try:
            result = json.loads(path.read_text())
            found.append((ORDER.index(path.stem) if path.stem in ORDER else len(ORDER), path.stem, result))
            missing = {"benchmark", "command", "date", "machine", "bars"} - set(result)
        except (json.JSONDecodeError, TypeError) as error:
            raise BenchmarkError(f"{path} is not a benchmark's result: {error}") from None
        if missing:
            raise BenchmarkError(f"{path} is not a benchmark's result: it has no {', '.join(sorted(missing))}")
    return [result for _, _, result in sorted(found, key=lambda entry: entry[:2])]


def page(found: list[dict[str, Any]]) -> str:
    """The whole page."""
    return "\n".join([HEAD, *(_section(result) for result in found)])


def _section(result: dict[str, Any]) -> str:
    name = result["benchmark"]
    parts = [f"## {TITLES.get(name, name)}", f"`{result['command']}`, {result['date']}. {_machine(result['machine'])}"]
    parts += result.get("notes", [])
    if result["bars"]:
        parts += ["| | measured | bar | |\n|---|---|---|---|\n" + "\n".join(map(_bar, result["bars"]))]
    for case, content in result.get("cases", {}).items():
        parts += [f"### {case}", _workload(content.get("workload", {})), *_contestants(content["contestants"])]
    for table in result.get("tables", []):
        parts += [f"### {table['title']}", _table(table["columns"], table["rows"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(machine: dict[str, Any]) -> str:
    rates = ", ".join(f"{rate:,.3g} in {name}" for name, rate in machine.get("matrix_gflops", {}).items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine['threads']} threads; {machine['system']}, Python {machine['python']}, torch {machine['torch']}. "
        f"Matrix product in the same run, GFLOP/s: {rates}."
    )


def _bar(bar: dict[str, Any]) -> str:
    sign = "≥" if bar.get("at_least", True) else "≤"
    if bar["value"] is None:
        return f"| {bar['name']} | – | {sign} {bar['bar']:g} | not measured: {_cell(bar.get('why', ''))} |"
    spread = f" ({bar['min']:.2f} to {bar['max']:.2f})" if bar.get("min") != bar.get("max") else ""
    verdict = "holds" if bar["holds"] else "**does not hold**"
    return f"| {bar['name']} | {bar['value']:.2f}{spread} | {sign} {bar['bar']:g} | {verdict} |"


def _workload(workload: dict[str, Any]) -> str:
    if "prompts" not in workload:
        return ""
    low, high = workload["prompt_tokens"]
    length = f"{low}" if low == high else f"{low} to {high}"
    samples = f", {workload['samples_per_prompt']} samples each" if workload["samples_per_prompt"] > 1 else ""
    return (
        f"{workload['prompts']} prompts of {length} tokens{samples}; {workload['expected_tokens']:,} tokens to sample, "
        f"at most {workload['max_new_tokens']} a response."
    )


def _contestants(contestants: dict[str, Any]) -> list[str]:
    """A table of who ran, and a list of what else was tried and who could not run."""
    rows, remarks = [], []
    for name, entry in contestants.items():
        if "could_not_run" in entry:
            remarks.append(f"- {name} could not run: {_cell(entry['could_not_run'])}")
            continue
        seconds = f"{entry['median']:.2f} ({entry['min']:.2f} to {entry['max']:.2f})"
        ratio = f"{entry['pellucid_is_faster']:.2f}" if "pellucid_is_faster" in entry else "1"
        memory = f"{entry['peak_rss_bytes'] / 2**30:.2f}"
        row = [name, seconds, f"{entry['tokens_per_second']:,.0f}", ratio, memory, entry.get("settings", "")]
        rows.append(row)
        others = {k: v for k, v in entry.get("tried_tokens_per_second", {}).items() if k != entry.get("settings")}
        if others:
            tried = "; ".join(f"{k}: {_cell(v) if isinstance(v, str) else f'{v:,.0f}'}" for k, v in others.items())
            remarks.append(f"- {name}, other settings tried once, tokens/s: {tried}")
        remarks.append(f"- {name}: " + ", ".join(f"{k} {v}" for k, v in entry.get("versions", {}).items()))
    columns = ["", "seconds", "tokens/s", "Pellucid is faster by", "memory, GiB", "settings"]
    return [_table(columns, rows) if rows else "", "\n".join(remarks)]


def _table(columns: list[str], rows: list[list[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    main(command)
