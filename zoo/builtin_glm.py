"""VisualGLM's components of the zoo's own manifest (``zoo.builtin``). Data only."""

from __future__ import annotations

from zoo.registry import Component

GLM = (
    Component(
        kind="decoder",
        name="glm-lm",
        ref="zoo.decoders.glm_lm:GLMConfig",
        preset={"tokenizer": "hf:THUDM/visualglm-6b", "vocab_size": 130528, "context_length": 2048},
        summary="ChatGLM-6B: the prompt reads all of itself, the answer is causal, two positions a token",
    ),
)
