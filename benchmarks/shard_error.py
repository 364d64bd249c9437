"""Errors of sharded decodes in low precision against float64, times those of the untiled decode.

`python -m benchmarks.shard_error`: over many inputs, on two ranks, with and without `repeat`; a thin VAE with
random weights on random latents, and the trained one of the tests on crops of photos where `VAEPP_TEST_DATA`
has it. `--classes`: decode and encode of the small VAEs of the tests instead, one of each class, on noise.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from benchmarks.cases import new_vae
from vaepp_sdk import parallelize_vae
from vaepp_sdk.testing import run_ranks

# The trained autoencoder is shared with the tests, which are no package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from shard_cases import Case, arguments, prepared, whole
from trained import PHOTOS, ROOT, latent, thin_kl

WAYS = ("auto", "never")
CLASSES = [
    case
    for vae, latents, pixels in (
        ("kl", ((40, 24), None), ((192, 104), None)),
        ("flux2", ((40, 24), None), ((104, 192), None)),
        ("tiny", ((40, 24), None), ((104, 192), None)),
        ("dc", ((40, 24), None), ((64, 104), None)),
        ("hunyuan image", ((40, 24), None), ((64, 104), None)),
        ("wan", ((12, 8), 3), ((64, 104), 5)),
        ("wan 2.2", ((12, 8), 2), ((96, 160), 5)),
        ("qwen", ((12, 8), 3), ((64, 104), 5)),
        ("hunyuan", ((12, 8), 2), ((64, 104), 5)),
        ("hunyuan 1.5", ((8, 6), 2), ((96, 160), 5)),
        ("ltx", ((8, 6), 2), ((160, 256), 9)),
        ("ltx 2", ((8, 6), 2), ((160, 256), 9)),
        ("cogvideox", ((12, 8), 3), ((64, 104), 9)),
        ("mochi", ((12, 8), 2), ((64, 104), 7)),
    )
    for case in (
        Case(latents[0], latents[1], vae=vae),
        Case(pixels[0], pixels[1], vae=vae, direction="encode"),
    )
]
"""One decode and one encode of each class, by rows, columns and frames."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--inputs", type=int, default=12)
    parser.add_argument("--side", type=int, default=32, help="of a latent")
    parser.add_argument("--classes", action="store_true")
    chosen = parser.parse_args()
    if chosen.classes:
        show_classes(chosen.inputs, chosen.dtype)
        return
    names = ["trained", "random"] if ROOT.is_dir() else ["random"]
    print(f"{'weights':>8}  {'repeat':>6}  {'mean error':>10}  {'+-':>6}  {'largest error':>13}")
    for name in names:
        given = (name, chosen.inputs, chosen.side, chosen.dtype)
        found = run_ranks(2, measure, *given, timeout=7200, collective=3600)[0]
        for way in WAYS:
            print(f"{name:>8}  {way:>6}  {_shown(found[way])}")


def show_classes(inputs: int, dtype: str) -> None:
    """Print the errors of one small VAE of each class."""
    print(f"{'VAE':>13}  {'':>6}  {'mean error':>10}  {'+-':>6}  {'largest error':>13}")
    found = run_ranks(2, measure_classes, inputs, dtype, timeout=7200, collective=3600)[0]
    for (name, direction), errors in found.items():
        print(f"{name:>13}  {direction}  {_shown(errors)}")


def _shown(errors: Sequence[tuple[float, float]]) -> str:
    means, largest = zip(*errors, strict=True)
    mean, doubt = statistics.mean(means), statistics.stdev(means) / len(means) ** 0.5
    return f"{mean:10.4f}  {doubt:6.4f}  {statistics.mean(largest):13.3f}"


@torch.no_grad()
def measure_classes(rank: int, inputs: int, dtype: str) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """As `measure`, by VAE and direction."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for case in CLASSES:
        case = attrs.evolve(case, dtype=getattr(torch, dtype))
        vae, like = prepared(case)
        vae.disable_tiling()
        exact = copy.deepcopy(vae)
        nn.Module.to(exact, torch.float64)
        parallel = parallelize_vae(vae, strategy="shard", output="rank0")
        noise = torch.Generator().manual_seed(1)
        errors = found.setdefault((case.vae, case.direction), [])
        for _ in range(inputs):
            value = (like.float() + torch.randn(like.shape, generator=noise)).to(case.dtype)
            picture = whole(getattr(parallel, case.direction)(value, **arguments(case)))
            if rank == 0:
                plain, right = (
                    whole(getattr(one, case.direction)(given, **arguments(case))).double()
                    for one, given in ((vae, value), (exact, value.double()))
                )
                errors.append(_ratios(picture, plain, right))
    return found


def _ratios(picture: torch.Tensor, plain: torch.Tensor, right: torch.Tensor) -> tuple[float, float]:
    """Mean and largest error of a picture, times those of the untiled one."""
    apart, base = (picture.double() - right).abs(), (plain.double() - right).abs()
    return float(apart.mean() / base.mean()), float(apart.max() / base.max())


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
        plain = vae.decode(value).sample
        for way, picture in pictures.items():
            found[way].append(_ratios(picture, plain, right))
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
