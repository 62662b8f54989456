"""Sweeps on a real Slurm of this machine (tests/cluster/slurm.sh); skipped with the reason where it cannot be had."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from zoo.cli import main
from zoo.cli.commands import sweep as command
from zoo.cluster.slurm import queue
from zoo.cluster.sweep import SlurmSweep, sweeps_of
from zoo.curve import read_lines

SCRIPT = Path(__file__).with_name("slurm.sh")
TINY = [
    "model=clip", "scale=tiny", "batch_size=4", "encoder.width=32", "encoder.depth=1", "encoder.ffn=64",
    "text_encoder.depth=1", "trainer.accelerator=cpu", "evaluation.tasks={}", "tracking=none", "data=folder",
    "data.split_column=split", "data.max_bad=0",
]  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([str(SCRIPT), "start", str(folder)], capture_output=True, text=True, check=False)
    if started.returncode == 3:
        pytest.skip(f"no Slurm here: {started.stdout.strip()}")
    assert started.returncode == 0, started.stderr
    before = dict(os.environ)
    os.environ |= {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        subprocess.run([str(SCRIPT), "stop", str(folder)], check=True, timeout=60)


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "POLL", 1.0)


def pictures(root: Path, torn: bool = False) -> Path:
    root.mkdir(exist_ok=True)
    rows = []
    for number in range(8):
        file = root / f"{number}.png"
        Image.new("RGB", (40, 40), (30 * number, 90, 200 - 20 * number)).save(file)
        if torn:
            file.write_bytes(file.read_bytes()[:60])
        rows.append({"image": file.name, "text": f"colour {number}", "split": "test" if number == 7 else "train"})
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def only(out: Path) -> SlurmSweep:
    (found,) = sweeps_of(out)
    return found


def until(true: Callable[[], object], seconds: float = 400.0) -> None:
    for _ in range(int(seconds / 0.25)):
        if true():
            return
        time.sleep(0.25)
    raise AssertionError("it did not come to it")


def test_twelve_jobs_three_of_which_fail_and_a_node_drained_in_the_middle(
    slurm: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    roots = [pictures(tmp_path / name, torn=name == "torn") for name in ("a", "b", "torn", "c")]
    line = [*TINY, "budget.value=1", f"data.root={','.join(map(str, roots))}", "seed=0,1,2", f"out={out}", "--slurm"]
    assert main(["sweep", *line]) == 0
    assert "12 of 12 runs submitted" in capsys.readouterr().out
    record = only(out)
    folders = [Path(job.directory) for job in record.jobs]
    finished = [folder / "manifest.json" for folder in folders]
    until(lambda: any(path.is_file() and '"done"' in path.read_text() for path in finished))
    drain = ["scontrol", "update", "nodename=two", "state=drain", "reason=test"]
    subprocess.run(drain, check=True)
    try:
        assert main(["sweep", *line]) == 0  # meanwhile: all are done or on their way, or failed and submitted again
        assert main(["sweep", "--wait", f"out={out}"]) == 2
    finally:
        subprocess.run(["scontrol", "update", "nodename=two", "state=resume"], check=True)
    capsys.readouterr()
    assert main(["sweep", "--status", f"out={out}"]) == 0
    said = capsys.readouterr().out
    assert "9 of 12 runs are done" in said
    assert [job.index for job in only(out).jobs if job.state == "failed"] == [6, 7, 8]
    assert said.count("  failed  ") == 3
    reasons = [text for text in said.splitlines() if text.startswith("      ")]
    assert len(reasons) == 3
    assert all("max_bad" in reason for reason in reasons)
    ended = {folder: (folder / "manifest.json").stat().st_mtime_ns for folder in folders}
    # what was wrong is put right, and the same command does these three
    pictures(roots[2])
    assert main(["sweep", *line, "--wait"]) == 0
    said = capsys.readouterr().out
    assert "3 of 12 runs submitted (9 done)" in said
    assert "12 of 12 runs are done" in said
    again = [folder for folder in folders if (folder / "manifest.json").stat().st_mtime_ns != ended[folder]]
    assert again == folders[6:9]


def test_a_run_that_is_told_to_stop_is_requeued_and_goes_on(slurm: None, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    root = pictures(tmp_path / "photos")
    own = ["budget.value=60", "trainer.checkpoint_every=5", "trainer.log_every=1", f"data.root={root}", f"out={out}"]
    assert main(["sweep", *TINY, *own, "--slurm", "--time=30"]) == 0
    (job,) = only(out).jobs
    curve = Path(job.directory) / "curve.jsonl"
    until(lambda: len(read_lines(curve)) > 10)
    subprocess.run(["scancel", "--signal=USR1", "--batch", job.task], check=True)  # what Slurm does before the limit
    assert main(["sweep", "--wait", f"out={out}"]) == 0
    log = only(out).log(job).read_text()
    assert f"task {job.task} on" in log
    assert "restart 1" in log
    assert [line["step"] for line in read_lines(curve)] == list(range(1, 61))


def test_a_run_on_two_nodes(slurm: None, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    own = [
        "budget.value=2",
        "trainer.nodes=2",
        "trainer.log_every=1",
        f"data.root={pictures(tmp_path / 'photos')}",
        f"out={out}",
    ]
    assert main(["sweep", *TINY, *own, "--slurm", "--wait"]) == 0
    (job,) = only(out).jobs
    assert job.nodes == 2
    assert [line["step"] for line in read_lines(Path(job.directory) / "curve.jsonl")] == [1, 2]
    until(lambda: not queue([only(out).job_name])[only(out).job_name])  # the ranks end with the run


def test_slurms_own_words_are_passed_on(slurm: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = pictures(tmp_path / "photos")
    line = [*TINY, "budget.value=1", f"data.root={root}", f"out={tmp_path / 'runs'}", "--slurm"]
    assert main(["sweep", *line, "--partition=gup"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: sbatch refused: invalid partition specified: gup")
