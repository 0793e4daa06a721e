"""The run folder, the metrics log and the progress display."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff.runtime import progress as progress_module
from rgdiff.runtime.folder import RunFolder, collect_versions, write_atomic
from rgdiff.runtime.metrics import MetricsLog, read_metrics
from rgdiff.runtime.progress import announce, progress

CONFIG = {
    "seed": 3,
    "method": {"_target_": "a.b", "rate": 1e-5, "levels": (1, 2)},
    "out": "x",
    "flag": True,
    "none": None,
}


def refuses(message, call):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_create_writes_config_and_versions(tmp_path):
    import yaml

    folder = RunFolder.create(tmp_path / "a" / "run", CONFIG)
    stored = yaml.safe_load((folder.path / "config.yaml").read_text())
    assert stored == {**CONFIG, "method": {"_target_": "a.b", "rate": 1e-5, "levels": [1, 2]}} == folder.config
    versions = json.loads((folder.path / "versions.json").read_text())
    import jax

    assert versions == folder.versions == collect_versions()
    assert versions["jax"] == jax.__version__ and versions["numpy"] == np.__version__
    assert versions["python"] == sys.version.split()[0] and versions["device"].startswith(jax.default_backend())
    assert sorted(os.listdir(folder.path)) == ["config.yaml", "versions.json"]
    assert not folder.done


def test_a_folder_with_a_run_is_refused_unless_resumed_with_the_same_config(tmp_path):
    path = tmp_path / "run"
    RunFolder.create(path, CONFIG, resume=True)  # nothing there yet: starts
    refuses("already holds a run; give resume=true", lambda: RunFolder.create(path, CONFIG))
    RunFolder.create(path, {**CONFIG, "out": "elsewhere", "resume": True, "data_dir": "/d"}, resume=True)
    RunFolder.create(path, dict(reversed(CONFIG.items())), resume=True)  # order is not a difference

    def resume(**changes):
        return lambda: RunFolder.create(path, {**CONFIG, **changes}, resume=True)

    refuses("its run has seed=3, this one seed=4", resume(seed=4))
    refuses("its run has flag=True, this one flag=1", resume(flag=1))
    refuses(
        r"method.levels=\[1, 2\], this one method.levels=\[1, 3\]",
        resume(method={**CONFIG["method"], "levels": [1, 3]}),
    )
    refuses(r"its run has extra=\(absent\), this one extra=1", resume(extra=1))
    refuses(
        r"its run has method.rate=1e-05, this one method.rate=\(absent\)",
        resume(method={"_target_": "a.b", "levels": [1, 2]}),
    )
    refuses("plain values only", lambda: RunFolder.create(tmp_path / "o", {"f": object()}))
    assert not (tmp_path / "o").exists()
    (path / "config.yaml").write_text("a: [1")
    refuses("is not a readable config", resume())
    (tmp_path / "file").write_text("")
    refuses("is a file; out must name a folder", lambda: RunFolder.create(tmp_path / "file", CONFIG))


def test_resuming_with_other_versions_warns(tmp_path, caplog):
    folder = RunFolder.create(tmp_path, CONFIG)
    RunFolder.create(tmp_path, CONFIG, resume=True)
    assert not caplog.records
    write_atomic(tmp_path / "versions.json", json.dumps({**folder.versions, "jax": "0.0.1"}).encode())
    RunFolder.create(tmp_path, CONFIG, resume=True)
    assert [r.getMessage() for r in caplog.records if "jax 0.0.1 -> " in r.getMessage()]


def test_summary_is_strict_json(tmp_path):
    folder = RunFolder.create(tmp_path, CONFIG)
    folder.write_summary(
        {
            "r": jnp.float32(0.5),
            "nan": float("nan"),
            "inf": np.float64("-inf"),
            "n": np.int64(3),
            "ok": np.True_,
            "s": "t",
        }
    )

    def no_constants(name):
        raise AssertionError(name)

    found = json.loads((tmp_path / "summary.json").read_text(), parse_constant=no_constants)
    assert found == {"r": 0.5, "nan": None, "inf": None, "n": 3, "ok": True, "s": "t"}
    assert folder.done
    refuses(r"summary\['a'\] is not a single value", lambda: folder.write_summary({"a": np.zeros(2)}))
    refuses(r"summary\['a'\] is not a single value", lambda: folder.write_summary({"a": {"b": 1}}))


def test_samples_need_no_pickle(tmp_path):
    folder = RunFolder.create(tmp_path, CONFIG)
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    folder.write_samples(
        x0=jnp.asarray(x), half=jnp.array([0.5, -2.0], jnp.bfloat16), smiles=np.array(["CC", "c1ccccc1"])
    )
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as found:
        assert (found["x0"] == x).all() and found["half"].tolist() == [0.5, -2.0] and found["smiles"][1] == "c1ccccc1"
    refuses("samples: o has dtype object", lambda: folder.write_samples(o=np.array([None, 1], object)))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "f", b"old")

    def fail(*_):
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        write_atomic(tmp_path / "f", b"new")
    assert os.listdir(tmp_path) == ["f"] and (tmp_path / "f").read_bytes() == b"old"


def test_metrics_as_json_lines_and_csv(tmp_path):
    with MetricsLog(tmp_path) as metrics:
        metrics.write("pretrain", 1, {"loss": jnp.float32(0.25)})
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1  # flushed at once
        metrics.write("tune", 1, {"reward": float("nan"), "loss": np.int32(2)})
        refuses("'bad' is not a single number", lambda: metrics.write("tune", 2, {"bad": np.zeros(3)}))
        refuses("the name 'step' is taken", lambda: metrics.write("tune", 2, {"step": 1}))
    rows = read_metrics(tmp_path)
    assert [(r["phase"], r["step"], r["loss"]) for r in rows] == [("pretrain", 1, 0.25), ("tune", 1, 2)]
    assert rows[1]["reward"] is None and rows[0]["seconds"] >= 0
    with open(tmp_path / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["phase", "step", "seconds", "loss", "reward"]
    assert [row["loss"] for row in table] == ["0.25", "2"] and [row["reward"] for row in table] == ["", ""]


def test_a_resumed_log_has_each_step_once_and_survives_a_cut_line(tmp_path):
    metrics = MetricsLog(tmp_path)
    for step in range(1, 6):
        metrics.write("pretrain", step, {"loss": step})
    for step in range(1, 6):
        metrics.write("tune", step, {"reward": step})
    metrics._file.close()  # killed: no close
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"phase": "tune", "st')
    with MetricsLog(tmp_path) as metrics:
        before = metrics.rows[-1]["seconds"]
        metrics.rewind("tune", 4)
        for step in range(4, 7):
            metrics.write("tune", step, {"reward": 10 * step})
    rows = read_metrics(tmp_path)
    assert [r["step"] for r in rows if r["phase"] == "pretrain"] == [1, 2, 3, 4, 5]
    assert [r["reward"] for r in rows if r["phase"] == "tune"] == [1, 2, 3, 40, 50, 60]
    assert rows[-1]["seconds"] >= before
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], "{broken", *lines[1:]]))
    refuses("line 2 is not a row of metrics", lambda: read_metrics(tmp_path))


def test_tensorboard_only_when_asked(tmp_path, monkeypatch):
    with MetricsLog(tmp_path / "a") as metrics:
        metrics.write("tune", 1, {"r": 1.0})
    assert sorted(os.listdir(tmp_path / "a")) == ["metrics.csv", "metrics.jsonl"]
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    refuses("needs the package tensorboardX", lambda: MetricsLog(tmp_path / "b", tensorboard=True))


def test_tensorboard_events_are_written(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsLog(tmp_path, tensorboard=True) as metrics:
        metrics.write("tune", 1, {"r": 1.0, "name": "x", "none": None})
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_progress_off_a_terminal_prints_rarely_and_at_the_end(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    with progress("tune", 100, done=40, file=out) as advance:
        for _ in range(6):
            clock[0] += 4.0
            advance(10, "reward 0.5")
    assert out.getvalue().splitlines() == [
        "tune 70/100, 2.5/s, 0:12 left  reward 0.5",
        "tune 100/100, 2.5/s, 0:24  reward 0.5",
    ]


def test_progress_says_that_it_compiles_and_the_rate_leaves_that_out(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress_module, "SILENT", 0.02)
    out = io.StringIO()
    with progress("tune", 100, file=out) as advance:
        time.sleep(0.2)  # nothing is done yet
        clock[0] += 90.0  # a minute and a half of compiling and ten steps
        advance(10)
        for _ in range(9):
            clock[0] += 2.0
            advance(10)
    assert out.getvalue().splitlines() == [
        "tune 0/100, compiling…",
        "tune 10/100",
        "tune 60/100, 5/s, 0:08 left",
        "tune 100/100, 5/s, 1:48",
    ]


def test_what_is_quick_says_nothing_before_it_is_done(monkeypatch):
    monkeypatch.setattr(progress_module, "SILENT", 0.05)
    out = io.StringIO()
    with progress("tune", 2, file=out) as advance:
        advance(2)
    with pytest.raises(ValueError, match="mine"), progress("fails", 2, file=out):
        raise ValueError("mine")
    announce("loading…", out)
    announce("training…", out)
    announce(None)
    time.sleep(0.2)
    assert [line.partition(",")[0] for line in out.getvalue().splitlines()] == ["tune 2/2"]
    announce("loading the data…", out)
    time.sleep(0.3)
    announce(None)
    assert out.getvalue().splitlines()[1:] == ["loading the data…"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_says_that_it_compiles():
    out = Terminal()
    with progress("tune", 20, file=out) as advance:
        time.sleep(0.3)
        before = out.getvalue()
        advance(10)
        advance(10)
    assert "compiling…" in before and "0/20" in before and "0/s" not in before
    assert "20/20" in out.getvalue() and "compiling…" not in out.getvalue()[out.getvalue().rindex("20/20") :]


def test_progress_on_a_terminal_is_a_bar():
    out = Terminal()
    with progress("tune [b]x[/b]", 10, file=out) as advance:
        advance(5, "reward [0.5]")
        advance(5, "reward [0.7]")
    assert "tune [b]x[/b]" in out.getvalue() and "10/10" in out.getvalue() and "reward [0.7]" in out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_survives_a_closed_stream(monkeypatch, terminal):
    class Gone(io.StringIO):
        def isatty(self):
            return terminal

        def write(self, _):
            raise BrokenPipeError

    with progress("a", 2, file=Gone()) as advance:
        advance(1)
        advance(1, "text")
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    with progress("a", 1) as advance:
        advance(1)
    monkeypatch.setattr(sys, "stdout", None)
    with progress("a", 1) as advance:
        advance(1)


def test_an_error_inside_progress_is_not_swallowed():
    with pytest.raises(ValueError, match="mine"), progress("a", 1, file=io.StringIO()):
        raise ValueError("mine")
