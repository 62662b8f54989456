"""Data of the modalities: exact by seed and id, what they are said to be, and wrong requests in a line."""

from __future__ import annotations

import os
import pickle
import stat
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zoo_modalities.data import maps, motion, speech
from zoo_modalities.data.icons import FIELDS, ModalitiesConfig
from zoo_modalities.data.signal import LazySignals, Signal, read_wav, resample
from zoo_modalities.fbank import fbank, frames_of

from zoo.errors import ConfigError, DataError

ALL = ["audio", "depth", "thermal", "video", "imu"]
SPOKEN = {300: -0.36295, 900: -0.0128, 2000: -0.07171, 3300: 0.0, 5000: 0.0}
"""Values of "red apple" in the first voice."""
STORED = {
    (0, 10): -8.3246,
    (0, 19): -0.0254,
    (0, 22): 4.8049,
    (50, 1): -14.2272,
    (100, 25): 2.8119,
    (100, 60): -15.9424,
    (197, 22): 4.8048,
    (197, 127): -10.3718,
}
"""Log energies of the sine below, by (window, band)."""


@pytest.fixture(scope="module")
def source() -> Any:
    return ModalitiesConfig(modalities=ALL, voice="simulated").build(64)


def named(source: Any, name: str) -> Any:
    id = next(i for split in ("train", "val", "test") for i in source.ids(split) if source.sample(i).texts[0] == name)
    return source.sample(id)


# -- the source ----------------------------------------------------------------------------------------------------


def test_samples_hold_what_the_table_says(source: Any) -> None:
    sample = source.sample(source.ids("train")[200])
    found = {name: sample.meta["modalities"][name] for name in ALL}
    shapes = {name: signal.values.shape for name, signal in found.items()}
    assert shapes == {
        "audio": shapes["audio"], "depth": (64, 64), "thermal": (64, 64), "video": (10, 64, 64, 3), "imu": (6, 2000),
    }  # fmt: skip
    assert {n: s.rate for n, s in found.items()} == {
        "audio": 16000, "depth": None, "thermal": None, "video": 2.0, "imu": 400,
    }  # fmt: skip
    assert found["audio"].values.ndim == 1
    assert 0.1 < np.abs(found["audio"].values).max() <= 1
    for name in ("depth", "thermal"):
        values = found[name].values
        assert values.dtype == np.float32
        assert 0 <= values.min() < values.max() <= 1
    assert found["video"].values.dtype == np.uint8
    assert sample.image.size == (64, 64)
    assert sample.meta["cluster"]


def test_signals_follow_from_seed_and_id(source: Any) -> None:
    """Equal in another object and another process's pickle, other with another seed; recorded once for all."""
    again = pickle.loads(pickle.dumps(source))
    other = ModalitiesConfig(modalities=ALL, voice="simulated", seed=1).build(64)
    id = source.ids("test")[7]
    for name in ALL:
        values = source.signals(id)[name].values
        assert np.array_equal(values, again.signals(id)[name].values)
        assert np.array_equal(values, source.signals(id)[name].values)
    for name in ("thermal", "video", "imu"):
        assert not np.array_equal(source.signals(id)[name].values, other.signals(id)[name].values)
    assert source.version != other.version
    spoken = speech.simulated("red apple").values
    assert {place: float(spoken[place]) for place in SPOKEN} == pytest.approx(SPOKEN, abs=1e-4)
    moved = motion.motion_of("1F408", "1F408", 0)
    assert (moved.gait, moved.frequency, moved.lean) == (
        "shake",
        pytest.approx(0.619163, abs=1e-5),
        pytest.approx(0.187883, abs=1e-5),
    )


def test_one_companion_a_training_item() -> None:
    source = ModalitiesConfig(modalities=["audio", "depth"], pairing="one", voice="simulated").build(64)
    train = [source.given(id) for id in source.ids("train")]
    assert {len(given) for given in train} == {1}
    shares = {name: train.count((name,)) / len(train) for name in ("text", "audio", "depth")}
    assert all(0.3 < share < 0.37 for share in shares.values())
    assert {source.given(id) for id in source.ids("test")} == {("text", "audio", "depth")}
    lacking = next(id for id in source.ids("train") if source.given(id) == ("audio",))
    sample = source.sample(lacking)
    assert sample.texts == ()
    assert list(sample.meta["modalities"]) == ["audio"]
    assert source.images([lacking]).shape == (1, 64, 64, 3)


def test_pictures_may_be_the_middle_of_the_clip() -> None:
    source = ModalitiesConfig(modalities=["imu"], picture="frame").build(64)
    id = source.ids("train")[100]
    icon = source.icon(id)
    assert np.array_equal(np.asarray(source.sample(id).image), motion.frame(icon.sprite, icon.motion, 2.5, 64))
    assert not np.array_equal(source.images([id]), source.icons.images([id]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modalities": ["audi"]}, "did you mean audio"),
        ({"modalities": ["audio", "audio"]}, "names one twice"),
        ({"seed": -1}, "must not be negative"),
        ({"voice": "espeak-ng"}, "espeak-ng is not installed"),
    ],
)
def test_wrong_requests_are_one_line(fields: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech.shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match=message) as caught:
        ModalitiesConfig(**fields).build(64)
    assert "\n" not in str(caught.value)


def test_signals_are_made_when_they_are_read() -> None:
    made: list[str] = []

    def maker(name: str) -> Any:
        return lambda: made.append(name) or Signal(np.zeros(1))

    signals = LazySignals({name: maker(name) for name in ("a", "b")})
    assert list(signals) == ["a", "b"]
    assert made == []
    assert signals["b"] is signals["b"]
    assert made == ["b"]
    assert set(FIELDS) >= set(ALL)


# -- maps ----------------------------------------------------------------------------------------------------------


def test_depth_is_a_cushion_on_a_plane() -> None:
    picture = np.full((40, 40, 3), 255, np.uint8)
    picture[10:30, 10:30] = (200, 30, 30)
    picture[18:22, 18:22] = 255  # white inside an outline is the icon's
    sprite = maps.cut_out(picture)
    assert sprite[..., 3].sum() == 255 * 400
    values = maps.depth(sprite).values
    plane = values[:, 0]
    assert np.all(np.diff(plane) > 0)  # the floor comes nearer towards the bottom
    assert values[20, 20] > values[20, 12] > values[20, 10] > plane.max()
    thermal = maps.thermal(sprite, "black cat", 0).values
    cold = maps.thermal(sprite, "snowman", 0).values
    other = maps.thermal(sprite, "red square", 0).values
    assert thermal[20, 15] > other[20, 15] > thermal[2, 2] > cold[20, 15]
    blank = maps.depth(maps.cut_out(np.full((40, 40, 3), 255, np.uint8))).values
    assert blank.max() == pytest.approx(maps.FLOOR[1])


# -- motion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gait", motion.GAITS)
def test_a_sensor_at_rest_feels_gravity_and_a_moving_one_its_path(gait: str) -> None:
    """Twice integrated, what the sensor measures (turned back, gravity taken off) is the path."""
    moving = motion.Motion(gait, 1.0, 0.1, 0.3, (0.05, -0.02), 0.4)
    rate = 400.0
    signal = motion.imu(moving, "test", rate=rate).values.astype(np.float64)
    time = np.arange(2000) / rate
    x, y, angle = moving.at(time)
    acceleration = np.stack(
        [np.cos(angle) * signal[0] - np.sin(angle) * signal[1], np.sin(angle) * signal[0] + np.cos(angle) * signal[1]]
    )
    acceleration[1] -= motion.GRAVITY
    for place, measured in zip((x, y), acceleration, strict=True):
        true = np.gradient(np.gradient(motion.METRES * place, 1 / rate), 1 / rate)
        np.testing.assert_allclose(measured[5:-5], true[5:-5], atol=0.35)
    turned = np.cumsum(signal[5]) / rate
    np.testing.assert_allclose(turned - turned[0], angle - angle[0], atol=0.05)
    assert np.abs(signal[2:5]).max() <= 0.1 + 1e-6
    still = motion.Motion("glide", 1.0, 0.0, 0.5, (0.0, 0.0), 0.0)
    rest = motion.imu(still, "rest").values.mean(1)
    np.testing.assert_allclose(rest[:2], [9.81 * np.sin(0.5), 9.81 * np.cos(0.5)], atol=0.02)


def test_a_clip_shows_the_motion() -> None:
    sprite = np.zeros((32, 32, 4), np.uint8)
    sprite[8:24, 8:24] = (0, 0, 0, 255)
    moving = motion.Motion("glide", 0.5, 0.15, 0.0, (0.0, 0.0), 0.0)
    clip = motion.clip(sprite, moving, 64)
    times = (np.arange(10) + 0.5) * 0.5
    for frame, time in zip(clip.values, times, strict=True):
        columns = np.nonzero((frame[..., 0] < 128).any(0))[0]
        x, _, _ = moving.at(np.array([time]))
        assert abs((columns.min() + columns.max()) / 2 - (0.5 + x[0]) * 64) < 2
    turned = motion.frame(sprite, motion.Motion("glide", 0.5, 0.0, np.pi / 4, (0.0, 0.0), 0.0), 0.0, 64)
    straight = motion.frame(sprite, moving, 0.0, 64)
    assert (turned < 128).any(-1).any(0).sum() > (straight < 128).any(-1).any(0).sum() + 4  # a diamond is wider


# -- sound ---------------------------------------------------------------------------------------------------------


def test_letters_of_a_text() -> None:
    assert speech.letters("Woman: Médium-light 3!") == "woman medium light three"
    assert speech.letters("!?") == "a"
    assert speech.letters("日本") != speech.letters("中国")


def test_the_same_word_sounds_alike_and_another_does_not() -> None:
    cat, again, dog = (speech.simulated(text).values for text in ("cat", "cat food", "dog"))
    assert np.array_equal(cat[:1500], again[:1500])
    assert not np.array_equal(cat[:1500], dog[:1500])
    assert not np.array_equal(cat[1200:2400], speech.simulated("cat", 1).values[1200:2400])  # another voice's vowel
    long = speech.simulated("woman firefighter medium light skin tone " * 4)
    assert len(long.values) <= speech.SECONDS * 16000
    assert np.abs(long.values).max() <= 1


def test_filter_bank_of_a_sine() -> None:
    """Stored values, and transformers' functions with Kaldi's settings, of two seconds of 440 Hz at 16 kHz."""
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    time = torch.arange(32000) / 16000
    sine = torch.sin(2 * torch.pi * 440 * time)
    sine = sine - sine.mean()
    ours = fbank(sine, 16000, 128)
    assert ours.shape == (198, 128) == (frames_of(32000, 16000), 128)
    for (row, band), value in STORED.items():
        assert float(ours[row, band]) == pytest.approx(value, abs=1e-3)
    filters = mel_filter_bank(257, 40, 20, 8000, 16000, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True)
    theirs = spectrogram(
        sine.numpy(), window_function(400, "hann", periodic=False), 400, 160, fft_length=512, power=2.0, center=False,
        preemphasis=0.97, mel_filters=filters, log_mel="log", mel_floor=1.192092955078125e-07, remove_dc_offset=True,
    ).T  # fmt: skip
    np.testing.assert_allclose(fbank(sine, 16000, 40).numpy(), theirs, atol=1e-3)
    assert int(ours[100].argmax()) == 23
    assert frames_of(399, 16000) == 0


def test_a_wav_file_is_read_and_resampled(tmp_path: Path) -> None:
    path = tmp_path / "tone.wav"
    tone = np.sin(2 * np.pi * 500 * np.arange(22050) / 22050)
    write_wav(path, tone, 22050)
    signal = read_wav(path)
    assert signal.rate == 22050
    np.testing.assert_allclose(signal.values, tone / 2, atol=1e-3)
    slower = resample(signal, 16000)
    assert slower.rate == 16000
    assert len(slower.values) == 16000
    wanted = np.sin(2 * np.pi * 500 * np.arange(16000) / 16000) / 2
    np.testing.assert_allclose(slower.values[500:-500], wanted[500:-500], atol=5e-3)
    with pytest.raises(DataError, match="whole numbers"):
        resample(Signal(np.zeros(5), None), 16000)
    path.write_bytes(b"RIFF")
    with pytest.raises(DataError, match="cannot be read as a WAV"):
        read_wav(path)


def write_wav(path: Path, values: np.ndarray, rate: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((values * 16384).astype("<i2").tobytes())


def test_espeak_speaks_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of that name that writes half a second of sound at its usual rate."""
    write_wav(tmp_path / "sound.wav", np.sin(np.arange(11025) / 10), 22050)
    program = tmp_path / "espeak-ng"
    program.write_text(f'#!/bin/sh\nwhile [ "$1" != -w ]; do shift; done\ncp {tmp_path}/sound.wav "$2"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert speech.resolve_voice("auto") == "espeak-ng"
    source = ModalitiesConfig(modalities=["audio"]).build(64)
    assert '"voice": "espeak-ng"' in source.version
    signal = source.signals(source.ids("train")[3])["audio"]
    assert signal.rate == 16000
    assert len(signal.values) == 8000
    program.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(DataError, match="espeak-ng cannot speak 'a word'"):
        speech.espeak("a word")
    assert speech.resolve_voice("simulated") == "simulated"
