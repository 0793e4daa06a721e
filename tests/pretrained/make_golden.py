"""Write the golden files and key lists from torch: `python -m tests.pretrained.make_golden [NAME ...]`."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import tests.pretrained as package
from tests.pretrained import parity


def main(wanted: list[str]) -> None:
    """Write the files of the cases named, or of all."""
    for info in pkgutil.iter_modules(package.__path__):
        if not info.name.startswith("test_"):
            continue
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for case in getattr(module, "CASES", ()):
            if isinstance(case, parity.Case) and (not wanted or case.name in wanted):
                held = parity.write_golden(case)
                outputs = [
                    f"{held[name].shape}, largest {abs(held[name]).max():.3g}" for name in held if "output" in name
                ]
                print(f"{case.name}: {'; '.join(outputs)}; {len(held['gradients'])} parameters", flush=True)
        for full in getattr(module, "FULL", ()):
            if not wanted or full.name in wanted:
                print(f"{full.name}: {len(parity.write_keys(full))} keys", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
