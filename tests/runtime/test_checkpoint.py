"""Checkpoints: exact bits, structure of `like`, kills at random moments, damage, foreign files, meshes."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rgdiff.runtime.checkpoint import CheckpointError, Checkpoints, load_meta, load_params, save_params

ROOT = Path(__file__).parents[2]


def run_python(code: str, *args: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | (env or {})
    return subprocess.Popen(
        [sys.executable, "-c", code, *args], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def make_state(seed: int = 0):
    key = jax.random.key(seed)
    params = {"w": jax.random.normal(key, (7, 5)), "half": jnp.arange(4, dtype=jnp.bfloat16) / 3}
    return {
        "params": params,
        "opt": optax.adam(1e-3).init(params),  # NamedTuples and an EmptyState
        "key": key,
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
        "bits": np.array([0, 2**32 - 1], np.uint32),
        "mask": jnp.array([True, False]),
        "special": jnp.array([jnp.nan, -jnp.inf, -0.0, 1e-45]),
        "none": None,
        "empty": {},
        "zero": jnp.zeros((0, 3)),
        "list": [jnp.int32(-3), (jnp.ones(2),)],
        "count": 3,
        "rate": 0.1,
        "flag": True,
    }


def as_bytes(leaf) -> bytes:
    data = (
        jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
    )
    return np.asarray(data).tobytes()


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        assert getattr(x, "dtype", None) == getattr(y, "dtype", None)
        assert np.shape(x) == np.shape(y)
        assert as_bytes(x) == as_bytes(y)


def flip(path: Path) -> None:
    """Change one bit in the largest file under `path`: where the array data are."""
    largest = max((f for f in path.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0x10
    largest.write_bytes(content)


def truncate(path: Path) -> None:
    for file in path.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_every_leaf_type_comes_back_bit_for_bit(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(5, state, {"note": "x", "nan": float("nan")})
        checkpoints.wait()
        like = {**make_state(1), "bits": np.zeros(2, np.uint32), "count": 0, "rate": 0.0, "flag": False}
        restored, step, meta = checkpoints.restore(like)
    assert step == 5 and meta is not None and meta["note"] == "x" and np.isnan(meta["nan"])
    assert_same(restored, state)


def test_abstract_like_restores_arrays_and_keys(tmp_path):
    state = {"w": jnp.arange(3.0), "key": jax.random.key(7), "e": jnp.zeros((2, 0))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        restored, _, _ = checkpoints.restore(jax.eval_shape(lambda: state))
    assert_same(restored, state)
    assert bool((jax.random.normal(restored["key"]) == jax.random.normal(state["key"])).all())


def test_donated_and_overwritten_buffers_do_not_reach_the_file(tmp_path):
    ruin = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in range(3):
            x, n = jnp.full((1000, 1000), float(step)), np.full((500, 500), step)
            checkpoints.save(step, {"x": x, "n": n})
            ruin(x).block_until_ready()
            n[:] = -1
        like = {"x": jnp.zeros((1000, 1000)), "n": np.zeros((500, 500), int)}
        for step in range(3):
            restored, found, _ = checkpoints.restore(like, step)
            assert found == step and (restored["x"] == step).all() and (restored["n"] == step).all()


def test_keeps_the_newest_and_forgets_an_abandoned_future(tmp_path):
    like = {"x": jnp.zeros(3)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, {"x": jnp.full(3, float(step))})
    assert sorted(os.listdir(tmp_path)) == ["3", "4"]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(3, {"x": jnp.full(3, 30.0)})  # as after restore(step=3): 4 is no longer the future
        checkpoints.wait()
        assert checkpoints.latest() == 3
        state, step, _ = checkpoints.restore(like)
        assert step == 3 and (state["x"] == 30).all()
        checkpoints.save(4, {"x": jnp.full(3, 40.0)})
    assert len(os.listdir(tmp_path)) == 2
    with pytest.raises(ValueError, match="keep=0, expected at least 1"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize("damage", [flip, truncate])
@pytest.mark.first(1)
def test_damaged_newest_falls_back_with_one_warning(tmp_path, caplog, capfd, damage):
    make = lambda step: {"x": jax.random.normal(jax.random.key(step), (100, 100))}  # noqa: E731
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make(1))
        checkpoints.save(2, make(2))
    damage(tmp_path / "2")
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        state, step, _ = Checkpoints(tmp_path).restore(make(0))
    assert step == 1
    assert_same(state, make(1))
    mine = [r.getMessage() for r in caplog.records]
    assert len(mine) == 1 and "/2 is" in mine[0] and "going on from step 1" in mine[0] and "\n" not in mine[0]
    assert capfd.readouterr().err.count("\n") <= 1
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(tmp_path).restore(make(0), step=2)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    damage(tmp_path / "1")
    with pytest.raises(CheckpointError, match="no other checkpoint in the folder is readable"):
        Checkpoints(tmp_path).restore(make(0))


@pytest.mark.slow
def test_every_single_flipped_byte_is_noticed_or_harmless(tmp_path):
    state = {"x": jax.random.normal(jax.random.key(0), (40, 40)), "b": jnp.arange(4, dtype=jnp.bfloat16)}
    save_params(tmp_path / "p", state)
    files = [f for f in (tmp_path / "p").rglob("*") if f.is_file() and f.stat().st_size]
    noticed = 0
    for file in files:
        content = file.read_bytes()
        for place in (0, len(content) // 3, 2 * len(content) // 3):
            broken = bytearray(content)
            broken[place] ^= 0x04
            file.write_bytes(broken)
            try:
                assert_same(load_params(tmp_path / "p", state), state)
            except CheckpointError:
                noticed += 1
        file.write_bytes(content)
    assert noticed >= 5
    assert_same(load_params(tmp_path / "p", state), state)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (
            {"a": {"w": jnp.zeros((3, 4))}, "b": jnp.zeros(2)},
            r"'a/w' expected float32\[3,4\], found float32\[2,4\]",
        ),
        ({"a": {"w": jnp.zeros((2, 4), jnp.bfloat16)}, "b": jnp.zeros(2)}, r"'a/w' expected bfloat16\[2,4\]"),
        ({"a": {"w": jnp.zeros((2, 4)), "v": jnp.zeros(1)}, "b": jnp.zeros(2)}, r"'a/v' .*found nothing"),
        ({"a": {"w": jnp.zeros((2, 4))}}, r"'b' expected nothing, found float32\[2\]"),
        (
            {"a": {"w": jnp.zeros((2, 4))}, "b": jax.random.key(0)},
            r"'b' expected key<threefry2x32>\[\], found",
        ),
    ],
)
def test_foreign_structure_names_the_first_difference(tmp_path, like, message):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": {"w": jnp.zeros((2, 4))}, "b": jnp.zeros(2)})
        with pytest.raises(CheckpointError, match=message) as caught:
            checkpoints.restore(like)
    assert "\n" not in str(caught.value)


def test_what_is_not_a_checkpoint_says_so_in_one_line(tmp_path):
    from orbax.checkpoint import v1 as ocp

    like = {"x": jnp.zeros(2)}
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("hello")
    (tmp_path / "3").mkdir()
    ocp.save(tmp_path / "other", like)  # Orbax's, but not ours
    cases = [
        (lambda: Checkpoints(tmp_path / "none").restore(like), "no checkpoint folder at"),
        (lambda: Checkpoints(tmp_path / "empty").restore(like), "no checkpoint yet in"),
        (lambda: Checkpoints(tmp_path / "empty").restore(like, 4), "no checkpoint of step 4 yet in"),
        (lambda: Checkpoints(tmp_path).restore(like), "/3 is not a checkpoint of rgdiff"),
        (lambda: load_params(tmp_path / "none", like), "no checkpoint at"),
        (lambda: load_params(tmp_path / "file", like), "is not a checkpoint: it is a file"),
        (lambda: load_params(tmp_path / "empty", like), "is not a checkpoint"),
        (lambda: load_params(tmp_path / "other", like), "is not a checkpoint of rgdiff"),
        (lambda: save_params(tmp_path / "s", {"a": "text"}), "leaf 'a' is a str"),
        (lambda: save_params(tmp_path / "file" / "s", like), "not written"),
        (lambda: save_params(tmp_path / "s", {"a/b": 1, "a": {"b": 2}}), "two leaves have the path 'a/b'"),
    ]
    for call, message in cases:
        with pytest.raises(CheckpointError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob(".new-*"))


def test_params_are_replaced_and_read_without_like(tmp_path):
    save_params(tmp_path / "deep" / "p", {"a": {"b": jnp.ones(2)}}, {"best": 1})
    save_params(
        tmp_path / "deep" / "p",
        {"a": {"b": jnp.zeros(3), "c": jnp.ones(())}, "k": jax.random.key(2)},
        {"best": 2},
    )
    assert os.listdir(tmp_path / "deep") == ["p"]
    assert load_meta(tmp_path / "deep" / "p") == {"best": 2}
    params = load_params(tmp_path / "deep" / "p")
    assert params["a"]["b"].shape == (3,) and params["a"]["c"] == 1
    assert (jax.random.key_data(params["k"]) == jax.random.key_data(jax.random.key(2))).all()
    save_params(tmp_path / "leaf", jnp.arange(3))
    assert (load_params(tmp_path / "leaf") == np.arange(3)).all()


def test_safetensors_written_by_the_reference_library(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    w, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1, 2], np.int32)
    numpy.save_file({"net.Dense_0.kernel": w, "net/Dense_0/bias": b}, tmp_path / "p.safetensors", {"from": "test"})
    like = {"net": {"Dense_0": {"kernel": jnp.zeros((2, 3), jnp.bfloat16), "bias": jnp.zeros(2, jnp.int32)}}}
    params = load_params(tmp_path / "p.safetensors", like)["net"]["Dense_0"]
    assert params["kernel"].dtype == jnp.bfloat16 and (params["kernel"] == w).all() and (params["bias"] == b).all()
    assert (load_params(tmp_path / "p.safetensors")["net"]["Dense_0"]["kernel"] == w).all()

    def fails(like, message):
        with pytest.raises(CheckpointError, match=message) as caught:
            load_params(tmp_path / "p.safetensors", like)
        assert "\n" not in str(caught.value)

    dense = like["net"]["Dense_0"]
    fails(
        {"net": {"Dense_0": {**dense, "scale": jnp.zeros(1)}}},
        "'net/Dense_0/scale' expected .* found nothing",
    )
    fails({"net": {"Dense_0": {"bias": dense["bias"]}}}, "'net/Dense_0/kernel' expected nothing")
    fails(
        {"net": {"Dense_0": {**dense, "bias": jnp.zeros(3, jnp.int32)}}},
        r"expected int32\[3\], found int32\[2\]",
    )
    fails({"net": {"Dense_0": {**dense, "bias": jnp.zeros(2)}}}, r"expected float32\[2\], found int32\[2\]")
    content = (tmp_path / "p.safetensors").read_bytes()
    for broken in (content[:-4], content[:20], b"", b"\x80\x04pickle"):
        (tmp_path / "p.safetensors").write_bytes(broken)
        fails(like, "is not a readable safetensors file")


KILLED = """
import sys, jax.numpy as jnp
from rgdiff.runtime.checkpoint import Checkpoints
checkpoints, step = Checkpoints(sys.argv[1]), int(sys.argv[2])
while True:
    step += 1
    state = {"a": jnp.full((200, 200), step),
             "b": [jnp.full(3, step, jnp.bfloat16), jnp.full((50, 50), 1.0 * step)]}
    checkpoints.save(step, state, {"step": step})
    if step == int(sys.argv[2]) + 1:
        checkpoints.wait()
    print(step, flush=True)
"""


def kill_and_restore(folder: Path, times: int) -> None:
    like = {"a": jnp.zeros((200, 200), jnp.int32), "b": [jnp.zeros(3, jnp.bfloat16), jnp.zeros((50, 50))]}
    chance, step, residues = random.Random(0), 0, 0
    for _ in range(times):
        child = run_python(KILLED, str(folder), str(step))
        assert child.stdout is not None and child.stderr is not None
        first = child.stdout.readline()
        assert first, child.stderr.read().decode()
        time.sleep(chance.uniform(0.0, 0.4))
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read().split()
        child.communicate()
        started = int(rest[-1]) if rest else int(first)
        names = os.listdir(folder)
        residues += any("tmp" in name or "trash" in name for name in names)
        state, step, meta = Checkpoints(folder).restore(like)
        assert meta == {"step": step}
        assert started - 1 <= step <= started + 1  # `started`: its save had begun, so the one before was complete
        for leaf in jax.tree.leaves(state):
            assert (leaf.astype(jnp.float32) == jnp.asarray(step, leaf.dtype).astype(jnp.float32)).all()
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(step + 1, like)
    assert len(os.listdir(folder)) == 2, "leftovers of the killed writers are still there"
    assert residues, "no kill fell into a save: the test did not test"


def test_a_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path):
    kill_and_restore(tmp_path, 5)


@pytest.mark.slow
def test_many_kills(tmp_path):
    kill_and_restore(tmp_path, 20)


MESH = """
import json, sys, jax, jax.numpy as jnp, numpy as np
from rgdiff.runtime.checkpoint import Checkpoints
from rgdiff.runtime.mesh import data_mesh, replicate, shard_batch
from jax.sharding import AxisType
mesh = data_mesh()
x = np.arange(48, dtype=np.float32).reshape(16, 3)
batch, params = shard_batch({"x": x}, mesh), replicate({"w": jnp.ones(3)}, mesh)
step = jax.jit(lambda p, b: (b["x"] @ p["w"], (b["x"] ** 2).sum()))
sums, total = step(params, batch)
def error(f):
    try:
        f()
    except ValueError as e:
        return str(e)
keys = shard_batch(jax.random.split(jax.random.key(0), 8), mesh)
with Checkpoints(sys.argv[1]) as c:
    c.save(1, {"b": batch, "p": params, "k": keys})
    back, _, _ = c.restore({"b": batch, "p": params, "k": keys})
    like = {"b": {"x": jnp.zeros((16, 3))}, "p": {"w": jnp.zeros(3)},
            "k": jax.random.split(jax.random.key(1), 8)}
    one = c.restore(like)[0]
    c.save(2, {"x": x})
    spread = c.restore({"x": batch["x"]})[0]["x"]
half = data_mesh(jax.devices()[:2])
print(json.dumps({
    "auto": mesh.axis_types == (AxisType.Auto,), "names": mesh.axis_names,
    "devices": len(batch["x"].sharding.device_set),
    "shard": [s.data.shape for s in batch["x"].addressable_shards], "sums": np.asarray(sums).tolist(),
    "out": len(sums.sharding.device_set), "copies": [s.data.shape for s in params["w"].addressable_shards],
    "ragged": error(lambda: shard_batch({"a": jnp.ones((6, 2))}, mesh)),
    "scalar": error(lambda: shard_batch(jnp.ones(()), mesh)),
    "none": error(lambda: data_mesh([])), "half": half.shape["data"],
    "back": back["b"]["x"].sharding == batch["x"].sharding and back["p"]["w"].sharding == params["w"].sharding
        and back["k"].sharding == keys.sharding,
    "same": bool((back["b"]["x"] == x).all()) and bool((np.asarray(one["b"]["x"]) == x).all()),
    "keys": bool((jax.random.key_data(back["k"]) == jax.random.key_data(keys)).all()),
    "spread": spread.sharding == batch["x"].sharding and bool((spread == x).all()),
    "one": len(one["b"]["x"].sharding.device_set),
}))
"""


def test_mesh_and_checkpoints_on_eight_devices(tmp_path):
    child = run_python(MESH, str(tmp_path), env={"XLA_FLAGS": "--xla_force_host_platform_device_count=8"})
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err.decode()
    found = json.loads(out)
    assert found["auto"] and found["names"] == ["data"] and found["devices"] == found["out"] == 8
    assert found["shard"] == [[2, 3]] * 8 and found["copies"] == [[3]] * 8 and found["half"] == 2
    assert found["sums"] == np.arange(48).reshape(16, 3).sum(1).tolist()
    assert "multiple of the 8 devices" in found["ragged"] and "'a'" in found["ragged"] and "()" in found["scalar"]
    assert "at least one" in found["none"]
    assert found["back"] and found["same"] and found["keys"] and found["spread"] and found["one"] == 1
    assert b"Warning" not in err and b"WARNING" not in err
