"""The adapter against a stub of lmms-eval 0.7's interface (base class, registry, requests): the package is no
dependency of the tests. What it was run against in full is said in docs/public-data.md."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import zoo
from zoo.errors import ConfigError, WeightsError


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Hook:
    def __init__(self) -> None:
        self.kept: list[tuple[str, Any, str]] = []

    def add_partial(self, attr: str, req: Any, res: str) -> None:
        self.kept.append((attr, req, res))


class lmms(ABC):
    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = Hook()
        self.task_dict: dict[str, Any] = {}

    @abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...
    @abstractmethod
    def generate_until(self, requests: Any) -> Any: ...
    @abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...


@dataclass
class GenerationResult:
    text: Any
    token_counts: Any = None


@dataclass
class Instance:
    args: tuple[Any, ...]


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, values in (
        ("lmms_eval", {}), ("lmms_eval.api", {}), ("lmms_eval.models", {}),
        ("lmms_eval.api.model", {"lmms": lmms}), ("lmms_eval.api.instance", {"GenerationResult": GenerationResult}),
        ("lmms_eval.models.registry_v2", {"ModelManifest": ModelManifest}),
    ):  # fmt: skip
        module = types.ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    from zoo.integrations import lmms_eval

    lmms_eval._class.cache_clear()
    yield lmms_eval
    lmms_eval._class.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from zoo.weights import save

    path = tmp_path_factory.mktemp("llava") / "weights"
    module = zoo.build("llava", scale="tiny", seed=3)
    save(module.model, module.recipe, path)
    return path


DOCS = [{"question": f"What is {n}?", "image": Image.new("RGB", (20, 20), (60 * n, 9, 200))} for n in range(5)]


def made(adapter: Any, path: Path, **fields: Any) -> Any:
    found = adapter.manifest()
    module, name = found.simple_class_path.rsplit(".", 1)  # as lmms-eval resolves it
    model = getattr(importlib.import_module(module), name)
    assert found.model_id == "zoo"
    assert issubclass(model, lmms)
    ready = model(**{"checkpoint": str(path), "batch_size": "2", "max_batch_size": None, "device": "cpu", **fields})
    ready.task_dict["toy"] = {"test": DOCS}
    return ready


def shown(doc: Any) -> list[Any]:
    return [doc["image"]]


def asks(n: int, visuals: Any = shown, **settings: Any) -> Instance:
    return Instance((DOCS[n]["question"], settings, visuals, n, "toy", "test"))


def test_texts_are_the_models_own_in_the_order_of_requests(adapter: Any, checkpoint: Path) -> None:
    model = made(adapter, checkpoint)
    limits = [5, 3, 5, 3, 5]
    requests = [asks(n, max_new_tokens=limits[n], temperature=0, do_sample=False) for n in range(5)]
    found = model.generate_until(requests)
    own = zoo.from_pretrained(checkpoint).model
    for n, text in enumerate(found):
        want = own.generate_text([DOCS[n]["image"]], [DOCS[n]["question"]], max_new_tokens=limits[n])[0]
        assert text == want.strip()
    assert len({attr for attr, _, _ in model.cache_hook.kept}) == 1
    assert [res for _, (context, _), res in model.cache_hook.kept if context == DOCS[3]["question"]] == [found[3]]
    stop = next(text for text in found if len(text) > 3)[2]
    cut = model.generate_until([asks(n, max_new_tokens=limits[n], until=["\n\n", stop]) for n in range(5)])
    assert cut == [text.partition(stop)[0].strip() for text in found]
    put = made(adapter, checkpoint, prompt="Q: {question} A:").generate_until(requests[:1])
    want = own.generate_text([DOCS[0]["image"]], [f"Q: {DOCS[0]['question']} A:"], max_new_tokens=5)[0]
    assert put == [want.strip()]


def test_losses_are_negative_log_likelihoods(adapter: Any, checkpoint: Path) -> None:
    model = made(adapter, checkpoint)
    own = zoo.from_pretrained(checkpoint).model
    written = model.generate_until([asks(2, max_new_tokens=4)])[0]
    targets: list[Any] = [" a cup", "two dogs", lambda doc: doc["question"]]
    requests = [Instance(("Which?", t, shown, n, "toy", "test")) for n, t in enumerate(targets)]
    found = [answer.text for answer in model.loglikelihood(requests)]
    texts = ["a cup", "two dogs", DOCS[2]["question"]]
    want = own.score_text([d["image"] for d in DOCS[:3]], texts, ["Which?"] * 3)
    torch.testing.assert_close(torch.tensor([loss for loss, _ in found]), -want, rtol=1e-4, atol=1e-4)
    assert all(loss > 0 and not greedy for loss, greedy in found)
    assert isinstance(written, str)


def test_what_is_not_done_is_said_in_one_line(adapter: Any, checkpoint: Path, tmp_path: Path) -> None:
    model = made(adapter, checkpoint)
    calls: list[tuple[Any, str]] = [
        (lambda: model.generate_until_multi_round([]), "one question at a time"),
        (lambda: model.generate_until([asks(0, temperature=0.7)]), "temperature=0.7"),
        (lambda: model.generate_until([asks(0, num_beams=5)]), "num_beams=5"),
        (lambda: model.generate_until([asks(1, lambda doc: [doc["image"]] * 2)]), "toy: document 1 shows 2 images"),
        (lambda: model.generate_until([asks(1, lambda doc: ["film.mp4"])]), "shows a str"),
        (lambda: model.generate_until([asks(1, lambda doc: [])]), "shows 0 images"),
        (lambda: model.loglikelihood([Instance(("", "a"))]), "acc_mutual_info"),
        (lambda: made(adapter, checkpoint, checkpoint=""), "checkpoint=RUN"),
        (lambda: made(adapter, checkpoint, batch_size="auto"), "batch_size = 'auto'"),
        (lambda: made(adapter, checkpoint, pretrained="x"), "pretrained"),
        (lambda: made(adapter, checkpoint, prompt="x"), "expected {question}"),
    ]
    for call, reason in calls:
        with pytest.raises(ConfigError) as error:
            call()
        assert reason in str(error.value)
        assert "\n" not in str(error.value)
    (tmp_path / "run.yaml").write_text("")
    with pytest.raises(WeightsError, match="has no weights yet"):
        made(adapter, checkpoint, checkpoint=str(tmp_path))
    clip = zoo.build("clip", scale="tiny")
    model.module = clip
    with pytest.raises(ConfigError, match="clip has no generate_text, which this task needs; it offers embed_images"):
        model.generate_until([asks(0)])


def test_importing_the_adapter_imports_neither_torch_nor_lmms_eval() -> None:
    code = "import sys, zoo.integrations.lmms_eval; print([m for m in ('torch', 'lmms_eval') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
