"""What a replaced layer knows of the other ranks."""

from __future__ import annotations

import attrs
import torch

from vaepp_sdk.parallel.view import Recv, Send, VaeGroup
from vaepp_strategies.layers.parts import Parts, Scale

__all__ = ["Exchange"]


@attrs.frozen(eq=False)
class Exchange:
    """One rank's place among the active ranks, for the length of one decode or encode.

    Attributes:
        group: the VAE's view of the DiT group.
        parts: how the active ranks split the picture; this rank is one of them.
    """

    group: VaeGroup
    parts: Parts

    @property
    def ranks(self) -> int:
        """How many ranks are active."""
        return len(self.parts.parts)

    def scale(self, local: torch.Tensor) -> Scale:
        """The resolution of a layer, from this rank's part of its input."""
        return self.parts.scale(self.group.rank, local.shape[self.parts.axis])

    def core(self, local: torch.Tensor) -> torch.Tensor:
        """The rows (or columns) of `local` that are this rank's own, as a view."""
        own = self.parts.core(self.group.rank, self.scale(local))
        return local.narrow(self.parts.axis, own.start, own.stop - own.start)

    def core_areas(self, local: torch.Tensor) -> list[int]:
        """Every active rank's own positions, rows times columns, at the resolution of `local`."""
        scale = self.scale(local)
        across = local.shape[-1 if self.parts.axis == -2 else -2]
        return [self.parts.core_length(rank, scale) * across for rank in range(self.ranks)]

    def gather(self, mine: torch.Tensor, lengths: list[int], dim: int, what: str) -> list[torch.Tensor]:
        """Everyone's tensor, in rank order; they differ in size along `dim` only.

        Args:
            mine: this rank's tensor, contiguous.
            lengths: each active rank's size along `dim`.
            dim: the axis in which sizes differ.
            what: names the exchange in errors.

        Raises:
            PeerError: a rank is gone, or did not answer in time.
        """
        found = []
        for rank, length in enumerate(lengths):
            shape = list(mine.shape)
            shape[dim] = length
            found.append(mine if rank == self.group.rank else mine.new_empty(shape))
        peers = [rank for rank in range(self.ranks) if rank != self.group.rank]
        sends = [Send(mine, peer) for peer in peers]
        self.group.exchange(sends, [Recv(found[peer], peer) for peer in peers], what)
        return found
