"""Answers as text: in the one form in which they are compared, and how well each agrees with people's.

By the rules of the VQA evaluation (https://visualqa.org/evaluation.html), its oddities included, so that numbers
compare with published ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
ARTICLES = frozenset(("a", "an", "the"))
CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll "
    "why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've"
)
# What is written with one apostrophe too few -> as it should be; and one that the evaluation turns round.
MISSPELT = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")


@lru_cache(1 << 18)  # people say the same again and again
def normalise(answer: str) -> str:
    """An answer as it is compared: lower case, digits, no articles, no punctuation, apostrophes where they belong.

    A mark beside a space vanishes, one between letters becomes a space; where a comma stands between digits, all marks
    vanish.
    """
    text = found = answer.replace("\n", " ").replace("\t", " ").strip()
    are_dropped = DIGIT_COMMA.search(text) is not None
    for mark in PUNCTUATION:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if are_dropped or is_beside_space else " ")
    words = (DIGITS.get(word, word) for word in FULL_STOP.sub("", found).lower().split())
    return " ".join(MISSPELT.get(word, word) for word in words if word not in ARTICLES)


def agreement(matches: int, people: int) -> float:
    """The accuracy of an answer that `matches` of `people` gave: min(others who agree / 3, 1), each left out in turn.

    With ten people: 0, .3, .6, .9, 1, 1, ...
    """
    if people == 1:
        return float(matches)
    with_it, without = min((matches - 1) / 3, 1), min(matches / 3, 1)
    return (matches * with_it + (people - matches) * without) / people


def soft_targets(answers: Sequence[str], spelling: Callable[[str], str] = normalise) -> dict[str, float]:
    """Each distinct answer that people gave, in the form in which it is compared -> its accuracy."""
    counts = Counter(map(spelling, answers))
    return {answer: agreement(count, len(answers)) for answer, count in counts.items()}


def accuracy(answer: str, answers: Sequence[str]) -> float:
    """The VQA accuracy of an answer, given those of people (ten in VQA v2), which are not normalised if all agree."""
    given, *people = (text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *answers))
    if len(set(people)) > 1:
        given, *people = map(normalise, (given, *people))
    return agreement(people.count(given), len(people))
