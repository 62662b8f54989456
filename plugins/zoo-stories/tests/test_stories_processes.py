"""Each wiring of StoryDiffusion in several processes, under DDP and FSDP2: the losses of one."""

from __future__ import annotations

from typing import Any

import pytest
from zoo_stories import PLUGIN

from zoo.plugin import Catalogue
from zoo.recipe import resolve
from zoo.testing.processes import STRATEGIES, WORLDS, Trained, check_losses, train_in_processes

FRAMES, MOVES = {"name": "story-frames"}, {"name": "moving-scenes"}
MODELS: list[dict[str, Any]] = [
    {"recipe": "story-diffusion", "data": FRAMES},
    {"recipe": "frame-diffusion", "data": MOVES},
    {"recipe": "motion-predictor", "data": MOVES},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_in_processes(MODELS, tmp_path_factory.mktemp("processes"), plugin=("stories", "zoo_stories"))


@pytest.mark.parametrize("model", [m["recipe"] for m in MODELS])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ranks", WORLDS)
def test_several_processes_train_to_the_losses_of_one(model: str, ranks: int, strategy: str, trained: Trained) -> None:
    check_losses(trained, model, ranks, strategy)


def test_every_wiring_of_the_plugin_is_among_them(found: Catalogue) -> None:
    tried = {resolve(m["recipe"], scale="micro").wiring[0] for m in MODELS}
    assert tried == {c.name for c in PLUGIN.components if c.kind == "wiring"}
