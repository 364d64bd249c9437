"""Which of a plan's messages a rank has posted, so that a rank that fails can still play its part.

A rank that runs out of memory leaves its peers in the middle of their exchanges. They cannot be told to stop:
a message that was posted cannot be taken back without breaking the connection. But the plan lists every
message. So the failed rank frees its memory, then sends and receives what is left of its part, with nothing
in it: the peers come to the end of the plan, no message is left over, and the same group can run another one.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

import torch

from vaepp_sdk.parallel.view import Pending, Recv, Send, VaeGroup
from vaepp_sdk.vae.plan import EVERYONE, Move

__all__ = ["Ledger"]


class Ledger:
    """One rank's messages of one plan.

    Args:
        moves: the plan's.
        rank: this rank.

    Attributes:
        exact: whether all messages so far were those of the plan, in its order.
    """

    def __init__(self, moves: Sequence[Move], rank: int) -> None:
        self._rank = rank
        self._left: dict[tuple[int, int], deque[Move]] = {}
        for move in moves:
            if move.nbytes and (rank in (move.src, move.dst) or move.dst == EVERYONE):
                self._left.setdefault((move.src, move.dst), deque()).append(move)
        self._pending: list[Pending] = []
        self.exact = True

    def passed(self, source: int, reader: int, nbytes: int) -> None:
        """Note one message; a broadcast is read by `EVERYONE`."""
        left = self._left.get((source, reader))
        if left and left[0].nbytes == nbytes:
            left.popleft()
        else:
            self.exact = False

    def posted(self, pending: Pending) -> None:
        """Note messages under way."""
        self._pending.append(pending)

    def left(self) -> list[Move]:
        """This rank's messages that it has not posted, in order of rounds."""
        return sorted((move for moves in self._left.values() for move in moves), key=lambda move: move.round)

    def play_out(self, group: VaeGroup, device: torch.device) -> None:
        """Send and receive everything that is left, with nothing in it.

        Raises:
            PeerError: a rank is gone, or did not answer in time.
        """
        for pending in self._pending:
            pending.wait()
        for _, moves in itertools.groupby(self.left(), key=lambda move: move.round):
            self._play(list(moves), group, device)

    def _play(self, moves: Sequence[Move], group: VaeGroup, device: torch.device) -> None:
        def empty(move: Move) -> torch.Tensor:
            return torch.zeros(move.nbytes, dtype=torch.uint8, device=device)

        direct = [move for move in moves if move.dst != EVERYONE]
        sends = [Send(empty(move), move.dst) for move in direct if move.src == self._rank]
        recvs = [Recv(empty(move), move.src) for move in direct if move.dst == self._rank]
        group.exchange(sends, recvs, "the rest of a plan that failed")
        for move in moves:
            if move.dst == EVERYONE:
                group.broadcast(empty(move), move.src, "the rest of a plan that failed")
