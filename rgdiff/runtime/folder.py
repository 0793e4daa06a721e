"""The folder of one run: its resolved config, the versions it ran with, its summary and its samples.

Assumes one process writes it. Every file is written under a temporary name and then renamed, so that a reader
or a kill never meets half a file. Checkpoints and metrics in the same folder are left to their own modules.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rgdiff.runtime.distributed import first, on_first

log = logging.getLogger("rgdiff")

WHERE = (
    "out",
    "resume",
    "data_dir",
    "cache_dir",
    "mesh",
    "distributed",
    "profile",
)  # config keys that say where, not what: they may change on resume
OURS = (  # what a run writes into its folder
    "config.yaml", "versions.json", "summary.json", "samples.npz", "metrics.jsonl", "metrics.csv", "report.html", "sweep.csv",
    "checkpoints", "adapters", "tuned", "campaigns", "profile",
)  # fmt: skip
_PACKAGES = ("rgdiff", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """The files of one run; make it with `RunFolder.create`."""

    path: Path
    config: dict[str, Any]
    versions: dict[str, Any]

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], config: dict[str, Any], resume: bool = False, longer: str | None = None
    ) -> RunFolder:
        """Make the folder of a run, or with `resume` go on in the folder of the same run.

        Args:
          path: the folder.
          config: the resolved config, of plain values (str, numbers, bool, None, lists, dicts), seed too.
          resume: go on in a folder that holds this run; in a folder that holds none, start.
          longer: a key of the config whose list may go on where that of the run there ends.

        Raises:
          ValueError: if the folder holds a run and `resume` is False, or no run and a file that a run would overwrite, if the
            run there has another config (the keys of `WHERE` aside), or if the config has values that YAML cannot hold.
        """
        path, config = Path(path).absolute(), _plain(config)
        folder = cls(path, config, collect_versions())
        on_first(lambda: folder._begin(resume, longer))
        return folder

    def _begin(self, resume: bool, longer: str | None) -> None:
        path, config, versions = self.path, self.config, self.versions
        self.check(path, config, resume, longer)
        if (path / "config.yaml").exists():
            with contextlib.suppress(OSError, ValueError):
                old = json.loads((path / "versions.json").read_text(encoding="utf-8"))
                changed = [f"{k} {old.get(k)} -> {v}" for k, v in versions.items() if old.get(k) != v]
                if changed:
                    log.warning("resuming with other versions, numbers may differ: %s", ", ".join(changed))
        path.mkdir(parents=True, exist_ok=True)
        fresh = not (path / "config.yaml").exists()
        write_atomic(path / "config.yaml", _to_yaml(config).encode())  # first: it marks what else is there as a run's
        try:
            self._write_json("versions.json", versions)
        except OSError:
            if fresh:
                self.forget()
            raise

    @staticmethod
    def check(
        path: str | os.PathLike[str], config: dict[str, Any], resume: bool = False, longer: str | None = None
    ) -> None:
        """Refuse a folder that `create` would refuse; nothing is written."""
        path, config = Path(path).absolute(), _plain(config)
        if pattern := set("[*?") & set(str(path)):
            raise ValueError(
                f"{path}: checkpoints cannot be written where a path has {' or '.join(sorted(pattern))}; give another out"
            )
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file; out must name a folder")
        stored = path / "config.yaml"
        if stored.exists():
            if not resume:
                raise ValueError(f"{path} already holds a run; give resume=true to go on with it, or another out")
            before = read_config(stored)
            if longer is not None and config[longer][: len(before.get(longer, ()))] == before.get(longer):
                before[longer] = config[longer]
            different = _first_difference(_what(before), _what(config))
            if different:
                key, was, now = different
                raise ValueError(
                    f"cannot resume {path}: its run has {key}={was}, this one {key}={now}; "
                    "give the same settings, or another out"
                )
        elif foreign := [name for name in OURS if (path / name).exists()]:
            raise ValueError(f"{path} has a {foreign[0]} that is no run's; give another out, or move it away")

    def forget(self) -> None:
        """Undo `create`: the folder holds no run any more; whatever else lies in it stays, and an empty one goes."""
        if not first():
            return
        for name in ("metrics.jsonl", "metrics.csv", "versions.json", "config.yaml"):
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    @property
    def empty(self) -> bool:
        """Whether the run has made nothing yet that is worth keeping."""
        made = ("checkpoints", "campaigns", "adapters", "tuned", "samples.npz", "report.html", "summary.json")
        return not any((self.path / name).exists() for name in made)

    @property
    def done(self) -> bool:
        """Whether the run has written its summary."""
        return (self.path / "summary.json").exists()

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json from a flat dict of numbers and strings; NaN and infinities become null."""
        for key, value in summary.items():
            if isinstance(value, dict | list | tuple) or np.ndim(value):
                raise ValueError(f"summary[{key!r}] is not a single value; expected a flat dict of numbers and strings")
        self._write_json("summary.json", {key: plain_value(value) for key, value in summary.items()})

    def write_samples(self, **arrays: Any) -> None:
        """Write samples.npz, compressed; bfloat16 is widened to float32, objects are refused."""
        plain = {}
        for name, array in arrays.items():
            array = np.asarray(array)
            if array.dtype.name == "bfloat16":
                array = array.astype(np.float32)
            if array.dtype.kind not in "biufcSU":
                raise ValueError(f"samples: {name} has dtype {array.dtype}; expected numbers, bools or strings")
            plain[name] = array
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **plain)
        write_atomic(self.path / "samples.npz", buffer.getvalue())

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        write_atomic(self.path / name, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def alone(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other runs out of a run's folder, which is made if missing.

    Raises:
      ValueError: if another run is at work in it.
    """
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(_locked(Path(path).absolute())))
        yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is at work in {path}; wait for it, or give another out") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
        if new:
            with contextlib.suppress(OSError):  # nothing came of it
                path.rmdir()


def next_free(path: str | os.PathLike[str], resume: bool = False) -> Path:
    """Return `path` if nothing of a run is there, else the first of path-2, path-3, ... of which this is true.

    With `resume`: the last of them that holds a run, or `path`.
    """
    path, number = Path(path), 1
    latest, free = path, path
    while any((free / name).exists() for name in OURS):
        latest, number = free, number + 1
        free = path.with_name(f"{path.name}-{number}")
    return latest if resume else free


def write_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that it is there whole or not at all; of several processes the first one does."""
    if not first():
        return
    path = Path(path)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        new.write_bytes(content)
        os.replace(new, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        new.unlink(missing_ok=True)


def plain_value(value: Any) -> Any:
    """Turn a number of any library into what JSON can hold: NaN and infinities become None."""
    if value is None or isinstance(value, str | bool):
        return value
    value = np.asarray(value).item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def collect_versions() -> dict[str, Any]:
    """Return what the numbers of a run depend on besides its config."""
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, Any] = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    device = jax.devices()[0]
    return versions | {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": f"{device.platform} {device.device_kind} x{jax.device_count()}",
        "commit": _commit(),
    }


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    import yaml

    try:
        return yaml.safe_load(_to_yaml(config))
    except yaml.YAMLError as error:
        raise ValueError(f"config must hold plain values only: {' '.join(str(error).split())}") from None


def _to_yaml(config: dict[str, Any]) -> str:
    import yaml

    def listed(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: listed(value) for key, value in node.items()}
        return [listed(item) for item in node] if isinstance(node, list | tuple) else node

    return yaml.safe_dump(listed(config), sort_keys=False, allow_unicode=True, width=1000)


def read_config(path: Path) -> dict[str, Any]:
    """Read a config that a run has written.

    Raises:
      ValueError: if it cannot be read.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a readable config; repair it, or give another out")
    return found


def _what(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in WHERE}


def _first_difference(before: Any, now: Any, key: str = "") -> tuple[str, str, str] | None:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*before, *(name for name in now if name not in before)]:
            path = f"{key}.{name}" if key else str(name)
            found = _first_difference(before.get(name, _ABSENT), now.get(name, _ABSENT), path)
            if found:
                return found
        return None
    return None if repr(before) == repr(now) else (key, str(before), str(now))


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


_ABSENT = _Absent()
