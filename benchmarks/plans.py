"""What the plans say for the real VAE, in a moment and without weights: `python -m benchmarks.plans`.

`work` is the latent area the busiest rank decodes, context included, over the area of the picture: with
perfect scaling it is 1 over the ranks. `peak` is the plan's own estimate in bfloat16.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.cases import full_vae
from vaepp_sdk.entries import load_object
from vaepp_sdk.registry import default_registry
from vaepp_sdk.vae.chooser import StrategyChooser
from vaepp_sdk.vae.plan import Work

STRATEGIES = ("tile", "patch", "shard")
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 1152, 2048, 4096], help="pixels")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments = parser.parse_args()
    print("pixels  strategy  ranks  pieces  work of the busiest  peak, MiB  MiB sent")
    for pixels in arguments.sizes:
        for strategy in STRATEGIES:
            for ranks in arguments.ranks:
                print(line(_adapter(), pixels, strategy, ranks))


def _adapter() -> Any:
    vae = full_vae()
    vae.enable_tiling()
    entry = default_registry().vae(type(vae))
    return load_object(entry.adapter, entry.name)(vae)


def line(adapter: Any, pixels: int, strategy: str, ranks: int) -> str:
    registry = default_registry()
    entry = registry.vae(type(adapter.vae))
    chooser = StrategyChooser(registry, strategy, entry.strategies, entry.pick)
    side = pixels // 8
    work = Work(
        direction="decode",
        shape=(1, 16, side, side),
        itemsize=2,
        ranks=ranks,
        world_size=ranks,
        output="rank0",
    )
    _, plan = chooser.plan(adapter, adapter.facts(), work)
    share = max(plan.cost(rank) for rank in range(ranks)) / side**2
    peak, sent = max(plan.peak_bytes) / MIB, plan.bytes_sent() / MIB
    return (
        f"{pixels:6}  {strategy:8}  {ranks:5}  {len(plan.windows):6}  {share:19.2f}  {peak:9.0f}  {sent:8.1f}"
    )


if __name__ == "__main__":
    main()
