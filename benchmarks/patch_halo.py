"""What the halo of `patch` buys and costs, on two trained autoencoders and three photos.

    python benchmarks/patch_halo.py [--json PATH] [--vaes ...] [--photos ...] [--halos ...] [--ranks ...]

Errors are shares of the output range against the untiled decode on one rank: the mean, the maximum, and the
maximum in the 16 rows around each seam. `work` is the busiest rank's input area, halo included, over the
whole input's; `peak` is the busiest rank's peak of live tensor bytes over that of the untiled decode.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from vaepp_plugins.vae_kl import KLAdapter
from vaepp_plugins.vae_tiny import TinyAdapter
from vaepp_strategies.patch import Share
from vaepp_strategies.patch_run import PatchStrategy

from vaepp_sdk.errors import VaeppWarning
from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.testing import LiveBytes, run_ranks
from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.plan import Work

# The trained autoencoders are shared with the tests, which are no package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import trained

SHARES: tuple[Share, ...] = ("statistics+kv", "none")


@attrs.frozen(kw_only=True)
class Row:
    """One line of the table."""

    vae: str
    photo: str
    ranks: int
    share: str
    halo: int
    mean: float
    max: float
    seam: float
    mbytes: float
    work: float
    peak: float


def main() -> None:
    arguments = _arguments()
    rows: list[Row] = []
    _print_line(attrs.fields_dict(Row))
    for ranks in arguments.ranks:
        for vae in arguments.vaes:
            job = (vae, arguments.photos, arguments.halos)
            for row in run_ranks(ranks, _measure, *job, timeout=3600.0, collective=600.0)[0]:
                rows.append(row)
                _print_line(attrs.astuple(row))
    if arguments.json:
        arguments.json.write_text(json.dumps([attrs.asdict(row) for row in rows], indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write every row to this file")
    parser.add_argument("--vaes", nargs="+", default=list(trained.VAES), choices=trained.VAES)
    parser.add_argument("--photos", nargs="+", default=list(trained.PHOTOS), choices=trained.PHOTOS)
    parser.add_argument("--halos", nargs="+", type=int, default=[0, 4, 8, 12, 16])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    return parser.parse_args()


def _print_line(values: Any) -> None:
    cells = [f"{value:.2e}" if isinstance(value, float) else str(value) for value in values]
    print("  ".join(cell.rjust(13) for cell in cells), flush=True)


def _measure(rank: int, name: str, photos: Sequence[str], halos: Sequence[int]) -> list[Row]:
    """Every row of one autoencoder, on rank 0; nothing on the others."""
    del rank
    warnings.simplefilter("ignore", VaeppWarning)  # plain halos are measured on purpose
    vae = trained.load(name)
    adapter: VaeAdapter = TinyAdapter(vae) if name == "taef2" else KLAdapter(vae)
    rows = []
    for photo in photos:
        latent = trained.latent(vae, photo)
        with torch.no_grad(), LiveBytes() as live:
            expected = vae.decode(latent).sample
        for share, halo in itertools.product(SHARES, halos):
            row = _one(adapter, latent, expected, live.peak, share, halo)
            rows.append(attrs.evolve(row, vae=name, photo=photo))
    return rows


def _one(
    adapter: VaeAdapter, latent: torch.Tensor, expected: torch.Tensor, whole: int, share: Share, halo: int
) -> Row:
    group = VaeGroup.over(None, torch.distributed.get_world_size())
    strategy = PatchStrategy(halo=halo, share=share)
    work = Work(
        direction="decode",
        shape=tuple(latent.shape),
        itemsize=latent.element_size(),
        ranks=group.size,
        world_size=group.world_size,
        output="all",
    )
    plan = strategy.plan(adapter.facts(), work)
    with LiveBytes() as live:
        landed = strategy.decode(adapter, latent, group, plan)
    assert landed.sample is not None
    peaks = group.all_gather(torch.tensor(live.peak), group.size, "peak bytes")
    axis = plan.parts.axis
    starts = [window.target.top if axis == -2 else window.target.left for window in plan.windows]
    mean, largest, seam = trained.differences(landed.sample, expected, starts[1:], axis)
    return Row(
        vae="",
        photo="",
        ranks=group.size,
        share=share,
        halo=halo,
        mean=mean,
        max=largest,
        seam=seam,
        mbytes=plan.bytes_sent() / 1e6,
        work=max(map(plan.cost, range(group.size))) / (latent.shape[-2] * latent.shape[-1]),
        peak=max(int(peak) for peak in peaks) / whole,
    )


if __name__ == "__main__":
    main()
