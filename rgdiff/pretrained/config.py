"""The config.json of a released network: read-only, hashable, so that a Linen module may hold it as a static field."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


class MissingSetting(KeyError, ValueError):
    """A setting that a file lacks; its text is one line."""

    def __str__(self) -> str:
        return str(self.args[0])


class Config(Mapping[str, Any]):
    """Settings of a network, as its file has them. Lists become tuples, and mappings inside become `Config`.

    Args:
      values: the settings.
      source: where they come from, for messages.

    Raises:
      MissingSetting: a KeyError and a ValueError, in one line, at a look-up of a setting that is not there.

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
            raise MissingSetting(f"{self._source} has no {key!r}") from None

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

    def settings(
        self,
        network: str,
        read: Mapping[str, Any],
        fixed: Mapping[str, Any] | None = None,
        harmless: Iterable[str] = (),
        choices: Mapping[str, Collection[Any]] | None = None,
    ) -> Config:
        """Return the settings that a network reads, with its defaults, and refuse a file that asks for something else.

        Args:
          network: its name, for the message.
          read: setting -> its value where the file has none or null; `...` for one that the file must have.
          fixed: others that it knows, with the one value that it computes.
          harmless: settings that do not change what it computes.
          choices: of those read, the values that it computes.

        Returns:
          Exactly the settings of `read`.

        Raises:
          ValueError: in one line that names the setting.

        Example:
          >>> from rgdiff.pretrained.config import Config
          >>> print(Config({"width": 8, "dropout": 0.1}).settings("Net", {"width": ..., "depth": 2}, harmless={"dropout"}))
          Config({'width': 8, 'depth': 2})
        """
        self.refuse(network, {*read, *harmless}, fixed or {})
        values = {key: self.get(key, default) for key, default in read.items()}
        for key, value in values.items():
            if value is ...:
                raise ValueError(f"{self._source}: {network} needs the setting {key}")
            if choices and key in choices and value not in choices[key]:
                known = ", ".join(repr(one) for one in choices[key])
                raise ValueError(f"{self._source}: {network} does not support {key} = {value!r}, only {known}")
        return Config(values, self._source)

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


# Settings of every transformers configuration, and of its generation, that leave an encoder's outputs as they are.
TRANSFORMERS = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype return_dict output_hidden_states output_attentions
    torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward is_encoder_decoder cross_attention_hidden_size
    tie_encoder_decoder tie_word_embeddings max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens finetuning_task id2label label2id tokenizer_class prefix bos_token_id pad_token_id
    eos_token_id sep_token_id decoder_start_token_id task_specific_params problem_type use_cache
    initializer_range initializer_factor gradient_checkpointing
    """.split()
)


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Config(value)
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(one) for one in value)
    return value
