"""BEiT-3 (torchscale): everything twice, branch A for images and B for text, with norms inside the branches."""

from __future__ import annotations

from zoo.nn.config import TrunkConfig
from zoo.weights.keymaps import KeyMap, Rule, rename

EXPERTS = {"B": 0, "A": 1}
"""Released branch to our expert, which is the modality id: text 0, image 1."""


def _branch(old: str, new: int) -> tuple[Rule, ...]:
    start, end = "layers.{i}", "layers.{i}"
    matrices = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out", "inner_attn_ln": "sub_norm"}
    ffn = {"fc1": "up", "fc2": "down", "ffn_layernorm": "sub_norm"}
    return (
        rename(f"{start}.self_attn_layer_norm.{old}.{{p}}", f"{end}.attn_norm.{new}.{{p}}"),
        *(rename(f"{start}.self_attn.{a}.{old}.{{p}}", f"{end}.attn.{b}.{new}.{{p}}") for a, b in matrices.items()),
        rename(f"{start}.final_layer_norm.{old}.{{p}}", f"{end}.ffn_norm.{new}.{{p}}"),
        *(rename(f"{start}.ffn.{old}.{a}.{{p}}", f"{end}.ffn.{new}.{b}.{{p}}") for a, b in ffn.items()),
        rename(f"layer_norm.{old}.{{p}}", f"final_norm.{new}.{{p}}"),
    )


TRUNK = KeyMap(*(rule for old, new in EXPERTS.items() for rule in _branch(old, new)))
STEM = KeyMap(
    rename("vision_embed.cls_token", "cls"),
    rename("vision_embed.mask_token", "mask_token"),
    rename("vision_embed.proj.{p}", "patch.{p}"),
    rename("encoder.embed_positions.A.weight", "positions", lambda t: t[None], lambda t: t[0]),
)
TEXT = KeyMap(
    rename("text_embed.{p}", "tokens.{p}"),
    rename("encoder.embed_positions.B.{p}", "positions.{p}"),
)
HEADS = KeyMap(
    *(
        rename(f"{name}.{{**}}", f"{name}.{{**}}")
        for name in ("vision_head", "language_head", "mlm_head", "pooler", "fc_norm", "head")
    ),
    rename("logit_scale", "logit_scale"),
)
"""The heads of the fine-tuned files keep their names; ``head`` is another module in every task."""


def keymap(trunk: str = "trunk.", stem: str = "stem.", text: str = "text.") -> KeyMap:
    """Return the map of a whole fine-tuned BEiT-3 to a trunk, a patch embedding, a token embedding and its heads."""
    return TRUNK.under("beit3.encoder.", trunk) + STEM.under("beit3.", stem) + TEXT.under("beit3.", text) + HEADS


def trunk_config(*, width: int, depth: int, heads: int, ffn: int, drop_path: float = 0.0) -> TrunkConfig:
    """Return the trunk of the released BEiT-3 (torchscale's EncoderConfig with multiway and sub-LN).

    Its positions start at row 2 of both tables: give the embeddings ``first=2``. The VQA and ImageNet models run
    without the output norm (``final_norm=False`` in the call).
    """
    return TrunkConfig(
        width=width,
        depth=depth,
        heads=heads,
        ffn=ffn,
        eps=1e-5,
        sub_norm=True,
        drop_path=drop_path,
        routed=("attn_norm", "qkv", "out", "ffn_norm", "ffn", "final_norm"),
        routes=(0, 1),
    )


_CONTRAST = (
    rename("vision_head.{p}", "contrast.image.{p}"),
    rename("language_head.{p}", "contrast.text.{p}"),
    rename("logit_scale", "logit_scale"),
)
_WORDS = (rename("mlm_head.{p}", "words.decoder.{p}"), rename("mim_head.{p}", "codes.{p}"))
TASKS: dict[str, KeyMap] = {
    "masked": KeyMap(*_CONTRAST, *_WORDS),
    "pair": KeyMap(
        rename("pooler.norm.{p}", "head.norm.{p}"),
        rename("pooler.dense.{p}", "head.dense.{p}"),
        rename("head.{i}.{p}", "head.out.{i}.{p}"),
    ),
    "images": KeyMap(rename("head.{unit}.{p}", "head.{unit}.{p}")),
    "image": KeyMap(rename("fc_norm.{p}", "head.norm.{p}"), rename("head.{p}", "head.out.{p}")),
}
"""What a model reads (``masked``: pre-training, retrieval and captions) -> where the heads of its file go."""


def model_keymap(task: str) -> KeyMap:
    """Return the map of a released file to the zoo's models, by what their head reads (see ``TASKS``)."""
    inner = TRUNK.under("beit3.encoder.", "trunk.trunk.") + STEM.under("beit3.", "trunk.stem.")
    return inner + TEXT.under("beit3.", "trunk.text.") + TASKS[task]
