"""The tables of campaigns have the means of seeds, and their ends."""

from __future__ import annotations

from benchmarks.studies import campaigns


def test_tables_of_two_seeds():
    def run(reward):
        return [
            {"phase": "seiko", "step": 0, "reward": 9.0},
            {"phase": "seiko_model", "queries": 0, "reward": reward, "infeasible": 0.5, "kl": None, "best": None},
            {"phase": "seiko_model", "queries": 10, "reward": 2 * reward, "infeasible": 0.25, "kl": 4.0, "best": 1.0},
        ]

    assert campaigns.rounds([run(1.0), run(2.0)])[2:] == [
        "| seiko | 0 | 1.5 (1-2) | 0.5 (0.5-0.5) |  |  |",
        "| seiko | 10 | 3 (2-4) | 0.25 (0.25-0.25) | 4 (4-4) | 1 (1-1) |",
    ]
    summaries = [{"prior/reward_mean": 1.0, "prior/valid": 0.5}, {"prior/reward_mean": 2.0, "prior/valid": 0.7}]
    assert campaigns.finals(summaries)[2:] == ["| prior | 1.5 (1-2) | 0.6 (0.5-0.7) |  |  |  |"]
