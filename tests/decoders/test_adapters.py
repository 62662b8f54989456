"""LoRA: nothing changes at first, only adapters learn, checkpoints hold both, and merging gives the sum."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.adapters import adapted, is_adapter, merged_state, targets
from zoo.decoders.causal_lm import CausalLMConfig
from zoo.errors import ConfigError, WeightsError
from zoo.module import ZooModule
from zoo.weights import save, save_merged

Shake = Callable[[nn.Module], nn.Module]
LORA: dict[str, Any] = {"lora_rank": 4, "lora_alpha": 12.0}
TINY: dict[str, Any] = {"width": 64, "depth": 2, "heads": 4, "ffn": 96, "vocab_size": 100, "context_length": 64}


def bridge(seed: int = 3, **decoder: Any) -> ZooModule:
    return zoo.build("llava-1.5", scale="tiny", seed=seed, decoder={"depth": 2, **decoder})


def batch(module: ZooModule, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    example: dict[str, Tensor] = module.model.example_batch(2)
    example["pixel_values"] = torch.randn(example["pixel_values"].shape, generator=generator)
    text = example["labels"] >= 0
    ids = torch.randint(4, 1000, (int(text.sum()),), generator=generator)
    example["input_ids"][text] = ids
    example["labels"][text] = ids
    return example


def hidden(module: ZooModule) -> Tensor:
    module.eval()
    with torch.no_grad():
        out: Tensor = module.model(batch(module))["hidden"]
    return out


def shake_adapters(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if is_adapter(name):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", ["llama", "opt", "phi", "gpt2"])
def test_output_is_the_base_models_to_the_bit_until_adapters_learn(family: str) -> None:
    models = []
    for rank in (0, 4):
        torch.manual_seed(1)
        models.append(CausalLMConfig(family=family, **TINY, lora_rank=rank).build().lm.eval())
    base, lora = models
    ids = torch.randint(0, 100, (2, 9))
    with torch.no_grad():
        before, after = base(ids).logits, lora(ids).logits
        assert torch.equal(before, after)
        shake_adapters(lora)
        assert float((lora(ids).logits - before).abs().max()) > 1e-2
    per_block = {"llama": 7, "opt": 6, "phi": 6, "gpt2": 4}[family]
    assert len(list(adapted(lora))) == 2 * per_block


def test_merged_weights_give_what_the_adapters_give(shake: Shake) -> None:
    for family in ("llama", "gpt2"):
        torch.manual_seed(1)
        lora = CausalLMConfig(family=family, **TINY, **LORA).build().lm
        shake(lora)
        shake_adapters(lora)
        plain = CausalLMConfig(family=family, **TINY).build().lm
        plain.load_state_dict(merged_state(lora), strict=True)
        ids = torch.randint(0, 100, (2, 9))
        with torch.no_grad():
            expected, got = lora.eval()(ids).logits, plain.eval()(ids).logits
        assert float((got - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_scale_of_an_adapter_is_alpha_over_rank(shake: Shake) -> None:
    model = CausalLMConfig(**TINY, **LORA).build().lm
    shake(model)
    layer: Any = model.get_submodule("model.layers.1.mlp.up_proj")
    x = torch.randn(3, 64)
    with torch.no_grad():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.shape == (4, 64)
        expected = layer.base_layer(x) + 12.0 / 4 * x @ a.T @ b.T
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_bridge_with_adapters_starts_as_the_bridge_without() -> None:
    assert torch.equal(hidden(bridge()), hidden(bridge(**LORA)))


def test_stages_train_the_adapters_alone() -> None:
    module = zoo.build("llava-1.5-lora", scale="tiny")
    module.set_stage(0)
    assert {n.split(".")[0] for n, p in module.model.named_parameters() if p.requires_grad} == {"connector"}
    module.set_stage(1)
    learns = [n for n, p in module.model.named_parameters() if p.requires_grad]
    inside = [n for n in learns if n.startswith("decoder.")]
    assert len(inside) == 4 * 7 * 2  # blocks, linear maps, A and B
    assert all(map(is_adapter, inside))
    before = {n: p.detach().clone() for n, p in module.model.named_parameters()}
    module.train()
    optimizer = torch.optim.SGD([p for p in module.model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # at the first step A stands still, for B is zero
        loss, _ = module.losses(batch(module))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {n for n, p in module.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(learns)


def test_all_at_once_leaves_the_base_alone_and_a_table_can_be_named() -> None:
    joint = zoo.build("llava-1.5", scale="tiny", stages="joint", decoder=LORA)
    names = {n for n, p in joint.model.named_parameters() if p.requires_grad}
    assert {n for n in names if n.startswith("decoder.")} == {
        n for n, _ in joint.model.named_parameters() if is_adapter(n)
    }
    assert any(n.startswith("encoder.") for n in names)
    table = "decoder.lm.model.embed_tokens"
    staged = zoo.build("llava-1.5", scale="tiny", decoder=LORA, stages=[{"name": "a", "train": ["decoder", table]}])
    names = {n for n, p in staged.model.named_parameters() if p.requires_grad}
    assert f"{table}.weight" in names
    assert names == {f"{table}.weight"} | {n for n in names if is_adapter(n)}
    one = zoo.build(
        "llava-1.5", scale="tiny", decoder=LORA, stages=[{"name": "a", "train": ["decoder.lm.model.layers.1"]}]
    )
    names = {n for n, p in one.model.named_parameters() if p.requires_grad}
    assert len(names) == 14
    assert all(is_adapter(n) and ".layers.1." in n for n in names)


def test_part_of_a_language_model_can_be_trained() -> None:
    paths = ["connector", "decoder.lm.model.layers.0", "decoder.lm.model.layers.*.self_attn.q_proj"]
    module = zoo.build("llava-1.5", scale="tiny", stages=[{"name": "some", "train": paths}])
    names = {n for n, p in module.model.named_parameters() if p.requires_grad and n.startswith("decoder.")}
    expected = {n for n, _ in module.model.named_parameters() if n.startswith("decoder.lm.model.layers.0.")}
    expected |= {f"decoder.lm.model.layers.{i}.self_attn.q_proj.weight" for i in range(4)}
    assert names == expected
    loss, _ = module.losses(batch(module))
    loss.backward()
    for name, parameter in module.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    with pytest.raises(ConfigError, match="does not have"):
        zoo.build("llava-1.5", scale="tiny", stages=[{"name": "a", "train": ["decoder.lm.model.layers.9"]}])


def test_checkpoint_holds_base_and_adapters(tmp_path: Path) -> None:
    module = bridge(**LORA)
    shake_adapters(module.model)
    save(module, module.recipe, tmp_path / "lora")
    again = zoo.from_pretrained(tmp_path / "lora")
    assert torch.equal(hidden(again), hidden(module))
    assert any(is_adapter(n) for n in again.model.state_dict())
    with pytest.raises(WeightsError, match="save_merged"):
        zoo.from_pretrained(tmp_path / "lora", decoder={"lora_rank": 0})


def test_merged_checkpoint_is_a_plain_model_with_the_same_output(tmp_path: Path) -> None:
    module = bridge(**LORA)
    shake_adapters(module.model)
    expected = hidden(module)
    assert float((expected - hidden(bridge())).abs().max()) > 1e-2
    save_merged(module, tmp_path / "plain")
    plain = zoo.from_pretrained(tmp_path / "plain")
    assert not any(is_adapter(n) for n in plain.model.state_dict())
    assert float((hidden(plain) - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert torch.equal(hidden(module), expected)  # merging changed nothing in place
    with pytest.raises(ConfigError, match="no adapters"):
        save_merged(plain, tmp_path / "again")


def test_weights_without_adapters_load_under_new_adapters(tmp_path: Path) -> None:
    plain = bridge(seed=7)
    save(plain, plain.recipe, tmp_path / "plain")
    module = zoo.from_pretrained(tmp_path / "plain", decoder=LORA, seed=99)
    assert torch.equal(hidden(module), hidden(plain))
    report: Any = module.load_report
    assert report.new
    assert all(map(is_adapter, report.new))


def test_wrong_values_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"decoder: lora_rank = -1.*expected lora_rank >= 0"):
        bridge(lora_rank=-1)
    with pytest.raises(ConfigError, match=r"'q_prj'.*did you mean .*q_proj"):
        bridge(**LORA, lora_targets=["q_prj"])


def test_targets_by_name() -> None:
    lm = CausalLMConfig(**TINY).build().lm
    assert len(targets(lm, [])) == 14
    assert "lm_head" not in targets(lm, [])
    assert targets(lm, ["layers.1.self_attn.q_proj", "lm_head"]) == ["model.layers.1.self_attn.q_proj", "lm_head"]


def test_missing_peft_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(zoo.errors.ZooError, match=r"peft.*pip install 'mmzoo\[lora\]'"):
        CausalLMConfig(**TINY, **LORA).build()


# -- learning rates of paths ---------------------------------------------------------------------------------------


def rates(module: ZooModule, steps: int = 10) -> dict[str, float]:
    module.steps = steps
    optimizer = module.configure_optimizers()["optimizer"]
    names = {id(p): n for n, p in module.model.named_parameters()}
    return {names[id(p)]: group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}


def test_paths_of_a_stage_have_their_own_rate() -> None:
    stage = {
        "name": "a",
        "train": ["connector", "decoder"],
        "optimizer": {"lr": 2e-4, "warmup": 0.0, "weight_decay": 0.1},
        "lr": {"connector": 2e-5, "decoder.lm.model.layers.*.mlp": 1e-3},
    }
    module = zoo.build("llava-1.5", scale="tiny", stages=[stage])
    found = rates(module)
    assert found["connector.proj.0.weight"] == found["connector.proj.0.bias"] == 2e-5
    assert found["decoder.lm.model.layers.2.mlp.up_proj.weight"] == 1e-3
    assert found["decoder.lm.model.layers.2.self_attn.q_proj.weight"] == found["decoder.lm.lm_head.weight"] == 2e-4
    module.steps = 10
    made = module.configure_optimizers()
    groups = made["optimizer"].param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    assert groups[0]["lr"] == 2e-4  # what the curve shows
    for _ in range(5):
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert {round(group["lr"] / group["initial_lr"], 6) for group in groups} == {0.5}  # one schedule


def test_published_rates_of_the_adapter_recipe_give_way_to_a_scale_and_to_the_user() -> None:
    from zoo.recipe import resolve

    published = resolve("llava-1.5-lora")
    decoder: Any = published.parts["decoder"][1]
    assert (decoder.lora_rank, decoder.lora_alpha, decoder.lora_dropout) == (128, 256.0, 0.05)
    assert published.stage_optimizer(1).lr == 2e-4
    assert published.stages[1].lr == {"connector": 2e-5}
    assert resolve("llava-1.5-lora", scale="tiny").stages[1].lr == {}
    assert resolve("llava-1.5-lora", values={"optimizer": {"lr": 0.5}}).stages[1].lr == {}


def test_wrong_rates_are_one_line() -> None:
    for lr, message in (
        ({"conector": 1e-3}, "conector.*did you mean connector"),
        ({"encoder": 1e-3}, "nothing in it learns"),
        ({"connector": 0.0}, "must be above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            zoo.build("llava-1.5", scale="tiny", stages=[{"name": "a", "train": ["connector"], "lr": lr}])
