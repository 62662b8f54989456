"""What the unified wiring promises beyond the goldens: who reads whom, what is drawn at random, and what it refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as Picture
from torch import Tensor, nn

from zoo.connectors.simple import MLPConfig
from zoo.data.sample import Sample
from zoo.data.sequences import CODE, IGNORE, TASKS, layout_of, style
from zoo.decoders.trunk_lm import TrunkLMConfig
from zoo.encoders.base import Encoder, ImageEncoderConfig
from zoo.errors import ConfigError, DataError
from zoo.models.unified import UnifiedConfig
from zoo.models.unified_vision import UnifiedVisionConfig
from zoo.objectives.masked_image_tokens import MaskedImageTokensConfig
from zoo.objectives.next_token import NextTokenConfig
from zoo.part import Features
from zoo.recipe import resolve
from zoo.sampling.text import Decoding
from zoo.tokenizers.stored import StoredCodesConfig
from zoo.tokenizers.vq import VQConfig
from zoo.weights.keymaps import load_into, phi

Shake = Callable[[nn.Module], nn.Module]
CAPTION = "a red apple beside two green pears"
PHI: dict[str, Any] = {
    "norm": "layer", "placement": "parallel", "act": "gelu_tanh", "gated": False, "bias": True, "rope_share": 0.5,
    "head_bias": True,
}  # fmt: skip


def decoder(**fields: Any) -> TrunkLMConfig:
    base: dict[str, Any] = {
        "width": 32, "depth": 2, "heads": 2, "kv_heads": 0, "ffn": 64, "vocab_size": 1024, "context_length": 96,
        "qk_norm": "layer", "tie": False,
    }  # fmt: skip
    return TrunkLMConfig(**base | fields)


def image_tokenizer() -> VQConfig:
    return VQConfig(image_size=32, patch_size=8, width=32, blocks=0, vocab_size=16)


def make(name: str, parts: dict[str, Any] | None = None, **fields: Any) -> Any:
    own = {"decoder": decoder(**(PHI if name == "show-o" else {})), "image_tokenizer": image_tokenizer()}
    named = {slot: (slot, config) for slot, config in (own | (parts or {})).items()}
    return UnifiedConfig(style=name, **fields).build(named, 0)


def pixels(seed: int = 0) -> Any:
    return Picture.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 32, 3), np.uint8))


def pair(number: int = 0, **more: Any) -> Sample:
    return Sample(f"s{number}", pixels(number), (CAPTION,), more)


def of_task(model: Any, task: str, **fields: Any) -> dict[str, Tensor]:
    """A batch of two pairs, both of one task."""
    model.reconfigure(replace(model.config, tasks={task: 1.0}, **fields))
    batch: dict[str, Tensor] = model.processor([pair(0), pair(1)], train=False)
    return batch


# -- who reads whom ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_show_o_reads_text_causally_and_the_image_both_ways(shake: Shake) -> None:
    model = make("show-o").eval()
    shake(model)
    batch = of_task(model, "t2i")
    assert batch["task"].tolist() == [0, 0]
    batch["image_codes"] = torch.randint(16, (2, 16), generator=torch.Generator().manual_seed(0))
    batch |= {"mask_ratio": torch.full((2,), 0.5), "mask_order": torch.arange(16.0).expand(2, 16).flip(1)}
    before = model(batch)
    slots, prompt = batch["image_slots"], batch["segment"] == 0
    shown = before["code_targets"][slots].view(2, 16) == IGNORE
    assert shown[:, :4].all()
    assert not shown[:, -4:].any()
    changed = {**batch, "image_codes": batch["image_codes"].clone()}
    changed["image_codes"][:, 4] = (changed["image_codes"][:, 4] + 1) % 16  # an unmasked code in the middle
    after = model(changed)
    torch.testing.assert_close(after["hidden"][prompt], before["hidden"][prompt])  # the prompt never sees the image
    moved = (after["hidden"] - before["hidden"])[slots].view(2, 16, -1).abs().amax(-1)
    assert bool((moved > 1e-5).all())  # every place sees every place, before and behind
    # an unmasked code is nobody's target
    assert torch.equal(after["code_targets"], before["code_targets"])
    # the image sees the prompt
    words = prompt & (batch["labels"] == IGNORE)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, words[0].nonzero()[2]] = 77
    heard = model(other)["hidden"] - before["hidden"]
    assert float(heard[0][slots[0]].abs().max()) > 1e-5
    torch.testing.assert_close(heard[1], torch.zeros_like(heard[1]))


@torch.no_grad()
def test_show_o_understands_with_the_whole_image_in_sight_of_its_first_token(shake: Shake) -> None:
    model = make("show-o").eval()
    shake(model)
    batch = of_task(model, "mmu")
    batch["image_codes"] = torch.zeros(2, 16, dtype=torch.long)
    before = model(batch)
    assert bool((before["code_targets"] == IGNORE).all())
    changed = {**batch, "image_codes": F.one_hot(torch.tensor([15, 15]), 16)}  # the last code
    moved = (model(changed)["hidden"] - before["hidden"])[batch["segment"] >= 0].abs().amax(-1)
    assert bool((moved > 1e-6).all())  # even the task token, at place 0
    text = before["targets"][0][before["targets"][0] >= 0].tolist()
    ids = model.processor.text_ids(CAPTION)
    assert text == [model.tokenizer.bos_id, *ids, model.tokenizer.eos_id]


@torch.no_grad()
def test_chameleon_predicts_codes_from_what_stands_before(shake: Shake) -> None:
    model = make("chameleon").eval()
    shake(model)
    batch = of_task(model, "t2i")
    codes = torch.randint(16, (2, 16), generator=torch.Generator().manual_seed(0))
    batch["image_codes"] = codes
    before = model(batch)
    slots = batch["image_slots"]
    own = before["targets"][:, :-1][slots[:, 1:]].view(2, 16)
    assert torch.equal(own, codes + model.vocabulary.first_code)  # boi predicts code 0, code i predicts i + 1
    last = before["targets"][slots].view(2, 16)[:, -1]
    assert bool((last == model.vocabulary.id("eoi")).all())
    changed = {**batch, "image_codes": codes.clone()}
    changed["image_codes"][:, 8] = (codes[:, 8] + 1) % 16
    moved = (model(changed)["hidden"] - before["hidden"])[slots].view(2, 16, -1).abs().amax(-1)
    assert bool((moved[:, :8] == 0).all())
    assert bool((moved[:, 8:] > 0).all())


@torch.no_grad()
@pytest.mark.parametrize("name", ["show-o", "chameleon"])
def test_codes_and_pixels_give_the_same(name: str, shake: Shake) -> None:
    model = make(name)
    shake(model)
    model.train()
    assert not model.image_tokenizer.training
    batch = of_task(model, "t2i") | {"mask_ratio": torch.full((2,), 0.5), "mask_order": torch.rand(2, 16)}
    codes = model.image_tokenizer.encode(batch["pixel_values"])
    stored = {key: value for key, value in batch.items() if key != "pixel_values"} | {"image_codes": codes}
    for key, value in model(batch).items():
        assert torch.equal(value, model(stored)[key])


def test_the_image_tokenizer_never_learns(shake: Shake) -> None:
    model = make("chameleon")
    shake(model)
    batch = of_task(model, "t2i")
    loss, _ = NextTokenConfig(z_loss=1e-5).build()(model, batch, model(batch))
    loss.backward()
    assert all(p.grad is None for p in model.image_tokenizer.parameters())
    assert all(p.grad is not None for p in model.decoder.parameters())


@torch.no_grad()
def test_text_alone_is_phi_with_qk_norm(shake: Shake) -> None:
    transformers = pytest.importorskip("transformers")
    model = make("show-o").eval()
    size = model.vocabulary.size
    config = transformers.PhiConfig(
        vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        qk_layernorm=True, tie_word_embeddings=False, hidden_act="gelu_new",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    peer = transformers.PhiForCausalLM(config).eval()
    shake(peer)
    names = {"trunk": "decoder.trunk.", "embed": "decoder.embedding.tokens.", "head": "decoder.lm_head."}
    weights = {k: v for k, v in peer.state_dict().items() if "rotary" not in k}
    load_into(model, weights, phi.keymap(**names), allow_new=("image_tokenizer.{**}",))
    ids = torch.randint(1024, (2, 11), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.token_logits(ids), peer(ids).logits, atol=2e-5, rtol=1e-5)
    # the mixed mask as a four-dimensional one
    batch = of_task(model, "mmu")
    mask = layout_of(batch["segment"], model.style).mask()  # [B, 1, T, T]
    codes = model.image_tokenizer.encode(batch["pixel_values"]) + model.vocabulary.first_code
    ids = batch["input_ids"].masked_scatter(batch["image_slots"], codes)
    ours = model.token_logits(ids, layout_of(batch["segment"], model.style))
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    theirs = peer(ids, attention_mask=added).logits
    real = batch["segment"] >= 0
    torch.testing.assert_close(ours[real], theirs[real], atol=2e-5, rtol=1e-5)
    assert isinstance(model.decoder.trunk.layers[0].attn.q_norm, nn.LayerNorm)
    assert model.decoder.trunk.layers[0].attn.q_norm.normalized_shape == (16,)
    assert model.decoder.trunk.config.rope == 8


# -- what is drawn at random -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["show-o", "chameleon", "transfusion"])
def test_tasks_are_drawn_in_their_shares(name: str) -> None:
    ours = style(name)
    processor = make("chameleon").processor
    processor.tasks, processor.style = dict(ours.tasks), ours
    drawn = Counter(processor._task(Sample(f"s{i}"), draw, 1) for i in range(500) for draw in range(8))
    whole = sum(share for _, share in ours.tasks)
    for task, share in ours.tasks:
        expected = share / whole
        assert abs(drawn[task] / 4000 - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5
    one = [processor._task(Sample("a"), d, 1) for d in range(99)]
    assert one == [processor._task(Sample("a"), d, 1) for d in range(99)]
    assert len(set(one)) > 1  # not one task for ever
    if name == "transfusion":
        assert ours.caption_first == pytest.approx(0.8)


def test_a_tenth_of_the_prompts_is_left_out() -> None:
    processor = make("show-o", tasks={"t2i": 1}).processor
    sample = Sample("x", pixels(), (CAPTION,))
    empty = 0
    for draw in range(2000):
        _, parts, said = processor._parts(sample, True, draw, False)
        assert (len(parts) == 1) == (said == "")
        empty += len(parts) == 1
    assert abs(empty / 2000 - 0.1) < 4 * (0.09 / 2000) ** 0.5
    assert all(len(processor._parts(sample, False, draw, False)[1]) == 2 for draw in range(200))  # not in evaluation
    plain = make("show-o", tasks={"t2i": 1}, prompt_dropout=0.0).processor
    assert all(len(plain._parts(sample, True, draw, False)[1]) == 2 for draw in range(200))
    bare = make("show-o", tasks={"t2i": 1}, prompt_dropout=1.0)
    ids = bare.processor([sample], train=True)["input_ids"][0, :3].tolist()
    assert ids == [bare.vocabulary.id("t2i"), bare.tokenizer.bos_id, bare.tokenizer.eos_id]


def test_hidden_codes_follow_the_step_s_stream_in_training_and_nothing_in_evaluation() -> None:
    model = make("show-o").train()
    batch = of_task(model, "t2i")

    def hidden() -> Tensor:
        targets: Tensor = model(batch)["code_targets"]
        return targets

    torch.manual_seed(7)
    first = hidden()
    second = hidden()
    torch.manual_seed(7)
    assert torch.equal(hidden(), first)
    assert not torch.equal(second, first)
    model.eval()
    assert torch.equal(hidden(), hidden())


# -- rows of samples ---------------------------------------------------------------------------------------------------


def test_samples_become_rows_of_their_task() -> None:
    model = make("chameleon", tasks={"mmu": 1})
    story = Sample("d", pixels(), ("one", "two"), {"images": (pixels(1), pixels(2)), "parts": ("one", 0, "two", 1)})
    edit = Sample(
        "e", pixels(), ("make it red",),
        {"images": (pixels(1), pixels(2)), "parts": (0, "make it red", 1), "given": 2},
    )  # fmt: skip
    asked = Sample("c", pixels(), (), {"turns": (("<image>\nWhat is it?", "An apple."), ("Which colour?", "Red."))})
    samples = [pair(), Sample("b", None, ("only words",)), asked, story, edit]
    batch = model.processor(samples, train=False)
    assert [TASKS[i] for i in batch["task"].tolist()] == ["mmu", "lm", "mmu", "interleaved", "interleaved"]
    assert batch["pixel_values"].shape == (6, 3, 32, 32)
    assert batch["image_given"].tolist() == [False, False, False, False, True, False]
    assert batch["image_drawn"].tolist() == [True, True, True, True, False, True]
    vocabulary, encode = model.vocabulary, model.processor.text_ids
    labels = [row[row != IGNORE].tolist() for row in batch["labels"]]
    eos, picture = model.tokenizer.eos_id, [vocabulary.id("boi"), *[CODE] * 16, vocabulary.id("eoi")]
    assert labels[2][18 + 1 :] == [*encode(" An apple."), eos, *encode(" Red."), eos]  # questions are not trained
    assert labels[3][1:] == [*encode("one"), *picture, *encode("two"), *picture, eos]
    assert labels[4][1:] == [*picture, eos]  # the given image and the instruction are read alone
    assert torch.isfinite(NextTokenConfig().build()(model, batch, model(batch))[0])


def test_show_o_draws_codes_of_interleaved_rows_and_predicts_where_they_begin() -> None:
    model = make("show-o")
    story = Sample("d", pixels(), ("one",), {"images": (pixels(1), pixels(2)), "parts": ("one", 0, "two", 1)})
    batch = model.processor([story], train=False)
    assert batch["input_ids"][0, 0] == model.vocabulary.id("lvg")
    assert batch["segment"].max() == 2
    outputs = model(batch)
    soi = model.vocabulary.id("soi")
    assert int((outputs["targets"] == soi).sum()) == 2  # a text knows when an image comes
    assert not bool((outputs["code_targets"] == soi).any())
    assert bool((outputs["code_targets"][batch["image_slots"]] >= model.vocabulary.first_code).any())


def test_pads_in_front_are_cut_to_the_longest_prompt() -> None:
    model = make("show-o", tasks={"t2i": 1})
    words = ("a", CAPTION * 3)
    batch = model.processor([Sample(f"s{i}", pixels(i), (t,)) for i, t in enumerate(words)], train=False)
    real = batch["segment"] >= 0
    assert bool(real[1].all())
    assert not bool(real[0, 0])
    assert batch["input_ids"].shape[1] == len(model.processor.text_ids(CAPTION * 3)) + 3 + 18


def test_three_losses_fall_together() -> None:
    model = make("show-o").train()
    rows = [of_task(model, task) for task in ("t2i", "mmu")]
    objectives = MaskedImageTokensConfig().build(), NextTokenConfig(tasks={"lm": 0.1}).build()
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=3e-3)
    losses = []
    torch.manual_seed(0)
    for _ in range(25):
        total = torch.zeros(())
        for batch in rows:
            outputs = model(batch)
            total = total + sum(objective(model, batch, outputs)[0] for objective in objectives)
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(total.detach()))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


# -- writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["show-o", "chameleon"])
def test_text_is_written_with_text_ids_alone(name: str, shake: Shake) -> None:
    model = make(name).eval()
    shake(model)
    rows = model.processor.encode_prompts(["What is it?", "Which colour has the one on the left?"], 2)
    values = model._pixels([pixels(0), pixels(1)])
    ids = model.generate_ids(
        values, rows["input_ids"], rows["attention_mask"], Decoding(max_new_tokens=12), stop_ids=[]
    )
    assert ids.shape == (2, 12)
    assert bool(model.text_columns[ids].all())
    assert not bool(model.text_columns[model.tokenizer.pad_id])
    free = model.generate_ids(values[:1], rows["input_ids"][:1], rows["attention_mask"][:1], any_id=True)
    assert free.shape[0] == 1
    # greedy decoding with a cache equals one pass over the whole
    whole = torch.cat([rows["input_ids"][1:], ids[1:]], 1)
    logits = model.text_logits(values[1:], whole, torch.ones_like(whole))[:, -13:-1, : model.vocabulary.text]
    assert torch.equal(logits.masked_fill(~model.text_columns, -torch.inf).argmax(-1), ids[1:])


@pytest.mark.parametrize("name", ["show-o", "chameleon"])
def test_scores_are_sums_of_log_probabilities(name: str, shake: Shake) -> None:
    model = make(name).eval()
    shake(model)
    image, question, answer = pixels(3), "What is it?", "An apple."
    score = model.score_text([image], [answer], [question])
    rows = model.processor.encode_texts([answer], [question])
    logits = model.text_logits(model._pixels([image]), rows["input_ids"], rows["attention_mask"])
    wanted = (*model.processor.text_ids(" " + answer), model.tokenizer.eos_id)
    at = rows["input_ids"].shape[1] - len(wanted)
    nats = logits[0, at - 1 : -1].log_softmax(-1)[range(len(wanted)), list(wanted)].sum()
    torch.testing.assert_close(score[0], nats, atol=1e-4, rtol=1e-5)
    several = model.score_candidates([image], [[answer, "A pear.", "No"]], [question])
    torch.testing.assert_close(several[0, 0], score[0], atol=1e-4, rtol=1e-5)
    assert model.score_text([image], [answer]).item() != pytest.approx(score.item())


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_prompts_that_do_not_fit() -> None:
    for name in ("show-o", "chameleon"):
        model = make(name).eval()
        for call in (
            lambda m=model: m.prompt_rows([CAPTION * 20]),
            lambda m=model: m.generate_text([pixels()], [CAPTION * 20]),
        ):
            with pytest.raises(DataError, match=r"tokens.* fit: shorten") as error:
                call()
            assert "\n" not in str(error.value)
        with pytest.raises(ConfigError, match="wrap it in a list"):
            model.prompt_rows("a text")
        long = model.processor([Sample("long", pixels(), (CAPTION * 20,))], train=True)
        assert long["input_ids"].shape[1] <= 96  # training cuts it


def test_prompt_rows_are_the_prompt_and_its_absence() -> None:
    model = make("show-o")
    ids, segment = model.prompt_rows(["a", CAPTION])
    assert ids.shape == segment.shape
    assert len(ids) == 4
    assert torch.equal(ids[2], ids[3])
    kept = ids[2][segment[2] >= 0].tolist()
    assert kept == [model.vocabulary.id("t2i"), model.tokenizer.bos_id, model.tokenizer.eos_id]
    ids, segment = make("chameleon").prompt_rows(["a"])
    boi = make("chameleon").vocabulary.id("boi")
    assert ids[:, -1].tolist() == [boi, boi]
    assert bool((segment <= 0).all())


def test_wrong_fields_and_parts() -> None:
    with pytest.raises(ConfigError, match="unknown task 't2v'"):
        UnifiedConfig(tasks={"t2v": 1.0})
    with pytest.raises(ConfigError, match="expected shares of 0 or more"):
        UnifiedConfig(tasks={"t2i": 0.0})
    with pytest.raises(ValueError, match="expected shares between 0 and 1"):
        UnifiedConfig(prompt_dropout=1.5)
    with pytest.raises(ConfigError, match=r"unknown sequence style 'shou-o'.*show-o"):
        UnifiedConfig(style="shou-o")
    with pytest.raises(ConfigError, match="stored codes are those of unchanged images"):
        make("show-o", {"image_tokenizer": StoredCodesConfig(image_size=32, patch_size=8)}, augment="flip")
    model = make("show-o", {"decoder": decoder(vocab_size=512)})
    with pytest.raises(ConfigError, match=r"has 1024 ids, decoder.vocab_size is 512: set one"):
        _ = model.processor
    with pytest.raises(ValueError, match="head_bias = true needs tie = false"):
        decoder(head_bias=True, tie=True)
    with pytest.raises(ValueError, match=r"unknown task 'lmm'.*lm"):
        NextTokenConfig(tasks={"lmm": 0.1})
    outputs = {"hidden": torch.zeros(1, 2, 32), "targets": torch.zeros(1, 2, dtype=torch.long)}
    with pytest.raises(ConfigError, match="does not say whose rows are whose"):
        NextTokenConfig(tasks={"lm": 0.1}).build()(make("chameleon"), {}, outputs)


def test_flop_counts_assume_as_many_targets_as_there_are() -> None:
    for name in ("show-o", "chameleon"):
        model = make(name).eval()
        batch = model.example_batch(6)
        outputs = model(batch)
        assert round(int((outputs["targets"] >= 0).sum()) / 6) == model.typical_targets


# -- published sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "name", "millions"),
    [
        ("show-o", "phi-1.5-qk", 1448.2),
        ("chameleon-7b", "chameleon-7b", 7035 - 24),
        ("chameleon", "chameleon-baseline-0.16b", 162),
        ("chameleon", "chameleon-baseline-0.37b", 374),
        ("chameleon", "chameleon-baseline-0.76b", 778),
        ("chameleon", "chameleon-baseline-1.4b", 1364),
        ("chameleon", "chameleon-baseline-7b", 6738),
    ],
)
def test_sizes_are_those_of_the_papers(recipe: str, name: str, millions: float) -> None:
    config = resolve(recipe, choices={"decoder": name})
    with torch.device("meta"):
        alone: Any = config.parts["decoder"][1]
        own = alone.build() if recipe == "chameleon" else config.wiring[1].build(config.parts, 0).decoder
    found = sum(p.numel() for p in own.parameters()) / 1e6
    assert found == pytest.approx(millions, abs=0.5, rel=1e-3)


def test_dropout_and_norms_of_the_two_chameleons() -> None:
    small, large = (resolve(f"chameleon-{size}").parts["decoder"][1] for size in ("7b", "34b"))
    assert isinstance(small, TrunkLMConfig)
    assert isinstance(large, TrunkLMConfig)
    assert (small.dropout, small.placement, small.qk_norm) == (0.1, "pre", "layer")
    assert (large.dropout, large.placement, large.qk_norm) == (0.0, "branch", "layer")
    recipe = resolve("chameleon")
    grid = recipe.parts["image_tokenizer"][1]
    assert (getattr(grid, "grid"), getattr(grid, "vocab_size")) == ((32, 32), 16384)  # noqa: B009


# -- an eye of its own -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EyeConfig(ImageEncoderConfig):
    """An encoder whose features are what stands in its table."""

    image_size: int = 32
    tokens: int = 576
    width: int = 8

    def build(self) -> Eye:
        return Eye(self)


class Eye(Encoder):
    def __init__(self, config: EyeConfig) -> None:
        super().__init__()
        self.tokens, self.width, self.pooled_width = config.tokens, config.width, 0
        self.table = nn.Parameter(torch.randn(1, config.tokens, config.width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        return Features(self.table.expand(len(x), -1, -1) * (1 + x.mean((1, 2, 3))[:, None, None]))


def seeing(eye: EyeConfig, **fields: Any) -> Any:
    parts = {
        "encoder": eye,
        "connector": MLPConfig(),
        "decoder": decoder(**PHI | {"context_length": 800} | fields),
        "image_tokenizer": VQConfig(image_size=32, patch_size=8, width=32, blocks=0, vocab_size=32),
    }
    return UnifiedVisionConfig().build({slot: (slot, config) for slot, config in parts.items()}, 0)


@torch.no_grad()
def test_features_of_the_released_clip_path(golden: Callable[[str], Any]) -> None:
    g = golden("show_o")
    model = seeing(EyeConfig(), vocab_size=g.config["text_tokens"]).eval()
    names = {"trunk": "decoder.trunk.", "embed": "decoder.embedding.tokens.", "head": "decoder.lm_head."}
    own = {k.removeprefix("showo."): v for k, v in g.weights.items() if k.startswith("showo.")}
    others = ("image_tokenizer.{**}", "encoder.{**}", "connector.{**}")
    load_into(model, own, phi.keymap(**names), allow_new=others)
    model.encoder.table.copy_(g.inputs["clip_feats"])
    for i in (0, 2):
        layer = [m for m in model.connector.modules() if isinstance(m, nn.Linear)][i // 2]
        layer.weight.copy_(g.weights[f"mm_projector.{i}.weight"])
        layer.bias.copy_(g.weights[f"mm_projector.{i}.bias"])
    slots = torch.full((1, 576), model.image_token_id)
    ids = torch.cat([g.inputs["clip_prefix_ids"], slots, g.inputs["clip_suffix_ids"]], 1)
    logits = model.text_logits(torch.zeros(1, 3, 32, 32), ids)
    torch.testing.assert_close(logits[:, g.inputs["clip_rows"]], g.outputs["clip_logits"], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("tasks", [("t2i", "mmu"), ("t2i",), ("mmu",), ("lm",)])
def test_features_and_codes_in_one_step(tasks: tuple[str, ...], shake: Shake) -> None:
    model = seeing(EyeConfig(tokens=9))
    shake(model)
    model.reconfigure(replace(model.config, tasks=dict.fromkeys(tasks, 1.0)))
    samples = [pair(i) for i in range(6)]
    batch = model.processor(samples, train=False)
    drawn = Counter(TASKS[i] for i in batch["task"].tolist())
    assert set(drawn) == set(tasks)
    assert len(batch["eye_values"]) == drawn["mmu"]
    assert len(batch["pixel_values"]) == len(batch["image_drawn"]) == drawn["t2i"]
    outputs = model(batch)
    loss = MaskedImageTokensConfig().build()(model, batch, outputs)[0]
    loss = loss + NextTokenConfig(tasks={"lm": 0.1}).build()(model, batch, outputs)[0]
    loss.backward()
    grown = [p.grad for p in model.connector.parameters()]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in grown)  # also where no row is understood
    assert any(bool((g != 0).any()) for g in grown if g is not None) == ("mmu" in tasks)


def test_the_projector_learns_first_and_the_eye_never() -> None:
    recipe = resolve("show-o-clip-vit")
    assert [stage.train for stage in recipe.stages] == [["connector"], ["connector", "decoder"]]
    eye = recipe.parts["encoder"][1]
    assert (getattr(eye, "layer"), getattr(eye, "cls")) == (-2, False)  # noqa: B009
    assert recipe.stage_wiring(1).system.startswith("A chat between")  # type: ignore[attr-defined]
    assert not recipe.stage_wiring(0).system  # type: ignore[attr-defined]
