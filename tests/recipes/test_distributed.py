"""Several processes: `rgdiff run` in two of two devices each makes the numbers, the folder and the report of one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from rgdiff.recipes import compose
from rgdiff.recipes.run import prepare
from rgdiff.runtime import distributed

PLANE = [
    "domain=planar", "prior=planar_mlp", "reward=log_density", "samples=16", "prior.steps=4", "prior.train.steps=20",
    "prior.train.batch=32", "prior.network.features=[8,8]",
]  # fmt: skip
TINY = [
    *PLANE, "method.options.candidates=2", "+method@methods.draft=draft_k",
    "methods.draft.steps=6", "methods.draft.batch=8",
]  # fmt: skip
BLACK_BOX = [
    *PLANE, "method=ddpo", "reward=custom", "reward.fn=tests.recipes.host_reward.height", "reward.host=true",
    "method.steps=4", "method.batch=8", "method.options.minibatches=2",
]  # fmt: skip
QUERIES = [  # a Gaussian process: the training of networks amplifies rounding, which depends on the number of threads
    *PLANE, "method=seiko", "surrogate@method.surrogate=gp", "method.queries=[8,8]", "method.tuning.steps=4", "method.tuning.batch=8",
    "method.evaluate=16",
]  # fmt: skip
FEW_STEPS = [
    *PLANE, "method=dxmi", "method.iterations=4", "method.batch=8", "method.pretraining={steps: 3, batch: 8, learning_rate: 1e-3}",
]  # fmt: skip
WORDS = [
    "domain=sequences", "reward=gc", "prior=conv1d", "prior.network.width=8", "prior.network.dilations=[1]", "prior.network.kernel=3",
    "prior.steps=4", "prior.train.steps=20", "prior.train.batch=32", "samples=16", "method=drakes",
    "method.steps=4", "method.batch=8",
]  # fmt: skip


def start(out, options, count=1, devices=1, cache=None, **environ):
    """Start a run as `count` processes of some devices each, joined by the usual variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    joined = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)} if count > 1 else {}
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    own = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "RGDIFF_CACHE": str(cache or out.parent / "cache")}
    command = [sys.executable, "-m", "rgdiff", "run", "steer", *options, f"out={out}"]
    return [
        subprocess.Popen(
            command, env=own | joined | ({"JAX_PROCESS_ID": str(i)} if count > 1 else {}) | environ,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(count)
    ]  # fmt: skip


def ended(processes, code=0):
    said = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return said


def figures(out):
    summary = json.loads((out / "summary.json").read_text())
    return {name: value for name, value in summary.items() if "seconds" not in name}


def same(a, b):
    one, other = figures(a), figures(b)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if value is None:  # no number, in both
            assert other[name] is None, name
        else:
            np.testing.assert_allclose(other[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    one, other = (np.load(out / "samples.npz") for out in (a, b))
    for name in one.files:
        np.testing.assert_allclose(other[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [TINY, BLACK_BOX, QUERIES, FEW_STEPS, WORDS],
    ids=["svdd and draft_k", "ddpo with a host reward", "seiko", "dxmi", "drakes"],
)
def test_two_processes_make_the_numbers_of_one(tmp_path, options):
    alone, together = tmp_path / "alone", tmp_path / "together"
    if options is WORDS:
        letters = np.random.default_rng(0).choice(list("ACGT"), (200, 8))
        (tmp_path / "words.fasta").write_text("".join(f">{i}\n{''.join(one)}\n" for i, one in enumerate(letters)))
        options = [*options, f"domain.source={tmp_path / 'words.fasta'}"]
    ended(start(alone, options, cache=tmp_path / "a"))
    said = ended(start(together, options, count=2, devices=2, cache=tmp_path / "b"))
    same(alone, together)
    assert sorted(os.listdir(alone)) == sorted(os.listdir(together))
    assert set(os.listdir(tmp_path)) - {"words.fasta"} == {"a", "alone", "b", "together"}
    lines = [
        [line for line in out.splitlines() if "[Gloo]" not in line and "loading JAX" not in line] for out, _ in said
    ]
    assert any("report:" in line for line in lines[0]) and lines[1] == []
    read = lambda out: (out / "metrics.jsonl").read_text().splitlines()  # noqa: E731
    assert len(read(alone)) == len(read(together))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody stopped, its cache, and its options."""
    folder = tmp_path_factory.mktemp("whole")
    options = [*TINY, "methods.draft.steps=60"]
    ended(start(folder / "alone", options, cache=folder / "cache"))
    return folder / "alone", folder / "cache", options


def until(condition, pair):
    """Wait until a condition holds, or the first process has ended."""
    while not condition() and pair[0].poll() is None:
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.xdist_group("stopped pairs")
@pytest.mark.parametrize("number", range(int(os.environ.get("RGDIFF_KILLS", "2"))))  # ten, once in a while
def test_one_of_a_pair_is_killed_at_any_moment(tmp_path, whole, number):
    """The other ends within JAX's heartbeat, 100 seconds. One process on a mesh of its own, two or four then go on to the numbers of a run
    that was not stopped.
    """
    alone, cache, options = whole
    chance, killed = np.random.default_rng(number), tmp_path / "killed"
    pair = start(killed, options, count=2, devices=2, cache=cache, RGDIFF_SAVE_EVERY="0")
    folder = killed / "checkpoints" / "draft"
    until(lambda: folder.is_dir() and any(name.isdigit() for name in os.listdir(folder)), pair)
    time.sleep(chance.uniform(0, 0.5))
    pair[number % 2].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    for process in pair:
        process.communicate(timeout=400)
    assert time.monotonic() - begun < 150 and pair[1 - number % 2].returncode != 0
    assert not (killed / "summary.json").exists()
    count = (1, 2, 4)[number % 3]
    again = [*options, "resume=true", *(["mesh.data=2"] if count == 1 else [])]
    said = ended(start(killed, again, count=count, devices=2 if count < 4 else 1, cache=cache))
    assert "going on from step" in said[0][0]
    same(alone, killed)


@pytest.mark.slow
@pytest.mark.xdist_group("stopped pairs")
def test_a_pair_saves_and_ends_at_a_signal_to_either(tmp_path, whole):
    """At SIGTERM to the second process both save and end; one process on a mesh of its own goes on."""
    alone, cache, options = whole
    stopped = tmp_path / "stopped"
    pair = start(stopped, options, count=2, devices=2, cache=cache, RGDIFF_SAVE_EVERY="1000")  # only what SIGTERM saves
    log = stopped / "metrics.jsonl"
    until(lambda: log.exists() and '"draft"' in log.read_text(), pair)
    pair[1].send_signal(signal.SIGTERM)
    ended(pair, 143)
    assert not (stopped / "summary.json").exists()
    said = ended(start(stopped, [*options, "resume=true", "mesh.data=2"], devices=2, cache=cache))
    assert "going on from step" in said[0][0]
    same(alone, stopped)


@pytest.mark.slow
def test_where_one_process_fails_the_other_ends_too(tmp_path):
    """A reward of the first process raises what the other never sees: both end, with a code that is not 0, in far less than JAX's 300 seconds."""
    (tmp_path / "failing.py").write_text(
        "import os\nimport jax.numpy as jnp\n\n"
        "def score(x0, cond=None):\n"
        "    assert os.environ['JAX_PROCESS_ID'] != '0', 'only here'\n"
        "    return jnp.zeros(len(x0))\n"
    )
    options = [*PLANE, "method=svdd", "reward=custom", "reward.fn=failing.score"]
    begun = time.monotonic()
    pair = start(tmp_path / "out", options, count=2, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    said = [process.communicate(timeout=400) for process in pair]
    assert all(process.returncode not in (0, None) for process in pair), said
    assert "only here" in said[0][1] and time.monotonic() - begun < 200
    assert not (tmp_path / "out" / "summary.json").exists()


def test_what_is_wrong_with_processes_is_one_line(monkeypatch):
    with pytest.raises(ValueError, match="2 processes were started, and distributed=false joins none"):
        distributed.join(False, {"SLURM_STEP_NUM_TASKS": "2"})
    with pytest.raises(ValueError, match="distributed=true finds no other processes; name the first one"):
        distributed.join(True, {})
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS=host:1 needs JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        distributed.join("auto", {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_PROCESS_ID": "0"})

    def refuse(*arguments):
        raise RuntimeError("must be called before any JAX calls")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", refuse)
    with pytest.raises(ValueError, match="2 processes were started and could not be joined: must be called before"):
        distributed.join("auto", {"OMPI_COMM_WORLD_SIZE": "2"})
    distributed.join("auto", {})  # nobody else
    distributed.join(False, {})
    assert not distributed.several() and distributed.first() and distributed.agreed(3) == 3
    assert distributed.shared("a") == "a" and distributed.on_first(lambda: 5) == 5
    assert distributed.gathered({"x": np.ones(2)})["x"].shape == (2,)


def test_a_batch_that_cannot_be_split_is_refused_before_anything_is_made(tmp_path):
    options = [
        "mesh.data=8",
        f"out={tmp_path / 'run'}",
        "domain=planar",
        "prior=planar_mlp",
        "reward=log_density",
        "method=draft_k",
    ]
    with pytest.raises(ValueError, match="draft_k: batch must be a multiple of the 8 devices that split it, got 6"):
        prepare("steer", [*options, "method.batch=6"], dry=True)
    with pytest.raises(
        ValueError, match="prior.train.batch must be a multiple of the 8 devices that split it, got 100"
    ):
        prepare("steer", [*options, "prior.train.batch=100"], dry=True)
    with pytest.raises(ValueError, match="mesh.data=3 x .* is not of the 8 devices"):
        prepare("steer", [*options[1:], "mesh.data=3"], dry=True)
    assert not (tmp_path / "run").exists()


def test_meshes_in_a_config():
    assert compose.distributed(["distributed=False"]) is False and compose.distributed(["seed=1"]) == "auto"
    config = compose.compose("steer", ["mesh.data=-1", "mesh.fsdp=2", "distributed=false"])
    assert config["mesh"] == {"data": -1, "fsdp": 2} and config["distributed"] is False
    assert compose.compose("steer", [])["mesh"] is None
    for override, said in (
        ("mesh.data=0", "mesh.data must be an integer of at least 1"),
        ("distributed=maybe", "distributed must be one of"),
        ("mesh=4", "mesh has axes, e.g. mesh.data=-1"),
        ("profile.steps=0", "profile.steps must be an integer of at least 1"),
        ("profile.skip=3", "profile traces steps of training, e.g. profile.skip=10 profile.steps=5"),
    ):
        with pytest.raises(ValueError, match=said):
            compose.check_common(compose.compose("steer", [override]), "steer")
    with pytest.raises(ValueError, match="mesh.dat"):
        compose.compose("steer", ["mesh.dat=2"])
