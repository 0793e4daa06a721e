"""Images of a user's files as a domain: CIFAR-10's binary files, an .npz file of arrays, or a folder of pictures. Nothing is unpickled."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from rgdiff.domains.images.data import ImageDomain, custom

CIFAR = 1 + 3 * 32 * 32  # bytes of a row of CIFAR-10: the label, then 32 x 32 pixels of red, of green and of blue
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def pictures(path: str | os.PathLike) -> ImageDomain:
    """Load images and labels by path.

    Args:
      path: one of
        - a folder of CIFAR-10's binary version, with data_batch_1.bin ... (and test_batch.bin);
        - an .npz file with `images` [N, H, W, C] (or `arr_0`), 8-bit or float in [-1, 1], and perhaps integer `labels` [N];
        - a folder of pictures of one size, PNG or what else Pillow opens; a folder in it is a class, in the order of names.
        Without labels all images are of one class, and the judge's features, of a classifier, say little.

    Returns:
      The domain: 50 % train, 37.5 % heldout, 12.5 % test; the same split each time.

    Raises:
      ValueError: in one line, for a path without images, a file of another form or cut off, pickles, or pictures of several sizes.

    References: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009 (CIFAR-10).

    Example:
      >>> import numpy as np, pathlib, tempfile
      >>> from rgdiff.domains import images
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "mine.npz"
      >>> pixels = np.arange(16 * 48, dtype=np.int64).astype(np.uint8).reshape(16, 4, 4, 3)
      >>> np.savez(file, images=pixels, labels=np.arange(16) % 2)
      >>> domain = images.pictures(file)
      >>> print(domain.shape, domain.classes, len(domain.train_x))
      (4, 4, 3) 2 8
    """
    place = Path(path).expanduser()
    if place.is_file() and place.suffix == ".npz":
        images, labels = _arrays(place)
    elif place.is_dir() and (batches := sorted({*place.glob("data_batch_*.bin"), *place.glob("test_batch.bin")})):
        images, labels = _cifar(batches)
    elif place.is_dir() and (place / "data_batch_1").is_file():
        raise ValueError(f"{place} holds data_batch_1, a pickle, which is not read; take CIFAR-10's binary version")
    elif place.is_dir():
        images, labels = _folder(place)
    else:
        raise ValueError(f"no images at {place}: expected a folder, or an .npz file")
    return custom(lambda: (images, labels), name=place.stem)


def _arrays(file: Path) -> tuple[np.ndarray, np.ndarray]:
    from rgdiff.pretrained.weights import archive

    held = {name: tensor.array() for name, tensor in archive(file).items()}
    images = held.get("images", held.get("arr_0"))
    if images is None or images.ndim != 4:
        raise ValueError(f"{file} has {', '.join(held) or 'nothing'}: expected `images` [N, H, W, C]")
    return images, held.get("labels", np.zeros(len(images), np.int32))


def _cifar(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    rows = []
    for file in files:
        data = np.fromfile(file, np.uint8)
        if not len(data) or len(data) % CIFAR or data[::CIFAR].max() > 9:
            raise ValueError(
                f"{file} has {len(data):,} bytes: expected rows of a label 0..9 and 3,072 pixels, as CIFAR-10 has"
            )
        rows.append(data.reshape(-1, CIFAR))
    every = np.concatenate(rows)
    return every[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), every[:, 0].astype(np.int32)


def _folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        from PIL import Image
    except ImportError:
        raise ValueError("a folder of pictures needs Pillow: pip install pillow, or give an .npz file") from None
    of = lambda place: sorted(one for one in place.iterdir() if one.suffix.lower() in SUFFIXES)  # noqa: E731
    classes = [files for one in sorted(folder.iterdir()) if one.is_dir() and (files := of(one))] or [of(folder)]
    images: list[np.ndarray] = []
    for file in (file for files in classes for file in files):
        try:
            with Image.open(file) as opened:
                image = np.asarray(opened.convert("L" if opened.mode in ("1", "L") else "RGB"))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{file} is no readable picture: {' '.join(str(error).split())}") from None
        images.append(image[..., None] if image.ndim == 2 else image)
        if images[-1].shape != images[0].shape:
            raise ValueError(f"{file} is {list(image.shape)}, and the first {list(images[0].shape)}: expected one size")
    if not images:
        raise ValueError(f"{folder} holds no picture ({', '.join(SUFFIXES)}) and no data_batch_1.bin")
    return np.stack(images), np.repeat(np.arange(len(classes)), [len(files) for files in classes])
