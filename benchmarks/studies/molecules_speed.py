"""One SVDD move of GDSS on ZINC250k beside PyTorch: `python -m benchmarks.studies.molecules_speed --data DIR` (torch, rdkit).

16 molecules, 10 candidates, one Langevin correction: every candidate is drawn, corrected and denoised, and the best E[x0] is chosen, so
that a move calls both networks twice on 160 graphs; the choice's own prediction serves the next move. PyTorch does the same on whole
adjacency matrices of 38 nodes, its candidates in one batch, in two ways: with a loop over the channels of a layer, as its released
networks have one, and with all channels in one product. The reward is linear on all sides; the oracle, QED by RDKit on the host, is
measured apart, since it is the same for all. CPU seconds on one core, sides in turn, medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.harness import machine
from benchmarks.studies.pretrained_speed import rounds
from rgdiff import correctors, graphs, oracles, samplers, values
from rgdiff.domains.molecules import chemistry, molecules
from rgdiff.domains.molecules.properties import smiles_property
from rgdiff.pretrained import gdss
from rgdiff.runtime.cpu import keep_memory

RESULTS = Path(__file__).parents[1] / "results"
BATCH, CANDIDATES, STEPS, WHERE = 16, 10, 100, 60  # of 100 moves, number 60 is timed
SNR, SCALE = 0.2, 0.9
WIDTHS = (23, 28, 38)


class Torch:
    """GDSS's networks and a move in PyTorch, from the papers' equations and the state dict, on whole adjacency matrices."""

    def __init__(self, file: Path, ours: Any, t: float, s: float, apart: bool):
        import json

        import torch

        self.torch, self.apart = torch, apart
        with np.load(file) as held:
            config = json.loads(bytes(held["config"]))
            part = lambda key: {n[len(key) :]: torch.tensor(held[n]) for n in held.files if n.startswith(key)}  # noqa: E731
            self.nodes_state, self.edges_state = part("x/"), part("adj/")
        self.nodes_config, self.edges_config = config["params_x"], config["params_adj"]
        self.scales = {
            name: [(float(ours[name].alpha(u)), float(ours[name].sigma(u))) for u in (t, s)]
            for name in ("nodes", "edges")
        }
        if not apart:
            self._stack()

    def mlp(self, p: dict[str, Any], name: str, x: Any) -> Any:
        layers = sum(key.startswith(f"{name}.linears.") and key.endswith(".weight") for key in p)
        functional = self.torch.nn.functional
        for i in range(layers):
            x = functional.linear(
                functional.elu(x) if i else x, p[f"{name}.linears.{i}.weight"], p[f"{name}.linears.{i}.bias"]
            )
        return x

    def normalised(self, a: Any) -> Any:
        eye = self.torch.eye(a.shape[-1])
        a = a * (1 - eye) + eye
        d = a.sum(-1).clamp(min=1) ** -0.5
        return d[..., :, None] * a * d[..., None, :]

    def attended(self, p: dict[str, Any], name: str, x: Any, a: Any, heads: int) -> tuple[Any, Any]:
        """Return the values [..., N, H] and the scores [..., N, N] of channels; weights have the channels' leading axes."""
        y = {}
        for which in "qkv":
            if self.apart:
                weight, bias = p[f"{name}.gnn_{which}.weight"], p[f"{name}.gnn_{which}.bias"]
                y[which] = a @ (x @ weight) + bias
            else:
                weight, bias = p[f"{name}.{which}.weight"], p[f"{name}.{which}.bias"]
                y[which] = a @ self.torch.einsum("bnf,cfh->bcnh", x, weight) + bias[:, None]
        split = lambda z: z.unflatten(-1, (heads, -1)).transpose(-3, -2)  # noqa: E731
        products = split(y["q"]) @ split(y["k"]).transpose(-1, -2) / math.sqrt(y["v"].shape[-1])
        scores = self.torch.tanh(products).mean(-3)
        return y["v"], (scores + scores.transpose(-1, -2)) / 2

    def layer(self, p: dict[str, Any], name: str, x: Any, channels: Any, pair: Any, heads: int) -> tuple[Any, Any]:
        """Map x [B, N, F] and channels [B, C, N, N] to the next ones."""
        torch = self.torch
        a = self.normalised(channels)
        if self.apart:
            found = [self.attended(p, f"{name}.attn.{c}", x, a[:, c], heads) for c in range(a.shape[1])]
            values, scores = torch.cat([v for v, _ in found], -1), torch.stack([s for _, s in found], 1)
        else:
            v, scores = self.attended(p, f"{name}.attn", x, a, heads)
            values = v.transpose(1, 2).flatten(2)
        mixed = self.mlp(p, f"{name}.multi_channel", values) * pair.any(-1)[..., None]
        out = self.mlp(p, f"{name}.mlp", torch.cat([scores, channels], 1).permute(0, 2, 3, 1))
        out = (out + out.transpose(1, 2)) * pair[..., None]
        return torch.tanh(mixed), out.permute(0, 3, 1, 2)

    def _stack(self) -> None:
        """Stack the weights of channels, which are computed at once."""
        for state in (self.nodes_state, self.edges_state):
            for name in [key for key in state if ".attn.0.gnn_" in key]:
                layer, _, rest = name.partition(".attn.0.gnn_")
                count = sum(key.startswith(f"{layer}.attn.") and key.endswith(f"gnn_{rest}") for key in list(state))
                state[f"{layer}.attn.{rest}"] = self.torch.stack(
                    [state[f"{layer}.attn.{c}.gnn_{rest}"] for c in range(count)]
                )

    def networks(self, x: Any, a: Any, mask: Any) -> tuple[Any, Any]:
        """Return the noise of nodes [B, N, F] and the score of edges [B, N, N]."""
        torch = self.torch
        pair = mask[:, :, None] * mask[:, None]
        first = torch.stack([a, a @ a], 1)
        p, config, channels, h, out = self.nodes_state, self.nodes_config, first, x, [x]
        for i in range(config["depth"]):
            h, channels = self.layer(p, f"layers.{i}", h, channels, pair, config["num_heads"])
            h = torch.tanh(h)
            out.append(h)
        nodes = self.mlp(p, "final", torch.cat(out, -1)) * mask[..., None]
        p, config, channels, h, out = self.edges_state, self.edges_config, first, x, [first]
        for i in range(config["num_layers"]):
            h, channels = self.layer(p, f"layers.{i}", h, channels, pair, config["num_heads"])
            out.append(channels)
        edges = self.mlp(p, "final", torch.cat(out, 1).permute(0, 2, 3, 1))[..., 0] * pair
        return nodes, edges * (1 - torch.eye(a.shape[-1]))

    def corrected(self, x: Any, a: Any, mask: Any, noise: tuple[Any, Any], when: int) -> tuple[Any, ...]:
        """Return the state after one Langevin correction, and E[x0] there, at time t (when = 0) or s (1)."""
        (alpha, sigma), (_, spread) = self.scales["nodes"][when], self.scales["edges"][when]
        eps, score = self.networks(x, a, mask)
        out = []
        for state, slope, z in ((x, -eps / sigma, noise[0]), (a, score, noise[1])):
            norm = lambda v: v.flatten(1).norm(dim=1)[:, None, None]  # noqa: E731
            step = 2 * (SNR * norm(z) / norm(slope)) ** 2
            out.append(state + step * slope + SCALE * (2 * step).sqrt() * z)
        eps, score = self.networks(out[0], out[1], mask)
        return *out, (out[0] - sigma * eps) / alpha, out[1] + spread**2 * score

    def noise(self, mask: Any, shape: Any) -> tuple[Any, Any]:
        """Draw standard normal noise on the entries that there are, symmetric for edges."""
        upper = self.torch.randn(shape[1]).triu(1)
        pair = mask[..., :, None] * mask[..., None, :]
        return self.torch.randn(shape[0]) * mask[..., None], (upper + upper.transpose(-1, -2)) * pair

    def move(self, held: tuple[Any, ...], mask: Any, std: dict[str, float]) -> tuple[Any, ...]:
        """Return state and E[x0] of the best of the candidates, from those of the move before."""
        torch = self.torch
        x, a, x0, a0 = held
        many = mask.repeat_interleave(CANDIDATES, 0)
        draws = self.noise(many, ((len(many), *x.shape[1:]), (len(many), *a.shape[1:])))
        states = []
        for name, state, clean, z in (("nodes", x, x0, draws[0]), ("edges", a, a0, draws[1])):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = self.scales[name]
            eps = (state - alpha_t * clean) / sigma_t
            fraction = min(std[name], 1.0)
            mean = alpha_s * clean + sigma_s * math.sqrt(1 - fraction**2) * eps
            states.append(mean.repeat_interleave(CANDIDATES, 0) + sigma_t * std[name] * z)
        x, a = states
        found = self.corrected(x, a, many, self.noise(many, (x.shape, a.shape)), 1)
        reward = found[2][..., 0].sum(-1).reshape(-1, CANDIDATES)
        rows = reward.argmax(1) + torch.arange(len(reward)) * CANDIDATES
        return tuple(part[rows] for part in found)


def main() -> None:
    """Compare the networks, time the moves, and write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.molecules_speed", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="holds gdss_zinc250k_v2.npz and gdss_node_counts.npz")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    keep_memory()
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    file = options.data / "gdss_zinc250k_v2.npz"
    held = gdss.read(file)
    graph = held.process(np.load(options.data / "gdss_node_counts.npz")["zinc"])
    times = graph.times(STEPS)[WHERE : WHERE + 2]
    t, s = map(float, times)

    # ours: the library's own sampler, one move of its chain
    def sampler(widths: tuple[int, ...]) -> Any:
        model = dataclasses.replace(held.model, widths=widths)
        process, denoiser = correctors.corrected(
            graph, model(held.params), snr=SNR, scale=SCALE, step_size="per_sample"
        )
        reward = lambda x0, cond=None: x0[..., 0].sum(-1)  # noqa: E731
        value = values.posterior_mean(reward, process, denoiser)
        return samplers.svdd(process, denoiser, value, candidates=CANDIDATES, selection="argmax")

    key = jax.random.key(0)
    runs: dict[str, Any] = {}
    for name, widths in (("ours", WIDTHS), ("ours, one width", ())):
        one = sampler(widths)
        start = one.init(key, BATCH, times[0])
        roll = jax.jit(lambda key, carry, one=one: samplers.roll(one, key, carry, times)[0])
        runs[name] = lambda roll=roll, start=start: jax.block_until_ready(roll(key, start))

    # theirs: outputs of both networks first, then the same move
    state = jax.tree.map(np.asarray, graph.prior(BATCH).sample(key))
    raw = jax.jit(lambda x: held.model(held.params)._networks(x))(state)
    wanted = raw["nodes"], graphs.matrix(raw["edges"], held.nodes)
    x, a, mask = (
        torch.tensor(np.asarray(part))
        for part in (state["nodes"], graphs.matrix(jnp.asarray(state["edges"]), held.nodes), state["mask"])
    )
    std = {name: float(part._shrink(times[0], times[1])) for name, part in graph.parts.items()}
    errors = {}
    for name, apart in (("PyTorch, a loop over channels", True), ("PyTorch, all channels at once", False)):
        theirs = Torch(file, held.schedules, t, s, apart)
        errors[name] = max(
            float(np.abs(np.asarray(a) - b.numpy()).max() / np.abs(np.asarray(a)).max())
            for a, b in zip(wanted, theirs.networks(x, a, mask), strict=True)
        )
        assert errors[name] < 1e-5, (name, errors)
        first = theirs.corrected(x, a, mask, theirs.noise(mask, (x.shape, a.shape)), 0)
        runs[name] = lambda theirs=theirs, first=first: theirs.move(first, mask, std)
    took = rounds(runs, options.rounds)

    # the oracle: molecules of the candidates' E[x0] and their QED, on one core, and in a pool on all
    x0 = np.asarray(
        samplers.sample(
            samplers.ancestral(*correctors.corrected(graph, held.model(held.params), snr=SNR, scale=SCALE)),
            key, BATCH * CANDIDATES, graph.times(20),
        ).x0
    )  # fmt: skip
    form = molecules("zinc250k").form
    chemistry.measured(
        "qed", form.molecules(x0[:1])[0].smiles or "C"
    )  # imports, and reads what QED knows of structures
    began = time.process_time()
    texts = [one.smiles or "C" for one in form.molecules(x0)]
    decoding = time.process_time() - began
    began = time.process_time()
    for text in texts:
        chemistry.measured("qed", text)
    answering = time.process_time() - began
    os.sched_setaffinity(0, cores)
    pooled = {}
    many = [text for text in texts for _ in range(10)]
    for workers in (1, len(cores)):
        oracle = oracles.oracle(smiles_property("qed", workers=0).function, name="once", workers=workers)
        oracle(["C"])
        began = time.perf_counter()
        oracle([f"{text}.{'C' * (i % 10 + 1)}" for i, text in enumerate(many)])
        pooled[workers] = time.perf_counter() - began
        oracle.close()

    ours = took["ours"]
    facts = machine() | {"command": f"python -m benchmarks.studies.molecules_speed {' '.join(sys.argv[1:])}"}
    facts |= {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "jax": jax.__version__}
    lines = ["# Molecules: one SVDD move of GDSS beside PyTorch", "", *(f"- {k}: {v}" for k, v in facts.items()), ""]
    lines += [
        f"{BATCH} molecules of ZINC250k, {CANDIDATES} candidates, one correction: both networks twice on {BATCH * CANDIDATES} graphs. CPU seconds on one",
        f"core, medians of {options.rounds} rounds in turn; ratios are of each round. Outputs of both networks differ by at most {max(errors.values()):.0e} of the",
        f"largest. Ours computes graphs {', '.join(map(str, WIDTHS))} nodes wide and the upper triangle of what is symmetric.",
        "",
        "| side | CPU s a move | ratio to ours |",
        "|---|---|---|",
    ]
    for name, seconds in took.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, ours, strict=True))
        lines.append(f"| {name} | {statistics.median(seconds):.3f} | {ratio:.2f} |")
    network, host = statistics.median(ours), decoding + answering
    lines += [
        "",
        f"The oracle's part of a move, {len(texts)} graphs: molecules {decoding:.3f} and QED {answering:.3f} CPU s, {host / (host + network):.0%} of ours with it. With it the",
        f"loop over channels takes {(statistics.median(took['PyTorch, a loop over channels']) + host) / (network + host):.2f} times ours.",
        f"{len(many)} texts asked at once: {pooled[1]:.2f} s in one process, {pooled[len(cores)]:.2f} s in {len(cores)} ({pooled[1] / pooled[len(cores)]:.2f} times as fast).",
        "",
    ]
    (RESULTS / "molecules-speed.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
