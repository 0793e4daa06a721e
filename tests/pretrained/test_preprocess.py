"""Resizes beside Pillow's, the order of resize, crop and normalisation, and gradients."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff.domains.images.data import from_uint8
from rgdiff.pretrained import preprocess
from rgdiff.pretrained.config import Config

GOLDEN = Path(__file__).parent / "golden" / "pillow_resize.npz"
SHAPES = ((13, 19), (13, 11), (31, 47))


def picture() -> np.ndarray:
    """Rings and noise, uint8 [20, 30, 3]."""
    y, x = np.mgrid[:20, :30]
    rings = np.sin(0.15 * (y - 8) ** 2 + 0.1 * (x - 12) ** 2)
    noise = np.random.RandomState(0).uniform(-60, 60, (20, 30, 3))
    return np.clip(128 + 120 * rings[..., None] + noise, 0, 255).astype(np.uint8)


def real_pictures() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    pictures = [np.asarray(image) for image in load_sample_images().images]
    try:
        from skimage import data
    except ImportError:
        return pictures
    return [*pictures, data.astronaut(), data.coffee(), data.chelsea()]


def resized(x: np.ndarray, shape: tuple[int, int], filter: str, rounded: bool) -> np.ndarray:
    out = preprocess.resize(jnp.asarray(x[None] / 255.0, jnp.float32), shape, filter, rounded=rounded)
    return 255 * np.asarray(out[0], np.float64)


def write_golden() -> None:
    """Write what Pillow makes of `picture`."""
    from PIL import Image

    made = {
        f"{name}_{shape[0]}_{shape[1]}": np.asarray(Image.fromarray(picture()).resize(shape[::-1], kind))
        for name, kind in (("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR))
        for shape in SHAPES
    }
    np.savez_compressed(GOLDEN, **made)


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
def test_a_resize_is_pillows(filter):
    golden = np.load(GOLDEN)
    for shape in SHAPES:
        expected = golden[f"{filter}_{shape[0]}_{shape[1]}"].astype(float)
        exact = np.abs(resized(picture(), shape, filter, True) - expected)
        assert exact.max() < 1.01 and np.mean(exact > 0.01) < 0.02, shape  # halves are rounded otherwise
        assert np.abs(resized(picture(), shape, filter, False) - expected).max() < 1.15, shape


@pytest.mark.slow
def test_real_pictures_are_resized_as_by_pillow():
    image = pytest.importorskip("PIL.Image", reason="Pillow, which is compared with")
    for x in real_pictures():
        for side in (224, 96):
            shape = preprocess._wanted(x.shape[:2], side)
            expected = np.asarray(image.fromarray(x).resize(shape[::-1], image.Resampling.BICUBIC), float)
            exact, plain = (np.abs(resized(x, shape, "bicubic", rounded) - expected) for rounded in (True, False))
            assert exact.max() < 1.01 and np.mean(exact > 0.01) < 0.003
            assert plain.max() < 1.15 and np.mean(plain > 1) < 1e-3


@pytest.mark.slow
def test_pixels_are_those_of_transformers_image_processor(tmp_path):
    pytest.importorskip("torch", reason="torch and transformers, which are compared with")
    processors = pytest.importorskip("transformers.models.clip.image_processing_pil_clip", reason="transformers 5")
    for options in (
        {},
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 24}, "resample": 2},
        {"do_center_crop": False, "size": {"height": 30, "width": 20}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ):
        processor = processors.CLIPImageProcessorPil(**options)
        processor.save_pretrained(tmp_path)
        for rounded, error in ((True, 1.01), (False, 1.15)):
            ours = preprocess.from_folder(tmp_path, rounded=rounded)
            for x in real_pictures():
                theirs = processor(x, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
                difference = np.asarray(ours(from_uint8(x)[None])[0]) - theirs
                assert np.abs(difference * ours.std * 255).max() < error


def test_a_shape_that_is_kept_is_not_touched():
    x = jnp.asarray(picture()[None] / 255.0)
    np.testing.assert_array_equal(preprocess.resize(x, (20, 30)), x)
    np.testing.assert_allclose(preprocess.resize_matrix(20, 20), np.eye(20), atol=1e-12)


def test_gradient_is_that_of_finite_differences():
    prepare = preprocess.clip(8)
    with jax.enable_x64(True):
        x = jnp.asarray(from_uint8(picture()[None]).astype(np.float64) * 0.5)
        along, weight = (
            jnp.asarray(np.random.RandomState(i).normal(size=n)) for i, n in ((1, x.shape), (2, (8, 8, 3)))
        )
        loss = jax.jit(lambda s: jnp.sum(weight * prepare(x + s * along) ** 2))
        numeric = float(loss(1e-5) - loss(-1e-5)) / 2e-5
        np.testing.assert_allclose(float(jax.grad(loss)(0.0)), numeric, rtol=1e-6)


def test_rounding_passes_the_gradient_on():
    x = jnp.asarray(from_uint8(picture()[None]))
    rounded, plain = (
        jax.jit(jax.grad(lambda x, r=r: jnp.sum(preprocess.clip(8, rounded=r)(x) * jnp.arange(8.0)[:, None])))(0.5 * x)
        for r in (True, False)
    )
    np.testing.assert_allclose(rounded, plain, atol=1e-6)


def test_pixels_are_clipped_before_they_are_normalised_and_grey_is_repeated():
    prepare = preprocess.clip(4)
    out = prepare(jnp.full((1, 8, 8, 1), 3.0))
    np.testing.assert_allclose(
        out[0, 0, 0], (1 - np.array(preprocess.CLIP_MEAN)) / np.array(preprocess.CLIP_STD), rtol=1e-5
    )
    assert out.shape == (1, 4, 4, 3)


def test_the_middle_is_kept():
    x = jnp.arange(5.0)[None, :, None, None] * jnp.ones((1, 5, 4, 1))
    assert preprocess.centre_crop(x, (2, 4))[0, :, 0, 0].tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="cannot crop pictures of 5 x 4 pixels to 6 x 4"):
        preprocess.centre_crop(x, (6, 4))


def test_settings_that_are_not_supported_are_refused_by_name():
    for wrong, message in (
        ({"resample": 1}, "resample=1 is not supported"),
        ({"do_rescale": False}, "does not support do_rescale = False"),
        ({"size": {"longest_edge": 3}}, "size=.*longest_edge.* is not supported"),
        ({"do_flip": True}, "does not know the setting do_flip = True"),
    ):
        with pytest.raises(ValueError, match=message):
            preprocess.from_config(Config(wrong))
    assert preprocess.from_config(Config({"size": 32, "crop_size": 32})).crop == (32, 32)
    with pytest.raises(ValueError, match=r"\[B, H, W, 1 or 3\], got shape \[1, 4, 4, 2\]"):
        preprocess.clip(4)(jnp.zeros((1, 4, 4, 2)))
