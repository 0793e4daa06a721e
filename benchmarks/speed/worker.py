"""One side of one case in its own process: reads one JSON command a line, answers one JSON object a line.

A process of its own keeps each framework's threads, allocator, CPU time and memory apart from the other's; it sleeps
in a pipe while the other side runs. Started by `benchmarks.speed.harness`, which has set affinity and environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any

from rgdiff.runtime.cpu import keep_memory


def main() -> None:
    out = os.fdopen(os.dup(1), "w")  # what libraries print must not reach the parent's parser
    os.dup2(2, 1)
    options = json.loads(sys.argv[1])
    keep_memory()  # both sides: else what a program frees is mapped anew in its next run
    side: Any = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["do"] == "build":
                side, answer = _build(options)
            else:
                answer = _do(side, command, options)
        except Exception as error:  # noqa: BLE001 - the parent decides what a failed side means
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def _build(options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import numpy as np

    from benchmarks.speed import (
        drakes_rows,
        dxmi_rows,
        gradient_guidance,
        rows,
        seiko_rows,
        sequence_rows,
        surrogate_rows,
        tuner_rows,
    )

    case = rows.Case(**options["case"])
    others = {"tuners": tuner_rows, "drakes": drakes_rows, "svdd-sequences": sequence_rows}
    others |= {"dxmi": dxmi_rows, "gradient-guidance": gradient_guidance, "surrogates": surrogate_rows}
    others["seiko"] = seiko_rows
    sides: Any = others.get(case.row, rows)
    start = time.perf_counter()
    if options["side"] == "ours":
        import jax

        side = sides.Ours(case)
        assert side.program is not None  # compile now: this is the time reported
        about = {"version": f"jax {jax.__version__}", "device": jax.devices()[0].device_kind}
        about |= {"flops": side.flops, "note": side.note}
    else:
        import torch

        with np.load(options["given"]) as given:
            side = sides.Torch(case, dict(given), options["side"] == "compile", options["threads"], options["mode"])
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        about = {"version": f"torch {torch.__version__}", "device": name}
    return side, about | {"seconds": time.perf_counter() - start}


def _do(side: Any, command: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    if command["do"] == "block":
        wall, cpu, inner = time.perf_counter(), time.process_time(), command.get("inner", 1)
        for again in range(inner):
            side.block(command["seed"] * inner + again)
        return {"wall": (time.perf_counter() - wall) / inner, "cpu": (time.process_time() - cpu) / inner}
    if command["do"] == "export":
        np.savez(options["given"], **side.export())
        return {}
    if command["do"] == "check":
        return {"error size": side.check()}
    if command["do"] == "memory":
        return side.memory()
    if command["do"] == "peak":
        return {"flop/s": _peak()}
    raise ValueError(f"unknown command {command['do']!r}")


def _peak(repeats: int = 5) -> float:
    """The best rate of a float32 matrix product on this device and these threads; of 8192 x 8192 on an accelerator, which 2048 do not fill."""
    import jax
    import jax.numpy as jnp

    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size))
    product = jax.jit(lambda a: jnp.dot(a, a, precision="highest"))
    jax.block_until_ready(product(a))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(a))
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


if __name__ == "__main__":
    main()
