"""Figures in words: when a method is over-optimised, the terminal's table, a sweep's, and one sentence for each method."""

from __future__ import annotations

import numpy as np
import pytest

from rgdiff import metrics
from rgdiff.runtime import naturalness, tables
from rgdiff.runtime.naturalness import marked, over_optimised

PRIOR = {"kl": 0.0, "frechet": 6.5, "recall": 0.8, "diversity": 5.6}
SPREAD = {"kl": 0.0, "frechet": 0.5, "recall": 0.02, "diversity": 0.05}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"kl": 4.3, "frechet": 12.0, "recall": 0.6, "diversity": 3.5}, ()),  # a clean fine-tuned model
        ({"kl": 602.0, "frechet": 55.0, "recall": 0.5, "diversity": 3.0}, ("602 nats", "8.46 times")),  # halos
        ({"kl": 0.1, "frechet": 383.0, "recall": 0.6, "diversity": 5.0}, ("383, 58.9 times the prior's 6.5",)),
        ({"kl": 8.0, "frechet": 9.0, "recall": 0.6, "diversity": 1.1}, ("diversity is 1.1, 19.6 %",)),  # one picture
        ({"kl": 8.0, "frechet": 9.0, "recall": 0.1, "diversity": 3.0}, ("recall of the real data is 0.1",)),
        ({"kl": float("nan"), "frechet": None, "diversity": 5.0}, ()),  # what is not known accuses nobody
        ({"kl": float("inf")}, ("inf nats",)),
        ({}, ()),
    ],
)
def test_over_optimised_by_hand(row, said):
    reason = over_optimised(row, PRIOR, SPREAD)
    assert (reason is None) == (not said)
    assert all(part in (reason or "") for part in said) and (reason or "").count(";") == max(len(said) - 1, 0)


def test_the_limits_are_the_constants_and_three_standard_errors():
    limit = naturalness.FRECHET * 6.5 + 3 * 0.5
    assert over_optimised({"frechet": limit - 1e-6}, PRIOR, SPREAD) is None
    assert over_optimised({"frechet": limit + 1e-6}, PRIOR, SPREAD)
    low = 5.6 / 3 - 3 * 0.05
    assert over_optimised({"diversity": low + 1e-6}, PRIOR, SPREAD) is None
    assert over_optimised({"diversity": low - 1e-6}, PRIOR, SPREAD)
    assert over_optimised({"kl": 20.0}, PRIOR, SPREAD) is None and over_optimised({"kl": 20.001}, PRIOR, SPREAD)
    assert over_optimised({"frechet": 100.0}, PRIOR, SPREAD | {"frechet": 40.0}) is None  # few samples
    assert over_optimised({"frechet": 1e9}, PRIOR, SPREAD | {"frechet": float("nan")}) is None
    assert over_optimised({"frechet": 1e9, "kl": 1e9}, PRIOR, {}) is None  # a judge that calls nobody


def test_best_of_n_stays_below_the_bound_of_the_kl_for_any_n_that_can_be_drawn():
    """KL of the best of N is log N - 1 + 1/N: the bound is a choice among 10^9 samples."""
    n = 1e9
    assert np.log(n) - 1 + 1 / n < naturalness.KL < np.log(100 * n)


def test_the_prior_is_never_called_and_rows_are_not_changed():
    rows = {"prior": PRIOR | {"kl": 99.0}, "a": {"kl": 99.0}, "b": {"kl": 1.0}}
    out = marked(rows, SPREAD)
    assert "over_optimised" in out["a"] and not {"over_optimised"} & (
        set(out["b"]) | set(out["prior"]) | set(rows["a"])
    )


def test_a_method_that_loses_its_feasible_samples_is_called():
    """Limits are 2/3 of the prior's own share, less three standard errors of it: of 100 samples, all feasible, 2/3 - 0.03."""
    rows = {
        "prior": PRIOR | {"infeasible": 0},
        "few": {"kl": 1.0, "infeasible": 36},
        "many": {"kl": 1.0, "infeasible": 37},
    }
    out = marked(rows, SPREAD, dict.fromkeys(rows, 100))
    assert "over_optimised" not in out["few"]
    assert out["many"]["over_optimised"] == "its share of feasible samples is 0.63, 63 % of the prior's 1"
    assert "feasible" not in out["many"] and marked(rows, {}, dict.fromkeys(rows, 100)) == rows == marked(rows, SPREAD)
    poor = {
        "prior": PRIOR | {"infeasible": 20},
        "as poor": {"infeasible": 22},
    }  # of a reward that the prior itself rarely has
    assert marked(poor, SPREAD, dict.fromkeys(poor, 25)) == poor
    for name, what in (("valid", "valid samples"), ("in_support", "samples in the data's support")):
        spread = {name: metrics.share_error(0.9, 100)}  # 0.03
        assert over_optimised({name: 0.511}, {name: 0.9}, spread) is None
        assert what in str(over_optimised({name: 0.509}, {name: 0.9}, spread))


def test_jackknife_is_the_standard_error_of_a_mean():
    """With groups of one it is the textbook's s / sqrt(N), exactly; with ten it is near it; few and many samples."""
    x = np.random.default_rng(0).normal(size=(200, 1))
    assert metrics.jackknife(np.mean, x, groups=200) == pytest.approx(x.std(ddof=1) / np.sqrt(200), rel=1e-9)
    errors = [metrics.jackknife(np.mean, np.random.default_rng(i).normal(size=(400, 1))) for i in range(200)]
    assert np.mean(np.square(errors)) == pytest.approx(
        1 / 400, rel=0.15
    )  # unbiased for the square: 200 of 9 degrees of freedom
    assert metrics.jackknife(np.mean, x, groups=200, most=50) == pytest.approx(
        x[:50].std(ddof=1) / np.sqrt(200), rel=1e-9
    )
    assert np.isnan(metrics.jackknife(np.mean, x[:2]))
    with pytest.raises(ValueError, match="two at least"):
        metrics.jackknife(np.mean, x, groups=1)


ROWS = marked(
    {
        "prior": {"reward_mean": -8.2, "reward_se": 0.31, "heldout_reward_mean": -8.0, "heldout_accuracy": 0.11, "infeasible": 0,
                  "kl": 0.0, "diversity": 5.6, "frechet": 216.0, "network_calls": 15, "seconds": 2.0},
        "svdd": {"reward_mean": -0.02, "reward_se": 0.01, "heldout_reward_mean": -0.4, "heldout_accuracy": 0.953, "infeasible": 0,
                 "kl": 2.5, "diversity": 3.5, "frechet": 10.1, "network_calls": 240, "seconds": 12.3},
        "a [b]long[/b] name " * 5: {"reward_mean": -8.1, "reward_se": 0.3, "infeasible": 3, "kl": 602.0, "diversity": 3.1,
                                    "network_calls": 15, "tuning_network_calls": 51200, "reward_queries": 1, "seconds": 1.0},
    },
    {"kl": 0.0},
)  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120, 300])
def test_the_terminal_has_readable_names_and_a_verdict_that_fit(width):
    text = tables.table(ROWS, width)
    lines = text.splitlines()
    laid_out = [line for line in lines if not line.startswith("a [b") or "more than 20" not in line]
    assert max(map(len, laid_out)) <= width
    assert "reward_mean" not in text and "reward" in text and "−0.02 ± 0.01" in text
    assert text.count("  over-optimised") == 1 and "602 nats, more than 20." in lines[-1]
    assert ("network" in text) == (width == 300) and "[b]" in text


def test_columns_that_say_nothing_are_left_out_of_the_terminal():
    """Zero or missing throughout; a held-out reward that is the reward."""
    rows = {
        k: {"reward_mean": v, "heldout_reward_mean": v, "infeasible": 0, "kl": float("nan")}
        for k, v in (("a", 1.0), ("b", 2.0))
    }
    text = tables.table(rows, 200)
    assert "held-out" not in text and "infeasible" not in text and "KL" not in text and "verdict" not in text


def test_sentences_say_what_was_reached_at_what_cost_and_how_natural():
    prior, svdd, last = (tables.sentence(key, row, ROWS["prior"]) for key, row in ROWS.items())
    assert prior.startswith("prior, which nothing guides, has a mean reward of −8.2 ± 0.31")
    for part in (
        "svdd raised the mean reward from −8.2 to −0.02 ± 0.01", "recognises 95 % of its samples against 11 % of the prior's",
        "at the cost of 240 network calls a sample and 12 seconds", "a path KL of 2.5 nats", "a Fréchet distance of 10 (prior 216)",
        "a diversity of 3.5 (prior 5.6)",
    ):  # fmt: skip
        assert part in svdd
    for part in (
        "left the mean reward at −8.1", "3 of its samples are infeasible", "51,200 network calls to tune it, 1 reward query and 1 second",
        "it is over-optimised: its path KL to the prior is 602 nats",
    ):  # fmt: skip
        assert part in last
    assert all(text.count(". ") == 0 and text.endswith(".") for text in (prior, svdd, last))  # one sentence each
    lowered = tables.sentence("a", {"reward_mean": -9.0, "reward_se": 0.01}, {"reward_mean": -8.0, "reward_se": 0.01})
    assert lowered == "a lowered the mean reward from −8 to −9 ± 0.01."
    assert (
        tables.sentence("d", {"auroc_mean": 0.84, "seconds": 0.0}, {"auroc_mean": 0.5})
        == "d raised the AUROC from 0.5 to 0.84."
    )
    assert tables.sentence("e", {}, {}) == "e has no samples."
    none = tables.sentence("f", {"reward_mean": float("nan"), "infeasible": 9, "sliced_w2": 6.0}, {"reward_mean": 1.0})
    assert none == "f has no feasible sample (prior: a mean reward of 1), with a sliced W2 of 6 to the data."


def test_every_figure_has_a_name_and_a_meaning():
    assert all(column.label and column.meaning.endswith(".") for column in tables.COLUMNS.values())
    assert tables.column("log_z_se").label == "log Z: standard error" and tables.column("log_z_se").unit == "nats"
    assert tables.column("auroc_digit_3").label == "AUROC, digit 3"
    assert tables.column("auroc_digit_3_sd").label == "AUROC, digit 3: standard deviation"
    assert tables.column("my_own_figure") == tables.Column("my own figure")


def test_figures_are_written_as_a_reader_expects():
    said = {
        0: "0",
        1234567: "1,234,567",
        -0.000123: "−0.000123",
        216.04: "216",
        12345.6: "12,346",
        0.1 + 0.2: "0.3",
        float("nan"): "–",
    }
    assert {value: tables.number(value) for value in said} == said
    assert [tables.number(v) for v in (None, "", "x", True, np.float32(2), 1e9)] == ["–", "–", "x", "yes", "2", "1e+09"]
    assert tables.number(215.7, 2) == "216"  # all digits before the point


SWEEP = [
    {"method": "svdd", "method.temperature": t, "seed": "0", "out": f"runs/s/{i}", "prior/reward_mean": -8.0, "prior/kl": 0.0,
     "svdd/reward_mean": -i, "svdd/kl": 2.0 * i, **({"svdd/over_optimised": "its path KL is far"} if i else {})}
    for i, t in enumerate(("0.25", "1"))
]  # fmt: skip


def test_a_sweep_has_a_line_for_every_run_named_by_what_was_swept():
    swept = ["method", "method.temperature", "seed", "out"]
    rows = tables.sweep_rows(SWEEP, swept)
    assert list(rows) == ["prior", "temperature=0.25", "temperature=1"]
    assert rows["temperature=1"]["kl"] == 2.0 and rows["prior"]["reward_mean"] == -8.0
    assert "temperature=1" in tables.sweep_table(SWEEP, swept) and "over-optimised" in tables.sweep_table(SWEEP, swept)
    several = [run | {"smc/reward_mean": 0.0} for run in SWEEP]
    assert "temperature=1: smc" in tables.sweep_rows(several, swept)
    clash = [{"a.steps": "1", "b.steps": "2"}, {"a.steps": "2", "b.steps": "3"}]
    assert tables.run_label(clash[0], clash, ["a.steps", "b.steps"]) == "a.steps=1, b.steps=2"
    stopped = [*SWEEP, {"method.temperature": "9", "stopped": "svdd: 21 updates"}]
    assert tables.sweep_rows(stopped, swept)["temperature=9: (stopped)"] == {}


def test_a_sweeps_page_has_its_runs_and_the_reward_by_what_was_swept(tmp_path):
    from rgdiff.recipes.pages import swept_figures, write_sweep

    swept = ["method.temperature", "out"]
    write_sweep(tmp_path / "report.html", "A sweep", SWEEP, swept, "rgdiff run steer --multirun")
    text = (tmp_path / "report.html").read_text()
    for part in (
        'href="1/report.html">temperature=1<',
        "Reward, by method.temperature",
        "Path KL, nats, by method.temperature",
    ):
        assert part in text
    reward, kl = swept_figures(SWEEP, swept)
    assert [*reward.series[0].x] == [0.25, 1.0] and [*kl.series[0].y] == [0.0, 2.0]
    words = [{"method.value": v, "svdd/reward_mean": 1.0} for v in ("exact", "learned")]
    assert swept_figures(words, ["method.value"]) == []
