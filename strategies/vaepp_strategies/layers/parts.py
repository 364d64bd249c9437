"""Which rows of a picture each rank holds, at any layer's resolution. Pure arithmetic."""

from __future__ import annotations

import attrs

__all__ = ["Part", "Parts", "Scale"]


@attrs.frozen
class Scale:
    """A layer's resolution: `up` rows for every `down` rows of the input; one of the two is 1."""

    up: int
    down: int

    @classmethod
    def between(cls, whole: int, rows: int) -> Scale:
        """That of a layer with so many rows for an input with `whole` rows."""
        return cls(rows // whole, 1) if rows >= whole else cls(1, whole // rows)


@attrs.frozen
class Part:
    """What one rank holds along the split axis, in input units.

    Attributes:
        start: the first row held, context included.
        length: rows held.
        core_start: the first row that is this rank's own.
        core_length: its own rows; the cores of all ranks cover the axis once.
    """

    start: int
    length: int
    core_start: int
    core_length: int


@attrs.frozen
class Parts:
    """How the active ranks, the first `len(parts)` of the DiT group, split one axis.

    Where a layer works at a lower resolution than the input, parts must start, and cores must end, at
    multiples of that layer's factor; only the last part may end elsewhere, at the picture's own end.

    Attributes:
        axis: the split axis, -2 (rows) or -1 (columns).
        parts: each active rank's part, in rank order, which is also their order along the axis.
        output: the resolution of the output.
        rounds_up: whether a downscaling layer keeps the incomplete last row of an odd length.
    """

    axis: int
    parts: tuple[Part, ...]
    output: Scale = Scale(1, 1)
    rounds_up: bool = False

    def scale(self, rank: int, length: int) -> Scale:
        """The resolution of a layer at which `rank`'s part is `length` rows long.

        Raises:
            ValueError: no whole factor leads from the part to this length.
        """
        held = self.parts[rank].length
        if length >= held:
            up, left = divmod(length, held)
            if left:
                raise ValueError(f"a layer has {length} rows where the input has {held}: no whole factor")
            return Scale(up, 1)
        down = 1
        while self.rows(held, Scale(1, down)) > length:
            down *= 2
        if self.rows(held, Scale(1, down)) != length:
            raise ValueError(f"a layer has {length} rows where the input has {held}: no power of two")
        return Scale(1, down)

    def core(self, rank: int, scale: Scale) -> slice:
        """The own rows of `rank` within what it holds, at a layer's resolution."""
        part = self.parts[rank]
        first = part.core_start - part.start
        if first * scale.up % scale.down:
            raise ValueError(
                f"a core that starts at row {first} of its part does not align at 1/{scale.down}"
            )
        return slice(self.rows(first, scale), self.rows(first + part.core_length, scale))

    def core_length(self, rank: int, scale: Scale) -> int:
        """How many rows `rank` owns at a layer's resolution."""
        own = self.core(rank, scale)
        return int(own.stop - own.start)

    def rows(self, rows: int, scale: Scale) -> int:
        """How many rows the first `rows` of the input make at a layer's resolution."""
        extra = scale.down - 1 if self.rounds_up else 0
        return (rows * scale.up + extra) // scale.down
