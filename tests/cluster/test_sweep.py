"""zoo sweep --slurm against programs that play Slurm: what is submitted, and again, and what is said."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cluster.fakes import FakeSlurm
from zoo import worker
from zoo.cli import main
from zoo.cli.commands import sweep as command
from zoo.cluster.script import Options, ranges, submissions
from zoo.cluster.sweep import Job, SlurmSweep, sweeps_of
from zoo.errors import RunError
from zoo.run_config import RunConfig

TINY = ["model=clip", "scale=tiny", "trainer.accelerator=cpu", "budget.value=1", "evaluation.tasks={}", "tracking=none"]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path)
    monkeypatch.setenv("PATH", str(fake.bin), prepend=":")
    return fake


def only(out: Path) -> SlurmSweep:
    (found,) = sweeps_of(out)
    return found


def says(folder: Path, status: str, error: str | None = None) -> None:
    """What a run's task would write."""
    (folder / "manifest.json").write_text(json.dumps({"status": status, "error": error}))


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    status = main(["sweep", *argv])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert status == 2, lines
    assert len(lines) == 1
    return lines[0]


def test_a_sweep_is_one_array_and_the_same_command_submits_what_is_missing(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    line = [*TINY, "seed=0,1,2,3,4", f"out={out}", "--slurm", "--partition", "gpu", "--time=1:00:00", "--gpus", "2"]
    assert main(["sweep", *line, "--array-parallel", "2", "--sbatch=--account=abc"]) == 0
    said = capsys.readouterr()
    assert "5 of 5 runs submitted" in said.out
    assert "every node's own" in said.err  # a temporary folder
    (array,) = slurm.submitted()
    assert array[:-1] == [
        "--parsable", "--array=0-4%2", "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=2"
    ]  # fmt: skip
    record = only(out)
    assert [job.task for job in record.jobs] == [f"101_{index}" for index in range(5)]
    plain = json.loads(record.path.read_text())["jobs"]["3"]
    assert plain["directory"] == record.jobs[3].directory
    assert plain["command"].endswith(f"zoo.cluster.task {record.path} 3")
    assert all((Path(job.directory) / "run.yaml").is_file() for job in record.jobs)
    text = record.script.read_text()
    for option in ("partition=gpu", "time=1:00:00", "account=abc", "requeue", "signal=B:USR1@120", "open-mode=append"):
        assert f"\n#SBATCH --{option}\n" in text
    assert subprocess.run(["sh", "-n", str(record.script)], check=False).returncode == 0

    # one runs, one is done, one failed by itself, one was ended by Slurm, one still waits
    says(Path(record.jobs[1].directory), "done")
    says(Path(record.jobs[2].directory), "failed", "the loss is not a number")
    says(Path(record.jobs[3].directory), "running")
    slurm.begin("101_0")
    for index, how in ((1, "COMPLETED"), (2, "FAILED"), (3, "TIMEOUT")):
        slurm.end(f"101_{index}", how)
    assert main(["sweep", *line]) == 0
    said = capsys.readouterr()
    assert "failed: " in said.out
    assert "the loss is not a number" in said.out
    assert "Slurm ended it: TIMEOUT" in said.out
    assert "2 of 5 runs submitted (1 done, 1 running, 1 queued)" in said.out
    assert slurm.submitted()[1][1] == "--array=2-3"
    assert [job.task for job in only(out).jobs] == ["101_0", "101_1", "102_2", "102_3", "101_4"]

    # a larger sweep takes none of the runs that the first has on their way
    assert main(["sweep", *TINY, "seed=4,5", f"out={out}", "--slurm"]) == 0
    assert "1 of 2 runs submitted (1 queued)" in capsys.readouterr().out
    assert slurm.submitted()[2][1] == "--array=1"

    # a record that was lost between sbatch and writing: the queue knows
    record = only_named(out, record.folder.name)
    for job in record.jobs:
        job.task = ""
    record.write()
    assert main(["sweep", *line]) == 0
    assert "nothing to submit of 5 runs: 1 done, 1 running, 3 queued" in capsys.readouterr().out
    assert only_named(out, record.folder.name).jobs[2].task == "102_2"

    # and its table
    assert main(["sweep", "--status", record.folder.name, f"out={out}"]) == 0
    table = capsys.readouterr().out
    assert "1 of 5 runs are done" in table
    assert "Priority" in table
    assert "did you mean" in refused(capsys, "--status", record.folder.name[:-1], f"out={out}")

    # what is queued is not known: nothing is submitted
    slurm.set(down=True)
    before = len(slurm.submitted())
    assert "Unable to contact slurm controller" in refused(capsys, *line)
    assert len(slurm.submitted()) == before


def only_named(out: Path, name: str) -> SlurmSweep:
    return next(sweep for sweep in sweeps_of(out) if sweep.folder.name == name)


def test_first_runs_are_tasks_that_others_wait_for(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    # the eye of experiment=connectors, without its learning-rate search
    own = ["connector=linear", "wiring.visual_tokens=0", "seed=0,1", "tune=none", f"out={out}"]
    line = ["experiment=connectors", "scale=tiny", *own, "--slurm"]
    assert main(["sweep", *line]) == 0
    assert "1 run that come first" in capsys.readouterr().out
    eye, rest = slurm.submitted()
    assert eye[1] == "--array=0"
    assert "--dependency=afterok:101_0" in rest
    record = only(out)
    assert [job.after for job in record.jobs] == [[], *([[0]] * (len(record.jobs) - 1))]
    # the eye failed: Slurm cancels what waited for it, and both are to be done again
    says(Path(record.jobs[0].directory), "failed", "no space")
    slurm.end("101_0", "FAILED")
    for job in record.jobs[1:]:
        slurm.end(job.task, "CANCELLED by 0")
    assert main(["sweep", "--status", f"out={out}"]) == 0
    assert "a run that comes first" in " ".join(capsys.readouterr().out.split())
    assert main(["sweep", *line]) == 0
    assert "--dependency=afterok:103_0" in slurm.submitted()[3]
    # the eye is done: nothing waits for it any more
    says(Path(record.jobs[0].directory), "done")
    slurm.end("103_0", "COMPLETED")
    for job in only(out).jobs[1:]:
        slurm.end(job.task, "NODE_FAIL")
    assert main(["sweep", *line]) == 0
    assert not [option for option in slurm.submitted()[4] if "dependency" in option]


def test_a_learning_rate_search_is_an_array_of_trials_and_then_one_of_runs(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    own = ["evaluation.tasks=[naming]", "tune=lr3", "tune.factors=[1,3]", "tune.metric=naming/top1", "seed=0,1"]
    line = [text for text in TINY if "tasks" not in text] + [*own, f"out={out}", "--slurm"]
    assert main(["sweep", *line]) == 0
    assert "2 of 2 trials of the learning-rate search submitted" in capsys.readouterr().out
    record = only(out)
    assert record.folder.name.endswith("-trials")
    for job, value in zip(record.jobs, (0.25, 0.75), strict=True):
        says(Path(job.directory), "done")
        (Path(job.directory) / "metrics.json").write_text(json.dumps({"naming": {"top1": value}}))
        slurm.end(job.task, "COMPLETED")
    assert main(["sweep", *line]) == 0
    assert "2 of 2 runs submitted" in capsys.readouterr().out
    runs = next(sweep for sweep in sweeps_of(out) if sweep.folder.name != record.folder.name)
    for job in runs.jobs:
        assert json.loads((Path(job.directory) / "tuning.json").read_text())["factor"] == 3
        assert RunConfig.read(Path(job.directory) / "run.yaml").lr_factor == 3


def test_wait_returns_when_nothing_is_on_its_way(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs"
    assert main(["sweep", *TINY, "seed=0,1", f"out={out}", "--slurm", "--name", "mine"]) == 0
    record = only(out)
    assert record.folder.name == "mine"

    def later(seconds: float) -> None:
        index = len(slurm._read()["ended"])
        says(Path(record.jobs[index].directory), "done" if index else "interrupted")
        slurm.end(f"101_{index}", "COMPLETED" if index else "PREEMPTED")

    monkeypatch.setattr(command, "sleep", later)
    assert main(["sweep", "--wait", "mine", f"out={out}"]) == 2
    said = capsys.readouterr().out
    assert "2 queued" in said
    assert "1 done, 1 interrupted" in said
    assert "Slurm: PREEMPTED" in said
    assert main(["sweep", *TINY, "seed=0,1", f"out={out}", "--slurm", "--name", "mine"]) == 0
    assert slurm.submitted()[-1][1] == "--array=0"


def test_what_can_be_wrong_is_one_line_and_nothing_is_submitted(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs"
    line = [*TINY, "seed=0,1", f"out={out}", "--slurm"]
    assert "wdth" in refused(capsys, *line, "encoder.wdth=1,2")  # of the second variant as of the first
    assert "--partition" in refused(capsys, *TINY, "--partition", "gpu")
    assert "--gpus many" in refused(capsys, *line, "--gpus", "many")
    assert "--slrum" in refused(capsys, *TINY, "--slrum")
    assert "--name a/b" in refused(capsys, *line, "--name", "a/b")
    assert "holds none" in refused(capsys, "--status", f"out={out}")
    assert not out.exists()
    assert slurm.submitted() == []
    slurm.set(refuse="invalid partition specified: gup")
    assert (
        refused(capsys, *line, "--partition=gup")
        == "error: sbatch refused: invalid partition specified: gup; Batch job submission failed: no"
    )
    slurm.set(refuse="")
    assert main(["sweep", *line, "--name=one"]) == 0
    assert "record of another sweep" in refused(capsys, *TINY, "seed=7,8", f"out={out}", "--slurm", "--name=one")
    (out / ".slurm" / "one" / "sweep.json").write_text("[]")
    assert "not the record of a sweep" in refused(capsys, *line, "--name=one")
    shutil.rmtree(out)
    (slurm.bin / "sbatch").unlink()
    monkeypatch.setenv("PATH", str(slurm.bin))
    assert "sbatch is not on PATH" in refused(capsys, *line)
    assert not out.exists()
    capsys.readouterr()
    assert main(["sweep", *line, "--dry-run"]) == 0  # needs no Slurm and leaves nothing
    shown = capsys.readouterr().out
    assert "#SBATCH --signal=B:USR1@120" in shown
    assert "sbatch --parsable --array=0-1" in shown
    assert not out.exists()


def test_what_goes_to_sbatch_together() -> None:
    jobs = [
        Job(0, "eye"),
        *(Job(i, str(i), cpus=2 if i % 2 else 1, nodes=2 if i == 6 else 1, after=[0]) for i in range(1, 8)),
    ]
    parts = submissions(jobs, Options(parallel=4))
    assert [[job.index for job in part.jobs] for part in parts] == [[0], [1, 3, 5, 7], [2, 4], [6]]
    record = SlurmSweep(Path("runs/.slurm/x"), "zoo sweep", "/home", jobs)
    assert "--dependency=afterok:9_0" in parts[1].command(record, {0: "9_0"})
    assert not [text for text in parts[1].command(record, {}) if "dependency" in text]
    assert "--nodes=2" in parts[3].command(record, {})
    assert ranges([7, 0, 1, 2, 5]) == "0-2,5,7"


def test_how_the_ranks_of_a_run_are_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    assert "--standalone" in worker.start_command(folder, 2)  # a rendezvous and a port of its own
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(RunError, match=r"trainer.nodes = 2, but this is no Slurm job: .*zoo sweep --slurm"):
        worker.start_command(folder, 4, 2)
    hosts = tmp_path / "scontrol"  # names of nodes need not be those that resolve
    hosts.write_text('#!/bin/sh\n[ "$3" = node ] && echo "NodeName=$4 NodeHostName=h-$4 " || echo "n7 n8"\n')
    hosts.chmod(0o755)
    for name, value in {"PATH": str(tmp_path), "SLURM_JOB_ID": "40123", "SLURM_CPUS_PER_TASK": "6"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    with pytest.raises(RunError, match="this Slurm job has 1"):
        worker.start_command(folder, 4, 2)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    command = worker.start_command(folder, 4, 2)
    assert command[:6] == [
        "srun",
        "--nodes=2",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
        "--cpus-per-task=6",
    ]
    assert {"--nnodes=2", "--nproc-per-node=4", "--rdzv-endpoint=h-n7:20123", "--rdzv-id=40123"} <= set(command)
