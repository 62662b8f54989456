from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo import torchvision_ops
from zoo.data.images import CLIP_MEAN, CLIP_STD, ImageTransform, uniforms
from zoo.errors import ConfigError, DataError

SIZES = [(130, 90), (90, 130), (100, 100), (301, 77), (40, 33), (48, 48)]


def pictures(picture: Image.Image) -> list[Image.Image]:
    return [picture.resize(size) for size in SIZES]


def test_crop_equals_the_open_clip_transform(picture: Image.Image) -> None:
    torchvision_ops.ensure()
    from open_clip.transform import image_transform

    reference = image_transform(48, is_train=False, mean=CLIP_MEAN, std=CLIP_STD, resize_mode="shortest")
    ours = ImageTransform(size=48)(pictures(picture))
    theirs = torch.stack([reference(p) for p in pictures(picture)])
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_crop_equals_transformers_where_the_margins_are_even(picture: Image.Image) -> None:
    torchvision_ops.ensure()
    from transformers import CLIPImageProcessorPil

    images = [
        picture.resize(s) for s in [(130, 90), (100, 100), (96, 120)]
    ]  # resized to 48 the margins are even or none
    reference = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    images[0] = picture.resize((125, 100))
    theirs = torch.as_tensor(np.asarray(reference(images, return_tensors="np")["pixel_values"]))
    torch.testing.assert_close(ImageTransform(size=48)(images), theirs, atol=1e-5, rtol=1e-5)


def test_squash_equals_torchvision_resize(picture: Image.Image) -> None:
    torchvision_ops.ensure()
    from torchvision.transforms import v2

    for ours, name in (("bicubic", v2.InterpolationMode.BICUBIC), ("bilinear", v2.InterpolationMode.BILINEAR)):
        resize = v2.Resize((40, 40), interpolation=name)
        theirs = torch.stack([torch.from_numpy(np.array(resize(p))).permute(2, 0, 1) / 255 for p in pictures(picture)])
        transform = ImageTransform(size=40, mean=(0, 0, 0), std=(1, 1, 1), mode="squash", interpolation=ours)  # type: ignore[arg-type]
        torch.testing.assert_close(transform(pictures(picture)), theirs)


@pytest.mark.parametrize("size", [(64, 32), (32, 64)])
def test_padding_is_the_clip_mean_and_keeps_the_whole_picture(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (255, 0, 0))
    pixels = ImageTransform(size=64, mean=(0, 0, 0), std=(1, 1, 1), mode="pad")([image])[0].mul(255).round()
    assert pixels[:, 0, 0].tolist() == [0, 0, 0]  # int(255 * mean) of this transform, not black by accident
    normal = ImageTransform(size=64, mode="pad")([image])[0]
    restored = (normal * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)) * 255
    restored = restored.round().to(torch.uint8)
    assert restored[:, 0, 0].tolist() == [122, 116, 104]
    assert restored[:, -1, -1].tolist() == [122, 116, 104]
    wide = restored if size[0] > size[1] else restored.transpose(1, 2)
    assert (torch.tensor([255, 0, 0]) == wide[:, 16:48].flatten(1).T).all()
    assert (torch.tensor([122, 116, 104]) == wide[:, :16].flatten(1).T).all()


@pytest.mark.parametrize("augment", ["none", "shift", "flip", "shift-flip"])
def test_the_batched_path_equals_the_path_of_single_images(augment: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    transform = ImageTransform(size=32, augment=augment)  # type: ignore[arg-type]
    keys = [(7, f"id{i}", i % 2) for i in range(12)]
    images = [Image.fromarray(p) for p in pixels]
    assert transform.takes_arrays(32, 32, train=True)
    torch.testing.assert_close(transform.from_array(pixels, keys), transform(images, keys), atol=0, rtol=0)
    torch.testing.assert_close(transform.from_array(pixels), transform(images), atol=0, rtol=0)
    changed = not torch.equal(transform.from_array(pixels, keys), transform.from_array(pixels))
    assert changed == (augment != "none")
    whole = transform.from_array(pixels, keys)
    torch.testing.assert_close(transform.from_array(pixels[5:8], keys[5:8]), whole[5:8], atol=0, rtol=0)


def test_shift_moves_and_flip_mirrors() -> None:
    pixels = np.zeros((200, 16, 16, 3), np.uint8)
    pixels[:, 8, 4] = 255
    keys = [(0, str(i), 0) for i in range(200)]
    shifted = ImageTransform(size=16, augment="shift", shift=0.125).from_array(pixels, keys)
    rows, columns = (shifted[:, 0] > 0).nonzero()[:, 1:].T
    assert set(rows.tolist()) == set(range(6, 11))
    assert set(columns.tolist()) == set(range(2, 7))
    flipped = ImageTransform(size=16, augment="flip").from_array(pixels, keys)
    places = (flipped[:, 0] > 0).nonzero()[:, 2].tolist()
    assert set(places) == {4, 11}
    assert 60 < places.count(4) < 140


def test_random_crops_are_seeded_by_id_and_draw(picture: Image.Image) -> None:
    transform = ImageTransform(size=32, augment="random-resized-crop", crop_scale=(0.3, 0.9))
    one = transform([picture, picture, picture], [(0, "a", 0), (0, "a", 1), (0, "b", 0)])
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], one[2])
    torch.testing.assert_close(transform([picture], [(0, "a", 1)])[0], one[1], atol=0, rtol=0)
    assert not torch.equal(transform([picture], [(1, "a", 0)])[0], one[0])
    assert not transform.takes_arrays(32, 32, train=True)
    assert transform.takes_arrays(32, 32, train=False)
    torch.testing.assert_close(transform([picture]), ImageTransform(size=32)([picture]), atol=0, rtol=0)


def test_a_crop_of_the_whole_area_of_a_square_is_a_resize(picture: Image.Image) -> None:
    square = picture.resize((60, 60))
    crop = ImageTransform(size=24, augment="random-resized-crop", crop_scale=(1, 1), crop_ratio=(1, 1))
    torch.testing.assert_close(crop([square], [(0, "a", 0)]), ImageTransform(size=24)([square]), atol=0, rtol=0)


def test_uniforms_are_uniform_and_recorded() -> None:
    values = uniforms(4000, "x", 1)
    assert 0 <= values.min() < values.max() < 1
    assert np.abs(np.histogram(values, 8, (0, 1))[0] - 500).max() < 90
    assert uniforms(2, 0, "id", 3).round(6).tolist() == [0.872622, 0.104977]


def test_other_modes_and_paths(tmp_path: Path, picture: Image.Image) -> None:
    picture.convert("L").save(tmp_path / "grey.png")
    transform = ImageTransform(size=24)
    grey = transform([tmp_path / "grey.png"])
    torch.testing.assert_close(grey, transform([picture.convert("L")]))
    assert transform([]).shape == (0, 3, 24, 24)
    with pytest.raises(DataError, match="there is no image"):
        transform([str(tmp_path / "none.png")])
    (tmp_path / "cut.png").write_bytes((tmp_path / "grey.png").read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read"):
        transform([tmp_path / "cut.png"])
    with pytest.raises(DataError, match="ndarray"):
        transform([np.zeros((4, 4, 3))])  # type: ignore[list-item]


def test_wrong_fields_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean crop"):
        ImageTransform(size=8, mode="crp")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="std"):
        ImageTransform(size=8, std=(0, 1, 1))
    with pytest.raises(ConfigError, match="crop_scale"):
        ImageTransform(size=8, crop_scale=(0.9, 1.1))
