"""A million small samples in shards: packing, reading by 1, 2 and 4 readers that are killed again and again, memory.

    python benchmarks/shards_million.py [--samples 1000000] [--kills 20] [--folder FOLDER]

Readers are processes that take their share of each global batch, as ranks do, and write down the places they have read.
A reader that is killed goes on from the batch behind its last whole line, as a run does from its checkpoint.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

BATCH = 1000


def resident() -> float:
    """MB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def read(folder: Path, log: Path, rank: int, world_size: int) -> None:
    """Read one epoch from where the log ends: a line a batch of the rows that were read."""
    from zoo.data.order import share, training_order
    from zoo.data.shards import ShardsConfig

    source = ShardsConfig(root=str(folder)).build()
    order = training_order(source, 0)
    row = {id: n for n, id in enumerate(source.ids("train"))}
    whole = [line for line in log.read_bytes().split(b"\n") if line.endswith(b";")] if log.exists() else []
    log.write_bytes(b"".join(line + b"\n" for line in whole))
    with log.open("ab", buffering=0) as out:
        for step in range(len(whole), len(row) // BATCH):
            places = order.slice(*share(step, BATCH, rank, world_size))
            for place in places:
                line = int(place.id.rpartition(":")[2])  # texts stand in every second one
                assert source.sample(place.id).texts == (f"sample number {line // 2 + 1}",)
            out.write(b"%.1f " % resident() + b" ".join(b"%d" % row[place.id] for place in places) + b";\n")


def epoch(folder: Path, readers: int, kills: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Rows that were read, how much memory each batch of the first reader had, and seconds."""
    logs = [folder / f"log-{readers}-{rank}" for rank in range(readers)]
    for log in logs:
        log.unlink(missing_ok=True)
    stream = random.Random(readers)
    started = time.perf_counter()

    def start(rank: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, __file__, "--read", str(folder), str(logs[rank]), str(rank), str(readers)]
        return subprocess.Popen(command)

    running = {rank: start(rank) for rank in range(readers)}
    left = kills
    while running:
        time.sleep(stream.uniform(0.2, 2.0) if left else 0.2)
        if left:
            rank = stream.choice(sorted(running))
            if running[rank].poll() is None and logs[rank].exists():
                os.kill(running[rank].pid, signal.SIGKILL)
                running[rank].wait()
                running[rank] = start(rank)
                left -= 1
        for rank in [r for r, process in running.items() if process.poll() is not None]:
            assert running.pop(rank).returncode == 0
    lines = [line.rstrip(b";").split() for log in logs for line in log.read_bytes().splitlines()]
    rows = np.concatenate([np.array(line[1:], np.int64) for line in lines])
    first = np.array([float(line.split()[0]) for line in logs[0].read_bytes().splitlines()])
    return rows, first, time.perf_counter() - started


def main() -> None:
    if sys.argv[1:2] == ["--read"]:
        read(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--folder", default=None)
    arguments = parser.parse_args()
    from zoo.data.pack import Packing, pack

    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="shards-"))
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "lines.txt"
    lines.write_text("".join(f"sample number {n}\n\n" for n in range(1, arguments.samples + 1)))
    data = {"name": "texts", "root": str(lines), "val_fraction": 0.0, "test_fraction": 0.0}
    started = time.perf_counter()
    said = pack(Packing(data=data, out=folder / "out", samples=10_000, splits=("train",), workers=os.cpu_count() or 1))
    size = sum(shard["bytes"] for shard in said["shards"])
    seconds = time.perf_counter() - started
    print(f"packed {arguments.samples} samples, {size / 1e6:.0f} MB, {len(said['shards'])} shards in {seconds:.0f} s")
    for readers in (1, 2, 4):
        rows, memory, seconds = epoch(folder / "out", readers, arguments.kills)
        times = np.bincount(rows, minlength=arguments.samples)
        tenth = max(1, len(memory) // 10)
        early, late = memory[:tenth].mean(), memory[-tenth:].mean()
        missing, twice = (times == 0).sum(), (times > 1).sum()
        print(
            f"{readers} readers, {arguments.kills} kills: {len(rows)} reads, {missing} missing, {twice} twice; memory"
            f" {early:.0f} MB in the first tenth, {late:.0f} MB in the last ({late / early:.3f}); {seconds:.0f} s"
        )


if __name__ == "__main__":
    main()
