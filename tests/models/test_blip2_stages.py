"""BLIP-2's two stages: what each runs and trains, and how the second starts from the first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from zoo.data.sample import Sample
from zoo.errors import WeightsError
from zoo.module import ZooModule
from zoo.weights import save
from zoo.weights.start import shortest, start_from

Shake = Callable[[nn.Module], nn.Module]
SMALL: dict[str, Any] = {
    "encoder": {"width": 32, "depth": 3, "heads": 2, "ffn": 48, "image_size": 32, "patch_size": 8},
    "connector": {"width": 24, "depth": 4, "heads": 2, "ffn": 40, "queries": 5},
}
LM = {"decoder": {"width": 48, "depth": 2, "heads": 4, "ffn": 64}}
TEXTS = ["red apple", "a dog", "grinning face with big eyes", "flag: Japan"]


@pytest.fixture(autouse=True)
def same_draws() -> None:
    torch.manual_seed(0)


def small(recipe: str = "blip2", shake: Shake | None = None, **more: Any) -> ZooModule:
    module = zoo.build(recipe, scale="tiny", **SMALL, **(LM if "opt" in recipe else {}), **more)
    if shake is not None:
        shake(module.model)
        heads = getattr(module.model, "heads", None)
        if heads is not None:
            nn.init.constant_(heads.temperature, 0.2)
    return module


def picture(seed: int) -> Any:
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 32, 3), dtype=np.uint8))


def samples() -> list[Sample]:
    return [Sample(str(i), picture(i), (text,)) for i, text in enumerate(TEXTS)]


# -- both stages ---------------------------------------------------------------------------------------------------


def counted(module: ZooModule) -> dict[str, int]:
    """Forward passes of the parts that one stage leaves out."""
    model: Any = module.model
    counts = dict.fromkeys(("encoder", "language model", "token table", "text ffn", "heads", "query ffn"), 0)
    watched = {
        "encoder": model.encoder,
        "language model": model.decoder,
        "token table": model.connector.text,
        "text ffn": model.connector.trunk.layers[0].ffn[0],
        "query ffn": model.connector.trunk.layers[0].ffn[1],
        "heads": model.heads.image_projection,
    }
    for name, part in watched.items():
        part.register_forward_hook(lambda *_, name=name: counts.__setitem__(name, counts[name] + 1))
    return counts


def test_each_stage_runs_only_what_it_reads(shake: Shake) -> None:
    module = small("blip2-opt-staged", shake)
    batch = module.processor(samples())
    assert batch["text_ids"].shape[0] == 4
    counts = counted(module)
    module.train()
    loss, report = module.losses(batch)
    assert set(module.active) == {"contrastive", "matching", "grounded-text"}
    assert counts["language model"] == 0
    assert (counts["encoder"], counts["heads"]) == (1, 1)
    assert counts["text ffn"] == 3  # the text alone, with the queries, and being written
    loss.backward()  # type: ignore[no-untyped-call]
    named = dict(module.model.named_parameters())
    assert all(p.grad is None for n, p in named.items() if n.startswith(("decoder.", "encoder.", "connector.proj")))
    assert named["connector.ln_vision.weight"].grad is not None
    module.zero_grad()
    module.set_stage(1)
    for name in counts:
        counts[name] = 0
    loss, report = module.losses(batch)
    assert module.active == ["next-token"]
    assert (counts["language model"], counts["encoder"], counts["query ffn"]) == (1, 1, 1)
    assert (counts["token table"], counts["text ffn"], counts["heads"]) == (0, 0, 0)
    assert int(report["next-token/tokens"]) > 0
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for n, p in named.items() if n.startswith(("decoder.", "encoder.", "heads.")))
    assert named["connector.proj.weight"].grad is not None
    assert named["connector.trunk.layers.0.ffn.1.up.weight"].grad is not None


def test_both_stages_are_the_two_models_of_their_own(shake: Shake) -> None:
    staged, first, second = small("blip2-opt-staged", shake), small("blip2"), small("blip2-opt")
    for module in (first, second):
        state = {n: t for n, t in staged.model.state_dict().items() if n in module.model.state_dict()}
        loaded = module.model.load_state_dict(state, strict=False)
        assert module is second or not loaded.missing_keys
    connector: Any = second.model.connector
    own = {n.removeprefix("connector."): t for n, t in staged.model.state_dict().items() if n.startswith("connector.")}
    connector.load_state_dict({n: t for n, t in connector.adopt(own).items() if n in connector.state_dict()})
    batch = staged.eval().processor(samples())
    draws = {"negative_images": torch.tensor([1, 2, 3, 0]), "negative_texts": torch.tensor([3, 0, 1, 2])}
    with torch.no_grad():
        one = staged.losses({**batch, **draws})[0]
        alone = {**batch, **draws, "input_ids": batch["text_ids"], "attention_mask": batch["text_mask"]}
        torch.testing.assert_close(first.eval().losses(alone)[0], one)
        staged.set_stage(1)
        torch.testing.assert_close(second.eval().losses(batch)[0], staged.losses(batch)[0])
    rows = first.processor(samples())  # the same captions in the Q-Former's vocabulary
    assert torch.equal(rows["input_ids"], batch["text_ids"])
    images = [picture(i) for i in range(3)]
    torch.testing.assert_close(staged.embed_images(images), first.embed_images(images))
    torch.testing.assert_close(staged.match(images, TEXTS[:3]), first.match(images, TEXTS[:3]))
    assert staged.generate_text(images, max_new_tokens=4) == second.generate_text(images, max_new_tokens=4)


# -- starting from other weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["blip2", "blip2-opt-staged"])
def test_stage_two_starts_from_stage_one_without_its_text_branch(shake: Shake, tmp_path: Path, source: str) -> None:
    before = small(source, shake)
    folder = save(before.model, before.recipe, tmp_path / "one")
    after = small("blip2-opt", init=folder)
    report: Any = after.load_report
    staged = source != "blip2"
    assert report.dropped == (
        "connector.text", "connector.trunk.layers.*.ffn.0", "connector.trunk.layers.*.ffn_norm.0", "heads",
    )  # fmt: skip
    assert report.started_new == (() if staged else ("connector.proj", "decoder"))
    lines = str(report).splitlines()
    assert lines[1:] == [f"new: {', '.join(report.started_new) or 'nothing'}", f"dropped: {', '.join(report.dropped)}"]
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = [m.model.eval().connector.hidden(m.model.encode_images(image)) for m in (before, after)]
    torch.testing.assert_close(*tokens, atol=1e-6, rtol=1e-6)
    fresh = small("blip2-opt")
    mine, theirs = after.model.state_dict(), fresh.model.state_dict()
    assert torch.equal(mine["decoder.lm.lm_head.weight"], theirs["decoder.lm.lm_head.weight"]) != staged
    loss, _ = after.losses(after.processor(samples()))
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for n, p in after.model.named_parameters() if n.startswith("decoder."))
    assert all(p.grad is not None for n, p in after.model.named_parameters() if n.startswith("connector."))


def test_a_start_that_cannot_be_is_refused_in_one_line(shake: Shake, tmp_path: Path) -> None:
    before = small(shake=shake)
    folder = save(before.model, before.recipe, tmp_path / "one")
    with pytest.raises(
        WeightsError, match=r"cannot start from .*scale tiny.*query_tokens is \(1, 5, 24\) there.*\(1, 6"
    ):
        small("blip2-opt", options={"connector.queries": 6}, init=folder)
    with pytest.raises(WeightsError, match=r"no tensor of one name.*shares a part") as caught:
        zoo.build("vq-tokenizer", scale="tiny", init=folder)
    assert "\n" not in str(caught.value)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("format: 1\n")
    with pytest.raises(WeightsError, match="has no weights yet: finish it"):
        start_from(before.model, tmp_path / "run")
    with pytest.raises(WeightsError, match="no folder or file"):
        start_from(before.model, tmp_path / "nowhere")
    again = small("blip2", init=folder)
    assert torch.equal(again.model.heads.temperature, before.model.heads.temperature)  # type: ignore[union-attr]
    assert again.load_report.dropped == again.load_report.started_new == ()


def test_paths_are_as_short_as_they_name_nothing_else() -> None:
    names = ["a.x.layers.0.w", "a.x.layers.1.w", "b.p", "b.q", "c.d.e"]
    assert shortest(names, ["a.x.layers.0.v", "a.x.layers.1.v", "c.f"]) == ("a.x.layers.*.w", "b", "c.d")


# -- training ------------------------------------------------------------------------------------------------------


def test_stage_one_trains_and_is_what_stage_two_starts_from(tmp_path: Path) -> None:
    from zoo.cli.commands.train import train

    sizes = [f"{slot}.{k}={v}" for slot, fields in SMALL.items() for k, v in fields.items()]
    common = ["scale=tiny", "budget.value=4", "batch_size=8", "trainer.accelerator=cpu", f"out={tmp_path}"]
    few = ["evaluation.tasks.retrieval.items=12", "evaluation.tasks.retrieval.rerank=4"]
    (first,) = train(["model=blip2", *common, *sizes, *few])
    assert first.status == "done", first.error
    metrics = json.loads((first.folder / "metrics.json").read_text())["retrieval"]
    assert 0 <= metrics["i2t_r1_reranked"] <= 1
    curve = [json.loads(line) for line in (first.folder / "curve.jsonl").read_text().splitlines()]
    assert {"contrastive", "matching", "grounded-text"} <= set(curve[-1])
    lm = [f"decoder.{k}={v}" for k, v in LM["decoder"].items()]
    likely = ["evaluation.tasks.caption-likelihood.items=4"]
    (second,) = train(["model=blip2-opt", *common, *sizes, *lm, *likely, f"init={first.folder}"])
    assert second.status == "done", second.error
    assert json.loads((second.folder / "manifest.json").read_text())["name"].endswith("+init=blip2")
    said = json.loads((second.folder / "init.json").read_text())
    assert said["new"] == ["connector.proj", "decoder"]
    assert "heads" in said["dropped"]
    one, two = (zoo.from_pretrained(run.folder / "weights").model.state_dict() for run in (first, second))
    assert all(torch.equal(two[n], t) for n, t in one.items() if n.startswith("encoder."))
    moved = "connector.query_tokens"
    assert 0 < (one[moved] - two[moved]).abs().max() < 0.05


def test_both_stages_train_in_one_run(tmp_path: Path) -> None:
    from zoo.cli.commands.train import train

    sizes = [f"{slot}.{k}={v}" for slot, fields in {**SMALL, **LM}.items() for k, v in fields.items()]
    common = ["scale=tiny", "budget.value=6", "batch_size=8", "trainer.accelerator=cpu", "trainer.log_every=1"]
    few = ["evaluation.tasks.caption-likelihood.items=4", f"out={tmp_path}"]
    (run,) = train(["model=blip2-opt-staged", *common, *sizes, *few])
    assert run.status == "done", run.error
    lines = [json.loads(line) for line in (run.folder / "curve.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["representation"] * 4 + ["generative"] * 2
    assert all(("matching" in line) == (line["stage"] == "representation") for line in lines)
    assert all(("next-token" in line) == (line["stage"] == "generative") for line in lines)
    manifest = json.loads((run.folder / "manifest.json").read_text())
    seeing, telling = manifest["flops"]["stages"]
    assert telling["trainable_forward"] < seeing["trainable_forward"]


def test_paths_of_runs_are_read_as_they_are_written(tmp_path: Path) -> None:
    from zoo.cli.commands.train import train
    from zoo.cli.overrides import run_config, with_quotes

    path = "outputs/blip2+encoder.width=96/seed=0-ab12cd34"
    assert with_quotes(["seed=1", f"init={path},b"]) == ["seed=1", f"init='{path}','b'"]
    config = run_config(["model=blip2-opt", "scale=tiny", f"init={path}"])
    assert config.init == path
    assert config.name == "blip2-opt+init=blip2"
    assert type(config).from_plain(config.to_plain()) == config
    plain = run_config(["model=blip2-opt", "scale=tiny"])
    assert "init" not in plain.to_plain()  # hashes of runs from before still hold
    assert plain.hash() != config.hash()
    with pytest.raises(WeightsError, match="no folder or file"):  # before anything starts
        train(["model=blip2-opt", "scale=tiny", f"init={tmp_path / 'nowhere'}", f"out={tmp_path}"])
    assert not list(tmp_path.iterdir())
