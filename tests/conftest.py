"""Eight simulated devices for every test, and quick compilation (tests compile much and compute little); nothing else."""

from __future__ import annotations

import os
from importlib.metadata import version

_flags = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones refuse it as unknown
    _flags.append("--xla_cpu_use_fusion_emitters=false")  # code is generated twice as fast, by an older emitter
for _flag in _flags:
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
