"""NSPDK, the neighbourhood subgraph pairwise distance kernel of molecules (Costa & De Raedt 2010), and the distance of two sets by it.

GDSS and its successors report it. A feature is a pair of atoms at a distance, each with its neighbourhood of a radius, as EDeN's
`vectorize(complexity=4)` makes them; EDeN hashes features to 16 bits, here they stay apart. A published figure also depends on
how its molecules were made graphs: here bonds are those of RDKit, and an aromatic bond has a type of its own.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any

from rgdiff.domains.molecules import chemistry

RADIUS = DISTANCE = 4  # bonds: EDeN's complexity in the published figures


def _shells(near: Sequence[Sequence[int]], root: int, depth: int) -> list[list[int]]:
    """Return the vertices at distance 0, 1, ... `depth` of one, as far as there are any."""
    seen, out, queue = {root: 0}, [[root]], deque([root])
    while queue:
        vertex = queue.popleft()
        if (far := seen[vertex] + 1) > depth:
            continue
        for other in near[vertex]:
            if other not in seen:
                seen[other] = far
                queue.append(other)
                if far == len(out):
                    out.append([])
                out[far].append(other)
    return out


def features(smiles: str) -> dict[Any, float]:
    """Return a molecule's features: numbers whose squares sum to 1.

    Bonds are vertices between their atoms, so that their types belong to neighbourhoods. A neighbourhood is known by the types and
    degrees of the vertices at each distance of its root. Features of every radius and distance have unit norm, then all of them.

    Args:
      smiles: of one molecule.

    Example:
      >>> import pytest
      >>> _ = pytest.importorskip("rdkit")
      >>> from rgdiff.domains.molecules import nspdk
      >>> print(round(sum(value**2 for value in nspdk.features("CCO").values()), 6))
      1.0
    """
    mol = chemistry.read(smiles)
    labels: list[Any] = [atom.GetSymbol() for atom in mol.GetAtoms()]
    atoms = len(labels)
    near: list[list[int]] = [[] for _ in labels]
    for bond in mol.GetBonds():
        ends = [bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()]
        for end in ends:
            near[end].append(len(labels))
        labels.append(str(bond.GetBondType()))
        near.append(ends)
    types = [(label, len(others)) for label, others in zip(labels, near, strict=True)]
    shells = [_shells(near, atom, 2 * max(RADIUS, DISTANCE)) for atom in range(atoms)]
    seen = [[tuple(sorted(types[v] for v in shell)) for shell in found] for found in shells]
    around = [[hash(tuple(kinds[: 2 * r + 1])) for r in range(RADIUS + 1) if 2 * r < len(kinds)] for kinds in seen]
    blocks: dict[tuple[int, int], Counter[Any]] = {}
    for atom in range(atoms):
        for distance in range(DISTANCE + 1):
            for other in shells[atom][2 * distance] if 2 * distance < len(shells[atom]) else ():
                for radius, (a, b) in enumerate(zip(around[atom], around[other], strict=False)):
                    block = blocks.setdefault((radius, distance), Counter())
                    block[(min(a, b), max(a, b))] += 1
                    block[b] += 1  # what is around an atom, whatever the atom
    norm = len(blocks) ** 0.5
    out: dict[Any, float] = {}
    for where, block in blocks.items():
        length = sum(count**2 for count in block.values()) ** 0.5
        out |= {(where, feature): count / length / norm for feature, count in block.items()}
    return out


def mean(smiles: Sequence[str]) -> dict[Any, float]:
    """Return the mean features of a set of molecules, none of an empty one.

    Args:
      smiles: one a molecule.
    """
    total: defaultdict[Any, float] = defaultdict(float)
    for one in smiles:
        for feature, value in features(one).items():
            total[feature] += value / len(smiles)
    return total


def discrepancy(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> float:
    """Return the squared maximum mean discrepancy of two sets of molecules by the kernel, in [0, 2]; NaN where one is empty.

    It is biased upwards by few samples: compare only at equal numbers of them.

    Args:
      ours, theirs: from `mean`.

    Example:
      >>> import pytest
      >>> _ = pytest.importorskip("rdkit")
      >>> from rgdiff.domains.molecules import nspdk
      >>> alcohol, ring = nspdk.mean(["CCO", "CCCO"]), nspdk.mean(["c1ccccc1"])
      >>> print(nspdk.discrepancy(alcohol, alcohol), nspdk.discrepancy(alcohol, ring) > 1)
      0.0 True
    """
    if not ours or not theirs:
        return float("nan")
    return sum((ours.get(name, 0.0) - theirs.get(name, 0.0)) ** 2 for name in ours.keys() | theirs.keys())
