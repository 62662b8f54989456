"""kill -9 a run of two gloo processes at random moments, resume it each time, and compare it with the unbroken run.

    python benchmarks/kill_resume.py [--kills 50] [--steps 20] [--seed 0] [--out FOLDER]

A run is killed, at a moment drawn uniformly, as a whole or one rank alone (the other must then end by itself); the next
attempt resumes it. When it comes to its end its weights and every line's loss are compared with the unbroken run's, bit
by bit, and another begins, until all kills are spent. A checkpoint is written after every step, beside the next ones.
After each kill every folder that has a checkpoint's name must be whole, by its checksums.

What is killed are processes forked from one that has imported everything, which saves the start-up of Python; each
reads its configuration, builds the model, meets the other one and resumes as ``zoo.worker`` does, which it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

SMALL = [
    "model=clip", "scale=tiny", "encoder.width=32", "encoder.depth=1", "encoder.ffn=64", "encoder.patch_size=32",
    "text_encoder.width=32", "text_encoder.depth=1", "text_encoder.ffn=64", "batch_size=8", "trainer.accelerator=cpu",
    "trainer.log_every=1", "trainer.checkpoint_every=1", "trainer.ema=0.5", "trainer.timeout=20", "trainer.devices=2",
    "evaluation.tasks={}", "tracking=none",
]  # fmt: skip


def start(folder: Path, world: int = 2, before: Any = None, **environment: str) -> list[int]:
    """Fork the ranks of a run; returns their ids.

    Args:
        before: Called in each, with its rank.
    """
    from torch.distributed.elastic.utils.distributed import get_free_port

    from zoo.testing.processes import rank_environment

    port = get_free_port()
    ids = []
    for rank in range(world):
        id = os.fork()
        if id == 0:
            status = 99
            try:
                os.environ.update(rank_environment(rank, world, port), **environment)
                log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                if before is not None:
                    before(rank)
                from zoo.worker import main

                status = main([str(folder)])
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                with contextlib.suppress(BaseException):
                    import sys

                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(status)
        ids.append(id)
    return ids


def wait(ids: list[int], seconds: float) -> list[int]:
    """Exit statuses, negative signals for those that were killed; who is still there after ``seconds`` is killed."""
    end = time.monotonic() + seconds
    statuses: dict[int, int] = {}
    while len(statuses) < len(ids):
        for id in ids:
            if id not in statuses:
                done, status = os.waitpid(id, os.WNOHANG)
                if done:
                    statuses[id] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for id in ids:
                if id not in statuses:
                    os.kill(id, signal.SIGKILL)
                    os.waitpid(id, 0)
                    statuses[id] = 1000  # hung
            break
        time.sleep(0.02)
    return [statuses[id] for id in ids]


def alive(id: int) -> bool:
    """Whether a child still runs; one that ended is left for ``wait``."""
    return os.waitid(os.P_PID, id, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def prepare(folder: Path, steps: int, *overrides: str) -> Path:
    """A run directory with its run.yaml; images and captions are beside it, made here once."""
    from zoo.cli.overrides import run_config

    images = folder.parent / "images"
    if not images.exists():
        images.mkdir(parents=True)
        draw = random.Random(0)
        for number in range(64):
            colours = bytes(draw.randrange(256) for _ in range(48))
            picture = Image.frombytes("RGB", (4, 4), colours).resize((64, 64), Image.Resampling.NEAREST)
            picture.save(images / f"picture {number} {draw.choice(('red', 'blue', 'round', 'old'))}.png")
    folder.mkdir(parents=True)
    data = ["data=folder", f"data.root={images}"]
    run_config([*SMALL, *data, f"budget.value={steps}", *overrides]).write(folder / "run.yaml")
    return folder


def result(folder: Path) -> tuple[list[tuple[int, float]], dict[str, Any]]:
    """Losses of all steps and all tensors of the last checkpoint."""
    from zoo.checkpoint_storage import empty, load_into
    from zoo.checkpoints import latest
    from zoo.curve import read_lines

    checkpoint = latest(folder / "checkpoint")
    assert checkpoint is not None
    tensors = empty(checkpoint.index, checkpoint.index["tensors"])
    load_into(checkpoint.folder, tensors)
    return [(line["step"], line["loss"]) for line in read_lines(folder / "curve.jsonl")], tensors


def differences(one: tuple[Any, dict[str, Any]], other: tuple[Any, dict[str, Any]]) -> list[str]:
    """What of two results is not equal to the bit."""
    import torch

    found = [] if one[0] == other[0] else ["losses"]
    if one[1].keys() != other[1].keys():
        return [*found, "names"]
    return [*found, *(name for name in one[1] if not torch.equal(one[1][name], other[1][name]))]


def whole(folder: Path) -> list[str]:
    """Checkpoints that are not."""
    from zoo.checkpoint_storage import Damaged, check_files, found, read_index

    bad = []
    for path in found(folder / "checkpoint"):
        try:
            check_files(path, read_index(path))
        except Damaged as error:
            bad.append(f"{path.name}: {error}")
    return bad


def steps_of(folder: Path) -> int:
    from zoo.curve import read_lines

    lines = read_lines(folder / "curve.jsonl")
    return int(lines[-1]["step"]) if lines else 0


def warm(folder: Path) -> None:
    """Count the recipe's FLOPs and ask git once, for all attempts: both are the same each time."""
    from zoo import manifest
    from zoo.run_config import RunConfig

    counted = manifest.count_recipe(RunConfig.read(folder / "run.yaml").recipe)
    state = manifest.record.git_state()
    manifest.count_recipe = lambda recipe, **more: counted
    manifest.record.git_state = lambda: state


def measure(out: Path, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """Run the chain; see the module's text."""
    from zoo.checkpoint_storage import found

    draw = random.Random(seed)
    began = time.monotonic()
    unbroken = prepare(out / "unbroken", steps)
    warm(unbroken)
    ids = start(unbroken)
    first = 0.0
    while any(alive(id) for id in ids):
        if not first and steps_of(unbroken):
            first = time.monotonic() - began
        time.sleep(0.02)
    assert wait(ids, 1) == [0, 0], (unbroken / "rank0.log").read_text()
    length = time.monotonic() - began
    expected = result(unbroken)
    told: dict[str, Any] = {
        "steps": steps, "kills": 0, "one_rank_alone": 0, "before_first_step": 0, "while_stepping": 0,
        "half_written_left": 0, "hung": 0, "not_whole": [], "runs": 0, "resumed_from": [], "different": [],
        "unbroken_seconds": round(length, 1),
    }  # fmt: skip
    folder: Path | None = None
    span = min(length, 1.5 * first)  # kills fall within it; it follows how busy the machine is
    while told["kills"] < kills or folder is not None:
        if folder is None:
            folder = prepare(out / f"killed{told['runs']}", steps)
        before = steps_of(folder)
        ends = found(folder / "checkpoint")
        if ends:
            told["resumed_from"].append(int(ends[0].name[5:]))
        started = time.monotonic()
        ids = start(folder)
        if told["kills"] < kills:
            moment = started + draw.uniform(0, span)
            while time.monotonic() < moment and all(alive(id) for id in ids):
                time.sleep(0.005)
            if all(alive(id) for id in ids):
                victims = draw.choice([ids, ids[:1], ids[1:]])
                for id in victims:
                    os.kill(id, signal.SIGKILL)
                told["kills"] += 1
                told["one_rank_alone"] += len(victims) == 1
                statuses = wait(ids, 100)
                told["hung"] += statuses.count(1000)
                early = steps_of(folder) <= before
                told["before_first_step" if early else "while_stepping"] += 1
                span *= 1.15 if early else 1
                told["half_written_left"] += any((folder / "checkpoint").glob("step-*.partial"))
                told["not_whole"] += whole(folder)
                continue
        statuses = wait(ids, 600)
        assert statuses == [0, 0], (statuses, (folder / "rank0.log").read_text()[-3000:])
        told["runs"] += 1
        span = min(span, time.monotonic() - started)
        told["different"] += differences(result(folder), expected)
        folder = None
    told["seconds"] = round(time.monotonic() - began, 1)
    used = os.times()
    told["cpu_seconds"] = round(used.user + used.system + used.children_user + used.children_system, 1)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    import torch

    import zoo.cli.progress
    import zoo.train  # noqa: F401  what every attempt needs, imported once

    torch.set_num_threads(1)  # also in the forked processes, which cannot use their parent's threads
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(given.out or Path(folder), given.kills, given.steps, given.seed), indent=1))


if __name__ == "__main__":
    main()
