"""Small files in the released formats of published sets, with pictures of plain colours."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A folder as COCO's 2014 release: train2014 and val2014 with 12 pictures each, ids 1 to 12 and 101 to 112."""
    for subset, first in (("train2014", 1), ("val2014", 101)):
        (tmp_path / "coco" / subset).mkdir(parents=True)
        for n in range(12):
            picture(first + n).save(tmp_path / "coco" / subset / coco_name(subset, first + n))
    return tmp_path / "coco"


def picture(n: int) -> Image.Image:
    return Image.new("RGB", (20 + n % 5, 16 + n % 3), (n % 256, 7 * n % 256, 255 - n))


def picture_bytes(n: int) -> bytes:
    out = io.BytesIO()
    picture(n).save(out, "JPEG")
    return out.getvalue()


def coco_name(subset: str, n: int) -> str:
    return f"COCO_{subset}_{n:012d}.jpg"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    """Write JSON, or lines of it where the value is a list and the name begins with pope."""

    def run(name: str, value: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = value if isinstance(value, str) else json.dumps(value)
        path.write_text(text, encoding="utf-8")
        return path

    return run


def karpathy_row(n: int, split: str, captions: int = 5, subset: str = "") -> dict[str, Any]:
    """One of ``images`` of dataset_coco.json."""
    subset = subset or ("train2014" if split == "train" else "val2014")
    said = [f"A picture of number {n} told in way {c}. " for c in range(captions)]
    sentences = [
        {"tokens": s.lower().strip(" .").split(), "raw": s, "imgid": n, "sentid": 1000 * n + c}
        for c, s in enumerate(said)
    ]
    return {
        "filepath": subset, "sentids": [s["sentid"] for s in sentences], "filename": coco_name(subset, n), "imgid": n,
        "split": split, "sentences": sentences, "cocoid": n,
    }  # fmt: skip


KARPATHY = {
    "images": [
        karpathy_row(101, "test"), karpathy_row(102, "restval", subset="val2014"), karpathy_row(1, "train"),
        karpathy_row(103, "val", captions=7), karpathy_row(104, "test", captions=6), karpathy_row(105, "test"),
        karpathy_row(2, "train"),
    ],
    "dataset": "coco",
}  # fmt: skip
