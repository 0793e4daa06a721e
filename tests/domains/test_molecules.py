"""Chemistry on the host: decoding, correction, properties and metrics; nothing that a graph or a text holds makes it raise."""

from __future__ import annotations

import collections
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import oracles, rewards
from rgdiff.domains.molecules import MoleculeJudge, chemistry, comparison, molecules, nspdk, tasks
from rgdiff.domains.molecules.data import Graphs
from rgdiff.domains.molecules.properties import smiles_property
from rgdiff.domains.molecules.rewards import MoleculeReward
from rgdiff.recipes.molecules import GdssPrior
from rgdiff.recipes.typing import Outcome
from tests import oracle_functions
from tests.pretrained import gdss_twin

pytest.importorskip("rdkit", reason="rdkit is not installed: pip install 'rgdiff[mol]'")
QM9 = (6, 7, 8, 9)
ZINC = (6, 7, 8, 9, 15, 16, 17, 35, 53)


def property_reward(name="qed", correct=True, **settings):
    return MoleculeReward(smiles_property(name, workers=0, **settings), Graphs(ZINC), correct)


def graph_of(smiles, elements=ZINC, nodes=12):
    """Return the graph of a molecule without charges, with kekulised bonds."""
    from rdkit import Chem

    mol = Chem.MolFromSmiles(smiles)
    Chem.Kekulize(mol, clearAromaticFlags=True)
    out = np.zeros((nodes, len(elements) + nodes + 1))
    for atom in mol.GetAtoms():
        out[atom.GetIdx(), elements.index(atom.GetAtomicNum())] = out[atom.GetIdx(), -1] = 1
    for bond in mol.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        out[[i, j], [len(elements) + j, len(elements) + i]] = bond.GetBondTypeAsDouble()
    return out


@pytest.mark.parametrize(
    "smiles", ["CC(=O)Oc1ccccc1", "C#N", "CS(=O)(=O)N", "C[N+](C)(C)C", "CP(C)(=O)O", "FC(Cl)(Br)I"]
)
def test_a_molecules_graph_is_that_molecule(smiles):
    noisy = graph_of(smiles) + np.random.default_rng(0).uniform(-0.4, 0.4, (12, 22)) * (np.arange(22) < 9)
    found = chemistry.molecule(noisy, ZINC)
    assert found == chemistry.Molecule(chemistry.canonical(smiles), True)


def test_validity_is_rdkits_own():
    """On random graphs, with charges as here, the rule of valences agrees with RDKit's check."""
    from rdkit import Chem, rdBase

    rng = np.random.default_rng(0)
    kinds = [Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE]
    seen = {True: 0, False: 0}
    for _ in range(200):
        count = int(rng.integers(2, 7))
        graph = np.zeros((count, 9 + count + 1))
        atoms = rng.integers(0, 9, count)
        graph[np.arange(count), atoms] = graph[:, -1] = 1
        orders = np.triu(rng.choice(4, (count, count), p=[0.55, 0.3, 0.1, 0.05]), 1)
        graph[:, 9:-1] = orders + orders.T
        mol = Chem.RWMol()
        for atom, total in zip(atoms, (orders + orders.T).sum(-1), strict=True):
            made = Chem.Atom(ZINC[atom])
            made.SetFormalCharge(int((ZINC[atom], total) in ((7, 4), (8, 3))))
            mol.AddAtom(made)
        for i, j in zip(*np.nonzero(orders), strict=True):
            mol.AddBond(int(i), int(j), kinds[orders[i, j] - 1])
        with rdBase.BlockLogs():
            flag = Chem.SanitizeMol(mol, Chem.SanitizeFlags.SANITIZE_PROPERTIES, catchErrors=True)
        found = chemistry.molecule(graph, ZINC)
        assert found.valid == (flag == Chem.SanitizeFlags.SANITIZE_NONE), found
        assert found.smiles is not None
        seen[found.valid] += 1
    assert min(seen.values()) > 20


def test_properties_have_their_known_values():
    aspirin = chemistry.canonical("CC(=O)Oc1ccccc1C(=O)O")
    assert chemistry.measured("qed", aspirin) == pytest.approx(0.550, abs=0.001)
    assert chemistry.measured("sa", aspirin) == pytest.approx((10 - 1.580) / 9, abs=0.001)
    assert chemistry.measured("logp", aspirin) == pytest.approx(1.310, abs=0.001)
    assert chemistry.measured("penalised_logp", aspirin) == pytest.approx(1.310 - 1.580, abs=0.001)
    assert chemistry.measured("penalised_logp", "C1CCCCCCC1") == pytest.approx(
        chemistry.measured("logp", "C1CCCCCCC1") - (10 - 9 * chemistry.measured("sa", "C1CCCCCCC1")) - 2, abs=1e-6
    )
    with pytest.raises(ValueError, match="the property must be one of"):
        chemistry.measured("colour", aspirin)


@pytest.mark.parametrize(
    "name, reference, expected",  # of benzamide, aniline and hexane
    [
        ("substructure", "C(=O)N", [1, 0, 0]),
        ("scaffold", "CCc1ccccc1", [1, 1, 0]),
        ("scaffold", "CCC", [0, 0, 1]),
        ("weight", None, [121.14, 93.13, 86.18]),
    ],
)
def test_properties_beside_a_reference(name, reference, expected):
    found = smiles_property(name, reference, workers=0)(["NC(=O)c1ccccc1", "Nc1ccccc1", "CCCCCC"])
    np.testing.assert_allclose(found, expected, atol=0.005)


def test_similarity_is_rdkits_own():
    from rdkit import Chem, DataStructs
    from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator

    texts = ["NC(=O)c1ccccc1", "Nc1ccccc1", "CCCCCC"]
    prints = [GetMorganGenerator(radius=2, fpSize=2048).GetFingerprint(Chem.MolFromSmiles(t)) for t in texts]
    found = smiles_property("similarity", texts[0], workers=0)(texts)
    np.testing.assert_allclose(found, DataStructs.BulkTanimotoSimilarity(prints[0], prints), atol=1e-6)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"name": "colour"}, "the property must be one of"),
        ({"name": "similarity"}, "similarity takes a SMILES as its reference, got None"),
        ({"name": "qed", "reference": "C"}, "qed takes no reference"),
        ({"name": "substructure", "reference": "[C"}, "the reference '\\[C' of substructure cannot be read"),
    ],
)
def test_one_line_says_which_reference_is_missing(settings, words):
    with pytest.raises(ValueError, match=words) as error:
        smiles_property(**settings)
    assert "\n" not in str(error.value)


def test_properties_are_answered_by_other_processes_without_jax():
    code = "import sys; from rgdiff.domains.molecules import properties; assert 'jax' not in sys.modules"
    assert not subprocess.run([sys.executable, "-c", code]).returncode
    texts = ["CCO", "C1CC1", "CC(", "NC(=O)c1ccccc1"]
    np.testing.assert_array_equal(smiles_property("qed", workers=1)(texts), smiles_property("qed", workers=0)(texts))


def test_a_function_of_ones_own_sees_smiles_and_is_kept_under_its_version(tmp_path):
    domain = molecules("zinc250k")
    graphs = jnp.asarray(np.stack([graph_of("OCC", nodes=38), np.zeros((38, 48))]), jnp.float32)
    task = tasks.molecule_function(domain, oracle_functions.length, "1", cache_dir=str(tmp_path), workers=0)
    np.testing.assert_array_equal(rewards.score(task.reward, graphs), [3, np.nan])  # CCO
    with sqlite3.connect(tmp_path / "oracles" / oracles.FILE) as file:
        assert file.execute("SELECT text, value FROM answers").fetchall() == [("CCO", 3.0)]


def test_an_objective_combines_properties_and_limits():
    domain = molecules("zinc250k")
    graphs = jnp.asarray(
        np.stack([graph_of("CCO", nodes=38), graph_of("NC(=O)c1ccccc1", nodes=38), np.zeros((38, 48))]), jnp.float32
    )
    qed = [chemistry.measured("qed", one) for one in ("CCO", "NC(=O)c1ccccc1")]
    heavy = {"name": "weight", "low": 100}
    product = tasks.molecule_objective(domain, [{"name": "qed"}, heavy], workers=0)
    np.testing.assert_allclose(rewards.score(product.reward, graphs), [0, qed[1], np.nan], rtol=1e-5)
    total = tasks.molecule_objective(domain, [{"name": "qed", "weight": 2.0}, heavy], "sum", workers=0)
    np.testing.assert_allclose(rewards.score(total.heldout, graphs), [2 * qed[0], 2 * qed[1] + 1, np.nan], rtol=1e-5)
    for task, first in (
        (tasks.molecule_objective(domain, [{"name": "qed"}, heavy], infeasible=-1.0, workers=0), 0),
        (tasks.molecule_property(domain, infeasible=-1.0, workers=0), qed[0]),
    ):
        np.testing.assert_allclose(rewards.score(task.reward, graphs), [first, qed[1], -1], rtol=1e-5)
        assert np.isnan(rewards.score(task.heldout, graphs)[2])  # the judge leaves it out as ever
    for parts, words in (
        ([], "parts is empty"),
        ([{"colour": 1}], "unknown 'colour'"),
        ([{"name": "qed", "weight": 2}], "combine=sum"),
    ):
        with pytest.raises(ValueError, match=words):
            tasks.molecule_objective(domain, parts)


def test_figures_count_what_they_say():
    found = [
        chemistry.Molecule("CCO", True),
        chemistry.Molecule("CCO", True),
        chemistry.Molecule("CF", False, "valence"),
        chemistry.Molecule(None, False, "empty"),
    ]
    figures = chemistry.figures(found, frozenset({"CF"}))
    alike = chemistry.similarities(*[chemistry.fingerprints([s]) for s in ("CCO", "CF")])[0, 0]
    assert (figures["valid"], figures["corrected"], figures["unique"], figures["novel"]) == (0.5, 0.75, 2 / 3, 0.5)
    assert figures["scaffolds"] == 1 / 3  # none has a ring
    assert figures["diversity"] == pytest.approx(1 - (1 + 2 * alike) / 3)
    assert np.isnan(chemistry.figures([found[3]])["unique"])


def test_a_reward_is_nan_where_there_is_no_molecule_and_runs_in_compiled_code():
    graphs = np.stack([graph_of("CCO"), graph_of("CCO"), np.zeros((12, 22)), np.full((12, 22), np.nan)])
    graphs[1, 0, 9 + 1] = graphs[1, 1, 9] = 3
    graphs[1, 1, 9 + 2] = graphs[1, 2, 9 + 1] = 3  # a carbon with six bonds
    reward, raw = (rewards.from_host(property_reward("qed", correct)) for correct in (True, False))
    out = np.asarray(jax.jit(reward)(jnp.asarray(graphs, jnp.float32)))
    assert out[0] == pytest.approx(chemistry.measured("qed", "CCO")) and np.isfinite(out[1]) and np.isnan(out[2:]).all()
    assert np.isnan(np.asarray(rewards.score(raw, jnp.asarray(graphs, jnp.float32)))[1:]).all()
    assert property_reward() == property_reward()  # no recompilation
    assert reward.function.reasons(graphs) == {"valence": 1, "empty": 1, "not finite": 1}


def fuzzed(count, seed):
    """Hostile graphs: noise of every scale, NaN, infinities, empty, full, charged, disconnected, and asymmetric ones."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        nodes = int(rng.integers(1, 9))
        graph = rng.normal(size=(nodes, 9 + nodes + 1)) * 10.0 ** rng.integers(-2, 4)
        if number % 2:
            graph[:, 9:-1] = rng.integers(0, 4, (nodes, nodes)) * (rng.random((nodes, nodes)) < rng.random())
            graph[:, -1] = 1
        if number % 7 == 0:
            graph[rng.integers(nodes), rng.integers(graph.shape[1])] = rng.choice([np.nan, np.inf, -np.inf])
        yield graph


def garbled(count, seed):
    """Hostile texts: broken, charged, disconnected, empty, long, not ASCII, and sound ones among them."""
    rng = np.random.default_rng(seed)
    sound = ["CC(=O)Oc1ccccc1C(=O)O", "C[N+](C)(C)C.[Cl-]", "C1CC1", "[Na+].[OH-]", "FC(F)(F)c1ccncc1", "O=S(=O)(N)C"]
    pieces = list("CNOPSFIcnos()[]=#-+.@/\\%123456789H ") + ["Cl", "Br", "[nH]", "%%", "é", "\0", "\ud800", "💊"]
    for number in range(count):
        text = str(rng.choice(sound))
        for _ in range(int(rng.integers(0, 4))):
            at = int(rng.integers(len(text) + 1))
            text = text[:at] + pieces[rng.integers(len(pieces))] + text[at + int(rng.integers(2)) :]
        if number % 5 == 0:
            text = "".join(pieces[i] for i in rng.integers(0, len(pieces), rng.integers(0, 30)))
        yield text * 200 if number % 1000 == 0 else text


FUZZED = int(os.environ.get("RGDIFF_FUZZ", 100_000))  # in the slow suite; a million takes five minutes


@pytest.mark.parametrize("count", [10_000, pytest.param(FUZZED, marks=pytest.mark.slow)])
def test_no_graph_and_no_text_makes_decoding_or_a_reward_raise(count):
    """Half of each; whatever has no value is NaN, and every NaN has a reason."""
    reward = property_reward()
    reasons, infeasible = collections.Counter(), 0
    for graph in fuzzed(count // 2, count):
        found = chemistry.molecule(graph, ZINC)
        assert found.reason in chemistry.REASONS and (found.smiles is None) == (found.reason not in ("", "valence"))
        reasons[found.reason] += found.smiles is None
        value = float(reward(graph[None].astype(np.float32))[0])
        assert np.isnan(value) or 0 <= value <= 1
        infeasible += np.isnan(value)
    asked = smiles_property("sa", workers=0)
    before = asked.counts()
    values = asked(list(garbled(count // 2, count)))
    told = {
        reason: number - before.get(reason, 0)
        for reason, number in asked.counts().items()
        if reason not in before or reason == "unreadable"
    }
    told = {reason: number for reason, number in told.items() if reason not in ("asked", "known", "computed")}
    assert sum(told.values()) == np.isnan(values).sum() > count // 20 and np.isfinite(values).sum() > count // 20
    assert infeasible >= sum(reasons.values()) > count // 20, reasons
    assert set(reasons) >= {"empty", "not finite"} and set(told) <= {"unreadable", "ZeroDivisionError"}, told


@pytest.mark.parametrize(
    "text", ["", "C(C", "xyz", "C" * 3000 + "(", "[N+](C)(C)(C)(C)C", "c1cccc1", "\0", "💊", "%%%"]
)
def test_no_text_makes_a_property_raise(text):
    assert chemistry.canonical(text) is None and np.isnan(chemistry.measured("qed", text))


def test_drawings_are_svg():
    for smiles in ("CCO", None):
        for options in ({}, {"lines": ["a < b"], "below": "C#N"}):
            text = chemistry.drawn(smiles, **options)
            assert text.startswith("<svg") and text.endswith("</svg>") and ElementTree.fromstring(text) is not None
            assert ("a &lt; b" in text) == ("near C#N" in text) == bool(options)


def test_known_compounds_are_compared():
    """The Fréchet distance against SciPy's matrix square root, the nearest against all similarities."""
    from scipy import linalg

    known = frozenset(chemistry.canonical(s) for s in ("CCO", "c1ccccc1", "CC(=O)N", "NCC(=O)O", "CCCCCC", "O=C1CCCN1"))
    smiles = ["CCCO", "Nc1ccccc1", "CC(=O)NC", "OCC(=O)O"]
    a, b = comparison.descriptors(smiles), comparison.descriptors(sorted(known))
    std = np.where(b.std(0) > 0, b.std(0), 1)
    a, b = a / std, b / std
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert comparison.descriptor_distance(smiles, known) == pytest.approx(expected, rel=1e-3)
    alike = chemistry.similarities(*(chemistry.fingerprints(s) for s in (smiles, sorted(known))))
    for one, row in zip(smiles, alike, strict=True):
        assert comparison.nearest(one, known) == (sorted(known)[row.argmax()], pytest.approx(row.max()))
    assert comparison.nearest("CCO", frozenset()) is None


@pytest.mark.slow
def test_the_chemnet_distance_is_the_packages_own():
    fcd = pytest.importorskip("fcd", reason="fcd is not installed: pip install fcd")
    some = ["CCCO", "Nc1ccccc1", "CC(=O)NC", "OCC(=O)O", "CCO", "c1ccccc1", "CC(=O)N", "NCC(=O)O"]
    known = frozenset(chemistry.canonical(one) for one in some[3:])
    expected = fcd.get_fcd(some, sorted(known), fcd.load_ref_model())
    assert comparison.chemnet_distance(some, known) == pytest.approx(expected, rel=1e-2)


def test_without_rdkit_one_line_says_what_to_install(monkeypatch):
    chemistry.rdkit.cache_clear()
    monkeypatch.setitem(sys.modules, "rdkit.Chem", None)
    with pytest.raises(ValueError, match=r"pip install 'rgdiff\[mol\]'"):
        chemistry.rdkit()
    monkeypatch.undo()
    chemistry.rdkit.cache_clear()


def test_a_domain_its_task_and_its_judge_work_together(tmp_path):
    (tmp_path / "known.txt").write_text("OCC\nnonsense(\nC#N\n")
    domain = molecules("qm9", known="known.txt", data_dir=tmp_path)
    assert domain.shape == (9, 14) and domain.known == {"CCO", "C#N"}
    task = tasks.molecule_property(domain, "qed", workers=0)
    judge = MoleculeJudge(domain, jax.random.key(0))
    judge.check(task)
    bad = graph_of("CCO", QM9, 9)
    bad[0, 4 + 1] = bad[1, 4] = bad[1, 4 + 2] = bad[2, 4 + 1] = 3  # C#C#O
    x0 = np.stack([graph_of("CCO", QM9, 9), graph_of("CC=O", QM9, 9), bad, np.zeros((9, 14))]).astype(np.float32)
    row = judge.row(Outcome(x0, 1, 0.0, 1.0, 1.0), task)
    assert (row["valid"], row["corrected"], row["infeasible"], row["novel"]) == (0.5, 0.75, 1, 2 / 3)
    assert row["reward_mean"] != row["heldout_reward_mean"]  # the held-out one leaves the corrected molecule out
    assert row["reward_top"] == pytest.approx(row["reward_mean"])  # of three different molecules
    assert (
        np.isfinite(row["descriptor_frechet"])
        and np.isfinite(row["nspdk"])
        and [h[0] for h in judge.histograms({"prior": Outcome(x0, 1, 0.0, 1.0, 1.0)}, task, None)]
        == ["Rewards of the samples", "QED", "SA", "logP", "molecular weight"]
    )
    assert "Asked of qed: " in judge.notes(task)[-1] and "computed" in judge.notes(task)[-1]
    known, new = judge.show_each(x0)[:2]
    assert "a known compound" in known and "nearest known" not in known and "nearest known (0." in new
    assert judge.spread(Outcome(x0, 1, 0.0, 1.0, 1.0), task)["valid"] == pytest.approx(0.25)
    assert all(text.startswith("<svg") for text in judge.show_each(x0))
    with pytest.raises(ValueError, match="domain.dataset must be one of"):
        molecules("chembl")
    with pytest.raises(ValueError, match="choose domain=qm9, domain=zinc250k or domain=smiles"):
        tasks.molecule_property(object())


@pytest.mark.slow
def test_a_prior_is_ready_by_path_and_refuses_another_domain(tmp_path):
    gdss_twin.write(tmp_path / "tiny.npz")
    np.savez(tmp_path / "sizes.npz", tiny=np.array([2, 5]))
    settings = {"file": "tiny.npz", "sizes": "sizes.npz", "key": "tiny", "data_dir": str(tmp_path), "steps": 3}
    prior = GdssPrior(**settings)
    assert prior.process((5, 9)).times(3).shape == (3,)
    with pytest.raises(ValueError, match="are for graphs of 5 nodes with 3 features"):
        prior.check(molecules("qm9"))
    with pytest.raises(ValueError, match="prior.key must be one of"):
        GdssPrior(**(settings | {"key": "qm9"})).process((5, 9))
    plain = GdssPrior(**(settings | {"corrections": 0})).process((5, 9), eta=0.0)
    assert not plain.stochastic


@pytest.mark.slow
def test_the_recipe_runs_and_draws_molecules(tmp_path):
    from rgdiff.recipes.run import run_recipe

    data = Path(os.environ.get("RGDIFF_DATA", ""))
    if not (data / "gdss_qm9.npz").exists():
        pytest.skip(f"gdss_qm9.npz is not in {data}")
    given = [f"data_dir={data}", "samples=8", "prior.steps=4", f"out={tmp_path / 'run'}", f"cache_dir={tmp_path}"]
    summary = run_recipe("molecules_svdd", given)
    assert summary["prior/network_calls"] == 4 * 2 and summary["prior/corrected"] == 1
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()


def test_nspdk_is_that_of_eden():
    """EDeN 2.1's own numbers (its `vectorize`, complexity 4, features hashed to 30 bits) of the same graphs."""
    ours = ["CCO", "c1ccccc1O", "CC(=O)Nc1ccc(O)cc1", "C#N", "C", "CC(C)Cc1ccc(cc1)C(C)C(=O)O", "O=C1CCCN1"]
    others = ["CCN", "c1ccncc1", "CC(=O)Oc1ccccc1C(=O)O", "C1CC1", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C", "OCC(O)CO"]
    rows = [nspdk.features(one) for one in ours]
    of_phenol = [sum(value * row.get(name, 0.0) for name, value in rows[1].items()) for row in rows]
    expected = [0.08453378, 1.0, 0.27137003, 0.0, 0.0, 0.20335762, 0.18601072]
    np.testing.assert_allclose(of_phenol, expected, atol=1e-7)
    assert nspdk.discrepancy(nspdk.mean(ours), nspdk.mean(others)) == pytest.approx(0.2401581, abs=1e-6)
    assert np.isnan(comparison.kernel_distance([], frozenset(others)))
    assert comparison.kernel_distance(others, frozenset(others)) == pytest.approx(0.0, abs=1e-12)
