"""CapFilt: caption, filter, write, train again; at a tiny size, so that what counts is who is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.api import build_module
from zoo.cli import main
from zoo.data import capfilt
from zoo.data.capfilt import CapFilt, captioner_of, clean, filter_of
from zoo.data.folder import Folder, FolderConfig
from zoo.data.openmoji import OpenMojiConfig
from zoo.errors import ConfigError, RunError
from zoo.module import ZooModule
from zoo.recipe import resolve

SMALL: dict[str, dict[str, int]] = {
    "encoder": {"image_size": 32, "width": 32, "heads": 2, "ffn": 48, "depth": 1},
    "text_encoder": {"width": 32, "heads": 2, "ffn": 48, "depth": 1},
    "decoder": {"width": 32, "heads": 2, "ffn": 48, "depth": 1},
}


class Few:
    """The first icons of every split, noisy as they are."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.kept = {split: source.ids(split)[:n] for split, n in (("train", 60), ("val", 4), ("test", 6))}

    def ids(self, split: str) -> list[str]:
        return list(self.kept[split])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


@pytest.fixture(scope="module")
def source() -> Few:
    return Few(OpenMojiConfig(size=32, shuffled_captions=0.8, trusted=0.3).build())


@pytest.fixture(scope="module")
def blip() -> ZooModule:
    return build_module(resolve("blip", scale="tiny", values={**SMALL, "stages": "joint"}), 0)


@pytest.fixture(scope="module")
def cleaned(blip: ZooModule, source: Few, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any, Any]]:
    """The new dataset, its summary, and every judgement with the logits behind it."""
    seen: list[tuple[str, bool, float, float]] = []
    original = capfilt.judged

    def spied(module: ZooModule, images: Any, texts: Any) -> list[bool]:
        kept = original(module, images, texts)
        model: Any = module.model
        rows = model.processor.encode_texts(texts)
        with torch.no_grad():
            logits = model.match_logits(
                model.processor.encode_images(images), rows["input_ids"], rows["attention_mask"]
            )
        seen.extend(zip(texts, kept, *logits.T.tolist(), strict=True))
        return kept

    capfilt.judged = spied
    try:
        out = tmp_path_factory.mktemp("capfilt") / "clean"
        summary = clean(blip, source, out, CapFilt(steps=3, batch_size=16, max_new_tokens=6), lambda line: None)
        yield out, summary, seen
    finally:
        capfilt.judged = original


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / capfilt.CAPTIONS).read_text().splitlines()]


def test_parts_start_as_copies_and_do_not_share(blip: ZooModule) -> None:
    captioner, judge = captioner_of(blip), filter_of(blip)
    own = blip.model.state_dict()
    for part in (captioner, judge):
        for name, tensor in part.model.state_dict().items():
            assert torch.equal(tensor, own[name])
            assert tensor.data_ptr() != own[name].data_ptr()
    assert not hasattr(captioner.model, "match")
    assert not hasattr(judge.model, "generate_text")


def test_what_the_filter_rejects_is_not_in_the_dataset(cleaned: tuple[Path, Any, Any], source: Few) -> None:
    out, summary, seen = cleaned
    rows = rows_of(out)
    assert {row["source"] for row in rows} <= {"human", "web", "synthetic"}
    for _, kept, no, yes in seen:
        assert kept == (yes >= no)
    counts = summary["captions"]
    web = [id for id in source.ids("train") if not source.text_sample(id).meta["trusted"]]
    assert counts["web"]["judged"] == counts["synthetic"]["judged"] == len(web)
    assert len(seen) == 2 * len(web)
    kept = sum(bool(text) and yes >= no for text, _, no, yes in seen)
    assert kept == sum(row["split"] == "train" and row["source"] != "human" for row in rows)
    assert counts["web"]["kept"] + counts["synthetic"]["kept"] == kept
    trained = {row["id"] for row in rows if row["split"] == "train" and row["source"] == "web"}
    rejected = {id for id in web if id not in trained}
    assert all(not any(r["id"] == id and r["source"] == "web" for r in rows) for id in rejected)


def test_trusted_pairs_and_other_splits_are_kept_as_they_are(cleaned: tuple[Path, Any, Any], source: Few) -> None:
    out, summary, _ = cleaned
    human = {(row["split"], row["id"]): row["caption"] for row in rows_of(out) if row["source"] == "human"}
    for split in ("val", "test"):
        assert {id for s, id in human if s == split} == set(source.ids(split))
    trusted = [id for id in source.ids("train") if source.text_sample(id).meta["trusted"]]
    assert summary["trusted"] == len(trusted) == sum(s == "train" for s, _ in human)
    assert all(human["train", id] == source.truth(id)[0] for id in trusted)


def test_the_summary_measures_right_captions(cleaned: tuple[Path, Any, Any], source: Few) -> None:
    out, summary, _ = cleaned
    ids = source.ids("train")
    right = sum(source.text_sample(id).texts == source.truth(id) for id in ids)
    assert summary["right_before"] == pytest.approx(right / len(ids))
    rows = [row for row in rows_of(out) if row["split"] == "train"]
    assert summary["right_after"] == pytest.approx(
        sum(row["caption"] == source.truth(row["id"])[0] for row in rows) / len(rows)
    )
    assert json.loads((out / capfilt.SUMMARY).read_text()) == json.loads(json.dumps(summary))


def test_a_filter_that_sees_raises_the_share(
    blip: ZooModule, source: Few, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a filter that is right on nine texts of ten the dataset gets cleaner; images without any text leave it."""
    shown = iter([id for id in source.ids("train") if not source.text_sample(id).meta["trusted"]] * 2)

    def seeing(module: ZooModule, images: Any, texts: Any) -> list[bool]:
        ids = [next(shown) for _ in texts]
        return [
            (text in source.truth(id)) != (n % 10 == 0) for n, (id, text) in enumerate(zip(ids, texts, strict=True))
        ]

    monkeypatch.setattr(capfilt, "judged", seeing)
    monkeypatch.setattr(capfilt, "fine_tune", lambda *args: None)
    config = CapFilt(steps=1, batch_size=16, max_new_tokens=4)
    summary = clean(blip, source, tmp_path / "clean", config, lambda line: None)
    assert summary["right_before"] < 0.8
    assert summary["right_after"] > summary["right_before"] + 0.1


def test_the_folder_source_reads_it(cleaned: tuple[Path, Any, Any], source: Few) -> None:
    out, _, _ = cleaned
    folder = Folder(FolderConfig(root=str(out), captions=capfilt.CAPTIONS, split_column="split"))
    assert len(folder.ids("test")) == len(source.ids("test"))
    rows = [row for row in rows_of(out) if row["split"] == "train"]
    assert set(folder.ids("train")) == {row["image"] for row in rows}
    for row in rows[:10]:
        assert row["caption"].strip() in folder.sample(row["image"]).texts
    first = next(row for row in rows if row["source"] == "human")
    image = folder.sample(first["image"]).image
    assert image is not None
    assert image.tobytes() == source.sample(first["id"]).image.tobytes()


def test_what_cannot_be_cleaned_is_refused_in_one_line(
    blip: ZooModule, source: Few, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CapFilt(steps=1, batch_size=16)
    with pytest.raises(ConfigError, match=r"no trusted pairs .* data\.trusted"):
        clean(blip, OpenMojiConfig(size=32).build(), tmp_path / "a", config)
    with pytest.raises(ConfigError, match="wiring 'med'"):
        clean(captioner_of(blip), source, tmp_path / "a", config)
    assert not (tmp_path / "a").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(RunError, match="not empty"):
        clean(blip, source, tmp_path / "full", config)
    with pytest.raises(ConfigError, match="batch_size = 1"):
        CapFilt(batch_size=1)
    assert main(["data", "capfilt", str(tmp_path / "no-run"), "--out", str(tmp_path / "b")]) == 2
    assert "is no run directory" in capsys.readouterr().err


@pytest.mark.slow
def test_train_clean_and_train_again_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.data.openmoji._random_split", _few)
    sizes = [f"{slot}.{key}={value}" for slot, fields in SMALL.items() for key, value in fields.items()]
    common = ["model=blip", "scale=tiny", "stages=joint", "budget.value=2", "batch_size=8", "evaluation.tasks={}"]
    common += ["objective.momentum-contrastive.queue_size=16", *sizes]
    noise = ["data.shuffled_captions=0.3", "data.trusted=0.3"]
    assert main(["train", *common, *noise, f"out={tmp_path / 'noisy'}"]) == 0
    run = next((tmp_path / "noisy").rglob("run.yaml")).parent
    assert "shuffled_captions: 0.3" in (run / "run.yaml").read_text()
    out = tmp_path / "clean"
    assert main(["data", "capfilt", str(run), "--out", str(out), "--steps", "2", "--batch-size", "8"]) == 0
    assert "train on it: zoo train model=blip" in capsys.readouterr().out
    data = ["data=folder", f"data.root={out}", "data.captions=captions.jsonl", "data.split_column=split"]
    assert main(["train", *common, *data, f"out={tmp_path / 'again'}"]) == 0
    again = next((tmp_path / "again").rglob("manifest.json"))
    assert json.loads(again.read_text())["status"] == "done"


def _few(ids: Any) -> dict[str, str]:
    """80 icons in all, so that the run writes few images."""
    return {id: "test" if n < 8 else "val" if n < 12 else "train" if n < 80 else "none" for n, id in enumerate(ids)}
