"""Image tokenizers: the quantizer's promises, drawing, stored codes, and training through the usual module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import zoo
from zoo.capabilities import EncodeImages, ReconstructImages
from zoo.errors import ConfigError, DataError
from zoo.tokenizers.quantizer import Quantizer
from zoo.tokenizers.stored import StoredCodesConfig, store_codes, write_codes
from zoo.tokenizers.vq import VQConfig, VQTokenizer


def quantizer(codes: int = 6, width: int = 4, seed: int = 0, **options: float) -> Quantizer:
    torch.manual_seed(seed)
    made = Quantizer(codes, width, **options)  # type: ignore[arg-type]
    made.started.fill_(True)
    return made


def test_codes_have_unit_length_and_the_nearest_has_the_largest_cosine() -> None:
    made = quantizer()
    x = torch.randn(5, 7, 4) * 3
    out = made.eval()(x)
    torch.testing.assert_close(made.codebook.norm(dim=-1), torch.ones(6))
    cosine = F.normalize(x, dim=-1) @ made.codebook.T
    squared = (F.normalize(x, dim=-1)[..., None, :] - made.codebook).square().sum(-1)
    assert torch.equal(out.codes, cosine.argmax(-1))
    assert torch.equal(out.codes, squared.argmin(-1))
    torch.testing.assert_close(out.vectors, made.codebook[out.codes])


def test_gradient_passes_straight_through_to_the_unit_vectors() -> None:
    made, weight = quantizer().eval(), torch.randn(5, 4)
    z = F.normalize(torch.randn(5, 4), dim=-1).requires_grad_()
    (made(z).vectors * weight).sum().backward()
    assert z.grad is not None
    tangent = weight - (weight * z.detach()).sum(-1, keepdim=True) * z.detach()  # of the normalisation at unit length
    torch.testing.assert_close(z.grad, tangent)
    z.grad = None
    out = made(z)
    out.commitment.backward()
    wanted = 2 * (z.detach() - made.codebook[out.codes]) / z.numel()
    wanted = wanted - (wanted * z.detach()).sum(-1, keepdim=True) * z.detach()
    torch.testing.assert_close(z.grad, wanted)


def test_codebook_follows_by_moving_averages_and_gets_no_gradient() -> None:
    made = quantizer(decay=0.9).train()
    assert list(made.parameters()) == []
    before, x = made.codebook.clone(), torch.randn(40, 4)
    z = F.normalize(x, dim=-1)
    codes = (z @ before.T).argmax(-1)
    made(x)
    for number in range(6):
        own = z[codes == number]
        wanted = before[number]
        if len(own):
            wanted = F.normalize(0.9 * before[number] + 0.1 * F.normalize(own.sum(0), dim=-1), dim=-1)
        torch.testing.assert_close(made.codebook[number], wanted)
    assert not torch.equal(made.codebook, before)
    torch.testing.assert_close(made.usage, 0.1 * torch.bincount(codes, minlength=6).float())


def test_codes_that_nobody_uses_start_again_at_a_vector_of_the_batch() -> None:
    made = quantizer(decay=0.5, restart=0.1).train()
    made.codebook[:3] = F.normalize(torch.tensor([[1.0, 0, 0, 0]]), dim=-1) * torch.tensor([[1.0], [-1], [-1]])
    x = torch.tensor([[1.0, 0.1, 0, 0]]).repeat(60, 1)
    for _ in range(8):
        made(x)
    torch.testing.assert_close(made.codebook, F.normalize(x, dim=-1)[:6], atol=1e-2, rtol=0)
    kept = quantizer(decay=0.5).train()
    before = kept.codebook.clone()
    for _ in range(8):
        kept(x)
    assert (kept.codebook != before).any(-1).sum() == 1


def test_codebook_stays_in_evaluation_and_without_gradients() -> None:
    made = quantizer().train()
    before = made.codebook.clone()
    with torch.no_grad():
        made(torch.randn(9, 4))
    made.eval()(torch.randn(9, 4))
    assert torch.equal(made.codebook, before)


def test_codebook_starts_from_k_means_of_the_first_batch() -> None:
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(3, 8), dim=-1)
    x = centres.repeat_interleave(50, 0) + 0.02 * torch.randn(150, 8)
    made = Quantizer(64, 8).train()
    made(x)
    assert bool(made.started)
    best = (F.normalize(x, dim=-1) @ made.codebook.T).amax(-1)
    assert best.min() > 0.99
    assert len(torch.unique(made.codebook, dim=0)) == 64  # equal vectors would make ties


TINY = VQConfig(image_size=32, patch_size=8, vocab_size=50, width=64, blocks=1, code_width=8)


def test_encode_and_decode_agree_with_forward() -> None:
    torch.manual_seed(0)
    made, pixels = VQTokenizer(TINY).eval(), torch.randn(3, 3, 32, 32)
    drawn, quantized = made(pixels)
    codes = made.encode(pixels)
    assert codes.shape == (3, 16)
    assert codes.dtype == torch.int64
    assert not codes.requires_grad
    assert torch.equal(codes, quantized.codes.flatten(1))
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 50
    torch.testing.assert_close(made.decode(codes), drawn)


def test_encoding_leaves_the_codebook_alone_even_in_training() -> None:
    torch.manual_seed(0)
    made = VQTokenizer(TINY).train()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    made.encode(torch.randn(2, 3, 32, 32))
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())


def test_codes_are_those_of_fp32_under_autocast() -> None:
    torch.manual_seed(3)
    made = VQTokenizer(VQConfig(image_size=32, patch_size=8, width=32, vocab_size=256))
    images = torch.randn(8, 3, 32, 32)
    codes = made.encode(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(made.encode(images), codes)
        assert made._vectors(images).dtype == torch.bfloat16


def test_grid_follows_patch_and_image() -> None:
    assert VQConfig().grid == (14, 14)
    assert VQConfig().vocab_size == 8192
    for patch in (2, 4, 7, 14, 16):
        config = VQConfig(image_size=4 * patch, patch_size=patch, vocab_size=9, width=64, blocks=0)
        drawn, quantized = VQTokenizer(config).eval()(torch.randn(1, 3, 4 * patch, 4 * patch))
        assert quantized.codes.shape == (1, 4, 4)
        assert drawn.shape == (1, 3, 4 * patch, 4 * patch)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 100}, "multiple of patch_size"),
        ({"vocab_size": 1}, "2 or more"),
        ({"width": 48}, "multiple of 32"),
        ({"decay": 1.0}, "decay"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQConfig(**fields)  # type: ignore[arg-type]


def test_another_image_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="image_tokenizer"):
        VQTokenizer(TINY).encode(torch.zeros(1, 3, 40, 40))


# -- through the module ------------------------------------------------------------------------------------------------


def pictures(count: int = 6) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 4, 4, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(p.numpy()).resize((64, 64), Image.Resampling.NEAREST) for p in pixels]


def test_training_draws_better_and_uses_codes() -> None:
    module = zoo.build("vq-tokenizer", scale="tiny", image_tokenizer={"vocab_size": 64}, seed=1)
    images = pictures()
    batch = {"pixel_values": module.processor.encode_images(images)}
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    module.train()
    losses = []
    for _ in range(40):
        loss, report = module.losses(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    assert report["vq-reconstruction/codes_used"] > 8
    wanted, drawn = module.prepared_images(images), module.reconstruct_images(images)
    codes = module.image_codes(images)
    assert isinstance(module.model, EncodeImages)
    assert isinstance(module.model, ReconstructImages)
    assert codes.shape == (6, 16)
    assert drawn.shape == wanted.shape == (6, 3, 64, 64)
    flat = wanted.mean((0, 2, 3), keepdim=True)
    assert (drawn - wanted).square().mean() < (flat - wanted).square().mean()
    assert 0 <= drawn.min() <= drawn.max() <= 1


def test_reported_psnr_is_of_values_from_nought_to_one() -> None:
    module = zoo.build("vq-tokenizer", scale="tiny", seed=1).eval()
    batch = {"pixel_values": module.processor.encode_images(pictures())}
    outputs = module.model(batch)
    _, report = module.objectives["vq-reconstruction"](module.model, batch, outputs)
    error = ((outputs["reconstruction"] - batch["pixel_values"]) * 0.5).square().mean()
    torch.testing.assert_close(report["psnr"], -10 * error.log10())
    share = torch.bincount(outputs["codes"].flatten()).float() / outputs["codes"].numel()
    kept = share[share > 0]
    torch.testing.assert_close(report["perplexity"], (-(kept * kept.log()).sum()).exp())


def test_task_measures_held_out_images(tmp_path: Path) -> None:
    from zoo.evaluation.run import evaluate
    from zoo.plugin import catalogue

    module = zoo.build("vq-tokenizer", scale="tiny", seed=1).eval()
    source = catalogue()["data"].parse("openmoji", {}, "data").build(64)
    task = catalogue()["task"].parse("reconstruction", {"items": 5}, "reconstruction").build()
    result = evaluate(module.model, source, "test", [task], tmp_path)
    values = result["metrics"]["reconstruction"]
    assert values["images"] == 5
    assert 1 <= values["perplexity"] <= values["codes_used"] <= 5 * 16
    assert values["codebook_share"] == values["codes_used"] / module.model.codebook_size
    ids = [row["item"] for row in result["results"]["reconstruction"].items]
    images = [source.sample(i).image for i in ids]
    error = (module.reconstruct_images(images) - module.prepared_images(images)).square().flatten(1).mean(1)
    assert values["psnr"] == pytest.approx(float((-10 * error.log10()).mean()), abs=1e-3)
    drawn, wanted = module.reconstruct_images(images), module.prepared_images(images)
    assert values["l1"] == pytest.approx(float((drawn - wanted).abs().mean()), abs=1e-5)
    assert values["ssim"] == pytest.approx(ssim(drawn, wanted), abs=1e-4)


def ssim(x: torch.Tensor, y: torch.Tensor) -> float:
    """Wang et al. 2004, with its Gaussian window; borders reflected, as torchmetrics has it."""
    line = torch.exp(-((torch.arange(11.0) - 5) ** 2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 11, 11)

    def local(z: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(z, (5, 5, 5, 5), mode="reflect"), window, groups=3)

    mx, my = local(x), local(y)
    vx, vy, cov = local(x * x) - mx**2, local(y * y) - my**2, local(x * y) - mx * my
    above = (2 * mx * my + 0.01**2) * (2 * cov + 0.03**2)
    below = (mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2)
    return float((above / below).mean())


# -- stored codes ------------------------------------------------------------------------------------------------------


def stored(path: Path, **fields: int) -> StoredCodesConfig:
    sizes = {"image_size": 64, "patch_size": 16, "vocab_size": 1024, **fields}
    return StoredCodesConfig(path=str(path), **sizes)  # type: ignore[arg-type]


def test_stored_codes_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    from zoo.plugin import catalogue

    module = zoo.build("vq-tokenizer", scale="tiny", seed=1).eval()
    source = catalogue()["data"].parse("openmoji", {}, "data").build(64)
    ids = list(source.ids("test"))[:7]

    class Few:
        def ids(self, split: str) -> list[str]:
            return ids

        def sample(self, id: str) -> object:
            return source.sample(id)

    assert store_codes(module, Few(), tmp_path / "codes.safetensors", splits=["test"]) == 7  # type: ignore[arg-type]
    found = stored(tmp_path / "codes.safetensors").build().lookup([ids[3], ids[0]])
    assert torch.equal(found, module.image_codes([source.sample(ids[3]).image, source.sample(ids[0]).image]))


def test_stored_codes_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "codes.safetensors"
    with pytest.raises(ConfigError, match="no file of codes"):
        stored(path).build().lookup(["a"])
    with pytest.raises(ConfigError, match="outside a codebook of 4"):
        write_codes(path, ["a"], torch.tensor([[7]]), 4)
    with pytest.raises(ConfigError, match="one row an id"):
        write_codes(path, ["a", "b"], torch.tensor([[7]]), 8)
    write_codes(path, ["a"], torch.arange(16)[None], 1024)
    with pytest.raises(DataError, match="no codes of sample 'b'"):
        stored(path).build().lookup(["a", "b"])
    with pytest.raises(ConfigError, match="expected 64"):
        stored(path, patch_size=8).build().lookup(["a"])
    with pytest.raises(ConfigError, match="out of 1024, expected 16 out of 99"):
        stored(path, vocab_size=99).build().lookup(["a"])
    path.write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="write it again"):
        stored(path).build().lookup(["a"])


def test_stored_codes_cannot_be_trained() -> None:
    with pytest.raises(ConfigError, match="choose image_tokenizer=vq"):
        zoo.build("vq-tokenizer", scale="tiny", image_tokenizer="stored-codes")
