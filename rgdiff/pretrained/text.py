"""Prompts as token ids: the tokenizer of a model's folder, and files of prompts.

The `tokenizers` package reads tokenizer.json (CLIP and T5), or vocab.json and merges.txt (CLIP in older folders); it comes with
`pip install rgdiff[text]`. Who has token ids already needs none of this.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rgdiff.pretrained.config import Config, read_config

START, END = "<|startoftext|>", "<|endoftext|>"  # of CLIP
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"  # of CLIP, in lower case
)


class Tokenizer:
    """Maps prompts to token ids int32 [N, length]: cut before the end token, padded after it; see `tokenizer`."""

    def __init__(self, engine: Any, length: int):
        self._engine = engine
        self.length = length

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the ids.

        Args:
          prompts: N texts; one text is refused, since it would be taken as its letters.

        Returns:
          int32 [N, length].

        Raises:
          ValueError: for what is no list of texts.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"a tokenizer expects a list of texts, got {prompts!r:.60}")
        rows = [one.ids for one in self._engine.encode_batch(list(prompts))]
        return np.asarray(rows, np.int32).reshape(-1, self.length)


def tokenizer(folder: str | os.PathLike[str], length: int | None = None) -> Tokenizer:
    """Read the tokenizer of a folder: the same ids as transformers gives with padding and truncation to `length`.

    Args:
      folder: with tokenizer.json, or vocab.json and merges.txt of CLIP; a model's own, or `tokenizer` of a pipeline.
      length: tokens of a row; `model_max_length` of the folder's tokenizer_config.json by default (77 for CLIP).

    Returns:
      The callable, N texts -> ids int32 [N, length].

    Raises:
      ValueError: in one line, where the `tokenizers` package is missing, the folder has no such files, or no length is known.

    Example:
      >>> import json, pathlib, pytest, tempfile
      >>> from rgdiff.pretrained import text
      >>> _ = pytest.importorskip("tokenizers")
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> words = ["<|startoftext|>", "<|endoftext|>", "a", "c", "t</w>", "at</w>", "cat</w>", "a</w>"]
      >>> _ = (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
      >>> _ = (folder / "merges.txt").write_text("a t</w>\\nc at</w>")
      >>> print(text.tokenizer(folder, 5)(["A cat"]))
      [[0 7 6 1 1]]
    """
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "prompts as text need the package `tokenizers`: pip install 'rgdiff[text]', or give token ids"
        ) from None
    folder = Path(folder)
    settings = _optional(folder / "tokenizer_config.json")
    told = Config({**settings, **_optional(folder / "special_tokens_map.json")})
    try:
        if (file := folder / "tokenizer.json").exists():
            engine = tokenizers.Tokenizer.from_file(str(file))
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            engine = _clip(folder, told)
        else:
            which = "spiece.model alone" if (folder / "spiece.model").exists() else "neither"
            raise ValueError(
                f"{folder} has {which}: expected tokenizer.json, or vocab.json and merges.txt; "
                "transformers' save_pretrained of a fast tokenizer writes tokenizer.json"
            )
    except ValueError:
        raise
    except Exception as error:  # noqa: BLE001 - the package raises bare exceptions
        raise ValueError(f"{folder} holds no readable tokenizer: {' '.join(str(error).split())}") from None
    if length is None:
        length = settings.get("model_max_length")
    if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= 100_000:
        raise ValueError(f"the tokenizer of {folder} needs a length of 1 or more tokens, got {length}; give length=77")
    named = _content(told.get("pad_token"))
    known = [word for word in ([named] if named else [END, "<pad>"]) if engine.token_to_id(word) is not None]
    if not known:
        raise ValueError(f"the tokenizer of {folder} has no pad token {named or ''}; name one in tokenizer_config.json")
    engine.enable_truncation(length)
    engine.enable_padding(length=length, pad_id=engine.token_to_id(known[0]), pad_token=known[0])
    return Tokenizer(engine, length)


def _clip(folder: Path, told: Config) -> Any:
    """CLIP's byte-pair encoding: lower case, words with `</w>` at their ends, a start and an end token."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    unknown, start, end = (
        _content(told.get(f"{name}_token")) or usual for name, usual in (("unk", END), ("bos", START), ("eos", END))
    )
    model = models.BPE.from_file(
        str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token=unknown, end_of_word_suffix="</w>"
    )
    engine = Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    engine.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])  # type: ignore[assignment]
    split = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
    engine.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])  # type: ignore[assignment]
    if missing := [word for word in (start, end) if engine.token_to_id(word) is None]:
        raise ValueError(f"{folder}/vocab.json has no {missing[0]!r}, which begins or ends a text")
    engine.add_special_tokens(list(dict.fromkeys((start, end))))
    pair = [(word, engine.token_to_id(word)) for word in (end, start)]
    engine.post_processor = processors.RobertaProcessing(*pair, trim_offsets=False, add_prefix_space=False)  # type: ignore[assignment]
    return engine


def _optional(file: Path) -> Config:
    return read_config(file) if file.exists() else Config({})


def _content(token: Any) -> str | None:
    """A special token: a text, or a mapping with its text as `content`."""
    return token.get("content") if isinstance(token, Config) else token


def prompts(path: str | os.PathLike[str]) -> list[str]:
    """Read prompts from a file: one a line, or a JSON list of texts or of mappings with a `prompt`, as HPSv2's are.

    Args:
      path: of the file, UTF-8.

    Returns:
      The prompts in their order; empty lines are left out.

    Raises:
      ValueError: in one line, for a file that is missing, unreadable, of another form or empty.

    Example:
      >>> import pathlib, tempfile
      >>> from rgdiff.pretrained import text
      >>> file = pathlib.Path(tempfile.mkdtemp(), "animals.txt")
      >>> _ = file.write_text("a cat\\n\\na dog\\n")
      >>> print(text.prompts(file))
      ['a cat', 'a dog']
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8")
        rows = json.loads(content) if path.suffix == ".json" else content.splitlines()
    except FileNotFoundError:
        raise ValueError(f"no file of prompts at {path}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no readable file of prompts: {' '.join(str(error).split())}") from None
    rows = [row.get("prompt") if isinstance(row, dict) else row for row in rows] if isinstance(rows, list) else [None]
    found = [row.strip() for row in rows if isinstance(row, str)]
    if len(found) < len(rows):
        raise ValueError(f"{path}: expected a JSON list of texts, or of mappings with a text `prompt`")
    found = [row for row in found if row]
    if not found:
        raise ValueError(f"{path} holds no prompt")
    return found
