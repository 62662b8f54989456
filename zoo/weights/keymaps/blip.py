"""BLIP (models/blip_pretrain.py, blip.py, blip_itm.py, blip_nlvr.py of the release): ViT, and a BERT as encoder and as
decoder, which share everything but their self-attention."""

from __future__ import annotations

from collections.abc import Mapping

from zoo.weights.keymaps import KeyMap, Rule, bert, drop, rename, share, split, tie, vit

MOMENTUM = ("visual_encoder_m.{**}", "text_encoder_m.{**}", "vision_proj_m.{p}", "text_proj_m.{p}")
"""Names of the momentum copies; :func:`encoder_keymap` with ``copy="_m"`` knows them."""
STATE = KeyMap(drop("image_queue"), drop("text_queue"), drop("queue_ptr"))
"""Training state that no model needs."""

_SHARED = ("crossattention", "intermediate", "output")  # of a layer: all but attention
_OURS = ("cross", "cross_norm", "ffn", "ffn_norm")


def _tied() -> list[Rule]:
    source, of = "text_decoder.bert.encoder.layer.{i}.", "text_encoder.encoder.layer.{i}."
    return [
        tie("text_decoder.cls.predictions.decoder.weight", "text_encoder.embeddings.word_embeddings.weight"),
        drop("text_decoder.bert.embeddings.position_ids"),
        tie("text_decoder.bert.embeddings.{**}", "text_encoder.embeddings.{**}"),
        *(tie(f"{source}{name}.{{**}}", f"{of}{name}.{{**}}") for name in _SHARED),
        *(share(f"decoder.layers.{{i}}.{name}.{{**}}", f"encoder.layers.{{i}}.{name}.{{**}}") for name in _OURS),
    ]


def encoder_keymap(copy: str = "") -> KeyMap:
    """Return the map of the contrastive and matching model (blip_itm.py, blip_retrieval.py) to parts ``stem``, ``vit``,
    ``embed``, ``encoder``, ``vision_proj``, ``text_proj``, ``itm_head``.

    Args:
        copy: ``_m`` for the momentum copies, which have no ``itm_head``.
    """
    projections = KeyMap(*(rename(f"{name}{copy}.{{p}}", f"{name}.{{p}}") for name in ("vision_proj", "text_proj")))
    return (
        vit.keymap("vit.", "stem.").under(f"visual_encoder{copy}.")
        + bert.keymap("encoder.", "embed.").under(f"text_encoder{copy}.")
        + projections
        + (KeyMap() if copy else KeyMap(rename("itm_head.{p}", "itm_head.{p}")))
    )


def decoder_keymap() -> KeyMap:
    """Return the map of the captioning model (blip.py) to ``stem``, ``vit``, ``embed``, ``decoder``, ``lm``."""
    return vit.keymap("vit.", "stem.").under("visual_encoder.") + bert.lm_keymap("decoder.", "embed.", "lm.").under(
        "text_decoder."
    )


def keymap() -> KeyMap:
    """Return the map of the pre-training model: ``encoder`` and ``decoder`` with one set of cross-attention and FFN
    (see :func:`zoo.nn.share_`), one ``embed``, ``lm`` for the decoder's head, ``temp``."""
    return (
        KeyMap(*_tied())
        + encoder_keymap()
        + bert.ATTENTION.under("text_decoder.bert.encoder.", "decoder.")
        + bert.MLM_HEAD.under("text_decoder.cls.predictions.", "lm.")
        + KeyMap(rename("temp", "temp"))
        + STATE
    )


def nlvr_keymap() -> KeyMap:
    """Return the map of the two-image classifier (blip_nlvr.py, nlvr_encoder.py) to ``stem``, ``vit``, ``embed``,
    ``encoder``, ``head``. The ``cross`` of its layers is a pair ``first``, ``second``, each with its output matrix, in
    the upper layers with a matrix ``merge`` behind both."""
    source, cross = "layer.{i}.crossattention.", "layers.{i}.cross."
    words = (("query", "q"), ("key", "k"), ("value", "v"))
    twins = [
        rule
        for number, name in enumerate(("first", "second"))
        for rule in (
            *(rename(f"{source}self{number}.{long}.{{p}}", f"{cross}{name}.{short}.{{p}}") for long, short in words),
            rename(f"{source}output.dense{number}.{{p}}", f"{cross}{name}.out.{{p}}"),
        )
    ]
    merge = rename(f"{source}output.merge_layer.{{p}}", f"{cross}merge.{{p}}")
    encoder = KeyMap(*twins, merge).under("encoder.", "encoder.") + bert.keymap("encoder.", "embed.")
    return (
        vit.keymap("vit.", "stem.").under("visual_encoder.")
        + encoder.under("text_encoder.")
        + KeyMap(rename("cls_head.{i}.{p}", "head.{i}.{p}"))
    )


# -- the zoo's own models ----------------------------------------------------------------------------------------------

PARTS = {
    "stem.": "encoder.embed.",
    "vit.": "encoder.trunk.",
    "embed.": "text_encoder.embed.",
    "encoder.": "text_encoder.trunk.",
    "decoder.": "decoder.trunk.",
    "decoder_embed.": "decoder.embed_tokens.",
    "lm.": "decoder.head.",
    "vision_proj.": "image_projection.",
    "text_proj.": "text_projection.",
    "itm_head.": "matching_head.",
    "head.": "head.",
    "temp": "temperature",
}
"""Prefix of the parts above -> prefix in the wirings ``fusion``, ``med``, ``writer``, ``answerer``."""

RETRIEVAL_STATE = KeyMap(drop("ptr_queue"), drop("idx_queue"))


def placed(keymap: KeyMap, parts: Mapping[str, str]) -> KeyMap:
    """The map with other prefixes of our names; the longest that fits counts.

    Raises:
        KeyError: A name under none of them.
    """

    def moved(name: str) -> str:
        prefix = max((p for p in parts if name.startswith(p)), key=len, default=name)
        return parts[prefix] + name.removeprefix(prefix)

    return KeyMap(*(Rule(r.source, tuple(map(moved, r.target)), r.to, r.back, r.kind) for r in keymap.rules))


def med_keymap() -> KeyMap:
    """Return the map of the pre-training model to the wiring ``med`` with ``share``."""
    shared = KeyMap(share("decoder.embed_tokens.{**}", "text_encoder.embed.{**}"))
    return shared + placed(keymap(), PARTS)


def fusion_keymap() -> KeyMap:
    """Return the map of the retrieval and matching models to the wiring ``fusion``."""
    return placed(encoder_keymap() + KeyMap(rename("temp", "temp")) + STATE, PARTS) + RETRIEVAL_STATE


def writer_keymap() -> KeyMap:
    """Return the map of the captioner to the wiring ``writer``."""
    return placed(decoder_keymap(), {**PARTS, "embed.": "decoder.embed_tokens."})


def answerer_keymap() -> KeyMap:
    """Return the map of the VQA model to the wiring ``answerer``; its encoder and decoder are not tied."""
    question = bert.keymap("encoder.", "embed.").under("text_encoder.")
    answer = bert.lm_keymap("decoder.", "decoder_embed.", "lm.").under("text_decoder.")
    return placed(vit.keymap("vit.", "stem.").under("visual_encoder.") + question + answer, PARTS)


def comparer_keymap() -> KeyMap:
    """Return the map of the two-image classifier to the wiring ``comparer``."""
    return placed(nlvr_keymap(), PARTS)


def transformers(official: KeyMap) -> KeyMap:
    """The map of a transformers BLIP, given that of the official model: text names are the same, the image encoder's
    are not (``vision_model``)."""
    layer, ours = "vision_model.encoder.layers.{i}.", "encoder.trunk.layers.{i}."
    vision = KeyMap(
        rename("vision_model.embeddings.class_embedding", "encoder.embed.cls"),
        rename("vision_model.embeddings.position_embedding", "encoder.embed.positions"),
        rename("vision_model.embeddings.patch_embedding.{p}", "encoder.embed.patch.{p}"),
        rename("vision_model.post_layernorm.{p}", "encoder.trunk.final_norm.{p}"),
        rename(f"{layer}layer_norm1.{{p}}", f"{ours}attn_norm.{{p}}"),
        split(f"{layer}self_attn.qkv.{{p}}", [f"{ours}attn.{name}.{{p}}" for name in ("q", "k", "v")]),
        rename(f"{layer}self_attn.projection.{{p}}", f"{ours}attn.out.{{p}}"),
        rename(f"{layer}layer_norm2.{{p}}", f"{ours}ffn_norm.{{p}}"),
        rename(f"{layer}mlp.fc1.{{p}}", f"{ours}ffn.up.{{p}}"),
        rename(f"{layer}mlp.fc2.{{p}}", f"{ours}ffn.down.{{p}}"),
    )
    text = KeyMap(*(r for r in official.rules if not any(s.startswith("visual_encoder.") for s in r.source)))
    return vision + text
