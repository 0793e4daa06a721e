"""Oracles: a pool that survives its processes, answers that are kept, and failures that are counted."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest

from rgdiff import oracles
from tests import oracle_functions as functions


def test_answers_come_in_order_from_several_processes_that_end():
    texts = [str(number) for number in range(20)]
    found = oracles.oracle(functions.process, workers=2)(texts)
    assert len(set(found)) == 2 and os.getpid() not in found
    length = oracles.oracle(functions.length, workers=2)
    np.testing.assert_array_equal(length(["CCC", "", "C", "CC", "CCC"]), [3, np.nan, 1, 2, 3])
    assert length.counts() == {"asked": 5, "known": 1, "computed": 4, "empty": 1}
    np.testing.assert_array_equal(length(["C", "CCCC"]), [1, 4])
    assert length.counts() == {"asked": 7, "known": 2, "computed": 5, "empty": 1}
    oracles.close()
    for pid in set(found):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    assert length(["CCCCC"]) == 5  # closed, it starts again


def test_a_killed_process_a_hung_call_and_what_a_function_raises_are_survived(tmp_path, caplog):
    of = oracles.oracle(functions.hostile, workers=2, timeout=0.5, folder=tmp_path)
    texts = ["good", "hang", "die", "raise", "nan", "fine", f"hang:{tmp_path / 'h'}", f"die:{tmp_path / 'd'}"]
    np.testing.assert_array_equal(of(texts), [4, np.nan, np.nan, np.nan, np.nan, 4, 4, 3])  # the last two on a retry
    counts = of.counts()
    assert {k: counts[k] for k in ("timeout", "crash", "RuntimeError", "not finite")} == dict.fromkeys(
        ("timeout", "crash", "RuntimeError", "not finite"), 1
    )
    said = sorted(record.getMessage().partition("has no value for ")[2] for record in caplog.records)
    assert [line.partition(";")[0] for line in said] == [
        "'die': crash, 1 retries",
        "'hang': timeout, 1 retries",
        "'raise': RuntimeError: raise",
    ]
    with sqlite3.connect(tmp_path / oracles.FILE) as file:  # what another try may change is not kept
        assert {text for (text,) in file.execute("SELECT text FROM answers")} == {"good", "nan", "fine", *texts[6:]}


@pytest.mark.slow
def test_a_process_killed_between_two_batches_is_replaced():
    pids = {int(pid) for pid in oracles.oracle(functions.process, workers=2)([str(n) for n in range(100, 120)])}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    found = oracles.oracle(functions.process, workers=2)([str(n) for n in range(120, 130)])
    assert np.isfinite(found).all() and not pids & set(found)


def test_answers_on_disk_are_shared_by_runs_and_belong_to_a_version(tmp_path):
    settings = {"workers": 0, "folder": tmp_path}
    first = oracles.oracle(functions.length, **settings)
    texts = ["CCO", "", "\ud800\0", *(f"C{n}" for n in range(1200))]
    asked = first(texts)
    assert first.counts()["computed"] == len(texts)
    first.close()  # forgets, as a new run has
    np.testing.assert_array_equal(first(texts), asked)
    assert first.counts()["known"] == len(texts) and first.counts()["empty"] == 2
    newer = oracles.oracle(functions.length, version="2", **settings)
    newer(texts[:2])
    assert newer.counts()["computed"] == 2
    (tmp_path / "file").write_text("")
    nowhere = oracles.oracle(functions.length, workers=0, folder=tmp_path / "file")
    assert nowhere(["CC"]) == 2  # a folder that cannot be is a warning


def _fill(folder, start):
    oracles.oracle(functions.length, workers=0, folder=folder)([f"{n}" for n in range(start, start + 3000)])


def test_two_processes_write_one_file(tmp_path):
    both = [multiprocessing.get_context("spawn").Process(target=_fill, args=(tmp_path, n)) for n in (0, 1500)]
    for one in both:
        one.start()
    for one in both:
        one.join(60)
    assert [one.exitcode for one in both] == [0, 0]
    again = oracles.oracle(functions.length, workers=0, folder=tmp_path)
    np.testing.assert_array_equal(again([f"{n}" for n in range(4500)]), [len(f"{n}") for n in range(4500)])
    assert again.counts()["known"] == 4500


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: oracles.oracle(3), "expects a function of one text, got 3"),
        (lambda: oracles.oracle(lambda text: 0.0), "define it at the top of a module, or take workers=0"),
        (lambda: oracles.oracle(functions.length, timeout=0), "timeout=0: expected seconds, > 0"),
        (lambda: oracles.oracle(functions.length, workers=-1), "workers must be"),
        (lambda: oracles.oracle(functions.length, workers=0)([3]), "is asked for texts, got int"),
    ],
)
def test_one_line_says_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_function_that_no_process_can_load_and_one_of_the_script_are_refused(tmp_path, monkeypatch):
    (tmp_path / "gone.py").write_text("def score(text):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    of = oracles.oracle(__import__("gone").score, workers=1)
    (tmp_path / "gone.py").write_text("raise ImportError('no chemistry here')\n")
    with pytest.raises(ValueError, match="cannot be loaded by another process: ImportError: no chemistry here"):
        of(["C"])
    code = "from rgdiff import oracles\ndef score(text): return 1.0\noracles.oracle(score)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError: the oracle __main__.score is defined in the script that runs" in run.stderr.splitlines()[-1]


@pytest.mark.slow
def test_processes_end_with_a_program_that_is_killed(tmp_path):
    code = (
        "import sys; from rgdiff import oracles; from tests import oracle_functions as f\n"
        "print(int(oracles.oracle(f.process, workers=1)(['C'])[0]), flush=True)\n"
        "oracles.oracle(f.hostile, workers=1, timeout=99)(['hang'])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as program:
        pid = int(program.stdout.readline())
        program.kill()
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("the process outlived its parent")
