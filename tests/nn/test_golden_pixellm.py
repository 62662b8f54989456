"""The multimodal language model of PixelLM against its released code: CLIP with hidden patches whose rows live on, read
at two layers; Llama with hidden cells in the middle of a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layout import Segment, lay_out
from zoo.nn import PatchEmbedding, TokenEmbedding, Trunk
from zoo.weights.keymaps import clip_trunk, llama, load_into, pixellm

TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
LOGITS = {"atol": 1e-4, "rtol": 1e-5}
LEVELS = (-2, -11)  # the released layers, counted from the end


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 2 * outputs), nn.GELU(), nn.Linear(2 * outputs, outputs))


class Reader(nn.Module):
    """CLIP, one projector to Llama and one to the pixel decoder."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        clip = {"hidden_size": c["clip_width"], "num_hidden_layers": c["clip_layers"]}
        clip |= {"num_attention_heads": c["clip_heads"], "intermediate_size": c["clip_ffn"]}
        self.stem = PatchEmbedding(c["clip_width"], c["clip_image"], c["patch"], bias=False, norm="layer")
        self.vit = Trunk(clip_trunk.trunk_config(clip))
        self.projector, self.out_projector = mlp(c["clip_width"], c["hidden"]), mlp(c["clip_width"], c["hidden"])
        self.embed = TokenEmbedding(c["vocab"], c["hidden"])
        text = {"hidden_size": c["hidden"], "num_hidden_layers": c["layers"], "num_attention_heads": c["heads"]}
        text |= {"intermediate_size": c["ffn"], "rms_norm_eps": c["rms_norm_eps"]}
        self.trunk = Trunk(llama.trunk_config(text))
        self.head = nn.Linear(c["hidden"], c["vocab"], bias=False)
        self.text_hidden = nn.Sequential(
            nn.Linear(c["hidden"], c["hidden"]), nn.ReLU(), nn.Linear(c["hidden"], c["dec_dim"])
        )

    def levels(self, pixels: Tensor, shown: Tensor) -> list[Tensor]:
        """Return the patches ``[B, N, D]`` of both levels; ``shown`` ``[B, N]``: hidden patches still have rows."""
        seen = F.pad(shown, (1, 0), value=True)  # CLS
        layout = lay_out([Segment("image", seen.shape[1], "image", "full")], len(seen)).hide(~seen)
        _, taps = self.vit(self.stem(pixels), layout, taps=True, final_norm=False)
        return [taps[level][:, 1:] for level in LEVELS]


def shown(resize: Tensor, size: int, cells: int) -> Tensor:
    """Which cells of a grid hold image: those whose first pixel does. [B, cells * cells]."""
    first = torch.arange(cells) * (size // cells)
    down, right = (first < resize[:, axis, None] for axis in (0, 1))
    return (down[:, :, None] & right[:, None]).flatten(1)


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("pixellm")


@pytest.fixture
def model(g: Any) -> Reader:
    built = Reader(g.config).eval()
    load_into(built, g.weights, pixellm.keymap(), allow_ignored=pixellm.DECODER)
    return built


def pixels(g: Any) -> Tensor:
    size, low = g.config["clip_image"], g.inputs["image_low"]
    times = size // low.shape[-1]
    image = low.repeat_interleave(times, -1).repeat_interleave(times, -2)
    for one, (height, width) in zip(image, g.inputs["clip_resize"].tolist(), strict=True):
        one[:, height:] = 0
        one[:, :, width:] = 0
    return image


def owners(g: Any) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(g.inputs["offset"]) - 1), g.inputs["offset"].diff())


def test_position_table_of_the_release(g: Any, model: Reader) -> None:
    c = g.config
    ours = pixellm.resized_positions(g.inputs["clip_position_table_336"], c["clip_image"] // c["patch"])
    torch.testing.assert_close(ours, g.outputs["resized_position_table"], **TOLERANCE)
    assert torch.equal(model.stem.positions[0], g.outputs["resized_position_table"])


def test_eps_and_activation(g: Any, model: Reader) -> None:
    assert model.vit.config.eps == model.stem.norm.eps == 1e-5
    assert model.vit.config.act == "quick_gelu"
    assert model.trunk.config.eps == g.config["rms_norm_eps"]


@torch.no_grad()
def test_two_levels_of_clip_with_hidden_patches(g: Any, model: Reader) -> None:
    grid = g.config["clip_image"] // g.config["patch"]
    there = shown(g.inputs["clip_resize"], g.config["clip_image"], grid)
    assert not there.all()
    levels = model.levels(pixels(g), there)
    out = torch.stack([model.out_projector(level) for level in levels])  # [2, images, patches, D]
    wanted = g.outputs["image_features_subset"]
    every = -(-out.shape[2] // wanted.shape[2])
    assert not there[:, ::every].all()  # rows of hidden patches are among those compared
    torch.testing.assert_close(out[:, :, ::every], wanted, **TOLERANCE)
    image = pixels(g)
    hidden = ~there.view(-1, 1, grid, grid).repeat_interleave(g.config["patch"], 2).repeat_interleave(
        g.config["patch"], 3
    )
    other = model.levels(torch.where(hidden, image + 1, image), there)
    for before, after in zip(levels, other, strict=True):
        assert torch.equal(before[there], after[there])
        assert not torch.equal(before[~there], after[~there])


@torch.no_grad()
def test_logits_with_hidden_cells_in_the_row(g: Any, model: Reader) -> None:
    c, ids, image = g.config, g.inputs["input_ids"], owners(g)
    size, count = c["clip_image"], c["llm_visual_tokens"]
    grid, cells = size // c["patch"], int(count**0.5)
    deep = model.levels(pixels(g), shown(g.inputs["clip_resize"], size, grid))[0]
    small = deep.transpose(1, 2).unflatten(2, (grid, grid))
    small = F.interpolate(small, (cells, cells), mode="bilinear").flatten(2).transpose(1, 2)  # [images, count, D]
    patches = model.projector(small)[image]
    cell_real = shown(g.inputs["clip_resize"], size, cells)[image]
    words = g.inputs["attention_mask"].bool()
    rows, reals, labels = [], [], []
    for i, row in enumerate(ids):
        at = int((row == c["image_token_index"]).nonzero()[0])
        rows.append(torch.cat([model.embed(row[None, :at])[0], patches[i], model.embed(row[None, at + 1 :])[0]]))
        reals.append(torch.cat([words[i, :at], cell_real[i], words[i, at + 1 :]]))
        none = torch.full((count,), -100)
        labels.append(torch.cat([g.inputs["labels"][i, :at], none, g.inputs["labels"][i, at + 1 :]]))
    x, real, target = torch.stack(rows), torch.stack(reals), torch.stack(labels)
    hidden = model.trunk(x, lay_out([Segment("row", x.shape[1])], real=real))  # positions count hidden cells too
    text = slice(x.shape[1] - g.outputs["logits_text"].shape[1], None)
    seen = real[:, text]
    torch.testing.assert_close(hidden[:, text][seen], g.outputs["last_hidden_text"][seen], **TOLERANCE)
    logits = model.head(hidden)
    torch.testing.assert_close(logits[:, text][seen], g.outputs["logits_text"][seen], **LOGITS)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())
    torch.testing.assert_close(loss, g.outputs["ce_loss"], **TOLERANCE)
    # one vector for each scale of each target: three states before the codebook's tokens, weighted
    codes = torch.isin(ids[:, 1:], torch.tensor(c["seg_token_idx"]))
    place = F.pad(codes, (count - 1, 1))
    states = model.text_hidden(hidden)[place]
    states = states.view(-1, c["image_feature_scale_num"], c["seg_token_num"], states.shape[-1])
    weights = g.outputs["multiseg_scalar"][: c["seg_token_num"], None]
    torch.testing.assert_close((states * weights).sum(2), g.outputs["fused_embeds_0"], **TOLERANCE)


def test_saving_gives_the_official_names_back(g: Any, model: Reader) -> None:
    saved, unknown = pixellm.keymap().save(model.state_dict())
    assert unknown == []
    left = [name for name in g.weights if name not in saved]
    assert all(
        name.startswith(("model.mask", "model.prompt", "model.image_f")) for name in left if "position_ids" not in name
    )
    assert set(saved) <= set(g.weights)
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)
