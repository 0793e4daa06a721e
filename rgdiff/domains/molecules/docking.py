"""Docking of molecules to a receptor by AutoDock Vina, as an oracle: its Python binding, or an executable with Vina's options.

Needs `vina`, `meeko` and `gemmi` (`pip install 'rgdiff[dock]'`), for an executable the last two. A molecule that cannot be laid
out in space, prepared or placed has no value, with that reason; one that hangs is killed with whatever it started.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rgdiff.domains.molecules import chemistry
from rgdiff.oracles import Infeasible, TextOracle, oracle

HEAVIEST = 100  # atoms that are not hydrogen of a molecule that is docked


@dataclasses.dataclass(frozen=True)
class Docking:
    """The docking of a SMILES: minus the energy of its best pose, in kcal/mol, so that more is better.

    Args:
      receptor: path of a .pdbqt file.
      center, size: of the box that is searched, in Angstrom.
      exhaustiveness: of the search, Vina's.
      seed: of the conformer and of the search.
      executable: with Vina's options; None for the Python binding.
    """

    receptor: str
    center: tuple[float, float, float]
    size: tuple[float, float, float]
    exhaustiveness: int = 1
    seed: int = 1
    executable: str | None = None

    def __call__(self, smiles: str) -> float:
        """Return -E in kcal/mol; raise `rgdiff.oracles.Infeasible` where there is no pose."""
        text = ligand(smiles, self.seed)
        return self._by_executable(text) if self.executable else self._by_binding(text)

    def _by_binding(self, text: str) -> float:
        engine = _engine(self.receptor, self.center, self.size, self.seed)
        engine.set_ligand_from_string(text)
        engine.dock(exhaustiveness=self.exhaustiveness, n_poses=1)
        energies = engine.energies(1)
        if not len(energies):
            raise Infeasible("no pose")
        return -float(energies[0][0])

    def _by_executable(self, text: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            given, made = Path(folder) / "ligand.pdbqt", Path(folder) / "out.pdbqt"
            given.write_text(text)
            box = {
                f"{name}_{axis}": v
                for name in ("center", "size")
                for axis, v in zip("xyz", getattr(self, name), strict=True)
            }
            options = {"receptor": self.receptor, "ligand": given, "out": made, **box, "cpu": 1, "num_modes": 1}
            options |= {"exhaustiveness": self.exhaustiveness, "seed": self.seed}
            command = [str(self.executable), *(f"--{name}={value}" for name, value in options.items())]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
            lines = made.read_text().splitlines() if made.is_file() else []
        for line in lines:
            if line.startswith("REMARK VINA RESULT:"):
                return -float(line.split()[3])
        raise Infeasible("no pose")


def ligand(smiles: str, seed: int = 1) -> str:
    """Return a molecule as Vina takes it, PDBQT: a conformer of RDKit's relaxed by its force field, prepared by Meeko.

    Args:
      smiles: canonical.
      seed: of the conformer.

    Raises:
      rgdiff.oracles.Infeasible: for a text that is no molecule, or one that is too large, has no conformer or cannot be prepared.
    """
    chem = chemistry.rdkit()
    mol = chemistry.read(smiles)
    if mol is None:
        raise Infeasible("unreadable")
    if mol.GetNumAtoms() > HEAVIEST:
        raise Infeasible("too large")
    layout = importlib.import_module("rdkit.Chem.AllChem")
    meeko = importlib.import_module("meeko")
    with chemistry.quiet():
        mol = chem.AddHs(mol)
        if layout.EmbedMolecule(mol, randomSeed=seed) and layout.EmbedMolecule(
            mol, randomSeed=seed, useRandomCoords=True
        ):
            raise Infeasible("no conformer")
        try:
            layout.UFFOptimizeMolecule(mol)
            prepared = meeko.MoleculePreparation().prepare(mol)
            text, fine, _ = meeko.PDBQTWriterLegacy.write_string(prepared[0])
        except (ValueError, RuntimeError, IndexError, KeyError) as error:
            raise Infeasible("no preparation") from error
    if not fine:
        raise Infeasible("no preparation")
    return str(text)


@functools.lru_cache(2)
def _engine(receptor: str, center: tuple[float, ...], size: tuple[float, ...], seed: int) -> Any:
    """Return Vina with its maps of the receptor, which take seconds, once a process."""
    engine = importlib.import_module("vina").Vina(sf_name="vina", cpu=1, seed=seed, verbosity=0)
    engine.set_receptor(receptor)
    engine.compute_vina_maps(center=list(center), box_size=list(size))
    return engine


def docking(
    receptor: str | os.PathLike[str],
    center: Sequence[float],
    size: Sequence[float],
    *,
    exhaustiveness: int = 1,
    seed: int = 1,
    executable: str | None = None,
    workers: int | None = None,
    timeout: float = 300.0,
    retries: int = 1,
    folder: str | os.PathLike[str] | None = None,
) -> TextOracle:
    """Make the oracle of docking: canonical SMILES -> minus the energy of the best pose in kcal/mol.

    Args:
      receptor: a .pdbqt file.
      center, size: of the box that is searched, x, y and z in Angstrom.
      exhaustiveness: of the search, >= 1; seconds grow with it.
      seed: of conformers and searches, so that an answer is a function of the molecule.
      executable: name or path of a program with Vina's options, in place of the Python binding.
      workers, timeout, retries, folder: of the pool and of what it keeps, see `rgdiff.oracles.oracle`. Answers belong to the
        receptor's contents, the box and the search.

    Returns:
      The oracle.

    Raises:
      ValueError: in one line, for a missing receptor, a box that is none, a program that is not there, or without the packages.
    """
    from rgdiff import checks

    chemistry.rdkit()
    wanted = ("meeko", "gemmi") if executable else ("vina", "meeko", "gemmi")
    if missing := [name for name in wanted if importlib.util.find_spec(name) is None]:
        raise ValueError(f"docking needs {', '.join(missing)}, not installed here: pip install 'rgdiff[dock]'")
    if executable and shutil.which(executable) is None:
        raise ValueError(
            f"docking: there is no program {executable!r}; name one with Vina's options, or None for the package"
        )
    file = Path(receptor).expanduser().absolute()
    if not file.is_file():
        raise ValueError(f"docking: no receptor at {file}; give a .pdbqt file")
    box = [tuple(float(v) for v in part) for part in (center, size)]
    if [len(part) for part in box] != [3, 3] or min(box[1]) <= 0:
        raise ValueError(
            f"docking: a box has a center and sizes above 0, each x, y, z; got {list(center)} and {list(size)}"
        )
    checks.at_least("exhaustiveness", exhaustiveness, 1)
    made = Docking(str(file), box[0], box[1], exhaustiveness, seed, executable)  # type: ignore[arg-type]
    engine = executable or f"vina {importlib.import_module('importlib.metadata').version('vina')}"
    contents = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    version = f"{engine}, receptor {contents}, box {box}, exhaustiveness {exhaustiveness}, seed {seed}"
    settings: dict[str, Any] = {"workers": workers, "timeout": timeout, "retries": retries, "folder": folder}
    return oracle(made, name="docking", version=version, **settings)
