"""Image domains: real data in [-1, 1] with three disjoint splits, and the conversion to 8-bit pictures and back.

Images are float32 [B, H, W, C], 1 is full ink and -1 is background; labels are int32 [B]. Data come from scikit-learn's
digits or from MNIST's IDX files by path, and nothing is downloaded. Classifiers and rewards are in `classifier` and `rewards`.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rgdiff import checks
from rgdiff.domains.images.classifier import Classifier, train_classifier
from rgdiff.typing import Array, Key, pytree, static

COMPARED = 10_000  # real images that samples are compared with, at most: precision and recall need all their distances
TRAIN, HELDOUT = 0.5, 0.375  # shares of each class; the test split has the remaining eighth
MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"


class Pictures:
    """Images in [-1, 1] that are 8-bit pictures outside."""

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Return the float32 images in [-1, 1] of 8-bit pictures; see `from_uint8`."""
        return from_uint8(pixels)

    def decode(self, x: Array | np.ndarray) -> np.ndarray:
        """Return samples [B, H, W, C] as 8-bit pictures for a report; see `to_uint8`."""
        return to_uint8(x)


@pytree
class ImageDomain(Pictures):
    """Hold an image data set in three disjoint splits, stratified by class.

    `train` is for the prior and for classifiers that guide, `heldout` for the classifier that evaluates (a reward
    model must not judge its own samples), `test` for measuring the accuracy of both. Images are float32 [N, H, W, C]
    in `value_range`, labels int32 [N] in 0..classes-1.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    heldout_x: np.ndarray
    heldout_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    name: str = static()
    shape: tuple[int, int, int] = static()
    classes: int = static()
    value_range: tuple[float, float] = static(default=(-1.0, 1.0))

    def classifier(self, split: str, key: Key, examples: np.ndarray | None = None) -> Classifier:
        """Train a classifier on one split.

        Args:
          split: `train`, to guide, or `heldout`, to judge.
          key: PRNG key; the classifier is a function of it.
          examples: numbers of the images of the split that it sees, all by default.
        """
        checks.one_of("split", split, ("train", "heldout"))
        x, y = getattr(self, f"{split}_x"), getattr(self, f"{split}_y")
        rows = slice(None) if examples is None else examples
        return train_classifier(key, x[rows], y[rows], self.classes)

    def real(self, target: int | None = None) -> np.ndarray:
        """Return real images [N, H, W, C] of one class or of all, evenly from all splits, at most `COMPARED`."""
        x = np.concatenate([self.train_x, self.heldout_x, self.test_x])
        y = np.concatenate([self.train_y, self.heldout_y, self.test_y])
        x = x if target is None else x[y == target]
        return x[:: -(-len(x) // COMPARED) or 1]

    def real_features(self, classifier: Classifier, target: int | None = None) -> np.ndarray:
        """Return a classifier's features [N, F] of the real images, of one class or of all."""
        return np.asarray(classifier.features(jnp.asarray(self.real(target))))

    def accuracy_of(self, classifier: Classifier) -> float:
        """Return the share of the test images that a classifier takes for their class."""
        found = np.asarray(classifier.logits(jnp.asarray(self.test_x))).argmax(-1)
        return float((found == self.test_y).mean())


def to_uint8(x: Array | np.ndarray) -> np.ndarray:
    """Round images from [-1, 1] to 0..255, on the host; values outside are clipped, and NaN becomes background 0.

    Args:
      x: images, any shape.

    Returns:
      uint8 of the same shape.

    Example:
      >>> import numpy as np
      >>> from rgdiff.domains.images import data
      >>> print(data.to_uint8(np.array([-1.0, 1.0, 3.0, np.nan])))
      [  0 255 255   0]
    """
    scaled = (np.asarray(x, np.float32) + 1) * 127.5
    return np.rint(np.clip(np.nan_to_num(scaled, nan=0.0), 0, 255)).astype(np.uint8)


def from_uint8(pixels: np.ndarray) -> np.ndarray:
    """Scale 8-bit pictures to float32 in [-1, 1]; `to_uint8` inverts it exactly.

    Args:
      pixels: uint8, any shape.

    Returns:
      float32 of the same shape.

    Example:
      >>> import numpy as np
      >>> from rgdiff.domains.images import data
      >>> print(data.from_uint8(np.array([0, 255], np.uint8)))
      [-1.  1.]
    """
    return np.asarray(pixels).astype(np.float32) / 127.5 - 1


def digits(size: int = 8) -> ImageDomain:
    """Load scikit-learn's 1,797 real 8x8 handwritten digits.

    Args:
      size: height and width in pixels; above 8, the images are centred on background.

    Returns:
      The domain: 50 % train, 37.5 % heldout, 12.5 % test; the same split on every machine.

    Raises:
      ValueError: for a size below 8 or odd.

    References: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test part).

    Example:
      >>> from rgdiff.domains import images
      >>> domain = images.digits()
      >>> print(domain.shape, len(domain.train_x) + len(domain.heldout_x) + len(domain.test_x))
      (8, 8, 1) 1797
    """
    _check_size(size, 8)
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return _domain("digits", _pad(images.reshape(-1, 8, 8).astype(np.float32) / 8 - 1, size), labels, 10)


def mnist(
    data_dir: str | os.PathLike | None = None,
    images: str | os.PathLike | None = None,
    labels: str | os.PathLike | None = None,
    size: int = 28,
) -> ImageDomain:
    """Load MNIST-like images and labels from two IDX files, gzipped or plain.

    Args:
      data_dir: folder of the files; the environment variable RGDIFF_DATA when None.
      images: path of the images, relative to `data_dir` where that is given; the 10,000 images of MNIST's test part
        (t10k-images-idx3-ubyte, with .gz or the prefix mnist- if need be) when None.
      labels: the same for the labels. Give both or neither.
      size: height and width in pixels; above 28, usually 32, the images are centred on background; 16 is the mean of
        2 x 2 pixels of those of 32.

    Returns:
      The domain: 50 % train, 37.5 % heldout, 12.5 % test of the files' images; the same split on every machine.

    Raises:
      FileNotFoundError: for a missing file, with what was expected and where to get it.
      ValueError: for a file that is not a complete IDX file, for counts that differ, for a size that is neither 16 nor even and from 28 up.

    References: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits", 1998.
    """
    if size != 16:
        _check_size(size, 28)
    if (images is None) != (labels is None):
        raise ValueError(
            "mnist got only one of images= and labels=: give both files, or neither for MNIST's t10k files"
        )
    image_path = _find(images, data_dir, "t10k-images-idx3-ubyte")
    label_path = _find(labels, data_dir, "t10k-labels-idx1-ubyte")
    pixels, classes = read_idx(image_path, 3), read_idx(label_path, 1)
    if pixels.shape[1:] != (28, 28):
        raise ValueError(
            f"{image_path}: expected images of 28 x 28 pixels, found {pixels.shape[1]} x {pixels.shape[2]}"
        )
    if len(pixels) != len(classes):
        raise ValueError(
            f"{image_path} holds {len(pixels)} images but {label_path} {len(classes)} labels: take both from one set"
        )
    if len(classes) and classes.max() > 9:
        raise ValueError(f"{label_path}: expected labels 0..9, found {classes.max()}")
    x = _pad(from_uint8(pixels), 32 if size == 16 else size)
    if size == 16:
        x = x.reshape(-1, 16, 2, 16, 2, 1).mean((2, 4), dtype=np.float32)
    return _domain("mnist", x, classes, 10)


def read_idx(path: str | os.PathLike, ndim: int) -> np.ndarray:
    """Read a whole IDX file of unsigned bytes, gzipped or plain (told apart by content, not by name).

    Args:
      path: the file.
      ndim: number of axes it must have: 3 for images, 1 for labels.

    Returns:
      uint8 array of the shape that the header states.

    Raises:
      ValueError: for damaged gzip data, a wrong magic number, or a length other than the header's.
    """
    data = Path(path).read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({error}): fetch it again") from None
    magic = bytes([0, 0, 8, ndim])  # two zeros, type 8 = unsigned byte, number of axes
    if data[:4] != magic:
        raise ValueError(
            f"{path}: not an IDX file of {ndim}-axis bytes: "
            f"expected magic {magic.hex()}, found {data[:4].hex() or 'nothing'}"
        )
    start = 4 + 4 * ndim
    if len(data) < start:
        raise ValueError(f"{path}: truncated in its header: expected {start} bytes, found {len(data)}: fetch it again")
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4))
    if len(data) != start + math.prod(shape):
        raise ValueError(
            f"{path}: header states shape {shape}, {start + math.prod(shape)} bytes in all, "
            f"found {len(data)}: fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split examples into train, heldout and test, each class divided by the same shares.

    Args:
      labels: integers [N].

    Returns:
      Disjoint indices (train, heldout, test) that cover all examples; 50 %, 37.5 % and 12.5 %.
    """
    order = np.random.RandomState(0).permutation(len(labels))  # RandomState's stream is frozen, Generator's is not
    parts: list[list[np.ndarray]] = [[], [], []]
    for label in np.unique(labels):
        members = order[labels[order] == label]
        cuts = np.rint(len(members) * np.array([TRAIN, TRAIN + HELDOUT])).astype(int)
        for part, indices in zip(parts, np.split(members, cuts), strict=True):
            part.append(indices)
    keep = [np.concatenate(part) if part else np.zeros(0, int) for part in parts]
    train, heldout, test = (order[np.isin(order, indices)] for indices in keep)  # classes interleaved again
    return train, heldout, test


def _pad(x: np.ndarray, size: int) -> np.ndarray:
    """Centre images [N, H, W] on background and add the channel axis: [N, size, size, 1]."""
    margin = (size - x.shape[1]) // 2
    return np.pad(x, ((0, 0), (margin, margin), (margin, margin)), constant_values=-1.0)[..., None]


def originals(x: np.ndarray) -> np.ndarray:
    """Return, for every image, the index of the first image equal to it.

    Args:
      x: images [N, ...].

    Returns:
      [N], integers.
    """
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(hashlib.sha256(image.tobytes()).digest(), i) for i, image in enumerate(x)], int)


def _domain(name: str, x: np.ndarray, labels: np.ndarray, classes: int) -> ImageDomain:
    """Split images into three parts; copies of an image are all in one of them."""
    labels, source = labels.astype(np.int32), originals(x)
    rows, copies = np.unique(source), np.flatnonzero(source != np.arange(len(x)))
    parts = [rows[part] for part in split(labels[rows])]
    train, heldout, test = (np.concatenate([part, copies[np.isin(source[copies], part)]]) for part in parts)
    return ImageDomain(
        train_x=x[train],
        train_y=labels[train],
        heldout_x=x[heldout],
        heldout_y=labels[heldout],
        test_x=x[test],
        test_y=labels[test],
        name=name,
        shape=x.shape[1:],
        classes=classes,
    )


def _check_size(size: int, native: int) -> None:
    if size < native or size % 2:
        raise ValueError(
            f"size={size}: expected an even number of pixels from {native} up (images are padded, not scaled)"
        )


def _find(name: str | os.PathLike | None, data_dir: str | os.PathLike | None, default: str) -> Path:
    """Return the path of an existing file, or raise the one line that says how to get it."""
    if name is not None:
        candidates = [Path(data_dir or "", name).expanduser()]
    else:
        folder = data_dir or os.environ.get("RGDIFF_DATA")
        names = [prefix + default + suffix for prefix in ("", "mnist-") for suffix in (".gz", "")]
        candidates = [Path(folder, name).expanduser() for name in names] if folder else []
    for path in candidates:
        if path.is_file():
            return path
    looked = f"found none of {', '.join(map(str, candidates))}" if candidates else "no folder was named"
    raise FileNotFoundError(
        f"MNIST file missing: expected {name or default + '.gz'} ({looked}); get it from {MNIST_URL} and name "
        "its folder with data_dir= or the environment variable RGDIFF_DATA"
    )


def custom(fn: Callable[[], tuple[np.ndarray, np.ndarray]], name: str = "custom") -> ImageDomain:
    """Make a domain of a user's own images.

    Args:
      fn: () -> (images [N, H, W, C], labels [N]); images 8-bit, or float in [-1, 1]; labels integers from 0.
      name: of the domain.

    Returns:
      The domain: 50 % train, 37.5 % heldout, 12.5 % test; the same split each time.

    Raises:
      ValueError: for shapes, types or values that do not fit.

    Example:
      >>> import numpy as np
      >>> from rgdiff.domains import images
      >>> pictures = np.arange(16 * 4, dtype=np.uint8).reshape(16, 2, 2, 1)
      >>> domain = images.custom(lambda: (pictures, np.arange(16) % 2))
      >>> print(domain.classes, len(domain.train_x), len(domain.heldout_x), len(domain.test_x))
      2 8 6 2
    """
    images, labels = (np.asarray(part) for part in fn())
    if images.ndim != 4 or labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{name}: expected images [N, H, W, C] and integer labels [N], got {images.dtype}{list(images.shape)} "
            f"and {labels.dtype}{list(labels.shape)}"
        )
    x = from_uint8(images) if images.dtype == np.uint8 else images.astype(np.float32)
    if not np.isfinite(x).all() or abs(x).max() > 1:
        raise ValueError(f"{name}: expected images that are uint8, or floats in [-1, 1]; scale them")
    if len(labels) < 8 or labels.min() < 0:
        raise ValueError(f"{name}: expected at least 8 images with labels from 0 up, got {len(labels)}")
    return _domain(name, x, labels, int(labels.max()) + 1)
