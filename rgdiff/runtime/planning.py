"""What a program needs of a device, found by compiling it and not running it: bytes, operations, collectives.

The devices may be ones that this machine does not have: with the extra `[tpu]` libtpu describes a TPU's topology and compiles for it on
any CPU. A program is a jitted function and the shapes of its arguments; nothing here knows what it computes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rgdiff import checks
from rgdiff.shards import on_mesh, shards_of
from rgdiff.tuners._loop import layout_of


class Chip(NamedTuple):
    """A kind of TPU, as its maker has it: memory in GB (2^30 bytes), bfloat16 operations and bytes of memory traffic a second."""

    memory: int
    flops: float
    bandwidth: float


CHIPS = {  # https://cloud.google.com/tpu/docs/system-architecture-tpu-vm
    "v4": Chip(32, 275e12, 1.2e12),
    "v5e": Chip(16, 197e12, 0.82e12),
    "v5p": Chip(95, 459e12, 2.77e12),
    "v6e": Chip(32, 918e12, 1.64e12),
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
GIB = 2**30
FORMAT = "2"  # of what the cache holds


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices that programs are compiled for. Build it with `target`.

    Args:
      name: as it was asked for.
      mesh: of one axis, "data".
      memory: bytes of one device, or None where nobody knows them.
      chip: its kind, with the part of it that one device is; None where it is no TPU.
    """

    name: str
    mesh: Mesh
    memory: int | None = None
    chip: Chip | None = None

    @property
    def devices(self) -> int:
        return self.mesh.size

    @property
    def kind(self) -> str:
        """Of the devices, in a few words."""
        return f"{self.devices} x {self.mesh.devices.flat[0].device_kind}"

    def shapes(self, tree: Any, split: bool = False) -> Any:
        """Return the shapes of arrays on these devices: copies everywhere, or with `split` leading axes over them where they divide.

        Leaves that are no arrays, Python numbers among them, are left as they are.
        """
        whole, rows = (NamedSharding(self.mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

        def shape(leaf: Any) -> Any:
            if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
                return leaf
            even = split and len(leaf.shape) > 0 and leaf.shape[0] % self.devices == 0
            weak = bool(getattr(leaf, "weak_type", False))
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows if even else whole, weak_type=weak)

        return jax.tree.map(shape, tree)


def target(name: str = "here") -> Target:
    """Return the devices of a name: `here`, `cpu`, or a TPU's kind with or without its topology: `v5e`, `v5e:4x4`, `v5p:2x2x4`.

    Args:
      name: `here` are JAX's own devices, `cpu` one CPU; a kind alone is one of its devices.

    Returns:
      The target.

    Raises:
      ValueError: for another name, a topology that the kind does not have, or where libtpu is not installed.

    Example:
      >>> from rgdiff.runtime import planning
      >>> print(planning.target("cpu").devices)
      1
    """
    kind, _, layout = name.partition(":")
    if kind in ("here", "cpu") and not layout:
        devices = jax.devices() if kind == "here" else jax.devices("cpu")[:1]
        return Target(name, _mesh(devices), _memory(devices[0]))
    checks.one_of("target", kind, ("here", "cpu", *CHIPS))
    if layout and not re.fullmatch(r"\d+(x\d+)*", layout):
        raise ValueError(f"target={name}: a topology is chips along each side, e.g. {kind}:4x4 or v5p:2x2x4")
    small = "2x2" if kind in ("v5e", "v6e") else "2x2x1"
    devices = _tpu(f"{kind}:{layout or small}")
    chips = math.prod(map(int, (layout or small).split("x")))
    share = len(devices) / chips  # devices to a chip
    chip = CHIPS[kind]
    chip = Chip(int(chip.memory / share), chip.flops / share, chip.bandwidth / share)
    return Target(name, _mesh(devices if layout else devices[:1]), chip.memory * GIB, chip)


def _mesh(devices: Any) -> Mesh:
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def _memory(device: Any) -> int | None:
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except (AttributeError, RuntimeError):
        return None


def _tpu(name: str) -> list[Any]:
    """The devices of a topology, described by libtpu."""
    try:
        version("libtpu")
    except PackageNotFoundError:
        raise ValueError(
            f"target={name} needs libtpu, which compiles for a TPU without one; install it with pip install 'rgdiff[tpu]'"
        ) from None
    from jax.experimental import topologies

    # libtpu looks for the TPU that it is on: it is on none, there is nobody to ask, and no chip that one process alone may hold.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_MIN_LOG_LEVEL": "3"}
    quiet |= {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for key, value in quiet.items():
        os.environ.setdefault(key, value)
    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except Exception as error:  # noqa: BLE001 - of libtpu, whatever it is
        raise ValueError(f"target={name}: libtpu has no such topology ({' '.join(str(error).split())[:200]})") from None


class Call(NamedTuple):
    """A jitted function and what it is called with.

    Args:
      function: jitted.
      arguments: pytrees of arrays or shapes.
      static: static arguments, by name. `shards` and `layout` among them are those of the target's mesh, which the first argument, a sampler
        or a tuner, then knows as well; the second one's layout is that of argument `state`.
      split: indices of the arguments whose leading axes are spread over devices; the others are on every one.
      state: index of a state that comes back.
    """

    function: Any
    arguments: tuple[Any, ...]
    static: Mapping[str, Any] = {}
    split: frozenset[int] = frozenset()
    state: int = 0

    @property
    def spread(self) -> bool:
        """Whether devices share the work."""
        return bool({"shards", "layout"} & set(self.static))

    def traced(self, target: Target) -> Any:
        """Trace the call on a target's devices."""
        shards = shards_of(target.mesh) if target.devices > 1 and self.spread else None
        first, *others = self.arguments
        given = [on_mesh(first, shards), *others]
        placed = [target.shapes(one, index in self.split) for index, one in enumerate(given)]
        meshes: dict[str, Any] = {"shards": shards} if "shards" in self.static else {}
        if "layout" in self.static:
            meshes["layout"] = layout_of(placed[self.state], shards)
        return self.function.trace(*placed, **{**self.static, **meshes})

    def once(self, lowered: Any) -> float:
        """Return the share of the arguments' bytes that is left where a leaf in several places counts once: it is one buffer.

        Args:
          lowered: the call; arguments that its program does not read are not counted at all.
        """
        leaves = [leaf for one in self.arguments for leaf in jax.tree.leaves(one)]
        compiling = getattr(getattr(lowered, "_lowering", None), "compile_args", {})  # not public: without it all count
        kept = compiling.get("kept_var_idx", range(len(leaves)))
        read = [leaves[index] for index in sorted(kept) if hasattr(leaves[index], "dtype")]
        sizes = {id(leaf): math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in read}
        total = sum(sizes[id(leaf)] for leaf in read)
        return sum(sizes.values()) / total if total else 1.0


@dataclasses.dataclass(frozen=True)
class Figures:
    """What one program needs, of each device unless said.

    Args:
      arguments, outputs, aliased, temporaries, code: bytes; `aliased` are outputs in the buffers of donated arguments. An argument
        that stands in several places (the prior's parameters in a denoiser and in a value) counts once.
      flops: operations of its matrix products and convolutions, every loop as often as it runs, of all devices together.
      counted: operations that the compiler counts, the body of a loop once; and `moved`, bytes, likewise.
      collectives: kind -> [outside of loops, inside].
      seconds: the compiler's own estimate; None where it has none, or a loop, whose body it counts once.
      refused: what the compiler says that does not fit, or None.
    """

    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    code: int = 0
    flops: float = 0.0
    counted: float = 0.0
    moved: float = 0.0
    collectives: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    seconds: float | None = None
    refused: str | None = None

    @property
    def peak(self) -> int:
        """Bytes at once: arguments, outputs that are not in their buffers, temporaries and the program."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    def fits(self, memory: int | None) -> bool | None:
        """Whether it fits a device; None where its memory is not known."""
        if self.refused is not None:
            return False
        return None if memory is None else self.peak <= memory

    def bound(self, target: Target) -> float | None:
        """Return seconds that matrix products alone take at the device's best rate in bfloat16; None where it is not known."""
        return None if target.chip is None else self.flops / target.devices / target.chip.flops


def figures(call: Call, target: Target, cache: Path | None = None) -> Figures:
    """Compile a program for the target and read what it needs; from the cache where it was compiled before.

    Args:
      call: the program.
      target: the devices.
      cache: folder of figures, or None.

    Returns:
      The figures; `refused` of those alone that the compiler says do not fit.
    """
    traced = call.traced(target)
    flops = operations(traced.jaxpr.jaxpr)
    lowered = traced.lower()
    file = None
    if cache is not None:
        told = "\n".join(
            [FORMAT, lowered.as_text(), target.name, target.kind, *_versions(), os.environ.get("XLA_FLAGS", "")]
        )
        file = cache / "plans" / f"{hashlib.sha256(told.encode()).hexdigest()[:24]}.json"
        if (kept := _read(file)) is not None:
            return kept
    found = _compiled(lowered, flops, call.once(lowered))
    if file is not None:
        _write(file, found)
    return found


def _versions() -> list[str]:
    out = []
    for package in ("jax", "jaxlib", "libtpu"):
        try:
            out.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return out


def _read(file: Path) -> Figures | None:
    try:
        return Figures(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write(file: Path, found: Figures) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(dataclasses.asdict(found)), encoding="utf-8")
        os.replace(part, file)
    except OSError:  # it is compiled again next time
        pass


def _compiled(lowered: Any, flops: float, once: float) -> Figures:
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Figures(flops=flops, refused=" ".join(str(error).removeprefix("RESOURCE_EXHAUSTED: ").split())[:200])
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    cost = (cost[0] if isinstance(cost, list) else cost) or {}
    text = compiled.as_text() or ""
    found, loops = collectives(text)
    estimate = cost.get("optimal_seconds")
    return Figures(
        arguments=round(memory.argument_size_in_bytes * once),
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=flops,
        counted=float(cost.get("flops", 0.0)),
        moved=float(cost.get("bytes accessed", 0.0)),
        collectives=found,
        seconds=float(estimate) if estimate is not None and estimate > 0 and not loops else None,
    )


def collectives(text: str) -> tuple[dict[str, list[int]], bool]:
    """Count the collectives in a compiled program's HLO text.

    Args:
      text: of `compiled.as_text()`.

    Returns:
      Kind -> [outside of loops, inside the body of one], and whether there is a loop.

    Example:
      >>> from rgdiff.runtime import planning
      >>> text = '''
      ... %body (p: f32[]) -> f32[] {
      ...   ROOT %r = f32[] all-reduce(%p), to_apply=%add
      ... }
      ... ENTRY %main (p: f32[]) -> f32[] {
      ...   ROOT %w = f32[] while(%p), condition=%more, body=%body
      ... }'''
      >>> planning.collectives(text)
      ({'all-reduce': [0, 1]}, True)
    """
    out: dict[str, list[int]] = {}
    for (kind, looped, _), count in places(text).items():
        out.setdefault(kind, [0, 0])[looped] += count
    return dict(sorted(out.items())), " while(" in text


def places(text: str) -> Counter[tuple[str, bool, bool]]:
    """Count the collectives in a compiled program's HLO text by kind, whether they are in a loop, and whether in a branch.

    Args:
      text: of `compiled.as_text()`.
    """
    own: dict[str, list[str]] = {}
    called: dict[str, set[str]] = {}
    bodies: set[str] = set()
    branches: set[str] = set()
    name, entry = "", ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[2]
            entry = name if head[1] else entry
            own[name], called[name] = [], set()
        elif name and " = " in line:
            instruction = line.partition(" = ")[2].partition("metadata=")[0]
            own[name] += re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", instruction)
            names = re.findall(r"(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.\-]+)", instruction)
            for several in re.findall(r"(?:branch_computations|called_computations|calls)=\{([^}]*)\}", instruction):
                names += [one.strip().lstrip("%") for one in several.split(",")]
            called[name] |= set(names)
            if " while(" in instruction:
                bodies |= set(re.findall(r"(?:body|condition)=%?([\w.\-]+)", instruction))
            if " conditional(" in instruction:
                branches |= set(names)
    looped, branched = _reached(bodies, called), _reached(branches, called)
    out: Counter[tuple[str, bool, bool]] = Counter()
    for name in _reached({entry}, called):
        out.update((kind, name in looped, name in branched) for kind in own.get(name, ()))
    return out


def _reached(names: set[str], called: Mapping[str, set[str]]) -> set[str]:
    out: set[str] = set()
    todo = list(names)
    while todo:
        if (name := todo.pop()) not in out:
            out.add(name)
            todo += called.get(name, ())
    return out


def operations(jaxpr: Any) -> float:
    """Count the operations of a program's matrix products and convolutions, two to a multiplication and addition.

    A scan counts as often as it runs, a `while` whose length is not known once, a `cond` as its dearest branch.

    Args:
      jaxpr: of the program.

    Returns:
      The number, of all devices together.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff.runtime import planning
      >>> power = lambda a: jax.lax.scan(lambda b, _: (a @ b, None), a, None, length=3)[0]
      >>> planning.operations(jax.make_jaxpr(power)(jnp.ones((4, 4))).jaxpr)
      384.0
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, of = equation.primitive.name, equation.params
        if name == "dot_general":
            ((left, _), _) = of["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in left)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[of["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / outputs
        elif name == "cond":
            total += max(operations(branch.jaxpr) for branch in of["branches"])
        else:
            inner = sum(operations(one) for value in of.values() for one in _jaxprs(value))
            total += inner * (of["length"] if name == "scan" else of["mesh"].size if name == "shard_map" else 1)
    return total


def _jaxprs(value: Any) -> list[Any]:
    """The programs among an equation's parameters."""
    if hasattr(value, "eqns"):
        return [value]
    if hasattr(getattr(value, "jaxpr", None), "eqns"):
        return [value.jaxpr]
    return [one for part in value for one in _jaxprs(part)] if isinstance(value, tuple | list) else []


def largest(fits: Callable[[int], bool | None], most: int = 2**20) -> int:
    """Return the largest number in 1 ... `most` that fits, by doubling and bisection; 0 where 1 does not.

    Args:
      fits: number -> whether it fits, which holds below any that does.
      most: where the search ends.

    Example:
      >>> from rgdiff.runtime import planning
      >>> planning.largest(lambda n: n <= 77)
      77
    """
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
