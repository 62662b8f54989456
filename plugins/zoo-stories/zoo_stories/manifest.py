"""What the plugin adds. Data only."""

from __future__ import annotations

from zoo.registry import Component

COMPONENTS = (
    Component(
        kind="command",
        name="story",
        ref="zoo_stories.command:main",
        summary="a comic page and a clip from a character and a script",
    ),
    Component(
        kind="data",
        name="story-frames",
        ref="zoo_stories.frames:StoryFramesConfig",
        summary="frames of OpenMoji stories, captions that name the character by its kind alone",
    ),
    Component(
        kind="data",
        name="moving-scenes",
        ref="zoo_stories.moves:MovesConfig",
        summary="scenes of OpenMoji icons that move: the frames between two pictures",
    ),
    Component(
        kind="wiring",
        name="story-diffusion",
        ref="zoo_stories.story_diffusion:StoryDiffusionConfig",
        summary="latent-diffusion, and how the frames of a story read each other",
    ),
    Component(
        kind="wiring",
        name="frame-diffusion",
        ref="zoo_stories.frame_diffusion:FrameDiffusionConfig",
        summary="latent-diffusion that reads an image's embedding behind the text's tokens",
    ),
    Component(
        kind="wiring",
        name="motion",
        ref="zoo_stories.motion:MotionConfig",
        summary="a frozen image encoder and a transformer over the embeddings between two pictures",
    ),
    Component(
        kind="objective",
        name="motion-error",
        ref="zoo_stories.motion:MotionErrorConfig",
        summary="squared distance of predicted and real embeddings of the frames between two pictures",
    ),
    Component(
        kind="task",
        name="story-consistency",
        ref="zoo_stories.story_task:StoryConsistencyConfig",
        summary="whether the frames of a story show one character, against frames drawn each for itself",
    ),
    Component(
        kind="task",
        name="motion-prediction",
        ref="zoo_stories.motion_task:MotionPredictionConfig",
        summary="how near predicted motion is to the real one, against interpolation",
    ),
)
