"""ImageBind's wiring, loss and encoders: what learns, what is compared with what, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zoo_modalities.data.icons import ModalitiesConfig
from zoo_modalities.data.signal import Signal
from zoo_modalities.imagebind.bind import Bind
from zoo_modalities.imagebind.encoders import frames_of_clip
from zoo_modalities.imagebind.objective import BindContrastive, pair_loss
from zoo_modalities.imagebind.parts import Windows

import zoo
from zoo.data.loader import loader
from zoo.data.order import SampleOrder
from zoo.errors import ConfigError, DataError
from zoo.plugin import catalogue
from zoo.recipe import resolve
from zoo.testing.config import shake

FOUR = ("audio", "depth", "thermal", "imu")


@pytest.fixture(scope="module")
def module() -> Any:
    """Tiny, with all its modalities, weights that matter."""
    built = zoo.build("imagebind", scale="tiny", seed=1)
    shake(built.model)
    return built.eval()


@pytest.fixture(scope="module")
def model(module: Any) -> Bind:
    found: Bind = module.model
    return found


def batch_of(model: Bind, count: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = model.example_batch(count)
    for name, value in batch.items():
        if value.is_floating_point():
            batch[name] = torch.randn(value.shape, generator=generator)
    batch["input_ids"] = torch.randint(3, 900, batch["input_ids"].shape, generator=generator)
    return batch


# -- what learns, and from what ------------------------------------------------------------------------------------


def test_a_step_changes_the_new_encoders_and_no_bit_of_image_and_text() -> None:
    """The card's first trap: image and text towers are frozen, bit for bit; the audio trunk moves."""
    module = zoo.build("imagebind", scale="tiny", seed=0, options={"wiring.modalities": ["audio"]})
    before = {k: v.clone() for k, v in module.model.state_dict().items()}
    module.train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01)
    loss, report = module.losses(batch_of(module.model))
    loss.backward()
    optimizer.step()
    assert set(report) == {"loss", "bind-contrastive", "bind-contrastive/audio_loss", "bind-contrastive/audio_accuracy"}
    for name, parameter in module.model.named_parameters():
        new = name.startswith(("encoders.audio", "projections.audio"))
        assert (parameter.grad is not None) == new, name
    after = module.model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all(name.startswith(("encoders.audio.", "projections.audio.")) for name in changed)
    assert any("trunk.layers.3" in name for name in changed)


def test_only_pairs_with_images_enter_the_loss(model: Bind) -> None:
    """The loss is the sum over pairs (image, x); exchanging audio between items moves audio's share alone."""
    joint = zoo.build("imagebind", scale="tiny", seed=1, stages="joint")
    objective = joint.objectives["bind-contrastive"]
    batch = batch_of(joint.model)
    assert objective.pairs(joint.model, joint.model(batch)) == ["text", *FOUR]
    joint.eval()
    with torch.no_grad():
        loss, report = objective(joint.model, batch, joint.model(batch))
        torch.testing.assert_close(loss, sum(report[f"{name}_loss"] for name in ("text", *FOUR)))
        batch["audio"] = batch["audio"].flip(0)
        _, other = objective(joint.model, batch, joint.model(batch))
    for name in ("text", "depth", "thermal", "imu"):
        assert torch.equal(report[f"{name}_loss"], other[f"{name}_loss"])
    assert not torch.equal(report["audio_loss"], other["audio_loss"])
    assert {"audio", "depth", "image", "text"} <= set(model.modalities)  # and yet any two can be compared


def test_loss_is_the_papers(model: Bind) -> None:
    """Both directions by hand, the temperature that of the table, fixed but for text."""
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.nn.functional.normalize(torch.randn(5, 7, generator=generator), dim=-1) for _ in range(2))
    tau = 0.05
    expected = torch.zeros(())
    for i in range(5):
        scores, backwards = q[i] @ k.T / tau, k[i] @ q.T / tau
        expected += -(scores[i] - scores.exp().sum().log()) - (backwards[i] - backwards.exp().sum().log())
    loss, accuracy = pair_loss(q, k, torch.tensor(1 / tau))
    torch.testing.assert_close(loss, expected / 5)
    assert accuracy == ((q @ k.T).argmax(1) == torch.arange(5)).float().mean()
    assert loss == pytest.approx(float(pair_loss(k, q, torch.tensor(1 / tau))[0]), abs=1e-5)
    rows = torch.tensor([4, 1, 2])
    subset, _ = pair_loss(q, k[:3], torch.tensor(1 / tau), rows)
    torch.testing.assert_close(subset, pair_loss(q[rows], k[:3], torch.tensor(1 / tau))[0])

    scales = {name: float(model.log_scale(name).exp()) for name in FOUR}
    assert scales == pytest.approx({"audio": 20, "depth": 5, "thermal": 10, "imu": 5})
    names = dict(model.named_parameters())
    assert "logit_scale" in names
    assert not any(name.startswith("scales.") for name in names)
    fresh = zoo.build("imagebind", scale="tiny").model
    assert float(fresh.logit_scale.exp()) == pytest.approx(1 / 0.07)


def test_temperature_of_text_is_kept_within_a_hundred(model: Bind) -> None:
    objective: BindContrastive = catalogue()["objective"].parse("bind-contrastive").build()
    before = model.logit_scale.detach().clone()
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    objective.after_step(model)
    assert float(model.logit_scale.detach()) == pytest.approx(math.log(100))
    with torch.no_grad():
        model.logit_scale.copy_(before)


def test_nothing_that_learns_is_a_line(model: Bind) -> None:
    module = zoo.build("imagebind", scale="tiny")
    batch = {k: v for k, v in batch_of(module.model).items() if k not in FOUR}
    with pytest.raises(ConfigError, match="no pair to learn from"):
        module.losses(batch)


# -- vectors -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_norms_of_what_the_release_returns(model: Bind) -> None:
    """Single clips have the length of their scale; the mean of several clips is shorter, and not brought back."""
    batch = batch_of(model)
    before = model.logit_scale.clone()
    model.logit_scale.fill_(math.log(1 / 0.07))
    wanted = {"audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}
    for name, length in wanted.items():
        norm = model.features(name, batch[name]).norm(dim=-1)
        torch.testing.assert_close(norm, torch.full((4,), length), rtol=1e-4, atol=0)
    assert float(model.features("vision", batch["pixel_values"]).norm(dim=-1).max()) == pytest.approx(1, abs=1e-5)
    assert float(model.features("text", batch["input_ids"]).norm(dim=-1).max()) == pytest.approx(14.2857, abs=1e-3)
    model.logit_scale.copy_(before)
    clips = batch["audio"].view(2, 2, *batch["audio"].shape[1:])  # [B, clips, 1, bins, frames]
    several, each = model.features("audio", clips), model.features("audio", batch["audio"])
    torch.testing.assert_close(several, each.view(2, 2, -1).mean(1))
    assert float(several.norm(dim=-1).max()) < 20 - 1e-3


@torch.no_grad()
def test_a_still_image_is_two_equal_frames(model: Bind) -> None:
    pixels = batch_of(model)["pixel_values"]
    clip = pixels[:, :, None].expand(-1, -1, 2, -1, -1)
    torch.testing.assert_close(model.image_features(pixels), model.image_features(clip))
    moved = torch.stack([pixels, pixels.flip(-1)], 2)
    assert (model.image_features(moved) - model.image_features(pixels)).abs().max() > 1e-3
    with pytest.raises(ConfigError, match=r"\[batch, 1, 3, frames, H, W\]"):
        model.features("vision", clip)
    torch.testing.assert_close(
        model.features("vision", clip[:, None]), model.features("vision", pixels), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_text_is_causal_and_ends_at_its_largest_id(model: Bind) -> None:
    encoder = model.text_encoder
    ids = torch.tensor([[5, 9, 1000, 7, 3], [8, 4, 6, 2, 1001]])
    pooled = encoder(ids).pooled
    other = ids.clone()
    other[0, 3:] = torch.tensor([500, 600])
    torch.testing.assert_close(encoder(other).pooled, pooled)
    other[0, 1] = 11
    assert (encoder(other).pooled[0] - pooled[0]).abs().max() > 1e-3
    torch.testing.assert_close(encoder(ids[:1, :3], torch.ones(1, 3, dtype=torch.bool)).pooled, pooled[:1])


def test_sizes_of_the_release() -> None:
    """228 overlapping audio patches, 250 tokens of IMU, learned keys for four modalities, 1.2 billion weights."""
    with torch.device("meta"):
        huge: Any = zoo.build("imagebind-huge").model
    tokens = {name: encoder.tokens for name, encoder in huge.encoders.items()}
    assert tokens == {"audio": 229, "depth": 197, "thermal": 197, "imu": 251}
    assert huge.encoders["audio"].embed.grid == (12, 19)
    assert huge.encoder.tokens == 257
    with_key = {name.split(".")[1] for name in huge.state_dict() if name.endswith("bias_k")}
    assert with_key == set(FOUR)
    assert 1.19e9 < sum(p.numel() for p in huge.parameters()) < 1.21e9
    assert huge.encoders["imu"].dropout.p == 0.5
    assert huge.encoders["imu"].trunk.layers[-1].drop_path == pytest.approx(0.7)
    assert huge.encoders["audio"].trunk.layers[-1].drop_path == pytest.approx(0.1)


def test_windows_of_the_sensor_are_cut_channel_by_channel() -> None:
    windows = Windows(16, 6, 8, 2000)
    x = torch.arange(6 * 2000, dtype=torch.float32).view(1, 6, 2000)
    cut = windows.windows(x)
    assert cut.shape == (1, 250, 48)
    assert torch.equal(cut[0, 3], x[0, :, 24:32].flatten())


# -- the capability ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source() -> Any:
    return ModalitiesConfig(modalities=["audio", "depth", "thermal", "video", "imu"], voice="simulated").build(64)


def test_every_modality_is_embedded_at_unit_length(module: Any, source: Any) -> None:
    samples = [source.sample(id) for id in source.ids("test")[:3]]
    assert module.modalities == ("image", "text", "video", *FOUR)
    for name in module.modalities:
        items = [
            s.image if name == "image" else s.texts[0] if name == "text" else s.meta["modalities"][name]
            for s in samples
        ]
        out = module.embed(name, items)
        assert out.shape == (3, 128)
        torch.testing.assert_close(out.norm(dim=-1), torch.ones(3))
        torch.testing.assert_close(module.embed(name, items[1:2]), out[1:2], rtol=1e-4, atol=1e-5)
        assert (out[0] - out[1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_long_recording_is_the_mean_of_its_clips(model: Bind) -> None:
    rate = 16000
    wave = np.sin(np.arange(5 * rate) ** 1.3 / 400).astype(np.float32)
    config: Any = model.encoder_configs["audio"]
    clips = config.prepare(Signal(wave, rate))
    assert clips.shape == (3, 1, 64, 204)
    centred = wave - wave.mean()
    for clip, start in zip(clips, (0, 1.5, 3), strict=True):
        part = centred[int(start * rate) : int((start + 2) * rate)]
        torch.testing.assert_close(clip, config._spectrogram(part, None))
    embedded = model.embed("audio", [Signal(wave, rate)])
    mean = model.features("audio", clips).mean(0)
    torch.testing.assert_close(embedded[0], mean / mean.norm(), rtol=1e-4, atol=1e-5)
    drawn = {float(config.prepare(Signal(wave, rate), (0, "x", n)).sum()) for n in range(3)}
    assert len(drawn) == 3  # training draws where a clip begins
    assert config.prepare(Signal(wave, rate), (0, "x", 1)).shape == (1, 1, 64, 204)


def test_arithmetic_brings_each_term_to_unit_length(model: Bind) -> None:
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.2]])
    torch.testing.assert_close(model.combine(a, b), torch.tensor([[0.5**0.5, 0.5**0.5]]))
    torch.testing.assert_close(model.combine(a, b, weights=[1, -1]), torch.tensor([[0.5**0.5, -(0.5**0.5)]]))
    with pytest.raises(ConfigError, match="1 weights"):
        model.combine(a, b, weights=[1])


def test_frames_of_a_clip() -> None:
    frames = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    clips = frames_of_clip(Signal(frames, 2.0), 2, 5)  # five seconds: clips of two, that is four frames
    assert [[int(f[0, 0, 0]) for f in clip] for clip in clips] == [[0, 3], [2, 5], [3, 6], [4, 7], [6, 9]]
    assert len(frames_of_clip(Signal(frames, None), 2, 5)) == 1
    with pytest.raises(DataError, match="expected uint8"):
        frames_of_clip(Signal(frames.astype(np.float32), 2.0), 2, 5)


# -- wrong input ---------------------------------------------------------------------------------------------------


def sound(values: Any, rate: float = 16000) -> Signal:
    return Signal(np.asarray(values, np.float32), rate)


NAN = np.where(np.arange(6 * 2000).reshape(6, 2000) == 77, np.nan, 0)


@pytest.mark.parametrize(
    ("modality", "item", "message"),
    [
        ("audio", sound(np.zeros(32000), 44100), "44100 samples a second, the encoder reads 16000: resample"),
        ("audio", np.zeros(32000, np.float32), "does not tell its rate"),
        ("audio", sound(np.full(32000, np.nan)), "value at .* is nan"),
        ("audio", sound(np.zeros(100)), "100 samples are too few"),
        ("audio", sound(np.zeros((2, 32000))), "expected 1 axes"),
        ("audio", "missing.wav", "cannot be read as a WAV file"),
        ("depth", np.zeros((3, 64, 64), np.float32), "expected 2 axes"),
        ("depth", np.full((64, 64), np.inf), "is inf"),
        ("thermal", np.array([["a"]]), "expected numbers"),
        ("imu", sound(NAN, 400), "is nan"),
        ("imu", sound(np.zeros((6, 2000)), 100), "100 samples a second, the encoder reads 400"),
        ("imu", sound(np.zeros((3, 2000)), 400), "6 rows"),
        ("imu", sound(np.zeros((6, 50)), 400), "too few"),
        ("video", [1, 2], "expected a Signal or images"),
    ],
)
def test_a_wrong_item_is_one_line(module: Any, modality: str, item: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        module.embed(modality, [item])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(modality) or "WAV" in str(caught.value)


def test_a_wrong_modality_is_one_line(module: Any) -> None:
    with pytest.raises(ConfigError, match="did you mean depth"):
        module.embed("dept", [])
    with pytest.raises(ConfigError, match="wrap it in a list"):
        module.embed("audio", "spoken.wav")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modalities": ["audio", "audio"]}, "must be different"),
        ({"modalities": ["text"]}, "beside image, text and video"),
        ({"modalities": ["smell"]}, "imagebind-smell"),
        ({"encoders": {"depth": "imagebind-audio"}}, "reads 'audio'"),
        ({"fields": {"audio": {"dept": 3}}}, "did you mean depth"),
        ({"fields": {"taste": {}}}, "names 'taste'"),
        ({"temperatures": {"audio": 0.0}}, "above 0"),
        ({"augment": "shift"}, "augment = 'shift'"),
    ],
)
def test_wrong_fields_are_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        zoo.build("imagebind", scale="tiny", wiring=values)
    assert "\n" not in str(caught.value)


def test_encoders_are_chosen_by_name_and_field() -> None:
    values = {"encoders": {"depth": "imagebind-depth"}, "fields": {"audio": {"depth": 2, "mel_bins": 32}}}
    recipe = resolve("imagebind", scale="tiny", values={"wiring": values})
    configs: Any = recipe.wiring[1].encoder_configs()  # type: ignore[attr-defined]
    assert (configs["audio"].depth, configs["audio"].mel_bins, configs["audio"].width) == (2, 32, 128)
    assert configs["imu"].depth == 4
    assert configs["imu"].dropout == configs["imu"].drop_path == 0
    assert resolve("imagebind").wiring[1].encoder_configs()["imu"].drop_path == 0.7  # type: ignore[attr-defined]
    swapped = zoo.build("imagebind", scale="tiny", encoder="clip-vit-b-32", text_encoder="clip-text-512")
    assert swapped.embed_texts(["a cat"]).shape == (1, 128)


# -- from samples to a batch ---------------------------------------------------------------------------------------


def test_items_with_one_companion_each_are_told_apart(module: Any) -> None:
    source = ModalitiesConfig(modalities=["audio", "depth"], pairing="one", voice="simulated").build(64)
    batch = next(iter(loader(source, module.processor, SampleOrder(source.ids("train"), 0), 24, train=False)))
    rows = [batch[f"{name}_rows"].tolist() for name in ("text", "audio", "depth")]
    assert sorted(row for own in rows for row in own) == list(range(24))  # no image has two
    assert [len(batch[key]) for key in ("input_ids", "audio", "depth")] == [len(own) for own in rows]
    ids = [place.id for place in SampleOrder(source.ids("train"), 0).slice(0, 24)]
    for name, own in zip(("audio", "depth"), rows[1:], strict=True):
        wanted = source.sample(ids[own[0]]).meta["modalities"][name]
        torch.testing.assert_close(batch[name][:1], module.model.encoder_configs[name].prepare(wanted))
    loss, report = module.losses(batch)
    assert bool(torch.isfinite(loss))
    assert "bind-contrastive/audio_loss" in report


def test_maps_are_cropped_as_their_image_is() -> None:
    """Depth whose values are the image's own red channel stays so in every crop."""
    from PIL import Image

    from zoo.data.sample import Sample

    built = zoo.build(
        "imagebind", scale="tiny",
        options={"wiring.modalities": ["depth"], "wiring.crop_area": 0.3, "wiring.augment": "random-resized-crop"},
    )  # fmt: skip
    ramp = np.add.outer(np.arange(64) * 2, np.arange(64)).astype(np.uint8)
    image = Image.fromarray(np.repeat(ramp[..., None], 3, -1))
    sample = Sample("x", image, ("a ramp",), {"modalities": {"depth": Signal(ramp / np.float32(255))}})
    processor: Any = built.processor
    seen = set()
    for draw in range(3):
        batch = processor([sample], train=True, draws=[draw])
        mean, std = processor.transform.mean[0], processor.transform.std[0]
        red = batch["pixel_values"][0, 0] * std + mean
        torch.testing.assert_close(batch["depth"][0, 0], red, atol=0.01, rtol=0)
        seen.add(round(float(red.mean()), 4))
    assert len(seen) == 3
    plain = processor([sample])
    torch.testing.assert_close(plain["depth"][0, 0], torch.from_numpy(ramp / np.float32(255)))


def test_data_without_signals_are_refused_in_a_line(module: Any) -> None:
    from zoo.data.openmoji import OpenMojiConfig

    source = OpenMojiConfig().build(64)
    with pytest.raises(DataError, match=r"the data carry no audio.*wiring.modalities=\[\]"):
        module.processor([source.sample(source.ids("train")[0])], train=True)


def test_towers_of_a_clip_are_taken_over(tmp_path: Path) -> None:
    """The image and text encoders are those of the wiring ``towers``, by name: ``init`` finds them."""
    from zoo.weights import save

    clip = zoo.build("clip", scale="tiny", seed=5, encoder="imagebind-vision", text_encoder="imagebind-text")
    shake(clip.model)
    save(clip, clip.recipe, tmp_path / "clip")
    bound = zoo.build("imagebind", scale="tiny", seed=0, init=tmp_path / "clip")
    texts = ["a red apple", "two cats"]
    torch.testing.assert_close(bound.embed_texts(texts), clip.embed_texts(texts))
    assert torch.equal(bound.model.image_projection.weight, clip.model.image_projection.weight)
