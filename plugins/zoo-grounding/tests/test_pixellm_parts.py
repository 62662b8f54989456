"""PixelLM's parts alone: the pixel decoder, the fusion of tokens, the refinement loss, MUSE's score."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from zoo_grounding.clip_levels import CLIPLevelsConfig
from zoo_grounding.losses import bce_of
from zoo_grounding.muse_metric import assigned, matched
from zoo_grounding.pixel_decoder import PixelDecoder, PixelDecoderConfig
from zoo_grounding.refinement_loss import MaskRefinementConfig, claimed_twice
from zoo_grounding.shrunk_mlp import ShrunkMLPConfig
from zoo_grounding.token_fusion import TokenFusion
from zoo_grounding.two_way import TwoWayTransformer

from zoo.errors import ConfigError
from zoo.part import Features

GRID = (4, 4)


def shaken(module: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.3 if parameter.ndim < 2 else 0.2) * noise)
    return module.eval()


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def decoder() -> PixelDecoder:
    config = PixelDecoderConfig(width=32, heads=4, ffn=48)
    return shaken(config.build(text_width=24, image_width=20))  # type: ignore[no-any-return]


def levels(images: int = 2, mask: Tensor | None = None) -> list[Features]:
    return [Features(randn(images, 16, 20, seed=s), mask, None, GRID) for s in (3, 4)]


# -- the decoder -------------------------------------------------------------------------------------------------------


def test_published_decoder_has_no_sam_and_under_eight_million_parameters() -> None:
    with torch.device("meta"):
        whole = PixelDecoderConfig().build(text_width=4096, image_width=1024)
    projections = sum(p.numel() for name, p in whole.named_parameters() if name.startswith(("image_proj", "neck")))
    own = sum(p.numel() for p in whole.parameters()) - projections
    left_out = 3 * (2 * (256 * 256 + 256) + 256 * 32 + 32) + 2 * (256 * 256 + 256) + 256 * 4 + 4
    assert abs(own + left_out - 7.57e6) < 5e3  # the released module, with what nothing reads
    assert own < 8_000_000
    assert not any("sam" in type(m).__module__ for m in whole.modules())
    assert whole.prompts == 6


@torch.no_grad()
def test_scales_read_their_own_tokens(decoder: PixelDecoder) -> None:
    seen, row = decoder.encode(None, levels()), torch.tensor([0, 1, 1])
    prompts = randn(3, 6, 32)
    masks, whole = decoder.scale_masks(seen, prompts, row), decoder.decode(seen, prompts, row)
    assert [tuple(m.shape) for m in masks] == [(3, 8, 8), (3, 16, 16)]
    fine, coarse = prompts.clone(), prompts.clone()
    fine[:, 3:], coarse[:, :3] = 0, 0
    without_fine, without_coarse = (decoder.scale_masks(seen, p, row) for p in (fine, coarse))
    assert torch.equal(without_fine[0], masks[0])
    assert float((decoder.decode(seen, fine, row) - whole).abs().max()) > 1e-3
    assert float((without_coarse[0] - masks[0]).abs().max()) > 1e-3
    assert float((without_coarse[1] - masks[1]).abs().max()) > 1e-5  # through the mask of the coarse scale


def test_fine_features_are_brighter_where_the_coarse_mask_lies(decoder: PixelDecoder) -> None:
    seen, row = decoder.encode(None, levels()), torch.tensor([1, 0])
    prompts = randn(2, 6, 32).requires_grad_()
    read: list[Tensor] = []
    decoder.transformer[1].register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    coarse, fine = decoder.scale_masks(seen, prompts, row)
    bright = decoder.upsample(seen[1])[row] * (coarse.sigmoid()[:, None] + 1) + decoder.no_mask[..., None, None]
    torch.testing.assert_close(read[0], bright)
    (gradient,) = torch.autograd.grad(fine.square().sum(), prompts)
    assert float(gradient[:, :3].abs().max()) > 0  # into the coarse mask, which is not cut off
    whole = decoder.decode(seen, prompts, row)
    enlarged = F.interpolate(coarse[:, None], (16, 16), mode="bilinear")[:, 0]
    torch.testing.assert_close(whole, 0.5 * enlarged + 0.5 * fine)


@torch.no_grad()
def test_padded_patches_reach_no_mask_unless_the_release_is_asked_for(decoder: PixelDecoder) -> None:
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[:, 12:] = False
    one, other = levels(mask=mask), levels(mask=mask)
    for level in other:
        level.tokens[:, 12:] += 1
    row, prompts = torch.tensor([0, 1]), randn(2, 6, 32)
    torch.testing.assert_close(*(decoder.decode(decoder.encode(None, x), prompts, row) for x in (one, other)))
    released = shaken(
        PixelDecoderConfig(width=32, heads=4, ffn=48, reads_hidden=True).build(text_width=24, image_width=20)
    )
    first, second = (released.decode(released.encode(None, x), prompts, row) for x in (one, other))
    assert float((first - second).abs().max()) > 1e-3


def test_two_way_transformer_is_that_of_transformers() -> None:
    from zoo.torchvision_ops import ensure

    ensure()
    from transformers import SamMaskDecoderConfig
    from transformers.models.sam.modeling_sam import SamTwoWayTransformer

    config = SamMaskDecoderConfig(hidden_size=32, num_attention_heads=4, mlp_dim=48, layer_norm_eps=1e-5)
    config._attn_implementation = "eager"
    theirs = shaken(SamTwoWayTransformer(config))
    ours = TwoWayTransformer(32, 2, 4, 48).eval()
    names = {"layer_norm_final_attn": "norm_final_attn", "layer_norm": "norm"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = tensor
    ours.load_state_dict(state)
    image, grid, tokens = randn(3, 32, 4, 5), randn(32, 4, 5, seed=2), randn(3, 6, 32, seed=3)
    with torch.no_grad():
        got, seen = ours(image, grid, tokens)
        wanted = theirs(
            point_embeddings=tokens[:, None],
            image_embeddings=image,
            image_positional_embeddings=grid.expand(3, -1, -1, -1),
            attention_similarity=None,
        )
    torch.testing.assert_close(got, wanted[0][:, 0], atol=1e-5, rtol=1e-5)
    cells = wanted[1].reshape(3, 20, 32)
    torch.testing.assert_close(seen.flatten(2).transpose(1, 2), cells, atol=1e-5, rtol=1e-5)


def test_three_scales_and_one() -> None:
    for layers, side in (([-2], 8), ([-2, -3, -4], 32)):
        decoder = shaken(
            PixelDecoderConfig(layers=layers, tokens=2, width=32, heads=4, ffn=48).build(text_width=24, image_width=20)
        )
        seen = decoder.encode(None, [Features(randn(1, 16, 20, seed=s), None, None, GRID) for s in range(len(layers))])
        out = decoder.decode(seen, randn(2, 2 * len(layers), 32), torch.zeros(2, dtype=torch.long))
        assert out.shape == (2, side, side)
    with pytest.raises(ConfigError, match="reads 3 layers of the encoder, not 1"):
        decoder.encode(None, levels()[:1])


# -- fusion ------------------------------------------------------------------------------------------------------------


def test_fusion_has_the_released_constants() -> None:
    released, learned, mean = (TokenFusion(2, 3, how) for how in ("released", "learned", "mean"))
    assert released.token_weights.tolist() == pytest.approx([1 / 6] * 3)
    assert released.scale_weights.tolist() == pytest.approx([1 / 2] * 2)
    assert not released.state_dict()
    tokens = randn(5, 6, 8)
    torch.testing.assert_close(released(tokens), tokens.view(5, 2, 3, 8).mean(2) / 2)
    torch.testing.assert_close(learned(tokens), released(tokens))
    torch.testing.assert_close(mean(tokens), 2 * released(tokens))
    assert sorted(dict(learned.named_parameters())) == ["scale_weights", "token_weights"]
    learned(tokens).sum().backward()
    assert learned.token_weights.grad is not None
    assert float(learned.token_weights.grad.abs().max()) > 0


# -- the encoder and the connector -------------------------------------------------------------------------------------


@torch.no_grad()
def test_encoder_gives_layers_of_one_pass_and_hides_patches() -> None:
    config = CLIPLevelsConfig(
        image_size=32, patch_size=8, width=32, depth=4, heads=2, ffn=48, layer=-2, cls=False, pool=False, pre_norm=True
    )
    encoder = shaken(config.build())
    image = randn(2, 3, 32, 32)
    deep, shallow = encoder.levels(image, [-2, -4])
    torch.testing.assert_close(deep.tokens, encoder(image).tokens)
    assert deep.grid == GRID
    assert float((deep.tokens - shallow.tokens).abs().max()) > 1e-2
    mask = torch.arange(16).view(1, 16).expand(2, -1) < 8
    changed = image.clone()
    changed[:, :, 16:] += 1
    one, other = (encoder.levels(x, [-2, -4], mask) for x in (image, changed))
    for a, b in zip(one, other, strict=True):
        assert a.mask is mask
        torch.testing.assert_close(a.tokens[:, :8], b.tokens[:, :8])
        assert float((a.tokens[:, 8:] - b.tokens[:, 8:]).abs().max()) > 1e-2
    torch.testing.assert_close(encoder(image, mask).tokens, one[0].tokens)
    assert float((one[0].tokens[:, :8] - deep.tokens[:, :8]).abs().max()) > 1e-3
    with pytest.raises(ConfigError, match="block -1 of the image encoder"):
        encoder.levels(image, [-1])


@torch.no_grad()
def test_connector_shrinks_the_grid() -> None:
    tokens, mask = randn(2, 16, 20), torch.ones(2, 16, dtype=torch.bool)
    plain = shaken(ShrunkMLPConfig().build(in_width=20, in_tokens=16, out_width=24))
    out = plain(Features(tokens, None, None, GRID))
    means = tokens.view(2, 2, 2, 2, 2, 20).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(out.tokens, plain.proj(means))
    assert out.tokens.shape == (2, 4, 24)
    assert plain.proj[0].out_features == 48
    mask[:, 12:] = False  # the last row of patches: cells 2 and 3 are half real
    half = plain(Features(tokens, mask, None, GRID))
    assert half.mask is not None
    assert half.mask.all()
    real = tokens.view(2, 4, 4, 20)[:, 2].view(2, 2, 2, 20).mean(2)
    torch.testing.assert_close(half.tokens[:, 2:], plain.proj(real))
    released = ShrunkMLPConfig(blends_hidden=True).build(in_width=20, in_tokens=16, out_width=24)
    released.load_state_dict(plain.state_dict())
    torch.testing.assert_close(released(Features(tokens, mask, None, GRID)).tokens, out.tokens)
    mask[:, 8:] = False
    hidden = plain(Features(tokens, mask, None, GRID))
    assert hidden.mask is not None
    assert hidden.mask.tolist() == [[True, True, False, False]] * 2
    with pytest.raises(ConfigError, match="cannot shrink 17 tokens"):
        ShrunkMLPConfig().build(in_width=20, in_tokens=17, out_width=24)


# -- refinement --------------------------------------------------------------------------------------------------------


def outputs(logits: Tensor, question: list[int]) -> dict[str, Tensor]:
    return {
        "mask_logits": logits,
        "mask_targets": (randn(*logits.shape, seed=8) > 0).float(),
        "mask_shown": torch.ones(logits.shape, dtype=torch.bool),
        "mask_question": torch.tensor(question),
    }


def test_overlaps_are_of_one_answer() -> None:
    logits = torch.full((3, 2, 2), -1.0)
    logits[0, 0], logits[1, :, 0], logits[2] = 1.0, 1.0, 1.0
    twice = claimed_twice(logits, torch.tensor([0, 0, 1]))
    assert twice[0].tolist() == [[True, False], [False, False]]
    assert torch.equal(twice[0], twice[1])
    assert not twice[2].any()  # alone in its answer
    assert claimed_twice(logits, torch.tensor([0, 0, 0]))[2].tolist() == [[True, True], [True, False]]


def test_refinement_is_cross_entropy_without_overlap_and_grows_with_alpha() -> None:
    logits = randn(4, 6, 6)
    apart = outputs(logits, [0, 1, 2, 3])
    plain = bce_of(apart["mask_logits"], apart["mask_targets"], apart["mask_shown"])
    for alpha in (2.0, 5.0):
        torch.testing.assert_close(MaskRefinementConfig(alpha=alpha).build().each(apart), plain)
    together = outputs(logits, [0, 0, 1, 1])
    one, two, five = (MaskRefinementConfig(alpha=a).build().each(together) for a in (1.0, 2.0, 5.0))
    torch.testing.assert_close(one, plain)
    assert bool((two > plain).all())
    torch.testing.assert_close(five - one, 4 * (two - one))
    released = MaskRefinementConfig(alpha=1.0, form="released").build().each(together)
    torch.testing.assert_close(released, two - one)
    together["mask_shown"][:, 3:] = False
    above = outputs(logits[:, :3], [0, 0, 1, 1])
    above["mask_targets"] = together["mask_targets"][:, :3]
    torch.testing.assert_close(
        MaskRefinementConfig().build().each(together), MaskRefinementConfig().build().each(above)
    )


# -- MUSE's score ------------------------------------------------------------------------------------------------------


def boxes(*corners: tuple[int, int, int, int]) -> Tensor:
    masks = torch.zeros(len(corners), 8, 8, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, corners, strict=True):
        mask[top:bottom, left:right] = True
    return masks


def test_missing_and_extra_masks_are_punished() -> None:
    a, b = (0, 0, 4, 4), (4, 4, 8, 8)
    right = matched(boxes(b, a), boxes(a, b))
    assert (right.score, right.intersection, right.union, right.pairs) == (1.0, 32, 32, ((1, 0), (0, 1)))
    missing = matched(boxes(a), boxes(a, b))
    assert (missing.score, missing.intersection, missing.union) == (0.5, 16, 32)
    extra = matched(boxes(a, b), boxes(a))
    assert (extra.score, extra.intersection, extra.union) == (0.5, 16, 32)
    assert matched(boxes(), boxes()).score == 1.0
    assert matched(boxes(), boxes(a)).score == 0.0
    half = matched(boxes((0, 0, 4, 2)), boxes(a))
    assert (half.score, half.union) == (0.5, 16)
    with pytest.raises(ValueError, match="expected bool"):
        matched(boxes(a).float(), boxes(a))


def test_assignment_has_the_least_cost() -> None:
    for seed, (rows, columns) in enumerate(itertools.product((1, 2, 4, 5), repeat=2)):
        cost = randn(rows, columns, seed=seed).tolist()
        pairs = assigned(cost)
        assert len({r for r, _ in pairs}) == len({c for _, c in pairs}) == len(pairs) == min(rows, columns)
        small, large = sorted((rows, columns))
        best = min(
            sum(cost[i][j] if rows <= columns else cost[j][i] for i, j in enumerate(order))
            for order in itertools.permutations(range(large), small)
        )
        assert sum(cost[r][c] for r, c in pairs) == pytest.approx(best)
