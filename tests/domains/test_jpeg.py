"""The estimated size of a JPEG file: against PIL's files, by its gradient, and as a reward."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import rewards
from rgdiff.domains.images import jpeg, tasks
from rgdiff.domains.images.data import from_uint8, to_uint8

Image = pytest.importorskip("PIL.Image", reason="files to compare with need Pillow")
SKIMAGE = ("coffee astronaut camera motorcycle_left ihc chelsea coins page brick grass text cell moon").split()


def scikit_learns() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    return [np.asarray(image) for image in load_sample_images().images]


def scikit_images() -> list[np.ndarray]:
    folder = pytest.importorskip("skimage", reason="its pictures").__path__[0]
    return [np.asarray(Image.open(f"{folder}/data/{name}.png").convert("RGB")) for name in SKIMAGE]


def pieces(pictures: list[np.ndarray], side: int, each: int) -> np.ndarray:
    """Squares of the pictures at several scales, uint8 [N, side, side, 3]."""
    draw, out = np.random.default_rng(0), []
    for picture in pictures:
        for scale in np.resize([1.0, 0.7, 0.5, 0.35], each):
            high, wide = (max(side, int(scale * n)) for n in picture.shape[:2])
            small = np.asarray(Image.fromarray(picture).resize((wide, high), Image.Resampling.BICUBIC))
            top, left = draw.integers(0, high - side + 1), draw.integers(0, wide - side + 1)
            out.append(small[top : top + side, left : left + side])
    return np.stack(out)


def grey(pictures: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(one).convert("L"))[..., None] for one in pictures])


def agreement(pictures: np.ndarray, quality: int, softness: float = 0.05) -> tuple[float, float]:
    """Correlation of the estimated sizes with PIL's, and the mean relative error."""
    estimate = jax.jit(functools.partial(jpeg.size, quality=quality))
    parts = [
        estimate(jnp.asarray(from_uint8(pictures[i : i + 8])), softness=softness) for i in range(0, len(pictures), 8)
    ]
    found, true = np.concatenate(parts), -np.asarray(rewards.score(jpeg.exact(quality), from_uint8(pictures)))
    return np.corrcoef(found, true)[0, 1], float(np.mean(np.abs(found / true - 1)))


def test_sizes_are_those_of_pils_files():
    correlation, error = agreement(pieces(scikit_learns(), 64, 8), 95)
    assert correlation > 0.999 and error < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("channels", [1, 3])
def test_sizes_of_many_pictures(channels, quality):
    pictures = pieces([*scikit_learns(), *scikit_images()], 120, 4)  # 120 is no multiple of 16
    pictures = grey(pictures) if channels == 1 else pictures
    correlation, error = agreement(pictures, quality)
    assert correlation > 0.999 and error < 0.04
    correlation, error = agreement(pictures, quality, 0.01)  # near to rounding: the count of libjpeg
    assert correlation > 0.999 and error < 0.015


@pytest.mark.slow
def test_gradient_is_that_of_finite_differences():
    draw = np.random.default_rng(1)
    with jax.enable_x64(True):
        x = jnp.asarray(from_uint8(grey(pieces(scikit_learns(), 16, 1))).astype(np.float64) * 0.9)
        along = jnp.asarray(draw.normal(size=x.shape)) / 100
        assert x.dtype == np.float64
        loss = jax.jit(lambda s: jnp.sum(jpeg.size(x + s * along, softness=0.1)))
        step = 1e-4
        numeric = float(loss(step) - loss(-step)) / (2 * step)
        np.testing.assert_allclose(jax.grad(loss)(0.0), numeric, rtol=1e-4)
    assert abs(numeric) > 1e-4


@pytest.mark.slow
def test_steps_along_the_gradient_make_pils_file_smaller_and_larger():
    x = jnp.asarray(from_uint8(pieces(scikit_learns(), 32, 1)))
    kept = rewards.score(jpeg.exact(), x)
    for make, sign in ((jpeg.compressibility, 1), (jpeg.incompressibility, -1)):
        gradient = jax.jit(jax.grad(lambda x, make=make: jnp.sum(make()(x))))
        y = x
        for _ in range(10):
            y = jnp.clip(y + 0.01 * jnp.sign(gradient(y)), -1, 1)
        assert np.all(sign * (rewards.score(jpeg.exact(), y) - kept) > 0.07)  # kB, of 1.4 and 1.2


def test_what_is_no_picture_or_quality_is_refused():
    with pytest.raises(ValueError, match=r"images \[B, H, W, 1 or 3\], got shape \[1, 8, 8, 4\]"):
        jpeg.size(jnp.zeros((1, 8, 8, 4)))
    for wrong in (0, 101, 9.5, True):
        with pytest.raises(ValueError, match="whole number, 1"):
            jpeg.compressibility(wrong)
    with pytest.raises(ValueError, match="softness must be a finite number > 0"):
        jpeg.compressibility(softness=0.0)


@pytest.mark.slow
def test_a_broken_picture_is_infeasible():
    x = jnp.zeros((2, 8, 8, 1)).at[0, 0, 0, 0].set(jnp.nan)
    for reward in (jpeg.compressibility(), jpeg.exact()):
        assert np.isnan(rewards.score(reward, x)).tolist() == [True, False]


def test_the_task_is_judged_by_the_true_size():
    task = tasks.jpeg(larger=True)
    x = jnp.zeros((1, 8, 8, 1))
    assert float(task.heldout(x)[0]) == np.float32(len(jpeg.encode(to_uint8(x)[0])) / 1000)
    assert abs(float(task.reward(x)[0]) - float(task.heldout(x)[0])) < 0.003
    assert rewards.host_rewards(tasks.jpeg(host=True).reward)
