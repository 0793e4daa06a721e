"""The prior of recipes that is a released pair of GDSS networks: `prior=gdss_qm9` and `prior=gdss_zinc`, by path to their file."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rgdiff import checks, correctors
from rgdiff.domains.sequences.files import located, read_bytes
from rgdiff.pretrained import gdss, mood
from rgdiff.recipes.typing import Domain, Obtained, Prior, ReadyPrior, Shape, ValueSource
from rgdiff.rewards import Task
from rgdiff.runtime.run import Run
from rgdiff.typing import Denoiser, Process


@functools.lru_cache(maxsize=4)
def opened(file: str) -> gdss.Gdss:
    """Read a checkpoint once for all parts of a run."""
    return gdss.read(file)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GdssPrior(Prior):
    """GDSS's networks on graphs of molecules, with Langevin corrections as part of a move.

    Args:
      file: .npz of the networks, or a released .pth where PyTorch is installed, see `rgdiff.pretrained.gdss.read`.
      sizes: .npz of the numbers of atoms of the data's molecules, from which those of samples are drawn.
      key: the array's name in that file.
      data_dir: folder of both; the environment variable RGDIFF_DATA when null.
      steps: calls of both networks in a sampling chain, corrections not counted.
      eta: of sampling.
      variance: of its steps, `fixed_large` (the released sampler's) or `fixed_small`.
      corrections: Langevin steps a move, 0 for none; each costs one more call of both networks.
      snr, scale, step_size: of a correction, see `rgdiff.correctors.corrected`.
      buckets: numbers of atoms, increasing, the last one the networks': graphs that fit in a smaller one cost less
        (`rgdiff.graphs.by_size`), and each is compiled for itself; none by default.
    """

    file: str
    sizes: str
    key: str
    data_dir: str | None = None
    steps: int = 100
    eta: float = 1.0
    variance: str = "fixed_large"
    corrections: int = 1
    snr: float = 0.2
    scale: float = 0.9
    step_size: str = "per_sample"
    buckets: Sequence[int] = ()

    def networks(self) -> gdss.Gdss:
        """Read the networks."""
        return opened(str(located(self.file, self.data_dir)))

    def check(self, domain: Any) -> None:
        """Refuse a domain of other graphs, and settings that do not fit."""
        held = self.networks()
        count, features = held.nodes, held.features
        if tuple(domain.shape) != (count, features + count + 1) or not hasattr(domain, "elements"):
            raise ValueError(
                f"the networks in {self.file} are for graphs of {count} nodes with {features} features, and the domain's states "
                f"are {list(domain.shape)}; choose domain=qm9 with prior=gdss_qm9, domain=zinc250k with prior=gdss_zinc"
            )
        checks.at_least("prior.steps", self.steps, 2)
        if list(self.buckets) != sorted({*self.buckets, *([count] if self.buckets else [])}):
            raise ValueError(f"prior.buckets: numbers of atoms that increase to {count}, got {list(self.buckets)}")
        self._corrected(self._plain(self.eta))

    def process(self, shape: Shape, eta: float | None = None) -> Process:
        """Return the process, with the prior's own eta or another."""
        return self._corrected(self._plain(self.eta if eta is None else eta))[0]

    def _plain(self, eta: float) -> Any:
        data = np.load(io.BytesIO(read_bytes(self.sizes, data_dir=self.data_dir)), allow_pickle=False)
        checks.one_of("prior.key", self.key, data.files)
        return self.networks().process(data[self.key], eta=eta, variance=self.variance)

    def _corrected(self, process: Any) -> tuple[Any, Any]:
        """Return the process and the model."""
        held = self.networks()
        model = dataclasses.replace(held.model, widths=tuple(self.buckets))
        if checks.at_least("prior.corrections", self.corrections, 0) == 0:
            return process, model
        law, denoiser = correctors.corrected(
            process,
            model(held.params),
            steps=self.corrections,
            snr=self.snr,
            scale=self.scale,
            step_size=self.step_size,
        )
        return law, correctors.CorrectedModel(model, denoiser)

    def obtain(self, run: Run, domain: Domain, identity: Mapping[str, Any]) -> ReadyPrior:
        """Read the networks."""
        run.say(f"prior: the networks in {self.file}")
        process, model = self._corrected(self._plain(self.eta))
        times = process.times(self.steps)
        params = self.networks().params
        return ReadyPrior(process, times, model, params, self, domain.shape, calls_each=1 + self.corrections)


@dataclasses.dataclass(frozen=True)
class PropertyValue(ValueSource):
    """A property network as the value of noised graphs, which it was trained on: MOOD's guidance, no training."""

    def check(self, prior: Any, shape: Shape, temperature: float) -> None:
        """Refuse a prior of other states than GDSS's."""
        if not isinstance(prior, GdssPrior):
            raise ValueError("value@method.value=property is of graphs; choose prior=gdss_zinc")

    def suits(self, task: Task) -> None:
        """Refuse a reward that is no property network."""
        if not isinstance(task.reward, mood.GraphProperty):
            raise ValueError("value@method.value=property is the reward's own network; choose reward=property_network")

    def obtain(
        self, run: Run, phase: str, prior: ReadyPrior, task: Task, denoiser: Denoiser, temperature: float
    ) -> Obtained:
        """Return the network as a value."""
        reward: Any = task.reward
        return Obtained(mood.GraphValue(reward), {})
