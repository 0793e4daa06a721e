"""The config.json of a released network: read-only, hashable, so that a Linen module may hold it as a static field."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any


class Config(Mapping[str, Any]):
    """Settings of a network, as its file has them. Lists become tuples, and mappings inside become `Config`.

    Args:
      values: the settings.
      source: where they come from, for messages.

    Raises:
      KeyError: at a look-up, in one line, for a setting that is not there.

    Example:
      >>> from rgdiff.pretrained.config import Config
      >>> config = Config({"block_out_channels": [32, 64], "norm_num_groups": 32})
      >>> print(config["block_out_channels"], config.get("dropout", 0.0), hash(config) == hash(Config(dict(config))))
      (32, 64) 0.0 True
    """

    def __init__(self, values: Mapping[str, Any], source: str = "the configuration"):
        self._values = {str(key): _frozen(value) for key, value in values.items()}
        self._source = source
        self._hash = hash(tuple(sorted((key, repr(value)) for key, value in self._values.items())))

    def __getitem__(self, key: str) -> Any:
        try:
            return self._values[key]
        except KeyError:
            raise KeyError(f"{self._source} has no {key!r}") from None

    def get(self, key: str, default: Any = None) -> Any:
        """Return a setting, or the default where it is absent or null: released files have both."""
        value = self._values.get(key)
        return default if value is None else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self._values == other._values

    def __repr__(self) -> str:
        return f"Config({self._values!r})"

    def refuse(self, network: str, read: Collection[str], fixed: Mapping[str, Any]) -> None:
        """Refuse a setting that a network does not read and that would change what it computes.

        Names that begin with an underscore pass (they say who wrote the file), and so do null, and false for an unknown setting.

        Args:
          network: its name, for the message.
          read: settings that the network reads, or that do not change what it computes.
          fixed: others that it knows, with the one value that it computes.

        Raises:
          ValueError: in one line that names the setting.

        Example:
          >>> from rgdiff.pretrained.config import Config
          >>> Config({"width": 3, "dual": True}).refuse("Net", {"width"}, {"dual": False})
          Traceback (most recent call last):
          ValueError: the configuration: Net does not support dual = True, only False
        """
        for key, value in self.items():
            if key in read or key.startswith("_") or value is None:
                continue
            if key not in fixed and value is not False:
                raise ValueError(f"{self._source}: {network} does not know the setting {key} = {value!r}")
            if key in fixed and value != fixed[key]:
                raise ValueError(f"{self._source}: {network} does not support {key} = {value!r}, only {fixed[key]!r}")

    def per_stage(self, key: str, stages: int, default: Any = None) -> list[Any]:
        """Return a setting as one value a stage: a number stands for every stage.

        Args:
          key: of the setting.
          stages: their number.
          default: where the setting is absent or null.

        Returns:
          The values, one a stage.

        Raises:
          ValueError: for a list of another length.
        """
        value = self.get(key, default)
        values = list(value) if isinstance(value, tuple) else [value] * stages
        if len(values) != stages:
            raise ValueError(f"{self._source}: {key} has {len(values)} values for {stages} stages")
        return values


def read_config(path: Path) -> Config:
    """Read a JSON file of settings.

    Args:
      path: of the file.

    Returns:
      The settings.

    Raises:
      ValueError: for a file that is missing, is no JSON, or holds no mapping.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no file at {path}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no readable JSON: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected a mapping of settings")
    return Config(values, str(path))


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Config(value)
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(one) for one in value)
    return value
