"""A run: equal from equal seeds, resumable to the bit, on one process or two, whatever stops it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from zoo.checkpoints import load_checkpoint
from zoo.cli.overrides import run_config
from zoo.curve import read_lines
from zoo.data.llava_json import LlavaJsonConfig
from zoo.data.order import SampleOrder
from zoo.errors import RunError
from zoo.resuming import Keeper
from zoo.run_config import RunConfig
from zoo.survival import Interrupted
from zoo.train import run

SMALL = [
    "scale=tiny",
    "batch_size=16",
    "encoder.width=32",
    "encoder.depth=2",
    "encoder.ffn=64",
    "encoder.patch_size=16",
    "text_encoder.width=32",
    "text_encoder.depth=1",
    "text_encoder.ffn=64",
    "trainer.accelerator=cpu",
    "trainer.log_every=1",
    "trainer.checkpoint_every=3",
    "evaluation.split=val",
    "evaluation.tasks=[retrieval]",
]
SMALL_BRIDGE = [
    *(text for text in SMALL if not text.startswith(("text_encoder", "evaluation.tasks"))),
    "stages=joint",
    "connector=qformer",
    "connector.depth=2",
    "connector.width=32",
    "decoder.depth=1",
    "evaluation.tasks={caption-likelihood: {items: 4}}",
]


def prepared(folder: Path, *overrides: str, model: str = "clip") -> RunConfig:
    folder.mkdir(parents=True)
    sizes = SMALL if model == "clip" else SMALL_BRIDGE
    config = run_config([f"model={model}", *sizes, "budget.value=8", *overrides])
    config.write(folder / "run.yaml")
    return config


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_checkpoint(folder / "checkpoint")["state_dict"]
    return state


def curve(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(folder / "curve.jsonl")]


def assert_equal_weights(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the run to stop once, when it has taken ``step`` steps of a stage."""
    original = Keeper.on_train_batch_end

    def patched(self: Keeper, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == step:
            self.stop.asked = signal.SIGINT
        original(self, trainer, *rest)

    monkeypatch.setattr(Keeper, "on_train_batch_end", patched)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with dropout, two stages and EMA: everything that could make a resume differ."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    prepared(folder, *HARD)
    run(folder)
    return folder


HARD = [
    "trainer.ema=0.5",
    "stages=[{name: align, train: [encoder, image_projection], share: 5}, {name: joint, share: 3}]",
]


def test_a_finished_run_holds_everything_its_readers_expect(whole: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["status"] == "done"
    cost = manifest["cost"]
    assert (cost["steps"], cost["samples"]) == (8, 128)
    assert cost["flops"]["total"] == sum(
        stage["per_sample"] * steps * 16 for stage, steps in zip(manifest["flops"]["stages"], (5, 3), strict=True)
    )
    assert manifest["flops"]["stages"][0]["frozen_forward"] > 0  # the text tower is frozen in the first stage
    assert {"data", "order", "budget", "evaluation", "recipe"} <= set(manifest["hashes"])
    assert [step for step, _ in curve(whole)] == list(range(1, 9))
    assert (whole / "weights" / "model.safetensors").is_file()
    assert (whole / "items" / "retrieval.parquet").is_file()
    assert "retrieval" in json.loads((whole / "metrics.json").read_text())


def test_equal_seeds_give_equal_losses_and_weights_and_another_seed_does_not(whole: Path, tmp_path: Path) -> None:
    prepared(tmp_path / "again", *HARD)
    run(tmp_path / "again")
    assert curve(tmp_path / "again") == curve(whole)
    assert_equal_weights(tmp_path / "again", whole)
    prepared(tmp_path / "other", *HARD, "seed=1")
    run(tmp_path / "other")
    assert curve(tmp_path / "other") != curve(whole)


@pytest.mark.parametrize("step", [1, 4, 5])
def test_a_run_stopped_anywhere_and_resumed_ends_with_equal_weights(
    step: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stopped"
    prepared(folder, *HARD)
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(Interrupted):
            run(folder)
    assert json.loads((folder / "manifest.json").read_text())["status"] == "interrupted"
    run(folder)
    assert curve(folder) == curve(whole)
    assert_equal_weights(folder, whole)


def test_a_killed_run_resumes_from_its_last_checkpoint_with_equal_weights(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    prepared(folder, *HARD)
    code = f"from zoo.train import run; run({str(folder)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(2400):
        if len(read_lines(folder / "curve.jsonl")) >= 4 or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(folder)
    assert curve(folder) == curve(whole)
    assert_equal_weights(folder, whole)


def test_ctrl_c_leaves_a_resumable_run(tmp_path: Path) -> None:
    folder = tmp_path / "asked"
    prepared(folder, "budget.value=20000")
    process = subprocess.Popen(
        [sys.executable, "-m", "zoo.worker", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for _ in range(2400):
        if read_lines(folder / "curve.jsonl") or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    state = load_checkpoint(folder / "checkpoint")
    assert 0 < int(state["zoo_meter"]["steps"][0]) < 100000


@pytest.mark.parametrize("model", ["clip", "llava"])
def test_two_gloo_processes_equal_one_at_equal_global_batch(model: str, tmp_path: Path) -> None:
    prepared(tmp_path / "one", model=model)
    run(tmp_path / "one")
    prepared(tmp_path / "two", "trainer.devices=2", model=model)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "zoo.worker"]
    done = subprocess.run(
        [*command, str(tmp_path / "two")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [step for step, _ in one] == [step for step, _ in two] == list(range(1, 9))
    for (step, a), (_, b) in zip(one, two, strict=True):
        assert a == pytest.approx(b, abs=1e-5), step
    left, right = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=1e-4, rtol=1e-4)


def test_ranks_without_an_image_neither_hang_nor_change_the_losses(tmp_path: Path) -> None:
    """Dialogues of which half show no picture, one a rank: a rank of text alone still takes part in every reduction."""
    rows = []
    for number in range(24):
        ask = "what is it?" if number % 2 else "<image>\nwhat is it?"
        talk = [{"from": "human", "value": ask}, {"from": "gpt", "value": f"it is number {number}"}]
        rows.append({"id": str(number), "conversations": talk})
        if number % 2 == 0:
            rows[-1]["image"] = f"{number}.png"
            Image.new("RGB", (64, 64), (10 * number, 100, 200)).save(tmp_path / f"{number}.png")
    (tmp_path / "talk.json").write_text(json.dumps(rows))
    data = ["data=llava-json", f"data.file={tmp_path / 'talk.json'}", f"data.root={tmp_path}"]
    own = [*data, "batch_size=2", "wiring.template=llava_v1", "evaluation.tasks={}"]
    prepared(tmp_path / "one", *own, model="llava")
    run(tmp_path / "one")
    prepared(tmp_path / "two", "trainer.devices=2", *own, model="llava")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "zoo.worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "two")], capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    source = LlavaJsonConfig(file=str(tmp_path / "talk.json"), root=str(tmp_path)).build(64)
    drawn = SampleOrder(source.ids("train"), 0).slice(0, 16)
    shown = [source.sample(draw.id).image is not None for draw in drawn]
    assert any(a != b for a, b in zip(shown[::2], shown[1::2], strict=True))  # ranks of one step did differ
    for (step, a), (_, b) in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=1e-5), step


def test_a_run_for_two_devices_is_refused_in_one_process(tmp_path: Path) -> None:
    prepared(tmp_path / "two", "trainer.devices=2")
    with pytest.raises(RunError, match="for 2 devices but 1 processes"):
        run(tmp_path / "two")


def test_bf16_autocast_trains_close_to_fp32(whole: Path, tmp_path: Path) -> None:
    prepared(tmp_path / "bf16", *HARD, "trainer.precision=bf16")
    run(tmp_path / "bf16")
    for (step, a), (_, b) in zip(curve(tmp_path / "bf16"), curve(whole), strict=True):
        assert a == pytest.approx(b, rel=0.05), step
    assert curve(tmp_path / "bf16") != curve(whole)
    assert all(value.dtype != torch.bfloat16 for value in weights(tmp_path / "bf16").values())


def test_micro_batches_see_the_same_samples(tmp_path: Path) -> None:
    prepared(tmp_path / "micro", "trainer.accumulate=2")
    run(tmp_path / "micro")
    lines = read_lines(tmp_path / "micro" / "curve.jsonl")
    assert (lines[-1]["step"], lines[-1]["samples"]) == (8, 128)


def test_bf16_steps_on_a_cpu_compute_attention_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.nn import cpu_attention

    seen: list[torch.dtype] = []
    attend = cpu_attention._attend

    def spy(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(query.dtype)
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(cpu_attention, "_attend", spy)
    prepared(tmp_path / "run", "trainer.precision=bf16", "budget.value=1")
    run(tmp_path / "run", say=lambda text: None)
    assert seen
    assert set(seen) == {torch.float32}
