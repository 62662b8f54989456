"""CIDEr-D, BLEU-4 and ROUGE-L with the values of coco-caption, on words that `caption_words` makes.

BLEU is torchmetrics' ``BLEUScore`` fed with words. Its ``ROUGEScore`` weighs precision and recall alike and has no
maxima over references, and it has no CIDEr: those two are our own. tests/goldens/evaluation/caption_scores.json holds
what pycocoevalcap 1.2 gives for the same words.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zoo.evaluation.torchmetrics_base import BLEUScore, Metric

WORDS_VERSION = 1
"""Raised whenever `caption_words` makes other words."""

_CLITIC = re.compile(r"(?<=[^\W\d_])(n't|'(?:s|re|ve|ll|d|m))(?![\w'])")
_WORD = re.compile(r"n't(?![\w'])|'(?:s|re|ve|ll|d|m)(?![\w'])|\d+(?:[.,:]\d+)*|\w+(?:[-'./&]\w+)*|[^\w\s]")
_DROPPED = frozenset("'`.?!,:-;\"()[]{}\u2018\u2019\u201c\u201d\u2013\u2014\u2026")


def caption_words(text: str) -> list[str]:
    """Part a caption into the words that are compared.

    Lower case; punctuation away; contractions parted as the Penn Treebank does ("don't" is "do n't", "man's" is
    "man 's"); words with a hyphen inside stay whole. coco-caption calls Stanford's PTB tokeniser (Java) and drops the
    same marks: plain captions come out alike, rare writings (abbreviations, emoticons) may not, so published values
    are met to about that.
    """
    plain = text.lower().replace("\u2019", "'")
    return [word for word in _WORD.findall(_CLITIC.sub(r" \1", plain)) if word not in _DROPPED]


def ngrams(words: Sequence[str], most: int = 4) -> Counter[tuple[str, ...]]:
    """Count the n-grams of 1 to ``most`` words."""
    return Counter(tuple(words[start : start + n]) for n in range(1, most + 1) for start in range(len(words) - n + 1))


def rouge_l(candidate: Sequence[str], references: Sequence[Sequence[str]], beta: float = 1.2) -> float:
    """ROUGE-L of words (Lin 2004, eqs. 2 to 4) with coco-caption's beta = 1.2 and its maxima.

    Precision and recall are each the best over the references, which need not be the same one:
    ``(1 + beta^2) p r / (r + beta^2 p)``; nought where nothing is shared.

    Raises:
        ValueError: no reference.
    """
    if not references:
        raise ValueError("a caption needs a reference to be judged by")
    shared = [_common(candidate, reference) for reference in references]
    precision = max(shared) / max(len(candidate), 1)
    recall = max(s / max(len(r), 1) for s, r in zip(shared, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, 1):
            above = row[place]
            row[place] = before + 1 if word == other else max(above, row[place - 1])
            before = above
    return row[-1]


class Bleu(BLEUScore):
    """torchmetrics' corpus BLEU-4 of words, with the *closest* reference length: of two as close the shorter one, as
    coco-caption takes it (torchmetrics takes the first)."""

    def __init__(self, smooth: bool = False) -> None:
        super().__init__(n_gram=4, smooth=smooth)

    def add(self, candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> Bleu:
        """Add captions as words, each with at least one reference."""
        self.update(
            [" ".join(words) for words in candidates],
            [[" ".join(words) for words in sorted(own, key=len)] for own in references],
        )
        return self


def smoothed_bleu(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of one caption with 1 added to the counts above one word (Lin & Och 2004, section 4): nought only where
    no word is shared. A mean over items, of which an interval can be had; the corpus BLEU is no such mean."""
    counted = Bleu(smooth=True).add([candidate], [references])
    numerator, denominator = counted.numerator.double(), counted.denominator.double()
    if numerator[0] == 0:
        return 0.0
    more = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    precision = (numerator + more) / (denominator + more)
    length, wanted = float(counted.preds_len), float(counted.target_len)
    brevity = 1.0 if length >= wanted else math.exp(1 - wanted / length)
    return brevity * float(precision.log().mean().exp())


class CiderD(Metric):
    """CIDEr-D (Vedantam et al. 2015, section 5, eq. 6; ``CiderScorer`` of coco-caption), in its usual scale of 0..10.

    The weight of an n-gram is its count times ``ln(items) - ln(max(1, items whose references have it))``. For n = 1..4
    the clipped product ``sum min(c, r) r / (|c| |r|)`` is damped by ``exp(-d^2 / (2 sigma^2))``, d the difference in
    bigrams; the score is 10 times the mean over n and over references. A corpus of one item scores nought.

    Document frequencies are those of all items of all processes: the state is the captions themselves as bytes, which
    are gathered, and ``compute`` counts them.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    captions: list[Tensor]

    def __init__(self, most: int = 4, sigma: float = 6.0) -> None:
        super().__init__()
        self.most, self.sigma = most, sigma
        self.add_state("captions", [], dist_reduce_fx="cat")

    def update(self, candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> None:
        """Add captions as words.

        Args:
            candidates: one an item.
            references: at least one an item.

        Raises:
            ValueError: an item without a reference.
        """
        if not all(references):
            raise ValueError("a caption needs a reference to be judged by")
        lines = "".join(
            json.dumps([list(c), [list(r) for r in own]]) + "\n" for c, own in zip(candidates, references, strict=True)
        )
        if lines:
            self.captions.append(torch.frombuffer(bytearray(lines.encode()), dtype=torch.uint8).to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """Return ``score``, the mean as a float64 scalar (NaN of nothing), and ``scores`` [N] float64, those of the
        items in the order in which they were added, one process after the other."""
        kept = self.captions if isinstance(self.captions, list) else [self.captions]
        lines = b"".join(bytes(part.cpu().tolist()) for part in kept).decode().splitlines()
        items = [(ngrams(c, self.most), [ngrams(r, self.most) for r in own]) for c, own in map(json.loads, lines)]
        documents = Counter(gram for _, own in items for gram in set().union(*own))
        scores = torch.tensor([self._score(c, own, documents, len(items)) for c, own in items], dtype=torch.float64)
        return {"score": scores.mean(), "scores": scores}

    def _score(
        self,
        candidate: Mapping[tuple[str, ...], int],
        references: Sequence[Mapping[tuple[str, ...], int]],
        documents: Mapping[tuple[str, ...], int],
        items: int,
    ) -> float:
        def weighted(counts: Mapping[tuple[str, ...], int]) -> tuple[dict[tuple[str, ...], float], list[float], int]:
            vector = {g: n * (math.log(items) - math.log(max(1, documents.get(g, 0)))) for g, n in counts.items()}
            squares = [0.0] * self.most
            for gram, value in vector.items():
                squares[len(gram) - 1] += value**2
            return vector, [math.sqrt(s) for s in squares], sum(n for g, n in counts.items() if len(g) == 2)

        vector, norms, length = weighted(candidate)
        total = 0.0
        for reference in references:
            other, other_norms, other_length = weighted(reference)
            shared = [0.0] * self.most
            for gram, value in vector.items():
                if gram in other:
                    shared[len(gram) - 1] += min(value, other[gram]) * other[gram]
            damped = math.exp(-((length - other_length) ** 2) / (2 * self.sigma**2))
            total += damped * sum(
                s / (a * b) if a and b else s for s, a, b in zip(shared, norms, other_norms, strict=True)
            )
        return 10 * total / self.most / len(references)
