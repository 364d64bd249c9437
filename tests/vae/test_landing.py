from __future__ import annotations

import attrs
import torch

from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.testing import run_ranks
from vaepp_sdk.vae.landing import land, landing_moves
from vaepp_sdk.vae.plan import EVERYONE, Box, Output, Window, Work, WorkPlan

WORLD = 4
SHAPE = (2, 3, 10, 8)
OUTPUTS: tuple[Output, ...] = ("rank0", "all", "sharded")

# Uneven rectangles that cover 10 x 8 once; rank 1 has two of them, rank 2 none, rank 3 is no VAE rank.
WINDOWS = (
    Window(0, 0, Box(0, 0, 1, 1), Box(0, 0, 7, 5)),
    Window(1, 1, Box(0, 0, 1, 1), Box(0, 5, 7, 3)),
    Window(2, 1, Box(0, 0, 1, 1), Box(7, 0, 3, 8)),
)


def make_plan(output: Output, landed_itemsize: int | None = None) -> WorkPlan:
    work = Work(
        direction="decode",
        shape=(2, 4, 2, 2),
        itemsize=4,
        ranks=3,
        world_size=WORLD,
        output=output,
        landed_itemsize=landed_itemsize,
    )
    plan = WorkPlan(
        strategy="any", work=work, windows=WINDOWS, out_shape=SHAPE, moves=(), peak_bytes=(0, 0, 0)
    )
    sizes = {window.index: plan.piece_bytes(window) for window in WINDOWS}
    return attrs.evolve(plan, moves=landing_moves(WINDOWS, sizes, output, WORLD, 0))


@attrs.define
class Bytes:
    """Finishes pieces as whole numbers of one byte."""

    places: list[tuple[int, int]] = attrs.field(factory=list)
    dtype = torch.uint8

    def __call__(self, values: torch.Tensor, top: int, left: int) -> torch.Tensor:
        self.places.append((top, left))
        return values.to(self.dtype)


def whole() -> torch.Tensor:
    return torch.arange(2 * 3 * 10 * 8, dtype=torch.float32).view(SHAPE)


def landed(rank: int) -> dict[str, object]:
    found: dict[str, object] = {}
    for output in OUTPUTS:
        group = VaeGroup.over(None, 3)
        plan = make_plan(output)
        pieces = {
            window.index: whole()[(..., *window.target.slices)].contiguous() for window in plan.owned(rank)
        }
        result = land(pieces, group, plan, torch.float32, torch.device("cpu"))
        sent = (group.traffic.messages, group.traffic.nbytes)
        found[output] = (result.sample, [(piece.box, piece.tensor) for piece in result.pieces], sent)
    group, plan = VaeGroup.over(None, 3), make_plan("rank0", landed_itemsize=1)
    group.finish = finish = Bytes()
    pieces = {window.index: whole()[(..., *window.target.slices)] / 4 for window in plan.owned(rank)}
    result = land(pieces, group, plan, torch.float32, torch.device("cpu"))
    found["finished"] = (result.sample, finish.places, group.traffic.nbytes, plan.bytes_sent(rank))
    return found


def test_pieces_reach_the_ranks_that_want_them_and_nothing_else_moves() -> None:
    ranks = run_ranks(WORLD, landed)
    piece_bytes = [2 * 3 * window.target.area * 4 for window in WINDOWS]
    for rank, found in enumerate(ranks):
        sample, pieces, sent = found["rank0"]
        assert not pieces
        assert sent == ((1, piece_bytes[1] + piece_bytes[2]) if rank == 1 else (0, 0))
        if rank == 0:
            assert torch.equal(sample, whole())
        else:
            assert sample is None

        sample, pieces, sent = found["all"]
        assert not pieces
        assert torch.equal(sample, whole())
        owned = {0: piece_bytes[0], 1: piece_bytes[1] + piece_bytes[2]}
        assert sent == ((1, owned[rank] * (WORLD - 1)) if rank in owned else (0, 0))

        sample, pieces, sent = found["sharded"]
        assert sample is None
        assert sent == (0, 0)
        assert [box for box, _ in pieces] == [window.target for window in WINDOWS if window.owner == rank]
        for box, tensor in pieces:
            assert torch.equal(tensor, whole()[(..., *box.slices)])

        sample, places, sent, planned = found["finished"]
        assert places == [
            (window.target.top, window.target.left) for window in WINDOWS if window.owner == rank
        ]
        assert sent == planned == (sum(piece_bytes[1:]) // 4 if rank == 1 else 0)
        if rank == 0:
            assert torch.equal(sample, (whole() / 4).to(torch.uint8))


def test_the_plan_counts_what_lands() -> None:
    rank0, everywhere = make_plan("rank0"), make_plan("all")
    outside_rank0 = 2 * 3 * (7 * 3 + 3 * 8) * 4
    assert rank0.bytes_sent() == outside_rank0
    assert [move.dst for move in rank0.moves] == [0]
    # One after the other, as ranks call broadcasts.
    assert [(move.round, move.src, move.dst) for move in everywhere.moves] == [
        (0, 0, EVERYONE),
        (1, 1, EVERYONE),
    ]
    assert everywhere.bytes_sent() == (WORLD - 1) * whole().numel() * 4
    assert make_plan("sharded").moves == ()
