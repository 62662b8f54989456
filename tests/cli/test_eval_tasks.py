"""zoo eval --task: a task with its fields."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from zoo.cli import main


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is evaluated: a mapping of a task's name to its configuration for each call."""
    calls: list[dict[str, Any]] = []

    def evaluate(model: Any, source: Any, split: str, tasks: Any, out: Any, progress: Any) -> dict[str, Any]:
        calls.append({task.name: task.config for task in tasks})
        return {"metrics": {}, "skipped": {}}

    module = SimpleNamespace(model=object(), recipe=SimpleNamespace(name="fake", image_size=32))
    monkeypatch.setattr("zoo.cli.checkpoint.load", lambda *_: module)
    monkeypatch.setattr("zoo.evaluation.run.evaluate", evaluate)
    return calls


def test_fields_reach_the_task(asked: list[dict[str, Any]]) -> None:
    assert main(["eval", "m", "--task", "naming,items=7", "--task", "retrieval"]) == 0
    assert set(asked[0]) == {"naming", "retrieval"}
    assert asked[0]["naming"].items == 7
    assert main(["eval", "m", "--tasks", "retrieval", "--task", "naming,items=3"]) == 0
    assert (set(asked[1]), asked[1]["naming"].items) == ({"retrieval", "naming"}, 3)


def test_mistakes_are_one_line(asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    for given, message in (
        (["--task", "naming,items"], "--task: expected FIELD=VALUE, got 'items'"),
        (["--task", "naming,itens=3"], "itens"),
        (["--task", "namming"], "naming"),
    ):
        assert main(["eval", "m", *given]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert asked == []
