"""CoCa's text tower and decoder against open_clip's classes, with drawn weights: both padding masks of CLS, logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import torchvision_ops
from zoo.layout import Layout, Segment, lay_out
from zoo.nn import KVCache, TokenEmbedding, Trunk
from zoo.weights.keymaps import coca, load_into

torchvision_ops.ensure()
coca_model = pytest.importorskip("open_clip.coca_model")

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
PAD, LENGTH, VOCAB, EMBED = 0, 9, 50, 24
TEXT = {"width": 24, "heads": 4, "layers": 3}
DECODER = {"width": 24, "heads": 3, "layers": 2}


class CoCa(nn.Module):
    """The parts behind the image tower, which is open_clip's own."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"tower": tower})
        width = TEXT["width"]
        self.text_embed = TokenEmbedding(VOCAB, width, positions=LENGTH + 1)
        self.text_cls = nn.Parameter(torch.zeros(width))
        self.text = Trunk(coca.text_config(width=width, depth=TEXT["layers"], heads=TEXT["heads"]))
        self.text_projection = nn.Linear(width, EMBED, bias=False)
        self.decoder = Trunk(coca.decoder_config(width=width, depth=DECODER["layers"], heads=DECODER["heads"]))
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def read(self, ids: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Return the text vector ``[B, E]`` and the states ``[B, L, D]`` the decoder goes on from."""
        x = torch.cat([self.text_embed.tokens(ids), self.text_cls.expand(len(ids), 1, -1)], 1)
        x = x + self.text_embed.positions.weight[: x.shape[1]]
        hidden = self.text(x, layout, final_norm=False)  # tokens go on without the norm
        return F.normalize(self.text_projection(self.text.final_norm(hidden[:, -1])), dim=-1), hidden[:, :-1]

    def decode(self, states: Tensor, image: Tensor) -> Tensor:
        return self.head(self.decoder(states, lay_out([Segment("text", states.shape[1])]), context=image))


def cls_last(ids: Tensor, corrected: bool) -> Layout:
    """Causal, and CLS behind the text reads no pads. The released weights were trained with the padding mask one
    position late: the first pad is read, and CLS itself is hidden on padded rows. Rows of hidden keys live on."""
    words, always = ids != PAD, torch.ones(len(ids), 1, dtype=torch.bool)
    seen = torch.cat([words, always] if corrected else [always, words], 1)
    return lay_out([Segment("text", ids.shape[1]), Segment("cls", 1)], len(ids)).hide(~seen)


@pytest.fixture
def ids() -> Tensor:
    drawn = torch.randint(1, VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(3))
    for row, length in zip(drawn, (LENGTH, 6, 3, LENGTH - 1), strict=True):
        row[length:] = PAD
    return drawn


def theirs(shake: Callable[..., nn.Module], corrected: bool) -> Any:
    built = coca_model.CoCa(
        EMBED,
        {**DECODER, "context_length": LENGTH + 1, "vocab_size": VOCAB},
        {**TEXT, "context_length": LENGTH, "vocab_size": VOCAB, "embed_cls": True, "output_tokens": True},
        {
            "image_size": 16,
            "patch_size": 8,
            "width": 32,
            "layers": 1,
            "head_width": 8,
            "attentional_pool": True,
            "attn_pooler_heads": 4,
            "attn_pooler_queries": 6,
            "output_tokens": True,
        },
        pad_id=PAD,
    )
    shake(built)
    with torch.no_grad():
        for module in built.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight += 1
        built.text.token_embedding.weight[PAD] *= 3  # what CLS must or must not see
    built.text.correct_cls_mask = corrected
    return built.eval()


def ours(their: Any) -> CoCa:
    built = CoCa(their.visual).eval()
    load_into(built, their.state_dict(), coca.keymap(DECODER["layers"]))
    return built


@torch.no_grad()
@pytest.mark.parametrize("corrected", [False, True])
def test_masks_text_and_logits(shake: Callable[..., nn.Module], ids: Tensor, corrected: bool) -> None:
    their = theirs(shake, corrected)
    model, layout = ours(their), cls_last(ids, corrected)
    assert model.text.config.eps == model.decoder.config.eps == 1e-5
    additive = their.text._embeds(ids)[1][:: TEXT["heads"]]
    assert torch.equal(layout.mask()[:, 0], additive == 0)
    latent, states = model.read(ids, layout)
    their_latent, their_states = their._encode_text(ids)
    torch.testing.assert_close(states, their_states, **TOLERANCE)
    torch.testing.assert_close(latent, their_latent, **TOLERANCE)
    image = torch.randn(len(ids), 3, 16, 16, generator=torch.Generator().manual_seed(4))
    _, tokens = their._encode_image(image)
    logits = model.decode(states, tokens)
    assert min(states.std(), logits.std()) > 0.1
    torch.testing.assert_close(logits, their.text_decoder(tokens, their_states), **TOLERANCE)


@torch.no_grad()
def test_only_the_legacy_mask_shows_pads_to_cls(shake: Callable[..., nn.Module], ids: Tensor) -> None:
    model = ours(theirs(shake, False))
    before = {corrected: model.read(ids, cls_last(ids, corrected))[0] for corrected in (False, True)}
    pad = model.text_embed.tokens.weight[PAD]
    pad.copy_(pad.flip(0))  # not a shift, which a norm would take out
    padded = (ids == PAD).any(1)
    for corrected, moved in ((False, True), (True, False)):
        after = model.read(ids, cls_last(ids, corrected))[0]
        assert ((after - before[corrected]).abs().amax(1) > 1e-3).equal(padded & moved)


@torch.no_grad()
def test_cached_decoding_equals_the_whole_row(shake: Callable[..., nn.Module], ids: Tensor) -> None:
    """CLS stands last and is read by nobody, so captions need no CLS: both stacks run a token at a time."""
    their = theirs(shake, False)
    model, full = ours(their), ids[:1]
    image = torch.randn(1, 5, TEXT["width"], generator=torch.Generator().manual_seed(5))
    expected = their.text_decoder(image, their._encode_text(full)[1])
    whole, lower, upper = lay_out([Segment("text", LENGTH)]), KVCache(), KVCache()
    for place in range(LENGTH):
        layout = whole.truncate(place + 1)
        x = model.text_embed(full[:, place : place + 1], position=torch.tensor([[place]]))
        x = model.text(x, layout, cache=lower, final_norm=False)
        logits = model.head(model.decoder(x, layout, context=image, cache=upper))
        torch.testing.assert_close(logits[:, 0], expected[:, place], **TOLERANCE)


def test_saving_gives_the_official_names_back(shake: Callable[..., nn.Module]) -> None:
    their = theirs(shake, False)
    official = their.state_dict()
    saved, unknown = coca.keymap(DECODER["layers"]).save(ours(their).state_dict())
    assert unknown == []
    assert set(saved) == set(official)
    assert all(torch.equal(saved[name], official[name]) for name in saved)
