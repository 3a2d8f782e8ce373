"""The Samples page: its table, its filters, groups, and one prompt across steps, against pandas over the Parquet files."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from browser.pages import Page, number, shows, visible

pytestmark = pytest.mark.integration

STEP = 2
FIGURES = "scores length kl_sequence advantage_mean reward_sum entropy_mean clipped_share minibatch".split()


def read(run_dir, step: int = STEP) -> pd.DataFrame:
    return pd.read_parquet(run_dir / f"rollouts/step-{step:06d}.parquet")


@pytest.fixture(scope="module")
def frame(recorded) -> pd.DataFrame:
    return read(recorded)


def open_samples(page: Page, address: str, query: str = "", run: int = 0) -> None:
    """In a window that is high and wide enough for every row and column."""
    page.resize(1700, 2700)
    page.open(f"{address}#/run/{run}/step/{STEP}/samples{query}", ".samples-count, .samples-card")


def shown_rows(page: Page) -> list[int]:
    return [int(text) for text in page.texts("td.samples-row")]


def test_every_sample_is_listed_with_its_figures(page, address, frame):
    open_samples(page, address)
    assert page.text(".samples-count") == f"{len(frame)} samples"
    assert shown_rows(page) == frame.row.tolist()
    for name in ("prompt", "response"):
        limit = {"prompt": 100, "response": 200}[name]
        assert page.texts(f"td.samples-{name}") == [visible(text[:limit]).strip() for text in frame[name]]
    assert page.texts("td.samples-stop_reason") == frame.stop_reason.tolist()
    for name in FIGURES:
        assert all(
            shows(text, value, 3) for text, value in zip(page.texts(f"td.samples-{name}"), frame[name], strict=True)
        ), name


@pytest.mark.parametrize("name", ["scores", "length", "clipped_share", "prompt"])
def test_a_click_on_a_head_sorts_as_pandas_does(page, address, frame, name):
    open_samples(page, address)
    first_up = name == "prompt"
    for ascending in (first_up, not first_up):
        page.click(f"th.samples-{name} button")
        way = "ascending" if ascending else "descending"
        page.wait(lambda way=way: page.count(f"th.samples-{name}[aria-sort={way}]"), way)
        expected = frame.sort_values(name, ascending=ascending, kind="stable")
        page.wait(lambda expected=expected: shown_rows(page) == expected.row.tolist(), f"the order by {name}, {way}")
        assert page.place.endswith(f"samples?sort={'' if ascending else '-'}{name}")


def test_filters_leave_what_pandas_leaves(page, address, frame):
    open_samples(page, address)
    word = frame.response.str.split().explode().value_counts().index[3]

    def holds(rows: pd.DataFrame, text: str) -> pd.Series:
        low = text.lower()
        in_prompt = rows.prompt.str[:100].str.lower().str.contains(low, regex=False)
        return in_prompt | rows.response.str[:200].str.lower().str.contains(low, regex=False)

    page.type(".samples-filters input[name=text]", word.upper())
    wanted = frame[holds(frame, word)]
    assert 0 < len(wanted) < len(frame)
    page.wait(lambda: shown_rows(page) == wanted.row.tolist(), f"the samples with {word!r}")
    assert page.text(".samples-count") == f"{len(wanted)} of {len(frame)} samples"
    for stop in sorted(frame.stop_reason.unique()):
        page.choose(".samples-filters select", stop)
        both = wanted[wanted.stop_reason == stop]
        page.wait(lambda both=both: shown_rows(page) == both.row.tolist(), f"those that ended by {stop}")
    page.click(".samples-filters button")
    page.wait(lambda: page.text(".samples-count") == f"{len(frame)} samples", "the filters to be cleared")
    assert page.place.endswith("/samples")


def test_bounds_and_sorting_come_from_the_address(page, address, frame):
    low, high = float(frame.scores.quantile(0.25)), float(frame.scores.quantile(0.75))
    open_samples(page, address, f"?scores.min={low}&scores.max={high}&sort=-kl_sequence")
    wanted = frame[(frame.scores >= np.float32(low)) & (frame.scores <= np.float32(high))]
    wanted = wanted.sort_values("kl_sequence", ascending=False, kind="stable")
    assert shown_rows(page) == wanted.row.tolist()
    assert page.run("return document.querySelector('.samples-bounds').open")
    page.type(".samples-filters input[name='length.max']", "5")
    page.wait(lambda: shown_rows(page) == wanted[wanted.length <= 5].row.tolist(), "the short ones")


def test_a_click_opens_the_sample(page, address, frame):
    open_samples(page, address, "?sort=-scores")
    best = int(frame.scores.idxmax())
    page.click("tbody tr td.samples-response")
    page.wait(lambda: page.place == f"#/run/0/step/{STEP}/sample/{best}", "the sample")
    page.settled(".token-line")
    assert shows(page.texts(".token-facts dd")[0], frame.scores[best])
    page.run("history.back()")
    page.wait(lambda: page.place == f"#/run/0/step/{STEP}/samples?sort=-scores" and shown_rows(page), "back")
    assert shown_rows(page)[0] == best


def test_a_group_side_by_side(page, address, grouped):
    frame = read(grouped)
    open_samples(page, address, "?view=groups&group=3", run=3)
    group = frame[frame.group_ids == 3].sort_values("scores", ascending=False, kind="stable")
    page.wait(lambda: page.count(".samples-card .samples-full") == len(group) == 4, "four cards")
    assert page.texts(".samples-card .samples-full") == [visible(text).strip() for text in group.response]
    figures = [text.split(" ")[-1] for text in page.texts(".samples-card .samples-score")]
    assert all(shows(text, value) for text, value in zip(figures, group.scores, strict=True))
    head = page.texts(".samples h3")[0]
    assert head.startswith("Group 3: 4 samples, scores from ") and shows(head.split("mean ")[1], group.scores.mean())
    assert page.text(".samples-asked .visible").strip() == visible(group.prompt.iloc[0]).strip()
    links = page.run("return [...document.querySelectorAll('.samples-card header a')].map((a) => a.hash)")
    assert links == [f"#/run/3/step/{STEP}/sample/{row}" for row in group.index]
    page.click(".samples-stepper button:last-child")
    page.wait(lambda: "group=4" in page.place, "the next group")
    following = frame[frame.group_ids == 4].sort_values("scores", ascending=False, kind="stable")
    page.wait(
        lambda: page.texts(".samples-card .samples-full") == [visible(t).strip() for t in following.response],
        "its texts",
    )


def test_a_prompt_across_the_steps(page, address, grouped):
    frames = pd.concat(
        [read(grouped, step).assign(place=lambda f: f.index) for step in (1, 2, 3, 4)], ignore_index=True
    )
    steps = frames.groupby("prompt_id").step.nunique()
    prompt = int(steps.index[steps >= 3][0])
    seen = frames[frames.prompt_id == prompt].sort_values(["step", "place"])
    open_samples(page, address, f"?view=prompt&prompt={prompt}", run=3)
    page.wait(lambda: page.count(".samples-card .samples-full") == len(seen), "a card each")
    assert page.texts(".samples-card .samples-full") == [visible(text).strip() for text in seen.response]
    page.wait(lambda: "sample" in page.texts(".samples-card h3")[-1], "the titles")
    titles = [f"Step {step} · sample {index}" for step, index in zip(seen.step, seen.sample_index, strict=True)]
    assert page.texts(".samples-card h3") == titles
    assert f"Prompt {prompt} was sampled in {seen.step.nunique()} recorded steps." in page.text("main")
    legend = dict(zip(page.texts(".plot .u-label"), page.texts(".plot .u-value"), strict=True))
    last = seen[seen.step == seen.step.max()]
    assert number(legend["Step"]) == last.step.iloc[0] and shows(legend["score"], last.scores.mean())
