"""Docking by AutoDock Vina: one known value, failures with their reasons, and a program in place of the package."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rdkit", reason="rdkit is not installed: pip install 'rgdiff[dock]'")
pytest.importorskip("meeko", reason="meeko is not installed: pip install 'rgdiff[dock]'")
pytest.importorskip("gemmi", reason="gemmi is not installed: pip install 'rgdiff[dock]'")

from rgdiff.domains.molecules.docking import docking, ligand
from rgdiff.oracles import Infeasible

RECEPTOR = Path(os.environ.get("RGDIFF_DATA", "")) / "receptors" / "parp1.pdbqt"
BOX = {"center": [26.413, 11.282, 27.238], "size": [18.521, 17.479, 19.995]}
ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"


@pytest.fixture
def program(tmp_path):
    """Return a function that makes a program which writes a pose, or does what else a line of shell says."""
    (tmp_path / "receptor.pdbqt").write_text("ATOM\n")

    def made(does, timeout=60.0):
        file = tmp_path / "vina.sh"
        file.write_text(f'#!/bin/sh\nfor a in "$@"; do case $a in --out=*) out=${{a#--out=}};; esac; done\n{does}\n')
        file.chmod(0o755)
        return docking(tmp_path / "receptor.pdbqt", **BOX, executable=str(file), workers=1, timeout=timeout, retries=0)

    return made


def test_a_program_is_asked_and_its_failures_have_reasons(program):
    good = program('grep -q ROOT "${2#--ligand=}" && echo "REMARK VINA RESULT:   -7.25  0.0  0.0" > $out')
    np.testing.assert_array_equal(good(["CCO", "CC(", "C" * 150]), [7.25, np.nan, np.nan])
    assert {k: good.counts()[k] for k in ("unreadable", "too large")} == {"unreadable": 1, "too large": 1}
    none = program("exit 0  # a second program")
    assert np.isnan(none(["CCC"])).all()


@pytest.mark.slow
def test_a_hung_program_is_killed_with_its_molecule(program, tmp_path):
    hung = program(f"echo $$ > {tmp_path / 'pid'}; sleep 600", timeout=6.0)
    assert np.isnan(hung(["CCN"])).all() and hung.counts()["timeout"] == 1
    state, until = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat"), time.monotonic() + 20
    while state.exists() and state.read_text().split()[2] != "Z":  # dead, though its new parent may never ask
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_molecule_without_a_conformer_is_infeasible():
    with pytest.raises(Infeasible, match="unreadable"):
        ligand("CC(")
    assert "ROOT" in ligand("CCO")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"executable": "no-such-vina"}, "there is no program 'no-such-vina'"),
        ({"receptor": "missing.pdbqt", "executable": "sh"}, "no receptor at"),
        ({"size": [1, 1], "executable": "sh"}, "a box has a center and sizes"),
    ],
)
def test_one_line_says_what_is_missing(change, said, tmp_path):
    (tmp_path / "receptor.pdbqt").write_text("ATOM\n")
    with pytest.raises(ValueError, match=said) as error:
        docking(**({"receptor": tmp_path / "receptor.pdbqt"} | BOX | change))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_aspirin_docks_to_parp1_and_is_not_docked_twice(tmp_path):
    pytest.importorskip("vina", reason="vina is not installed: pip install 'rgdiff[dock]'")
    if not RECEPTOR.exists():
        pytest.skip(f"{RECEPTOR} is not there")
    of = docking(RECEPTOR, **BOX, workers=1, folder=tmp_path)
    found = of([ASPIRIN])
    assert found[0] == pytest.approx(6.6, abs=0.4)  # Vina's own program on the same box, by another's script
    of.close()
    assert of([ASPIRIN]) == found and of.counts()["computed"] == 1
