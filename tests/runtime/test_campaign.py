"""Campaigns: the same queries until they are answered, no answer lost or counted twice, and the same end after kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.runtime import laboratory
from tests.runtime.laboratory import QUERIES, measure, opened


def work(folder, stop) -> int:
    command = [sys.executable, "-m", "tests.runtime.laboratory", str(folder), str(stop)]
    done = subprocess.run(
        command, cwd=Path(laboratory.__file__).parents[2], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert work(folder, 100) == 0
    return dict(np.load(folder / "result.npz"))


@pytest.mark.parametrize("stops", [(2,), pytest.param((1,) * 12, marks=pytest.mark.slow)], ids=["once", "each"])
@pytest.mark.slow
def test_killed_between_ask_and_tell_and_continued_by_other_processes_ends_the_same(tmp_path, uninterrupted, stops):
    codes = [work(tmp_path, stop) for stop in (*stops, 100)]
    assert codes[0] == -signal.SIGKILL and codes[-1] == 0
    result = dict(np.load(tmp_path / "result.npz"))
    np.testing.assert_array_equal(result["params"], uninterrupted["params"])
    np.testing.assert_array_equal(result["x0"], uninterrupted["x0"])


@pytest.fixture
def first(tmp_path):
    campaign = opened(tmp_path)
    return campaign, *campaign.ask()


def test_a_question_is_the_same_until_it_is_answered(first, tmp_path):
    campaign, ids, x0 = first
    np.testing.assert_array_equal(ids, np.arange(6))
    again = opened(tmp_path).ask()
    np.testing.assert_array_equal(again.x0, x0)
    campaign.tell([4, 1], [0.5, np.nan])
    left = opened(tmp_path).ask()
    np.testing.assert_array_equal(left.ids, [0, 2, 3, 5])
    np.testing.assert_array_equal(left.x0, x0[[0, 2, 3, 5]])
    assert not campaign.done and campaign.round == 0


@pytest.mark.slow
def test_answers_said_twice_count_once_and_are_where_they_belong(first):
    campaign, ids, x0 = first
    campaign.tell(ids[::-1], measure(x0)[::-1])
    campaign.tell(ids, measure(x0))
    campaign.finish()
    assert not campaign.done and campaign.round == 1
    seen = campaign.state.observations
    np.testing.assert_array_equal(seen.x0[:6], x0)
    np.testing.assert_array_equal(seen.status[:6], np.where(np.isnan(measure(x0)), 2, 1))
    np.testing.assert_array_equal(seen.status[6:], 0)
    np.testing.assert_array_equal(seen.y[:6], np.nan_to_num(measure(x0)))
    campaign.tell(ids, measure(x0))  # an echo from the last round
    assert campaign.ask().ids.tolist() == [6, 7, 8, 9]


@pytest.mark.parametrize(
    "ids, values, said",
    [
        ([0, 1], [1.0], "one value for each query, got 1 for 2"),
        ([0, 6], [1.0, 1.0], "query 6 was never asked; 6 were"),
        ([0, -1], [1.0, 1.0], "query -1 was never asked"),
        ([0, 1.5], [1.0, 1.0], "query 1.5 was never asked"),
        ([0, 1], [1.0, np.inf], "query 1: an answer must be finite"),
        ([0, 1], [1.0, 1e39], "query 1: an answer must be finite in float32"),
        ([0, 1], [1.0, True], "query 1: expected a number or NaN"),
        ([0, 1], [1.0, "high"], "query 1: expected a number or NaN"),
        ([0, 0], [1.0, 2.0], "query 0 was answered 1 before, now 2"),
    ],
)
def test_bad_answers_are_refused_whole(first, ids, values, said):
    campaign = first[0]
    with pytest.raises(ValueError, match=said):
        campaign.tell(ids, values)
    assert len(campaign.ask().ids) == 6  # the good one among them was not taken in either


def test_another_answer_than_before_is_refused(first):
    campaign = first[0]
    campaign.tell([3], [0.25])
    with pytest.raises(ValueError, match="query 3 was answered 0.25 before, now 0.5"):
        campaign.tell([2, 3], [1.0, 0.5])
    assert campaign.ask().ids.tolist() == [0, 1, 2, 4, 5]


@pytest.mark.slow
def test_queries_given_up_do_not_count_until_they_come_after_all(first, tmp_path):
    campaign, ids, x0 = first
    campaign.tell(ids[:4], [1.0, 2.0, 3.0, 4.0])
    campaign.skip()
    with pytest.raises(ValueError, match="query 2 does not wait"):
        campaign.skip([2])
    assert campaign.round == 1  # skip asked, and so finished the round
    np.testing.assert_array_equal(campaign.state.observations.status[:6], [1, 1, 1, 1, 0, 0])
    campaign.tell([5], [6.0])  # late
    ids, _ = campaign.ask()
    campaign.tell(ids, np.zeros(len(ids)))
    assert opened(tmp_path).ask().ids.tolist() == [10, 11, 12, 13, 14]
    np.testing.assert_array_equal(opened(tmp_path).state.observations.status[:10], [1] * 4 + [0] + [1] * 5)
    np.testing.assert_array_equal(opened(tmp_path).state.observations.y[:6], [1, 2, 3, 4, 0, 6])


def test_two_processes_that_tell_at_once_lose_nothing(first, tmp_path):
    """Each answers its own query; one at a time reads, adds and writes."""
    campaign, ids, _ = first
    told = [threading.Thread(target=opened(tmp_path).tell, args=([i], [float(i)])) for i in ids]
    for thread in told:
        thread.start()
    for thread in told:
        thread.join()
    assert campaign.history()[0][1].tolist() == [float(i) for i in ids]


@pytest.mark.slow
def test_the_end_is_said_and_another_campaign_is_refused(first, tmp_path):
    campaign = first[0]
    while not campaign.done:
        ids, x0 = campaign.ask()
        campaign.tell(ids, measure(x0))
    assert campaign.round == 2  # the last round is answered, not yet learnt from
    with pytest.raises(ValueError, match="all 3 rounds are done"):
        campaign.ask()
    assert campaign.round == 3
    assert [len(rewards) for _, rewards in campaign.history()] == QUERIES
    rows = [row for row in campaign.run.log.rows if row["phase"] == "campaign"]
    assert [row["queries"] for row in rows] == QUERIES and rows[1]["bonus"] > 0 and rows[0]["bonus"] is None
    assert (tmp_path / "metrics.csv").read_text().count("campaign") >= 3
    with pytest.raises(ValueError, match="its run has seed=0"):
        opened(tmp_path, seed=1)
    with pytest.raises(ValueError, match="its run has temperature=0.2"):
        opened(tmp_path, alpha=0.3)
    with pytest.raises(ValueError, match="its run has queries"):
        opened(tmp_path, queries=[QUERIES[0] - 1, *QUERIES[1:]])
    with pytest.raises(ValueError, match="16 queries need capacity=16"):
        opened(tmp_path / "more", queries=[8, 8])


def test_a_campaign_that_is_done_goes_on_with_more_rounds(tmp_path):
    """Rounds asked for later are those of a campaign that was to have them from the start, number for number."""
    ends = {}
    for name, plans in {"grown": [QUERIES[:1], QUERIES], "whole": [QUERIES]}.items():
        for queries in plans:
            campaign = opened(tmp_path / name, queries=queries)
            while not campaign.done:
                ids, x0 = campaign.ask()
                campaign.tell(ids, measure(x0))
        campaign.finish()
        ends[name] = campaign
    assert ends["grown"].round == ends["whole"].round == len(QUERIES)
    for one, other in zip(ends["grown"].history(), ends["whole"].history(), strict=True):
        np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(ends["grown"].sample(4), ends["whole"].sample(4))
    with pytest.raises(ValueError, match="need capacity"):
        opened(tmp_path / "grown", queries=[*QUERIES, 1000])
    assert opened(tmp_path / "grown").round == len(QUERIES)  # what was refused was not written down
    with pytest.raises(ValueError, match="its run has queries"):  # rounds that were asked are not forgotten
        opened(tmp_path / "grown", queries=QUERIES[:1])


def test_damaged_files_are_named(first, tmp_path):
    answers = tmp_path / "campaigns" / "campaign" / "round_001" / "answers.json"
    first[0].tell([0], [1.0])
    answers.write_text(answers.read_text()[:4])
    with pytest.raises(ValueError, match="answers.json is damaged"):
        opened(tmp_path).ask()
    answers.unlink()
    queries = answers.with_name("queries.npz")
    queries.write_bytes(queries.read_bytes()[:60])
    with pytest.raises(ValueError, match="queries.npz is damaged"):
        opened(tmp_path).ask()
