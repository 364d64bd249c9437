"""Into how many row blocks a band's layers are cut, so that a limit is kept: pure arithmetic."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import attrs

from vaepp_sdk.errors import UnsupportedError
from vaepp_strategies.shard_memory import BandMemory, stage_blocks
from vaepp_strategies.shard_stages import Sequence

__all__ = ["BlockPlan", "RowBlocks", "parse_bytes", "plan_blocks", "row_blocks_from"]

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)(KiB|MiB|GiB)")


@attrs.frozen(kw_only=True)
class RowBlocks:
    """What the options ask for.

    Attributes:
        count: how many blocks the largest layer is run in; 0 where a limit decides.
        limit: the most live bytes of a rank; 0 without a limit.
    """

    count: int
    limit: int


@attrs.frozen(kw_only=True)
class BlockPlan:
    """How a band's layers are run in row blocks.

    Attributes:
        sequence: the layers.
        count: how many blocks the largest layer is run in.
        blocks: how many blocks each layer is run in.
        peaks: each active rank's live bytes at its peak.
    """

    sequence: Sequence
    count: int
    blocks: tuple[int, ...]
    peaks: tuple[int, ...]


def parse_bytes(text: str) -> int:
    """The bytes of a size as in `"6GiB"` or `"1.5GiB"`.

    Raises:
        UnsupportedError: it is no number followed by KiB, MiB or GiB, or it is zero.
    """
    match = _SIZE.fullmatch(text)
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not size:
        raise UnsupportedError(
            f"peak_limit is {text!r}; it must be a number with KiB, MiB or GiB, as in '6GiB' or '900MiB'"
        )
    return size


def row_blocks_from(row_blocks: int, peak_limit: str | None) -> RowBlocks | None:
    """What the options ask for; None where nothing is to be run in row blocks.

    Raises:
        UnsupportedError: both options are set, or one of them cannot be.
    """
    if peak_limit is None:
        return RowBlocks(count=row_blocks, limit=0) if row_blocks > 1 else None
    if row_blocks != 1:
        raise UnsupportedError("row_blocks and peak_limit are both set; set one: peak_limit finds row_blocks")
    return RowBlocks(count=0, limit=parse_bytes(peak_limit))


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
    if wanted.count:
        return _cut(sequence, memories, wanted.count, landing)
    least = None
    for count in _counts(max(_rows(sequence, memory) for memory in memories)):
        found = _cut(sequence, memories, count, landing)
        if max(found.peaks) <= wanted.limit:
            return found
        least = min(max(found.peaks), least or max(found.peaks))
    work = memories[0].work
    raise UnsupportedError(
        f"strategy 'shard' cannot {work.direction} shape {work.shape} on {len(memories)} ranks within "
        f"peak_limit {_shown(wanted.limit)}: the smallest that can be kept is {_shown(least or 0)}"
    )


def _cut(
    sequence: Sequence, memories: tuple[BandMemory, ...], count: int, landing: Callable[[int], int]
) -> BlockPlan:
    blocks = stage_blocks(sequence.stages, count)
    peaks = tuple(max(memory.peak(sequence.stages, blocks), landing(memory.rank)) for memory in memories)
    return BlockPlan(sequence=sequence, count=count, blocks=blocks, peaks=peaks)


def _rows(sequence: Sequence, memory: BandMemory) -> int:
    """The most rows of any layer's output: more blocks than that change nothing."""
    scales = {stage.out_scale for stage in sequence.stages}
    return max(memory.parts.core_length(memory.rank, scale) for scale in scales)


def _counts(most: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... up to `most`."""
    power = 1
    while power < most:
        yield power
        if power > 1 and power * 3 // 2 < most:
            yield power * 3 // 2
        power *= 2
    yield most


def _shown(size: int) -> str:
    """A size that `parse_bytes` reads as at least as many bytes."""
    unit = "MiB" if size >= 2**26 else "KiB"
    return f"{-(-size // _UNITS[unit])}{unit}"
