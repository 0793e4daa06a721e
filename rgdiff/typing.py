"""The vocabulary: the protocols of state, kernel, process, denoiser, value, reward, sampler and tuner.

Axis letters: B examples, T moves, M candidates or particles, K classes, D dimensions. Time is in [0, 1], 0 data and
1 noise. Log-probabilities, KL and entropy are in nats and summed over one example. Everything that carries numbers is
a frozen dataclass registered as a pytree (`pytree`), so that a whole method is one argument of one compiled program
and changing a number in it never recompiles; fields that shape the program are marked `static`.

The target, p_pre the law of the pre-trained model and r the reward:

    p(x) = p_pre(x) exp(r(x)/temperature) / Z,   the maximiser of E[r(x)] - temperature * KL(p || p_pre).

`temperature` (reward's unit per nat) is its number in every sampler and tuner that aims at this law; a smaller one weighs the
reward more. Guides, which add a gradient to the score, have `scale` = 1/temperature (nats per unit of reward) instead.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, dataclass_transform, runtime_checkable

import jax
import jax.typing

Array = jax.Array
Key = jax.Array
Numbers = jax.typing.ArrayLike | Sequence[Any]  # what `jnp.asarray` takes
State = (
    Any  # a pytree of leaves [B, ...]; a discrete leaf is one-hot [B, ..., K], or [B, ..., K + 1] with the mask last
)
Params = Any
Cond = Any
Info = dict[str, Any]

_T = TypeVar("_T")


def static(**options: Any) -> Any:
    """Declare a dataclass field that is part of the program's structure (counts, names, functions)."""
    return dataclasses.field(metadata={"static": True}, **options)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def pytree(cls: type[_T]) -> type[_T]:
    """Make `cls` a frozen dataclass and register it as a pytree; fields declared with `static()` are its structure.

    Not by `jax.tree_util.register_dataclass`: in jaxlib 0.10 two classes so registered have equal structures where their fields
    are alike (`cosine_vp()` and `flow()`), and a compiled program of one is then run for the other, about once in 128 times.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    data = tuple(field.name for field in fields if not field.metadata.get("static"))
    meta = tuple(field.name for field in fields if field.metadata.get("static"))
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in data)

    def flatten(node: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple([getattr(node, name) for name in data]), tuple([getattr(node, name) for name in meta])

    def flatten_with_keys(node: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        children, structure = flatten(node)
        return tuple(zip(keys, children, strict=True)), structure

    def unflatten(structure: tuple[Any, ...], children: Any) -> Any:
        return cls(**dict(zip(meta, structure, strict=True)), **dict(zip(data, children, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


@pytree
class Function:
    """A plain function as a pytree without leaves. Bind it once: another function object compiles another program."""

    function: Callable[..., Any] = static()

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


@dataclasses.dataclass(frozen=True)
class WithoutCond:
    """A function that takes no condition, called with one; equal for equal functions, so that it does not recompile."""

    function: Callable[..., Any]
    count: int  # of its arguments
    ignores: bool = False

    def __call__(self, *args: Any) -> Any:
        if not self.ignores and any(cond is not None for cond in args[self.count :]):
            raise ValueError(
                f"{name_of(self.function)} takes no cond, and got one; write it as a function of (x, t, cond)"
            )
        return self.function(*args[: self.count])


# What a part of a method is called with, by the first words of what it is called in messages.
_ARGUMENTS = {
    "a reward": ("x0", "cond"),
    "a held-out reward": ("x0", "cond"),
    "a function of samples": ("x0", "cond"),
    "an energy": ("x0", "cond"),
    "a denoiser": ("x", "t", "cond"),
    "a network": ("x", "t", "cond"),
    "a value": ("x", "t", "cond"),
    "an exact value": ("x", "t", "cond"),
    "a value network": ("x", "t", "cond"),
    "a guide": ("kernel", "move"),
    "model": ("params",),
    "value": ("params",),
    "critic": ("params",),
    "energy": ("params",),
}


def callable_pytree(function: Any, what: str) -> Any:
    """Return a callable as a pytree: itself if it is one, wrapped if it is a plain function.

    Wrappers of one function are equal as structure (no recompilation), and nothing outlives its last user: a cache of
    them would keep the tracers that a closure made inside a compiled step holds. A function of (x0) or (x, t), where one
    with a condition belongs, is taken as one that has none.

    Args:
      what: the part's name in messages, "a reward" or "model (params -> denoiser)"; it says what the part is called with.

    Raises:
      ValueError: for what is no callable, or cannot be called with these arguments.
    """
    if not callable(function):
        raise ValueError(f"{what} must be callable, got {shown(function)}")
    plain = jax.tree.leaves(function) == [function]
    arguments = _ARGUMENTS.get(what.split(" (")[0], ())
    if arguments and not takes(function, arguments):
        if not (plain and arguments[-1] == "cond" and takes(function, arguments[:-1])):
            raise ValueError(
                f"{what} is called with ({', '.join(arguments)}), and {name_of(function)}{_signature(function)} cannot be; "
                "is it in the right place among the arguments?"
            )
        function = WithoutCond(function, len(arguments) - 1, ignores=arguments[0] == "x0")
    return Function(function) if plain else function


def wrap_field(node: Any, name: str, what: str) -> None:
    """Make a plain function in a field of a pytree a pytree itself, from its `__post_init__`; what JAX puts there is left alone.

    Args:
      node: the pytree, whose field it sets.
      name: of the field.
      what: as in `callable_pytree`.

    Raises:
      ValueError: for a function that cannot be called as it will be.
    """
    value = getattr(node, name)
    if callable(value) and jax.tree_util.all_leaves([value]):
        object.__setattr__(node, name, callable_pytree(value, what))


def takes(function: Callable[..., Any], arguments: tuple[str, ...]) -> bool:
    """Whether a callable takes these positional arguments, with no `t` or `cond` in another one's place; True where Python cannot tell."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return all(name == wanted for name, wanted in zip(signature.parameters, arguments) if name in ("t", "cond"))  # noqa: B905


def name_of(function: Any) -> str:
    """Return a callable's name for messages: a function's own, `lambda`, or the name of its class."""
    while isinstance(function, (Function, WithoutCond, functools.partial)):
        function = function.func if isinstance(function, functools.partial) else function.function
    name = getattr(function, "__name__", None) or type(function).__name__
    return "lambda" if name == "<lambda>" else name


def shown(value: Any, length: int = 60) -> str:
    """Return a value for messages: an array's dtype and shape, a function's name, a method's class, else the beginning of its repr."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"an array of {value.dtype}{list(value.shape)}"
    name = type(value).__name__
    if dataclasses.is_dataclass(value) or hasattr(value, "_fields"):
        return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
    if inspect.isroutine(value):
        return f"the function {name_of(value)}{_signature(value)}"
    text = " ".join(repr(value).split())
    return f"{name} {text if len(text) <= length else text[: length - 1] + '…'}"


def _signature(function: Callable[..., Any]) -> str:
    try:
        parameters = inspect.signature(function).parameters.values()
        return f"({', '.join(p.name if p.default is p.empty else f'{p.name}={p.default!r}' for p in parameters)})"
    except (TypeError, ValueError):
        return ""


def same_callable(a: Any, b: Any) -> bool:
    """Whether two results of `callable_pytree` are one object, or wrap one function."""
    while isinstance(a, (Function, WithoutCond)) and type(a) is type(b):
        a, b = a.function, b.function
    return a is b


@runtime_checkable
class Kernel(Protocol):
    """The law of the next state, a pytree; leading axis B, all quantities in nats per example."""

    def sample(self, key: Key) -> State: ...

    def rsample(self, key: Key) -> State: ...

    def log_prob(self, x: State) -> Array: ...

    def kl(self, other: Any) -> Array: ...

    def entropy(self) -> Array: ...

    def tilt(self, direction: State) -> Kernel: ...


class Denoiser(Protocol):
    """Maps (x_t, t, cond) to E[x0 | x_t] (continuous leaves) or to logits of p(x0 | x_t) (discrete leaves).

    t is one time [] for all examples, as samplers pass it, or one per example [B], as losses do; a denoiser takes both.
    Networks need not: those that come through `rgdiff.denoisers.from_linen`, `from_nnx` or `from_function` see t [B].
    """

    def __call__(self, x: State, t: Array, cond: Cond = None, /) -> State: ...


class Value(Protocol):
    """Maps (x_t, t, cond) to the expected reward to go, [B], in the reward's own unit."""

    def __call__(self, x: State, t: Array, cond: Cond = None, /) -> Array: ...


class Reward(Protocol):
    """Maps (x0, cond) to rewards [B]; pure and batched; NaN marks an infeasible sample."""

    def __call__(self, x0: State, cond: Cond = None, /) -> Array: ...


# What constructors take: the same, or a plain function of these arguments under any names, with or without the condition; they
# check it themselves (`callable_pytree`).
DenoiserLike = Denoiser | Callable[..., Any]
ValueLike = Value | Callable[..., Any]
RewardLike = Reward | Callable[..., Any]


class Model(Protocol):
    """Maps parameters to a denoiser; tuners differentiate it. A function, or a callable pytree."""

    def __call__(self, params: Params, /) -> Denoiser: ...


class Process(Protocol):
    """A noising process: its prior at t = 1, its forward law, its reverse kernels, and the mean of x0.

    `stochastic` is False where reverse steps are points, not laws (eta = 0). `projects` says whether a chain ends at
    a small t > 0 and is projected to data by `mean` (Gaussian), or runs to t = 0 itself (masked).
    """

    @property
    def stochastic(self) -> bool: ...

    @property
    def projects(self) -> bool: ...

    def times(self, steps: int) -> Array: ...

    def prior(self, batch: int) -> Kernel: ...

    def forward(self, x0: State, t: Array) -> Kernel: ...

    def reverse(self, x: State, t: Array, s: Array, prediction: State) -> Kernel: ...

    def mean(self, x: State, t: Array, prediction: State) -> State: ...

    def finalize(self, x: State, t: Array, prediction: State) -> State: ...


class Move(NamedTuple):
    """The move t -> s as a guide sees it: the state x_t, the times, the condition and the denoiser's prediction at x_t."""

    x: State
    t: Array
    s: Array
    cond: Cond
    prediction: State


class Guide(Protocol):
    """Maps (kernel, move) to a kernel: the law of the next state, tilted."""

    def __call__(self, kernel: Kernel, move: Move, /) -> Kernel: ...


class Sampler(Protocol):
    """A sampling method: a pytree with three pure functions, driven by `rgdiff.samplers.sample`.

    init(key, batch, t, cond) -> carry; step(key, carry, t, s, cond) -> (carry, info); final(carry, t, cond) -> (x0, info).
    `final` is the last projection to data: a function, never a draw. `carry` is the state between steps; `info` holds
    figures to report.
    """

    def init(self, key: Key, batch: int, t: Array, cond: Cond = None, /) -> Any: ...

    def step(self, key: Key, carry: Any, t: Array, s: Array, cond: Cond = None, /) -> tuple[Any, Info]: ...

    def final(self, carry: Any, t: Array, cond: Cond = None, /) -> tuple[State, Info]: ...


class Tuner(Protocol):
    """A training method: a pytree with two pure functions, driven by `rgdiff.tuners.fit`."""

    def init(self, params: Params) -> Any: ...

    def step(self, key: Key, state: Any, batch: Any) -> tuple[Any, Info]: ...


class Online(Protocol):
    """A tuner cut where the reward is called, so that the reward may be slow or live on the host, without a callback.

    rollout(key, state, cond) -> experience, a NamedTuple with `x0` and `cond` (the arguments of the reward, B rows)
    and all that `update` needs of the draws; update(key, state, experience, rewards [B]) -> (state, info). Drivers:
    `rgdiff.tuners.as_tuner` and `rgdiff.tuners.fit_online`.
    """

    def init(self, params: Params) -> Any: ...

    def rollout(self, key: Key, state: Any, cond: Cond = None) -> Any: ...

    def update(self, key: Key, state: Any, experience: Any, rewards: Array) -> tuple[Any, Info]: ...
