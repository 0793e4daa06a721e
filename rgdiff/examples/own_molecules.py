"""Your own molecules and your own score of one: a file of SMILES, a Python function, and the report of SVDD beside the prior.

Run it: `python -m rgdiff.examples.own_molecules [FILE]`

FILE has a SMILES a line. Without one, 600 chains of C, N and O stand in for it. What is yours are `score` and the lines of `run`:
the function takes one canonical SMILES and may be slow, for it is asked once a molecule, in processes of its own, which
import this module; so it needs a module, and JAX is imported where it is needed.
"""

import importlib.util
import random
import sys
import tempfile
from pathlib import Path


def score(smiles: str) -> float:
    """Return the polar surface area per heavy atom, in square Angstrom; what RDKit cannot read is never asked for."""
    from rdkit import Chem  # pyright: ignore[reportMissingImports]
    from rdkit.Chem import rdMolDescriptors  # pyright: ignore[reportMissingImports]

    mol = Chem.MolFromSmiles(smiles)
    return rdMolDescriptors.CalcTPSA(mol) / mol.GetNumHeavyAtoms()


def run(file: Path, out: Path, *more: str) -> dict:
    """Train a prior on the file's molecules, steer it by `score`, and return the summary; the page is at `out`/report.html."""
    from rgdiff.recipes.run import run_recipe

    sys.path.insert(0, str(Path(__file__).parent))  # where this module is found as yours is: beside the script
    overrides = [f"domain.source={file}", "reward=smiles", "reward.fn=own_molecules.score", f"out={out}", *more]
    return run_recipe("smiles_svdd", [*overrides, "methods.svdd.temperature=1.0"])


def main() -> None:
    """Run the tutorial; what it says is asserted."""
    if importlib.util.find_spec("rdkit") is None:
        print("this example needs RDKit: pip install 'rgdiff[mol]'")
        return
    folder = Path(tempfile.mkdtemp(prefix="own_molecules_"))
    if len(sys.argv) > 1:
        run(Path(sys.argv[1]).absolute(), folder / "run")
        return
    chains = random.Random(0)
    lines = ["".join(chains.choices("CCCCNO", k=chains.randint(6, 12))) for _ in range(600)]
    (folder / "chains.smi").write_text("\n".join(lines))
    # Chains are learned in seconds by a small network. Leave these lines out with molecules of your own.
    small = ["domain.length=12", "prior.network.width=32", "prior.network.depth=2", "prior.network.heads=2"]
    brief = ["prior.train.steps=300", "prior.train.optimizer.decay_steps=300", f"cache_dir={folder}"]
    summary = run(folder / "chains.smi", folder / "run", *small, *brief)
    assert summary["prior/valid"] > 0.9  # a string of C, N and O is a molecule, whatever their order
    assert summary["svdd/reward_mean"] > 1.5 * summary["prior/reward_mean"]
    assert (folder / "run" / "report.html").exists()


if __name__ == "__main__":
    main()
