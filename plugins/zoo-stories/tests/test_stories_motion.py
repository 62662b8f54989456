"""The motion predictor, what draws its frames, the data of both, and the two tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from zoo_stories.frames import StoryFrames, StoryFramesConfig
from zoo_stories.motion import MotionModel, inner_error
from zoo_stories.motion_task import MotionPredictionConfig
from zoo_stories.moves import FINE, Moves, MovesConfig
from zoo_stories.story_task import StoryConsistencyConfig, pairs
from zoo_stories.transitions import between

import zoo
from zoo.errors import ConfigError, DataError
from zoo.part import Features
from zoo.weights.save import save

TINY_MOVES = MovesConfig(frames=5, train_moves=6, val_moves=2, test_moves=4)
TINY_FRAMES = StoryFramesConfig(frames=3, train_stories=6, val_stories=2, test_stories=3)


def drawn_at_random(module: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(module.model.named_parameters()):
            if parameter.ndim > 1 and not name.startswith("image_tokenizer"):
                parameter.copy_(parameter[0].numel() ** -0.5 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.fixture(scope="session")
def motion() -> Any:
    return drawn_at_random(zoo.build("motion-predictor", scale="tiny", seed=2))


@pytest.fixture(scope="session")
def moves() -> Moves:
    return Moves(TINY_MOVES, 64)


# -- the predictor -----------------------------------------------------------------------------------------------------


def test_a_new_predictor_predicts_the_interpolation() -> None:
    model = zoo.build("motion-predictor", scale="tiny", seed=0).model
    pixels = torch.rand(2, 5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model({"pixel_values": pixels})
    assert torch.equal(out["motion"], out["motion_line"])
    assert out["motion"].shape == (2, 5, model.encoder.pooled_width)
    line, target = out["motion_line"], out["motion_target"]
    # the ends are the encoder's own vectors of both pictures, exactly
    assert torch.equal(line[:, 0], target[:, 0])
    assert torch.equal(line[:, -1], target[:, -1])
    torch.testing.assert_close(line[:, 2], (line[:, 0] + line[:, 4]) / 2)
    torch.testing.assert_close(target.norm(dim=-1), torch.ones(2, 5))


def test_the_transformer_adds_and_the_ablation_does_not(motion: Any) -> None:
    plain = zoo.build("motion-predictor", scale="tiny", seed=2, options={"wiring.interpolate": True})
    plain.model.load_state_dict(motion.model.state_dict())
    pixels = torch.rand(2, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        learned, line = motion.model({"pixel_values": pixels}), plain.eval().model({"pixel_values": pixels})
    assert torch.equal(line["motion"], learned["motion_line"])
    assert (learned["motion"] - learned["motion_line"]).abs().max() > 1e-2
    first, last = learned["motion_target"][:, 0], learned["motion_target"][:, -1]
    for count in (3, 9):  # any number of frames
        with torch.no_grad():
            assert motion.model.motion(MotionModel.line(first, last, count)).shape[1] == count


def test_the_loss_is_of_what_lies_between(motion: Any) -> None:
    target = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    moved = target.clone()
    moved[:, 0] += 5  # an end
    assert torch.equal(inner_error(moved, target), torch.zeros(2))
    moved[0, 1] += 2
    torch.testing.assert_close(inner_error(moved, target), torch.tensor([6 * 4 / 2, 0.0]))
    pixels = torch.rand(2, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loss, report = motion.losses({"pixel_values": pixels})
    assert loss > 0
    assert report["motion-error/interpolation"] > 0
    motion.set_stage(0)
    names = {name.split(".")[0] for name, p in motion.model.named_parameters() if p.requires_grad}
    assert names == {"predictor"}


def test_wrong_batches(motion: Any) -> None:
    with pytest.raises(ConfigError, match="expected \\[B, frames, 3, H, W\\]"):
        motion.model({"pixel_values": torch.rand(2, 3, 64, 64)})
    sample = zoo.data.sample.Sample("a", Image.new("RGB", (64, 64)), ("x",))
    with pytest.raises(DataError, match="has 1 images, expected 3 or more"):
        motion.model.processor([sample])
    with pytest.raises(ConfigError, match="count = 2 frames"):
        motion.model.predict_motion([sample.image], [sample.image], 2)


# -- data --------------------------------------------------------------------------------------------------------------


def test_moves_go_from_one_picture_to_another(moves: Moves) -> None:
    for id in moves.ids("test"):
        found = moves.move(id)
        assert len(found.scenes) == 5
        first, last = (scene.objects[found.mover] for scene in (found.scenes[0], found.scenes[-1]))
        assert max(abs(first.x - last.x), abs(first.y - last.y), abs(first.size - last.size)) >= FINE
        middle = found.scenes[2].objects[found.mover]  # half of the time is half of the way
        assert middle.x == pytest.approx((first.x + last.x) / 2, abs=1)
        assert middle.size == pytest.approx((first.size + last.size) / 2, abs=1)
        others = [[o for n, o in enumerate(s.objects) if n != found.mover] for s in found.scenes]
        assert all(one == others[0] for one in others)
    sample = moves.sample("train-000001")
    assert len(sample.meta["images"]) == 5
    assert sample.image.size == (64, 64)
    assert sample.meta["images"][0].tobytes() != sample.meta["images"][-1].tobytes()
    again = Moves(TINY_MOVES, 64)
    assert (again.version, again.move("val-000000")) == (moves.version, moves.move("val-000000"))
    with pytest.raises(ConfigError, match="frames = 2"):
        Moves(MovesConfig(frames=2), 64)


def test_frames_of_stories_hide_the_name() -> None:
    kind, icon = (
        StoryFrames(TINY_FRAMES, 64),
        StoryFrames(StoryFramesConfig(**{**vars(TINY_FRAMES), "naming": "both"}), 64),
    )
    ids = kind.ids("test")
    assert ids[:4] == ["test-000000.0", "test-000000.1", "test-000000.2", "test-000001.0"]
    names = set(kind.characters)
    for id in ids:
        sample, named = kind.sample(id), icon.text_sample(id)
        story = sample.meta["story"]
        (caption,) = sample.texts
        assert story["captions"][story["frame"]] == caption == named.texts[0]
        assert story["character"]["kind"] in caption
        assert not any(name in caption for name in names)
        assert any(name in named.texts[1] for name in names)
        assert sample.meta["cluster"] == id.partition(".")[0]
    assert kind.images(ids[:2]).shape == (2, 64, 64, 3)
    assert kind.images(ids[1:2])[0].tobytes() == kind.sample(ids[1]).image.tobytes()
    assert len(names) == 24
    for fields, message in (({"kinds": "animal+car"}, "unknown kind 'car'"), ({"per_kind": 1}, "per_kind = 1")):
        with pytest.raises(ConfigError, match=message):
            StoryFrames(StoryFramesConfig(**fields), 64)
    with pytest.raises(DataError, match="unknown id"):
        kind.text_sample("test-000009.0")


# -- drawing from embeddings -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def drawer() -> Any:
    return drawn_at_random(zoo.build("frame-diffusion", scale="tiny", seed=3))


def test_the_image_is_a_token_behind_the_text(drawer: Any) -> None:
    model = drawer.model
    rows = model.prompt_rows(["a fox icon", "an owl icon on blue"])
    embeds = torch.randn(2, model.encoder.pooled_width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone: Features = model.condition(rows)
        both = model.condition({**rows, "image_embeds": embeds})
        none = model.condition({**rows, "image_embeds": embeds, "no_image_draw": torch.tensor([0.0, 0.99])})
    assert both.tokens.shape[1] == rows["input_ids"].shape[1] + 1  # concatenated, not added
    assert torch.equal(both.tokens[:, :-1], alone.tokens[:, :-1])
    assert bool(both.mask[:, -1].all())
    torch.testing.assert_close(both.tokens[:, -1], model.image_token.linear(embeds))
    assert torch.equal(none.tokens[0, -1], model.image_token.nothing)
    assert torch.equal(none.tokens[1], both.tokens[1])
    assert torch.equal(alone.tokens[:, -1], model.image_token.nothing.expand(2, -1))
    assert torch.equal(model.no_condition().tokens[0, -1], model.image_token.nothing)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        seen = model.condition({**rows, "pixel_values": pixels})
        torch.testing.assert_close(seen.tokens[:, -1], model.image_token.linear(model.image_vectors(pixels)))


def test_frames_between_follow_the_prediction(drawer: Any, motion: Any) -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    how: dict[str, Any] = {"predictor": motion, "steps": 2, "guidance": 2.0}
    (found,) = between(drawer.model, images, ["a fox icon", "a fox icon"], "motion", 3, **how)
    assert found.shape == (3, 3, 64, 64)
    assert not torch.allclose(found[0], found[2], atol=1e-4)  # one noise, other embeddings
    same = drawer.model.draw_embeddings(["a", "a"], torch.ones(2, drawer.model.encoder.pooled_width), steps=2)
    assert torch.equal(same[0], same[1])
    with pytest.raises(ConfigError, match="of the motion predictor's encoder"):
        drawer.model.draw_embeddings(["a"], torch.ones(1, 7))
    plain = zoo.build("latent-diffusion", scale="tiny")
    with pytest.raises(ConfigError, match="draws from embeddings of images"):
        between(plain.model, images, ["a", "b"], "motion", 3, predictor=motion)


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_motion_prediction(motion: Any, moves: Moves) -> None:
    task = MotionPredictionConfig(items=3).build()
    result = task.run(motion, moves, "test")
    assert len(result.items) == 3
    row = result.items[0]
    images = moves.sample(row["item"]).meta["images"]
    target = motion.model.embed_images(images)[None]
    predicted = motion.model.predict_motion([images[0]], [images[-1]], 5)
    assert row["error"] == pytest.approx(float(inner_error(predicted, target)), rel=1e-4)
    assert row["gain"] == pytest.approx(row["error_line"] - row["error"])
    assert result.metrics["error"] == pytest.approx(sum(r["error"] for r in result.items) / 3)
    assert task.missing(object()) == ("predict_motion",)


def test_pairs_of_frames() -> None:
    rows = torch.nn.functional.normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    by_hand = [float(rows[i] @ rows[j]) for i in range(4) for j in range(i)]
    assert pairs(rows) == pytest.approx(sum(by_hand) / 6)
    assert pairs(rows[:1].expand(3, -1)) == pytest.approx(1.0)


def test_story_consistency(tmp_path: Path) -> None:
    judge = drawn_at_random(zoo.build("clip", scale="tiny", encoder="clip-vit-l-14"))
    save(judge.model, judge.recipe, tmp_path / "judge")
    drawer = drawn_at_random(zoo.build("story-diffusion", scale="tiny", seed=1, options={"wiring.rate": 1.0}))
    source = StoryFrames(TINY_FRAMES, 64)
    fields: dict[str, Any] = {"evaluator": str(tmp_path / "judge"), "steps": 2, "guidance": 1.0}
    task = StoryConsistencyConfig(**fields, items=2).build()
    result = task.run(drawer, source, "test")
    assert {row["item"] for row in result.items} < {"test-000000", "test-000001", "test-000002"}
    assert len(result.items) == 2
    for row in result.items:
        assert row["consistency_gain"] == pytest.approx(row["consistency"] - row["consistency_alone"])
        assert row["consistency"] != row["consistency_alone"]
        ids = source.text_sample(f"{row['item']}.0").meta["story"]["ids"]
        real = judge.model.embed_images([source.sample(id).image for id in ids])
        assert row["consistency_real"] == pytest.approx(pairs(real), abs=1e-5)
    assert result.metrics["frames"] == 6
    assert {"picture", "picture alone", "text"} <= set(result.samples[0])
    off = StoryConsistencyConfig(**fields, items=2, rate=0.0).build().run(drawer, source, "test")
    assert all(row["consistency_gain"] == 0 == row["text_gain"] for row in off.items)
    for mine, other in zip(result.items, off.items, strict=True):  # the same stories, seeds and steps
        assert mine["consistency_alone"] == pytest.approx(other["consistency"], abs=1e-6)
    assert drawer.model.consistency.rate == 1.0
    assert task.missing(judge) == ("generate_images",)
    assert task.spec_hash(source, "test") != StoryConsistencyConfig(**fields).build().spec_hash(source, "test")
    with pytest.raises(DataError, match="is no story of several frames"):
        task.run(drawer, Moves(TINY_MOVES, 64), "test")
    with pytest.raises(ConfigError, match="evaluator"):
        StoryConsistencyConfig().check()
    with pytest.raises(ConfigError, match="rate = 2"):
        StoryConsistencyConfig(rate=2.0)
