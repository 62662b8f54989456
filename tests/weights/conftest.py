"""Small CLIP models with drawn weights: every gain away from 1, every bias away from 0, another temperature."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo import torchvision_ops

torchvision_ops.ensure()

VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
EOS, VOCAB, LENGTH = 98, 99, 20


@torch.no_grad()
def _draw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter; buffers of batch norms too."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or name.endswith("attn_mask"):
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("logit_scale"):
            tensor.fill_(1.7)
        elif name.endswith("running_var"):
            tensor.copy_(1 + 0.3 * noise.abs())
        elif tensor.ndim == 1 and name.endswith("weight"):
            tensor.copy_(1 + 0.3 * noise)
        elif tensor.ndim == 1:
            tensor.copy_(0.3 * noise)
        else:
            tensor.copy_(noise * max(0.1, tensor[0].numel() ** -0.5))
    return model.eval()


def _batch(seed: int = 1, rows: int = 4, eos: int = EOS, start: int = 97, most: int = 97) -> dict[str, Tensor]:
    """Pictures and texts of 4 to 19 tokens between ``start`` and ``eos``, padded with zeros."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(rows, LENGTH, dtype=torch.long)
    for row, end in enumerate([5, 19, 11, 4][:rows]):
        ids[row, : end + 1] = torch.randint(1, most, (end + 1,), generator=generator)
        ids[row, 0], ids[row, end] = start, eos
    mask = (ids != 0).long()
    return {"pixel_values": torch.randn(rows, 3, 32, 32, generator=generator), "input_ids": ids, "attention_mask": mask}


@pytest.fixture
def draw() -> Callable[..., Any]:
    return _draw


@pytest.fixture
def batch() -> Callable[..., dict[str, Tensor]]:
    return _batch


@pytest.fixture
def clip_folder(tmp_path: Path) -> Any:
    """Make a folder of a transformers CLIPModel: (folder, model)."""
    from transformers import CLIPConfig, CLIPModel

    def make(eos: int = EOS, act: str = "quick_gelu", projection: int = 40, **shards: Any) -> tuple[Path, Any]:
        text = {**TEXT, "vocab_size": VOCAB, "max_position_embeddings": LENGTH, "eos_token_id": eos}
        config = CLIPConfig(
            text_config={**text, "bos_token_id": 97, "pad_token_id": 0, "hidden_act": act, "layer_norm_eps": 1e-4},
            vision_config={**VISION, "image_size": 32, "patch_size": 8, "hidden_act": act, "layer_norm_eps": 2e-5},
            projection_dim=projection,
        )
        model = _draw(CLIPModel(config))
        folder = tmp_path / f"clip-{eos}-{act}-{projection}"
        model.save_pretrained(folder, **shards)
        return folder, model

    return make
