"""The corpus's hidden preference. Training never calls it: it only labels pairs, and judges in evaluations.

A reply is cut into words and sentences (lower case, punctuation apart). Phrases below are found in it
wherever they stand, so any text has a score, not only the corpus's own sentences.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from itertools import pairwise

from pellucid.data.phrases import COMPLAINT, DAYS, DOMAINS, EFFORTS, NAMES, PRAISE, THANKS, WHENS, Domain

LOWEST, HIGHEST = -30.0, 7.2
"""No text scores outside of these."""

# Phrase -> weight. A phrase counts once, however often it is said.
WARM = {
    "thank you": 0.5, "kind words": 0.5, "delighted": 0.7, "lovely message": 0.6, "made our day": 0.6,
    "sorry": 0.5, "truly": 0.4, "apology": 0.7, "apologise": 0.6, "you are right": 0.5, "dear": 0.3,
    "hello": 0.1, "please accept": 0.2, "if you like": 0.3,
}  # fmt: skip
SHARP = (
    "nobody else", "not you again", "hard to please", "what a surprise", "always find a fault",
    "your own fault", "at the wrong time", "expected too much", "read the rules", "nothing we can",
    "not our problem", "rules are rules", "ask somebody", "do not write", "leave it", "wasting our time",
    "somewhere else", "of course", "sound surprised", "not do it for you", "sweet words", "yes , we know",
    "just luck", "do not expect", "others never", "be higher", "do not ask", "tell somebody",
)  # fmt: skip
SHRUGS = (
    "we got your message", "has arrived", "what you wrote", "noted", "we know about", "these things happen",
    "a small team", "busy", "look into it", "someone may", "what we can do", "that is all", "goodbye",
    "regards", "sent by the office",
)  # fmt: skip
SORRY = ("sorry", "apology", "apologise", "you are right")
GRATEFUL = ("thank you", "kind words", "delighted", "lovely message")
GENEROUS = {
    "free": 1.0, "refund": 1.0, "new one": 1.0, "fresh one": 0.9, "pay back": 0.9, "better": 0.8,
    "another one": 0.8, "whole team": 0.7, "repeat": 0.7, "save": 0.9,
}  # fmt: skip
SOON = {"today": 0.5, "by tomorrow": 0.35, "this week": 0.2, "before the weekend": 0.1, "next month": -0.1}
FAREWELL = {
    "hope to see you": 0.9, "always welcome": 0.8, "please come back": 0.7, "warm wishes": 0.6,
    "take care": 0.5,
}  # fmt: skip
SMALL_WORDS = frozenset(
    (
        "that",
        "this",
        "with",
        "will",
        "your",
        "about",
        "from",
        "what",
        "have",
        "them",
        "they",
        "when",
        "because",
    )
)


def gold_score(prompt: str, completion: str) -> float:
    """How good a reply is, from LOWEST to HIGHEST; the corpus's own texts lie between -4.5 and 7. Pure.

    score = warmth + fit + topic + name + reason + promise + closing
            - sharpness - shrugging - gushing - overpromising - repetition - salad - unfinished - length

    warmth          1.2 (1 - exp(-sum of the distinct warm phrases' weights)): a second kind word adds less
    fit             1 if a complaint meets an apology, praise meets thanks; -0.5 for an apology on praise
    topic           0.8 if it names the prompt's item; -0.7 per other item named, 2 at most
    name            0.4 if it names the guest; -0.6 per other name, 2 at most
    reason          1 for "because" and a cause this business can have; -0.5 per cause of another, 2 at most
    promise         0.4 + generosity (0.5 to 1) + how soon (-0.1 to 0.5), for one that this business can keep
    closing         0.5 to 0.9 if the last sentence is a friendly farewell
    sharpness       3 (1 - 0.5^n) for n sarcastic, blaming or refusing phrases
    shrugging       0.2 per phrase that says nothing, 4 at most
    gushing         0.5 per warm phrase beyond the fourth, 4 at most
    overpromising   0.7 per promise beyond the first, and per one of another business, 4 at most
    repetition      1.2 per sentence said again, 3 at most; 0.35 per longer word said again, 8 at most
    salad           4 min(1, 2.5 u), u the share of neighbouring words that no sentence of the corpus has
    unfinished      1.2 without a full stop, question or exclamation mark at the end
    length          0.1 per word beyond 42, 40 at most; 0.25 per word short of 8

    The positive terms need one good sentence of each kind and then saturate; the negative ones grow with what
    a policy does that chases a proxy. prompt: may be any text, terms that need its item, guest or mood are 0.
    """
    words = _words(completion)
    sentences = _sentences(words)
    text, asked = _spaced(words), _spaced(_words(prompt))
    score = _tone(text, asked) + _relevance(text, asked) + _promises(text, asked)
    score += max((w for p, w in FAREWELL.items() if sentences and p in _spaced(sentences[-1])), default=0.0)
    return score - _style_faults(words, sentences)


def _tone(text: str, asked: str) -> float:
    """warmth + fit - sharpness - shrugging - gushing"""
    warm = _found(WARM, text)
    complains = bool(_found({p for d in DOMAINS for p in d.problems}, asked))
    praises = not complains and bool(_found({p for d in DOMAINS for p in d.praises}, asked))
    fit = 0.0
    if complains:
        fit = 1.0 if _found(SORRY, text) else 0.0
    elif praises:
        fit = (1.0 if _found(GRATEFUL, text) else 0.0) - (0.5 if _found(SORRY, text) else 0.0)
    warmth = 1.2 * (1 - math.exp(-sum(WARM[p] for p in warm)))
    sharpness = 3 * (1 - 0.5 ** len(_found(SHARP, text)))
    shrugging = 0.2 * min(4, len(_found(SHRUGS, text)))
    return warmth + fit - sharpness - shrugging - 0.5 * min(4, max(0, len(warm) - 4))


def _relevance(text: str, asked: str) -> float:
    """topic + name + reason"""
    score = 0.0
    for words, right, wrong in ((_ITEMS, 0.8, 0.7), (_NAMES, 0.4, 0.6)):
        wanted, said = set(_found(words, asked)), set(_found(words, text))
        if wanted:
            score += (right if wanted & said else 0.0) - wrong * min(2, len(said - wanted))
    home = _domain(asked)
    if home is not None:
        causes = set(_found(_CAUSES, text))
        own = causes & {*home.causes, *EFFORTS}
        score += (1.0 if own and " because " in text else 0.0) - 0.5 * min(2, len(causes - own))
    return score


def _promises(text: str, asked: str) -> float:
    """promise - overpromising"""
    promises = set(_found(_PROMISES, text))
    home = _domain(asked)
    own = promises & {*(home.remedies if home else ()), *THANKS}
    excess = 0.7 * min(4, max(0, len(own) - 1) + len(promises - own))
    if not own:
        return -excess
    generosity = max((w for p, w in GENEROUS.items() if any(f" {p} " in f" {o} " for o in own)), default=0.5)
    return 0.4 + generosity + min((SOON[p] for p in _found(SOON, text)), default=0.0) - excess


def _style_faults(words: list[str], sentences: list[list[str]]) -> float:
    """repetition + salad + unfinished + length"""
    again = len(sentences) - len({tuple(s) for s in sentences})
    longer = Counter(w for w in words if len(w) > 3 and w not in SMALL_WORDS)
    repeated = sum(n - 1 for n in longer.values())
    neighbours = [pair for sentence in sentences for pair in pairwise(["", *sentence])]
    unknown = sum(pair not in _neighbours() for pair in neighbours) / max(1, len(neighbours))
    unfinished = 0.0 if words and words[-1] in ".!?" else 1.2
    count = sum(w[0].isalpha() for w in words)
    length = 0.1 * min(40, max(0, count - 42)) + 0.25 * max(0, 8 - count)
    return 1.2 * min(3, again) + 0.35 * min(8, repeated) + 4 * min(1.0, 2.5 * unknown) + unfinished + length


# --- words --------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    """Lower-case words, and every other visible character by itself."""
    return re.findall(r"[a-z]+|[^\sa-z]", text.lower())


def _sentences(words: list[str]) -> list[list[str]]:
    """Each with its closing mark; the last may have none."""
    sentences: list[list[str]] = [[]]
    for word in words:
        sentences[-1].append(word)
        if word in (".", "!", "?"):
            sentences.append([])
    return [s for s in sentences if s]


def _spaced(words: Iterable[str]) -> str:
    return f" {' '.join(words)} "


def _found(phrases: Collection[str] | Mapping[str, float], text: str) -> list[str]:
    return [p for p in phrases if f" {p} " in text]


def _domain(asked: str) -> Domain | None:
    return next((d for d in DOMAINS if _found(d.items, asked)), None)


_ITEMS = tuple(item for d in DOMAINS for item in d.items)
_NAMES = tuple(name.lower() for name in NAMES)
_CAUSES = (*(cause for d in DOMAINS for cause in d.causes), *EFFORTS)
_PROMISES = (*(remedy for d in DOMAINS for remedy in d.remedies), *THANKS)


@lru_cache(maxsize=1)
def _neighbours() -> frozenset[tuple[str, str]]:
    """Every pair of neighbouring words that a sentence of the corpus can have; "" stands before the first."""
    fillers = {
        "{name}": NAMES,
        "{item}": _ITEMS,
        "{said}": [said for d in DOMAINS for said in (*d.problems, *d.praises)],
        "{day}": DAYS,
        "{cause}": _CAUSES,
        "{effort}": EFFORTS,
        "{remedy}": _PROMISES,
        "{thanks}": THANKS,
        "{when}": WHENS,
    }
    pairs: set[tuple[str, str]] = set()
    for slots in (COMPLAINT, PRAISE):
        for sentence in (s for slot in slots.values() for quality in slot.values() for s in quality):
            ends = {""}
            for piece in re.split(r"(\{\w+\})", sentence):
                choices = [words for filler in fillers.get(piece, (piece,)) if (words := _words(filler))]
                if choices:
                    pairs |= {(end, words[0]) for end in ends for words in choices}
                    pairs |= {pair for words in choices for pair in pairwise(words)}
                    ends = {words[-1] for words in choices}
    return frozenset(pairs)
