"""Checkpoints on disk: whole or not taken, a few kept, nothing in them run; a damaged one is passed over, in a line."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo import checkpoint_storage as storage
from zoo.checkpoints import latest, load_checkpoint
from zoo.errors import RunError, WeightsError
from zoo.resuming import Saver, quiet_lightning
from zoo.survival import Processes, full_disk

VALUES = {"identity": "this run", "stage": 0, "stage_step": 1, "processes": 1}


def state_at(step: int) -> dict[str, Any]:
    tied = torch.full((4, 3), float(step))
    return {"weights": {"a": tied, "b": tied, "c": torch.arange(5) + step}, "betas": (0.9, 0.99), "none": None}


def write(folder: Path, step: int, keep: int = 2) -> Path:
    path = folder / storage.NAME.format(step)
    folder.mkdir(exist_ok=True)
    values = {**VALUES, "step": step}
    with quiet_lightning():
        storage.save(path, state_at(step), values, keep=keep, leave_out=lambda name: False).result()
    return path


def shard(path: Path) -> Path:
    (file,) = path.glob("*.safetensors")
    return file


def test_what_is_written_is_read_and_older_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path / "checkpoint", step)
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == ["step-00000002", "step-00000003"]
    checkpoint = latest(tmp_path / "checkpoint", "this run")
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.stage, checkpoint.stage_step) == (3, 0, 1)
    state = checkpoint.read()
    assert torch.equal(state["weights"]["a"], torch.full((4, 3), 3.0))
    assert state["weights"]["b"] is state["weights"]["a"]  # tied tensors are written once
    assert torch.equal(state["weights"]["c"], torch.arange(5) + 3)
    assert state["betas"] == (0.9, 0.99)
    assert state["none"] is None
    assert set(checkpoint.read("betas")) == {"betas"}


def truncate(path: Path) -> None:
    os.truncate(shard(path), shard(path).stat().st_size - 4)


def change(path: Path) -> None:
    data = bytearray(shard(path).read_bytes())
    data[-2] ^= 1
    shard(path).write_bytes(bytes(data))


def lose(path: Path) -> None:
    shard(path).unlink()


def unfinished(path: Path) -> None:
    (path / "index.json").unlink()


def cut_index(path: Path) -> None:
    os.truncate(path / "index.json", 40)


def outside(path: Path) -> None:
    index = json.loads((path / "index.json").read_text())
    index["files"] = {"../secret.safetensors": [1, "x"]}
    (path / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (truncate, "bytes in place of"), (change, "has changed"), (lose, "is missing"), (unfinished, "has no index"),
        (cut_index, "cannot be read"), (outside, "secret"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over_in_one_line(tmp_path: Path, harm: Any, reason: str) -> None:
    folder = tmp_path / "checkpoint"
    write(folder, 1)
    harm(write(folder, 2))
    lines: list[str] = []
    checkpoint = latest(folder, "this run", say=lines.append)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert len(lines) == 1
    assert reason in lines[0]
    assert lines[0].endswith("going on from step-00000001")
    write(folder, 2)  # the run comes there again
    again = latest(folder, "this run", say=lines.append)
    assert again is not None
    assert again.step == 2
    assert len(lines) == 1


def test_when_none_is_whole_the_run_is_not_quietly_begun_anew(tmp_path: Path) -> None:
    truncate(write(tmp_path / "checkpoint", 1))
    with pytest.raises(WeightsError, match=r"bytes in place of .*delete .* to start the run again") as caught:
        latest(tmp_path / "checkpoint", "this run")
    assert "\n" not in str(caught.value)
    assert latest(tmp_path / "nothing", "this run") is None
    with pytest.raises(WeightsError, match="holds no checkpoint"):
        load_checkpoint(tmp_path / "nothing")


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint", 1)
    with pytest.raises(WeightsError, match=r"belongs to another run .*this run, here that one"):
        latest(tmp_path / "checkpoint", "that one")


def test_half_written_and_half_removed_ones_have_no_checkpoints_name(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write(folder, 1)
    for name in ("step-00000002.partial", "step-00000000.removed"):
        (folder / name).mkdir()
        (folder / name / "index.json").write_text("{}")
    found = latest(folder, "this run")
    assert found is not None
    assert found.step == 1
    Saver(folder, "this run", 2, Processes()).clear()
    assert [p.name for p in folder.iterdir()] == ["step-00000001"]


def test_nothing_in_a_checkpoint_is_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, ("touch " + str(tmp_path / "ran"),))

    path = write(tmp_path / "checkpoint", 1)
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))  # where DCP's own storage would look
    load_checkpoint(tmp_path / "checkpoint")
    (path / "index.json").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(WeightsError, match="cannot be read"):
        load_checkpoint(tmp_path / "checkpoint")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(TypeError, match="cannot hold weights/x, a Evil"):
        storage.split({"weights": {"x": Evil()}})


def test_a_full_disk_while_writing_is_one_line_and_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint"
    write(folder, 1)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "sync", full)
    saver = Saver(folder, "this run", 2, Processes())
    values = {**VALUES, "step": 2}
    with quiet_lightning():
        saver._writing = storage.save(
            folder / storage.NAME.format(2), state_at(2), values, keep=2, leave_out=lambda name: False
        )
    with pytest.raises(RunError, match=r"No space left on device; the last checkpoint is intact") as caught:
        saver.wait()
    assert "\n" not in str(caught.value)
    left = latest(folder, "this run")
    assert left is not None
    assert left.step == 1
    assert full_disk(OSError(errno.ENOENT, "not there"), folder) is None


def test_large_states_are_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FILE_BYTES", 40)
    path = write(tmp_path / "checkpoint", 1)
    assert len(list(path.glob("*.safetensors"))) == 2
    assert torch.equal(load_checkpoint(tmp_path / "checkpoint")["weights"]["c"], torch.arange(5) + 1)
