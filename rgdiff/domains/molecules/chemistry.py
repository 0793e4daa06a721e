"""Chemistry on the host, by RDKit: graphs to molecules with and without a correction of valences, and properties of molecules.

RDKit is imported when it is asked for (`pip install 'rgdiff[mol]'`). Nothing here raises for a graph or a text, whatever it holds:
what is no molecule is None, with a reason.
"""

from __future__ import annotations

import functools
import html
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

THRESHOLDS = (0.5, 1.5, 2.5)  # of an adjacency's numbers, between no bond, single, double and triple bonds
READABLE = {
    "#000000": "currentColor",
    "#0000FF": "#4477dd",
    "#FF0000": "#e04848",
}  # RDKit's colours, on white and on black
PRESENT = 0.5  # the largest feature of an atom is above it
CHARGEABLE = (7, 8)  # with one bond more than neutral ones have, they carry a charge of 1
REASONS = ("", "not finite", "empty", "valence", "unreadable")
LONGEST = 5_000  # characters of a SMILES that is read: RDKit reads by recursion
LINE = 16  # pixels of a line of words under a drawing
CACHED = 2**17  # molecules whose properties are kept, each


class Molecule(NamedTuple):
    """What a graph is: its canonical SMILES, the largest fragment's; whether it was valid as it came; why it is none.

    smiles: None where there is no molecule. valid: before any correction. reason: of `REASONS`; `valence` for a graph whose
    valences are impossible, corrected or not.
    """

    smiles: str | None
    valid: bool
    reason: str = ""


@functools.cache
def rdkit() -> Any:
    """Return RDKit's `Chem`.

    Raises:
      ValueError: in one line, where RDKit is not installed.
    """
    try:
        return importlib.import_module("rdkit.Chem")
    except ImportError:
        raise ValueError("molecules need RDKit, which is not installed: pip install 'rgdiff[mol]'") from None


def quiet() -> Any:
    """Return a context inside which RDKit's warnings, which it prints, are held back."""
    rdkit()
    return importlib.import_module("rdkit.rdBase").BlockLogs()


@functools.cache
def limits(elements: tuple[int, ...]) -> np.ndarray:
    """Return the largest valence of each element without a charge, by RDKit's table.

    Args:
      elements: atomic numbers.

    Returns:
      int [K].
    """
    table = rdkit().GetPeriodicTable()
    return np.array([max(table.GetValenceList(number)) for number in elements])


def discrete(graph: np.ndarray, elements: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return a graph's atoms and bonds: the element of its largest feature, orders 0 to 3 by rounding.

    Args:
      graph: [N, F + N + 1], as `rgdiff.graphs.packed` makes it. Nodes without a feature above 1/2 are no atoms.
      elements: atomic numbers of the F features.

    Returns:
      Indices into the elements [A], and symmetric orders [A, A].

    Example:
      >>> import pytest
      >>> _ = pytest.importorskip("rdkit")
      >>> import numpy as np
      >>> from rgdiff.domains.molecules import chemistry
      >>> rows = np.array([[1.1, 0.0, 0.0, 1.8, 1.0], [0.2, 0.9, 1.8, 0.0, 1.0]])  # C=O
      >>> print(*chemistry.discrete(rows, (6, 8)))
      [0 1] [[0 2]
       [2 0]]
    """
    kinds = len(elements)
    features, adjacency, mask = graph[:, :kinds], graph[:, kinds:-1], graph[:, -1]
    kept = (features.max(-1) > PRESENT) & (mask > 0.5)
    orders = np.digitize(adjacency, THRESHOLDS)[np.ix_(kept, kept)]
    orders = np.triu(orders, 1)
    return features[kept].argmax(-1), orders + orders.T


def corrected(orders: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Lower bonds until no atom has more than its limit: of an atom that has, the highest bond by one, the first of equals.

    Args:
      orders: symmetric [A, A].
      limit: [A].

    Returns:
      The orders left.

    Example:
      >>> import pytest
      >>> _ = pytest.importorskip("rdkit")
      >>> import numpy as np
      >>> from rgdiff.domains.molecules import chemistry
      >>> print(chemistry.corrected(np.array([[0, 3], [3, 0]]), np.array([4, 2])))  # C#O becomes C=O
      [[0 2]
       [2 0]]
    """
    orders = orders.copy()
    while (over := np.flatnonzero(orders.sum(-1) > limit)).size:
        other = int(orders[over[0]].argmax())
        orders[over[0], other] -= 1
        orders[other, over[0]] -= 1
    return orders


def molecule(graph: np.ndarray, elements: Sequence[int]) -> Molecule:
    """Return the molecule of a graph, with its valences corrected where they are impossible.

    N with four bonds and O with three carry a positive charge. Of several fragments the largest is the molecule.

    Args:
      graph: [N, F + N + 1].
      elements: atomic numbers of the F features.

    Returns:
      The molecule.

    Example:
      >>> import pytest
      >>> _ = pytest.importorskip("rdkit")
      >>> import numpy as np
      >>> from rgdiff.domains.molecules import chemistry
      >>> print(chemistry.molecule(np.array([[1.0, 0, 0, 3, 1], [0, 1.0, 3, 0, 1]]), (6, 9)))  # C#F is corrected
      Molecule(smiles='CF', valid=False, reason='valence')
    """
    graph = np.asarray(graph, np.float64)
    if not np.isfinite(graph).all():
        return Molecule(None, False, "not finite")
    atoms, orders = discrete(graph, elements)
    if not len(atoms):
        return Molecule(None, False, "empty")
    return _molecule(atoms.astype(np.int8).tobytes(), orders.astype(np.int8).tobytes(), tuple(elements))


@functools.lru_cache(CACHED)
def _molecule(atoms_: bytes, orders_: bytes, elements: tuple[int, ...]) -> Molecule:
    """Return the molecule of discrete atoms and bonds, which candidates of a late move share."""
    atoms = np.frombuffer(atoms_, np.int8)
    orders = np.frombuffer(orders_, np.int8).reshape(len(atoms), -1).astype(int)
    numbers = np.asarray(elements)[atoms]
    limit = limits(elements)[atoms]
    charged = np.isin(numbers, CHARGEABLE) & (orders.sum(-1) == limit + 1)
    valid = bool((orders.sum(-1) <= limit + charged).all())
    if not valid:
        orders = corrected(orders, limit + charged)
        charged &= orders.sum(-1) == limit + 1
    smiles = _smiles(numbers, orders, charged)
    if smiles is None:
        return Molecule(None, False, "unreadable")
    return Molecule(smiles, valid, "" if valid else "valence")


def _smiles(numbers: np.ndarray, orders: np.ndarray, charged: np.ndarray) -> str | None:
    chem = rdkit()
    bonds = (None, chem.BondType.SINGLE, chem.BondType.DOUBLE, chem.BondType.TRIPLE)
    built = chem.RWMol()
    for number, charge in zip(numbers, charged, strict=True):
        atom = chem.Atom(int(number))
        atom.SetFormalCharge(int(charge))
        built.AddAtom(atom)
    for i, j in zip(*np.nonzero(np.triu(orders)), strict=True):
        built.AddBond(int(i), int(j), bonds[orders[i, j]])
    try:
        with quiet():
            chem.SanitizeMol(built)
            return canonical(chem.MolToSmiles(_largest(built)))
    except (ValueError, RuntimeError):  # what RDKit raises for what it cannot read
        return None


def _largest(mol: Any) -> Any:
    """Return the fragment with the most atoms, the last by its SMILES of equals."""
    chem = rdkit()
    return max(chem.GetMolFrags(mol, asMols=True), key=lambda part: (part.GetNumAtoms(), chem.MolToSmiles(part)))


def parsed(smiles: str) -> Molecule:
    """Return the molecule of a text; nothing is corrected.

    Args:
      smiles: any text.

    Example:
      >>> import pytest
      >>> _ = pytest.importorskip("rdkit")
      >>> from rgdiff.domains.molecules import chemistry
      >>> print(chemistry.parsed("OCC"), chemistry.parsed("C(C").reason)
      Molecule(smiles='CCO', valid=True, reason='') unreadable
    """
    found = canonical(smiles)
    return Molecule(found, found is not None, "" if found is not None else "unreadable" if smiles else "empty")


def molecules(graphs: np.ndarray, elements: Sequence[int]) -> list[Molecule]:
    """Return the molecules of graphs [B, N, F + N + 1], each as `molecule` has it.

    Args:
      graphs: [B, N, F + N + 1].
      elements: atomic numbers of the F features.
    """
    return [molecule(graph, elements) for graph in np.asarray(graphs)]


def read(smiles: str) -> Any:
    """Return RDKit's molecule of a text, None for one that is no molecule, has no atom, or is too long to be one.

    Args:
      smiles: any text.
    """
    if len(smiles) > LONGEST or not smiles.isascii() or "\0" in smiles:
        return None
    try:
        with quiet():
            mol = rdkit().MolFromSmiles(smiles)
    except (ValueError, RuntimeError):
        return None
    return mol if mol is not None and mol.GetNumAtoms() else None


@functools.lru_cache(CACHED)
def canonical(smiles: str) -> str | None:
    """Return the canonical SMILES of a text, None for one that is no molecule.

    Args:
      smiles: any text.

    Example:
      >>> import pytest
      >>> _ = pytest.importorskip("rdkit")
      >>> from rgdiff.domains.molecules import chemistry
      >>> print(chemistry.canonical("OCC"), chemistry.canonical("C(C"), chemistry.canonical(""))
      CCO None None
    """
    mol = read(smiles)
    return None if mol is None else rdkit().MolToSmiles(mol)


@functools.lru_cache(CACHED)
def scaffold(smiles: str) -> str:
    """Return the Bemis-Murcko scaffold of a molecule (doi:10.1021/jm9602928), canonical; empty where it has no ring.

    Args:
      smiles: canonical.

    Example:
      >>> import pytest
      >>> _ = pytest.importorskip("rdkit")
      >>> from rgdiff.domains.molecules import chemistry
      >>> print(chemistry.scaffold("CCc1ccccc1"))
      c1ccccc1
    """
    return str(importlib.import_module("rdkit.Chem.Scaffolds.MurckoScaffold").MurckoScaffoldSmiles(smiles))


def largest(smiles: str) -> str | None:
    """Return the canonical SMILES of the fragment with the most atoms, None for a text that is no molecule.

    Args:
      smiles: any text.

    Example:
      >>> import pytest
      >>> _ = pytest.importorskip("rdkit")
      >>> from rgdiff.domains.molecules import chemistry
      >>> print(chemistry.largest("[Na+].CC(=O)[O-]"))
      CC(=O)[O-]
    """
    whole = canonical(smiles)
    if whole is None or "." not in whole:
        return whole
    chem = rdkit()
    with quiet():
        return canonical(chem.MolToSmiles(_largest(chem.MolFromSmiles(whole))))


def qed(mol: Any) -> float:
    """Return the quantitative estimate of drug-likeness in [0, 1] (doi:10.1038/nchem.1243).

    Args:
      mol: an RDKit molecule.
    """
    return float(importlib.import_module("rdkit.Chem.QED").qed(mol))


def synthetic_accessibility(mol: Any) -> float:
    """Return the SA score, 1 (easy) to 10 (doi:10.1186/1758-2946-1-8).

    Args:
      mol: an RDKit molecule.
    """
    return float(importlib.import_module("rdkit.Contrib.SA_Score.sascorer").calculateScore(mol))


def sa(mol: Any) -> float:
    """Return synthesisability, (10 - SA) / 9 in [0, 1], higher is easier.

    Args:
      mol: an RDKit molecule.
    """
    return (10 - synthetic_accessibility(mol)) / 9


def logp(mol: Any) -> float:
    """Return Crippen's octanol-water partition coefficient.

    Args:
      mol: an RDKit molecule.
    """
    return float(importlib.import_module("rdkit.Chem.Crippen").MolLogP(mol))


def penalised_logp(mol: Any) -> float:
    """Return logP - SA - the atoms beyond six of the largest ring (arXiv 1610.02415, without standardisation).

    Args:
      mol: an RDKit molecule.
    """
    largest = max((len(ring) for ring in mol.GetRingInfo().AtomRings()), default=0)
    return logp(mol) - synthetic_accessibility(mol) - max(largest - 6, 0)


def weight(mol: Any) -> float:
    """Return the molecular weight in Da.

    Args:
      mol: an RDKit molecule.
    """
    return float(importlib.import_module("rdkit.Chem.Descriptors").MolWt(mol))


PROPERTIES = {"qed": qed, "sa": sa, "logp": logp, "penalised_logp": penalised_logp, "weight": weight}


@functools.lru_cache(CACHED)
def measured(name: str, smiles: str) -> float:
    """Return a property of a molecule; NaN where RDKit cannot compute it. What was computed is kept by canonical SMILES.

    Args:
      name: of `PROPERTIES`.
      smiles: canonical.

    Example:
      >>> import pytest
      >>> _ = pytest.importorskip("rdkit")
      >>> from rgdiff.domains.molecules import chemistry
      >>> print(f"{chemistry.measured('weight', 'CCO'):.2f}")
      46.07
    """
    if name not in PROPERTIES:
        raise ValueError(f"the property must be one of {', '.join(PROPERTIES)}, got {name!r}")
    mol = read(smiles)
    try:
        with quiet():
            return float("nan") if mol is None else PROPERTIES[name](mol)
    except (ValueError, RuntimeError, ZeroDivisionError, OverflowError):
        return float("nan")


def fingerprints(smiles: Sequence[str]) -> np.ndarray:
    """Return Morgan fingerprints of radius 2 (ECFP4).

    Args:
      smiles: canonical ones.

    Returns:
      bool [N, 2048].
    """
    make = importlib.import_module("rdkit.Chem.rdFingerprintGenerator").GetMorganGenerator(radius=2, fpSize=2048)
    rows = [make.GetFingerprintAsNumPy(rdkit().MolFromSmiles(one)) for one in smiles]
    return np.array(rows, bool).reshape(-1, 2048)


def similarities(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Tanimoto similarities of fingerprints: shared bits over bits of either.

    Args:
      a: bool [N, D].
      b: bool [M, D].

    Returns:
      [N, M], in [0, 1].

    Example:
      >>> import pytest
      >>> _ = pytest.importorskip("rdkit")
      >>> import numpy as np
      >>> from rgdiff.domains.molecules import chemistry
      >>> print(chemistry.similarities(np.array([[True, True, False]]), np.array([[True, False, False]])))
      [[0.5]]
    """
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    shared = a @ b.T
    either = a.sum(-1)[:, None] + b.sum(-1)[None] - shared
    return shared / np.maximum(either, 1)


def diversity(smiles: Sequence[str]) -> float:
    """Return the internal diversity: 1 minus the mean Tanimoto similarity of two different samples; NaN below two.

    Args:
      smiles: canonical, one a sample.
    """
    if len(smiles) < 2:
        return float("nan")
    prints = fingerprints(smiles)
    alike = similarities(prints, prints)
    return float(1 - (alike.sum() - np.trace(alike)) / (len(smiles) * (len(smiles) - 1)))


def figures(found: Sequence[Molecule], known: frozenset[str] = frozenset()) -> dict[str, float]:
    """Return how many of the samples are molecules, and how they differ.

    Args:
      found: one a sample.
      known: canonical SMILES of the data, for novelty; empty where there are none.

    Returns:
      valid: the share valid before correction; corrected: the share that are molecules after it; unique: different molecules over
      molecules; scaffolds: different Bemis-Murcko scaffolds over molecules; diversity: as `diversity`; novel: with `known`, the share of different molecules that are not among them.
    """
    smiles = [one.smiles for one in found if one.smiles is not None]
    different = set(smiles)
    share = lambda part, whole: part / whole if whole else float("nan")  # noqa: E731
    out = {
        "valid": share(sum(one.valid for one in found), len(found)),
        "corrected": share(len(smiles), len(found)),
        "unique": share(len(different), len(smiles)),
        "scaffolds": share(len({scaffold(one) for one in different}), len(smiles)),
        "diversity": diversity(smiles),
    }
    return out | ({"novel": share(len(different - known), len(different))} if known else {})


def drawn(smiles: str | None, size: int = 180, lines: Sequence[str] = (), below: str | None = None) -> str:
    """Return a drawing of a molecule as an SVG text; a blank one where there is none.

    Args:
      smiles: canonical, or None.
      size: of its side, in pixels.
      lines: of words under it.
      below: another molecule under those, smaller.
    """
    high, parts = size, [_picture(smiles, size)]
    for line in lines:
        high += LINE
        text = f'<text x="50%" y="{high - 4}" text-anchor="middle" font-size="12" fill="currentColor">{html.escape(line)}</text>'
        parts.append(text)
    if below is not None:
        small = int(0.7 * size)
        parts.append(_picture(below, small, (size - small) // 2, high))
        high += small
    words = html.escape(" ".join(filter(None, (smiles, below and f"near {below}"))) or "no molecule")
    return f'<svg viewBox="0 0 {size} {high}" role="img"><title>{words}</title>{"".join(parts)}</svg>'


def _picture(smiles: str | None, size: int, x: int = 0, y: int = 0) -> str:
    mol = None if smiles is None else rdkit().MolFromSmiles(smiles)
    if mol is None:
        return '<text x="50%" y="50%" text-anchor="middle" fill="currentColor">no molecule</text>'
    drawing = importlib.import_module("rdkit.Chem.Draw.rdMolDraw2D").MolDraw2DSVG(size, size)
    drawing.drawOptions().clearBackground = False
    drawing.DrawMolecule(mol)
    drawing.FinishDrawing()
    text = drawing.GetDrawingText()
    for color, readable in READABLE.items():
        text = text.replace(color, readable)
    return text[text.index("<svg") :].strip().replace("<svg", f'<svg x="{x}" y="{y}"', 1)
