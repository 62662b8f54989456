"""A sweep through Hydra's launchers, and over devices: every job is a run of its own, whoever starts it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from zoo.cli import main
from zoo.compare.rundir import Run
from zoo.curve import read_lines

TINY = [
    "model=clip", "scale=tiny", "batch_size=4", "encoder.width=32", "encoder.depth=1", "encoder.ffn=64",
    "text_encoder.depth=1", "trainer.accelerator=cpu", "trainer.log_every=1", "budget.value=2", "evaluation.tasks={}",
    "tracking=none",
]  # fmt: skip


def finished(out: Path) -> list[Path]:
    """Run directories, all of them done."""
    folders = sorted(path.parent for path in out.glob("*/*/run.yaml"))
    assert [Run.read(folder).status for folder in folders] == ["done"] * len(folders)
    return folders


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder / "curve.jsonl")]


def test_a_multirun_over_devices_trains_a_run_for_each_to_the_losses_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["train", *TINY, "trainer.devices=1,2,4", f"out={tmp_path / 'ddp'}", "-m"]) == 0
    assert main(["train", *TINY, "trainer.devices=2,4", "strategy=fsdp", f"out={tmp_path / 'fsdp'}", "-m"]) == 0
    one, *copied = finished(tmp_path / "ddp")
    divided = finished(tmp_path / "fsdp")
    name = one.name.removesuffix("-devices=1")  # one configuration, one hash
    assert [folder.name for folder in (*copied, *divided)] == 2 * [f"{name}-devices=2", f"{name}-devices=4"]
    assert len(losses(one)) == 2
    for folder in (*copied, *divided):  # whose ranks refuse a world of another size than the configuration's
        assert losses(folder) == pytest.approx(losses(one), abs=1e-5)


@pytest.mark.parametrize(
    ("launcher", "module", "extra"),
    [
        ("joblib", "hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
        ("submitit_local", "hydra_submitit_launcher", []),
        ("ray", "hydra_ray_launcher", ["+hydra.launcher.ray.init.num_cpus=2"]),
    ],
)
def test_hydras_launchers_run_the_jobs_of_a_sweep(
    launcher: str, module: str, extra: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.{module}") is None:
        pytest.skip(f"{module} is not installed: it comes with the extra {launcher.partition('_')[0]}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    try:
        line = [*TINY, "seed=0,1", f"hydra/launcher={launcher}", *extra, f"out={tmp_path}", "-m"]
        assert main(["train", *line]) == 0
    finally:
        if launcher == "ray":
            import ray

            ray.shutdown()
    first, second = finished(tmp_path)
    assert len(losses(first)) == len(losses(second)) == 2
    assert losses(first) != losses(second)
