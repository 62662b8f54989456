"""CogVLM, statement by statement: what its experts learn and change, who reads whom, what is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import zoo
from zoo.api import build_module
from zoo.data.sample import Sample
from zoo.data.templates import lay_out, template
from zoo.data.text import named_tokenizer
from zoo.decoders.cogvlm_lm import TEXT, VISUAL
from zoo.errors import ConfigError, WeightsError
from zoo.layout import TokenBatch
from zoo.recipe import resolve
from zoo.weights import load_model
from zoo.weights.formats import file_format

Shake = Callable[[nn.Module], nn.Module]
SIZES = {
    "encoder": {"width": 24, "depth": 2, "heads": 2, "ffn": 40, "image_size": 32, "patch_size": 8},
    "connector": {"ffn": 48},
    "decoder": {"width": 32, "depth": 3, "heads": 4, "kv_heads": 0, "ffn": 48},
}
RECIPES = ("cogvlm-base-224", "cogvlm-base-490", "cogvlm-chat")
TEXTS = ["red apple", "a dog", "grinning face with big eyes", "flag: Japan"]


def small(shake: Shake | None = None, recipe: str = "cogvlm-base-224", **decoder: Any) -> Any:
    values: dict[str, Any] = {**SIZES, "decoder": {**SIZES["decoder"], **decoder}}
    if "experts" in decoder or "expert_every" in decoder:
        values["stages"] = "joint"  # the published ones name every expert
    module = zoo.build(recipe, scale="tiny", **values)
    if shake is not None:
        shake(module.model)
    return module


def picture(seed: int) -> Image.Image:
    import numpy as np

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 32, 3), dtype=np.uint8))


def batch_of(model: Any, images: bool = True) -> dict[str, Tensor]:
    samples = [Sample(str(i), picture(i) if images else None, (t,)) for i, t in enumerate(TEXTS)]
    return model.processor(samples)


def meta(recipe: str) -> Any:
    with torch.device("meta"):
        return build_module(resolve(recipe), 0).model


# -- a Llama, twice ------------------------------------------------------------------------------------------------


def llama(decoder: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    c = decoder.config
    config = LlamaConfig(
        hidden_size=c.width, intermediate_size=c.ffn, num_hidden_layers=c.depth, num_attention_heads=c.heads,
        vocab_size=c.vocab_size, rms_norm_eps=c.eps, max_position_embeddings=c.context_length, rope_theta=c.rope_theta,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(3)
    built = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if "norm" in name else 0.0))
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(parameter.shape[1] ** -0.5 / 0.3)
    return built


@torch.no_grad()
@pytest.mark.parametrize("units", [["qkv", "out", "ffn"], ["ffn"]])
def test_with_experts_copied_from_text_it_is_a_llama(units: list[str], shake: Shake) -> None:
    model = small(shake, experts=units).model.eval()
    reference = llama(model.decoder)
    model.decoder.load_llama(reference.state_dict())
    batch = batch_of(model)
    ids, real = batch["input_ids"], batch["attention_mask"]
    layout = model._layout(ids, real, "right")
    assert bool((layout.modality == VISUAL).any())
    embeds = model._splice(ids, batch["pixel_values"])
    ours = model.decoder.logits(model.decoder(TokenBatch(embeds, layout)))
    theirs = reference(inputs_embeds=embeds, attention_mask=real.long(), position_ids=layout.position).logits
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)
    words = torch.randint(3, 1000, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.text_logits(None, words), reference(words).logits, atol=1e-5, rtol=1e-5)


def test_experts_start_as_copies_of_the_text_weights() -> None:
    own = dict(small().model.decoder.named_parameters())
    pairs = 0
    for name in filter(visual_name, own):
        steps = name.split(".")
        steps[-3 if ".ffn." in name else -2] = str(TEXT)
        assert torch.equal(own[name], own[".".join(steps)])
        pairs += 1
    assert pairs == 3 * 7  # q, k, v, out, gate, up, down of every layer


@torch.no_grad()
def test_a_visual_expert_changes_image_rows_at_its_layer(shake: Shake) -> None:
    model = small(shake).model.eval()
    batch = batch_of(model)
    ids = batch["input_ids"]
    layout = model._layout(ids, batch["attention_mask"], "right")
    x = model._splice(ids, batch["pixel_values"])
    _, before = model.decoder.trunk(x, layout, taps=True)
    model.decoder.trunk.layers[1].ffn[VISUAL].down.weight.add_(0.5)
    _, after = model.decoder.trunk(x, layout, taps=True)
    visual = (layout.modality == VISUAL) & layout.real
    text = (layout.modality == TEXT) & layout.real
    assert torch.equal(before[0], after[0])
    assert bool(((before[1] - after[1])[visual].abs().amax(-1) > 1e-2).all())
    assert torch.equal(before[1][text], after[1][text])  # text reads it from the next layer on
    behind = text & (ids != model.tokenizer.bos_id)  # BOS stands before the image
    assert bool(((before[2] - after[2])[behind].abs().amax(-1) > 1e-5).all())


# -- learning ------------------------------------------------------------------------------------------------------


def test_language_weights_get_no_gradient_and_experts_do(shake: Shake) -> None:
    module = small(shake)
    module.set_stage(0)
    batch = batch_of(module.model)
    loss, _ = module.losses(batch)
    loss.backward()
    last = module.model.decoder.config.depth - 1
    learns, language = 0, 0
    for name, parameter in module.model.named_parameters():
        if name.startswith("connector."):
            assert torch.count_nonzero(parameter.grad) > 0, name
        elif name.startswith("encoder.") or not name.endswith(".weight") or not visual_name(name):
            assert not parameter.requires_grad
            assert parameter.grad is None, name
            language += name.startswith("decoder.")
        elif f"layers.{last}." in name and (".attn.q." in name or ".attn.out." in name or ".ffn." in name):
            # of the last layer, text rows read keys and values of the image only
            assert torch.count_nonzero(parameter.grad) == 0, name
        else:
            assert torch.count_nonzero(parameter.grad) > 0, name
            learns += 1
    assert learns == 2 * 7 + 2
    assert language == 3 * (7 + 2) + 3  # matrices and norms of the layers, embedding, final norm, head


def visual_name(name: str) -> bool:
    """Whether a parameter of the decoder belongs to a visual expert."""
    unit = name.split(".layers.")[-1].split(".")  # [layer, attn, q, 1, weight] or [layer, ffn, 1, up, weight]
    return "layers" in name and len(unit) == 5 and str(VISUAL) in (unit[2], unit[3])


def test_text_alone_is_bit_equal_before_and_after_visual_training(shake: Shake) -> None:
    module = small(shake)
    module.set_stage(0)
    model = module.model
    words = torch.randint(3, 1000, (2, 11), generator=torch.Generator().manual_seed(1))
    batch = batch_of(model)

    def logits() -> tuple[Tensor, Tensor]:
        model.eval()
        with torch.no_grad():
            return model.text_logits(None, words), model.text_logits(batch["pixel_values"], batch["input_ids"])

    text, image = logits()
    module.train()
    module.steps = 4
    optimizer = module.configure_optimizers()["optimizer"]
    for _ in range(4):
        optimizer.zero_grad()
        module.losses(batch)[0].backward()
        optimizer.step()
    text_after, image_after = logits()
    assert torch.equal(text, text_after)
    assert float((image - image_after).abs().max()) > 1e-3


def test_instruct_stage_trains_everything_the_encoder_at_a_tenth() -> None:
    recipe = resolve("cogvlm-chat")
    assert [s.name for s in recipe.stages] == ["pretrain", "instruct"]
    assert recipe.stages[0].wiring == {"template": "cogvlm_base"}
    assert recipe.stages[1].train == ["*"]
    assert recipe.stages[1].lr["encoder"] == pytest.approx(recipe.stage_optimizer(1).lr / 10)
    module = small(recipe="cogvlm-chat")
    module.set_stage(0)
    assert not any(p.requires_grad for n, p in module.model.named_parameters() if n.startswith("encoder."))
    module.set_stage(1)
    assert all(p.requires_grad for p in module.model.parameters())


# -- positions, routes, masks --------------------------------------------------------------------------------------


def test_patches_share_a_position_and_text_starts_at_four() -> None:
    model = meta("cogvlm-base-490")
    slots = model.connector.tokens
    assert slots == 1225 + 2
    ids = torch.tensor([[1] + [32000] * slots + [5, 6, 7]])
    from zoo.layout import Segment
    from zoo.layout import lay_out as sequence

    layout = model.decoder.arrange(sequence([Segment("sequence", ids.shape[1])]), ids, ids == 32000)
    assert layout.position[0, :2].tolist() == [0, 1]  # BOS, boi
    assert set(layout.position[0, 2 : 2 + 1225].tolist()) == {2}
    assert layout.position[0, 2 + 1225 :].tolist() == [3, 4, 5, 6]  # eoi, text
    assert layout.modality[0, 1 : 2 + 1225].tolist() == [VISUAL] * 1226  # boi and the patches
    assert layout.modality[0, 2 + 1225] == TEXT  # eoi
    assert layout.modality[0, [0, -1]].tolist() == [TEXT, TEXT]
    assert layout.kind == "causal"
    assert layout.spans == ((0, 1, TEXT), (1, 1227, VISUAL), (1227, 1231, TEXT))


def test_rows_that_disagree_are_each_arranged_on_their_own() -> None:
    model = small().model
    n, image = model.connector.tokens, model.image_token_id
    rows = [[0, 0, 1, *[image] * n, 7], [1, 8, *[image] * n, 9, 9], [0, *range(1, n + 4)]]
    real = torch.tensor([[False, False] + [True] * (n + 2), [True] * (n + 4), [False] + [True] * (n + 3)])
    layout = model._layout(torch.tensor(rows), real)
    assert layout.spans is None
    assert layout.position[0].tolist() == [0, 0, 0, 1, *[2] * (n - 2), 3, 4]
    assert layout.position[1].tolist() == [0, 1, 2, *[3] * (n - 2), 4, 5, 6]
    assert layout.position[2].tolist() == [0, *range(n + 3)]
    assert layout.modality.sum(1).tolist() == [n - 1, n - 1, 0]


def test_images_that_touch_keep_their_ends() -> None:
    model = small().model
    n, image = model.connector.tokens, model.image_token_id
    layout = model._layout(torch.tensor([[1, *[image] * (2 * n), 7]]), None)
    assert layout.position[0].tolist() == [0, 1, *[2] * (n - 2), 3, 4, *[5] * (n - 2), 6, 7]
    assert (layout.modality[0] == TEXT).nonzero()[:, 0].tolist() == [0, n, 2 * n, 2 * n + 1]


@torch.no_grad()
def test_patch_is_blind_to_the_next_patch(shake: Shake) -> None:
    model = small(shake).model.eval()
    batch = batch_of(model)
    ids = batch["input_ids"]
    layout = model._layout(ids, batch["attention_mask"], "right")
    x = model._splice(ids, batch["pixel_values"])
    j = 5  # BOS, boi, patches
    changed = x.clone()
    changed[:, j + 1] += 1.0
    before, after = (model.decoder(TokenBatch(rows, layout)) for rows in (x, changed))
    assert torch.equal(before[:, : j + 1], after[:, : j + 1])
    assert bool(((before - after)[:, j + 1 : j + 4].abs().amax(-1) > 1e-3).all())


@torch.no_grad()
def test_batches_whose_rows_disagree_equal_their_rows_alone(shake: Shake) -> None:
    """A batch with and without images is routed token by token, and gives what static routes give."""
    model = small(shake).model.eval()
    batch = batch_of(model)
    text = batch_of(model, images=False)
    one, other = batch["input_ids"][:1], text["input_ids"][:1]
    width = one.shape[1]
    rows = torch.cat([one, nn.functional.pad(other, (0, width - other.shape[1]))])
    real = torch.cat([batch["attention_mask"][:1], torch.arange(width)[None] < other.shape[1]])
    real = real & torch.cat([rows[:1] != 0, rows[1:] != 0])
    together = model.text_logits(batch["pixel_values"][:1], rows, real)
    alone = model.text_logits(batch["pixel_values"][:1], rows[:1], real[:1])
    torch.testing.assert_close(together[0][real[0]], alone[0][real[0]], atol=1e-5, rtol=1e-5)
    alone = model.text_logits(None, rows[1:], real[1:])
    torch.testing.assert_close(together[1][real[1]], alone[0][real[1]], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_scores_of_candidates_over_one_reading_equal_whole_rows(shake: Shake) -> None:
    model = small(shake).model.eval()
    images = [picture(0), picture(1)]
    together = model.score_candidates(images, [TEXTS, TEXTS], ["what is it?"] * 2)
    apart = torch.stack([model.score_text([image] * 4, TEXTS, ["what is it?"] * 4) for image in images])
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-5)


# -- sizes ---------------------------------------------------------------------------------------------------------


def test_published_sizes() -> None:
    model = meta("cogvlm-chat")
    assert model.encoder.config.depth == len(model.encoder.trunk.layers) == 63  # the 64th is not there
    assert model.encoder.trunk.final_norm is None
    assert model.encoder.trunk.config.placement == "branch"
    assert (model.encoder.tokens, model.encoder.width) == (1225, 1792)  # without CLS
    assert meta("cogvlm-base-224").encoder.tokens == 256
    count = {n: p.numel() for n, p in model.named_parameters()}
    experts = sum(size for name, size in count.items() if name.startswith("decoder.") and visual_name(name))
    assert experts == 32 * (4 * 4096**2 + 3 * 4096 * 11008) == 6_476_005_376
    for layer in model.decoder.trunk.layers:  # in every layer, of attention, its output and the FFN
        routed = (layer.attn.q, layer.attn.k, layer.attn.v, layer.attn.out, layer.ffn)
        assert all(len(unit) == 2 for unit in routed)
        assert isinstance(layer.attn_norm, nn.RMSNorm)
        assert isinstance(layer.ffn_norm, nn.RMSNorm)
    vit = sum(size for name, size in count.items() if name.startswith("encoder."))
    assert 4.2e9 < vit < 4.4e9
    language = sum(size for name, size in count.items() if name.startswith("decoder.")) - experts
    assert language == 6_738_415_616  # Vicuna-7B
    assert round(sum(count.values()) / 1e9, 1) == 17.6


def test_experts_in_every_fourth_layer() -> None:
    decoder = small(expert_every=4, depth=5).model.decoder
    assert [len(layer.ffn) for layer in decoder.trunk.layers] == [2, 1, 1, 1, 2]


# -- templates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        ("base", "Why?", "Why?NoSure?"),
        ("chat", " [INST] Why? [/INST] ", " [INST] Why? [/INST] No [INST] Sure? [/INST] "),
        ("vqa", "Question: Why? Short answer:", None),
        ("chat_old", "Question: Why? Answer:", "Question: Why? Answer:No\nQuestion: Sure? Answer:"),
    ],
)
def test_templates_write_what_the_release_writes(name: str, one: str, two: str | None) -> None:
    tokenizer = named_tokenizer("openmoji-bpe")

    def row(*turns: tuple[str, str | None]) -> tuple[list[int], list[int]]:
        return lay_out(template(f"cogvlm_{name}"), tokenizer, turns, 1, 3, 2000)

    assert row(("Why?", None))[0] == [tokenizer.bos_id, 2000, 2000, 2000, *tokenizer.encode([one])[0]]
    if two is None:
        return
    prompt = [tokenizer.bos_id, 2000, 2000, 2000, *tokenizer.encode([two])[0]]
    assert row(("Why?", "No"), ("Sure?", None))[0] == prompt
    ids, labels = row(("Why?", "No"), ("Sure?", "Yes"))
    answer = [*tokenizer.encode(["Yes"])[0], tokenizer.eos_id]
    assert ids == prompt + answer
    assert labels == [-100] * len(prompt) + answer  # the context, earlier answers included, is no target


# -- wrong input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decoder": {"experts": ["fnn"]}}, "experts = ['fnn'] must be one or more of qkv, out, ffn"),
        ({"decoder": {"experts": []}}, "must be one or more of"),
        ({"decoder": {"expert_every": 0}}, "expert_every = 0 must be 1 or more"),
        ({"decoder": {"heads": 5}}, "must be a multiple of heads = 5"),
        ({"connector": {"ffn": 0}}, "ffn = 0 must be 1 or more"),
        ({"decoder": {"context_length": 18}}, "image tokens leave no room for text"),
        ({"wiring": {"template": "cogvlm"}}, "unknown prompt template 'cogvlm'; did you mean cogvlm_"),
        ({"encoder": {"image_size": 60}}, "image_size"),
    ],
)
def test_mistakes_are_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        zoo.build("cogvlm-base-224", scale="tiny", **values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"template_version": "talk"}, "template_version = 'talk': expected one of base, chat, vqa, chat_old"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'; CogVLM has silu"),
        ({"vision_config": {"hidden_act": "relu"}}, "vision_config.hidden_act = 'relu'; CogVLM has gelu"),
    ],
)
def test_folders_it_does_not_read_are_one_line(config: dict[str, Any], message: str, tmp_path: Any) -> None:
    import json

    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["CogVLMForCausalLM"], **config}))
    with pytest.raises(WeightsError) as caught:
        load_model(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_hubs_folders_become_the_published_recipes(tmp_path: Any) -> None:
    from zoo.weights.formats.cogvlm import from_transformers

    for form, size, name in (("base", 224, RECIPES[0]), ("base", 490, RECIPES[1]), ("chat", 490, RECIPES[2])):
        vision = {"image_size": size, "num_heads": 16, "hidden_size": 1792, "num_hidden_layers": 63}
        recipe = from_transformers({"template_version": form, "vision_config": vision}, tmp_path).recipe
        assert recipe.model == name
        assert recipe.parts == resolve(name).parts


def test_a_file_with_sat_names_says_what_to_give_instead() -> None:
    state = {"mixins.rotary.vision_dense_list.0.weight": torch.ones(1)}
    with pytest.raises(WeightsError, match="give the folder of cogvlm-chat-hf"):
        file_format(resolve("cogvlm-chat", scale="tiny"), state)


def test_the_layout_is_shown_with_its_ends() -> None:
    layout = small().model.layouts()["decoder"]
    assert layout.names == ("before", "boi, patches", "eoi", "text")
    assert layout.kind == "causal"
    assert layout.spans == ((0, 1, TEXT), (1, 18, VISUAL), (18, layout.length, TEXT))


def test_cost_counts_every_token_with_its_own_expert() -> None:
    """Of a sample's rows boi and the patches pass the experts that learn, eoi and text the frozen weights."""
    from zoo.compare.flops import count_recipe

    recipe = resolve("cogvlm-base-224", scale="tiny", values={**SIZES, "decoder": {**SIZES["decoder"], "dropout": 0.0}})
    flops = count_recipe(recipe)[0]
    model = small().model
    text, visual = model.typical_targets + 1, model.connector.tokens - 1
    c, patches, width = model.decoder.config, model.connector.tokens - 2, SIZES["encoder"]["width"]
    of_token = 2 * c.depth * (4 * c.width**2 + 3 * c.width * c.ffn)
    attention = 2 * 2 * c.depth * (text + visual) ** 2 * c.width  # scores and sums over all keys, as torch counts
    head = 2 * text * c.width * c.vocab_size
    adapter = 2 * patches * (width * c.width + 3 * c.width * 48)
    assert flops.trainable_forward == pytest.approx(visual * of_token + attention + adapter, rel=0.02)
    assert flops.frozen_forward > text * of_token + 0.9 * head * (text - 1) / text
