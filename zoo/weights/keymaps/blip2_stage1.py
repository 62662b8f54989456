"""BLIP-2, stage 1: LAVIS' ``Blip2Qformer`` and transformers' ``Blip2ForImageTextRetrieval`` to a querying model."""

from __future__ import annotations

from zoo.weights.keymaps import KeyMap, bert, drop, eva, qformer, rename, tie
from zoo.weights.keymaps.blip2 import HF_VISION

HF = (
    HF_VISION
    + KeyMap(
        rename("query_tokens", "connector.query_tokens"),
        drop("embeddings.position_ids"),
        rename("embeddings.word_embeddings.{p}", "connector.text.tokens.{p}"),
        rename("embeddings.position_embeddings.{p}", "connector.text.positions.{p}"),
    )
    + qformer.keymap(text=True).under("qformer.", "connector.")
    + KeyMap(
        rename("vision_projection.{p}", "heads.image_projection.{p}"),
        rename("text_projection.{p}", "heads.text_projection.{p}"),
        rename("itm_head.{p}", "heads.matching.{p}"),
    )
)
"""``Blip2ForImageTextRetrieval``, which has neither temperature nor word head."""

HF_NEW = ("heads.temperature", "heads.words.{**}")
"""Templates of our names it lacks."""

HEADS = (
    KeyMap(tie("Qformer.cls.predictions.decoder.weight", "Qformer.bert.embeddings.word_embeddings.weight"))
    + bert.MLM_HEAD.under("Qformer.cls.predictions.", "heads.words.")
    + KeyMap(
        rename("vision_proj.{p}", "heads.image_projection.{p}"),
        rename("text_proj.{p}", "heads.text_projection.{p}"),
        rename("itm_head.{p}", "heads.matching.{p}"),
        rename("temp", "heads.temperature"),
    )
)


def lavis(depth: int, blocks: int, *, clip: bool = False) -> KeyMap:
    """The map of LAVIS' ``Blip2Qformer``.

    Args:
        depth: Blocks of the image tower that are kept; the last of the ``blocks`` in a file is not.
        clip: The tower is CLIP's, under OpenAI's names, instead of EVA-CLIP's.
    """
    inside = "transformer.resblocks" if clip else "blocks"
    tower = (
        KeyMap(rename("visual_encoder.{**}", "encoder.tower.{**}"))
        if clip
        else eva.keymap("encoder.trunk.", "encoder.embed.").under("visual_encoder.")
    )
    left = ("visual_encoder.ln_post.{p}", "visual_encoder.proj") if clip else ()
    return (
        KeyMap(*(drop(f"visual_encoder.{inside}.{i}.{{**}}") for i in range(depth, blocks)), *map(drop, left))
        + tower
        + HEADS
        + KeyMap(
            rename("ln_vision.{p}", "connector.ln_vision.{p}"),
            rename("query_tokens", "connector.query_tokens"),
        )
        + qformer.keymap(text=True, lavis=True).under("Qformer.bert.", "connector.")
    )
