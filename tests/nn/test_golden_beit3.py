"""BEiT-3 against torchscale and its fine-tuning heads: all units routed, sub-norms, captioning with [MASK]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, lay_out
from zoo.nn import KVCache, PatchEmbedding, TokenEmbedding, Trunk
from zoo.weights.keymaps import beit3, load_into

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
GRADIENTS = {"atol": 5e-5, "rtol": 1e-4}
KEYMAP = beit3.keymap()
FIRST = 2  # row of the first position in both tables


class BEiT3(nn.Module):
    """The parts under the names of the key map, with the heads of one task."""

    def __init__(self, g: Any, task: str) -> None:
        super().__init__()
        c = g.config
        width = c["width"]
        self.trunk = Trunk(
            beit3.trunk_config(width=width, depth=c["layers"], heads=c["heads"], ffn=c["ffn"]),
        )
        self.stem = PatchEmbedding(width, c["image"], c["patch"], first=FIRST, mask_token=True)
        self.text = TokenEmbedding(c["vocab_size"], width, positions=c["max_source_positions"], first=FIRST)
        self.patches = (c["image"] // c["patch"]) ** 2
        if task == "retrieval":
            self.vision_head, self.language_head = (nn.Linear(width, width, bias=False) for _ in range(2))
            self.logit_scale = nn.Parameter(torch.ones(()))
        elif task == "captioning":
            self.mlm_head = nn.Linear(width, c["vocab_size"])
        elif task == "vqa":
            self.pooler = nn.ModuleDict({"norm": nn.LayerNorm(width), "dense": nn.Linear(width, width)})
            self.head: nn.Module = nn.Sequential(
                nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, c["num_answers"])
            )
        elif task == "nlvr2":
            self.head = nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(4 * width),
                    "dense1": nn.Linear(4 * width, 2 * width),
                    "norm2": nn.LayerNorm(2 * width),
                    "dense2": nn.Linear(2 * width, 2),
                }
            )
        else:
            self.fc_norm, self.head = nn.LayerNorm(width), nn.Linear(width, c["num_classes"])

    def layout(self, text: int, real: Tensor | None = None, *, caption: bool = False) -> Layout:
        """Image before text; all rows read all, except in captioning, where the image reads no text."""
        return lay_out(
            [
                Segment("image", self.patches + 1, "image", "full"),
                Segment("text", text, "text", "causal" if caption else "full"),
            ],
            real=None if real is None else F.pad(real, (self.patches + 1, 0), value=True),
            relation={} if caption else {("image", "text"): "all"},
        )

    def image_alone(self, image: Tensor, **options: Any) -> Any:
        return self.trunk(self.stem(image), lay_out([Segment("image", self.patches + 1, "image", "full")]), **options)

    def text_alone(self, ids: Tensor, real: Tensor, **options: Any) -> Any:
        return self.trunk(
            self.text(ids), lay_out([Segment("text", ids.shape[1], "text", "full")], real=real), **options
        )

    def joint(
        self,
        image: Tensor,
        ids: Tensor,
        real: Tensor,
        *,
        hidden: Tensor | None = None,
        caption: bool = False,
        **options: Any,
    ) -> Any:
        x = torch.cat([self.stem(image, hidden), self.text(ids)], 1)
        return self.trunk(x, self.layout(ids.shape[1], real, caption=caption), **options)


def of_task(g: Any, task: str) -> dict[str, Tensor]:
    owned = g.info["weight_owners"][task]
    return {name: t for name, t in g.weights.items() if name.startswith("beit3.") or name in owned}


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("beit3")


@pytest.fixture
def build(g: Any) -> Callable[[str], BEiT3]:
    def built(task: str) -> BEiT3:
        model = BEiT3(g, task).eval()
        load_into(model, of_task(g, task), KEYMAP)
        return model

    return built


@pytest.fixture
def pair(g: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Image, text ids, and which text tokens are real."""
    return g.inputs["image"], g.inputs["text_ids"], g.inputs["text_padding"] == 0


@torch.no_grad()
def test_one_modality(g: Any, build: Callable[[str], BEiT3], pair: tuple[Tensor, Tensor, Tensor]) -> None:
    model, (image, ids, real) = build("retrieval"), pair
    assert model.trunk.config.eps == 1e-5
    hidden, taps = model.image_alone(image, taps=True)
    torch.testing.assert_close(taps[0], g.outputs["vision/after_layer_0"], **TOLERANCE)
    torch.testing.assert_close(hidden, g.outputs["vision/hidden"], **TOLERANCE)
    hidden, taps = model.text_alone(ids, real, taps=True)
    torch.testing.assert_close(taps[0][real], g.outputs["text/after_layer_0"][real], **TOLERANCE)
    torch.testing.assert_close(hidden[real], g.outputs["text/hidden"][real], **TOLERANCE)
    masked = model.stem(image, g.inputs["vision_masked_position"])
    hidden = model.trunk(masked, lay_out([Segment("image", masked.shape[1], "image", "full")]))
    torch.testing.assert_close(hidden, g.outputs["vision/hidden_masked_patches"], **TOLERANCE)


@torch.no_grad()
def test_joint(g: Any, build: Callable[[str], BEiT3], pair: tuple[Tensor, Tensor, Tensor]) -> None:
    model, (image, ids, real) = build("retrieval"), pair
    rows = model.layout(ids.shape[1], real).real
    assert int(g.outputs["joint/split_position"]) == model.patches + 1
    hidden, taps = model.joint(image, ids, real, taps=True)
    for number, tap in enumerate(taps):
        torch.testing.assert_close(tap[rows], g.outputs[f"joint/after_layer_{number}"][rows], **TOLERANCE)
    assert len(taps) == g.config["layers"]
    torch.testing.assert_close(hidden[rows], g.outputs["joint/hidden"][rows], **TOLERANCE)
    hidden = model.joint(image, ids, real, hidden=g.inputs["vision_masked_position"])
    torch.testing.assert_close(hidden[rows], g.outputs["joint/hidden_masked_patches"][rows], **TOLERANCE)


@torch.no_grad()
def test_heads_with_and_without_the_output_norm(
    g: Any, build: Callable[[str], BEiT3], pair: tuple[Tensor, Tensor, Tensor]
) -> None:
    image, ids, real = pair
    model = build("vqa")
    first = model.joint(image, ids, real, final_norm=False)[:, 0]
    pooled = torch.tanh(model.pooler["dense"](model.pooler["norm"](first)))
    torch.testing.assert_close(model.head(pooled), g.outputs["vqa/logits"], **TOLERANCE)

    model = build("classification")
    mean = model.image_alone(image, final_norm=False)[:, 1:].mean(1)
    torch.testing.assert_close(model.head(model.fc_norm(mean)), g.outputs["classification/logits"], **TOLERANCE)

    model = build("nlvr2")
    firsts = []
    for one in (image, g.inputs["image_b"]):
        hidden = model.joint(one, ids, real)
        firsts += [hidden[:, 0], hidden[:, model.patches + 1]]
    head = model.head
    middle = head["norm2"](head["dense1"](head["norm1"](torch.cat(firsts, -1))))
    torch.testing.assert_close(head["dense2"](F.gelu(middle)), g.outputs["nlvr2/logits"], **TOLERANCE)


def test_retrieval_and_its_gradients(
    g: Any, build: Callable[[str], BEiT3], pair: tuple[Tensor, Tensor, Tensor]
) -> None:
    model, (image, ids, real) = build("retrieval"), pair
    seen = F.normalize(model.vision_head(model.image_alone(image)[:, 0]), dim=-1)
    read = F.normalize(model.language_head(model.text_alone(ids, real)[:, 0]), dim=-1)
    torch.testing.assert_close(seen, g.outputs["retrieval/vision_cls"], **TOLERANCE)
    torch.testing.assert_close(read, g.outputs["retrieval/language_cls"], **TOLERANCE)
    logits = model.logit_scale.exp() * seen @ read.T
    torch.testing.assert_close(logits, g.outputs["retrieval/logits_per_image"], **TOLERANCE)
    target = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(loss, g.outputs["retrieval/loss"], **TOLERANCE)
    loss.backward()
    gradients, _ = KEYMAP.save({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    wanted = {name: t for name, t in g.outputs.items() if name.startswith("grad_retrieval/")}
    assert len(wanted) == 7
    for name, expected in wanted.items():
        torch.testing.assert_close(gradients[name.removeprefix("grad_retrieval/")], expected, **GRADIENTS)
    for branch in "AB":
        unread = gradients[f"beit3.encoder.embed_positions.{branch}.weight"][:FIRST]
        assert torch.count_nonzero(unread) == 0


@torch.no_grad()
def test_captioning(g: Any, build: Callable[[str], BEiT3], pair: tuple[Tensor, Tensor, Tensor]) -> None:
    model, (image, _, real) = build("captioning"), pair
    ids, split = g.inputs["caption_masked_ids"], model.patches + 1
    length = ids.shape[1]
    expected = torch.ones(len(ids), split + length, split + length, dtype=torch.bool)
    expected[:, :split, split:] = False
    expected[:, split:, split:] = torch.tril(torch.ones(length, length)).bool() & real[:, None]
    layout = model.layout(length, real, caption=True)
    assert torch.equal(layout.mask()[:, 0][layout.real], expected[layout.real])
    logits = model.mlm_head(model.joint(image, ids, real, caption=True)[:, split:])
    torch.testing.assert_close(logits[real], g.outputs["captioning/logits_all"][real], **TOLERANCE)
    chosen = g.inputs["language_masked_pos"].bool()
    torch.testing.assert_close(logits[chosen], g.outputs["captioning/logits_masked"], **TOLERANCE)


@torch.no_grad()
def test_cached_captions_drop_the_mask_token(
    g: Any, build: Callable[[str], BEiT3], pair: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Every step reads the last word and [MASK], and forgets [MASK] again."""
    model, image = build("captioning"), pair[0]
    c, batch, cache = g.config, len(pair[0]), KVCache()
    layout = model.layout(0, caption=True)
    model.trunk(model.stem(image), layout, cache=cache)
    ids = torch.full((batch, 1), c["bos_id"])
    while ids.shape[1] < c["max_len"] - 2:  # the released decoder throws the last word away and adds [MASK] and sep
        new = torch.cat([ids[:, -1:], torch.full((batch, 1), c["mask_id"])], 1)
        place = torch.arange(ids.shape[1] - 1, ids.shape[1] + 1).expand(batch, -1)
        layout = layout.append("text", 2, modality=0)
        hidden = model.trunk(model.text(new, position=place), layout, cache=cache)
        kept = layout.length - 1
        layout = layout.truncate(kept)
        cache.truncate(kept)
        ids = torch.cat([ids, model.mlm_head(hidden[:, -1]).argmax(-1, keepdim=True)], 1)
    assert layout.length == cache.length == model.patches + 1 + ids.shape[1] - 1
    ids = torch.cat([ids, torch.tensor([[c["mask_id"], c["sep_id"]]]).expand(batch, -1)], 1)
    assert torch.equal(ids, g.outputs["captioning/beam1_ids"])


@pytest.mark.parametrize("task", ["retrieval", "captioning", "vqa", "nlvr2", "classification"])
def test_saving_gives_the_official_names_back(g: Any, build: Callable[[str], BEiT3], task: str) -> None:
    saved, unknown = KEYMAP.save(build(task).state_dict())
    official = of_task(g, task)
    assert unknown == []
    assert set(saved) == set(official)
    assert all(torch.equal(saved[name], official[name]) for name in saved)


@torch.no_grad()
def test_other_sizes_keep_the_unread_rows_and_cls(g: Any, build: Callable[[str], BEiT3]) -> None:
    stem, side = build("retrieval").stem, g.config["image"] // g.config["patch"]
    table = g.weights["beit3.encoder.embed_positions.A.weight"]
    grid = table[FIRST + 1 :].view(1, side, side, -1).permute(0, 3, 1, 2)
    larger = F.interpolate(grid, scale_factor=2, mode="bicubic", align_corners=False)[0].flatten(1).T
    blank = torch.zeros(1, 3, 2 * g.config["image"], 2 * g.config["image"])
    assert stem.patch.bias is not None
    assert stem.cls is not None
    expected = torch.cat([stem.cls[0] + table[FIRST : FIRST + 1], stem.patch.bias + larger])
    torch.testing.assert_close(stem(blank)[0], expected, **TOLERANCE)


def test_hiding_patches_needs_a_mask_token() -> None:
    with pytest.raises(ConfigError, match="no mask token"):
        PatchEmbedding(8, 8, 4)(torch.zeros(1, 3, 8, 8), torch.ones(1, 4, dtype=torch.bool))
