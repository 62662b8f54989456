"""``python survive.py FOLDER``: what several processes do when they are killed, stopped, hung or resumed as others.

All scenarios in one process, which imports everything once and forks the ranks; prints one line of JSON about them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STEPS = 6


def benchmark() -> Any:
    """benchmarks/kill_resume.py as a module."""
    path = Path(__file__).parents[2] / "benchmarks" / "kill_resume.py"
    spec = importlib.util.spec_from_file_location("kill_resume", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def at_step(step: int, do: Callable[[Any], None]) -> None:
    """Have ``do(keeper)`` called when ``step`` steps are taken, before the keeper looks whether it is asked to stop."""
    from zoo.resuming import Keeper

    original = Keeper.on_train_batch_end

    def patched(self: Any, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == step:
            do(self)
        original(self, trainer, *rest)

    setattr(Keeper, "on_train_batch_end", patched)  # noqa: B010


def ask(keeper: Any) -> None:
    keeper.stop.asked = signal.SIGTERM


def log(folder: Path, rank: int) -> str:
    return (folder / f"rank{rank}.log").read_text()


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


def main(out: Path) -> dict[str, Any]:
    kills = benchmark()
    torch.set_num_threads(1)
    from torch.distributed.elastic.utils.distributed import get_free_port

    import zoo.cli.progress
    import zoo.train  # noqa: F401
    from zoo.run_config import RunConfig
    from zoo.survival import read_ended
    from zoo.worker import OWN_STORE

    told: dict[str, Any] = {"kills": kills.measure(out, 2, STEPS, 0)}
    expected = kills.result(out / "unbroken")

    # -- other numbers of processes: 2, then 1, then 4 -----------------------------------------------------------------
    folder = kills.prepare(out / "spread", STEPS)
    statuses = [kills.wait(kills.start(folder, 2, lambda rank: at_step(2, ask)), 200)]
    told["spread_shards"] = sum(1 for _ in (folder / "checkpoint" / "step-00000002").glob("*.safetensors"))
    plain = RunConfig.read(folder / "run.yaml").to_plain()
    for world, step in ((1, 4), (4, 0)):
        plain["trainer"]["devices"] = world
        RunConfig.from_plain(plain).write(folder / "run.yaml")
        before = (lambda rank: at_step(4, ask)) if step else None
        statuses.append(kills.wait(kills.start(folder, world, before), 200))
    told["spread"] = {"statuses": statuses, "losses": kills.result(folder)[0], "expected": expected[0]}

    # -- SIGUSR1 to one rank -------------------------------------------------------------------------------------------
    folder = kills.prepare(out / "asked", STEPS)
    ids = kills.start(folder, 2, lambda rank: at_step(3, raise_usr1) if rank else None)
    statuses = [kills.wait(ids, 200)]
    ended = read_ended(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    statuses.append(kills.wait(kills.start(folder), 200))
    told["asked"] = {
        "statuses": statuses, "ended": ended, "status": manifest["status"], "stopped_by": manifest["stopped_by"],
        "different": kills.differences(kills.result(folder), expected),
    }  # fmt: skip

    # -- a loss that is no number on rank 1 ----------------------------------------------------------------------------
    folder = kills.prepare(out / "nan", STEPS)
    statuses = kills.wait(kills.start(folder, 2, lambda rank: break_loss(4) if rank else None), 200)
    told["nan"] = {"statuses": statuses, "log": log(folder, 0), "kept": kept(folder), "ended": read_ended(folder)}

    # -- no room for rank 1's shard ------------------------------------------------------------------------------------
    folder = kills.prepare(out / "full", STEPS)
    statuses = kills.wait(kills.start(folder, 2, lambda rank: at_step(3, no_room) if rank else None), 200)
    told["full"] = {
        "statuses": statuses, "log": log(folder, 0), "kept": kept(folder), "not_whole": kills.whole(folder),
        "status": json.loads((folder / "manifest.json").read_text())["status"],
    }  # fmt: skip

    # -- rank 1 hangs --------------------------------------------------------------------------------------------------
    folder = kills.prepare(out / "hung", STEPS, "trainer.timeout=8")
    ids = kills.start(folder, 2, lambda rank: at_step(2, lambda keeper: time.sleep(600)) if rank else None)
    (status,) = kills.wait(ids[:1], 100)
    os.kill(ids[1], signal.SIGKILL)
    os.waitpid(ids[1], 0)
    manifest = json.loads((folder / "manifest.json").read_text())
    told["hung"] = {"status": status, "log": log(folder, 0), "kept": kept(folder), "error": manifest["error"]}

    # -- torch elastic starts the ranks again --------------------------------------------------------------------------
    folder = kills.prepare(out / "elastic", STEPS)
    elastic(folder)
    told["elastic"] = {
        "different": kills.differences(kills.result(folder), expected),
        "died": (folder / "died").is_file(),
        "status": json.loads((folder / "manifest.json").read_text())["status"],
    }

    # -- and the agents of two nodes, whose counts of restarts differ --------------------------------------------------
    folder = kills.prepare(out / "nodes", STEPS, "trainer.devices=1", "trainer.nodes=2")
    os.environ[OWN_STORE] = "1"
    endpoint = f"localhost:{get_free_port()}"
    told["nodes"] = {
        "statuses": kills.wait([agent(folder, endpoint) for _ in range(2)], 200),
        "different": kills.differences(kills.result(folder), expected),
        "died": (folder / "died").is_file(),
        "status": json.loads((folder / "manifest.json").read_text())["status"],
    }
    del os.environ[OWN_STORE]

    # -- shards of DTensors --------------------------------------------------------------------------------------------
    shared = out / "sharded"
    shared.mkdir()
    worlds = [kills.wait(kills.start(shared, 2, lambda rank: sharded(shared, rank)), 100)]
    told["sharded"] = {"statuses": worlds, "logs": [log(shared, rank) for rank in (0, 1)], "read": read_sharded(shared)}
    return told


def raise_usr1(keeper: Any) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def no_room(keeper: Any) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # the system's own error, without a disk to fill


def break_loss(step: int) -> None:
    """Let the loss be no number in the ``step``-th step, from 1."""
    from zoo.module import ZooModule

    original = ZooModule.losses
    calls = []

    def patched(self: Any, batch: Any) -> Any:
        total, report = original(self, batch)
        calls.append(1)
        if len(calls) == step:
            total = total * float("nan")
            report["loss"] = total.detach()
        return total, report

    setattr(ZooModule, "losses", patched)  # noqa: B010


def elastic(folder: Path, nodes: int = 1, endpoint: str = "localhost:0") -> None:
    """As ``zoo.worker.launch`` has torchrun do, but of forked workers; the first that is rank 1 kills itself."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=nodes, max_nodes=nodes, nproc_per_node=2 // nodes, run_id="survive", rdzv_backend="c10d",
        rdzv_endpoint=endpoint, max_restarts=1, start_method="fork", monitor_interval=0.1,
    )  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        elastic_launch(config, rank_of_elastic)(folder)


def agent(folder: Path, endpoint: str) -> int:
    """Fork the agent of one of two nodes; returns its id."""
    id = os.fork()
    if id:
        return id
    status = 99
    try:
        elastic(folder, 2, endpoint)
        status = 0
    finally:
        os._exit(status)


def rank_of_elastic(folder: Path) -> None:
    from zoo.worker import main

    if os.environ["RANK"] == "1" and not (folder / "died").exists():
        at_step(3, lambda keeper: die(folder))
    os.dup2(2, 1)
    status = main([str(folder)])
    if status:
        raise SystemExit(status)


def die(folder: Path) -> None:
    (folder / "died").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def sharded(folder: Path, rank: int) -> None:
    """Write a divided and a whole tensor from two ranks, then read each as the other; ends the process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from zoo import checkpoint_storage as storage
    from zoo.survival import join

    processes = join(30, False)
    mesh = init_device_mesh("cpu", (2,))
    whole = {"table": torch.arange(15.0).reshape(5, 3), "plain": torch.arange(7).to(torch.bfloat16)}
    state = {
        "table": distribute_tensor(whole["table"], mesh, [Shard(0)]), "plain": whole["plain"],
        "step": torch.tensor(3.0), "betas": (0.9, 0.999), "by number": {7: "seven"},
    }  # fmt: skip
    values = {"identity": "x", "stage": 0, "step": 1, "stage_step": 1, "processes": 2}
    more = {"keep": 2, "leave_out": lambda name: False, "group": processes.saving, "several": True}
    saving = storage.save(folder / "checkpoint" / "step-00000001", state, values, **more)
    state["plain"].fill_(-1)  # behind the copy: must not be in it
    saving.result()
    as_other = {
        "table": torch.zeros(5, 3),
        "plain": distribute_tensor(torch.zeros(7, dtype=torch.bfloat16), mesh, [Shard(0)]),
    }
    storage.load_into(folder / "checkpoint" / "step-00000001", as_other, processes.saving, True)
    assert torch.equal(as_other["table"], whole["table"])
    assert torch.equal(as_other["plain"].full_tensor(), torch.arange(7).to(torch.bfloat16))
    dist.destroy_process_group()
    os._exit(0)


def read_sharded(folder: Path) -> dict[str, Any]:
    """The same checkpoint in one process."""
    from zoo.checkpoints import latest

    checkpoint = latest(folder / "checkpoint")
    assert checkpoint is not None
    state = checkpoint.read()
    return {
        "table": state["table"].tolist(), "plain": state["plain"].tolist(), "step": state["step"].item(),
        "betas": list(state["betas"]), "tuple": isinstance(state["betas"], tuple), "seven": state["by number"][7],
        "files": len(checkpoint.index["files"]),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
