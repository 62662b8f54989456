"""CLIP's towers: transformers' names and open_clip's (which are OpenAI's) to the zoo's, which keep open_clip's
inside a tower."""

from __future__ import annotations

from torch import Tensor

from zoo.weights.keymaps import KeyMap, drop, merge, rename


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.T.contiguous()


def blocks(source: str, target: str) -> KeyMap:
    """transformers ``...layers.N`` to open_clip's ``...resblocks.N``; q, k and v are one matrix there."""
    ours = f"{target}transformer.resblocks.{{i}}."
    theirs = f"{source}encoder.layers.{{i}}."
    return KeyMap(
        *(
            merge([f"{theirs}self_attn.{p}_proj.{kind}" for p in "qkv"], f"{ours}attn.in_proj_{kind}")
            for kind in ("weight", "bias")
        ),
        rename(f"{theirs}self_attn.out_proj.{{p}}", f"{ours}attn.out_proj.{{p}}"),
        rename(f"{theirs}layer_norm1.{{p}}", f"{ours}ln_1.{{p}}"),
        rename(f"{theirs}layer_norm2.{{p}}", f"{ours}ln_2.{{p}}"),
        rename(f"{theirs}mlp.fc1.{{p}}", f"{ours}mlp.c_fc.{{p}}"),
        rename(f"{theirs}mlp.fc2.{{p}}", f"{ours}mlp.c_proj.{{p}}"),
    )


def vision(source: str = "vision_model.", target: str = "encoder.tower.") -> KeyMap:
    """transformers' ``CLIPVisionTransformer`` to the image tower. ``pre_layrnorm`` is spelt so there."""
    return (
        KeyMap(
            drop(f"{source}embeddings.position_ids"),
            rename(f"{source}embeddings.class_embedding", f"{target}class_embedding"),
            rename(f"{source}embeddings.patch_embedding.weight", f"{target}conv1.weight"),
            rename(f"{source}embeddings.position_embedding.weight", f"{target}positional_embedding"),
            rename(f"{source}pre_layrnorm.{{p}}", f"{target}ln_pre.{{p}}"),
        )
        + blocks(source, target)
        + KeyMap(rename(f"{source}post_layernorm.{{p}}", f"{target}ln_post.{{p}}"))
    )


def text(source: str = "text_model.", target: str = "text_encoder.tower.") -> KeyMap:
    """transformers' ``CLIPTextTransformer`` to the text tower."""
    return (
        KeyMap(
            drop(f"{source}embeddings.position_ids"),
            rename(f"{source}embeddings.token_embedding.weight", f"{target}token_embedding.weight"),
            rename(f"{source}embeddings.position_embedding.weight", f"{target}positional_embedding"),
        )
        + blocks(source, target)
        + KeyMap(rename(f"{source}final_layer_norm.{{p}}", f"{target}ln_final.{{p}}"))
    )


TRANSFORMERS = (
    vision()
    + text()
    + KeyMap(
        rename("visual_projection.weight", "image_projection.weight"),
        rename("text_projection.weight", "text_projection.weight"),
        rename("logit_scale", "logit_scale"),
    )
)
"""``CLIPModel``."""

_TEXT = ("token_embedding.{**}", "positional_embedding", "transformer.{**}", "ln_final.{**}")

OPEN_CLIP = KeyMap(
    drop("attn_mask"),
    drop("input_resolution"),  # numbers among the buffers of OpenAI's archives
    drop("context_length"),
    drop("vocab_size"),
    rename("visual.proj", "image_projection.weight", _transposed, _transposed),
    rename("visual.{**}", "encoder.tower.{**}"),
    rename("text_projection", "text_projection.weight", _transposed, _transposed),
    *(rename(name, f"text_encoder.tower.{name}") for name in _TEXT),
    rename("logit_scale", "logit_scale"),
)
"""``open_clip.CLIP`` and openai/CLIP; a ResNet's attention pool stays inside the tower."""
