"""SAM as a mask decoder (Kirillov et al. 2023), on transformers' parts, prompted by a language model's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.mask_decoders.base import MaskDecoder, MaskDecoderConfig, Seen
from zoo.part import Features
from zoo.torchvision_ops import ensure

SAM_MEAN = [123.675 / 255, 116.28 / 255, 103.53 / 255]
SAM_STD = [58.395 / 255, 57.12 / 255, 57.375 / 255]


@dataclass(frozen=True, kw_only=True)
class SamConfig(MaskDecoderConfig):
    """SAM; defaults: ViT-B at 1024 pixels.

    A ``scale`` halves its patches, so that a small square still has a grid worth drawing on, and shrinks windows and
    the decoder with it.

    Attributes:
        image_size: Side of the square it reads, pixels.
        patch_size: Side of a patch, pixels.
        width: Width of the image encoder.
        depth: Its blocks.
        heads: Its heads.
        ffn: Hidden width of its MLPs.
        window: Side of the windows that a block attends within, patches.
        global_blocks: Blocks that attend everywhere instead.
        embed_width: Channels of the image's embedding, and width of the prompts.
        decoder_depth: Blocks of the two-way transformer.
        decoder_heads: Its heads.
        decoder_ffn: Hidden width of its MLPs.
        scores_width: Hidden width of the head that estimates a mask's IoU.
        mean, std: Of the input normalisation, of values in [0, 1].
    """

    scale_settles: ClassVar[frozenset[str]] = frozenset(
        {"patch_size", "window", "global_blocks", "decoder_heads", "decoder_ffn", "scores_width"}
    )

    image_size: int = 1024
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    ffn: int = 3072
    window: int = 14
    global_blocks: list[int] = field(default_factory=lambda: [2, 5, 8, 11])
    embed_width: int = 256
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_ffn: int = 2048
    scores_width: int = 256
    mean: list[float] = field(default_factory=lambda: list(SAM_MEAN))
    std: list[float] = field(default_factory=lambda: list(SAM_STD))

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size = {self.image_size} must be a multiple of patch_size = {self.patch_size}")
        if self.width % self.heads or self.embed_width % (2 * self.decoder_heads) or self.embed_width % 8:
            raise ValueError(
                f"width = {self.width} must be a multiple of heads = {self.heads}, and embed_width = {self.embed_width}"
                f" of 8 and of twice decoder_heads = {self.decoder_heads}"
            )
        if any(not 0 <= block < self.depth for block in self.global_blocks):
            raise ValueError(f"global_blocks = {list(self.global_blocks)}: expected numbers from 0 to {self.depth - 1}")

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        if "depth" not in sizes:
            return super().scaled(sizes)
        depth, embed = int(sizes["depth"]), int(sizes.get("embed_width", self.embed_width))
        patch = max(1, int(sizes.get("patch_size", 2 * self.patch_size)) // 2)
        grid = int(sizes.get("image_size", self.image_size)) // patch
        settled: dict[str, Any] = {
            "patch_size": patch,
            "window": max(2, grid // 2),
            "global_blocks": [depth // 2 - 1, depth - 1] if depth > 1 else [0],
            "decoder_heads": int(sizes.get("heads", self.decoder_heads)),
            "decoder_ffn": int(sizes.get("ffn", self.decoder_ffn)),
            "scores_width": embed,
        }
        own = ("image_size", "width", "depth", "heads", "ffn", "embed_width")
        settled |= {name: sizes[name] for name in own if name in sizes}
        return replace(self, **settled)

    def build(self, *, text_width: int, image_width: int) -> Sam:
        return Sam(self)


class Sam(MaskDecoder):
    """``image_encoder``, ``positions`` (random Fourier features of the grid), ``no_mask`` (the dense prompt where there
    is none), ``decoder``; transformers' modules, of its prompt encoder only what LISA reads: points, boxes and earlier
    masks prompt nothing here."""

    prompts = 1
    layers = ()

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        ensure()
        from transformers.models.sam import configuration_sam as sizes
        from transformers.models.sam import modeling_sam as library

        self.config = config
        self.width = config.embed_width
        self.image_size = config.image_size
        self.cells = config.image_size // config.patch_size
        vision = sizes.SamVisionConfig(
            hidden_size=config.width,
            output_channels=config.embed_width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            mlp_dim=config.ffn,
            window_size=config.window,
            global_attn_indexes=list(config.global_blocks),
            num_pos_feats=config.embed_width // 2,
            initializer_range=0.02,
        )
        decoder = sizes.SamMaskDecoderConfig(
            hidden_size=config.embed_width,
            num_hidden_layers=config.decoder_depth,
            num_attention_heads=config.decoder_heads,
            mlp_dim=config.decoder_ffn,
            iou_head_hidden_dim=config.scores_width,
            layer_norm_eps=1e-5,  # nn.LayerNorm's, as the released decoder has; transformers' default is 1e-6
        )
        vision._attn_implementation = decoder._attn_implementation = "sdpa"
        self.image_encoder = library.SamVisionEncoder(vision)
        self.positions = library.SamPositionalEmbedding(vision)
        self.no_mask = nn.Embedding(1, config.embed_width)
        self.decoder = library.SamMaskDecoder(decoder)
        nn.init.normal_(self.no_mask.weight, std=0.02)

    def encode(self, pixel_values: Tensor | None, features: Sequence[Features] = ()) -> Seen:
        """The embedding [N, C, h, w] of squares [N, 3, S, S], without a graph where nothing of the encoder learns.

        Raises:
            ConfigError: No pixels, or of another size.
        """
        size = self.image_size
        if pixel_values is None or pixel_values.shape[1:] != (3, size, size):
            got = "nothing" if pixel_values is None else str(list(pixel_values.shape))
            raise ConfigError(f"SAM was given {got}, it reads squares [images, 3, {size}, {size}]")
        frozen = not any(p.requires_grad for p in self.image_encoder.parameters())
        with torch.no_grad() if frozen else nullcontext():
            embedding: Tensor = self.image_encoder(pixel_values).last_hidden_state
        return (embedding,)

    def grid_positions(self) -> Tensor:
        """Fourier features [1, C, h, w] of the centres of the grid's cells."""
        weight = self.positions.positional_embedding
        centres = (torch.arange(self.cells, device=weight.device, dtype=weight.dtype) + 0.5) / self.cells
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        coded: Tensor = self.positions(torch.stack([x, y], -1))  # [h, w, C]
        return coded.permute(2, 0, 1)[None]

    def decode(self, seen: Seen, prompts: Tensor, row: Tensor) -> Tensor:
        """Logits [M, 4h, 4w], slot 0 of the decoder's four: the mask of an unambiguous prompt.

        The estimate of its IoU has no loss in LISA; weighed by zero it keeps its head in the graph, as distributed
        training asks of everything that learns.
        """
        masks, scores = self.masks(seen, prompts, row)
        return masks[:, 0] + 0.0 * scores[:, :1, None]

    def masks(self, seen: Seen, prompts: Tensor, row: Tensor, several: bool = False) -> tuple[Tensor, Tensor]:
        """Logits [M, k, 4h, 4w] and estimated IoUs [M, k]; ``several`` gives slots 1 to 3, the masks of an ambiguous
        prompt, in place of slot 0."""
        (embedding,) = seen
        count = len(prompts)
        if not count:  # the library cannot decode no prompt: one is decoded and taken away
            prompts, row = embedding.new_zeros(1, self.prompts, self.width), row.new_zeros(1)
        image = embedding[row]  # [M, C, h, w]
        dense = self.no_mask.weight.view(1, -1, 1, 1).expand_as(image)
        masks, scores = self.decoder(
            image_embeddings=image,
            image_positional_embeddings=self.grid_positions().expand_as(image),
            sparse_prompt_embeddings=prompts[:, None].to(image.dtype),  # [M, 1, 1, C]
            dense_prompt_embeddings=dense,
            multimask_output=several,
        )
        return masks[:count, 0], scores[:count, 0]
