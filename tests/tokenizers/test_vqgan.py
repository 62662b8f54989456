"""Tables of codes: unit length or not, learned by gradient or by averages, and the published grids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo import torchvision_ops
from zoo.plugin import catalogue
from zoo.tokenizers.quantizer import Quantizer
from zoo.tokenizers.vqgan import VQGANConfig
from zoo.weights.keymaps import image_tokenizers as maps
from zoo.weights.keymaps import load_into

SMALL: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "vocab_size": 20, "width": 32, "groups": 4, "latent": 12, "code_width": 5,
    "encoder_mult": [1, 2, 2], "decoder_mult": [1, 1, 2], "encoder_blocks": [1, 2, 1], "decoder_blocks": [2, 1, 1],
}  # fmt: skip


def gradient_quantizer(unit: bool) -> Quantizer:
    torch.manual_seed(0)
    made = Quantizer(9, 4, unit=unit, learned="gradient")
    with torch.no_grad():
        made.codebook.copy_(torch.randn(9, 4) * torch.linspace(0.3, 3, 9)[:, None])
    return made.train()


@pytest.mark.parametrize("unit", [True, False])
def test_each_loss_moves_its_own_side(unit: bool) -> None:
    made, x = gradient_quantizer(unit), torch.randn(30, 4).requires_grad_()
    assert [name for name, _ in made.named_parameters()] == ["codebook"]
    assert list(made.buffers()) == []
    out = made(x)
    torch.testing.assert_close(out.commitment, out.codebook_loss)
    of_input, of_codes = torch.autograd.grad(out.commitment, (x, made.codebook), retain_graph=True, allow_unused=True)
    assert float(of_input.abs().max()) > 0
    assert of_codes is None or not of_codes.any()
    of_input, of_codes = torch.autograd.grad(out.codebook_loss, (x, made.codebook), allow_unused=True)
    assert of_input is None or not of_input.any()
    used = torch.bincount(out.codes, minlength=9) > 0
    assert torch.equal(of_codes.abs().sum(1) > 0, used)


def test_unit_codes_are_normalised_where_they_are_compared_and_drawn() -> None:
    made = gradient_quantizer(unit=True)
    x = torch.randn(40, 4)
    out = made(x)
    torch.testing.assert_close(out.vectors.norm(dim=-1), torch.ones(40))
    torch.testing.assert_close(out.latents, F.normalize(x, dim=-1))
    assert torch.equal(made(3 * x).codes, out.codes)
    with torch.no_grad():
        made.codebook *= torch.linspace(0.1, 7, 9)[:, None]
    again = made(x)
    assert torch.equal(again.codes, out.codes)
    torch.testing.assert_close(again.commitment, out.commitment)


def test_free_codes_are_the_nearest_by_distance() -> None:
    made = gradient_quantizer(unit=False)
    x = torch.randn(60, 4)
    out = made(x)
    assert torch.equal(out.codes, torch.cdist(x, made.codebook).argmin(1))
    assert not torch.equal(out.codes, (F.normalize(x, dim=-1) @ F.normalize(made.codebook, dim=-1).T).argmax(1))
    torch.testing.assert_close(out.latents, x)


def test_free_codes_follow_the_mean_of_their_vectors() -> None:
    torch.manual_seed(0)
    made = Quantizer(5, 3, unit=False, decay=0.8).train()
    made.started.fill_(True)
    before, x = made.codebook.clone(), 2 * torch.randn(40, 3) + 1
    codes = torch.cdist(x, before).argmin(1)
    made(x)
    for number in range(5):
        own = x[codes == number]
        wanted = 0.8 * before[number] + 0.2 * own.mean(0) if len(own) else before[number]
        torch.testing.assert_close(made.codebook[number], wanted)


@torch.no_grad()
def test_encoding_and_drawing() -> None:
    torch.manual_seed(0)
    made = VQGANConfig(**SMALL).build().eval()
    images = torch.randn(2, 3, 16, 24)
    codes = made.encode(images)
    assert codes.shape == (2, 24)
    drawn, quantized = made(images)
    assert torch.equal(quantized.codes.flatten(1), codes)
    torch.testing.assert_close(made.decode(codes, (4, 6)), drawn, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "patch"), [("llamagen-vq-16", 16), ("llamagen-vq-8", 8), ("chameleon-vq", 16)])
def test_published_grids(name: str, patch: int) -> None:
    config: Any = catalogue()["image_tokenizer"].parse(name)
    with torch.device("meta"):
        made = config.build().eval()
        for size in (256, 384, 512):
            codes = made.encode(torch.empty(1, 3, size, size))
            assert codes.shape == (1, (size // patch) ** 2)
            assert made.decode(codes).shape == (1, 3, size, size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learned": "never"}, "gradient or average"),
        ({"restart": 0.1}, "learned = average"),
        ({"code_width": 0}, "1 or more"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQGANConfig(**{**SMALL, **fields})


def test_both_ways_of_learning_train_in_one_recipe() -> None:
    batch = {"pixel_values": torch.randn(2, 3, 64, 64)}
    for learned in ("gradient", "average"):
        small = {"width": 32, "groups": 4, "latent": 16, "learned": learned}
        module = zoo.build("llamagen-vq-16", scale="tiny", image_tokenizer=small, seed=1).train()
        before = module.model.image_tokenizer.quantizer.codebook.detach().clone()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        loss, report = module.losses(batch)
        loss.backward()
        optimizer.step()
        assert report["vq-reconstruction/codes_used"] >= 1
        assert not torch.equal(module.model.image_tokenizer.quantizer.codebook, before)


@pytest.mark.parametrize(
    ("name", "pixels", "quantizer", "adversarial"),
    [
        ("llamagen-vq-16", 0.0, (0.25, 1.0, 0.0), (0.5, "hinge", 0.0, 20_000)),
        ("llamagen-vq-8", 0.0, (0.25, 1.0, 0.0), (0.5, "hinge", 0.0, 20_000)),
        ("open-magvit2", 1.0, (0.25, 0.0, 0.1), (0.1, "non-saturating", 0.05, 0)),
    ],
)
def test_recipes_have_the_releases_factors(
    name: str, pixels: float, quantizer: tuple[float, ...], adversarial: tuple[Any, ...]
) -> None:
    from zoo.recipe import resolve

    objectives: dict[str, Any] = dict(resolve(name).objectives)
    draw = next(config for key, config in objectives.items() if key.endswith("q-reconstruction"))
    assert draw.absolute == pixels
    assert (draw.beta, draw.codebook, draw.entropy) == quantizer
    judge = objectives["adversarial"]
    assert (judge.weight, judge.generator, judge.lecam, judge.start) == adversarial
    assert (judge.base, judge.layers, judge.adaptive) == (64, 3, False)


@torch.no_grad()
def test_as_transformers_chameleon() -> None:
    torchvision_ops.ensure()
    from transformers import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    config = ChameleonVQVAEConfig(
        embed_dim=6, num_embeddings=23, latent_channels=10, resolution=16, base_channels=64,
        channel_multiplier=[1, 2], num_res_blocks=1, attn_resolutions=[8],
    )  # fmt: skip
    torch.manual_seed(0)
    official = ChameleonVQVAE(config).eval()
    for name, parameter in official.named_parameters():
        gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        spread = 0.3 if parameter.ndim < 2 else max(0.1, parameter[0].numel() ** -0.5)
        parameter.copy_(gain + spread * torch.randn(parameter.shape))
    made = VQGANConfig(
        image_size=16, patch_size=2, vocab_size=23, code_width=6, latent=10, unit=False, width=128, groups=32,
        encoder_mult=[1, 2], decoder_mult=[1, 2], encoder_blocks=[1, 1], decoder_blocks=[2, 2], attention=[True],
    ).build().eval()  # fmt: skip
    load_into(made, official.state_dict(), maps.chameleon_vq(), allow_new=["decoder.{**}"])
    images = torch.randn(2, 3, 16, 16)
    found = official.encode(images)
    codes = found.image_tokens if hasattr(found, "image_tokens") else found[2]
    own = made.encode(images)
    assert len(own.unique()) > 3
    assert torch.equal(own, codes.view_as(own))
    out = made.quantise(made.latents(images))
    loss = found.embedding_loss if hasattr(found, "embedding_loss") else found[1]
    torch.testing.assert_close(out.commitment + 0.25 * out.codebook_loss, loss, atol=1e-5, rtol=1e-5)
