"""The built-in corpus: short replies to guests' messages, drawn from a seed, no file or network needed.

Two kinds of prompt: a guest complains about an item, or praises it. A reply has up to four sentences: opener,
reason, promise, closing; each is good, plain or bad, and how often depends on the writer's mood of that
reply. So replies to one prompt differ a lot in what `gold.gold_score` thinks of them, and most of them leave
much room above.

What never occurs in these texts is what an over-optimised policy will find: sentences or kind words said
twice, several promises, remedies of another business, endless replies. A reward model trained here has no
opinion on them; the gold preference has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice
from random import Random

from pellucid.data.gold import gold_score
from pellucid.data.phrases import COMPLAINT, DAYS, DOMAINS, EFFORTS, NAMES, PRAISE, PROMPT, THANKS, WHENS
from pellucid.data.sources import Row
from pellucid.errors import DataError

LABEL_NOISE = 0.1
"""Share of training pairs whose labels are swapped."""
MIN_GAP = 0.2
"""Pairs whose gold scores are closer than this are not asked: a person could not tell them apart either."""

MOODS = {"grumpy": (0.15, 0.35, 0.5), "plain": (0.3, 0.5, 0.2), "caring": (0.65, 0.25, 0.1)}
"""Writer's mood -> probability of a good, a plain and a bad sentence. The moods are equally frequent."""
SPOKEN = {"opener": 0.9, "reason": 0.6, "promise": 0.75, "closing": 0.6}
"""Probability that a reply has the sentence; a reply has two at least."""
WRONG_ITEM = 0.12
"""Probability that a sentence names another item of the same business by mistake."""
MAX_WORDS = 34
"""Longer replies are drawn again, so that a small policy can be given a short limit."""
HELD_OUT = 8
"""One prompt in this many is never used for training."""

# name -> (default number of rows, held-out prompts or training prompts)
SIZES = {
    "sft": (6000, False),
    "preferences": (4000, False),
    "preferences_heldout": (500, True),
    "prompts": (2000, False),
    "prompts_heldout": (200, True),
}


def corpus_rows(name: str, seed: int = 0, count: int = 0, label_noise: float = LABEL_NOISE) -> list[Row]:
    """Rows of one part of the corpus; the same arguments give the same bytes on every machine.

    name: "sft" (prompt, completion), "preferences" and "preferences_heldout" (prompt, chosen, rejected),
    "prompts" and "prompts_heldout" (prompt). count: number of rows, 0 for the part's usual size; fewer rows
    are the beginning of more. label_noise: share of swapped pairs, of "preferences" only. Raises DataError:
    unknown name.
    """
    if name not in SIZES:
        raise DataError(f"corpus:{name} does not exist; there are {', '.join('corpus:' + n for n in SIZES)}")
    usual, held_out = SIZES[name]
    random = Random(f"pellucid corpus/{name}/{seed}")
    prompts = _prompts(random, held_out)
    make: dict[str, Callable[[], Row]] = {
        "sft": lambda: _supervised(random, *next(prompts)),
        "preferences": lambda: _pair(random, *next(prompts), label_noise),
        "preferences_heldout": lambda: _pair(random, *next(prompts), 0.0),
        "prompts": lambda: {"prompt": next(distinct)},
        "prompts_heldout": lambda: {"prompt": next(distinct)},
    }
    distinct = _distinct(prompts)
    return [make[name]() for _ in range(count or usual)]


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to evaluation: told by the prompt alone, so that no seed mixes the sides."""
    return hashlib.blake2b(prompt.encode(), digest_size=2).digest()[0] % HELD_OUT == 0


Facts = dict[str, str]


def _prompts(random: Random, held_out: bool) -> Iterator[tuple[str, Facts]]:
    """Prompts for ever, each with what its reply needs to know."""
    while True:
        domain = random.choice(DOMAINS)
        complains = random.random() < 0.6
        facts = {
            "name": random.choice(NAMES),
            "item": random.choice(domain.items),
            "said": random.choice(domain.problems if complains else domain.praises),
            "day": random.choice(DAYS),
            "kind": "complaint" if complains else "praise",
        }
        prompt = PROMPT.format(**facts)
        if is_held_out(prompt) == held_out:
            yield prompt, facts


def _distinct(prompts: Iterator[tuple[str, Facts]]) -> Iterator[str]:
    seen: set[str] = set()
    while True:
        # There are some 75,000 prompts; 2,000 draws without a new one means that they are used up.
        prompt = next((p for p, _ in islice(prompts, 2000) if p not in seen), None)
        if prompt is None:
            raise DataError(f"the corpus has no more than about {len(seen)} prompts of this kind")
        seen.add(prompt)
        yield prompt


def _supervised(random: Random, prompt: str, facts: Facts) -> Row:
    return {"prompt": prompt, "completion": _reply(random, facts)}


def _pair(random: Random, prompt: str, facts: Facts, noise: float) -> Row:
    first = second = _reply(random, facts)
    gap = 0.0
    while abs(gap) < MIN_GAP:
        second = _reply(random, facts)
        gap = gold_score(prompt, first) - gold_score(prompt, second)
    better, worse = (first, second) if gap > 0 else (second, first)
    if random.random() < noise:
        better, worse = worse, better
    return {"prompt": prompt, "chosen": better, "rejected": worse}


def _reply(random: Random, facts: Facts) -> str:
    while True:
        reply = _any_reply(random, facts)
        if len(reply.split()) <= MAX_WORDS:
            return reply


def _any_reply(random: Random, facts: Facts) -> str:
    slots = COMPLAINT if facts["kind"] == "complaint" else PRAISE
    domain = next(d for d in DOMAINS if facts["item"] in d.items)
    weights = MOODS[random.choice(tuple(MOODS))]
    spoken = [slot for slot in slots if random.random() < SPOKEN[slot]]
    while len(spoken) < 2:
        spoken = [slot for slot in slots if random.random() < SPOKEN[slot]]
    sentences = []
    for slot in spoken:
        quality = random.choices(("good", "plain", "bad"), weights)[0]
        words = facts | {
            "item": random.choice(domain.items) if random.random() < WRONG_ITEM else facts["item"],
            "cause": random.choice(domain.causes),
            "effort": random.choice(EFFORTS),
            "remedy": random.choice(domain.remedies),
            "thanks": random.choice(THANKS),
            "when": random.choice(WHENS),
        }
        sentences.append(random.choice(slots[slot][quality]).format(**words))
    return " ".join(sentences)
