"""Each wiring of StoryDiffusion in several processes, under DDP and FSDP2: the losses of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.testing.processes import check_processes

FRAMES, MOVES = {"name": "story-frames"}, {"name": "moving-scenes"}
MODELS: list[dict[str, Any]] = [
    {"recipe": "story-diffusion", "data": FRAMES},
    {"recipe": "frame-diffusion", "data": MOVES},
    {"recipe": "motion-predictor", "data": MOVES},
]


def test_several_processes_train_to_the_losses_of_one(tmp_path: Path) -> None:
    check_processes(MODELS, tmp_path, plugin=("stories", "zoo_stories"))
