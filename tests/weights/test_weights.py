"""Saving, loading, changing parts, and refusing what is unsafe, damaged or foreign."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from zoo.errors import WeightsError
from zoo.recipe import Recipe, resolve
from zoo.weights import load, load_model, save
from zoo.weights.files import read_file
from zoo.weights.save import unique


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    small = {"width": 32, "depth": 2, "heads": 2, "ffn": 64}
    values = {"encoder": {**small, "image_size": 16}, "text_encoder": small, "optimizer": {"lr": 3e-4}}
    return resolve("clip", values=values, scale="tiny")


@pytest.fixture
def checkpoint(recipe: Recipe, draw: Any, tmp_path: Path) -> tuple[Path, Any]:
    model = draw(recipe.wiring[1].build(recipe.parts, 3))
    return save(model, recipe, tmp_path / "weights"), model


def equal_states(a: nn.Module, b: nn.Module, prefix: str = "") -> bool:
    states = a.state_dict(), b.state_dict()
    return all(torch.equal(t, states[1][n]) for n, t in states[0].items() if n.startswith(prefix))


def test_saved_checkpoint_comes_back_bit_equal_with_recipe_and_tokenizer(checkpoint: Any, recipe: Recipe) -> None:
    folder, model = checkpoint
    loaded, again, report = load_model(folder, seed=9)
    assert again == recipe
    assert equal_states(model, loaded)
    assert loaded.tokenizer.fingerprint() == model.tokenizer.fingerprint()
    assert loaded.tokenizer is not model.tokenizer
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "recipe.json", "tokenizer"]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["weights"]
    assert report.new == report.ignored == []
    assert "loaded" in str(report)
    same, state, _ = load(folder)
    assert same == recipe
    assert set(state) == set(model.state_dict())


def test_saving_replaces_an_older_checkpoint_and_nothing_else(checkpoint: Any, recipe: Recipe) -> None:
    folder, model = checkpoint
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    save(model, recipe, folder)
    assert load_model(folder)[0].logit_scale.item() == 3.0
    assert [p.name for p in folder.parent.iterdir()] == ["weights"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(WeightsError, match=r"notes\.txt"):
        save(model, recipe, folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_failing_write_leaves_the_old_checkpoint(
    checkpoint: Any, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = checkpoint
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(type(model.tokenizer), "save", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(WeightsError, match="No space left"):
        save(model, recipe, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [p.name for p in folder.parent.iterdir()] == ["weights"]


def test_an_exchanged_part_is_new_and_all_else_is_loaded(checkpoint: Any) -> None:
    folder, model = checkpoint
    changed, recipe, report = load_model(folder, changes={"encoder": "vit-tiny-16"}, seed=5)
    fresh = recipe.wiring[1].build(recipe.parts, 5)
    assert recipe.name.startswith("clip+encoder=vit-tiny-16")
    assert report.new_parts == ("encoder",)
    assert "weights of encoder are new" in str(report)
    assert equal_states(fresh, changed, "encoder.")
    assert equal_states(model, changed, "text_encoder.")
    assert not equal_states(fresh, changed, "text_encoder.")


def test_a_changed_field_keeps_the_weights_where_they_fit(checkpoint: Any) -> None:
    folder, model = checkpoint
    changed, recipe, report = load_model(folder, changes={"encoder": {"layer": -2}, "wiring.augment": "flip"})
    assert recipe.parts["encoder"][1].layer == -2
    assert equal_states(model, changed)
    assert report.new_parts == ()
    wider, _, report = load_model(folder, changes={"encoder.width": 64})
    assert report.new_parts == ("encoder",)
    assert report.new == ["image_projection.weight"]
    assert equal_states(model, wider, "text_encoder.")


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth", ".ckpt"])
def test_a_pickle_with_code_is_refused_in_one_line_and_never_run(tmp_path: Path, suffix: str) -> None:
    path, marker = tmp_path / f"evil{suffix}", tmp_path / "ran"
    torch.save({"visual.conv1.weight": torch.zeros(1), "x": Bomb(marker)}, path)
    with pytest.raises(WeightsError, match="refused") as caught:
        load_model(path, model="clip")
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    path.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(WeightsError):
        load_model(path, model="clip")
    assert not marker.exists()


def test_a_folder_with_only_a_pickle_names_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin is there"):
        load_model(tmp_path)


def test_damaged_and_foreign_checkpoints_say_what_is_wrong(checkpoint: Any, tmp_path: Path) -> None:
    folder, _ = checkpoint
    weights = folder / "model.safetensors"
    raw = weights.read_bytes()
    state = {k: v.clone() for k, v in load_file(weights).items()}  # the file they are mapped from is overwritten

    def refused(match: str, **options: Any) -> None:
        with pytest.raises(WeightsError, match=match) as caught:
            load_model(folder, **options)
        assert "\n" not in str(caught.value)

    weights.write_bytes(raw[: len(raw) // 2])
    refused("truncated")
    weights.write_bytes(b"")
    refused("truncated")
    save_file({k: v for k, v in state.items() if not k.startswith("text_encoder.tower.ln_final")}, weights)
    refused(r"lacks 2 tensors of the model: text_encoder\.tower\.ln_final\.weight")
    assert len(load_model(folder, strict=False)[2].new) == 2
    save_file({**state, "decoder.x": torch.zeros(2)}, weights)
    refused(r"has 1 tensors the model does not: decoder\.x")
    assert load_model(folder, strict=False)[2].ignored == ["decoder.x"]
    save_file({**state, "image_projection.weight": torch.zeros(3, 3)}, weights)
    refused(r"image_projection\.weight is \(3, 3\)")
    refused("image_projection", strict=False)
    weights.unlink()
    refused(r"has no model\.safetensors")
    save_file(state, weights)
    (folder / "recipe.json").write_text("{")
    refused(r"recipe\.json")
    (folder / "recipe.json").write_text(json.dumps({"format": 1, "_target_": "os.system"}))
    refused("_target_")
    (folder / "recipe.json").unlink()
    refused("is no checkpoint")
    (folder / "config.json").write_text(json.dumps({"model_type": "clap"}))
    refused("'clap'")


def test_an_index_may_not_point_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    index = {"weight_map": {"logit_scale": "../other.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="outside the folder"):
        load_model(tmp_path)


def test_missing_places_and_an_unreachable_hub_are_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def offline(*args: Any, **options: Any) -> str:
        raise OSError("Name or service not known\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(WeightsError, match=r"could not be had from the hub \(OSError: Name or service not known\)"):
        load_model("owner/name")
    with pytest.raises(WeightsError, match="no folder or file"):
        load_model(str(tmp_path / "nothing" / "here"))
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="say which recipe"):
        load_model(tmp_path / "x.safetensors")


def test_torch_files_of_tensors_are_read_whatever_wraps_them(tmp_path: Path) -> None:
    state = {"module.a": torch.arange(3.0), "module.b": torch.ones(2, 2)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "x.pth")
    read = read_file(tmp_path / "x.pth")
    assert set(read) == {"a", "b"}
    assert_close(read["a"], torch.arange(3.0))


def test_a_bare_open_clip_file_loads_with_its_recipe_named(tmp_path: Path, draw: Any, batch: Any) -> None:
    from zoo.weights import formats
    from zoo.weights.formats.clip import from_state

    with torch.device("meta"):
        published = resolve("clip-rn50")
        ours = published.wiring[1].build(published.parts, 0).state_dict()
    assert "clip-rn50" in formats.FILES
    keymap = from_state(published, {"visual.conv1.weight": None}).keymap
    official, left = keymap.save(ours)
    assert not left
    assert official["text_projection"].shape == (512, 1024)
    back, unknown = keymap.load(official)
    assert not unknown
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in ours.items()}


def test_tied_tensors_are_written_once_and_views_alone(tmp_path: Path) -> None:
    base = torch.randn(4, 4)
    state = {"a": base, "b": base, "row": base[1], "t": base.T}
    written = unique(state)
    assert set(written) == {"a", "row", "t"}
    save_file(written, tmp_path / "x.safetensors")
    assert_close(load_file(tmp_path / "x.safetensors")["row"], base[1])
