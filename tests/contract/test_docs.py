"""What `help()` shows of public functions: every parameter under Args, no open keywords, and an example that runs (a doctest)."""

import importlib
import inspect
import pkgutil

import rgdiff
from rgdiff._settings import arguments

FLAX = {"parent", "name"}  # that a Linen module's constructor has besides its fields
NAMES_ARE_THE_STATE = {"rgdiff.processes.product"}  # the names of its keywords are the user's: one process each

BUILT_WITH = (  # packages whose public names are constructors: their `help()` shows a call
    "correctors",
    "denoisers",
    "graphs",
    "guides",
    "kernels",
    "nets",
    "oracles",
    "policies",
    "processes",
    "rewards",
    "samplers",
    "schedules",
    "seiko",
    "surrogates",
    "tuners",
    "values",
)
HELPERS = {  # checks, measurements and parts of loops: no user builds anything with them
    "rgdiff.denoisers.needs_signal",
    "rgdiff.denoisers.says_enough",
    "rgdiff.processes.along",
    "rgdiff.rewards.check",
    "rgdiff.rewards.differentiable",
    "rgdiff.rewards.evaluate",
    "rgdiff.rewards.failed",
    "rgdiff.rewards.failures",
    "rgdiff.rewards.host_rewards",
    "rgdiff.values.evaluate",
    "rgdiff.samplers.path_kl",
    "rgdiff.surrogates.append",
    "rgdiff.surrogates.calibration",
    "rgdiff.surrogates.coverage",
    "rgdiff.tuners.ema_update",
    "rgdiff.tuners.gradient_statistics",
    "rgdiff.tuners.langevin_energy",
    "rgdiff.tuners.log_partition",
    "rgdiff.tuners.masked_bound",
    "rgdiff.tuners.update",
}


def _modules():
    for name in rgdiff.__all__:
        module = getattr(rgdiff, name)
        if inspect.ismodule(module) and name not in ("recipes", "runtime", "typing"):
            yield module
    for package in (rgdiff.domains, rgdiff.exact):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if package is rgdiff.exact or found.name.endswith((".data", ".tasks")):
                yield importlib.import_module(found.name)


def _public():
    """Yield name -> object: of `__all__`, or of what a module without one defines."""
    for module in _modules():
        for name in getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]:
            thing = getattr(module, name)
            own = hasattr(module, "__all__") or getattr(thing, "__module__", None) == module.__name__
            if own and callable(thing):
                yield f"{module.__name__}.{name}", thing


PUBLIC = dict(_public())
FUNCTIONS = {name: thing for name, thing in PUBLIC.items() if not inspect.isclass(thing)}
MODULES = {name: thing for name, thing in PUBLIC.items() if name.startswith("rgdiff.nets.") and inspect.isclass(thing)}
KERNELS = {
    name: thing for name, thing in PUBLIC.items() if name.startswith("rgdiff.kernels.") and inspect.isclass(thing)
}
CONSTRUCTORS = {
    name: thing
    for name, thing in (FUNCTIONS | MODULES | KERNELS).items()
    if name.split(".")[1] in BUILT_WITH and name not in HELPERS
}


def test_the_public_functions_are_found():
    assert {"rgdiff.samplers.svdd", "rgdiff.processes.gaussian", "rgdiff.domains.planar.data.planar"} < set(FUNCTIONS)
    assert {"rgdiff.nets.UNet", "rgdiff.kernels.Gaussian", "rgdiff.samplers.tds"} < set(CONSTRUCTORS)
    assert HELPERS | NAMES_ARE_THE_STATE < set(FUNCTIONS)


def test_every_parameter_is_at_the_head_of_an_entry_under_args():
    wrong = {}
    for name in sorted(FUNCTIONS | MODULES | KERNELS):
        thing = PUBLIC[name]
        parameters = set(inspect.signature(thing).parameters) - (FLAX if name in MODULES else set())
        if missing := parameters - {entry.lstrip("*") for entry in arguments(thing.__doc__)}:
            wrong[name] = sorted(missing)
    assert not wrong, f"Args does not say what these are: {wrong}"


def test_no_signature_has_open_keywords():
    """A setting shows its engine's keywords instead: rgdiff._settings.setting_of."""
    open_ = inspect.Parameter.VAR_KEYWORD
    functions = sorted(set(FUNCTIONS) - NAMES_ARE_THE_STATE)
    wrong = [n for n in functions if open_ in {p.kind for p in inspect.signature(FUNCTIONS[n]).parameters.values()}]
    assert not wrong


def test_every_constructor_has_an_example():
    docs = {name: inspect.cleandoc(PUBLIC[name].__doc__ or "") for name in sorted(CONSTRUCTORS)}
    assert not [name for name, doc in docs.items() if "\nExample:\n  >>> " not in doc]
