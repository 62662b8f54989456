"""The claims of the plugin: they compose, their runs are built, and can do what is measured."""

from __future__ import annotations

from pathlib import Path

import torch

from zoo.api import build_module
from zoo.claims.claim import read_claims
from zoo.cli.claim_runs import Resolver
from zoo.cli.experiments import read_experiment
from zoo.frozen_features import check_cacheable
from zoo.plugin import catalogue

NAMES = ("D1", "D1-text", "D2", "D3", "D3-whole")


def test_every_run_is_built_and_offers_what_its_claim_measures() -> None:
    resolver, built = Resolver("tiny", [0], Path("outputs")), 0
    firsts: dict[str, set[Path]] = {}
    arms: dict[str, set[Path]] = {}
    for claim in read_claims(NAMES):
        found = resolver.claim(claim)
        for runs in found.all:
            for name, sweep in runs.firsts.items():
                firsts.setdefault(name, set()).update(sweep.configs)
            arms.setdefault(claim.name, set()).update(runs.sweep.configs)
            for config in runs.sweep.configs.values():
                check_cacheable(config)
                with torch.device("meta"):
                    model = build_module(config.recipe, 0).model
                task = catalogue()["task"].parse(claim.task, config.evaluation.tasks[claim.task], claim.task).build()
                assert task.missing(model) == (), claim.name
                built += 1
    assert built == 2 * len(NAMES)
    assert set(firsts) == {"story-judge", "story-texts", "story-latents", "story-drawn", "scene-eye"}
    assert all(len(folders) == 1 for folders in firsts.values())
    assert arms["D1"] == arms["D1-text"]
    assert len(arms["D1"] & arms["D3"]) == len(arms["D3"] & arms["D3-whole"]) == 1


def test_the_experiment_sweeps_rates() -> None:
    (command,) = read_experiment(["experiment=stories"]).commands(["experiment=stories"])
    assert any(text.startswith("wiring.rate=0.0,0.3,0.5,1.0") for text in command)
