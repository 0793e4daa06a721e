"""Readers of sequence files: FASTA, and tables (CSV, TSV) with a header, plain or gzipped, by path or by URL with a checksum.

They return text and numbers as they stand in the file, without blanks around them; letters become one-hot states in `rgdiff.domains.sequences.data`.
Nothing is downloaded unless download=True says so, and nothing is written.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

URL_SCHEMES = ("https://", "http://")


def located(file: str | os.PathLike, data_dir: str | os.PathLike | None = None) -> Path:
    """Return where a file is.

    Args:
      file: a path, relative to `data_dir` where there is one.
      data_dir: folder of the data; the environment variable RGDIFF_DATA when None.

    Example:
      >>> from rgdiff.domains.sequences import files
      >>> print(files.located("parp1.pdbqt", "/receptors"))
      /receptors/parp1.pdbqt
    """
    return Path(data_dir or os.environ.get("RGDIFF_DATA") or "").expanduser() / Path(file).expanduser()


def read_bytes(
    source: str | os.PathLike,
    *,
    data_dir: str | os.PathLike | None = None,
    sha256: str | None = None,
    download: bool = False,
    hint: str = "",
) -> bytes:
    """Read a whole file by path, or by URL where the download is asked for; gzip is undone.

    Args:
      source: a path, relative to `data_dir` where there is one; or an https:// or http:// address.
      data_dir: folder of the data; the environment variable RGDIFF_DATA when None. A file there with the last name of
        a URL is read in its place.
      sha256: hexadecimal checksum of the file as it lies on disk (compressed, if it is). A download needs one.
      download: fetch a URL, into memory. Keep a copy in `data_dir` to do so only once.
      hint: where a missing file can be had; ends the error's line.

    Raises:
      FileNotFoundError: for a missing file, with where it was looked for.
      ValueError: for another checksum, a URL without download=True or without a checksum, damaged gzip data.
    """
    address = os.fspath(source)
    remote = address.startswith(URL_SCHEMES)
    path = located(address.rpartition("/")[2] if remote else address, data_dir)
    if path.is_file():
        data = path.read_bytes()
    elif not remote:
        where = "" if data_dir or os.environ.get("RGDIFF_DATA") else "; name its folder with data_dir= or RGDIFF_DATA"
        raise FileNotFoundError(f"no sequence file at {path}{where}{'; ' + hint if hint else ''}")
    elif not download:
        raise ValueError(f"{address} is not at {path}; put it there, or ask for it with download=true and its sha256=")
    elif sha256 is None:
        raise ValueError(f"a download needs its checksum; give sha256= for {address}")
    else:
        data = _download(address)
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise ValueError(
            f"{address}: sha256 is {found}, expected {sha256}; it is another file or a damaged one: fetch it again, or give "
            "domain.sha256=null if it is what you mean"
        )
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{address}: damaged gzip file ({error}); fetch it again") from None
    return data


def _download(address: str) -> bytes:
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(address, timeout=60) as response:
            return response.read()
    except (urllib.error.URLError, OSError) as error:
        raise FileNotFoundError(f"cannot download {address}: {error}") from None


def is_fasta(data: bytes) -> bool:
    """Whether the first line that is neither empty nor a comment (`;`) begins with `>`; a byte-order mark is none of it."""
    return next(_fasta_lines(data.decode("utf-8-sig", "replace")), "").startswith(">")


def _fasta_lines(text: str) -> Iterator[str]:
    return (line for line in map(str.strip, text.splitlines()) if line and not line.startswith(";"))


def read_fasta(data: bytes, name: str = "FASTA") -> tuple[list[str], list[str]]:
    """Parse FASTA: a `>` line with a name, then lines of letters; lines that begin with `;` are comments.

    Returns:
      Names (without `>`), and sequences in the letters of the file.

    Raises:
      ValueError: for text that does not begin with `>`, or a record without letters.
    """
    lines = list(_fasta_lines(_text(data, name)))
    if not lines or not lines[0].startswith(">"):
        raise ValueError(
            f"{name}: FASTA begins with a line '>name', found {lines[0][:40]!r}" if lines else f"{name}: empty"
        )
    names: list[str] = []
    parts: list[list[str]] = []
    for line in lines:
        if line.startswith(">"):
            names.append(line[1:].strip())
            parts.append([])
        else:
            parts[-1].append("".join(line.split()))
    sequences = ["".join(lines) for lines in parts]
    for record, sequence in zip(names, sequences, strict=True):
        if not sequence:
            raise ValueError(f"{name}: record {record!r} has no letters")
    return names, sequences


def read_table(data: bytes, columns: Sequence[str | int], name: str = "table") -> list[list[str]]:
    """Parse a table with a header, separated by tabs where the header has one and by commas elsewhere.

    Args:
      columns: which to return: names in the header, or positions from 0 (headers can repeat a name).

    Returns:
      The columns, each a list of texts, without blanks around them.

    Raises:
      ValueError: for a column that is not there, or a row of another length than the header.
    """
    text = _text(data, name)
    header_line = text.partition("\n")[0]
    try:
        rows = list(csv.reader(io.StringIO(text), delimiter="\t" if "\t" in header_line else ","))
    except csv.Error as error:
        raise ValueError(f"{name} is not a table: {error}") from None
    if len(rows) < 2:
        raise ValueError(f"{name}: expected a header and at least one row, found {len(rows)} lines")
    rows = [[field.strip() for field in row] for row in rows]
    header = rows[0]
    places = []
    for column in columns:
        place = column if isinstance(column, int) else header.index(column) if column in header else None
        if place is None or not 0 <= place < len(header):
            raise ValueError(f"{name} has no column {column!r}; its header is {', '.join(header)[:200]}")
        places.append(place)
    kept = [row for row in rows[1:] if row]
    for number, row in enumerate(kept, 2):
        if len(row) != len(header):
            raise ValueError(f"{name}, row {number}: {len(row)} fields where the header has {len(header)}")
    return [[row[place] for row in kept] for place in places]


def numbers(texts: Sequence[str], name: str = "table") -> np.ndarray:
    """Return a column as float32; an empty field is NaN.

    Raises:
      ValueError: for a field that is not a number.
    """
    out = np.empty(len(texts), np.float32)
    for row, text in enumerate(texts):
        try:
            out[row] = float(text) if text.strip() else np.nan
        except ValueError:
            raise ValueError(f"{name}, row {row + 2}: expected a number, found {text!r}") from None
    return out


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not a text file; FASTA, CSV and TSV are read") from None
