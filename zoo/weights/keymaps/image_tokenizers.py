"""Convolutional image tokenizers: Show-o's MAGVIT-v2, Open-MAGVIT2, LlamaGen's VQ and Chameleon's VQGAN."""

from __future__ import annotations

from zoo.weights.keymaps import KeyMap, Rule, drop, rename

_HALVES = (("encoder", "down", "down"), ("decoder", "up", "up"))
"""Our half -> the official word for its levels and for the step between two."""


def _blocks(source: str, target: str) -> tuple[Rule, ...]:
    return (
        rename(f"{source}.nin_shortcut.{{p}}", f"{target}.shortcut.{{p}}"),
        rename(f"{source}.{{layer}}.{{p}}", f"{target}.{{layer}}.{{p}}"),
    )


def _attention(source: str, target: str) -> tuple[Rule, ...]:
    return (
        rename(f"{source}.proj_out.{{p}}", f"{target}.out.{{p}}"),
        rename(f"{source}.{{layer}}.{{p}}", f"{target}.{{layer}}.{{p}}"),
    )


def _ends(half: str) -> tuple[Rule, ...]:
    return tuple(
        rename(f"{half}.{theirs}.{{p}}", f"{half}.{ours}.{{p}}")
        for theirs, ours in (("conv_in", "stem"), ("norm_out", "norm"), ("conv_out", "head"))
    )


def vqgan(halves: tuple[str, ...] = ("encoder", "decoder")) -> KeyMap:
    """Return the map of the encoder and the decoder as VQGAN's code names them (Show-o, Chameleon)."""
    rules: list[Rule] = []
    for half, level, step in _HALVES:
        if half not in halves:
            continue
        ours = f"{half}.levels.{{i}}"
        rules += _ends(half)
        rules += _blocks(f"{half}.{level}.{{i}}.block.{{j}}", f"{ours}.blocks.{{j}}")
        rules += _attention(f"{half}.{level}.{{i}}.attn.{{j}}", f"{ours}.attention.{{j}}")
        rules.append(rename(f"{half}.{level}.{{i}}.{step}sample.conv.{{p}}", f"{ours}.{step}.conv.{{p}}"))
        rules += _blocks(f"{half}.mid.block_1", f"{half}.middle.0")
        rules += _attention(f"{half}.mid.attn_1", f"{half}.middle.1")
        rules += _blocks(f"{half}.mid.block_2", f"{half}.middle.2")
    return KeyMap(*rules)


def _projections(before: str = "", after: str = "") -> KeyMap:
    return KeyMap(
        rename(f"{before}quant_conv.{{p}}", "to_code.{p}"), rename(f"{after}post_quant_conv.{{p}}", "from_code.{p}")
    )


def magvitv2() -> KeyMap:
    """Return the map of Show-o's tokenizer (showlab/magvitv2); its table of signs is no parameter."""
    tables = KeyMap(drop("quantize.embedding"), drop("quantize.power_vals"))
    return _projections("encoder.", "decoder.") + tables + vqgan()


def chameleon_vq() -> KeyMap:
    """Return the map of Chameleon's VQGAN; transformers has the same names, without a decoder."""
    return _projections() + KeyMap(rename("quantize.embedding.weight", "quantizer.codebook")) + vqgan()


def llamagen_vq(levels: int) -> KeyMap:
    """Return the map of LlamaGen's VQ tokenizer, whose decoder counts its levels from the coarsest.

    Args:
        levels: Number of grids.
    """
    rules: list[Rule] = []
    for half, _, step in _HALVES:
        rules += _ends(half)
        for number in range(levels):
            place = number if half == "encoder" else levels - 1 - number
            theirs, ours = f"{half}.conv_blocks.{place}", f"{half}.levels.{number}"
            rules += _blocks(f"{theirs}.res.{{j}}", f"{ours}.blocks.{{j}}")
            rules += _attention(f"{theirs}.attn.{{j}}", f"{ours}.attention.{{j}}")
            rules.append(rename(f"{theirs}.{step}sample.conv.{{p}}", f"{ours}.{step}.conv.{{p}}"))
        rules += _blocks(f"{half}.mid.0", f"{half}.middle.0")
        rules += _attention(f"{half}.mid.1", f"{half}.middle.1")
        rules += _blocks(f"{half}.mid.2", f"{half}.middle.2")
    used = drop("quantize.codebook_used")  # which codes the last batches used, for its log
    return _projections() + KeyMap(rename("quantize.embedding.weight", "quantizer.codebook"), used, *rules)


def open_magvit2() -> KeyMap:
    """Return the map of Open-MAGVIT2's image tokenizer."""
    rules: list[Rule] = []
    for half, level, _ in _HALVES:
        rules += _ends(half)
        rules += _blocks(f"{half}.{level}.{{i}}.block.{{j}}", f"{half}.levels.{{i}}.blocks.{{j}}")
        rules += _blocks(f"{half}.mid_block.{{j}}", f"{half}.middle.{{j}}")
    return KeyMap(
        *rules,
        rename("encoder.down.{i}.downsample.{p}", "encoder.levels.{i}.down.conv.{p}"),
        rename("decoder.up.{i}.upsample.conv1.{p}", "decoder.levels.{i}.up.conv.{p}"),
        rename("decoder.adaptive.{i}.{layer}.{p}", "decoder.levels.{i}.entry.{layer}.{p}"),
    )
