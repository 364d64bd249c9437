"""Errors of sharded decodes in low precision against float64, times those of the untiled decode.

`python -m benchmarks.shard_error`: over many inputs, on two ranks, with and without `repeat`; a thin VAE with
random weights on random latents, and the trained one of the tests on crops of photos where `VAEPP_TEST_DATA`
has it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import new_vae
from vaepp_sdk import parallelize_vae
from vaepp_sdk.testing import run_ranks

# The trained autoencoder is shared with the tests, which are no package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from trained import PHOTOS, ROOT, latent, thin_kl

WAYS = ("auto", "never")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--inputs", type=int, default=12)
    parser.add_argument("--side", type=int, default=32, help="of a latent")
    arguments = parser.parse_args()
    names = ["trained", "random"] if ROOT.is_dir() else ["random"]
    print(f"{'weights':>8}  {'repeat':>6}  {'mean error':>10}  {'+-':>6}  {'largest error':>13}")
    for name in names:
        given = (name, arguments.inputs, arguments.side, arguments.dtype)
        found = run_ranks(2, measure, *given, timeout=7200, collective=3600)[0]
        for way in WAYS:
            means, largest = zip(*found[way], strict=True)
            mean, doubt = statistics.mean(means), statistics.stdev(means) / len(means) ** 0.5
            print(f"{name:>8}  {way:>6}  {mean:10.4f}  {doubt:6.4f}  {statistics.mean(largest):13.3f}")


@torch.no_grad()
def measure(rank: int, name: str, inputs: int, side: int, dtype: str) -> dict[str, list[tuple[float, float]]]:
    """Mean and largest error of each way and input, times those of the untiled decode; on rank 0 only."""
    vae, latents = _made(name, inputs, side)
    exact = copy.deepcopy(vae).to(torch.float64) if rank == 0 else None
    vae = vae.to(getattr(torch, dtype))
    # Weights are rounded first: float64 decodes with the same ones.
    if exact is not None:
        exact.load_state_dict(vae.state_dict())
    ways = {way: parallelize_vae(vae, strategy="shard", output="rank0", repeat=way) for way in WAYS}
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for value in (one.to(getattr(torch, dtype)) for one in latents):
        pictures = {way: parallel.decode(value).sample for way, parallel in ways.items()}
        if exact is None:
            continue
        right = exact.decode(value.double()).sample
        base = (vae.decode(value).sample.double() - right).abs()
        for way, picture in pictures.items():
            apart = (picture.double() - right).abs()
            found[way].append((float(apart.mean() / base.mean()), float(apart.max() / base.max())))
    return found


def _made(name: str, inputs: int, side: int) -> tuple[Any, Sequence[torch.Tensor]]:
    """The VAE in float32, and what it decodes: crops of photos and their mirror images, or noise."""
    if name == "random":
        torch.manual_seed(0)
        vae = new_vae("thin").eval()
        noise = torch.Generator().manual_seed(1)
        return vae, [torch.randn(1, 16, side, side, generator=noise) for _ in range(inputs)]
    vae = thin_kl()
    crops = [latent(vae, photo)[..., :side, :side] for photo in PHOTOS]
    turned = [crop.rot90(turns, (-2, -1)) for turns in range(4) for crop in crops]
    return vae, [crop.contiguous() for crop in (*turned, *(crop.flip(-1) for crop in turned))][:inputs]


if __name__ == "__main__":
    main()
