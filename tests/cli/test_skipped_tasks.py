"""What `zoo train` says of tasks that a model cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zoo.cli.jobs import done


def test_tasks_that_a_model_cannot_do_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = "the model does not offer embed_images"
    (tmp_path / "run.yaml").write_text("{}\n", encoding="utf-8")
    (tmp_path / "manifest.json").write_text(json.dumps({"status": "done", "skipped": {"retrieval": reason}}))
    outcome = done(tmp_path)
    assert outcome.status == "done"
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path}: retrieval skipped, {reason}", f"{tmp_path}: done"]
