"""Recipes: YAML composed by Hydra into one resolved config, checked as a whole, then built by calling constructors.

A config names constructors (`_target_`) and their keyword arguments, nothing else, so unknown names and arguments are
found here, before anything compiles. A recipe may name constructors of rgdiff only; modules of the user's own are
allowed where the user names them on the command line. What is then done with the parts is `rgdiff.cli`'s.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rgdiff.recipes.kinds import of_kind

COMMON = {  # the keys that every recipe has, whether it says so or not
    "out": None, "seed": 0, "samples": None, "data_dir": None, "resume": False, "cache_dir": None, "modules": [],
    "mesh": None, "distributed": "auto", "profile": None,
}  # fmt: skip
MESH = ("data", "fsdp", "tensor", "dcn_data")  # axes of `mesh`, of rgdiff.runtime.mesh.device_mesh
PROFILE = ("skip", "steps")  # of training, of rgdiff.runtime.run.Run
PARTS = ("domain", "prior", "reward", "method", "methods", "rewards")  # the keys that recipes are built from
# last names of keys whose values are taken as they are: paths, and a title; `out` at the top alone: prior.network.out is a number
VERBATIM = (
    "data_dir",
    "cache_dir",
    "source",
    "checkpoint",
    "images",
    "labels",
    "title",
    "folder",
    "file",
    "head",
    "path",
)
CONSTRUCTORS = tuple(  # modules whose public classes and functions a recipe may call; none of them writes files
    f"rgdiff.{name}"
    for name in (
        "schedules",
        "rewards",
        "tuners",
        "nets",
        "domains",
        "recipes.priors",
        "recipes.molecules",
        "recipes.pipelines",
        "recipes.values",
        "recipes.methods",
        "surrogates",
    )
)
GROUPS = ("domain", "method", "prior", "reward", "surrogate", "value")
KEYS = (
    "needs",
    "cost",
    "priors",
    "rewards",
)  # of the lines that a config's first comment may hold: what it needs, costs and fits
COUNTS = {  # numbers of things, wherever they stand in a config, and the least that makes sense; null is the default's
    **dict.fromkeys(("batch", "chunk", "candidates", "particles", "draws", "iterations", "rounds", "seeds"), 1),
    **dict.fromkeys(("rollouts", "value_batch", "moves", "evaluate", "recurrences"), 1),
    **dict.fromkeys(("steps", "value_steps"), 0),
}


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
    text = (config_dir() / (group or "") / f"{name}.yaml").read_text(encoding="utf-8")
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
    from hydra.errors import ConfigCompositionException, HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    folder, name, search = _source(recipe)
    for override in overrides:
        key, _, value = override.partition("=")
        if any("\ud800" <= letter <= "\udfff" for letter in override):  # Python's, for bytes that it cannot decode
            raise ValueError(f"{override!r} has letters that are not of this locale; set PYTHONUTF8=1")
        if "=" not in override and not override.startswith("~"):
            raise ValueError(f"expected key=value, got {override!r}")
        if key.lstrip("+~").split(".")[0] == "hydra":
            raise ValueError(f"unknown key {key!r} in {recipe}; Hydra's own settings are not read")
        group = key.split("@")[0].lstrip("+")
        if group in GROUPS and value not in names(group):
            raise ValueError(
                f"unknown {group} {value!r}{_nearest(value, names(group))}; choose from {', '.join(names(group))}"
            )
    parsed, literal = apart(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):

            def chosen_by(choices: Sequence[str]) -> tuple[Any, dict[str, Any]]:
                base = hydra_compose(name, overrides=[*choices, *search], return_hydra_config=True)
                chosen = dict(base.hydra.runtime.choices)
                with open_dict(base):
                    del base["hydra"]
                return base, chosen

            choices = [o for o in parsed if _is_choice(o)]
            try:
                base, chosen = chosen_by(choices)
                if more := fitting(choices, chosen):
                    choices, parsed, overrides = [*choices, *more], [*parsed, *more], [*overrides, *more]
                    base, chosen = chosen_by(choices)
            except ConfigCompositionException as error:
                told = _unmatched(recipe, choices, chosen_by([])[1]) or f"{recipe}: {_line(error)}"
                raise ValueError(told) from None
            absent = [key for key in (*COMMON, "title") if key not in base]
            absent += [
                f"{key}.{one}" for key, of in (("mesh", MESH), ("profile", PROFILE)) if key in absent for one in of
            ]
            parsed = [f"+{o}" if o.partition("=")[0] in absent else o for o in parsed]
            known = [*_keys(OmegaConf.to_container(base, resolve=False)), *absent]
            for override in overrides:
                key = override.partition("=")[0]
                if not _is_choice(override) and not key.startswith(("+", "~")) and key not in known:
                    raise ValueError(
                        f"unknown key {key!r} in {recipe}{_nearest(key, known)}; `rgdiff show {recipe}` shows them all"
                    )
            config = hydra_compose(name, overrides=[*parsed, *search]) if len(choices) < len(parsed) else base
            for key, value in literal.items():
                OmegaConf.update(config, key.lstrip("+"), value, force_add=key.startswith("+") or key in absent)
            for override in overrides:
                _same_kind(override, base, config)
            if any(o.startswith("+") for o in overrides):
                _all_read(config, [*PARTS, *COMMON, "title", *chosen_by([])[0]], recipe)
            missing = sorted(OmegaConf.missing_keys(config))
            if missing:
                raise ValueError(f"{recipe} needs a value for {missing[0]}; give {missing[0]}=…")
            plain = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{recipe}: {_line(error)}") from None
    finally:
        GlobalHydra.instance().clear()
    assert isinstance(plain, dict)
    for key, default in COMMON.items():
        plain.setdefault(key, default)
    plain = {str(key): _at_home(value) for key, value in plain.items()}
    _fit_replaced(plain, overrides)
    plain["out"] = plain["out"] or f"runs/{name}"
    return plain, {key: chosen.get(key) for key in GROUPS}


def distributed(overrides: Sequence[str]) -> Any:
    """Return the value of `distributed=` among overrides, which is needed before anything else; anything unknown is refused later."""
    given = {"true": True, "false": False}
    values = [
        value.lower() for key, _, value in (override.partition("=") for override in overrides) if key == "distributed"
    ]
    return given.get(values[-1], "auto") if values else "auto"


def header(name: str, group: str | None = None) -> dict[str, str]:
    """Return the lines `# KEY: text` of the comment that a config begins with, by KEY, of those in `KEYS`."""
    lines = (config_dir() / (group or "") / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    told = (line.lstrip("# ").partition(": ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))
    return {key: text for key, mark, text in told if mark and key in KEYS}


def fitting(choices: Sequence[str], chosen: Mapping[str, str | None]) -> list[str]:
    """Return choices of a prior and a reward in place of a recipe's own, where a `domain=` is chosen that these do not fit.

    They are the first that the domain's config names in its lines `# priors:` and `# rewards:`.

    Args:
      choices: of the command line, `group=choice`.
      chosen: the choice of every group.
    """
    given = dict(choice.split("=", 1) for choice in choices)
    if "domain" not in given:
        return []
    told, more = header(given["domain"], "domain"), []
    for group in ("prior", "reward"):
        fits = told.get(f"{group}s", "").split(", ")
        if group not in given and chosen.get(group) and fits[0] and chosen[group] not in fits:
            more.append(f"{group}={fits[0]}")
    return more


def sources(recipe: str, overrides: Sequence[str] = (), group: str | None = None) -> list[tuple[Path, str]]:
    """Return the files that a recipe is composed of, in order, each with the package of its keys ("" is the top).

    Args:
      recipe: its name or file; with `group` a choice of that group.
      overrides: as for `composed`; the choices among them matter.
      group: one of `GROUPS`.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    folder, name, search = _source(recipe) if group is None else (config_dir(), f"{group}/{recipe}", [])
    choices = [override for override in overrides if _is_choice(override)]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            if group is None and any(choice.startswith("domain=") for choice in choices):
                base = hydra_compose(name, overrides=[*choices, *search], return_hydra_config=True)
                choices += fitting(choices, base.hydra.runtime.choices)
            loader = GlobalHydra.instance().config_loader()
            found = loader.compute_defaults_list(name, [*choices, *search], RunMode.RUN).defaults
    finally:
        GlobalHydra.instance().clear()
    files = [(f"{one.config_path}.yaml", one.package or "") for one in found]
    return [
        (next(path for path in (folder / file, config_dir() / file) if path.is_file()), package)
        for file, package in files
        if not file.startswith("hydra/")
    ]


def _source(recipe: str) -> tuple[Path, str, list[str]]:
    """Return the folder and the name of a recipe, and what finds the packaged groups from there."""
    if recipe.endswith((".yaml", ".yml")):
        path = Path(recipe).absolute()
        if not path.is_file():
            raise ValueError(f"no recipe file at {path}")
        return path.parent, path.stem, [f"hydra.searchpath=[file://{config_dir()}]"]
    if recipe not in names():
        raise ValueError(f"unknown recipe {recipe!r}{_nearest(recipe, names())}; `rgdiff list` shows them all")
    return config_dir(), recipe, []


def apart(overrides: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Part overrides into those in Hydra's grammar and values to be taken as they are, by key: paths, and what that grammar refuses."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from yaml import YAMLError, safe_load

    parsed, literal = [], {}
    for override in overrides:
        key, given, value = override.partition("=")
        quoted = value[:1] in ("'", '"') and value[-1:] == value[:1] and len(value) > 1
        if not given or key.startswith("~") or _is_choice(override) or quoted or value == "null":
            parsed.append(override)
        elif key == "out" or key.rpartition(".")[2].lstrip("+") in VERBATIM:
            literal[key] = value
        else:
            try:
                OverridesParser.create().parse_override(override)
                parsed.append(override)
            except HydraException:
                try:
                    literal[key] = safe_load(value) if value[:1] in ("{", "[") else value
                except YAMLError:
                    parsed.append(override)  # Hydra says what is wrong with it
    return parsed, literal


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _unmatched(recipe: str, choices: Sequence[str], own: dict[str, Any]) -> str | None:
    """Say what to give in place of a choice whose group the recipe has elsewhere, or not at all."""
    for choice in choices:
        key, _, value = choice.partition("=")
        group = key.split("@")[0].lstrip("+")
        places = [place for place in own if place.split("@")[0] == group]
        if key.startswith("+") and group in own and "@" not in key:
            beside = f", or +method@methods.{value}={value} to run it beside that one" if group == "method" else ""
            return f"{recipe} has a {group} already, {own[group]}; give {group}={value} in its place{beside}"
        if key.startswith("+") or key in own:
            continue
        if key == "method" and places:
            several = ", ".join(place.rpartition(".")[2] for place in places)
            return (
                f"{recipe} has several methods ({several}); give +method={value} to run it beside them, {places[0]}={value} "
                f"to replace one, or `rgdiff run steer method={value}`"
            )
        instead = f"; give {' or '.join(f'{place}={value}' for place in places)}" if places else ""
        return f"{recipe} has no {key}= of its own{instead}"
    return None


def _same_kind(override: str, before: Any, after: Any) -> None:
    """Refuse a plain value where a part with keys of its own stands; null may take it away."""
    from omegaconf import DictConfig, OmegaConf

    key, _, value = override.partition("=")
    if _is_choice(override) or key.startswith(("+", "~")):
        return
    part, now = (OmegaConf.select(config, key, throw_on_missing=False) for config in (before, after))
    if isinstance(part, DictConfig) and now is not None and not isinstance(now, DictConfig):
        inside = f", e.g. {key}.{next(iter(part))}" if len(part) else ""
        raise ValueError(f"{key} is a part with keys of its own{inside}, got {value}")


def _all_read(config: Any, known: Sequence[str], recipe: str) -> None:
    """Refuse keys that were added at the top where nothing reads them."""
    for key in config:
        if key not in known:
            inside = f"; a {key} belongs to a method, e.g. {key}@method.{key}=…" if key in GROUPS else ""
            raise ValueError(f"nothing reads {key!r} in {recipe}{_nearest(str(key), known)}{inside}")


def _at_home(value: Any) -> Any:
    """Write the home folder out where a string, or the key of a dict, begins with ~/."""
    if isinstance(value, str) and (value == "~" or value.startswith("~/")):
        try:
            return str(Path(value).expanduser())
        except RuntimeError:
            raise ValueError(f"{value}: there is no home folder; write the path out") from None
    if isinstance(value, dict):
        return {_at_home(key): _at_home(inner) for key, inner in value.items()}
    return [_at_home(inner) for inner in value] if isinstance(value, list) else value


def _fit_replaced(config: dict[str, Any], overrides: Sequence[str]) -> None:
    """Drop what a recipe says of a part that the command line has replaced, where the new part does not take it."""
    trusted = trusted_modules(overrides)
    given = [override.partition("=")[0].lstrip("+") for override in overrides]

    def fitting(node: Any, path: str) -> Any:
        if not isinstance(node, dict):
            return node
        accepted = _accepted(node, trusted)
        return {
            key: fitting(value, f"{path}.{key}")
            for key, value in node.items()
            if accepted is None or key in accepted or any(f"{one}.".startswith(f"{path}.{key}.") for one in given)
        }

    for override in overrides:
        key = override.partition("=")[0]
        if (_is_choice(override) and not override.startswith("+")) or key.endswith("._target_"):
            group, _, package = key.removesuffix("._target_").partition("@")
            *parents, last = (package or group).split(".")
            node: Any = config
            for part in parents:
                node = node.get(part, {}) if isinstance(node, dict) else {}
            if isinstance(node, dict) and last in node:
                node[last] = fitting(node[last], package or group)


def _accepted(node: dict[str, Any], trusted: set[str]) -> set[str] | None:
    """The keys that the constructor of a part takes, or None if it takes any or is not known."""
    try:
        taken = inspect.signature(locate(node["_target_"], trusted)).parameters
    except (KeyError, ValueError):
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in taken.values()) else {"_target_", *taken}


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
    """Check every `_target_` below `config` and its arguments against its signature, before anything is built.

    Raises:
      ValueError: for an argument that the constructor does not take, or of another kind than it is annotated with, and for
        numbers of things (`COUNTS`) that are not whole or too small; the line names the key.
    """
    from rgdiff import checks

    if isinstance(config, dict):
        accepted: Any = {}
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
            below = f"{path}.{key}" if path else str(key)
            if _is_function(key, value):
                locate(value, trusted)
            if key in accepted:
                of_kind(below, value, accepted[key])
            if path and key in COUNTS and not isinstance(value, dict | list | None):
                checks.at_least(below, value, COUNTS[key])
            if key == "seed" and checks.at_least(below, value, 0) >= 2**32:
                raise ValueError(f"{below} must be below 2^32, got {value}")
            check(value, trusted, below)
    elif isinstance(config, list):
        for index, value in enumerate(config):
            check(value, trusted, f"{path}[{index}]")


def check_common(config: dict[str, Any], recipe: str) -> None:
    """Refuse, by name, wrong values of the keys that every recipe has, and a recipe that lacks a part."""
    from rgdiff import checks  # imports JAX, which what only reads configs does not need

    for key in ("domain", "prior", "reward"):
        if not isinstance(config.get(key), dict):
            raise ValueError(f"{recipe} has no {key}; give its defaults one, e.g. - {key}: {names(key)[0]}")
    if not config.get("methods") and not config.get("method"):
        raise ValueError(f"{recipe} has no method; give its defaults one, e.g. - method: svdd")
    checks.at_least("samples", config["samples"], 2)  # figures and their errors need two
    kinds = {"resume": "bool", "out": "str | None", "data_dir": "str | None", "cache_dir": "str | None", "title": "str"}
    for key, kind in kinds.items():
        if key in config:
            of_kind(key, config[key], inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=kind))
    checks.one_of("distributed", config["distributed"], ("auto", True, False))
    if (mesh := config["mesh"]) is not None:
        if not isinstance(mesh, dict):
            raise ValueError(f"mesh has axes, e.g. mesh.data=-1, got {mesh!r}")
        for axis, size in mesh.items():
            checks.one_of("an axis of mesh", axis, MESH)
            if size != -1:
                checks.at_least(f"mesh.{axis}", size, 1)
    if (profile := config["profile"]) is not None:
        if not isinstance(profile, dict) or "steps" not in profile:
            raise ValueError(f"profile traces steps of training, e.g. profile.skip=10 profile.steps=5, got {profile!r}")
        for key, value in profile.items():
            checks.one_of("a key of profile", key, PROFILE)
            checks.at_least(f"profile.{key}", value, 0 if key == "skip" else 1)
    for key, own in (config.get("rewards") or {}).items():
        if not isinstance(own, dict) or "_target_" not in own:
            raise ValueError(f"rewards.{key} is no reward; give one with +reward@rewards.{key}=CHOICE")


def methods_of(config: dict[str, Any], chosen: dict[str, str | None]) -> dict[str, Any]:
    """Return the settings of every method by its name: those of `methods`, and the one of `method`, which joins them."""
    methods = dict(config.get("methods") or {})
    if config.get("method"):
        name = chosen["method"] or "method"
        if name in methods:
            raise ValueError(f"there are two methods of the name {name}; give +method@methods.NAME={name}")
        methods[name] = config["method"]
    for name, settings in methods.items():
        if not isinstance(settings, dict) or "_target_" not in settings:
            near = _nearest(name, [other for other in methods if other != name])
            raise ValueError(f"methods.{name} is no method{near}; add one with +method@methods.{name}=CHOICE")
    return methods


def _is_function(key: str, value: Any) -> bool:
    """Whether a config value names a function by its dotted path: keys `fn` and `…_fn`."""
    return isinstance(value, str) and (key == "fn" or key.endswith("_fn"))


def needs(config: dict[str, Any], trusted: set[str]) -> set[str]:
    """Return the arguments that the constructor of a part takes."""
    return set(inspect.signature(locate(config["_target_"], trusted)).parameters)


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
    try:
        return target(**arguments)
    except TypeError as error:  # an argument that is missing, or nothing that it can use
        raise ValueError(f"{config['_target_']}: {_line(error)}") from error
