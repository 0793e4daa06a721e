"""Our networks beside the ones they are twins of: the same weights, inputs, outputs and gradients.

A `Case` is one small network, a `Full` one of the released size whose names and shapes alone are compared. A test module
lists its own in `CASES` and `FULL`, and `table` makes five tests of them:

    golden      output and gradients against numbers kept in golden/NAME.npz; no torch
    torch       the same against torch itself, every gradient whole, in float32 and float64
    keys        every key and shape against keys/NAME.json.gz; no torch, no weights
    bfloat16    float32 out of bfloat16 computation, finite and near
    remat       the golden numbers again, with what the backward pass computes twice

`python -m tests.pretrained.make_golden` writes the files, and needs torch. Weights are a function of key and shape, so that
no file holds any.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff.pretrained import weights
from rgdiff.pretrained.config import Config

GOLDEN, KEYS = Path(__file__).parent / "golden", Path(__file__).parent / "keys"
# Of outputs, the input's gradient, the parameters' gradients; each of the largest number of its kind.
TOLERANCE = {32: (3e-5, 1e-5, 1e-5), 64: (1e-7, 1e-7, 1e-7)}


def keep(key: str) -> str | None:
    """Leave a key as it is."""
    return key


@dataclasses.dataclass(frozen=True)
class Case:
    """A small network and its twin.

    Args:
      name: of its files.
      config: its config.json; absent settings have their defaults on both sides.
      network: (config, dtype) -> Linen module.
      inputs: keyword arguments of the Linen module; arrays as it takes them. Gradients are taken in `wrt`.
      build: config -> torch module; imports torch inside.
      call: (torch module, inputs as tensors, in the Linen module's layout) -> its output or outputs, in that layout too.
      wrt: the argument in which the gradient is taken, or None where none is floating.
      method: of the Linen module; `__call__` by default.
      rename: key of torch's state dict -> key of ours, or None for a buffer that we do not have.
      tolerance: factors of the three of `TOLERANCE`, for a case that is ill-conditioned; say why beside it.
    """

    name: str
    config: Mapping[str, Any]
    network: Callable[[Config, Any], nn.Module]
    inputs: Mapping[str, Any]
    build: Callable[[dict[str, Any]], Any]
    call: Callable[[Any, dict[str, Any]], Any]
    wrt: str | None = "x"
    method: str | None = None
    rename: Callable[[str], str | None] = keep
    tolerance: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Full:
    """A network of the released size: config.json, (config, dtype) -> Linen module, its inputs' shapes, config -> torch module."""

    name: str
    config: Mapping[str, Any]
    network: Callable[[Config, Any], nn.Module]
    inputs: Mapping[str, Any]
    build: Callable[[dict[str, Any]], Any]
    rename: Callable[[str], str | None] = keep


@dataclasses.dataclass(frozen=True)
class Results:
    """Outputs, the gradient of their summed squares in the input, and in each parameter in the file's layout."""

    outputs: tuple[np.ndarray, ...]
    gradient: np.ndarray
    gradients: dict[str, np.ndarray]


def spec(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """Return an input's shape, for `Full`."""
    return jax.ShapeDtypeStruct(shape, dtype)


def normal(seed: int, *shape: int) -> np.ndarray:
    """Return an input: standard normal, float32."""
    return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def tiny_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return random weights that depend on key and shape alone: 0.3/sqrt(fan in), and about 1 for norms; float32."""
    out = {}
    for key, shape in shapes.items():
        draw = np.random.RandomState(zlib.crc32(key.encode())).randn(*shape)
        fan = math.prod(shape[1:]) if len(shape) > 1 else 1
        norm = len(shape) == 1 and "norm" in key and key.endswith("weight")
        out[key] = np.asarray(draw * 0.3 / math.sqrt(fan) + norm, np.float32)
    return out


def structure(net: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Return a network's parameters as shapes, without making them."""
    return jax.eval_shape(lambda inputs: net.init(jax.random.key(0), **inputs), dict(inputs))["params"]


def shapes_of(params: Any) -> dict[str, tuple[int, ...]]:
    """Return key -> shape in the file's layout, of a tree of shapes."""
    out = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        shape = leaf.shape
        if path[-1].key == "kernel":
            shape = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
        out[weights.key(path)] = shape
    return out


def parameters(like: Any, dtype: Any = np.float32) -> Any:
    """Return the tiny weights as Linen parameters."""
    state = tiny_weights(shapes_of(like))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(weights.from_file(path[-1].key, state[weights.key(path)], leaf.shape), dtype),
        like,
    )


def ours(case: Case, bits: int = 32, config: Mapping[str, Any] | None = None) -> Results:
    """Run our network forwards and backwards."""
    dtype = np.dtype(f"float{bits}")
    with _x64(bits == 64):
        net = case.network(Config(case.config if config is None else config), None)
        inputs = jax.tree.map(lambda a: _cast(a, dtype), dict(case.inputs))
        params = parameters(structure(net, inputs), dtype)

        def loss(params, wrt):
            values = inputs if case.wrt is None else {**inputs, case.wrt: wrt}
            out = net.apply({"params": params}, **values, method=case.method)
            return sum((y**2).sum() for y in jax.tree.leaves(out)), tuple(jax.tree.leaves(out))

        wrt = np.zeros(1, dtype) if case.wrt is None else inputs[case.wrt]
        (tree, gradient), outputs = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, wrt)
        gradients = {
            weights.key(path): np.asarray(weights.to_file(path[-1].key, leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        return Results(tuple(map(np.asarray, outputs)), np.asarray(gradient), gradients)


def theirs(case: Case, bits: int = 64) -> tuple[Results, dict[str, Any]]:
    """Run the torch module forwards and backwards; return the configuration that it would write, too."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = case.build(dict(case.config)).eval()
    module = module.double() if bits == 64 else module.float()
    named = {key: case.rename(key) for key in module.state_dict()}
    shapes = {
        name: tuple(value.shape) for key, value in module.state_dict().items() if (name := named[key]) is not None
    }
    state = tiny_weights(shapes)
    module.load_state_dict({key: torch.tensor(state[name]) for key, name in named.items() if name}, strict=False)
    dtype = np.dtype(f"float{bits}")
    inputs = jax.tree.map(lambda a: torch.tensor(np.asarray(_cast(a, dtype))), dict(case.inputs))
    if case.wrt is not None:
        inputs[case.wrt].requires_grad_(True)
    out = case.call(module, inputs)
    outputs = tuple(out) if isinstance(out, (tuple, list)) else (out,)
    torch.stack([(y**2).sum() for y in outputs]).sum().backward()
    known = {name: p.grad for key, p in module.named_parameters() if (name := named.get(key)) is not None}
    gradients = {
        name: np.zeros(shape) if known.get(name) is None else known[name].numpy() for name, shape in shapes.items()
    }
    gradient = np.zeros(1) if case.wrt is None else inputs[case.wrt].grad.numpy()
    return Results(tuple(y.detach().numpy() for y in outputs), gradient, gradients), written_config(module)


def written_config(module: Any) -> dict[str, Any]:
    """Return the config.json that a torch module would write."""
    config = module.config
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return json.loads(json.dumps(values, default=str))


def digest(results: Results) -> dict[str, np.ndarray]:
    """Return what a golden file holds: outputs and the input's gradient whole, two numbers a parameter, the largest gradient."""
    rows = []
    for key in sorted(results.gradients):
        g = results.gradients[key].astype(np.float64).ravel()
        signs = np.random.RandomState(zlib.crc32(key.encode())).choice((-1.0, 1.0), g.size)
        rows.append((g @ signs / math.sqrt(g.size), math.sqrt(g @ g / g.size)))
    return {
        **{f"output{i}": y.astype(np.float32) for i, y in enumerate(results.outputs)},
        "gradient": results.gradient.astype(np.float32),
        "gradients": np.asarray(rows),
        "largest": np.asarray(max(abs(g).max() for g in results.gradients.values())),
        "keys": np.asarray(zlib.crc32("\n".join(sorted(results.gradients)).encode())),
    }


def differences(mine: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the largest differences of digests: of outputs, the input's gradient and parameters' gradients, each of the largest."""
    assert set(mine) == set(wanted) and mine["keys"] == wanted["keys"]
    names = [name for name in wanted if name.startswith("output")]
    return {
        "output": max(_relative(mine[name], wanted[name]) for name in names),
        "input gradient": _relative(mine["gradient"], wanted["gradient"]),
        "parameter gradients": float(abs(mine["gradients"] - wanted["gradients"]).max() / wanted["largest"]),
    }


def whole_differences(mine: Results, wanted: Results) -> dict[str, float]:
    """Return the largest differences of results, as `differences` does, with every gradient whole."""
    assert set(mine.gradients) == set(wanted.gradients), set(mine.gradients) ^ set(wanted.gradients)
    largest = max(abs(g).max() for g in wanted.gradients.values())
    return {
        "output": max(_relative(a, b) for a, b in zip(mine.outputs, wanted.outputs, strict=True)),
        "input gradient": _relative(mine.gradient, wanted.gradient),
        "parameter gradients": float(
            max(abs(mine.gradients[key] - g).max() for key, g in wanted.gradients.items()) / largest
        ),
    }


def against_golden(case: Case) -> dict[str, float]:
    """Compare with the golden file."""
    with np.load(GOLDEN / f"{case.name}.npz") as file:
        found = differences(digest(ours(case)), dict(file))
    return _within(case, found, 32)


def against_torch(case: Case, bits: int = 32) -> dict[str, float]:
    """Compare with torch in float64, our side in float32 or float64, under the configuration that torch's side writes."""
    wanted, config = theirs(case)
    return _within(case, whole_differences(ours(case, bits, config), wanted), bits)


def against_keys(full: Full) -> int:
    """Compare every key and shape with the list; return the number of parameters."""
    found = shapes_of(structure(full.network(Config(full.config), None), full.inputs))
    wanted = {key: tuple(shape) for key, shape in read_keys(full.name).items()}
    wrong = {key: (found.get(key), wanted.get(key)) for key in found.keys() | wanted.keys()}
    wrong = {key: pair for key, pair in wrong.items() if pair[0] != pair[1]}
    assert not wrong, f"{full.name}: {len(wrong)} keys differ (ours, theirs): {dict(list(wrong.items())[:5])}"
    return sum(math.prod(shape) for shape in found.values())


def in_bfloat16(case: Case, tolerance: float = 0.1) -> float:
    """Compare bfloat16 computation with float32's; return the largest difference of the largest output."""
    like = structure(case.network(Config(case.config), None), case.inputs)
    params = parameters(like)

    def run(dtype, params):
        net = case.network(Config(case.config), dtype)
        return jax.jit(lambda p: net.apply({"params": p}, **dict(case.inputs), method=case.method))(params)

    exact, rounded = run(None, params), run(jnp.bfloat16, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    worst = 0.0
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
        assert b.dtype == jnp.float32 and bool(jnp.isfinite(b).all())
        worst = max(worst, _relative(np.asarray(b), np.asarray(a)))
    assert worst <= tolerance, f"{case.name}: bfloat16 differs by {worst:.1e} of the largest output"
    return worst


def write_golden(case: Case) -> dict[str, np.ndarray]:
    """Write a case's golden file from torch in float64; return what it holds."""
    held = digest(theirs(case)[0])
    GOLDEN.mkdir(exist_ok=True)
    file = GOLDEN / f"{case.name}.npz"
    np.savez_compressed(file, **held)
    assert file.stat().st_size < 200_000, f"{file} has {file.stat().st_size:,} bytes; make the case smaller"
    return held


def write_keys(full: Full) -> dict[str, list[int]]:
    """Write a network's keys and shapes from torch's meta device; return them."""
    import torch

    with torch.device("meta"):
        state = full.build(dict(full.config)).state_dict()
    held = {name: list(value.shape) for key, value in state.items() if (name := full.rename(key)) is not None}
    KEYS.mkdir(exist_ok=True)
    text = json.dumps(held, separators=(",", ":"), sort_keys=True).encode()
    (KEYS / f"{full.name}.json.gz").write_bytes(gzip.compress(text, 9, mtime=0))
    return held


def read_keys(name: str) -> dict[str, list[int]]:
    """Read a list of keys and shapes."""
    return json.loads(gzip.decompress((KEYS / f"{name}.json.gz").read_bytes()))


def table(
    cases: list[Case],
    full: list[Full],
    *,
    parameters: Mapping[str, int] | None = None,
    half: list[Case] | None = None,
    recomputed: list[Case] | None = None,
    remat: tuple[str, ...] = ("block",),
    in_float64: Callable[[Case], Case] = lambda case: case,
) -> tuple[Callable[..., None], ...]:
    """Return the five tests of networks, for a module's test_golden, test_torch, test_keys, test_bfloat16 and test_remat.

    Args:
      cases: of all; the first is in the default suite.
      full: networks of released sizes.
      parameters: how many these have, by name.
      half, recomputed: cases in bfloat16 and of recomputation; all by default.
      remat: what is recomputed.
      in_float64: changes a case where it is compared in float64; say why at the function.
    """

    @pytest.mark.first(1)
    @pytest.mark.parametrize("case", **names(cases))
    def golden(case: Case) -> None:
        against_golden(case)

    @pytest.mark.slow
    @pytest.mark.parametrize("bits", [32, 64])
    @pytest.mark.parametrize("case", **names(cases))
    def torch(case: Case, bits: int) -> None:
        for twin in ("torch", "diffusers", "transformers"):
            pytest.importorskip(twin, reason=f"{twin} is for side-by-side tests")
        against_torch(in_float64(case) if bits == 64 else case, bits)

    @pytest.mark.slow
    @pytest.mark.parametrize("network", **names(full))
    def keys(network: Full) -> None:
        count = against_keys(network)
        assert parameters is None or count == parameters[network.name]

    @pytest.mark.slow
    @pytest.mark.parametrize("case", **names(cases if half is None else half))
    def bfloat16(case: Case) -> None:
        in_bfloat16(case)

    @pytest.mark.slow
    @pytest.mark.parametrize("what", remat)
    @pytest.mark.parametrize("case", **names(cases if recomputed is None else recomputed))
    def again(case: Case, what: str) -> None:
        network: Any = case.network
        against_golden(dataclasses.replace(case, network=lambda config, dtype: network(config, dtype, what)))

    return golden, torch, keys, bfloat16, again


def names(cases: Iterable[Case | Full]) -> dict[str, Any]:
    """Return keyword arguments of `pytest.mark.parametrize` that name cases in the report."""
    return {"argvalues": list(cases), "ids": [case.name for case in cases]}


def _within(case: Case, found: dict[str, float], bits: int) -> dict[str, float]:
    factors = zip(("output", "input gradient", "parameter gradients"), TOLERANCE[bits], case.tolerance, strict=True)
    allowed = {name: tolerance * factor for name, tolerance, factor in factors}
    wrong = {name: value for name, value in found.items() if not value <= allowed[name]}
    assert not wrong, f"{case.name}, {bits} bits: {wrong}, allowed {allowed}; all: {found}"
    return found


def _relative(mine: np.ndarray, wanted: np.ndarray) -> float:
    assert mine.shape == wanted.shape, (mine.shape, wanted.shape)
    return float(abs(mine.astype(np.float64) - wanted).max() / max(float(abs(wanted).max()), 1e-30))


def _cast(array: Any, dtype: np.dtype) -> Any:
    array = np.asarray(array)
    return array.astype(dtype) if np.issubdtype(array.dtype, np.floating) else array


def _x64(on: bool) -> Any:
    if not on:
        return contextlib.nullcontext()
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()
