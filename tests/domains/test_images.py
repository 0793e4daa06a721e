"""The image domain: splits, IDX files, the classifier and the rewards."""

from __future__ import annotations

import functools
import gzip
import os
import types
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import metrics
from rgdiff.domains.images import data as images
from rgdiff.domains.images import rewards
from rgdiff.domains.images import tasks as image_tasks
from rgdiff.domains.images.classifier import Classifier, augment, train_classifier
from rgdiff.domains.images.files import pictures
from rgdiff.domains.images.judge import ImageJudge
from rgdiff.runtime.report import png

pytestmark = pytest.mark.xdist_group("images")  # one process trains the classifiers
DATA = Path(os.environ.get("RGDIFF_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


@pytest.fixture(scope="module")
def digits():
    return images.digits()


@pytest.fixture(scope="module")
def classifiers(digits):
    """The classifier that guides and the one that evaluates, as the runner trains them but for a third of the steps."""
    guide = train_classifier(jax.random.key(0), digits.train_x, digits.train_y, digits.classes, steps=300)
    judge = train_classifier(jax.random.key(1), digits.heldout_x, digits.heldout_y, digits.classes, steps=300)
    return guide, judge


def parts(domain):
    return [
        (domain.train_x, domain.train_y),
        (domain.heldout_x, domain.heldout_y),
        (domain.test_x, domain.test_y),
    ]


@functools.cache
def small_tree(seed=0, size=4, classes=3):
    """A classifier that was only initialised: one step at rate zero."""
    x = np.zeros((1, size, size, 1), np.float32)
    return train_classifier(
        jax.random.key(seed), x, np.zeros(1, int), classes, steps=1, learning_rate=1e-9, width=2, features=5
    )


# data


def test_digits_are_sklearns_and_covered_once(digits):
    from sklearn.datasets import load_digits

    source = load_digits()
    whole = np.concatenate([x for x, _ in parts(digits)]), np.concatenate([y for _, y in parts(digits)])
    assert whole[0].shape == (1797, *digits.shape) and whole[0].dtype == np.float32 and whole[1].dtype == np.int32

    def rows(x, y):  # back to 0..16, with the label; a multiset of rows
        return sorted(map(bytes, np.column_stack([x.reshape(len(x), -1), y]).astype(np.uint8)))

    assert rows((whole[0] + 1) * 8, whole[1]) == rows(source.images, source.target)


@pytest.mark.parametrize("counts", [(7, 100, 31), (1, 2, 3), (0, 0, 0)])
def test_split_is_a_stratified_partition(counts):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), counts))
    indices = images.split(labels)
    assert sorted(np.concatenate(indices)) == list(range(len(labels)))
    for share, chosen in zip((0.5, 0.375, 0.125), indices, strict=True):
        got = np.bincount(labels[chosen], minlength=3)
        assert np.all(np.abs(got - share * np.array(counts)) <= 1)


def test_split_is_deterministic_and_interleaves_classes(digits):
    again = images.digits()
    for (x, y), (x2, y2) in zip(parts(digits), parts(again), strict=True):
        np.testing.assert_array_equal(x, x2)
        np.testing.assert_array_equal(y, y2)
        assert (np.diff(y) != 0).mean() > 0.8  # sorted labels would give 9 changes in all


def test_larger_size_pads_with_background(digits):
    large = images.digits(size=12)
    assert large.shape == (12, 12, 1)
    np.testing.assert_array_equal(large.test_x[:, 2:10, 2:10], digits.test_x)
    assert large.test_x.sum() == pytest.approx(digits.test_x.sum() - len(large.test_x) * (144 - 64), rel=1e-5)


def test_domain_is_a_pytree_with_static_structure(digits):
    doubled = jax.tree.map(lambda leaf: 2 * leaf, digits)
    assert (doubled.name, doubled.shape, doubled.classes, doubled.value_range) == (
        "digits",
        (8, 8, 1),
        10,
        (-1, 1),
    )
    assert len(jax.tree.leaves(digits)) == 6


def test_uint8_round_trip_and_clipping():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(images.to_uint8(images.from_uint8(pixels)), pixels)
    x = np.array([-np.inf, -3, -1, 0.0, 1, 7, np.inf, np.nan])
    np.testing.assert_array_equal(images.to_uint8(x), [0, 0, 0, 128, 255, 255, 255, 0])  # 127.5 rounds to even


def write_idx(path, array, *, magic=None, shape=None, cut=0, pack=False):
    header = bytes([0, 0, 8, array.ndim]) if magic is None else magic
    data = header + b"".join(n.to_bytes(4, "big") for n in shape or array.shape) + array.tobytes()
    data = data[: len(data) - cut]
    path.write_bytes(gzip.compress(data) if pack else data)
    return path


@pytest.fixture
def idx(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 28, 28), dtype=np.uint8)
    labels = np.repeat(np.arange(10, dtype=np.uint8), 4)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", pixels, pack=True)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", labels)
    return tmp_path, pixels, labels


def test_mnist_reads_packed_and_plain_files(idx, monkeypatch):
    folder, pixels, labels = idx
    monkeypatch.delenv("RGDIFF_DATA", raising=False)
    domain = images.mnist(data_dir=folder, size=32)
    assert domain.shape == (32, 32, 1)
    order = np.concatenate(images.split(labels))
    got = np.concatenate([domain.decode(x) for x, _ in parts(domain)])
    np.testing.assert_array_equal(got[:, 2:30, 2:30, 0], pixels[order])
    assert got[:, :2].max() == 0 and got[:, :, 30:].max() == 0
    np.testing.assert_array_equal(np.concatenate([y for _, y in parts(domain)]), labels[order])

    monkeypatch.setenv("RGDIFF_DATA", str(folder))
    named = images.mnist(images=folder / "t10k-images-idx3-ubyte.gz", labels=folder / "t10k-labels-idx1-ubyte")
    for other in (images.mnist(), named):
        np.testing.assert_array_equal(other.train_x, domain.train_x[:, 2:30, 2:30])


def test_damaged_idx_files_are_refused_in_one_line(idx):
    folder, pixels, labels = idx
    cases = [
        (
            write_idx(folder / "magic", pixels, magic=b"\0\0\x0d\x03"),
            "expected magic 00000803, found 00000d03",
        ),
        (write_idx(folder / "axes", labels), "expected magic 00000803, found 00000801"),
        (
            write_idx(folder / "short", pixels, cut=1),
            r"shape \(40, 28, 28\), 31376 bytes in all, found 31375",
        ),
        (write_idx(folder / "long", pixels, shape=(39, 28, 28)), "30592 bytes in all, found 31376"),
        (write_idx(folder / "huge", pixels, shape=(2**32 - 1,) * 3), "found 31376"),
        (write_idx(folder / "header", pixels, cut=31376 - 10), "truncated in its header"),
        (write_idx(folder / "empty", pixels, cut=31376), "found nothing"),
        (write_idx(folder / "square", pixels[:, :27]), "expected images of 28 x 28 pixels, found 27 x 28"),
        (write_idx(folder / "count", pixels[:39]), "39 images but .* 40 labels"),
    ]
    packed = (folder / "t10k-images-idx3-ubyte.gz").read_bytes()
    for name, data in (("cut.gz", packed[:-20]), ("flipped.gz", packed[:99] + b"\0\0\0\0" + packed[103:])):
        (folder / name).write_bytes(data)
        cases.append((folder / name, "damaged gzip file"))
    for path, words in cases:
        with pytest.raises(ValueError, match=words) as caught:
            images.mnist(images=path, labels=folder / "t10k-labels-idx1-ubyte")
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    write_idx(folder / "eleven", labels + 1)
    with pytest.raises(ValueError, match="expected labels 0..9, found 10"):
        images.mnist(data_dir=folder, images="t10k-images-idx3-ubyte.gz", labels="eleven")


def test_missing_files_say_what_and_where(tmp_path, monkeypatch):
    monkeypatch.delenv("RGDIFF_DATA", raising=False)
    for call in (images.mnist, lambda: images.mnist(tmp_path), lambda: images.mnist(tmp_path, "a", "b")):
        with pytest.raises(FileNotFoundError, match="expected .*https://.*data_dir= or .*RGDIFF_DATA") as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="only one of images= and labels="):
        images.mnist(images="a")
    for bad in (6, 9):
        with pytest.raises(ValueError, match=f"size={bad}"):
            images.digits(size=bad)


def test_real_mnist():
    if not (DATA / "mnist-t10k-images-idx3-ubyte.gz").exists():
        pytest.skip(f"needs mnist-t10k-images-idx3-ubyte.gz and -labels-idx1-ubyte.gz in {DATA}; set RGDIFF_DATA")
    domain = images.mnist(data_dir=DATA)
    assert [len(y) for _, y in parts(domain)] == pytest.approx([5000, 3750, 1250], abs=5)
    counts = np.bincount(np.concatenate([y for _, y in parts(domain)]))
    # the test set's class counts, as published (e.g. by TensorFlow Datasets)
    np.testing.assert_array_equal(counts, [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009])
    mean = np.average([x.mean() for x, _ in parts(domain)], weights=[len(y) for _, y in parts(domain)])
    assert (mean + 1) / 2 == pytest.approx(0.1325, abs=1e-4)  # the test set's mean pixel, as widely quoted


# the classifier


def test_copies_of_an_image_are_in_one_split():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (40, 4, 4, 1)).astype(np.float32)
    twice = images.custom(lambda: (np.concatenate([x, x]), np.tile(np.arange(40) % 2, 2)))
    parts = [{image.tobytes() for image in getattr(twice, f"{part}_x")} for part in ("train", "heldout", "test")]
    assert sum(map(len, parts)) == 40 and len(set.union(*parts)) == 40
    assert len(twice.train_x) + len(twice.heldout_x) + len(twice.test_x) == 80
    once = images.custom(lambda: (x, np.arange(40) % 2))
    assert parts[0] == {image.tobytes() for image in once.train_x}


def all_rows(domain):
    """Images as 8 bits and labels of a domain, in an order of their own."""
    x, y = (np.concatenate([getattr(domain, f"{part}_{of}") for part in ("train", "heldout", "test")]) for of in "xy")
    rows = domain.decode(x).reshape(len(x), -1)
    order = np.lexsort(rows.T)
    return rows[order], y[order]


def test_pictures_of_three_kinds_of_files_are_one_domain(tmp_path):
    """CIFAR-10's rows are a label and planes of red, green and blue."""
    pytest.importorskip("PIL", reason="Pillow, which reads PNG files")
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8), np.arange(20) % 4
    np.savez(tmp_path / "all.npz", images=pixels, labels=labels)
    rows = np.concatenate([labels[:, None], pixels.transpose(0, 3, 1, 2).reshape(20, -1)], 1).astype(np.uint8)
    (tmp_path / "bin").mkdir()
    rows[:12].tofile(tmp_path / "bin/data_batch_1.bin")
    rows[12:].tofile(tmp_path / "bin/test_batch.bin")
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        (tmp_path / "png" / f"class{label}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "png" / f"class{label}" / f"{i:02}.png").write_bytes(png(image))
    wanted, classes = all_rows(pictures(tmp_path / "all.npz"))
    assert wanted.shape == (20, 3072) and classes.max() == 3
    for form in ("bin", "png"):
        found, y = all_rows(pictures(tmp_path / form))
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(y, classes)


def test_pictures_that_are_none_are_refused_in_one_line(tmp_path):
    pytest.importorskip("PIL", reason="Pillow, which reads PNG files")
    one = np.zeros((4, 4, 3), np.uint8)
    for name in ("empty", "pickled", "cut", "sizes", "broken", "few"):
        (tmp_path / name).mkdir()
    (tmp_path / "pickled/data_batch_1").write_bytes(b"\x80")
    (tmp_path / "cut/data_batch_1.bin").write_bytes(bytes(3000))
    (tmp_path / "sizes/a.png").write_bytes(png(one))
    (tmp_path / "sizes/b.png").write_bytes(png(one[:2]))
    (tmp_path / "broken/a.png").write_bytes(png(one)[:40])
    (tmp_path / "few/a.png").write_bytes(png(one))
    np.savez(tmp_path / "other.npz", pixels=one)
    for name, message in (
        ("nowhere", "no images at .*nowhere"), ("empty", "holds no picture"), ("pickled", "a pickle, which is not read"),
        ("cut", "data_batch_1.bin has 3,000 bytes"), ("sizes", r"b.png is \[2, 4, 3\], and the first \[4, 4, 3\]"),
        ("broken", "a.png is no readable picture"), ("few", "at least 8 images"), ("other.npz", "has pixels: expected `images`"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message) as error:
            pictures(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_classifiers_learn_from_either_split(digits, classifiers):
    for classifier in classifiers:
        assert metrics.classifier_accuracy(classifier, digits.test_x, digits.test_y) >= 0.96


@pytest.mark.slow
def test_training_is_a_function_of_its_key(digits):
    def fit(seed):
        return train_classifier(jax.random.key(seed), digits.test_x, digits.test_y, 10, steps=5, width=4, features=8)

    jax.tree.map(np.testing.assert_array_equal, fit(0).params, fit(0).params)
    assert not np.allclose(fit(0).params["head"]["w"], fit(1).params["head"]["w"])


def test_layers_are_stride_two_convolutions():
    """Against XLA's own convolution, on an image that is not square."""
    from rgdiff.domains.images.classifier import _patches

    x_key, w_key = jax.random.split(jax.random.key(0))
    x, w = jax.random.normal(x_key, (2, 8, 12, 3)), jax.random.normal(w_key, (27, 5))
    labels = ("NHWC", "HWIO", "NHWC")
    pads = [(1, 1), (1, 1)]
    expected = jax.lax.conv_general_dilated(x, w.reshape(3, 3, 3, 5), (2, 2), pads, dimension_numbers=labels)
    np.testing.assert_allclose(_patches(x) @ w, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_augmentation_moves_whole_images():
    x = -jnp.ones((200, 4, 4, 1)).at[:, 1, 2].set(-1.0)  # one pixel of ink at (1, 2)
    moved = augment(jax.random.key(0), x, 0.0, 1)
    assert jnp.all(jnp.sum(moved == 1, axis=(1, 2, 3)) == 1) and jnp.all(jnp.abs(moved) == 1)
    places = {tuple(int(i) for i in place) for place in jnp.argwhere(moved[..., 0] == 1)[:, 1:]}
    assert places == {(i, j) for i in (0, 1, 2) for j in (1, 2, 3)}
    noisy = augment(jax.random.key(1), jnp.zeros((4000, 2, 2, 1)), 0.6, 0)
    assert float(noisy.var()) == pytest.approx(0.6**2 / 3, rel=0.05)  # E[(0.6 U)^2]


def test_classifier_refuses_what_does_not_fit():
    good = np.zeros((3, 8, 8, 1)), np.zeros(3, int)
    for x, y, words in [
        (np.zeros((3, 7, 8, 1)), good[1], "divisible by 4"),
        (good[0], np.zeros(2, int), "one integer label for each of 3"),
        (good[0], np.zeros(3), "one integer label"),
        (good[0], np.full(3, 2), r"all in 0\.\.1"),
    ]:
        with pytest.raises(ValueError, match=words):
            train_classifier(jax.random.key(0), x, y, 2)


@pytest.mark.slow
def test_classifier_is_a_pytree_of_parameters():
    classifier = small_tree()
    x = jax.random.normal(jax.random.key(1), (6, 4, 4, 1))
    assert classifier.features(x).shape == (6, 5) and classifier.logits(x).shape == (6, 3)
    np.testing.assert_array_equal(classifier(x), classifier.logits(x))
    np.testing.assert_allclose(jax.jit(Classifier.logits)(classifier, x), classifier(x), rtol=1e-5, atol=1e-6)


# rewards


def test_likeness_is_minus_the_distance_to_the_nearest_image(digits, monkeypatch):
    real, x = digits.heldout_x[:30], np.concatenate([digits.heldout_x[3:5], np.zeros((1, 8, 8, 1), np.float32)])
    expected = -np.sqrt(((x[:, None] - real) ** 2).mean((2, 3, 4))).min(1)
    np.testing.assert_allclose(rewards.likeness(real)(jnp.asarray(x)), expected, atol=1e-5)
    gradient = jax.grad(lambda x: rewards.likeness(real)(x).sum())(jnp.asarray(x))  # also where an image is met
    assert np.isfinite(gradient).all() and np.abs(gradient[2]).max() > 0
    with pytest.raises(ValueError, match=r"N >= 1"):
        rewards.likeness(real[:0])
    judge = types.SimpleNamespace(classifier=None)
    monkeypatch.setattr(images, "train_classifier", functools.partial(train_classifier, steps=2))
    few = image_tasks.digit(digits, judge, jax.random.key(0), examples=20, judged="likeness")
    assert few.heldout.images.shape[0] == (digits.heldout_y == 3).sum()
    with pytest.raises(ValueError, match=r"reward.examples must be 10 .* got 9"):
        image_tasks.digit(digits, judge, jax.random.key(0), examples=9)


@pytest.mark.slow
def test_classifier_reward_is_a_log_probability():
    classifier = small_tree()
    x = jax.random.normal(jax.random.key(2), (5, 4, 4, 1))
    logits = np.asarray(classifier(x), np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for target in range(3):
        np.testing.assert_allclose(rewards.classifier_reward(classifier, target)(x), expected[:, target], rtol=1e-5)
    labels = jnp.array([2, 0, 1, 3, -1])
    for reward in (rewards.classifier_reward(classifier, 1), rewards.classifier_reward(classifier)):
        got = reward(x, labels)
        np.testing.assert_allclose(got[:3], expected[np.arange(3), labels[:3]], rtol=1e-5)
        assert np.isnan(got[3:]).all()  # 3 and -1 are no classes
    with pytest.raises(ValueError, match="needs labels"):
        rewards.classifier_reward(classifier)(x)


def test_target_is_dynamic():
    classifier, traces = small_tree(), []

    @jax.jit
    def evaluate(reward, x):
        traces.append(1)
        return reward(x)

    x = jnp.zeros((2, 4, 4, 1))
    values = [evaluate(rewards.classifier_reward(classifier, c), x)[0] for c in range(3)]
    assert len(traces) == 1 and jnp.exp(jnp.stack(values)).sum() == pytest.approx(1, abs=1e-5)
    levels = [evaluate(rewards.ink(target), x)[0] for target in (0.0, 0.25)]
    assert len(traces) == 2 and levels == pytest.approx([-0.25, -0.0625])


@pytest.mark.slow
def test_guiding_reward_transfers_to_the_judge(digits, classifiers):
    """A few ascent steps on one classifier's reward from real images must convince the other too."""
    guide, judge = classifiers
    x = jnp.asarray(digits.test_x[digits.test_y == 3])
    reward, judged = rewards.classifier_reward(guide, 8), rewards.classifier_reward(judge, 8)
    climb = jax.jit(lambda x: jnp.clip(x + 0.05 * jnp.sign(jax.grad(lambda x: reward(x).sum())(x)), -1, 1))
    y = x
    for _ in range(10):
        y = climb(y)
    assert reward(y).mean() > reward(x).mean() + 3
    assert judged(y).mean() > judged(x).mean() + 3


@pytest.mark.parametrize("name", [pytest.param("class", marks=pytest.mark.slow), "symmetry", "ink", "ink target"])
@pytest.mark.first(3)
def test_gradients_are_directional_derivatives(name):
    reward = {
        "class": rewards.classifier_reward(small_tree(), 1),
        "symmetry": rewards.symmetry(),
        "ink": rewards.ink(),
        "ink target": rewards.ink(0.9),
    }[name]
    x_key, d_key = jax.random.split(jax.random.key(3))
    x = jax.random.uniform(x_key, (3, 4, 4, 1), minval=-0.9, maxval=0.9)
    direction = jax.random.normal(d_key, x.shape)
    values, slopes = jax.jvp(reward, (x,), (direction,))  # forward mode works too
    assert values.shape == (3,)
    gradient = jax.grad(lambda x: reward(x).sum())(x)
    np.testing.assert_allclose((gradient * direction).sum((1, 2, 3)), slopes, rtol=1e-4, atol=1e-6)
    difference = (reward(x + 0.01 * direction) - reward(x - 0.01 * direction)) / 0.02
    np.testing.assert_allclose(slopes, difference, rtol=1e-2, atol=1e-4)
    assert np.abs(slopes).min() > 1e-4


def test_symmetry_and_ink_by_hand():
    x = np.array([[[-1, 0.5, 1], [1, 1, 1]], [[1, 0, 1], [-1, -1, -1]]], np.float32)[..., None]
    np.testing.assert_allclose(rewards.symmetry()(jnp.asarray(x)), [-8 / 6, 0], rtol=1e-6)
    np.testing.assert_allclose(rewards.ink()(jnp.asarray(x)), [4.75 / 6, 2.5 / 6], rtol=1e-6)
    np.testing.assert_allclose(rewards.ink(0.5)(jnp.asarray(x)), -(np.array([1.75 / 6, 0.5 / 6]) ** 2), rtol=1e-5)
    np.testing.assert_allclose(rewards.ink()(jnp.asarray(100 * x[:1])), [5 / 6])  # bounded outside the range


def test_compressibility_counts_bytes():
    noise = np.random.default_rng(0).uniform(-1, 1, (16, 16, 1))
    x = np.stack([np.full((16, 16, 1), -1.0), noise, np.full((16, 16, 1), np.nan)]).astype(np.float32)
    blank, random, broken = rewards.ZlibSize(6)(x)
    assert blank == -len(zlib.compress(bytes(256), 6)) and np.isnan(broken)
    assert random < -256 < blank < 0
    assert rewards.ZlibSize(0)(x)[0] == -(256 + 11)  # stored: 2 + 5 + 4 bytes around the data (RFC 1950, 1951)


def test_compressibility_inside_compiled_code():
    x = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (3, 8, 8, 1)), jnp.float32).at[0].set(jnp.nan)
    traces = []

    @jax.jit
    def evaluate(reward, x):
        traces.append(1)
        return reward(x)

    for _ in range(2):
        np.testing.assert_array_equal(evaluate(rewards.compressibility(), x), rewards.ZlibSize(6)(np.asarray(x)))
    assert len(traces) == 1


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: rewards.classifier_reward(3, 1), "callable"),
        (lambda: rewards.classifier_reward(lambda x: x, -1), "target=-1"),
        (lambda: rewards.classifier_reward(lambda x: x, 0.5), "target=0.5"),
        (lambda: rewards.ink(1.5), "target=1.5"),
        (lambda: rewards.compressibility(10), "level=10"),
    ],
)
def test_rewards_refuse_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("hidden", "where"), [("left", np.s_[:, :4]), ("right", np.s_[:, 4:]), ("top", np.s_[:4]), ("bottom", np.s_[4:])]
)
def test_inpainting_sees_one_half_and_is_judged_by_the_other(digits, hidden, where):
    task = image_tasks.inpainted(digits, None, jax.random.key(0), image=3, hidden=hidden, noise=0.01)
    truth = digits.test_x[3]
    unseen = np.zeros((8, 8, 1), np.float32)
    unseen[where] = 1
    assert task.target == digits.test_y[3]
    own = task.reward(jnp.asarray(truth)[None])[0]
    np.testing.assert_allclose(own, 32 * (-np.log(0.01) - 0.5 * np.log(2 * np.pi) - 0.5), atol=4 * np.sqrt(32 / 2))
    np.testing.assert_allclose(task.reward(jnp.asarray(truth + unseen)[None])[0], own, rtol=1e-6)
    assert float(task.reward(jnp.asarray(truth + 1 - unseen)[None])[0]) < own - 1000
    np.testing.assert_allclose(task.heldout(jnp.asarray(truth + 0.3 * unseen + 1 - unseen)[None]), -0.3, rtol=1e-5)
    np.testing.assert_allclose(task.heldout.seen * (1 - unseen), truth * (1 - unseen), atol=0.05)


def test_downsampling_sees_block_means(digits):
    task = image_tasks.downsampled(digits, None, jax.random.key(0), image=3, factor=2, noise=0.001)
    means = digits.test_x[3].reshape(4, 2, 4, 2, 1).mean((1, 3))
    np.testing.assert_allclose(task.reward.y.reshape(4, 4, 1), means, atol=0.006)
    x = np.random.default_rng(0).normal(size=(5, 8, 8, 1)).astype(np.float32)
    np.testing.assert_allclose(
        task.reward.forward(jnp.asarray(x)), x.reshape(5, 4, 2, 4, 2).mean((2, 4)).reshape(5, 16), atol=1e-6
    )
    np.testing.assert_allclose(task.heldout.seen[::2, ::2], means, atol=0.006)
    np.testing.assert_allclose(task.heldout.seen[1::2, 1::2], means, atol=0.006)


def test_bad_measurements_are_one_line(digits):
    key = jax.random.key(0)
    for make, message in [
        (lambda: image_tasks.downsampled(digits, None, key, factor=3), "no blocks of 3 x 3"),
        (lambda: image_tasks.downsampled(digits, None, key, factor=0), "reward.factor"),
        (
            lambda: image_tasks.inpainted(digits, None, key, image=10**6),
            "reward.image is the number of a test image, 0 to",
        ),
        (lambda: image_tasks.inpainted(digits, None, key, image=2.0), "reward.image"),
        (lambda: image_tasks.inpainted(digits, None, key, hidden="middle"), "reward.hidden"),
        (lambda: image_tasks.inpainted(digits, None, key, noise=0.0), "reward.noise"),
        (lambda: image_tasks.inpainted(None, None, key), "choose an image domain"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def test_real_images_of_every_class_in_turn_even_of_small_or_empty_classes():
    x = np.arange(7, dtype=np.float32).reshape(7, 1, 1, 1) * np.ones((1, 4, 4, 1), np.float32)
    y = np.array([1, 2, 1, 2, 1, 1, 1])
    judge = ImageJudge.__new__(ImageJudge)
    judge.domain = types.SimpleNamespace(train_x=x, train_y=y, classes=3)
    assert judge.in_turn()[:7, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 1, 5]  # class 0 is empty, class 2 begins again


@pytest.mark.slow
def test_the_spread_of_the_priors_figures_is_that_of_other_draws(digits):
    """The jackknife's standard errors are near the spread over 40 sets of as many real images; none where an image was measured."""
    judge = image_tasks.ImageJudge.__new__(image_tasks.ImageJudge)
    flat = lambda x: np.asarray(x).reshape(len(x), -1)  # noqa: E731
    judge.domain, judge.classifier = digits, types.SimpleNamespace(features=flat)
    judge._features = lambda classifier, x: classifier.features(x)
    task = image_tasks.symmetric()
    every, rng = judge.real(task), np.random.default_rng(0)
    sets = [every[rng.choice(len(every), 100)] for _ in range(40)]
    errors = [judge.spread(types.SimpleNamespace(x0=x), task) for x in sets[:8]]
    features = every.reshape(len(every), -1)
    found = {
        "frechet": [metrics.frechet_distance(features, x) for x in sets],
        "diversity": [metrics.diversity(x) for x in sets],
    }
    for name, values in found.items():
        assert np.mean([error[name] for error in errors]) == pytest.approx(np.std(values), rel=0.5), name
    assert errors[0]["kl"] == 0.0 and 0 <= errors[0]["recall"] < 0.2
    assert judge.spread(types.SimpleNamespace(x0=sets[0][:5]), task) == {"kl": 0.0}
    measured = image_tasks.inpainted(digits, judge, jax.random.key(0))
    assert judge.spread(types.SimpleNamespace(x0=sets[0]), measured) == {}
    assert list(judge.references(measured))[0] == "the image, and what was seen of it"
