"""The record of what a metric means, apart from the catalogue, whose parts all use it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """One metric of one task.

    Attributes:
        label: short column heading.
        higher_is_better: direction; ``None`` for a quantity that is only described.
        numerator: item column that is summed; ``""`` when the metric does not follow from sums (a median).
        denominator: item column that is summed and divided by; ``""`` divides by the number of items.
        percent: shown times 100.
        primary: the one metric of the task that plots and summaries show.
        detail: shown only in the task's own table, not in the overview.
        help: one line for the reader of a report.
    """

    label: str
    higher_is_better: bool | None = True
    numerator: str = ""
    denominator: str = ""
    percent: bool = False
    primary: bool = False
    detail: bool = False
    help: str = ""
