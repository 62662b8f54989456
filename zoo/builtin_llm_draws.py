"""Language models that drive a diffusion model: their components of the zoo's own manifest (``zoo.builtin``). Data
only."""

from __future__ import annotations

from typing import Any

from zoo.registry import Component


def _connector(name: str, config: str, summary: str, **preset: Any) -> Component:
    ref = f"zoo.output_connectors.{config}"
    return Component(kind="output_connector", name=name, ref=ref, preset=preset, summary=summary)


LLM_DRAWS = (
    _connector("mapper", "mapper:MapperConfig", "an MLP and an encoder-decoder with 77 learned queries (MiniGPT-5)"),
    _connector(
        "projection",
        "projection:ProjectionConfig",
        "a narrow encoder-decoder with 77 learned queries over states and embeddings (NExT-GPT, images and video)",
    ),
    _connector(
        "projection-audio",
        "projection:ProjectionConfig",
        "the same with one query (NExT-GPT, audio)",
        queries=1,
    ),
    _connector(
        "query-resampler",
        "query_resampler:QueryResamplerConfig",
        "queries regress image features, which a resampler makes the condition (SEED-X)",
    ),
    _connector("linear", "simple:TokenWiseConfig", "one linear map of every state"),
    _connector("mlp", "simple:TokenWiseConfig", "two linear maps of every state, GELU between", depth=2),
    Component(
        kind="wiring",
        name="llm-draws",
        ref="zoo.models.llm_draws:LLMDrawsConfig",
        summary="a bridge to a language model whose states at tokens of its own are a diffusion model's condition",
    ),
    Component(
        kind="objective",
        name="alignment",
        ref="zoo.objectives.alignment:AlignmentConfig",
        summary="an output connector's tokens are pulled to the text encoder's states or an image's features",
    ),
)
