"""Token ids beside transformers' tokenizers, and beside numbers written down; files of prompts."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import numpy as np
import pytest

from rgdiff.pretrained import text

PROMPTS = ["A cat", "the dog's café, 42 cats!  <|endoftext|> x", "", "dog " * 30, "naïve Ünïcode 東京 🙂"]


def clip_folder(folder: Path) -> Path:
    """A vocabulary of all bytes and some words, as CLIP's files are."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]  # a byte's letter in byte-level BPE
    letters = [chr(i) for i in shown]
    merges = ["a t</w>", "c at</w>", "d o", "do g</w>", "' s</w>"]
    words = [*letters, *(letter + "</w>" for letter in letters), *(m.replace(" ", "") for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


def test_ids_are_those_written_down(tmp_path):
    pytest.importorskip("tokenizers", reason="the extra `text`")
    read = text.tokenizer(clip_folder(tmp_path), 6)
    ids = read(["A  CAT", "dog cat dog cat dog cat", ""])
    a, cat, dog, start, end = 256 + 64, 513, 515, 517, 518
    assert ids.dtype == np.int32
    assert ids.tolist() == [
        [start, a, cat, end, end, end],
        [start, dog, cat, dog, cat, end],  # cut, with its end
        [start, end, end, end, end, end],
    ]


def test_a_pad_token_is_the_folders(tmp_path):
    pytest.importorskip("tokenizers", reason="the extra `text`")
    folder = clip_folder(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 4, "pad_token": "<|endoftext|>"}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!"}}))  # as of SDXL and SD 2
    assert text.tokenizer(folder)(["cat"]).tolist() == [[517, 513, 518, 0]]
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<none>"}))
    with pytest.raises(ValueError, match="no pad token <none>"):
        text.tokenizer(folder)


@pytest.mark.slow
def test_ids_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers, which is compared with")
    folder = clip_folder(tmp_path)
    for pad in ("<|endoftext|>", "!"):
        theirs = transformers.CLIPTokenizer.from_pretrained(str(folder), model_max_length=16, pad_token=pad)
        expected = theirs(PROMPTS, padding="max_length", max_length=16, truncation=True).input_ids
        (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad}))
        np.testing.assert_array_equal(text.tokenizer(folder, 16)(PROMPTS), expected)
        theirs.save_pretrained(folder / "saved")  # tokenizer.json
        np.testing.assert_array_equal(text.tokenizer(folder / "saved")(PROMPTS), expected)


@pytest.mark.slow
def test_ids_of_t5_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers, which is compared with")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁cat", -2.0), ("▁", -3.0), ("s", -3.0)]
    theirs = transformers.T5TokenizerFast(vocab=pieces, extra_ids=2)
    theirs.save_pretrained(tmp_path)
    prompts = ["a cats", "", "a " * 20, "cat, dog"]
    expected = theirs(prompts, padding="max_length", max_length=8, truncation=True).input_ids
    np.testing.assert_array_equal(text.tokenizer(tmp_path, 8)(prompts), expected)
    with pytest.raises(ValueError, match="needs a length of 1 or more tokens"):
        text.tokenizer(tmp_path)


def test_what_is_missing_is_told_in_one_line(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers", reason="the extra `text`")
    with pytest.raises(ValueError, match="has neither: expected tokenizer.json, or vocab.json and merges.txt"):
        text.tokenizer(tmp_path, 8)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no readable tokenizer"):
        text.tokenizer(tmp_path, 8)
    (tmp_path / "tokenizer.json").unlink()
    read = text.tokenizer(clip_folder(tmp_path), 8)
    with pytest.raises(ValueError, match="expects a list of texts, got 'cat'"):
        read("cat")
    real = builtins.__import__
    absent = lambda name, *rest: (_ for _ in ()).throw(ImportError()) if name == "tokenizers" else real(name, *rest)  # noqa: E731
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match=r"pip install 'rgdiff\[text\]', or give token ids"):
        text.tokenizer(tmp_path, 8)


def test_prompts_are_read_from_lines_and_lists(tmp_path):
    file = tmp_path / "prompts.json"
    for content in (["a cat ", "", "a dog"], [{"prompt": "a cat"}, {"prompt": "a dog", "image_path": "1.jpg"}]):
        file.write_text(json.dumps(content))
        assert text.prompts(file) == ["a cat", "a dog"]
    for content, message in (
        ("[1]", "expected a JSON list"),
        ("{}", "expected a JSON list"),
        ("[", "no readable"),
        ("[]", "holds no prompt"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            text.prompts(file)
    with pytest.raises(ValueError, match="no file of prompts"):
        text.prompts(tmp_path / "none.txt")
