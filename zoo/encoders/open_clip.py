"""CLIP's towers from open_clip's own classes: the vision transformer, the modified ResNet, and the text transformer.

Sizes come from the configuration alone; open_clip's list of models is not asked. The library's modules hold the
weights under their released names (``conv1``, ``transformer.resblocks.0.attn.in_proj_weight``, ...), so official
files load by renaming prefixes. Projections into the shared space belong to the wiring, except the ResNets', whose
attention pool is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.encoders.base import Encoder, ImageEncoderConfig, TextEncoderConfig
from zoo.errors import ConfigError
from zoo.part import Features

POOLINGS = ("end", "argmax")


def _library() -> Any:
    from zoo import torchvision_ops

    torchvision_ops.ensure()
    import open_clip.modified_resnet
    import open_clip.transformer

    return open_clip


def _act(quick_gelu: bool) -> Callable[[], nn.Module]:
    act: Callable[[], nn.Module] = _library().transformer.QuickGELU if quick_gelu else nn.GELU
    return act


def _norm(eps: float) -> Any:
    return partial(_library().transformer.LayerNorm, eps=eps)


def _ratio(ffn: int, width: int) -> float:
    # open_clip takes int(width * ratio); half a unit more keeps rounding from losing one
    return (ffn + 0.5) / width


def kept_blocks(layer: int, depth: int) -> int:
    """Number of blocks up to and with the one at Python index ``layer`` of ``depth``."""
    return (layer + depth if layer < 0 else layer) + 1


def check_vit_sizes(config: Any) -> None:
    """Refuse sizes that do not divide, and a layer that is not there.

    Raises:
        ValueError: In one line; the registry makes it a ConfigError with the path of the part.
    """
    if config.image_size % config.patch_size:
        raise ValueError(f"image_size = {config.image_size} must be a multiple of patch_size = {config.patch_size}")
    if config.width % config.heads:
        raise ValueError(f"width = {config.width} must be a multiple of heads = {config.heads}")
    if not -config.depth <= config.layer < config.depth:
        raise ValueError(f"layer = {config.layer} is not among the {config.depth} blocks")


@dataclass(frozen=True, kw_only=True)
class OpenCLIPViTConfig(ImageEncoderConfig):
    """CLIP's vision transformer (Radford et al. 2021, section 2.4; defaults: ViT-B/32).

    Attributes:
        patch_size: Side of a patch, pixels.
        width: Width of the tokens.
        depth: Blocks of the published tower; those after ``layer`` are left out unless ``pool`` needs them.
        heads: Attention heads.
        ffn: Hidden width of the MLP.
        quick_gelu: x * sigmoid(1.702 x), as OpenAI's weights need, rather than the exact GELU.
        eps: Of every LayerNorm.
        pool: Return ``pooled``, the class token after the last block and ``ln_post``.
    """

    patch_size: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    ffn: int = 3072
    quick_gelu: bool = True
    eps: float = 1e-5
    pool: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_vit_sizes(self)

    def build(self) -> OpenCLIPViT:
        return OpenCLIPViT(self)


class OpenCLIPViT(Encoder):
    """The vision tower; ``tower`` is an ``open_clip.transformer.VisionTransformer`` without its projection."""

    def __init__(self, config: OpenCLIPViTConfig) -> None:
        super().__init__()
        self.cls = config.cls
        self.layer = kept_blocks(config.layer, config.depth) - 1
        self.width = config.width
        self.pooled_width = config.width if config.pool else 0
        side = config.image_size // config.patch_size
        self.grid = (side, side)
        self.tokens = side * side + int(config.cls)
        self.image_size = config.image_size
        self.tower = _library().transformer.VisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.width,
            layers=config.depth if config.pool else self.layer + 1,
            heads=config.heads,
            mlp_ratio=_ratio(config.ffn, config.width),
            output_dim=1,
            act_layer=_act(config.quick_gelu),
            norm_layer=_norm(config.eps),
        )
        self.tower.proj = None
        if not config.pool:
            self.tower.ln_post = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """Encode pixel values [B, 3, H, W] of the configured size.

        Returns:
            ``tokens`` [B, (1+)h*w, width], the chosen block's output without a norm; ``pooled`` [B, width] after
            ``ln_post``.
        """
        check_image(x, self.image_size)
        tower = self.tower
        x = tower.conv1(x).flatten(2).transpose(1, 2)  # [B, h*w, D]
        x = torch.cat([tower.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], 1)  # [B, 1+h*w, D]
        x = tower.ln_pre(x + tower.positional_embedding.to(x.dtype))
        tokens = x
        for index, block in enumerate(tower.transformer.resblocks):
            x = block(x)
            if index == self.layer:
                tokens = x
        pooled = tower.ln_post(x[:, 0]) if tower.ln_post is not None else None
        return Features(tokens if self.cls else tokens[:, 1:], None, pooled, self.grid)


def check_image(x: Tensor, size: int) -> None:
    """Refuse pixel values that are not [B, 3, size, size].

    Raises:
        ConfigError: Naming both shapes.
    """
    if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] != size or x.shape[3] != size:
        raise ConfigError(
            f"pixel values have shape {tuple(x.shape)}, the encoder reads [batch, 3, {size}, {size}]: "
            "resize the images or set encoder.image_size"
        )


@dataclass(frozen=True, kw_only=True)
class OpenCLIPResNetConfig(ImageEncoderConfig):
    """CLIP's modified ResNet (Radford et al. 2021, section 2.4; defaults: RN50).

    Attributes:
        blocks: Bottlenecks of each of the four stages.
        depth: Most bottlenecks a stage, 0 = as ``blocks`` says; what a small scale sets.
        stem_width: Width after the stem; the last stage is 32 times as wide.
        embed_width: Width of ``pooled``, the attention pool's output, which lies in the shared space.
        layer: Stage whose output is the tokens, -1 the last of four.
        pool: Build the attention pool.
    """

    blocks: list[int] = field(default_factory=lambda: [3, 4, 6, 3])
    depth: int = 0
    stem_width: int = 64
    embed_width: int = 1024
    pool: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.blocks) != 4 or min(self.blocks) < 1 or self.depth < 0:
            raise ValueError(f"blocks = {list(self.blocks)} must be four numbers of 1 or more, depth 0 or more")
        if self.image_size % 32:
            raise ValueError(f"image_size = {self.image_size} must be a multiple of 32")
        if self.stem_width % 2:
            raise ValueError(f"stem_width = {self.stem_width} must be even: the pool's heads are 64 wide")
        if not -4 <= self.layer < 4:
            raise ValueError(f"layer = {self.layer} is not among the 4 stages")

    def build(self) -> OpenCLIPResNet:
        return OpenCLIPResNet(self)


class OpenCLIPResNet(Encoder):
    """The ResNet tower; ``tower`` is an ``open_clip.modified_resnet.ModifiedResNet``. It has no class token."""

    def __init__(self, config: OpenCLIPResNetConfig) -> None:
        super().__init__()
        self.layer = config.layer % 4
        self.width = config.stem_width * 4 * 2**self.layer
        self.pooled_width = config.embed_width if config.pool else 0
        self.projects = config.pool
        self.image_size = config.image_size
        side = config.image_size // (4 * 2**self.layer)
        self.grid = (side, side)
        self.tokens = side * side
        most = config.depth or max(config.blocks)
        self.tower = _library().modified_resnet.ModifiedResNet(
            layers=[min(count, most) for count in config.blocks],
            output_dim=config.embed_width,
            heads=config.stem_width * 32 // 64,
            image_size=config.image_size,
            width=config.stem_width,
        )
        if not config.pool:
            self.tower.attnpool = None
            for unused in range(self.layer + 2, 5):
                delattr(self.tower, f"layer{unused}")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """Encode pixel values [B, 3, H, W] of the configured size.

        Returns:
            ``tokens`` [B, h*w, width] of the chosen stage in row order; ``pooled`` [B, embed_width] from the
            attention pool.
        """
        check_image(x, self.image_size)
        x = self.tower.stem(x)  # [B, stem_width, H/4, W/4]
        tokens = x
        for index in range(4 if self.pooled_width else self.layer + 1):
            x = getattr(self.tower, f"layer{index + 1}")(x)
            if index == self.layer:
                tokens = x
        pooled = self.tower.attnpool(x) if self.pooled_width else None
        return Features(tokens.flatten(2).transpose(1, 2), None, pooled, self.grid)


@dataclass(frozen=True, kw_only=True)
class OpenCLIPTextConfig(TextEncoderConfig):
    """CLIP's causal text transformer (Radford et al. 2021, section 2.4; defaults: that of ViT-B/32).

    Attributes:
        width: Width of the tokens.
        depth: Blocks.
        heads: Attention heads, of width 64 in every published size.
        ffn: Hidden width of the MLP.
        quick_gelu: As for the vision tower.
        eps: Of every LayerNorm.
        pooling: Token that ``pooled`` is. ``end``: the first ``eos_id``; in a row without one the last token its
            mask calls real, or without a mask the largest id. ``argmax``: the largest id, as OpenAI's code has it
            and transformers for configurations whose ``eos_token_id`` is 2.
        eos_id: Id of the end of text; another tokenizer's texts are found by their mask.
    """

    width: int = 512
    depth: int = 12
    heads: int = 8
    ffn: int = 2048
    quick_gelu: bool = True
    eps: float = 1e-5
    pooling: str = "end"
    eos_id: int = 49407

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} must be a multiple of heads = {self.heads}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling = {self.pooling!r} must be one of {', '.join(POOLINGS)}")

    def build(self) -> OpenCLIPText:
        return OpenCLIPText(self)


class OpenCLIPText(Encoder):
    """The text tower; ``tower`` is an ``open_clip.transformer.TextTransformer`` without its projection."""

    def __init__(self, config: OpenCLIPTextConfig) -> None:
        super().__init__()
        self.width = self.pooled_width = config.width
        self.tokens = self.context_length = config.context_length
        self.pooling = config.pooling
        self.eos_id = config.eos_id
        self.tower = _library().transformer.TextTransformer(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.width,
            heads=config.heads,
            layers=config.depth,
            mlp_ratio=_ratio(config.ffn, config.width),
            output_dim=None,
            proj_type="none",
            act_layer=_act(config.quick_gelu),
            norm_layer=_norm(config.eps),
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """Encode token ids [B, T], T up to ``context_length``; pads must stand behind the text.

        Attention is causal and nothing else: pads behind the pooled token cannot reach it, so ``mask`` only finds
        that token.

        Returns:
            ``tokens`` [B, T, width] after ``ln_final``, their ``mask``, and ``pooled`` [B, width], one of these
            tokens. On the CPU T shrinks to the longest text of the mask.
        """
        if x.shape[1] > self.context_length:
            raise ConfigError(
                f"a text has {x.shape[1]} tokens, the text encoder reads {self.context_length}: truncate it"
            )
        end = self._end(x, mask)
        if mask is not None and x.device.type == "cpu":  # where looking is free; columns of pads only cost time
            longest = max(int(end.max()) + 1, int(mask.sum(-1).max()))
            x, mask = x[:, :longest], mask[:, :longest]
        length = x.shape[1]
        tower = self.tower
        hidden = tower.token_embedding(x)  # [B, T, D]
        hidden = hidden + tower.positional_embedding[:length].to(hidden.dtype)
        hidden = tower.transformer(hidden, attn_mask=tower.attn_mask[:length, :length])
        hidden = tower.ln_final(hidden)
        rows = torch.arange(x.shape[0], device=x.device)
        return Features(hidden, None if mask is None else mask.bool(), hidden[rows, end])

    def _end(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Index [B] of the pooled token."""
        largest = ids.argmax(-1)
        if self.pooling == "argmax":
            return largest
        ends = ids == self.eos_id
        otherwise = largest if mask is None else mask.long().sum(-1) - 1
        return torch.where(ends.any(-1), ends.int().argmax(-1), otherwise)
