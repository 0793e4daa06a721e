"""Molecules as strings of tokens (SMILES or SELFIES): the notation of a data set, states as strings and back, and the data by path.

A state is one-hot [L, K]: the tokens of a molecule, then the end, the last class, up to L. The end is no token of the molecule:
a string ends where its first end is, and what a state holds after it says nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rgdiff import checks
from rgdiff.domains.molecules import chemistry
from rgdiff.domains.sequences import files
from rgdiff.typing import Array

# An atom in brackets, a ring's two digits, an atom of two letters, or one sign.
TOKEN = re.compile(r"\[[^\[\]]*\]|%\d\d|Br|Cl|.", re.DOTALL)


def tokens(smiles: str) -> list[str]:
    """Return the tokens of a SMILES: atoms in brackets, two-letter atoms and %-numbered rings are one each.

    Args:
      smiles: any text; its tokens joined are the text again.

    Example:
      >>> from rgdiff.domains.molecules import smiles
      >>> print(*smiles.tokens("ClC1[nH]c%10C[N+]1Br"))
      Cl C 1 [nH] c %10 C [N+] 1 Br
    """
    return TOKEN.findall(smiles)


class Language(NamedTuple):
    """A way to write molecules.

    split: its text -> tokens. written: canonical SMILES -> its text, None where it cannot say it. read: its text -> SMILES.
    """

    split: Callable[[str], list[str]]
    written: Callable[[str], str | None]
    read: Callable[[str], str]


@functools.cache
def spoken(name: str) -> Language:
    """Return a language by its name: smiles, or selfies, of which every string of tokens is a molecule (arXiv 1905.13741).

    Raises:
      ValueError: for another name, or selfies where the package is not installed.
    """
    if checks.one_of("domain.language", name, ("smiles", "selfies")) == "smiles":
        return Language(tokens, lambda text: text, lambda text: text)
    try:
        selfies = importlib.import_module("selfies")
    except ImportError:
        raise ValueError("domain.language=selfies needs the package selfies: pip install 'rgdiff[selfies]'") from None

    def written(text: str) -> str | None:
        try:
            return selfies.encoder(text)
        except selfies.EncoderError:
            return None

    return Language(lambda text: list(selfies.split_selfies(text)), written, selfies.decoder)


@dataclasses.dataclass(frozen=True)
class Notation:
    """The tokens of a set of molecules, in order of their classes, and the length of states; the end is a further class, last.

    Args:
      tokens: K - 1 different ones.
      length: L.
      language: smiles or selfies.
    """

    tokens: tuple[str, ...]
    length: int
    language: str = "smiles"

    @property
    def shape(self) -> tuple[int, int]:
        """Of one example, (L, K)."""
        return self.length, len(self.tokens) + 1

    def encode(self, smiles: Sequence[str]) -> np.ndarray:
        """Return one-hot uint8 [N, L, K] of SMILES.

        Raises:
          ValueError: for a token that is not of the notation, or more than L tokens, with the SMILES.
        """
        of = spoken(self.language)
        classes = {token: place for place, token in enumerate(self.tokens)}
        codes = np.full((len(smiles), self.length), len(self.tokens), np.int32)
        for row, text in zip(codes, smiles, strict=True):
            parts = of.split(of.written(text) or "")
            strange = [token for token in parts if token not in classes]
            if strange or len(parts) > self.length:
                what = f"token {strange[0]!r}" if strange else f"{len(parts)} tokens"
                raise ValueError(
                    f"{text!r} has {what}: expected at most {self.length} tokens of {' '.join(self.tokens)}"
                )
            row[: len(parts)] = [classes[token] for token in parts]
        return np.eye(len(self.tokens) + 1, dtype=np.uint8)[codes]

    def decode(self, x: Array | np.ndarray) -> list[str]:
        """Return the SMILES of states [N, L, K], or of points of the simplex: of the most probable tokens up to the first end."""
        codes, read = np.asarray(x).argmax(-1), spoken(self.language).read
        out = []
        for row in codes:
            ends = np.flatnonzero(row == len(self.tokens))
            out.append(read("".join(self.tokens[code] for code in row[: ends[0] if ends.size else None])))
        return out

    def molecules(self, x: Array | np.ndarray) -> list[chemistry.Molecule]:
        """Return the molecules of states [N, L, K]; nothing is corrected."""
        return [chemistry.parsed(text) for text in self.decode(x)]


@dataclasses.dataclass(frozen=True)
class SmilesDomain:
    """Molecules as strings of one notation. Build it with `smiles`.

    form: the notation. train_x [N, L, K]: one-hot uint8. known: their canonical SMILES, for novelty. left_out: lines of the file that
    are not among them, by reason.
    """

    form: Notation
    train_x: np.ndarray
    known: frozenset[str]
    left_out: dict[str, int]
    name: str = "smiles"

    @property
    def shape(self) -> tuple[int, int]:
        """Of one example, (L, K)."""
        return self.form.shape

    @property
    def value_range(self) -> tuple[float, float]:
        """Of a one-hot number, for priors that are Gaussian."""
        return 0.0, 1.0

    def decode(self, x: Array | np.ndarray) -> list[str]:
        """Return the strings of states; see `Notation.decode`."""
        return self.form.decode(x)


def smiles(
    source: str | os.PathLike | None = None,
    length: int | None = 40,
    rare: float = 0.004,
    language: str = "smiles",
    data_dir: str | os.PathLike | None = None,
    sha256: str | None = None,
) -> SmilesDomain:
    """Load molecules from a file of SMILES, one a line; what follows a blank, a tab, a comma or a semicolon is not read.

    Every molecule is its largest fragment, in RDKit's canonical SMILES, once. A first line that is no molecule is a header; where it
    names a column `smiles`, that is read.

    Args:
      source: path, relative to `data_dir` or to RGDIFF_DATA; None for the 5,000 molecules of the NCI that come with RDKit.
      length: L, tokens of the longest molecule that is kept; None keeps all.
      rare: share of the molecules below which a token is rare, in [0, 1); molecules with a rare token are left out.
      language: of the states, smiles or selfies; the file is of SMILES in both cases.
      data_dir: folder of the file; the environment variable RGDIFF_DATA when None.
      sha256: of the file, or None.

    Returns:
      The domain.

    Raises:
      FileNotFoundError: for a missing file.
      ValueError: in one line, without RDKit, or for a file of which fewer than two molecules are left, or most lines are none.

    Example:
      >>> import pytest
      >>> _ = pytest.importorskip("rdkit")
      >>> from rgdiff.domains.molecules import smiles
      >>> domain = smiles.smiles(length=12)
      >>> print(domain.shape[0], domain.decode(domain.train_x) == sorted(domain.known))
      12 True
    """
    chemistry.rdkit()
    if source is None:
        source = Path(importlib.import_module("rdkit.RDConfig").RDDataDir) / "NCI" / "first_5K.smi"
    if not 0 <= rare < 1:
        raise ValueError(f"domain.rare={rare}: expected a share of the molecules, in [0, 1)")
    data = files.read_bytes(source, data_dir=data_dir, sha256=sha256, hint="SMILES, one a line")
    lines = [line.strip() for line in data.decode("utf-8-sig", "replace").splitlines() if line.strip()]
    rows = [[field.strip("\"'") for field in re.split(r"[\s,;]", line)] for line in lines]
    named = [field.lower() for field in rows[0]] if rows else []
    column = named.index("smiles") if "smiles" in named else 0
    read = [chemistry.largest(row[column]) if column < len(row) else None for row in rows]
    if read and read[0] is None:  # a header
        lines, read = lines[1:], read[1:]
    known = sorted({one for one in read if one is not None})
    left_out = {"unreadable": read.count(None)}
    if not known or 2 * left_out["unreadable"] > len(read):
        found = next((line[:40] for line, one in zip(lines, read, strict=True) if one is None), "nothing")
        raise ValueError(
            f"{source}: {left_out['unreadable']} of {len(read)} lines are no molecule, e.g. {found!r}; expected SMILES, one a line"
        )
    of = spoken(language)
    said = {one: text for one in known if (text := of.written(one)) is not None}
    left_out["unsayable"] = len(known) - len(said)
    parts = {one: of.split(text) for one, text in said.items()}
    counts = collections.Counter(token for row in parts.values() for token in set(row))
    common = {token for token, count in counts.items() if count >= rare * len(known)}
    longest = max(map(len, parts.values())) if length is None else checks.at_least("domain.length", length, 1)
    fits = [one for one, row in parts.items() if len(row) <= longest]
    kept = [one for one in fits if set(parts[one]) <= common]
    left_out |= {"longer": len(parts) - len(fits), "of rare tokens": len(fits) - len(kept)}
    if len(kept) < 2:
        raise ValueError(
            f"{source} has {len(kept)} molecules of at most {longest} tokens, none of them rare; expected 2 or more: give "
            "domain.length=null, or a lower domain.rare"
        )
    form = Notation(tuple(sorted({token for one in kept for token in parts[one]})), longest, language)
    return SmilesDomain(form, form.encode(kept), frozenset(kept), {why: n for why, n in left_out.items() if n})
