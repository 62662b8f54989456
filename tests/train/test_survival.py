"""Several processes that are killed, stopped, hung, broken or resumed as others; all scenarios are in survive.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from zoo.cli.commands.train import exit_status
from zoo.cli.jobs import Outcome
from zoo.survival import INTERRUPTED, LOST, REQUEUE, Interrupted, Stop, requeue, status_of


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("survive")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("survive.py")), str(out)],
        capture_output=True, text=True, check=False, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def test_a_run_that_is_killed_twice_ends_equal_to_the_unbroken_one(told: dict[str, Any]) -> None:
    kills = told["kills"]
    assert kills["kills"] == 2
    assert kills["different"] == []
    assert kills["not_whole"] == []
    assert kills["hung"] == 0


def test_a_checkpoint_of_two_processes_is_resumed_by_one_and_then_by_four(told: dict[str, Any]) -> None:
    spread = told["spread"]
    assert spread["statuses"] == [[0, 0], [0], [0, 0, 0, 0]]
    assert told["spread_shards"] == 2  # both processes wrote
    assert [step for step, _ in spread["losses"]] == [step for step, _ in spread["expected"]]
    for (_, ours), (_, theirs) in zip(spread["losses"], spread["expected"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_usr1_to_one_rank_stops_all_at_one_step_and_the_run_goes_on_equal(told: dict[str, Any]) -> None:
    asked = told["asked"]
    assert asked["statuses"] == [[0, 0], [0, 0]]  # under torch elastic a stop on request is no failure
    assert asked["ended"]["status"] == "interrupted"
    assert asked["ended"]["signal"] == asked["stopped_by"] == "SIGUSR1"
    assert asked["status"] == "interrupted"
    assert asked["different"] == []


def test_a_loss_that_is_no_number_ends_with_the_ranks_samples_and_keeps_what_was_good(told: dict[str, Any]) -> None:
    nan = told["nan"]
    assert nan["statuses"] == [2, 2]
    line = next(line for line in nan["log"].splitlines() if line.startswith("error: "))
    assert "rank 1: " in line
    assert "rank 0" not in line
    assert line.count(".png") == 4  # the samples of rank 1, half of the batch of 8
    assert "batch 4 " in line
    assert nan["kept"] == ["step-00000002", "step-00000003"]
    assert nan["ended"]["status"] == "failed"  # so that torch elastic does not start it again


def test_no_room_for_one_ranks_shard_ends_all_with_a_line_and_keeps_the_checkpoints_before(
    told: dict[str, Any],
) -> None:
    full = told["full"]
    assert full["statuses"] == [2, 2]
    lines = [line for line in full["log"].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "the last checkpoint is intact: free space and repeat" in lines[0]
    assert "Traceback" not in full["log"]
    assert {"step-00000001", "step-00000002"} <= set(full["kept"])
    assert "step-00000003" not in full["kept"]
    assert full["not_whole"] == []
    assert full["status"] == "failed"


def test_a_rank_that_hangs_is_named(told: dict[str, Any]) -> None:
    hung = told["hung"]
    assert hung["status"] == LOST
    assert "rank 1 did not arrive within 8 seconds" in hung["log"]
    assert "rank 1 did not arrive" in hung["error"]
    assert "step-00000001" in hung["kept"]


def test_torch_elastic_starts_a_killed_rank_again_and_the_run_ends_equal(told: dict[str, Any]) -> None:
    assert told["elastic"] == {"different": [], "died": True, "status": "done"}


def test_the_agents_of_two_nodes_start_their_ranks_again_and_the_run_ends_equal(told: dict[str, Any]) -> None:
    assert told["nodes"] == {"statuses": [0, 0], "different": [], "died": True, "status": "done"}


def test_divided_tensors_are_read_whole_and_whole_ones_divided(told: dict[str, Any]) -> None:
    sharded = told["sharded"]
    assert sharded["statuses"] == [[0, 0]], sharded["logs"]
    read = sharded["read"]
    assert read["table"] == [[3.0 * i, 3.0 * i + 1, 3.0 * i + 2] for i in range(5)]
    assert read["plain"] == [float(i) for i in range(7)]
    assert read["step"] == 3.0
    assert read["betas"] == [0.9, 0.999]
    assert read["tuple"]
    assert read["seven"] == "seven"
    assert read["files"] == 2


def test_exit_statuses_say_whether_to_start_again() -> None:
    assert exit_status([Outcome(Path("a"), "done")]) == 0
    assert exit_status([Outcome(Path("a"), "interrupted"), Outcome(Path("b"), "done")]) == INTERRUPTED
    assert exit_status([Outcome(Path("a"), "interrupted", signal="SIGUSR1")]) == REQUEUE
    assert exit_status([Outcome(Path("a"), "failed", "x")]) == 2
    assert [status_of(name) for name in ("SIGTERM", "SIGUSR1", "SIGINT", None)] == [75, 75, 130, 130]


def test_signals_between_steps_end_at_once_and_in_steps_wait_for_their_end(tmp_path: Path) -> None:
    stop = Stop(tmp_path)
    before = signal.getsignal(signal.SIGUSR1)
    with stop.listening():
        stop.stepping = True
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.poll() == signal.SIGUSR1
        with pytest.raises(KeyboardInterrupt):
            stop.hear(signal.SIGINT)  # asked already: at once
        stop.stepping = False
        with pytest.raises(Interrupted):
            stop.hear(signal.SIGTERM)
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_file_asks_as_a_signal_does_and_is_gone_then(tmp_path: Path) -> None:
    stop = Stop(tmp_path)
    assert stop.poll() == 0
    (tmp_path / "stop").touch()
    stop._looked = time.monotonic() - 2  # it is looked for once a second
    assert stop.poll() == signal.SIGTERM
    assert not (tmp_path / "stop").exists()


def test_slurm_is_asked_to_requeue_only_where_the_user_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "scontrol"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("ZOO_REQUEUE", raising=False)
    assert requeue() is None
    assert not (tmp_path / "called").exists()
    monkeypatch.setenv("ZOO_REQUEUE", "1")
    assert requeue() == "job 17 is requeued"
    assert (tmp_path / "called").read_text() == "requeue 17\n"
    tool.write_text("#!/bin/sh\necho no such job >&2\nexit 1\n")
    assert "no such job" in str(requeue())
    monkeypatch.delenv("SLURM_JOB_ID")
    assert requeue() is None


def test_launch_turns_a_signal_into_a_request_and_returns_what_the_ranks_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for torchrun waits for the request, and ends as ranks do that were asked by SIGUSR1."""
    from zoo import worker
    from zoo.survival import write_ended

    agent = tmp_path / "agent.py"
    agent.write_text(
        "import pathlib, sys, time\n"
        f"stop = pathlib.Path({str(tmp_path / 'stop')!r})\n"
        f"pathlib.Path({str(tmp_path / 'started')!r}).touch()\n"
        "while not stop.exists(): time.sleep(0.02)\n"
    )
    real = subprocess.Popen
    monkeypatch.setattr(worker.subprocess, "Popen", lambda command, **more: real([sys.executable, str(agent)], **more))

    def ask() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.02)
        write_ended(tmp_path, "interrupted", 0, signal="SIGUSR1")
        os.kill(os.getpid(), signal.SIGUSR1)

    asking = threading.Thread(target=ask)
    asking.start()
    before = signal.getsignal(signal.SIGUSR1)
    assert worker.launch(tmp_path, 2) == REQUEUE
    asking.join()
    assert signal.getsignal(signal.SIGUSR1) is before
    assert not (tmp_path / "stop").exists()
