"""RNA that folds: rewards beside ViennaRNA's own numbers and definitions, their order through the pool, the domain and its judge."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import rewards
from rgdiff.domains.rna import FoldingJudge, folding, rna, tasks
from rgdiff.domains.sequences.data import SequenceDomain
from rgdiff.recipes.typing import Outcome

RNA = pytest.importorskip("RNA", reason="ViennaRNA is not installed: pip install 'rgdiff[rna]'")
TARGET = "((((....))))"


def drawn(count, length, seed=0):
    letters = np.random.default_rng(seed).choice(list("ACGU"), (count, length), p=[0.2, 0.3, 0.3, 0.2])
    return ["".join(row) for row in letters]


def test_the_energy_is_that_of_its_structure_and_of_the_dot_bracket_there_is_none_lower():
    """RNA.fold's least energy is what RNA.energy_of_struct gives its structure, and is below that of other structures."""
    texts = drawn(20, 12)
    for text in texts:
        found = folding.fold(text)
        assert found.energy == pytest.approx(RNA.energy_of_struct(text, found.structure), abs=0.005)
        for other in (TARGET, ".((......)).", "(((......)))"):
            possible = all(
                text[i] + text[j] in ("AU", "UA", "GC", "CG", "GU", "UG") for i, j in folding.pairs(other).items()
            )
            assert not possible or found.energy <= RNA.energy_of_struct(text, other) + 0.005
    assert folding.stability("GGGGAAAACCCC") == -folding.fold("GGGGAAAACCCC").energy > 4
    assert folding.stability("A" * 12) == 0 and str(folding.stability("A" * 12)) == "0.0"


def test_the_distance_counts_pairs_of_one_structure_alone():
    for text in drawn(20, 12, 1):
        one, two = (
            {(i, j) for i, j in folding.pairs(s).items() if i < j} for s in (folding.fold(text).structure, TARGET)
        )
        assert folding.Distance(TARGET)(text) == -len(one ^ two)
    assert folding.Distance(TARGET)("GGGGAAAACCCC") == 0


def test_the_defect_is_that_of_the_pair_probabilities():
    """n - sum over positions of the probability of the target's partner, or of none, over n (Dirks et al. 2004)."""
    for text in drawn(5, 12, 2):
        ensemble = RNA.fold_compound(text)
        ensemble.pf()
        p = np.array(ensemble.bpp())[1:, 1:]
        p = p + p.T
        partner = folding.pairs(TARGET)
        right = sum(p[i, partner[i]] if i in partner else 1 - p[i].sum() for i in range(12))
        assert folding.Defect(TARGET)(text) == pytest.approx(-(1 - right / 12), abs=1e-5)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_rewards_are_in_the_order_of_the_batch_inside_compiled_code(workers):
    domain = rna(TARGET)
    texts = ["GGGGAAAACCCC", *drawn(30, 12, 3), "GGGGAAAACCCC"]
    x = jnp.asarray(domain.encode(texts), jnp.float32)
    task = tasks.energy(domain, workers=workers)
    np.testing.assert_allclose(jax.jit(task.reward)(x), [-RNA.fold(text)[1] for text in texts], atol=1e-5)
    task = tasks.structure(domain, measure="distance", workers=workers)
    for reward in (task.reward, task.heldout):
        expected = [-RNA.bp_distance(RNA.fold(text)[0], TARGET) for text in texts]
        np.testing.assert_array_equal(rewards.score(reward, x), expected)
    guide = tasks.structure(domain, workers=workers)
    assert rewards.score(guide.reward, x[:1])[0] == pytest.approx(folding.Defect(TARGET)(texts[0]), abs=1e-6)
    np.testing.assert_array_equal(rewards.score(guide.heldout, x), expected)


def test_the_value_of_a_soft_state_tends_to_the_expectation_over_independent_letters():
    """On two undecided positions of 12, by all 16 completions."""
    domain = rna(TARGET)
    x = domain.encode(["GGGGAAAACCCC", "GGAGAAAACCCC"]).astype(np.float64)
    x[0, 1], x[0, 9] = [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]
    every = [f"G{a}GGAAAAC{b}CC" for a in "ACGU" for b in "ACGU"]
    weights = np.repeat([0.1, 0.2, 0.3, 0.4], 4) / 4
    values = np.array([folding.stability(text) for text in every])
    exact, spread = weights @ values, np.sqrt(weights @ values**2 - (weights @ values) ** 2)
    got = tasks.energy(domain, draws=2000, workers=0).reward.function(x)
    assert spread > 0.5 and abs(got[0] - exact) < 4 * spread / np.sqrt(2000)
    assert got[1] == pytest.approx(folding.stability("GGAGAAAACCCC"), abs=1e-5)  # decided states have no error
    likely = tasks.energy(domain, draws=0, workers=0).reward.function(x)
    assert likely[0] == pytest.approx(folding.stability("GUGGAAAACACC"), abs=1e-5)


def test_the_judge_says_who_folds_into_the_target():
    domain = rna(TARGET)
    judge, task = FoldingJudge(domain, jax.random.key(0)), tasks.structure(domain, workers=0)
    x0 = domain.encode(["GGGGAAAACCCC", "AAAAAAAAAAAA"]).astype(np.float32)
    prior = type("Prior", (), {"process": None})
    row = judge.row(Outcome(x0, 1, 0.0, 0.0, 0.0), task, prior)
    assert row["solved"] == 0.5 and row["gc"] == pytest.approx(8 / 24)
    assert row["folding_energy"] == pytest.approx(RNA.fold("GGGGAAAACCCC")[1] / 2)
    assert judge.show_each(x0)[0] == f"GGGGAAAACCCC {TARGET}" and TARGET in " ".join(judge.notes(task))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rna(), "RNA needs a length"),
        (lambda: rna("((...)"), r"unmatched \( at position 0"),
        (lambda: rna("(...))"), r"unmatched \) at position 5"),
        (lambda: rna("(.[.])"), r"'\[' at position 2"),
        (lambda: rna("(..)"), "pairs position 0 with one fewer than four away"),
        (lambda: rna(TARGET, length=9), "has 12 positions, and domain.length=9"),
        (lambda: rna(length=0), "domain.length must be"),
        (lambda: tasks.structure(rna(length=9)), "reward=structure needs a target"),
        (lambda: tasks.structure(rna(length=9), target=TARGET), "the target has 12 positions"),
        (lambda: tasks.structure(rna(TARGET), measure="shape"), "reward.measure must be one of"),
        (lambda: tasks.energy(SequenceDomain(*[np.zeros((1, 3, 4))] * 5)), "folding is of RNA; choose domain=rna"),
    ],
)  # fmt: skip
def test_what_does_not_fit_ends_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
