"""One device, several with copies (DDP), several with parts (FSDP2): the same losses; and what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from zoo import builtin
from zoo.api import build_module
from zoo.cli.commands.train import train
from zoo.cli.jobs import check_offline
from zoo.cli.overrides import run_config
from zoo.compare.memory import predict
from zoo.data.openmoji import OpenMojiConfig
from zoo.data.order import training_order
from zoo.errors import ConfigError, RunError
from zoo.recipe import resolve
from zoo.run_config import TrainerConfig
from zoo.strategies import assert_world_size, blocks, check_devices, checkpoint_blocks
from zoo.testing.processes import STRATEGIES, WORLDS, Trained, check_losses, train_in_processes

STILL, STILL_EYE = {"trunk": {"drop_path": 0.0}}, {"encoder": {"drop_path": 0.0}}
"""Stochastic depth is drawn by each rank for itself."""
MODELS: list[dict[str, Any]] = [
    {"recipe": "clip", "batch_size": 8},
    {"recipe": "llava", "trainer": {"accumulate": 2, "ema": 0.5}, "batch_size": 8},
    {"recipe": "transfusion", "batch_size": 8},
    {"recipe": "show-o", "stages": [0]},
    {"recipe": "show-o-clip-vit", "stages": [0]},
    {"recipe": "blip2-flan-t5"},
    {"recipe": "blip2-opt-staged"},
    {"recipe": "blip2"},
    {"recipe": "coca", "trainer": {"checkpointing": "blocks"}},
    {"recipe": "blip-nlvr", "values": STILL_EYE, "batch_size": 8},
    {"recipe": "vlmo", "values": STILL},
    {"recipe": "vlmo-staged", "values": STILL, "batch_size": 8, "stages": [1]},
    {"recipe": "beit3-in1k", "values": STILL},
    {"recipe": "albef"},
    {"recipe": "blip"},
    {"recipe": "blip-vqa", "values": STILL_EYE},
    {"recipe": "blip-caption"},
    {"recipe": "llamagen-t2i"},
    {"recipe": "llamagen-c2i"},
    {"recipe": "latent-diffusion"},
    {"recipe": "llm-draws", "stages": [1]},
    {"recipe": "kl-tokenizer"},
]
"""Every wiring of the zoo at least once."""


def talk(folder: Path) -> dict[str, Any]:
    """Dialogues of which two in three show no picture, and so ranks whose batch is text alone."""
    rows: list[dict[str, Any]] = []
    for number in range(16):
        ask = "what is it?" if number % 3 else "<image>\nwhat is it?"
        said = [{"from": "human", "value": ask}, {"from": "gpt", "value": f"it is number {number}"}]
        rows.append({"id": str(number), "conversations": said})
        if number % 3 == 0:
            rows[-1]["image"] = f"{number}.png"
            Image.new("RGB", (64, 64), (10 * number, 100, 200)).save(folder / f"{number}.png")
    (folder / "talk.json").write_text(json.dumps(rows))
    data = {"name": "llava-json", "file": str(folder / "talk.json"), "root": str(folder)}
    values = {"wiring": {"template": "llava_v1"}}
    return {
        "name": "text",
        "recipe": "llava",
        "data": data,
        "values": values,
        "stages": [1],
        "steps": 4,
    }


def names_of_the_first(count: int) -> list[str]:
    """Of the samples that a run of seed 0 draws."""
    source = OpenMojiConfig().build(64)
    drawn = training_order(source, 0).slice(0, count)
    return sorted({str(source.text_sample(draw.id).meta["name"]) for draw in drawn})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("processes")
    specs = [*MODELS, talk(folder)]
    labels = {"labels": names_of_the_first(8), "label_key": "name"}
    specs = [{**s, "values": {**STILL, "wiring": labels}} if s["recipe"] == "beit3-in1k" else s for s in specs]
    return train_in_processes(specs, folder)


@pytest.mark.parametrize("name", [*(m["recipe"] for m in MODELS), "text"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ranks", WORLDS)
def test_several_processes_train_to_the_losses_of_one(name: str, ranks: int, strategy: str, trained: Trained) -> None:
    check_losses(trained, name, ranks, strategy)


def test_every_wiring_of_the_zoo_is_among_them() -> None:
    wirings = {c.name for c in builtin.PLUGIN.components if c.kind == "wiring"}
    tried = {resolve(m["recipe"], scale="micro").wiring[0] for m in MODELS}
    assert wirings == tried


# -- activations -----------------------------------------------------------------------------------------------------


def step(name: str, checkpointing: str) -> tuple[Tensor, dict[str, Tensor], float]:
    """Loss, gradients, and the predicted memory of activations."""
    module = build_module(resolve(name, scale="micro"), 0)
    module.spread(0, TrainerConfig(checkpointing=checkpointing))
    module.set_stage(len(module.recipe.stages) - 1)
    module.train()
    torch.manual_seed(0)
    batch = {k: v.normal_() if v.is_floating_point() else v for k, v in module.model.example_batch(2).items()}
    torch.manual_seed(1)
    loss, _ = module.losses(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    with torch.device("meta"):
        planned = build_module(module.recipe, 0)
    planned.spread(0, TrainerConfig(checkpointing=checkpointing))
    planned.set_stage(module.stage)
    memory = predict(planned, 8).activations
    return loss.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}, memory


@pytest.mark.parametrize("name", ["clip", "llava", "blip2-flan-t5", "latent-diffusion", "vlmo"])
def test_blocks_computed_again_give_equal_gradients_in_less_memory(name: str) -> None:
    loss, gradients, memory = step(name, "none")
    again, same, less = step(name, "blocks")
    assert torch.equal(loss, again)
    assert gradients.keys() == same.keys()
    assert all(torch.equal(gradients[n], same[n]) for n in gradients)
    assert any(float(g.abs().max()) > 1e-4 for g in gradients.values())
    assert less < 0.9 * memory


def test_blocks_are_layers_of_whatever_library() -> None:
    layers = {
        "clip": {"ResidualAttentionBlock"},
        "llava": {"ResidualAttentionBlock", "LlamaDecoderLayer"},
        "blip2-flan-t5": {"T5Block", "Block"},
        "latent-diffusion": {"ResnetBlock2D", "Transformer2DModel"},
        "vlmo": {"Block"},
    }
    for name, kinds in layers.items():
        module = build_module(resolve(name, scale="micro"), 0)
        stacked = list(blocks(module.model))
        found = {type(block).__name__ for block in stacked}
        assert kinds <= found, (name, found)
        assert not any(inner in stacked for block in stacked for inner in list(block.modules())[1:])
        names = list(dict(module.model.named_parameters()))
        assert checkpoint_blocks(module.model) == len(stacked)
        assert list(dict(module.model.named_parameters())) == names


# -- what cannot run -------------------------------------------------------------------------------------------------

SMALL = ["model=clip", "scale=micro", "trainer.accelerator=cpu", "evaluation.tasks={}", "budget.value=2"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.strategy=fdsp"], r"strategy = 'fdsp'.*fsdp"),
        (["strategy=fdsp"], r"unknown strategy 'fdsp'.*fsdp"),
        (["strategy=fsdp"], "strategy = fsdp needs several devices"),
        (["strategy=single", "trainer.devices=2"], "strategy = single is one device, not 2"),
        (["strategy=fsdp", "trainer.devices=2", "trainer.precision=fp16"], "fp16: choose bf16"),
        (["trainer.devices=3", "batch_size=8"], "batch_size = 8 must be a positive multiple of devices"),
        (["trainer.checkpointing=all"], "checkpointing = 'all'"),
    ],
)
def test_a_strategy_that_cannot_be_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        run_config([*SMALL, *overrides])
    assert "\n" not in str(caught.value)


def test_groups_choose_the_strategy() -> None:
    assert run_config(SMALL).trainer.resolved_strategy == "single"
    two = run_config([*SMALL, "trainer.devices=2", "batch_size=8"])
    parted = run_config([*SMALL, "trainer.devices=2", "batch_size=8", "strategy=fsdp"])
    assert (two.trainer.resolved_strategy, parted.trainer.resolved_strategy) == ("ddp", "fsdp")
    assert two.hash() == parted.hash()  # how a run is executed does not make it another one


def test_devices_that_do_not_exist_are_refused_before_anything_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    eight = [*SMALL, "trainer.accelerator=cuda", "trainer.devices=8", "batch_size=8", f"out={tmp_path}"]
    with pytest.raises(ConfigError, match="this machine has no CUDA devices"):
        train([*eight, "-m"])
    assert not list(tmp_path.iterdir())
    assert train([*eight, "--dry-run"]) == []  # what another machine will run can be looked at
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"this machine has 2 CUDA devices: set trainer.devices=2"):
        check_devices(TrainerConfig(devices=4))
    check_devices(TrainerConfig(devices=2))
    check_devices(TrainerConfig(devices=64, accelerator="cpu"))


def test_an_objective_with_its_own_optimizer_is_not_sharded() -> None:
    config = run_config(
        ["model=kl-tokenizer-gan", "scale=micro", "strategy=fsdp", "trainer.devices=2", "trainer.accelerator=cpu"]
    )
    with pytest.raises(ConfigError, match=r"objective 'adversarial' has an optimizer of its own.*ddp"):
        check_offline(config)


def test_a_trainer_that_believes_in_more_processes_than_there_are_is_stopped() -> None:
    class Believes:
        world_size = 2

    with pytest.raises(RunError, match="for 2 devices, the Trainer has 2 and 1 processes take part"):
        assert_world_size(Believes(), 2)
