"""FLOPs counted on the meta device equal counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.api import build_module
from zoo.compare import flops
from zoo.compare.flops import count, count_recipe, frozen_paths, samples
from zoo.layout import Segment, lay_out
from zoo.nn import Trunk, TrunkConfig
from zoo.recipe import resolve


def block(tokens: int, width: int, ffn: int, matrices: int) -> int:
    """FLOPs of one transformer layer's products: four attention projections, scores and values, the FFN's matrices."""
    return 2 * tokens * (4 * width * width + matrices * width * ffn) + 4 * tokens * tokens * width


def test_a_two_tower_model_by_hand() -> None:
    recipe = resolve("clip", scale="tiny")
    flops = count_recipe(recipe)[0]
    with torch.device("meta"):
        batch = build_module(recipe, 0).model.example_batch(2)
    patches, words = 16, batch["input_ids"].shape[1]
    image = 2 * patches * (3 * 16 * 16) * 128 + 4 * block(patches + 1, 128, 512, 2)
    text = 4 * block(words, 128, 512, 2)
    heads = 2 * 2 * 128 * 128
    logits = 2 * 2 * 2 * 128  # of two pairs, both ways; the batch counted has two items
    assert flops.frozen_forward == 0
    assert flops.trainable_forward == pytest.approx(image + text + heads + logits, rel=0.02)
    # the backward pass makes two products of each forward one, but for the first layer's input
    assert flops.backward == pytest.approx(2 * flops.trainable_forward, rel=0.04)


def test_frozen_parts_cost_no_weight_gradients() -> None:
    align, instruct = count_recipe(resolve("llava", scale="tiny"))
    with torch.device("meta"):
        module = build_module(resolve("llava", scale="tiny"), 0)
    tokens = module.model.example_batch(1)["input_ids"].shape[1]
    decoder = 4 * block(tokens, 128, 512, 3)
    assert frozen_paths(module.model) == ["encoder", "decoder"]
    assert align.frozen_forward > decoder
    assert align.trainable_forward == 2 * 16 * 128 * 128  # one linear map of 16 patches
    # through a frozen decoder only input gradients flow: one product for each of the forward's, and SDPA's own
    assert align.backward == pytest.approx(align.frozen_forward - flops_of_encoder(module), rel=0.15)
    assert instruct.backward > 1.7 * align.backward
    assert align.frozen_forward + align.trainable_forward == instruct.frozen_forward + instruct.trainable_forward


def flops_of_encoder(module: torch.nn.Module) -> int:
    """What is left frozen when the decoder trains too."""
    module.set_stage(1)  # type: ignore[operator]
    left = count(module).frozen_forward  # type: ignore[arg-type]
    module.set_stage(0)  # type: ignore[operator]
    return left


@pytest.mark.parametrize(("kv_heads", "gated"), [(4, False), (2, True)])
def test_a_trunk_to_the_last_operation(kv_heads: int, gated: bool) -> None:
    tokens, width, heads, ffn, depth = 24, 96, 4, 160, 3
    shape = TrunkConfig(width=width, depth=depth, heads=heads, kv_heads=kv_heads, ffn=ffn, gated=gated)
    with torch.device("meta"):
        trunk = Trunk(shape)
        x = torch.zeros(2, tokens, width, requires_grad=True)
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    layout = lay_out([Segment("text", tokens, "text", "causal")], 2, device="meta")
    with forward:
        out = trunk(x, layout)
    with backward:
        out.sum().backward()
    projections = 2 * tokens * width * width * (2 + 2 * kv_heads / heads)
    linear = depth * (projections + 2 * tokens * (3 if gated else 2) * width * ffn)
    attention = depth * 4 * tokens * tokens * width
    assert forward.get_total_flops() == 2 * (linear + attention)
    # of every product of two matrices two more, in attention as elsewhere
    assert backward.get_total_flops() == 2 * 2 * (linear + attention)


def test_a_bridge_with_a_frozen_eye_to_the_last_operation() -> None:
    """Eye (three of its four layers are read) -> MLP -> language model, in both stages."""
    with torch.device("meta"):
        module = build_module(resolve("llava", scale="tiny", choices={"connector": "mlp"}), 0)
    tokens, targets = module.model.example_batch(1)["input_ids"].shape[1], module.model.typical_targets
    eye = 2 * 16 * (3 * 16 * 16) * 128 + 3 * block(17, 128, 512, 2)
    connector = 2 * 16 * 128 * 128  # of each of its two matrices
    linear = 4 * 2 * tokens * (4 * 128 * 128 + 3 * 128 * 512)
    attention = 4 * 4 * tokens * tokens * 128
    head = 2 * targets * 128 * 1024
    align = count(module)
    assert (align.frozen_forward, align.trainable_forward) == (eye + linear + attention + head, 2 * connector)
    # gradients of inputs only, but for attention, which has two sides, and the connector's weights
    assert align.backward == linear + head + 2 * attention + 3 * connector
    module.set_stage(1)
    instruct = count(module)
    assert (instruct.frozen_forward, instruct.forward) == (eye, align.forward)
    assert instruct.backward == 2 * (linear + head + attention) + 3 * connector


def test_an_image_tokenizer_to_the_last_operation() -> None:
    def conv(side: int, inside: int, out: int, kernel: int) -> int:
        return 2 * side * side * inside * out * kernel * kernel

    pairs = 4 * conv(4, 128, 128, 3)  # two residual blocks of two convolutions
    first = conv(16, 48, 32, 3)  # the image's 4 x 4 squares are channels
    encoder = first + conv(8, 32, 64, 4) + conv(4, 64, 128, 4) + pairs + conv(4, 128, 32, 1)
    # a transposed convolution multiplies every place of its input with its kernel
    decoder = conv(4, 32, 128, 3) + pairs + conv(4, 128, 64, 4) + conv(8, 64, 32, 4) + conv(16, 32, 48, 3)
    nearest = 2 * 16 * 32 * 1024  # sixteen vectors and all codes
    (flops,) = count_recipe(resolve("vq-tokenizer", scale="tiny"))
    assert flops.forward == flops.trainable_forward == encoder + nearest + decoder
    assert flops.backward == 2 * (encoder + decoder) - first  # the image needs no gradient, nor does what is nearest


def test_published_sizes_are_counted_in_seconds_without_memory() -> None:
    flops = count_recipe(resolve("llava-1.5"))[0]
    # Vicuna-7B reads 576 image tokens and some text: about 2 x 6.6 G x tokens, plus the eye's 0.3 G x 2 x 577
    assert 6e12 < flops.frozen_forward < 12e12


def test_streams_of_masked_data_count_as_in_a_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the batch goes through each stream: two samples would be read by three streams, one each."""
    with torch.device("meta"):
        module = build_module(resolve("beit3", scale="tiny"), seed=0)
    module.set_stage(next(i for i, stage in enumerate(module.recipe.stages) if stage.name == "pretrain"))
    few = count(module)
    monkeypatch.setattr(flops, "BATCH", 48)
    many = count(module)
    assert samples(module) == 48
    assert few.per_sample == pytest.approx(many.per_sample, rel=1e-3)
