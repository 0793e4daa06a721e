"""`benchmarks.compare` finds what fell between two files of results, and nothing else."""

from __future__ import annotations

import pytest

from benchmarks import compare

SPEED = """# draft

- machine: a | b
| case | side | CPU s (min-max) | CPU ratio | note |
|---|---|---|---|---|
| K=1 | rgdiff | 2.2 (2.0-2.3) |  |  |
| K=1 | eager | 2.3 (2.0-2.5) | {one} (0.9-1.3) | 1e-07 |
| K=5 | eager | 2.4 (2.0-2.5) | {five} (0.9-1.3) | 1e-07 |

| what | side | seconds (median) | ratio (median) |
|---|---|---|---|
| SD 1.5 | PyTorch | 4.0 | 0.55 |
"""


def test_common_ratios_are_found_and_the_worst_is_first():
    old, new = SPEED.format(one=1.11, five=1.0), SPEED.format(one=1.2, five=0.8).replace("SD 1.5", "SD 2")
    assert compare.changes(old, new) == [
        ("K=5 | eager | CPU ratio", 1.0, 0.8),
        ("K=1 | eager | CPU ratio", 1.11, 1.2),
    ]
    assert compare.ratios(old)["SD 1.5 | PyTorch | ratio (median)"] == 0.55


@pytest.mark.parametrize("five, tolerance, code", [(0.8, 0.1, 1), (0.8, 0.25, 0), (1.5, 0.05, 0)])
def test_exit_status_says_whether_something_fell(tmp_path, capsys, five, tolerance, code):
    for name, value in (("old", 1.0), ("new", five)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "draft.md").write_text(SPEED.format(one=1.1, five=value))
    for old, new in ((tmp_path / "old", tmp_path / "new"), (tmp_path / "old/draft.md", tmp_path / "new/draft.md")):
        assert compare.main([str(old), str(new), "--tolerance", str(tolerance)]) == code
        assert ("fell  1 -> 0.8" in capsys.readouterr().out) == (code == 1)


def test_nothing_in_common_is_no_success(tmp_path):
    (tmp_path / "empty.md").write_text("# none\n")
    assert compare.main([str(tmp_path / "empty.md")] * 2) == 2
    with pytest.raises(SystemExit, match="two files or two folders"):
        compare.main([str(tmp_path), str(tmp_path / "empty.md")])
