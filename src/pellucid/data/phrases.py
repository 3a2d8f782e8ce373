"""What the built-in corpus is made of: guests' messages to six businesses, and sentences of their replies.

Only word lists. `corpus.py` draws texts from them; `gold.py` judges texts, and keeps its own weights to
itself.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Domain:
    """One business.

    problems, praises: what a guest says of an item. causes: follow "because". remedies: follow "We will".
    """

    items: tuple[str, ...]
    problems: tuple[str, ...]
    praises: tuple[str, ...]
    causes: tuple[str, ...]
    remedies: tuple[str, ...]


DOMAINS = (
    Domain(
        ("soup", "bread", "coffee", "salad", "cake", "breakfast", "pasta", "pie", "lemonade", "sandwich"),
        ("was cold", "came late", "tasted salty", "was very small", "looked old"),
        ("was fresh", "tasted wonderful", "came quickly", "was warm and rich"),
        ("the oven broke", "our cook was ill", "the kitchen was too full"),
        ("cook a fresh one for you", "give you a free meal", "check every plate"),
    ),
    Domain(
        ("room", "bed", "shower", "window", "balcony", "lamp", "heater", "towel", "pool", "lift"),
        ("was dirty", "was noisy", "did not work", "smelled of smoke", "was too cold"),
        ("was clean", "was quiet and bright", "felt like home", "was comfortable"),
        ("a pipe was leaking", "the cleaner was away", "the painters came early"),
        ("move you to a better place", "clean it again", "pay back one night"),
    ),
    Domain(
        ("jacket", "kettle", "radio", "chair", "clock", "bag", "scarf", "mirror", "blanket", "guitar"),
        ("arrived broken", "arrived late", "had the wrong colour", "was missing a part", "stopped working"),
        ("arrived early", "looks beautiful", "works perfectly", "was worth the price"),
        ("the box was too thin", "the label was wrong", "our driver lost the address"),
        ("send you a new one", "refund the full price", "collect it at your door"),
    ),
    Domain(
        ("bus", "train", "ferry", "tour", "taxi", "boat", "flight", "tram", "shuttle", "cruise"),
        ("was late", "was crowded", "left too early", "was cancelled", "got lost"),
        ("was on time", "was calm and safe", "had lovely views", "ran smoothly"),
        ("the road was closed", "a storm blocked the way", "the engine failed"),
        ("refund your ticket", "book you a better seat", "add a second driver"),
    ),
    Domain(
        ("lesson", "concert", "film", "play", "lecture", "workshop", "exhibition", "game", "class", "quiz"),
        ("was too short", "started late", "was too loud", "was hard to follow", "felt boring"),
        ("was exciting", "was well planned", "was worth every minute", "was great fun"),
        ("the speaker was delayed", "the hall was double booked", "the sound desk failed"),
        ("give you two free tickets", "repeat it for you", "find a quieter hall"),
    ),
    Domain(
        ("bike", "phone", "laptop", "watch", "car", "printer", "camera", "fridge", "piano", "boiler"),
        ("came back scratched", "still rattles", "took too long", "cost too much", "broke again"),
        ("runs like new", "was ready early", "looks polished", "works again"),
        ("a spare part was missing", "our mechanic was ill", "the test was rushed"),
        ("repair it for free", "lend you another one", "test it twice"),
    ),
)
NAMES = (
    *("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ivy", "Jack"),
    *("Kate", "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PROMPT = "{name}: The {item} {said} on {day}.\nReply:\n"

EFFORTS = (
    "the team plans every detail",
    "we check everything twice",
    "we love this work",
    "every guest matters",
)
THANKS = ("tell the whole team", "share your words with the team", "save the same one for you")
"""What is promised to a guest who praised something: follows "We will", like a remedy."""
WHENS = ("today", "by tomorrow", "this week", "before the weekend", "next month")

# Slot -> quality -> sentences. {item} is what the guest named, or now and then another thing by mistake;
# {said} is the guest's own predicate.
Slot = dict[str, tuple[str, ...]]
COMPLAINT: dict[str, Slot] = {
    "opener": {
        "good": (
            "Dear {name}, we are truly sorry that the {item} {said}.",
            "Dear {name}, I am sorry about the {item}.",
            "Hello {name}, please accept our apology for the {item}.",
            "Dear {name}, thank you for telling us about the {item}.",
            "Dear {name}, you are right, and we apologise.",
        ),
        "plain": (
            "Hello, we got your message.",
            "Your note about the {item} has arrived.",
            "We have read what you wrote.",
            "Hello {name}, noted.",
            "We know about the {item}.",
        ),
        "bad": (
            "Well, nobody else complains about the {item}.",
            "Not you again, {name}.",
            "You are hard to please.",
            "What a surprise, another complaint.",
            "Some people always find a fault.",
        ),
    },
    "reason": {
        "good": (
            "It happened because {cause}.",
            "This went wrong because {cause}.",
            "The {item} {said} because {cause}.",
        ),
        "plain": (
            "These things happen.",
            "It was a busy {day}.",
            "We are a small team.",
        ),
        "bad": (
            "It was probably your own fault.",
            "You came at the wrong time.",
            "You expected too much of the {item}.",
            "Read the rules next time.",
        ),
    },
    "promise": {
        "good": (
            "We will {remedy} {when}.",
            "I will {remedy} {when}.",
            "If you like, we will {remedy} {when}.",
        ),
        "plain": (
            "We will look into it.",
            "Someone may call you {when}.",
            "We will see what we can do.",
        ),
        "bad": (
            "There is nothing we can do.",
            "That is not our problem.",
            "Rules are rules.",
            "Ask somebody else about the {item}.",
        ),
    },
    "closing": {
        "good": (
            "We hope to see you again soon.",
            "You are always welcome here.",
            "Please come back any time.",
            "Warm wishes from all of us.",
            "Take care, {name}.",
        ),
        "plain": (
            "That is all.",
            "Goodbye.",
            "Regards, the office.",
            "This message was sent by the office.",
        ),
        "bad": (
            "Do not write again.",
            "Take it or leave it.",
            "Please stop wasting our time.",
            "Have a nice day somewhere else.",
        ),
    },
}
PRAISE: dict[str, Slot] = {
    "opener": {
        "good": (
            "Dear {name}, thank you for your kind words about the {item}.",
            "Hello {name}, we are delighted that the {item} {said}.",
            "Dear {name}, what a lovely message about the {item}.",
            "Thank you, {name}, your note made our day.",
        ),
        "plain": COMPLAINT["opener"]["plain"],
        "bad": (
            "Well, of course the {item} {said}.",
            "You sound surprised, {name}.",
            "We did not do it for you.",
            "Sweet words get you nothing.",
            "Yes, we know.",
        ),
    },
    "reason": {
        "good": (
            "It went well because {effort}.",
            "The {item} {said} because {effort}.",
            "We take care because {effort}.",
        ),
        "plain": COMPLAINT["reason"]["plain"],
        "bad": (
            "It was just luck.",
            "Do not expect it every time.",
            "Others never say so.",
        ),
    },
    "promise": {
        "good": (
            "We will {thanks} {when}.",
            "I will {thanks} {when}.",
            "If you like, we will {thanks} {when}.",
        ),
        "plain": COMPLAINT["promise"]["plain"],
        "bad": (
            "Next time the price will be higher.",
            "Do not ask for more.",
            "Tell somebody else about the {item}.",
        ),
    },
    "closing": COMPLAINT["closing"],
}
