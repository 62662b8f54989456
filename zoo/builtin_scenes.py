"""Scenes, instruction data and question answering in the zoo's own manifest (``zoo.builtin``). Data only."""

from __future__ import annotations

from zoo.registry import Component

SCENES = (
    Component(
        kind="data",
        name="openmoji-scenes",
        ref="zoo.data.scenes:ScenesConfig",
        summary="icons on a canvas with exact captions, questions, boxes and masks, rendered from installed packages",
    ),
    Component(
        kind="data",
        name="openmoji-edits",
        ref="zoo.data.edits:EditsConfig",
        summary="scenes before and after a change, and the instruction: add, remove, replace, move, resize, ...",
    ),
    Component(
        kind="data",
        name="openmoji-stories",
        ref="zoo.data.stories:StoriesConfig",
        summary="one character through several frames, texts and pictures in turn, with its masks",
    ),
    Component(
        kind="data",
        name="texts",
        ref="zoo.data.texts:TextsConfig",
        summary="your plain texts, .txt or .jsonl (root=PATH), for language modelling",
    ),
    Component(
        kind="data",
        name="llava-json",
        ref="zoo.data.llava_json:LlavaJsonConfig",
        summary="conversations about your images in LLaVA's JSON (file=PATH, root=PATH)",
    ),
    Component(
        kind="data",
        name="mixture",
        ref="zoo.data.mixture:MixtureConfig",
        summary="several sources as one, drawn at rates of their sizes' square roots, or otherwise",
    ),
    Component(
        kind="task",
        name="question-answering",
        ref="zoo.evaluation.question_answering:QuestionAnsweringConfig",
        summary="accuracy of generated short answers, by kind of question, with a blank-image control",
    ),
)
