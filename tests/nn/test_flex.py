"""FlexAttention computes what SDPA does, from the same layouts, and is chosen where it pays."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

import zoo
from zoo.data.sequences import STYLES, layout_of, segments_of
from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, lay_out
from zoo.nn import Trunk, TrunkConfig, flex

Shake = Callable[[nn.Module], nn.Module]
MODELS = (  # one of each way to lay a sequence out
    "clip", "blip2", "albef", "beit3", "cogvlm-base-224", "visualglm-6b-lora", "show-o", "show-o-clip-vit", "chameleon",
    "transfusion", "llamagen-t2i",
)  # fmt: skip


def agrees(layout: Layout) -> None:
    """The rule that FlexAttention is given says what the dense mask says, for every row of the batch."""
    length = layout.length
    ruled = create_mask(layout.mask_mod(), layout.batch, 1, length, length, device="cpu")
    assert torch.equal(ruled, layout.mask().expand(layout.batch, 1, length, length))


def packed_rows(style_name: str) -> Layout:
    """Two packed sequences of a style: documents of text, an image and text, of different lengths, and pads."""
    style = next(s for s in STYLES if s.name == style_name)
    vocabulary = style.vocabulary(20, 8)
    start, end, slot = vocabulary.id(style.start), vocabulary.id(style.end), vocabulary.slot_id
    first = [1, 5, 6, start, slot, slot, slot, slot, end, 7, 2]
    tokens = dict(style.task_tokens)
    second = [*([vocabulary.id(tokens["mmu"])] if "mmu" in tokens else []), start, slot, slot, end, 5, 2]
    third = [1, 5, 2]
    sequences, documents, segments = [], [], []
    for rows in ([first, second, third], [second, third]):
        ids = [id for row in rows for id in row]
        pads = 24 - len(ids)
        sequences.append(ids + [0] * pads)
        documents.append([n for n, row in enumerate(rows) for _ in row] + [-1] * pads)
        numbered = [segments_of(torch.tensor([row]), None, style, vocabulary)[0].tolist() for row in rows]
        segments.append([n for row in numbered for n in row] + [-1] * pads)
    segment, document = torch.tensor(segments), torch.tensor(documents)
    return layout_of(segment, style, slots=torch.tensor(sequences) == slot, document=document, padding="right")


@pytest.mark.parametrize("name", MODELS)
def test_the_rule_of_every_kind_of_layout_is_its_mask(name: str) -> None:
    layouts = zoo.build(name, scale="tiny", seed=0).model.layouts()
    assert layouts
    for layout in layouts.values():
        agrees(layout)
        agrees(layout.append(layout.names[-1], 2))
        halves = torch.arange(layout.length)[None] >= layout.length // 2
        agrees(layout.separate(halves))


@pytest.mark.parametrize("name", [s.name for s in STYLES])
def test_the_rule_of_packed_rows_is_their_mask(name: str) -> None:
    layout = packed_rows(name)
    agrees(layout)
    agrees(layout.hide(torch.arange(24).expand(2, -1) == 5))
    mask = layout.mask()[:, 0]
    assert layout.document is not None
    same = layout.document[:, :, None] == layout.document[:, None, :]
    assert not bool((mask & ~same).any())
    alone = layout.mask()[0, 0, 11:, 11:]  # the second document reads what it reads by itself
    assert bool(alone.any())


def heads(layout: Layout, kv: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 16), (kv, 16), (kv, 16))
    q, k, v = (torch.randn(layout.batch, n, layout.length, w, generator=generator) for n, w in shapes)
    return q, k, v


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_kernel_compiled_for_a_cpu_equals_sdpa() -> None:
    layout = packed_rows("transfusion")
    q, k, v = heads(layout)
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(flex_attention)(q, k, v, block_mask=layout.block_mask())
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask())
    real = layout.real[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out[real], expected[real], atol=1e-5, rtol=1e-5)


def test_one_switch_and_the_same_numbers(shake: Shake, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrunkConfig(width=64, depth=2, heads=4, ffn=64, kv_heads=2, rope=16)
    trunk: Any = shake(Trunk(config)).eval()
    layout = packed_rows("transfusion")
    x = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(1))
    masks: list[Any] = []
    attend = flex.attend

    def seen(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, grouped: bool) -> Tensor:
        masks.append(mask)
        return attend(q, k, v, mask, grouped)

    monkeypatch.setattr(flex, "attend", seen)
    with torch.no_grad():
        expected = trunk(x, layout)
        assert not masks  # on a CPU a dense mask is the default
        assert flex.use_kernel(nn.ModuleList([trunk]), "flex") == 1
        found = trunk(x, layout)
        assert len(masks) == 2
        assert masks[0] is masks[1]  # one mask for all layers
        torch.testing.assert_close(found[layout.real], expected[layout.real], atol=1e-5, rtol=1e-5)
        flex.use_kernel(trunk, "sdpa")
        assert torch.equal(trunk(x, layout), expected)
    flex.use_kernel(trunk, "flex")
    trunk(x, layout).sum().backward()  # no gradients through FlexAttention on a CPU: SDPA computes them
    assert len(masks) == 2
    with pytest.raises(ConfigError, match="unknown attention kernel 'flx'; did you mean flex"):
        flex.use_kernel(trunk, "flx")


def test_where_it_is_chosen() -> None:
    config = TrunkConfig(width=64, depth=1, heads=4, ffn=64)
    long = packed_rows("transfusion")
    rows = torch.empty(2, 24, 64)
    causal = lay_out([Segment("text", 24)])

    def chosen(kernel: str = "flex", config: TrunkConfig = config, layout: Layout = long, **more: Any) -> bool:
        fields = {"x": rows, "cached": False, "training": True} | more
        with torch.no_grad():
            return flex.chosen(kernel, config, layout, **fields)

    assert chosen()
    assert not chosen("sdpa")
    assert not chosen("auto")  # not on a CPU
    assert not chosen(layout=causal)  # no mask: SDPA's own kernels are as fast
    assert not chosen(cached=True)
    assert not chosen(x=rows[:, :1])
    for fields in ({"bias_kv": True}, {"rel_rows": 3}, {"attention_dropout": 0.1}, {"heads": 8}):
        assert not chosen(config=TrunkConfig(**{"width": 64, "depth": 1, "heads": 4, "ffn": 64} | fields))
    assert chosen(config=TrunkConfig(width=64, depth=1, heads=4, ffn=64, attention_dropout=0.1), training=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_values_and_gradients_equal_sdpa(shake: Shake, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = TrunkConfig(width=128, depth=2, heads=4, ffn=128, rope=32)
    trunk: Any = shake(Trunk(config)).cuda()
    document = torch.arange(2048)[None].expand(2, -1) // 600
    layout = lay_out([Segment("text", 1000), Segment("image", 1048, 1, "full")], 2).separate(document).to("cuda")
    assert flex.chosen("auto", config, layout, torch.empty(2, 2048, 128, device="cuda"), False, True)
    x, results = torch.randn(2, 2048, 128, device="cuda"), []
    for kernel in ("sdpa", "auto"):
        flex.use_kernel(trunk, kernel)
        trunk.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            out = trunk(x, layout)
        out.float().square().mean().backward()
        results.append([out.float(), *(p.grad.clone() for p in trunk.parameters() if p.grad is not None)])
    near = 1e-4 if dtype == torch.float32 else 3e-2
    for one, other in zip(*results, strict=True):
        assert float((one - other).abs().max()) <= near * float(one.abs().max())
