"""LISA and PixelLM in several processes, under DDP and FSDP2: the losses of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.testing.processes import check_processes

ASKED = {
    "name": "openmoji-grounding",
    "icons": "train",
    "kinds": 12,
    "objects": "2..4",
    "questions": "name+every+several",
    "turns": 1,
}
MODELS: list[dict[str, Any]] = [{"recipe": "lisa", "data": ASKED}, {"recipe": "pixellm", "data": ASKED}]


def test_several_processes_train_to_the_losses_of_one(tmp_path: Path) -> None:
    check_processes(MODELS, tmp_path, plugin=("grounding", "zoo_grounding"))
