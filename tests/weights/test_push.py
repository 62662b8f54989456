"""A run goes to the hub with a card that says what it is, and comes back from there as the same model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import zoo
from zoo.cli.commands.push import main, upload
from zoo.cli.overrides import run_config
from zoo.compare.card import interval
from zoo.errors import ConfigError, RunError
from zoo.weights import save


def finished(folder: Path, seed: int, value: float) -> Path:
    """A run directory as training leaves it, with a small CLIP in it."""
    overrides = ["model=clip", "scale=tiny", "encoder.width=32", "encoder.depth=1", "text_encoder.width=32"]
    config = run_config([*overrides, "text_encoder.depth=1", f"seed={seed}", "evaluation.tasks=[retrieval]"])
    run = folder / f"seed={seed}-x"
    run.mkdir(parents=True)
    config.write(run / "run.yaml")
    module = zoo.api.build_module(config.recipe, seed)
    save(module, config.recipe, run / "weights")
    manifest = {
        "name": config.name, "model": "clip", "scale": "tiny", "changed": [["encoder.width", 32]], "seed": seed,
        "status": "done", "command": "zoo train model=clip", "licence": "CC BY-SA 4.0", "batch_size": 16,
        "budget": {"unit": "steps", "value": 8},
        "parts": [{"path": "encoder", "name": "vit", "parameters": 1234, "trained": True}],
        "cost": {"steps": 8, "samples": 128, "flops": {"total": 1e9}, "seconds": {"training": 3.0}},
    }  # fmt: skip
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "metrics.json").write_text(json.dumps({"retrieval": {"i2t_r1": value}}))
    return run


def test_a_dry_run_writes_what_zoo_reads_and_a_card_with_intervals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [finished(tmp_path / "clip", seed, value) for seed, value in ((0, 0.2), (1, 0.3), (2, 0.4))]
    assert main([str(runs[0]), "someone/clip-small", "--dry-run", str(tmp_path / "out")]) == 0
    assert "nothing was sent" in capsys.readouterr().out
    back = zoo.from_pretrained(tmp_path / "out")
    ours = zoo.from_pretrained(runs[0] / "weights")
    for name, value in ours.model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], value), name
    text = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["license"] == "cc-by-sa-4.0"
    assert header["library_name"] == "mmzoo"
    assert 'zoo.from_pretrained("someone/clip-small")' in text
    for said in ("encoder.width=32", "8 steps", "CC BY-SA 4.0", "1,234", "zoo train model=clip"):
        assert said in text
    # mean 0.3, s = 0.1, t(2) = 4.303: 0.3 -+ 4.303 x 0.1 / sqrt(3)
    assert "0.05157 to 0.5484" in text
    assert interval([0.2, 0.3, 0.4]) == pytest.approx((0.05157, 0.54843), abs=1e-4)
    with pytest.raises(ConfigError, match="not empty"):
        main([str(runs[0]), "someone/clip-small", "--dry-run", str(tmp_path / "out")])
    alone = finished(tmp_path / "alone", 0, 0.5)
    assert main([str(alone), "someone/alone", "--dry-run", str(tmp_path / "out2")]) == 0
    assert "one seed" in (tmp_path / "out2" / "README.md").read_text()


class Hub:
    """Stands for the hub: keeps what is sent to it in a folder."""

    def __init__(self, folder: Path, refuses: bool = False) -> None:
        self.folder, self.refuses, self.made = folder, refuses, []  # type: ignore[var-annotated]

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        if self.refuses:
            raise ValueError("401: no token\nmore")
        self.made.append((repo, private, exist_ok))

    def upload_folder(self, *, folder_path: str, repo_id: str, commit_message: str) -> str:
        shutil.copytree(folder_path, self.folder / repo_id)
        return f"https://hub/{repo_id}"


def test_what_is_sent_is_had_from_the_hub_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    run = finished(tmp_path / "clip", 0, 0.2)
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)

    def download(repo: str, allow_patterns: Any) -> str:
        return str(tmp_path / "hub" / repo)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert main([str(run), "someone/clip", "--private"]) == 0
    assert hub.made == [("someone/clip", True, True)]
    back = zoo.from_pretrained("someone/clip")
    assert back.recipe.name == zoo.from_pretrained(run / "weights").recipe.name
    with pytest.raises(RunError, match=r"nothing could be sent to a/b \(ValueError: 401: no token\)"):
        upload(tmp_path, "a/b", api=Hub(tmp_path, refuses=True))


def test_only_finished_runs_are_sent(tmp_path: Path) -> None:
    run = finished(tmp_path / "clip", 0, 0.2)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "status": "interrupted"}))
    with pytest.raises(RunError, match="is interrupted, not done"):
        main([str(run), "someone/clip", "--dry-run", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="no hub id"):
        main([str(run), "clip", "--dry-run", str(tmp_path / "out")])
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "weights" / "model.safetensors").unlink()
    with pytest.raises(RunError, match="has no weights"):
        main([str(run), "someone/clip", "--dry-run", str(tmp_path / "out")])
