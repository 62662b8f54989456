"""A Slurm that is three small programs and a file: what is submitted stays queued until a test says how it went."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

PROGRAM = """#!{python}
import json, os, sys
path = {state!r}
state = json.load(open(path))
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
given = dict(a.lstrip("-").partition("=")[::2] for a in arguments)
state["calls"].append([name, *arguments])
if name == "sbatch":
    if state["refuse"]:
        json.dump(state, open(path, "w"))
        sys.exit("sbatch: error: " + state["refuse"] + chr(10) + "sbatch: error: Batch job submission failed: no")
    state["last"] += 1
    lines = open(arguments[-1]).read().splitlines()
    job = next(line.partition("=")[2] for line in lines if line.startswith("#SBATCH --job-name="))
    for part in given["array"].partition("%")[0].split(","):
        first, _, last = part.partition("-")
        for index in range(int(first), int(last or first) + 1):
            waits = "Dependency" if "dependency" in given else "Priority"
            state["queue"][f"{{state['last']}}_{{index}}"] = ["PENDING", waits, job]
    print(state["last"])
elif name == "squeue":
    if state["down"]:
        json.dump(state, open(path, "w"))
        sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    for task, (how, reason, job) in state["queue"].items():
        if job in given["name"].split(","):
            print("|".join([task, how, reason, job]))
elif name == "sacct":
    for task in given["jobs"].split(","):
        if task in state["ended"]:
            print(task + "|" + state["ended"][task])
json.dump(state, open(path, "w"))
"""


class FakeSlurm:
    """Programs in ``folder/bin``, their state in ``folder/slurm.json``."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "slurm.json"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self._write({"last": 100, "queue": {}, "ended": {}, "calls": [], "refuse": "", "down": False})
        for name in ("sbatch", "squeue", "sacct", "scontrol"):
            program = self.bin / name
            program.write_text(PROGRAM.format(python=sys.executable, state=str(self.path)))
            program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def _read(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.path.read_text())
        return state

    def _write(self, state: dict[str, Any]) -> None:
        self.path.write_text(json.dumps(state))

    def set(self, **values: Any) -> None:
        self._write({**self._read(), **values})

    def submitted(self) -> list[list[str]]:
        """Every sbatch command so far, without the program's name."""
        return [call[1:] for call in self._read()["calls"] if call[0] == "sbatch"]

    def end(self, task: str, how: str) -> None:
        """A task leaves the queue."""
        state = self._read()
        del state["queue"][task]
        state["ended"][task] = how
        self._write(state)

    def begin(self, task: str) -> None:
        state = self._read()
        state["queue"][task][0] = "RUNNING"
        self._write(state)
