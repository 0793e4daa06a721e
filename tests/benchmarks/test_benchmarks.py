"""The PyTorch twins of the benchmarks do the same work: same samples, same gradients, from transplanted weights."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.speed import drakes_rows, dxmi_rows, rows, seiko_rows, sequence_rows, tuner_rows

pytest.importorskip("torch", reason="the twins need PyTorch, which the library never does: pip install torch")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(rows, "STEPS", 3)
    monkeypatch.setattr(rows, "BATCH", 2)
    monkeypatch.setattr(rows, "SIDE", 8)
    monkeypatch.setattr(rows, "CHANNELS", (8, 16))
    monkeypatch.setattr(rows, "CANDIDATES", 2)
    monkeypatch.setattr(sequence_rows, "CANDIDATES", 4)
    monkeypatch.setattr(sequence_rows, "SHARPNESS", 1.0)  # a denoiser that matters
    for name in ("DENOISER", "SCORER"):
        small = {"width": 8, "dilations": (1, 4), "kernel": 5}
        monkeypatch.setattr(sequence_rows, name, getattr(sequence_rows, name) | small)
    monkeypatch.setattr(seiko_rows, "FEATURES", (16, 16))
    few = {"queries": 8, "batch": 4, "steps": 1, "fit_steps": 2}
    settings = {name: dataclasses.replace(one, **few) for name, one in seiko_rows.SETTINGS.items()}
    settings["digits"] = dataclasses.replace(settings["digits"], calls=3)
    monkeypatch.setattr(seiko_rows, "SETTINGS", settings)


CASES = (
    rows.Case("ancestral", "ancestral"),
    rows.Case("svdd", "svdd"),
    rows.Case("draft", "draft", live=2, remat=True),
)


@pytest.mark.parametrize(
    "case", [CASES[0], *(pytest.param(c, marks=pytest.mark.slow) for c in CASES[1:])], ids=lambda case: case.row
)
def test_both_sides_agree(case):
    given = rows.Ours(case).export()
    assert rows.Torch(case, given, compiled=False, threads=1, mode=None).check() < 1e-5
    if case.row == "svdd":  # the winner's prediction, kept or computed again, is the same
        again = dataclasses.replace(case, reuse=False)
        assert rows.Torch(again, given, compiled=False, threads=1, mode=None).check() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("reuse", [True, False])
def test_ten_iterations_of_dxmi_have_the_same_losses(reuse):
    case = rows.Case("dxmi", "dxmi", reuse=reuse)
    given = dxmi_rows.Ours(case).export()
    assert dxmi_rows.Torch(case, given, compiled=False, threads=1, mode=None).check() < 1e-4


def test_a_wrong_transplant_is_seen():
    case = CASES[0]
    given = rows.Ours(case).export()
    name = "params/mid_res0/norm1/bias"
    assert rows.Torch(case, given | {name: -given[name]}, compiled=False, threads=1, mode=None).check() > 1e-4
    with pytest.raises(ValueError, match="without a partner"):
        rows.Torch(case, {k: v for k, v in given.items() if k != name}, compiled=False, threads=1, mode=None)


TUNERS = (
    rows.Case("tuners", "draft_lv", "draft_lv", live=1),
    rows.Case("tuners", "alignprop", "alignprop", live=2, remat=True),
    rows.Case("tuners", "refl", "refl", live=1),
    rows.Case("tuners", "ddpo", "ddpo", live=1),
)


@pytest.mark.parametrize(
    "case", [*(pytest.param(c, marks=pytest.mark.slow) for c in TUNERS[:3]), TUNERS[3]], ids=lambda case: case.method
)
def test_tuners_have_the_same_gradient(case):
    given = tuner_rows.Ours(case).export()
    error = lambda given: tuner_rows.Torch(case, given, compiled=False, threads=1, mode=None).check()  # noqa: E731
    assert error(given) < 1e-5
    if "noise" in given:  # every draw counts
        assert error(given | {"noise": -given["noise"]}) > 1e-3
    assert error(given | {"x": given["x"][::-1].copy() * 0.9}) > 1e-2


DRAKES = rows.Case("drakes", "tiny", live=3, length=16, batch=4, moves=5)


def test_both_sides_of_drakes_have_the_same_gradient(monkeypatch):
    monkeypatch.setattr(drakes_rows, "KL_WEIGHT", 1.0)
    given = drakes_rows.Ours(DRAKES).export()

    def error(given, **changes):
        case = dataclasses.replace(DRAKES, **changes)
        return drakes_rows.Torch(case, given, compiled=False, threads=1, mode=None).check()

    for changes in ({}, {"channels_last": True}, {"remat": True}, {"released": True}):
        assert error(given, **changes) < 1e-5, changes
    # Every part of it counts: each network (the reference in the KL alone), the random numbers, what is relaxed.
    for name in (
        "params/denoiser/conv1/kernel",
        "params/reference/conv1/kernel",
        "params/scorer/conv1/kernel",
        "gumbel",
    ):
        assert error(given | {name: given[name][..., ::-1].copy()}) > 1e-3, name
    assert error(given, live=4) > 1e-3


def sequences(given, case, **changes):
    case = dataclasses.replace(case, **changes)
    return sequence_rows.Torch(case, given, compiled=False, threads=1, mode=None).check()


SEQUENCES = rows.Case("svdd-sequences", "tiny", value="pm", length=16, batch=4, moves=5)
OTHERS = ({"reuse": False}, {"reuse": False, "loop": True}, {"channels_last": True})


@pytest.mark.parametrize("value", ["pm", "mc"])
def test_both_sides_choose_the_same_sequences(value):
    case = dataclasses.replace(SEQUENCES, value=value)
    ours = sequence_rows.Ours(case)
    given = ours.export()
    # Two candidates may be filled to one sequence: which of them is then the better decides rounding (2 of 320 positions).
    for changes in ({}, *(OTHERS if value == "pm" else OTHERS[1:])):
        assert sequences(given, case, **changes) < 0.01
    # Every part of it counts: each network, each random number, which value selects.
    assert sequences(given, case, value="mc" if value == "pm" else "pm") > 0.02
    for name in ("params/scorer/conv1/kernel", "params/denoiser/conv1/kernel", "uniform", "gumbel"):
        assert sequences(given | {name: given[name][..., ::-1].copy()}, case) > 0.02, name
    # Copies were not evaluated again.
    assert ours.compared[1].sum() < case.moves * case.batch * sequence_rows.CANDIDATES


def test_sequence_networks_have_the_published_sizes(monkeypatch):
    monkeypatch.undo()
    import jax
    import jax.numpy as jnp

    from rgdiff.nets import ConvNet1D

    def size(options, channels):
        net = ConvNet1D(**options)
        shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 50, channels)), 0.0)["params"])
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    # The authors' CNN and ConvGRU: 3.33 M and 0.18 M (research: svdd_drakes.md, 2.1 and 2.2, counted there).
    assert round(size(sequence_rows.DENOISER, 5) / 1e6, 2) == 3.33
    assert round(size(sequence_rows.SCORER, 4) / 1e6, 2) == 0.18


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "tfbind8"])
def test_a_round_of_seiko_is_the_same(name):
    """Queries, answers, heads, and the inner step's loss and whole gradient under both anchors."""
    case = rows.Case("seiko", name, name, live=2 if name == "digits" else 0)
    given = seiko_rows.Ours(case).export()
    error = lambda given: seiko_rows.Torch(case, given, compiled=False, threads=1, mode=None).check()  # noqa: E731
    assert error(given) < 1e-4
    for anchor in range(2):
        weights = given["anchors"].copy()
        weights[anchor] = 0
        assert error(given | {"anchors": weights}) > 1e-3
    seiko_rows.Torch(case, given, compiled=False, threads=1, mode=None).block(0)
