"""Two variants of a comparison consume the same samples in the same order, whatever reads and whatever stops them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.train import recorder
from tests.train.recorder import consumed, recording
from zoo.cli.overrides import run_config
from zoo.data.openmoji import OpenMojiConfig
from zoo.data.order import SampleOrder
from zoo.resuming import Keeper
from zoo.survival import Interrupted
from zoo.train import run

COMMON = [
    "scale=tiny", "batch_size=8", "budget.value=6", "seed=3", "trainer.accelerator=cpu", "trainer.checkpoint_every=1",
    "decoder.width=32", "decoder.heads=2", "decoder.kv_heads=2", "decoder.depth=1", "decoder.ffn=64",
    "evaluation.tasks={}", "data.split_scheme=random",
]  # fmt: skip
EYE = ["model=llava", "encoder.width=32", "encoder.depth=2", "encoder.ffn=64", "wiring.augment=shift"]
STAGES = "stages=[{name: align, train: [connector]}, {name: instruct, train: [connector, decoder]}]"
CODES = ["image_tokenizer=lfq", "stages=[{name: one, train: [decoder]}]"]
PAIRS = {
    "llava with an MLP and with a Q-Former": (
        [*EYE, STAGES, "connector=mlp"],
        [*EYE, STAGES, "connector=qformer", "connector.width=32", "connector.depth=1", "connector.ffn=32"],
    ),
    "Show-o and Chameleon": (["model=show-o", *CODES], ["model=chameleon", *CODES]),
}


def seen(folder: Path, overrides: list[str], how: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run ``overrides`` one of several ways, and return what its steps consumed."""
    own = {"two workers": ["trainer.workers=2"], "one worker": ["trainer.workers=1"], "two processes": []}
    folder.mkdir(parents=True)
    processes = 2 if how == "two processes" else 1
    config = run_config([*COMMON, *overrides, *own.get(how, []), f"trainer.devices={processes}"])
    config.write(folder / "run.yaml")
    log = folder / "seen"
    if processes == 2:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
        root = Path(recorder.__file__).parents[2]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        worker = [recorder.__file__, str(folder), str(log)]
        done = subprocess.run([*command, *worker], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return consumed(log)
    with recording(log):
        if how == "a resume":
            original = Keeper.on_train_batch_end

            def stopping(self: Keeper, trainer: Any, *rest: Any) -> None:
                self.stop.asked = signal.SIGINT if trainer.global_step == 2 else 0
                original(self, trainer, *rest)

            with monkeypatch.context() as patch:
                patch.setattr(Keeper, "on_train_batch_end", stopping)
                with pytest.raises(Interrupted):
                    run(folder)
        run(folder)
    return consumed(log)


@pytest.mark.parametrize("pair", PAIRS)
def test_variants_consume_the_same_samples_in_the_same_order(
    pair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = SampleOrder(OpenMojiConfig(split_scheme="random").build(64).ids("train"), 3)
    intended = [[zlib.crc32(d.id.encode()) for d in order.slice(8 * s, 8 * s + 8)] for s in range(6)]
    pixels: dict[int, list[Any]] = {}
    for number, variant in enumerate(PAIRS[pair]):
        for how in ("one worker", "two workers", "two processes", "a resume"):
            steps = seen(tmp_path / f"{number}-{how.replace(' ', '-')}", variant, how, monkeypatch)
            assert [step["seen"] for step in steps] == intended, (variant, how)
            assert [step["draws"] for step in steps] == [[0] * 8] * 6
            # augmented by the sample's id: every way of reading gives the same pixels
            assert pixels.setdefault(number, [step["pixels"] for step in steps]) == [step["pixels"] for step in steps]
    if pair.startswith("llava"):
        assert pixels[0] == pixels[1]
        assert all(len(rows) == 8 for rows in pixels[0])


def test_a_recorder_sees_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof above would fail if a rank read another's share, or another seed's order."""
    first, _ = PAIRS["llava with an MLP and with a Q-Former"]
    ours = seen(tmp_path / "a", [*first, "budget.value=2"], "alone", monkeypatch)
    theirs = seen(tmp_path / "b", [*first, "seed=4", "budget.value=2"], "alone", monkeypatch)
    assert [s["seen"] for s in ours] != [s["seen"] for s in theirs]
    monkeypatch.setattr(
        "zoo.data.loader.share", lambda step, size, rank=0, world=1: (step * size + 1, (step + 1) * size + 1)
    )
    shifted = seen(tmp_path / "c", [*first, "budget.value=2"], "alone", monkeypatch)
    assert [s["seen"] for s in ours] != [s["seen"] for s in shifted]
    assert ours[0]["seen"][1:] == shifted[0]["seen"][:-1]
