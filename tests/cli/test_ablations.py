"""The experiment files of Transfusion's ablations: what their sweeps run, at the scale a laptop can."""

from __future__ import annotations

import pytest

from zoo.cli.experiments import read_experiment
from zoo.cli.overrides import expand, prepare, run_config, with_quotes

JUDGE = "outputs/clip+stages=joint/seed=0-c663ac55"


@pytest.mark.parametrize(
    ("experiment", "names"),
    [
        (
            "transfusion-ablations",
            {
                "transfusion+wiring.image_attention=full",
                "transfusion+wiring.image_attention=causal",
                "transfusion+patch_codec=unet+wiring.image_attention=full",
                "transfusion+patch_codec=unet+wiring.image_attention=causal",
            },
        ),
        (
            "transfusion-patches",
            {
                "transfusion",
                "transfusion+patch_codec=unet",
                *(f"transfusion+{codec}patch_codec.patch={n}" for n in (1, 4) for codec in ("", "patch_codec=unet+")),
            },
        ),
        ("transfusion-noise-limit", {"transfusion", "transfusion+objective.diffusion.noise_limit=1"}),
    ],
)
def test_sweeps_and_names(experiment: str, names: set[str]) -> None:
    written = [f"experiment={experiment}", "scale=tiny", "seed=0", f"evaluation.tasks.text-to-image.evaluator={JUDGE}"]
    (command,) = read_experiment(written).commands([*written, "init=outputs/kl-tokenizer/seed=0-1"])
    jobs = [run_config(job) for job in expand(prepare(command))]
    shared = ("+objective.diffusion.prediction=v_prediction", "+optimizer.lr=0.003")
    assert all(part in job.recipe.name for job in jobs for part in shared)
    assert {"".join(job.recipe.name.replace(shared[0], "").split(shared[1])) for job in jobs} == names
    assert len(jobs) == len(names)
    for job in jobs:
        assert job.evaluation.tasks["text-to-image"]["evaluator"] == JUDGE
        assert job.evaluation.tasks["text-to-image"]["guidance"] == 3.0
        assert "caption-likelihood" in job.evaluation.tasks
        assert job.trainer.cache_features
    limits = {job.recipe.objectives["diffusion"].noise_limit for job in jobs}  # type: ignore[attr-defined]
    assert limits == ({0.5, 1.0} if "noise" in experiment else {0.5})


def test_paths_of_runs_are_quoted() -> None:
    written = [f"evaluation.tasks.scene-check.evaluator={JUDGE}", "init=outputs/kl/seed=0-1", "data.name=x=y"]
    assert with_quotes(["init=null"]) == ["init=null"]
    assert with_quotes(written) == [
        f"evaluation.tasks.scene-check.evaluator='{JUDGE}'", "init='outputs/kl/seed=0-1'", "data.name=x=y",
    ]  # fmt: skip
