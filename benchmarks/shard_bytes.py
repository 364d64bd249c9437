"""Bytes and messages of `shard` and of plain row sharding, in one run: `python -m benchmarks.shard_bytes`.

The VAE of Flux and Z-Image at full width, one decode, on the meta device: what each rank sends is counted as
it is handed over, and so are the operations of its layers. The picture itself is left where it was made.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import full_vae
from benchmarks.report import environment, sent, write
from benchmarks.row_peer import RowPeer
from vaepp_sdk.entries import load_object
from vaepp_sdk.parallel.view import Pending, Recv, Send, VaeGroup
from vaepp_sdk.registry import default_registry
from vaepp_sdk.vae.plan import Work

WAYS = ("row sharding", "shard", "shard, repeat = never")
_COLUMNS = ("pixels", "ranks", "what", "MiB", "busiest", "messages", "busiest", "rounds", "work")


class CountedGroup(VaeGroup):
    """One rank whose peers are not there: messages are counted, rounds too, and nobody waits."""

    rounds = 0

    def post(self, sends: Sequence[Send], recvs: Sequence[Recv], what: str) -> Pending:
        """See `VaeGroup.post`."""
        self.rounds += any(send.tensor.numel() for send in sends) or any(one.tensor.numel() for one in recvs)
        for send in sends:
            if send.tensor.numel():
                self.traffic.add(send.tensor)
        return Pending(self, what, [], [], torch.device("meta"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="pixels")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    adapter = _adapter()
    print("  ".join(f"{name:>9}" if name != "what" else f"{name:22}" for name in _COLUMNS))
    rows = [row for pixels in arguments.sizes for row in measured(adapter, pixels, arguments.ranks)]
    if arguments.json:
        write(arguments.json, {"environment": environment(), "rows": rows})


def measured(adapter: Any, pixels: int, all_ranks: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each way and number of ranks; each is printed as soon as it is there."""
    latent = torch.empty((1, 16, pixels // 8, pixels // 8), dtype=torch.bfloat16, device="meta")
    untiled = operations(lambda: adapter.decode_window(latent))
    rows = []
    for ranks in all_ranks:
        for way in WAYS:
            each = [_one_rank(adapter, latent, way, rank, ranks) for rank in range(ranks)]
            rows.append(_row(pixels, ranks, way, each, untiled))
            print(_line(rows[-1]))
    return rows


def _adapter() -> Any:
    vae = torch.nn.Module.to(full_vae(), torch.bfloat16)
    entry = default_registry().vae(type(vae))
    return load_object(entry.adapter, entry.name)(vae)


def _one_rank(adapter: Any, latent: torch.Tensor, way: str, rank: int, ranks: int) -> dict[str, int]:
    """What one rank sends and computes."""
    if way == "row sharding":
        peer = RowPeer(rank, ranks)
        work = operations(lambda: peer.decode(adapter.vae.decoder, latent))
        return {"bytes": peer.nbytes, "messages": peer.messages, "rounds": peer.rounds, "work": work}
    options = {"repeat": "never"} if "never" in way else {}
    strategy = load_object(default_registry().strategy("shard").factory, "shard")(**options)
    asked = Work(
        direction="decode",
        shape=tuple(latent.shape),
        itemsize=latent.element_size(),
        ranks=ranks,
        world_size=ranks,
        output="sharded",
    )
    plan = strategy.plan(adapter.facts(), asked)
    group = CountedGroup(None, rank, ranks, ranks, timedelta(seconds=1))
    work = operations(lambda: strategy.decode(adapter, latent, group, plan))
    traffic = group.traffic
    return {"bytes": traffic.nbytes, "messages": traffic.messages, "rounds": group.rounds, "work": work}


@torch.no_grad()
def operations(run: Callable[[], Any]) -> int:
    """Floating point operations of convolutions, projections and attention."""
    attention, plain = 0, F.scaled_dot_product_attention

    def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> torch.Tensor:
        nonlocal attention
        assert key.shape == value.shape
        attention += 4 * query.numel() * key.shape[-2]
        return torch.empty_like(query) if query.is_meta else plain(query, key, value, **how)

    with patch.object(F, "scaled_dot_product_attention", fused), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops()) + attention


def _row(pixels: int, ranks: int, way: str, each: Sequence[dict[str, int]], untiled: int) -> dict[str, Any]:
    return {
        "pixels": pixels,
        "ranks": ranks,
        "what": way,
        **sent(each, "bytes"),
        "work": max(one["work"] for one in each) * ranks / untiled,
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['pixels']:9}  {row['ranks']:9}  {row['what']:22}  {row['mib']:9.2f}  "
        f"{row['busiest_mib']:9.2f}  {row['messages']:9}  {row['busiest_messages']:9}  "
        f"{row['rounds']:9}  {row['work']:9.3f}"
    )


if __name__ == "__main__":
    main()
