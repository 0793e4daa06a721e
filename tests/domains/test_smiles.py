"""Molecules as strings: tokens, states and back, the data by path, and rewards and the judge on them; no string makes them raise."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import oracles, rewards
from rgdiff.domains.molecules import SmilesJudge, chemistry, smiles, tasks
from rgdiff.domains.molecules.smiles import Notation
from rgdiff.recipes.typing import Outcome

pytest.importorskip("rdkit", reason="rdkit is not installed: pip install 'rgdiff[mol]'")
DATA = Path(os.environ.get("RGDIFF_DATA", ""))
NOTATION = Notation(("(", ")", "1", "=", "Br", "C", "O", "[nH]", "c"), 8)


def test_tokens_are_atoms_bonds_and_rings():
    from rdkit import Chem

    text = "C[C@@H]1CC%12=C(Cl)[nH]c(Br)c%12N1/C=C\\[O-]"
    parts = smiles.tokens(text)
    assert "".join(parts) == text
    atoms = [token for token in parts if token[0].isalpha() or token[0] == "["]
    assert len(atoms) == Chem.MolFromSmiles(text, sanitize=False).GetNumAtoms()
    assert parts.count("%12") == 2 and "Cl" in parts and "[C@@H]" in parts


def test_states_are_the_strings_again_and_end_at_their_first_end():
    texts = ["CC(=O)O", "c1[nH]cc1", "Br", ""]
    x = NOTATION.encode(texts)
    assert x.shape == (4, *NOTATION.shape) == (4, 8, 10) and (x.sum(-1) == 1).all()
    assert NOTATION.decode(x) == texts
    x[2, 3] = np.eye(10)[6]  # what stands after an end says nothing
    assert NOTATION.decode(x)[2] == "Br"
    soft = 0.6 * x + 0.4 / 10
    assert NOTATION.decode(jnp.asarray(soft)) == texts
    for text, message in (("CN", "token 'N'"), ("CCCCCCCCC", "9 tokens")):
        with pytest.raises(ValueError, match=message):
            NOTATION.encode([text])


@pytest.fixture
def written(tmp_path):
    """A file as users have them: a header, names, salts, one molecule twice, one that is none, and one of a rare token."""
    lines = [
        "smiles,name",
        "OCC,ethanol",
        "CCO,again",
        "[Na+].CC(=O)[O-] acetate",
        "C(C",
        "",
        "c1ccccc1\tbenzene",
        "[Hg]",
    ]
    lines += [f"{'C' * n}O" for n in range(3, 10)]
    (tmp_path / "own.smi").write_text("\n".join(lines))
    return tmp_path


def test_a_users_file_is_read(written):
    domain = smiles.smiles("own.smi", length=9, rare=0.0, data_dir=written)
    assert domain.known == {"CCO", "CC(=O)[O-]", "c1ccccc1", "[Hg]", *("C" * n + "O" for n in range(3, 9))}
    assert domain.left_out == {"unreadable": 1, "longer": 1} and domain.shape == (9, 10)
    assert sorted(domain.decode(domain.train_x)) == sorted(domain.known)
    common = smiles.smiles("own.smi", length=None, rare=0.15, data_dir=written)
    assert common.known == {"C" * n + "O" for n in range(2, 10)} and common.left_out["of rare tokens"] == 3


@pytest.mark.parametrize(
    "text", ["id,SMILES,y\n1,CCO,2\n2,CCN,3", 'SMILES\n"CCO"\n"CCN"', "CCO 1\nCCN 2", "CCO\tx\r\nCCN\ty"]
)
def test_a_column_of_smiles_is_found(tmp_path, text):
    (tmp_path / "own.csv").write_text(text)
    assert smiles.smiles("own.csv", rare=0.0, data_dir=tmp_path).known == {"CCO", "CCN"}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("name\nx?\n?y\nCC", {}, "2 of 3 lines are no molecule, e.g. 'x"),
        ("", {}, "0 of 0 lines are no molecule, e.g. 'nothing'"),
        ("CC\nCCC", {"length": 1}, "has 0 molecules of at most 1 tokens"),
        ("CC\nCCC", {"rare": 1.5}, "domain.rare=1.5: expected a share"),
        ("CC\nCCC", {"length": 0}, "domain.length must be"),
    ],
)
def test_what_cannot_be_read_ends_in_one_line(tmp_path, text, options, message):
    (tmp_path / "own.smi").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        smiles.smiles("own.smi", data_dir=tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_rewards_are_rdkits_and_infeasible_where_a_string_is_no_molecule(written):
    domain = smiles.smiles("own.smi", length=None, rare=0.0, data_dir=written)
    x = domain.form.encode(["CCO", "c1ccccc1", "C(C", "", "CCO"])
    expected = [chemistry.measured("qed", "CCO"), chemistry.measured("qed", "c1ccccc1")]
    task = tasks.molecule_property(domain, "qed", workers=0)
    for reward in (task.reward, task.heldout):
        got = np.asarray(rewards.score(reward, jnp.asarray(x, jnp.float32)))
        np.testing.assert_allclose(got[[0, 1, 4]], [*expected, expected[0]], rtol=1e-6)
        assert np.isnan(got[2:4]).all()


def score(text):
    """A user's function of a molecule."""
    if "O" not in text:
        raise oracles.Infeasible("no oxygen")
    return float(len(text))


def test_a_function_of_ones_own_is_asked_about_canonical_molecules(written):
    domain = smiles.smiles("own.smi", length=None, rare=0.0, data_dir=written)
    x = jnp.asarray(domain.form.encode(["OCC", "c1ccccc1", "C(C"]), jnp.float32)
    for workers in (0, 1):
        task = tasks.molecule_function(domain, score, workers=workers)
        np.testing.assert_array_equal(rewards.score(task.reward, x), [3, np.nan, np.nan])
    assert "1 without a value (no oxygen)" in " ".join(SmilesJudge(domain, jax.random.key(0)).notes(task))
    with pytest.raises(ValueError, match="this reward is of molecules; choose"):
        tasks.molecule_function(object(), score)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["[Na+].CC(=O)[O-]", "C1CC1.CCO.O", "CCO"])
def test_a_domain_in_selfies_is_of_the_same_molecules(text, tmp_path):
    pytest.importorskip("selfies", reason="selfies is not installed: pip install 'rgdiff[selfies]'")
    (tmp_path / "own.smi").write_text("\n".join([text, "C1CC1", "CCN", "c1ccccc1C(=O)O"]))
    plain = smiles.smiles("own.smi", length=None, rare=0.0, data_dir=tmp_path)
    domain = smiles.smiles("own.smi", length=None, rare=0.0, data_dir=tmp_path, language="selfies")
    assert domain.known == plain.known and domain.form.tokens != plain.form.tokens
    assert {one.smiles for one in domain.form.molecules(domain.train_x)} == plain.known
    random = np.eye(domain.shape[1])[np.random.default_rng(0).integers(0, domain.shape[1] - 1, (50, domain.shape[0]))]
    assert all(one.valid for one in domain.form.molecules(random))  # every string is one
    with pytest.raises(ValueError, match="domain.language must be one of"):
        smiles.smiles("own.smi", data_dir=tmp_path, language="inchi")


def test_the_judge_counts_valid_unique_and_novel_strings(written):
    domain = smiles.smiles("own.smi", length=None, rare=0.0, data_dir=written)
    judge, task = SmilesJudge(domain, jax.random.key(0)), tasks.molecule_property(domain, "qed", workers=0)
    x0 = domain.form.encode(["CCO", "OCC", "C(C", "OCO"])
    row = judge.row(Outcome(x0.astype(np.float32), 1, 0.0, 0.0, 0.0), task)
    assert (row["valid"], row["unique"], row["novel"], row["infeasible"]) == (0.75, 2 / 3, 0.5, 1)
    assert "corrected" not in row and row["qed_median"] == pytest.approx(chemistry.measured("qed", "CCO"))
    assert judge.show_each(x0)[0].startswith("<svg") and "no molecule" in judge.show_each(x0)[2]
    assert "Left out of the training data: 1 unreadable" in " ".join(judge.notes(task))


@pytest.mark.parametrize("count", [200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_no_string_makes_decoding_or_a_reward_raise(count):
    rng = np.random.default_rng(count)
    signs = (
        "(",
        ")",
        "1",
        "2",
        "=",
        "#",
        "C",
        "N",
        "O",
        "Br",
        "[nH]",
        "[N+]",
        "c",
        "n",
        "%10",
        ".",
        "/",
        "[",
        "]",
        "*",
        " ",
    )
    form = Notation(signs, 12)
    task = tasks.molecule_property(smiles.SmilesDomain(form, form.encode(["C"]), frozenset(), {}), "logp", workers=0)
    x = np.eye(len(signs) + 1, dtype=np.float32)[rng.integers(0, len(signs) + 1, (count, 12))]
    found = form.molecules(x)
    assert {one.reason for one in found} <= set(chemistry.REASONS) and any(one.smiles for one in found)
    values = task.reward.function(x)
    assert values.shape == (count,) and not np.isfinite(values[[one.smiles is None for one in found]]).any()


@pytest.mark.slow
def test_the_molecules_that_come_with_rdkit_are_a_domain():
    domain = smiles.smiles()
    assert domain.shape[0] == 40 and len(domain.train_x) > 4_000 and {"C", "c", "Cl", "[nH]"} <= set(domain.form.tokens)
    for one in sorted(domain.known)[::400]:
        assert chemistry.canonical(one) == one


@pytest.mark.slow
@pytest.mark.skipif(
    not (DATA / "zinc250k-jtnn-test.txt").exists(), reason="zinc250k-jtnn-test.txt is not in RGDIFF_DATA"
)
def test_zinc_is_a_domain():
    domain = smiles.smiles("zinc250k-jtnn-test.txt", length=None, rare=0.0, data_dir=DATA)
    assert len(domain.train_x) == 5_000 and not domain.left_out
