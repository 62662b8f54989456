"""bf16 runs on a CPU compute attention in fp32: the same function, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.nn.cpu_attention import full_precision_attention


def inputs() -> list[Tensor]:
    stream = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 7, 8, generator=stream).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("masked", [False, True])
def test_autocast_attention_is_fp32_attention_rounded_once(masked: bool) -> None:
    mask = torch.ones(7, 7, dtype=torch.bool).tril() if masked else None
    q, k, v = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16), full_precision_attention():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert out.dtype == torch.bfloat16
    (given,) = torch.autograd.grad(out.float().square().sum(), q)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, exact.bfloat16(), atol=0, rtol=0)
    (wanted,) = torch.autograd.grad(exact.bfloat16().float().square().sum(), q)
    torch.testing.assert_close(given, wanted)


def test_modules_of_torch_go_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.MultiheadAttention(24, 3, batch_first=True)
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    seen: list[torch.dtype] = []
    attend = F.scaled_dot_product_attention

    def spy(query: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.append(query.dtype)
        return attend(query, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("zoo.nn.cpu_attention._attend", spy)
        with torch.autocast("cpu", dtype=torch.bfloat16), full_precision_attention():
            layer(x, x, x, need_weights=False)
    assert seen == [torch.float32]
    assert F.scaled_dot_product_attention is attend


def test_steps_of_a_compiled_model_share_one_graph() -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(len(example))
        return graph

    attend = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v) * 2, backend=backend)
    q, k, v = (x.detach() for x in inputs())
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16), full_precision_attention():
            out = attend(q, k, v)
    assert len(graphs) == 1
    torch.testing.assert_close(out, 2 * F.scaled_dot_product_attention(q, k, v).bfloat16(), atol=0, rtol=0)


def test_without_autocast_nothing_changes() -> None:
    q, k, v = (x.bfloat16() for x in inputs())
    attend = F.scaled_dot_product_attention
    with full_precision_attention():
        assert F.scaled_dot_product_attention is attend
        out = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=0, rtol=0)
    assert out.dtype == torch.bfloat16
