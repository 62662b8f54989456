"""When an answer counts as right: the normalisation and the soft accuracy of the VQA evaluation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

VERSION = 1
"""Raised whenever an answer would be judged otherwise."""

# the table of the VQA evaluation: right forms, and which of their apostrophes may be left out follows from them
_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't "
    "must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've "
    "somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've "
    "something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas "
    "wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've "
    "who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd "
    "you'd've you'll you're you've"
)
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


@cache
def contractions() -> dict[str, str]:
    """Return "dont" -> "don't", with each single apostrophe left out in turn, as the evaluation's table has it."""
    table = {}
    for form in _CONTRACTED.split():
        for place, sign in enumerate(form):
            if sign == "'":
                table[form[:place] + form[place + 1 :]] = form
    table["somebody'd"] = "somebodyd"  # the one entry the wrong way round
    return table


def normalise_answer(text: str) -> str:
    """Bring an answer to the form in which the VQA evaluation compares (Antol et al. 2015; `vqaEval.py` as released).

    Lower case; punctuation removed where it touches a blank and wherever the text has a number with a comma, else made
    a blank; periods removed unless a digit follows; number words up to ten as digits and "none" as 0; articles dropped;
    missing apostrophes put into contractions.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    everywhere = _COMMA_IN_NUMBER.search(text) is not None
    for sign in _PUNCTUATION:
        touching = f"{sign} " in text or f" {sign}" in text
        out = out.replace(sign, "" if touching or everywhere else " ")
    out = _PERIOD.sub("", out, count=32)  # the released code passes a flag, 32, where the count belongs
    words = [_NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(contractions().get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return how right an answer is, 0..1.

    One reference: equal after normalisation. Several (VQAv2 has ten): the mean over leaving one reference out of
    min(equal others / 3, 1); as in the released code, references that agree to the letter are compared without
    normalising anything.

    Raises:
        ValueError: no reference.
    """
    if not references:
        raise ValueError("an answer needs a reference to be judged by")
    if len(references) == 1:
        return float(normalise_answer(answer) == normalise_answer(references[0]))
    given = answer.replace("\n", " ").replace("\t", " ").strip()
    known = [r.replace("\n", " ").replace("\t", " ").strip() for r in references]
    if len(set(known)) > 1:
        given, known = normalise_answer(given), [normalise_answer(r) for r in known]
    equal = [r == given for r in known]
    return sum(min((sum(equal) - own) / 3, 1.0) for own in equal) / len(known)


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Whether an answer equals a reference as a string, but for capitals, outer blanks and a period at the end: GQA's
    measure (its eval.py compares strings; the answers given to it are lower case without a period)."""

    def plain(text: str) -> str:
        return text.strip().removesuffix(".").strip().lower()

    return plain(answer) in map(plain, references)


def answer_type(references: Sequence[str]) -> str:
    """Return ``yes_no``, ``number`` or ``other`` by what the first reference is, as VQAv2 sorts its questions."""
    first = normalise_answer(references[0])
    if first in ("yes", "no"):
        return "yes_no"
    return "number" if re.fullmatch(r"\d+([.,]\d+)?", first) else "other"


def first_verdict(answer: str) -> str:
    """Return ``yes`` or ``no`` as an answer begins with one of them, else ``""``: how a verdict is read for POPE's
    precision, recall and yes-ratio, where an answer that is neither counts as not yes."""
    words = normalise_answer(answer).split()
    return words[0] if words and words[0] in ("yes", "no") else ""
