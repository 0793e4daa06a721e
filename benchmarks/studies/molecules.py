"""SVDD's molecule rows on GDSS's prior of ZINC250k: `python -m benchmarks.studies.molecules --data DIR`.

The prior, best-of-N, SMC, classifier guidance and DPS by a learned property network, SVDD-MC and SVDD-PM on QED or SA of molecules
by RDKit, at equal candidates. Writes benchmarks/results/molecules-REWARD.md. Needs rdkit; DIR holds gdss_zinc250k_v2.npz and gdss_node_counts.npz.

The property network (`nets.GraphNet`) learns E[r(x0) | x_t] from rewarded samples of the prior noised afresh. Classifier guidance
tilts every move by its gradient at x_t, DPS by that of its value at the posterior mean, at time 0; SVDD-MC chooses candidates by it, SVDD-PM
by the reward itself at the posterior mean. The published rows have 1,000 moves and 512 molecules, and a network trained on more samples.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.harness import machine
from benchmarks.studies.cpu_profile import profiled
from rgdiff import correctors, guides, nets, rewards, samplers, tuners, values
from rgdiff.denoisers import from_linen
from rgdiff.domains.molecules import chemistry, molecules, tasks
from rgdiff.pretrained import gdss
from rgdiff.recipes.priors import initial, state_shape
from rgdiff.runtime.cpu import keep_memory
from rgdiff.typing import pytree

RESULTS = Path(__file__).parents[1] / "results"
LEARNT = {"classifier guidance", "DPS", "SVDD-MC"}  # the rows that need the property network
WIDTHS = (23, 28, 38)  # of `graphs.by_size`
CANDIDATES, TEMPERATURE = 10, 0.005
GUIDANCE = 1 / 0.01  # inverse temperature of both guides
PUBLISHED = {  # median and 90 % quantile of 512 molecules, arXiv 2408.08252, table 1
    "qed": {
        "prior": ".656 / .812",
        "best of N": ".835 / .902",
        "DPS": ".679 / .842",
        "SMC": ".667 / .722",
        "SVDD-PM": ".848 / .928",
    },
    "sa": {
        "prior": ".652 / .803",
        "best of N": ".834 / .941",
        "DPS": ".693 / .844",
        "SMC": ".786 / .796",
        "SVDD-PM": ".925 / 1.000",
    },
}
LATE, FEW = 0.45, 10  # of "late" SVDD: the share of the moves, the last ones, that select; its candidates


@pytree
class AtZero:
    """A learned value at time 0 as a differentiable reward of finished graphs."""

    value: Any

    def __call__(self, x0: Any, cond: Any = None) -> Any:
        return self.value(x0, jnp.zeros(x0.shape[0], jnp.float32))


def chain(data: Path, file: str, key: str, widths: tuple[int, ...], scale: float, step_size: str) -> tuple[Any, Any]:
    """Return the process and the denoiser of a released pair of networks with the released sampler's corrections, or `none`."""
    held = gdss.read(data / file)
    model = dataclasses.replace(held.model, widths=widths)
    process = held.process(np.load(data / "gdss_node_counts.npz")[key])
    if step_size == "none":
        return process, model(held.params)
    return correctors.corrected(process, model(held.params), snr=0.2, scale=scale, step_size=step_size)


def validity(options: argparse.Namespace) -> list[str]:
    """Return a table of what share of unguided samples is valid before a correction of valences, by steps of the corrector."""
    kinds = ("batch_mean", "sigma", "per_sample", "none")
    lines = [
        f"| data set | molecules | {' | '.join(kinds)} | published, 1,000 moves |",
        f"|---|---|{'---|' * (len(kinds) + 1)}",
    ]
    sets = {
        "QM9": ("gdss_qm9.npz", "qm9", (), 0.7, 1000, ".957"),
        "ZINC250k": ("gdss_zinc250k_v2.npz", "zinc", WIDTHS, 0.9, 256, ".970"),
    }
    for name, (file, key, widths, scale, count, published) in sets.items():
        for seed in options.seeds:
            shares = []
            for kind in kinds:
                process, denoiser = chain(options.data, file, key, widths, scale, kind)
                plain, times = samplers.ancestral(process, denoiser), process.times(options.steps)
                x0 = np.asarray(samplers.sample(plain, jax.random.key(seed), count, times).x0)
                found = chemistry.molecules(x0, molecules(name.lower()).elements)
                shares.append(f"{np.mean([one.valid for one in found]):.3f}")
            lines.append(f"| {name}, seed {seed} | {count} | {' | '.join(shares)} | {published} |")
    return lines


class Study:
    """The prior, the reward, and what is measured of samples."""

    def __init__(self, options: argparse.Namespace, seed: int):
        self.options = options
        self.process, self.denoiser = chain(
            options.data, "gdss_zinc250k_v2.npz", "zinc", WIDTHS, 0.9, options.step_size
        )
        self.times = self.process.times(options.steps)
        self.domain = molecules("zinc250k")
        self.task = tasks.molecule_property(self.domain, options.reward)
        self.oracle = self.task.reward.function.oracle
        self.key = jax.random.key(seed)

    def draw(self, sampler: Any, count: int, phase: int) -> Any:
        key = jax.random.fold_in(self.key, phase)
        return jax.block_until_ready(samplers.sample(sampler, key, count, self.times))

    def learned(self) -> tuple[Any, np.ndarray]:
        """Return the property network as a value, and how much of the variance of held-out rewards it explains at a few times."""
        options = self.options
        x0 = self.draw(samplers.ancestral(self.process, self.denoiser), options.train, 1).x0
        reward = np.asarray(rewards.score(self.task.reward, x0))
        held = options.train // 8
        network = nets.GraphNet(64)
        model = lambda params: values.learned(from_linen(network, params))  # noqa: E731
        tuner = tuners.value_regression(model, self.process, tuners.adamw(2e-3))
        params = initial(network, self.key, state_shape(self.process))
        data = {"x0": x0[held:], "reward": jnp.asarray(reward[held:])}
        state = tuners.fit(tuner, jax.random.fold_in(self.key, 2), tuner.init(params), options.fit, data=data, batch=64)
        value = model(state.best)
        explained = []
        for t in (0.001, 0.3, 0.6):
            noised = self.process.forward(x0[:held], jnp.float32(t)).sample(jax.random.fold_in(self.key, 3))
            error = np.asarray(value(noised, jnp.full(held, t))) - reward[:held]
            explained.append(1 - np.nanvar(error) / np.nanvar(reward[:held]))
        return value, np.array(explained)

    def telling(self, count: int = 128) -> list[str]:
        """Return a table of what the posterior mean tells of the reward: of the prior's samples, noised to a time, and of their own."""
        plain = samplers.ancestral(self.process, self.denoiser)
        x0 = self.draw(plain, count, 1).x0
        reward = np.asarray(rewards.score(self.task.reward, x0), float)
        value = jax.jit(values.posterior_mean(self.task.reward, self.process, self.denoiser))
        lines = ["| t | correlation | mean value | standard deviation |", "|---|---|---|---|"]
        for t in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1):
            noised = self.process.forward(x0, jnp.float32(t)).sample(jax.random.fold_in(self.key, 3))
            told = np.asarray(value(noised, jnp.full(count, t)), float)
            both = np.isfinite(told) & np.isfinite(reward)
            correlation = np.corrcoef(told[both], reward[both])[0, 1]
            lines.append(f"| {t} | {correlation:.2f} | {told[both].mean():.3f} | {told[both].std():.3f} |")
        return lines

    def cost(self) -> list[str]:
        """Return what a molecule of the prior costs and where the networks' time goes, on one core."""
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        count, rounds = 64, 5
        x, t = self.process.prior(count).sample(self.key), jnp.full(count, 0.3)
        plain = samplers.ancestral(self.process, self.denoiser)
        networks = jax.jit(lambda x: self.denoiser(x, t))

        def seconds(run: Callable[[], Any]) -> float:
            taken = []
            for _ in range(rounds + 1):  # the first compiles
                begun = time.process_time()
                jax.block_until_ready(run())
                taken.append((time.process_time() - begun) / count)
            return float(np.median(taken[1:]))

        call, chain = seconds(lambda: networks(x)), seconds(lambda: self.draw(plain, count, 1))
        shown = list(profiled(networks, x, by_name=True).items())[:14]
        return [
            f"One call of both networks with one correction, {count} graphs: {call * 1e3:.2f} CPU ms a graph. A chain of {self.options.steps} moves",
            f"with corrections: {chain:.3f} CPU s a molecule, {chain / self.options.steps / call:.2f} calls a move.",
            "",
            "| operation | share of the call |",
            "|---|---|",
            *(f"| {name} | {share:.3f} |" for name, share in shown),
        ]

    def methods(self, value: Any) -> dict[str, Callable[[], Any]]:
        """Return name -> a sampler of this many molecules."""
        p, d, r = self.process, self.denoiser, self.task.reward
        plain = samplers.ancestral(p, d)
        dps = values.posterior_mean(AtZero(value), p, d)
        shared = {"temperature": TEMPERATURE, "candidates": CANDIDATES}
        window = (0.0, float(self.times[-1 - round(LATE * self.options.steps)]))
        late = {"temperature": TEMPERATURE, "candidates": FEW, "window": window}

        return {
            "prior": lambda: plain,
            "best of N": lambda: samplers.best_of_n(plain, r, CANDIDATES),
            "SMC": lambda: samplers.smc(p, d, values.posterior_mean(r, p, d), temperature=0.05),
            "classifier guidance": lambda: samplers.ancestral(p, d, guide=guides.gradient_guide(value, GUIDANCE)),
            "DPS": lambda: samplers.ancestral(p, d, guide=guides.gradient_guide(dps, GUIDANCE)),
            "SVDD-MC": lambda: samplers.svdd(p, d, value, **shared),
            "SVDD-PM": lambda: samplers.svdd(p, d, values.posterior_mean(r, p, d), **shared),
            "SVDD-PM, late": lambda: samplers.svdd(p, d, values.posterior_mean(r, p, d), **late),
        }

    def row(self, name: str, sampler: Any, phase: int) -> str:
        self.oracle.close()  # forgets the answers of the row before
        before, cpu = self.oracle.counts(), time.process_time()
        out = self.draw(sampler, self.options.count, phase)
        cpu = time.process_time() - cpu
        after = self.oracle.counts()
        asked, computed = (
            (after.get(kind, 0) - before.get(kind, 0)) / self.options.count for kind in ("asked", "computed")
        )
        x0 = np.asarray(out.x0)
        if name == "SMC":  # particles carry weights
            weights = np.exp(np.asarray(out.info["log_weights"], float))
            chosen = np.random.default_rng(0).choice(len(x0), len(x0), p=weights / weights.sum())
            x0 = x0[chosen]
        reward = np.asarray(rewards.score(self.task.reward, jnp.asarray(x0)), float)
        figures = chemistry.figures(chemistry.molecules(x0, self.domain.elements))
        median, top = np.nanquantile(reward, [0.5, 0.9])
        calls = sampler.network_calls(len(self.times) - 1) * 2  # each with one correction
        published = PUBLISHED.get(self.options.reward, {}).get(name, "")
        shown = [f"{figures[key]:.2f}" for key in ("valid", "unique", "diversity")]
        return (
            f"| {name} | {median:.3f} | {top:.3f} | {published} | {' | '.join(shown)} | {calls} | "
            f"{asked:.0f} | {computed:.0f} | {cpu / self.options.count:.2f} |"
        )


TABLES: dict[str, tuple[str, Callable[[argparse.Namespace], list[str]]]] = {  # in place of the methods' rows
    "telling": (
        "what the posterior mean tells of the reward, by time",
        lambda options: Study(options, options.seeds[0]).telling(),
    ),
    "cost": (
        "what a molecule of the prior costs, and where",
        lambda options: Study(options, options.seeds[0]).cost(),
    ),
    "validity": ("the share of unguided samples that is valid as it comes", validity),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.molecules", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--reward", choices=("qed", "sa"), default="qed")
    parser.add_argument("--steps", type=int, default=100, help="moves of a chain")
    parser.add_argument("--count", type=int, default=64, help="molecules of a row")
    parser.add_argument("--train", type=int, default=512, help="samples that the property network learns from")
    parser.add_argument("--fit", type=int, default=600, help="steps of its training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--step-size", default="sigma", help="of the corrector, see rgdiff.correctors.corrected")
    parser.add_argument("--methods", nargs="*", help="rows, all by default")
    other = parser.add_mutually_exclusive_group()
    for name, (told, _) in TABLES.items():
        other.add_argument(f"--{name}", dest="table", action="store_const", const=name, help=told)
    parser.add_argument("--out", type=Path, help="benchmarks/results/molecules-REWARD.md by default")
    options = parser.parse_args()
    kind = {"telling": f"{options.reward}-telling", None: options.reward}.get(options.table, options.table)
    options.out = options.out or RESULTS / f"molecules-{kind}.md"
    keep_memory()
    begun = time.perf_counter()
    facts = machine() | {
        "command": f"python {shlex.join(['-m', 'benchmarks.studies.molecules', *sys.argv[1:]])}",
        "date": datetime.date.today().isoformat(),
        "jax": f"{jax.__version__} on {jax.devices()[0].device_kind}",
    }
    if options.table:
        told, made = TABLES[options.table]
        title, table = f"# Molecules: {told}", made(options)
        print("\n".join(table))
        options.out.write_text("\n".join([title, "", *(f"- {k}: {v}" for k, v in facts.items()), "", *table, ""]))
        return
    body, explained = [], []
    for seed in options.seeds:
        study = Study(options, seed)
        value = None
        if LEARNT & set(options.methods or LEARNT):
            value, known = study.learned()
            explained.append(known)
        body += [
            *(["", ""] if body else []),
            f"## {options.reward.upper()}, {options.steps} moves, {options.count} molecules, seed {seed}",
            "",
            "| method | median | 90 % quantile | published | valid | unique | diversity | network calls | oracle calls | computed | CPU s |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for phase, (name, build) in enumerate(study.methods(value).items()):
            if not options.methods or name in options.methods:
                body.append(study.row(name, build(), 10 + phase))
                print(body[-1], flush=True)
        write(
            options,
            facts | {"seconds": f"{time.perf_counter() - begun:.0f}, {time.process_time():.0f} of CPU time"},
            explained,
            body,
        )


def write(options: argparse.Namespace, facts: dict[str, str], explained: list[np.ndarray], body: list[str]) -> None:
    """Write the table of the seeds so far."""
    known = ", ".join(f"{share:.2f}" for share in np.mean(explained, 0)) if explained else ""
    learnt = [
        f"The property network learnt from {options.train} rewarded samples ({options.fit} steps) and explains {known}",
        f"of the variance of held-out rewards at t = 0.001, 0.3, 0.6; guides: inverse temperature {GUIDANCE:g}.",
    ]
    note = [
        f"SVDD: {CANDIDATES} candidates, temperature {TEMPERATURE}; late: {FEW} candidates in the last {LATE:.0%} of the moves alone. SMC: one",
        f"problem of all molecules, temperature 0.05. Corrector's step: {options.step_size}. Rewards are of corrected",
        "molecules, valid is the share before correction. Calls and CPU seconds are per molecule, compiling included in the seconds; a call is both",
        "networks on one graph, corrections counted. Oracle calls count every molecule asked about; computed, those alone that were not",
        "known by then: a molecule is computed once a row.",
        *(learnt if explained else []),
    ]
    lines = ["# Molecules: SVDD's rows on GDSS", "", *(f"- {k}: {v}" for k, v in facts.items()), "", *note, "", *body]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines).rstrip() + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
