"""What the metrics of tasks that ask questions mean; part of `zoo.evaluation.catalogue`."""

from __future__ import annotations

from zoo.evaluation.metric_info import MetricInfo

QUESTION_KINDS = ("what", "count", "exist", "where", "relation", "which", "colour")
ANSWER_TYPES = ("yes_no", "number", "other")
STRATEGIES = ("random", "popular", "adversarial")


def answering() -> dict[str, MetricInfo]:
    """The metrics of ``question-answering``; each is a ratio of sums of the columns of its rows."""

    def part(label: str, column: str, help: str) -> MetricInfo:
        return MetricInfo(
            label=label, numerator=f"correct_{column}", denominator=column, percent=True, detail=True, help=help
        )

    def verdict(label: str, above: str, below: str, help: str, direction: bool | None = True) -> MetricInfo:
        return MetricInfo(
            label=label, higher_is_better=direction, numerator=above, denominator=below, percent=True, detail=True,
            help=help,
        )  # fmt: skip

    return {
        "accuracy": MetricInfo(
            label="QA accuracy",
            numerator="correct",
            percent=True,
            primary=True,
            help="generated answers that equal the reference after the VQA normalisation (soft if there are several)",
        ),
        "exact_match": MetricInfo(
            label="QA exact",
            numerator="exact",
            percent=True,
            detail=True,
            help="answers equal to a reference as strings but for capitals and a final period, as GQA counts",
        ),
        "blank_accuracy": MetricInfo(
            label="QA blank",
            higher_is_better=None,
            numerator="correct_blank",
            percent=True,
            help="the same model and questions with blank images: what it answers without seeing",
        ),
        "gain": MetricInfo(
            label="QA gain",
            numerator="gain",
            percent=True,
            help="accuracy less that with blank images, question by question",
        ),
        **{f"accuracy_{k}": part(f"QA {k}", f"kind_{k}", f"accuracy on questions of kind {k}") for k in QUESTION_KINDS},
        **{
            f"accuracy_{t}": part(f"QA {t.replace('_', '/')}", f"type_{t}", f"accuracy where the answer is {t}")
            for t in ANSWER_TYPES
        },
        **{
            f"accuracy_exist_{s}": part(f"exist {s}", f"exist_{s}", f"POPE accuracy, what is missing chosen {s}")
            for s in STRATEGIES
        },
        "exist_precision": verdict("exist precision", "true_yes", "said_yes", "POPE: right among those answered yes"),
        "exist_recall": verdict("exist recall", "true_yes", "is_yes", "POPE: answered yes among those that are there"),
        "exist_f1": verdict("exist F1", "twice_true_yes", "yes_said_or_true", "POPE: of precision and recall"),
        "exist_yes_ratio": verdict(
            "says yes", "said_yes", "kind_exist", "POPE: share answered yes; half is true", None
        ),
    }


def polling() -> dict[str, MetricInfo]:
    """The metrics of ``pope``: over the three sets together, and of each."""
    measures = {
        "accuracy": (
            "accuracy",
            "correct",
            "asked",
            "yes and no answered rightly; half of the objects are there",
            True,
        ),
        "precision": ("precision", "true_yes", "said_yes", "right among those answered yes", True),
        "recall": ("recall", "true_yes", "is_yes", "answered yes among the objects that are there", True),
        "f1": ("F1", "twice_true_yes", "yes_said_or_true", "harmonic mean of precision and recall", True),
        "yes_ratio": ("says yes", "said_yes", "asked", "share answered yes; half is true", None),
    }
    sets = {
        "": "",
        "random": "what is missing drawn at random",
        "popular": "what is missing is frequent in the data",
        "adversarial": "what is missing is often shown together with what is there",
    }
    found = {
        f"{name}_{which}" if which else name: MetricInfo(
            label=f"POPE {label}{which and ' ' + which}",
            higher_is_better=direction,
            numerator=f"{above}_{which}" if which else above,
            denominator=f"{below}_{which}" if which else below,
            percent=True,
            primary=name == "accuracy" and not which,
            detail=bool(which) or name in ("precision", "recall"),
            help=f"POPE: {help}{which and '; ' + more}",
        )
        for which, more in sets.items()
        for name, (label, above, below, help, direction) in measures.items()
    }
    return found | {
        "unread": MetricInfo(
            label="POPE neither",
            higher_is_better=None,
            numerator="unread",
            percent=True,
            detail=True,
            help="answers without the word yes, no or not, which the rule counts all the same",
        )
    }
