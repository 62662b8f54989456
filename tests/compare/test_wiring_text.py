"""What ``zoo show`` says of a model."""

from __future__ import annotations

import re

import torch

from zoo.api import build_module, describe
from zoo.compare.wiring import part_rows
from zoo.recipe import resolve


def test_each_stage_states_the_share_that_trains() -> None:
    shown = describe("llava", scale="tiny")
    lines = re.findall(r"total +([\d.]+) M +([\d.]+) (k|M) trained = ([\d.]+) %", shown)
    assert len(lines) == shown.count("\nstage ") == 2
    for total, trained, unit, share in lines:
        millions = float(trained) / (1000 if unit == "k" else 1)
        assert abs(float(share) - 100 * millions / float(total)) < 0.02 * float(share)


def test_blip2_trains_what_its_paper_counts() -> None:
    with torch.device("meta"):
        module = build_module(resolve("blip2-opt"), 0)
    rows = {row.path: row for row in part_rows(module)}
    assert {path for path, row in rows.items() if row.trained} == {"connector"}
    assert 103e6 <= rows["connector"].trained <= 108e6  # Table 2: the trainable parameters of stage 2
    assert 0.028 < rows["connector"].trained / sum(row.parameters for row in rows.values()) < 0.029
