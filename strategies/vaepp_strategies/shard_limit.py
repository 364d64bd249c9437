"""Into how many row blocks a band's layers are cut, so that a limit is kept: pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import attrs

from vaepp_sdk.errors import UnsupportedError
from vaepp_strategies.shard_memory import BandMemory, stage_blocks
from vaepp_strategies.shard_options import UNITS, parse_bytes
from vaepp_strategies.shard_recompute import leaner_sequences, sequence_work
from vaepp_strategies.shard_stages import Sequence, Stage

__all__ = [
    "BlockPlan",
    "Recomputes",
    "RowBlocks",
    "block_counts",
    "plan_blocks",
    "row_blocks_from",
    "shown_bytes",
]

Recomputes = Literal["auto", "never", "always"]


@attrs.frozen(kw_only=True)
class RowBlocks:
    """What the options ask for.

    Attributes:
        count: how many blocks the largest layer is run in; 0 where a limit decides.
        limit: the most live bytes of a rank; 0 without a limit.
        recompute: whether activations are computed again instead of stored: where the limit cannot be kept
            otherwise, never, or wherever it lowers the peak.
    """

    count: int
    limit: int
    recompute: Recomputes = "auto"


@attrs.frozen(kw_only=True)
class BlockPlan:
    """How a band's layers are run in row blocks.

    Attributes:
        sequence: the layers.
        count: how many blocks the largest layer is run in.
        blocks: how many blocks each layer is run in.
        peaks: each active rank's live bytes at its peak.
        extra_work: operations that recomputing adds, as a share of all; a band's neighbouring rows excluded.
    """

    sequence: Sequence
    count: int
    blocks: tuple[int, ...]
    peaks: tuple[int, ...]
    extra_work: float


def row_blocks_from(
    row_blocks: int, peak_limit: str | None, recompute: Recomputes = "auto"
) -> RowBlocks | None:
    """What options that go together ask for; None where nothing is to be run in row blocks."""
    if peak_limit is not None:
        return RowBlocks(count=0, limit=parse_bytes(peak_limit), recompute=recompute)
    return RowBlocks(count=row_blocks, limit=0, recompute=recompute) if row_blocks > 1 else None


def plan_blocks(
    sequence: Sequence, memories: tuple[BandMemory, ...], wanted: RowBlocks, landing: Callable[[int], int]
) -> BlockPlan:
    """Cut a band's layers into row blocks: as many as asked for, or the fewest that keep the limit.

    Args:
        sequence: the layers.
        memories: each active rank's band.
        wanted: the options.
        landing: the bytes alive on a rank while the pieces land.

    Raises:
        UnsupportedError: no number of blocks keeps the limit; names the smallest limit that can be kept.
    """
    most = max(_rows(stage, memory) for memory in memories for stage in sequence.stages)
    candidates = _candidates(sequence, memories, wanted, most)
    if wanted.count:
        return _cut(sequence, candidates[0], memories, wanted.count, landing)
    least = None
    for candidate in candidates:
        for count in block_counts(most):
            found = _cut(sequence, candidate, memories, count, landing)
            if max(found.peaks) <= wanted.limit:
                return found
            least = min(max(found.peaks), least or max(found.peaks))
    work = memories[0].work
    raise UnsupportedError(
        f"strategy 'shard' cannot {work.direction} shape {work.shape} on {len(memories)} ranks within "
        f"peak_limit {shown_bytes(wanted.limit)}: the smallest that can be kept is {shown_bytes(least or 0)}"
    )


def _candidates(
    sequence: Sequence, memories: tuple[BandMemory, ...], wanted: RowBlocks, most: int
) -> list[Sequence]:
    """What the options allow, from the least work to the lowest peak; the first where no limit is given."""
    if wanted.recompute == "never" or (wanted.recompute == "auto" and wanted.count):
        return [sequence]

    def floor(stage: Stage) -> int:
        return max(memory.stage(stage, most) for memory in memories)

    found: list[Sequence] = []
    lowest: int | None = None
    for leaner in leaner_sequences(sequence, floor):
        peak = max(floor(stage) for stage in leaner.stages)
        # Of several stages that hold most, all must change before the peak falls.
        if lowest is None or peak < lowest:
            found, lowest = [*found, leaner], peak
    return found[-1:] if wanted.recompute == "always" else found


def _cut(
    plain: Sequence,
    sequence: Sequence,
    memories: tuple[BandMemory, ...],
    count: int,
    landing: Callable[[int], int],
) -> BlockPlan:
    # As if no more had been asked for than there are rows: plans that do the same are equal.
    most = (max(_rows(stage, memory) for memory in memories) for stage in sequence.stages)
    blocks = tuple(map(min, stage_blocks(sequence.stages, count), most))
    peaks = tuple(max(memory.peak(sequence.stages, blocks), landing(memory.rank)) for memory in memories)
    parts, work = memories[0].parts, memories[0].work
    extra = sequence_work(sequence, parts, work) / sequence_work(plain, parts, work) - 1
    return BlockPlan(sequence=sequence, count=max(blocks), blocks=blocks, peaks=peaks, extra_work=extra)


def _rows(stage: Stage, memory: BandMemory) -> int:
    """The rows of a layer's input or output, whichever are more: more blocks than that change nothing."""
    return max(memory.parts.core_length(memory.rank, scale) for scale in (stage.scale, stage.out_scale))


def block_counts(most: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... up to `most`."""
    power = 1
    while power < most:
        yield power
        if power > 1 and power * 3 // 2 < most:
            yield power * 3 // 2
        power *= 2
    yield most


def shown_bytes(size: int) -> str:
    """A size that `parse_bytes` reads as at least as many bytes."""
    unit = "MiB" if size >= 2**26 else "KiB"
    return f"{-(-size // UNITS[unit])}{unit}"
