"""InstructBLIP and MiniGPT-4: transformers' and the released codes' names to a bridge's. Both are BLIP-2's and a few
more."""

from __future__ import annotations

from zoo.weights.keymaps import KeyMap, drop, rename
from zoo.weights.keymaps import blip2 as blip2_maps
from zoo.weights.keymaps import qformer as qformer_maps

HF = (
    blip2_maps.HF_VISION
    + KeyMap(
        drop("{**}rotary_emb.inv_freq"),
        rename("query_tokens", "connector.query_tokens"),
        rename("qformer.embeddings.layernorm.{p}", "connector.norm.{p}"),
    )
    + qformer_maps.keymap(text=True).under("qformer.", "connector.")
    + KeyMap(
        rename("language_projection.{p}", "connector.proj.{p}"),
        rename("language_model.{**}", "decoder.lm.{**}"),
    )
)
"""``InstructBlipForConditionalGeneration``."""


def lavis(depth: int, blocks: int, language: str, *, text: bool) -> KeyMap:
    """The map of LAVIS' ``Blip2VicunaInstruct`` (``language="llm"``) and ``Blip2T5Instruct`` (``"t5"``), and of
    MiniGPT-4 (``"llama"``).

    Args:
        depth: Blocks of the image tower that are kept; the last of the ``blocks`` in a file of EVA-CLIP is not.
        text: The Q-Former has its text branch.
    """
    branch = qformer_maps.keymap(text=True, lavis=True).under("Qformer.bert.", "connector.") if text else KeyMap()
    # the first rule that knows a name takes it
    return KeyMap(drop("{**}rotary_emb.inv_freq")) + branch + blip2_maps.lavis(depth, blocks, language)
