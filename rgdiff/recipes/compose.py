"""Recipes: YAML composed by Hydra into one resolved config, checked as a whole, then built by calling constructors.

A config names constructors (`_target_`) and their keyword arguments, nothing else, so unknown names and arguments are
found here, before anything compiles. A recipe may name constructors of rgdiff only; modules of the user's own are
allowed where the user names them on the command line. What is then done with the parts is `rgdiff.cli`'s.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

COMMON = {"out": None, "seed": 0, "data_dir": None, "resume": False}  # the keys of every recipe
CONSTRUCTORS = tuple(  # modules whose public classes and functions a recipe may call; none of them writes files
    f"rgdiff.{name}"
    for name in (
        "schedules",
        "rewards",
        "tuners",
        "nets",
        "domains",
        "recipes.priors",
        "recipes.values",
        "recipes.methods",
        "surrogates",
    )
)
GROUPS = ("domain", "method", "prior", "reward", "surrogate", "value")


def config_dir() -> Path:
    """Return the folder of the packaged configs: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "quickstart.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no configs beside {package}; reinstall rgdiff")


def names(group: str | None = None) -> list[str]:
    """Return the recipes, or the choices of a group, in order."""
    folder = config_dir() / (group or "")
    return sorted(path.stem for path in folder.glob("*.yaml") if not path.stem.startswith("_"))


def summary_of(name: str, group: str | None = None) -> str:
    """Return the first comment line of a config: what it is, in a few words."""
    text = (config_dir() / (group or "") / f"{name}.yaml").read_text()
    first = next((line for line in text.splitlines() if line.startswith("#") and "@package" not in line), "")
    return first.lstrip("# ").strip()


def compose(recipe: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the first of what `composed` returns."""
    return composed(recipe, overrides)[0]


def composed(recipe: str, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Compose a recipe and overrides into the resolved config, a dict of plain values, and the choice of each group.

    Args:
      recipe: a name from `names()`, or the path of a YAML file of the same form.
      overrides: `key=value`, `group=choice`, in Hydra's grammar.

    Raises:
      ValueError: for an unknown recipe, group choice or key, with the nearest valid one; for a missing value.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    folder, name = config_dir(), recipe
    if recipe.endswith((".yaml", ".yml")):
        path = Path(recipe).absolute()
        if not path.is_file():
            raise ValueError(f"no recipe file at {path}")
        folder, name = path.parent, path.stem
    elif recipe not in names():
        raise ValueError(f"unknown recipe {recipe!r}{_nearest(recipe, names())}; `rgdiff list` shows them all")
    for override in overrides:
        key, _, value = override.partition("=")
        if "=" not in override and not override.startswith("~"):
            raise ValueError(f"expected key=value, got {override!r}")
        group = key.split("@")[0].lstrip("+")
        if group in GROUPS and value not in names(group):
            raise ValueError(
                f"unknown {group} {value!r}{_nearest(value, names(group))}; choose from {', '.join(names(group))}"
            )
    search = [] if folder == config_dir() else [f"hydra.searchpath=[file://{config_dir()}]"]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            choices = [o for o in overrides if _is_choice(o)]
            base = hydra_compose(name, overrides=choices + search, return_hydra_config=True)
            chosen = dict(base.hydra.runtime.choices)
            with open_dict(base):
                del base["hydra"]
            known = list(_keys(OmegaConf.to_container(base, resolve=False)))
            for override in overrides:
                key = override.partition("=")[0]
                if not _is_choice(override) and not key.startswith(("+", "~")) and key not in known:
                    raise ValueError(
                        f"unknown key {key!r} in {recipe}{_nearest(key, known)}; `rgdiff show {recipe}` shows them all"
                    )
            config = hydra_compose(name, overrides=[*overrides, *search]) if len(choices) < len(overrides) else base
            missing = sorted(OmegaConf.missing_keys(config))
            if missing:
                raise ValueError(f"{recipe} needs a value for {missing[0]}; give {missing[0]}=…")
            plain = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{recipe}: {' '.join(str(error).split())}") from None
    finally:
        GlobalHydra.instance().clear()
    assert isinstance(plain, dict)
    for key, default in COMMON.items():
        plain.setdefault(key, default)
    plain["out"] = plain["out"] or f"runs/{name}"
    return {str(key): value for key, value in plain.items()}, {key: chosen.get(key) for key in GROUPS}


def _is_choice(override: str) -> bool:
    return override.partition("=")[0].split("@")[0].lstrip("+") in GROUPS


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            path = f"{prefix}{key}"
            yield path
            yield from _keys(value, path + ".")


def _nearest(value: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
    if not near:  # a key without its path: temperature for method.temperature
        near = [k for k in known if k.split(".")[-1] == value.split(".")[-1]][:1]
    return f"; did you mean {near[0]!r}?" if near else ""


def trusted_modules(overrides: Sequence[str]) -> set[str]:
    """Return the modules that the user vouches for on the command line: modules=[a,b], and those of dotted fn= and _target_= values."""
    trusted = set()
    for override in overrides:
        key, _, value = override.partition("=")
        last = key.lstrip("+").split(".")[-1]
        if last == "modules":
            trusted |= {name.strip() for name in value.strip("[]").split(",") if name.strip()}
        elif last in ("fn", "heldout_fn", "_target_"):
            trusted.add(value.rpartition(".")[0])
    return trusted - {""}


def locate(path: str, trusted: set[str] = frozenset()) -> Any:  # type: ignore[assignment]
    """Return the class or function at a dotted path, of rgdiff or of a trusted module, and of nothing they import.

    Raises:
      ValueError: for a path that is not trusted, cannot be imported, or does not lead to something callable.
    """
    import importlib

    module_name, _, attribute = path.rpartition(".")
    own = path.split(".")[0] == "rgdiff"
    if own and (not module_name.startswith(CONSTRUCTORS) or attribute.startswith("_")):
        raise ValueError(f"{path} is not a constructor of rgdiff")
    if not own and module_name not in trusted:
        raise ValueError(
            f"{path} is not a constructor of rgdiff; to use a module of yours, name it on the command line: modules=[{module_name}]"
        )
    if not own and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        if own:
            raise ValueError(f"{path} is not a constructor of rgdiff") from None
        raise ValueError(f"cannot import {module_name} (of {path}): {error}") from None
    found = getattr(module, attribute, None)
    if found is None:
        public = [n for n in dir(module) if not n.startswith("_")]
        raise ValueError(f"{module_name} has no {attribute!r}{_nearest(attribute, public)}")
    home = getattr(found, "__module__", "") or ""
    if not callable(found) or (own and home.split(".")[0] != "rgdiff"):
        raise ValueError(f"{path} is not a constructor of rgdiff")
    return found


def check(config: Any, trusted: set[str], path: str = "") -> None:
    """Check every `_target_` below `config` and its arguments against its signature, before anything is built."""
    if isinstance(config, dict):
        if "_target_" in config:
            target = locate(config["_target_"], trusted)
            accepted = inspect.signature(target).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
                for key in config:
                    if key not in accepted and key != "_target_":
                        raise ValueError(
                            f"{path or 'config'}: {config['_target_']} takes no {key!r}{_nearest(key, list(accepted))}"
                        )
        for key, value in config.items():
            if _is_function(key, value):
                locate(value, trusted)
            check(value, trusted, f"{path}.{key}" if path else str(key))
    elif isinstance(config, list):
        for index, value in enumerate(config):
            check(value, trusted, f"{path}[{index}]")


def _is_function(key: str, value: Any) -> bool:
    """Whether a config value names a function by its dotted path: keys `fn` and `…_fn`."""
    return isinstance(value, str) and (key == "fn" or key.endswith("_fn"))


def build(config: Any, trusted: set[str] = frozenset(), **more: Any) -> Any:  # type: ignore[assignment]
    """Call the constructor that `config` names, inner ones first, with its arguments and those of `more` that it takes."""
    if isinstance(config, list):
        return [build(item, trusted) for item in config]
    if not isinstance(config, dict):
        return config
    arguments = {
        key: locate(value, trusted) if _is_function(key, value) else build(value, trusted)
        for key, value in config.items()
        if key != "_target_"
    }
    if "_target_" not in config:
        return arguments
    target = locate(config["_target_"], trusted)
    accepted = inspect.signature(target).parameters
    arguments |= {key: value for key, value in more.items() if key in accepted}
    return target(**arguments)
