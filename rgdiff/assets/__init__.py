"""Files that come with the package: a small pre-trained prior of digits and what judges its samples. See README.md here."""

from __future__ import annotations

import os
from pathlib import Path

PREFIX = "package:"


def resolved(path: str | os.PathLike[str]) -> Path:
    """Return the path of a file or folder: `package:NAME` is the one of that name that comes with the package.

    Args:
      path: of any file or folder, or `package:NAME`.

    Returns:
      The path.

    Raises:
      ValueError: for a NAME that does not come with the package.

    Example:
      >>> from rgdiff import assets
      >>> assets.resolved("package:mnist16_prior.safetensors").name
      'mnist16_prior.safetensors'
    """
    text = os.fspath(path)
    if not text.startswith(PREFIX):
        return Path(text)
    folder = Path(__file__).resolve().parent
    files = sorted(
        one.name for one in folder.iterdir() if one.suffix == ".safetensors" or (one / "model_index.json").exists()
    )
    if (name := text.removeprefix(PREFIX)) not in files:
        raise ValueError(f"{path} does not come with the package, which has {', '.join(files)}")
    return folder / name
