"""For every test: eight simulated devices, quick compilation (tests compile much and compute little), and no program kept too long."""

from __future__ import annotations

import gc
import os
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

_flags = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones refuse it as unknown
    _flags.append("--xla_cpu_use_fusion_emitters=false")  # code is generated twice as fast, by an older emitter
for _flag in _flags:
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()

gc.set_threshold(
    100_000, 50, 1000
)  # traced programs are many objects that live long: a tenth of the time was collecting them

MAPPINGS = 45_000  # of memory by one process; Linux refuses the 65,531st, and XLA ends in a segmentation fault


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test marked `first(n)`, make all cases but the first n slow."""
    seen: Counter[tuple[str, str]] = Counter()
    for item in items:
        if (mark := item.get_closest_marker("first")) is not None:
            case = (str(item.path), item.originalname)
            if seen[case] >= mark.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[case] += 1


def pytest_runtest_teardown(item, nextitem):
    """Between two files: turn off the cache on disk that a run has turned on, and drop compiled programs where they are many."""
    if nextitem is not None and nextitem.path == item.path:
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if jax.config.jax_compilation_cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()
