"""The model card of a run: what a reader of its weights must know, from what the run itself wrote down."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from zoo.compare.rundir import Run
from zoo.compare.text_tables import markdown, md

SPDX = {
    "cc-by-4.0": "cc-by-4.0", "cc-by-sa-4.0": "cc-by-sa-4.0", "cc-by-nc-4.0": "cc-by-nc-4.0", "cc0-1.0": "cc0-1.0",
    "mit": "mit", "apache-2.0": "apache-2.0", "bsd-3-clause": "bsd-3-clause",
}  # fmt: skip
"""Licences by the hub's names for them; any other is ``other`` there."""


STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % points of Student's t for 1 to 30 degrees of freedom."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Ends of the 95 % interval of the mean of two or more values: mean -+ t s / sqrt(n)."""
    factor = STUDENT[min(len(values) - 2, len(STUDENT) - 1)]
    half = factor * statistics.stdev(values) / math.sqrt(len(values))
    middle = statistics.fmean(values)
    return middle - half, middle + half


def card(run: Run, seeds: Sequence[Run] = ()) -> str:
    """README.md of the hub: its header, the recipe, data, budget and cost, and the results of the run and of its seeds.

    Args:
        seeds: Runs that differ from it in the seed alone, itself among them; none = it stands alone.
    """
    manifest = run.manifest
    data, budget = _mapping(run.config.get("data")), _mapping(manifest.get("budget"))
    licence = str(manifest.get("licence") or "unknown")
    known = SPDX.get(licence.lower().replace(" ", "-"))
    header = ["---", "library_name: mmzoo", f"license: {known or 'other'}"]
    if not known:
        header.append(f"license_name: {quoted('of the training data: ' + licence)}")
    header += ["tags:", "- multimodal", f"- {quoted(str(manifest.get('model', 'unknown')))}", "---"]
    changed = ", ".join(f"{key}={value}" for key, value in _pairs(manifest.get("changed"))) or "nothing"
    settings = "".join(f", {key}={value}" for key, value in data.items() if key != "name")
    training = [
        ("budget", f"{budget.get('value')} {budget.get('unit')}"),
        ("batch size", str(manifest.get("batch_size"))),
        ("seed", run.seed),
        ("learning rates times", str(manifest.get("lr_factor", 1))),
        *_costs(run),
        ("command", str(manifest.get("command", "unknown"))),
    ]
    parts = [
        (str(part["path"]), str(part["name"]), f"{int(part['parameters']):,}", "yes" if part.get("trained") else "no")
        for part in manifest.get("parts") or ()
    ]
    paragraphs = [
        "\n".join(header),
        f"# {md(run.name)}",
        f"Trained with mmzoo from the recipe `{manifest.get('model')}` at scale `{manifest.get('scale')}`; changed:"
        f" {md(changed)}.",
        '    import zoo\n    model = zoo.from_pretrained("OWNER/NAME")',
        "## Data",
        f"`{data.get('name', 'unknown')}`{md(settings)}. Licence of the data: {md(licence)}; it may bind what is done"
        " with these weights.",
        "## Training",
        markdown(("what", "value"), training),
        "## Parts",
        markdown(("part", "name", "parameters", "trained"), parts),
        "## Results",
        _results(run, seeds),
    ]
    return "\n\n".join(paragraph.rstrip("\n") for paragraph in paragraphs) + "\n"


def _results(run: Run, seeds: Sequence[Run]) -> str:
    split = _mapping(run.config.get("evaluation")).get("split", "unknown")
    done = [other for other in seeds if other.status == "done"]
    measured = [(task, name, value) for task, values in run.metrics.items() for name, value in values.items()]
    if not measured:
        return "Nothing was measured."
    if len(done) < 2:
        alone = f"On the split `{split}`, one seed: it shows no more than a direction, and there is no interval.\n\n"
        return alone + markdown(
            ("metric", "value"), [(f"{task}/{name}", f"{value:.4g}") for task, name, value in measured]
        )
    table = []
    for task, name, value in measured:
        others = [other.metrics[task][name] for other in done if name in other.metrics.get(task, {})]
        low, high = interval(others) if len(others) > 1 else (value, value)
        mean = statistics.fmean(others)
        table.append((f"{task}/{name}", f"{value:.4g}", f"{mean:.4g}", f"{low:.4g} to {high:.4g}"))
    head = (
        f"On the split `{split}`; the mean over the seeds {', '.join(other.seed for other in done)}, and its 95 %"
        " interval (Student's t over the seeds; nothing is said of other test items).\n\n"
    )
    return head + markdown(("metric", "this run", "mean of the seeds", "95 % interval"), table)


def _costs(run: Run) -> list[tuple[str, str]]:
    wanted = {
        "steps": (("cost", "steps"), "{:,.0f}"),
        "samples": (("cost", "samples"), "{:,.0f}"),
        "FLOPs": (("cost", "flops", "total"), "{:.3g}"),
        "seconds of training": (("cost", "seconds", "training"), "{:,.0f}"),
    }
    found = {what: (run.number(*keys), form) for what, (keys, form) in wanted.items()}
    out = [(what, form.format(value)) for what, (value, form) in found.items() if value is not None]
    hardware = _mapping(run.manifest.get("hardware"))
    if hardware:
        out.append(("hardware", ", ".join(f"{key} {value}" for key, value in hardware.items() if value)))
    return out


def quoted(text: str) -> str:
    """A YAML string, on one line."""
    import json

    return json.dumps(" ".join(text.split()), ensure_ascii=False)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _pairs(value: Any) -> list[tuple[str, Any]]:
    return [(str(pair[0]), pair[1]) for pair in value or () if isinstance(pair, list | tuple) and len(pair) == 2]
