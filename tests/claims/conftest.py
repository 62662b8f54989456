"""Run directories with scores that are made up: what reports of claims read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zoo.claims.claim import Claim, load_claim
from zoo.claims.plan import Plan

BODY: dict[str, Any] = {
    "title": "experts help",
    "system": "VLMo",
    "source": "arXiv 2111.02358, table 5",
    "paper": [{"metric": "NLVR2", "baseline": 78.81, "variant": 80.13, "checked": "via"}],
    "experiment": "claims-fusion",
    "baseline": {"shared": ["trunk.pair_layers=0"]},
    "variant": {"experts": []},
    "kind": "difference",
    "metric": "retrieval/i2t_r1",
    "minutes": 5.0,
    "first_minutes": 3.0,
}
ITEMS = 400


@pytest.fixture
def body() -> dict[str, Any]:
    """The fields of a claim that is right."""
    return BODY


@pytest.fixture
def make_claim() -> Callable[..., Claim]:
    """``make_claim("F10", kind=...)``: a claim with these fields in place of the usual ones."""

    def make(name: str = "F10", **changes: Any) -> Claim:
        return load_claim(name, {key: v for key, v in {**BODY, **changes}.items() if v is not None})

    return make


class Runs:
    """Writes run directories below ``out`` and the plan that names them."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def run(
        self,
        name: str,
        seed: int,
        *,
        hits: Sequence[float] | None = None,
        task: str = "retrieval",
        column: str = "i2t_hits_1",
        metrics: Mapping[str, float] | None = None,
        status: str = "done",
        flops: float = 1e12,
        seconds: float = 60.0,
        losses: Sequence[float] = (),
        **hashes: str,
    ) -> str:
        folder = self.out / name / f"seed={seed}-0123abcd"
        folder.mkdir(parents=True)
        manifest = {
            "name": name,
            "seed": seed,
            "status": status,
            "hashes": {"data": "d", "evaluation": "e", "budget": "b", "order": f"o{seed}", **hashes},
            "cost": {"flops": {"total": flops}, "seconds": {"training": seconds, "wall": seconds}},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "run.yaml").write_text(f"seed: {seed}\n")
        if hits is not None:
            self.items(folder, hits, task, column)
            metrics = {column.replace("hits_1", "r1"): float(np.mean(hits)), **(metrics or {})}
        (folder / "metrics.json").write_text(json.dumps({task: metrics or {}}))
        lines = [json.dumps({"step": n, "loss": loss}) for n, loss in enumerate(losses)]
        (folder / "curve.jsonl").write_text("\n".join(lines))
        return str(folder.relative_to(self.out))

    def items(self, folder: Path, hits: Sequence[float], task: str, column: str, spec: str = "s") -> None:
        (folder / "items").mkdir(parents=True, exist_ok=True)
        names = [f"item{n}" for n in range(len(hits))]
        table = pa.table({"item": names, "cluster": names, column: list(map(float, hits))})
        pq.write_table(table.replace_schema_metadata({"spec_hash": spec}), folder / "items" / f"{task}.parquet")

    def arm(self, name: str, rates: Sequence[float], **given: Any) -> dict[str, str]:
        """Seed -> run, of this share of hits each; runs of one seed hit the same items as far as they can."""
        found = {}
        for seed, rate in enumerate(rates):
            luck = np.random.default_rng(seed).random(ITEMS)
            own = np.random.default_rng(abs(hash_of(name)) + seed).random(ITEMS)
            hits = (np.where(own < 0.2, own * 5, luck) < rate).astype(float)
            found[str(seed)] = self.run(name, seed, hits=hits, **given)
        return found

    def plan(self, claim: Claim, scale: str = "tiny", **arms: Any) -> None:
        """Write the plan: role (``than_baseline`` for ``than.baseline``) -> seeds, or point -> seeds."""
        runs = {}
        for role, held in arms.items():
            points = held if isinstance(next(iter(held.values())), dict) else {"": held}
            runs[role.replace("_", ".")] = points
        Plan(claim.name, claim.digest(), scale, runs).write(self.out)


def hash_of(text: str) -> int:
    import zlib

    return zlib.crc32(text.encode())


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "outputs")
