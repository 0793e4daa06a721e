"""A run killed at random moments and resumed ends bit-equal to one that was never interrupted."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICK = "--xla_backend_optimization_level=0"  # compiles, whatever its speed then
SMALL = [
    "samples=8",
    "domain=planar",
    "prior=mlp",
    "prior.network.features=[32,32]",
    "prior.steps=4",
    "prior.train.steps=200",
    "prior.train.optimizer.decay_steps=200",
    "reward=log_density",
    "method=draft_k",
    "method.steps=100",
    "method.batch=4",
]


def start(out, cache, *, resume, room=None):
    command = [sys.executable, "-m", "rgdiff", "run", "steer", *SMALL, f"out={out}", f"cache_dir={cache}"]
    environment = os.environ | {"XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu", "RGDIFF_SAVE_EVERY": "0"}
    environment["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"  # else the cache's own path is part of its keys
    full = None if room is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    return subprocess.Popen(
        command + [f"resume={str(resume).lower()}"],
        cwd=ROOT, env=environment, preexec_fn=full, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def rows(folder):
    log = folder / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def same_samples(whole, broken):
    one, two = np.load(whole / "samples.npz"), np.load(broken / "samples.npz")
    assert set(one) == set(two)
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


def kill_and_resume(tmp_path, kills, seed):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(whole, tmp_path / "cache_a", resume=False)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output

    shutil.copytree(tmp_path / "cache_a" / "xla", tmp_path / "cache_b" / "xla")  # programs, and not the prior
    rng = random.Random(seed)
    total = rows(whole)
    for kill in range(kills):  # each falls a random while after a random row of its own share of the run, or before it
        goal = min(int(total * (kill + rng.random()) / (kills + 1)), total - 30)
        process = start(broken, tmp_path / "cache_b", resume=True)
        began = time.monotonic()
        while rows(broken) < goal and process.poll() is None and time.monotonic() - began < 300:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, output
    process = start(broken, tmp_path / "cache_b", resume=True)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "damaged" not in output

    same_samples(whole, broken)
    from rgdiff.runtime.checkpoint import load_params

    last = sorted((whole / "checkpoints" / "draft_k").iterdir())[-1].name
    a = load_params(whole / "checkpoints" / "draft_k" / last)
    b = load_params(
        broken / "checkpoints" / "draft_k" / sorted((broken / "checkpoints" / "draft_k").iterdir())[-1].name
    )
    import jax

    jax.tree.map(np.testing.assert_array_equal, a, b)
    steps = [row["step"] for row in map(json.loads, (broken / "metrics.jsonl").open()) if row["phase"] == "draft_k"]
    assert steps == list(range(100))


@pytest.mark.slow
def test_killed_run_resumes_bit_equal(tmp_path):
    kill_and_resume(tmp_path, kills=1, seed=0)


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    kill_and_resume(tmp_path, kills=20, seed=1)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """No file may grow beyond some size, as where a disk is full: the run stops, says so, and goes on when there is room."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    output, _ = (process := start(whole, tmp_path / "cache_a", resume=False)).communicate(timeout=600)
    assert process.returncode == 0, output
    for room in (60_000, 25_000, 6_000):
        process = start(broken, tmp_path / "cache_b", resume=True, room=room)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 2, output
        last = output.strip().splitlines()[-1]
        assert last.startswith("rgdiff: ") and ("too large" in last.lower() or "written" in last), output
    process = start(broken, tmp_path / "cache_b", resume=True)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    same_samples(whole, broken)
