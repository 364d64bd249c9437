"""Ulysses and ring: each rank works on a part of the sequence, and only attention needs the other parts.

Ulysses trades parts of the sequence for heads, ring passes keys and values on. Together, the ranks of one
Ulysses row hold neighbouring parts of the sequence, and the rings run over the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch.nn import functional as F

from vaepp_sdk.dit.ring import ring_attention
from vaepp_sdk.dit.row import Row, even_parts
from vaepp_sdk.dit.takeover import Takeover
from vaepp_sdk.errors import UnsupportedError

__all__ = ["Joined", "LocalAttention", "SequenceSplit", "SplitAttention"]


@attrs.frozen(eq=False)
class SequenceSplit:
    """How a sequence lies on the ranks.

    Attributes:
        ulysses: the ranks that trade heads.
        ring: the ranks that pass keys and values on.
    """

    ulysses: Row
    ring: Row

    @property
    def size(self) -> int:
        """The number of parts."""
        return self.ulysses.size * self.ring.size

    @property
    def index(self) -> int:
        """This rank's part."""
        return self.ring.index * self.ulysses.size + self.ulysses.index

    def parts(self, length: int) -> tuple[int, ...]:
        """The lengths of the parts of a sequence; the last ones of a short one are empty."""
        return even_parts(length, self.size)

    def joined(self, lengths: Sequence[int], mask: torch.Tensor | None = None) -> Joined:
        """How sequences that attention sees one after another lie on the ranks.

        Args:
            lengths: of the sequences.
            mask: as `Joined` has it.

        Raises:
            UnsupportedError: they are too short for every rank to have some of them.
        """
        longest = max(lengths)
        if longest < self.size:
            raise UnsupportedError(
                f"a sequence of {longest} cannot be cut into {self.size} parts; "
                f"ulysses_degree x ring_degree can be at most {longest} for it"
            )
        return Joined(tuple(self.parts(length) for length in lengths), mask)

    def cut(self, value: Any, dim: int) -> Any:
        """This rank's part of a tensor, or of every tensor in a tuple or list; None stays None.

        In place of an empty part there is one token, as models do not expect none; attention leaves it out.
        """
        if isinstance(value, (tuple, list)):
            return type(value)(self.cut(item, dim) for item in value)
        if value is None:
            return None
        parts = self.parts(value.shape[dim])
        own = parts[self.index]
        start = sum(parts[: self.index]) if own else 0
        return value.narrow(dim, start, own or 1).contiguous()

    def cut_joined(self, value: Any, dim: int, lengths: Sequence[int]) -> Any:
        """This rank's part of each of several sequences that lie one after another; else as `cut`."""
        if isinstance(value, (tuple, list)):
            return type(value)(self.cut_joined(item, dim, lengths) for item in value)
        if value is None:
            return None
        return torch.cat([self.cut(piece, dim) for piece in value.split(list(lengths), dim)], dim)

    def gather(self, tensor: torch.Tensor, dim: int, length: int, what: str) -> torch.Tensor:
        """The whole sequence, of `length`, from the parts on all ranks."""
        parts = self.parts(length)
        rows = self.rows(parts)
        own = tensor.narrow(dim, 0, parts[self.index])
        chunk = self.ulysses.gather(own, dim, rows[self.ring.index], what)
        return self.ring.gather(chunk, dim, [sum(row) for row in rows], what)

    def rows(self, parts: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The parts, one Ulysses row after the other."""
        size = self.ulysses.size
        return [parts[start : start + size] for start in range(0, len(parts), size)]


@attrs.frozen
class Joined:
    """Sequences that attention sees one after another.

    A rank has its part of each, one after another too. So what several ranks have is in another order than
    the whole is, and attention must work on the whole's: else its sums would round otherwise, and masks not
    fit.

    Attributes:
        parts: of each sequence, the lengths of its parts on all ranks.
        mask: which tokens of the whole are seen, `(batch, 1, 1, tokens)`; takes the place of the mask that a
            block makes of its rank's part.
    """

    parts: tuple[tuple[int, ...], ...]
    mask: torch.Tensor | None = attrs.field(default=None, eq=False)

    @property
    def length(self) -> int:
        """How many tokens all ranks have."""
        return sum(map(sum, self.parts))

    def own(self, rank: int) -> int:
        """How many tokens the rank at a place has."""
        return sum(part[rank] for part in self.parts)

    def held(self, rank: int) -> list[int]:
        """Of each sequence, how many tokens its blocks work on; one in place of none."""
        return [part[rank] or 1 for part in self.parts]

    def without_stand_ins(self, tensor: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
        """Leave out the tokens that stand for empty parts."""
        if all(part[rank] for part in self.parts):
            return tensor
        pieces = tensor.split(self.held(rank), dim)
        return torch.cat([piece for piece, part in zip(pieces, self.parts, strict=True) if part[rank]], dim)

    def with_stand_ins(self, tensor: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
        """The way back; nobody looks at what they hold."""
        if all(part[rank] for part in self.parts):
            return tensor
        pieces = tensor.split([part[rank] for part in self.parts], dim)
        blank = torch.zeros_like(tensor.narrow(dim, 0, 1))
        return torch.cat([piece if piece.shape[dim] else blank for piece in pieces], dim)

    def by_sequence(self, tensor: torch.Tensor, dim: int, ranks: range) -> torch.Tensor:
        """From the order of some ranks' parts to that of the whole."""
        lengths = [part[rank] for rank in ranks for part in self.parts]
        return _interleaved(tensor, lengths, len(self.parts), dim)

    def by_rank(self, tensor: torch.Tensor, dim: int, ranks: range) -> torch.Tensor:
        """The way back."""
        lengths = [part[rank] for part in self.parts for rank in ranks]
        return _interleaved(tensor, lengths, len(ranks), dim)

    def by_rows(self, mask: torch.Tensor, rows: Sequence[range]) -> torch.Tensor:
        """A mask over all keys, in the order in which rows of ranks hold them."""
        lengths = [sum(part[rank] for rank in row) for part in self.parts for row in rows]
        return _interleaved(mask, lengths, len(rows), -1)


def _interleaved(tensor: torch.Tensor, lengths: list[int], step: int, dim: int) -> torch.Tensor:
    """Of pieces of a tensor, the first of every `step`, then the second ones, and so on."""
    if step in (1, len(lengths)):
        return tensor
    pieces = tensor.split(lengths, dim)
    return torch.cat([piece for start in range(step) for piece in pieces[start::step]], dim)


class LocalAttention:
    """Stands for the forward of a module whose attention is not to the sequence: it stays as it is.

    Args:
        forward: the module's own.
    """

    depth = 0
    """How many of them are running in this process."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own output."""
        LocalAttention.depth += 1
        try:
            return self._forward(*args, **kwargs)
        finally:
            LocalAttention.depth -= 1


class SplitAttention(Takeover):
    """Inside its block, scaled-dot-product attention sees the sequence of all ranks.

    So the processors of a model stay its own: whatever they do around attention works on one token at a time.

    Args:
        split: the ranks.
        layouts: how the sequences lie on them that each kind of attention sees; told apart by their length.

    Raises:
        UnsupportedError: on some rank two of them are equally long; on every rank alike.
    """

    function = F.scaled_dot_product_attention

    def __init__(self, split: SequenceSplit, layouts: Sequence[Joined]) -> None:
        super().__init__()
        for rank in range(split.size):
            if len({sum(layout.held(rank)) for layout in layouts}) < len(layouts):
                raise UnsupportedError(
                    "two kinds of attention see as many tokens, so ulysses and ring cannot tell them apart; "
                    "use other dimensions, or another size"
                )
        self._split = split
        self._layouts = {sum(layout.held(split.index)): layout for layout in layouts}
        size = split.ulysses.size
        self._rows = [range(start * size, (start + 1) * size) for start in range(split.ring.size)]
        self.calls = 0

    def own(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attention to the sequence, or as it is inside of `LocalAttention`."""
        if LocalAttention.depth:
            return F.scaled_dot_product_attention(*args, **kwargs)
        self.calls += 1
        return self._attend(*args, **kwargs)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        layout = self._layouts.get(query.shape[2])
        same = query.shape == key.shape == value.shape and layout is not None
        rows_of_mask = 1 if attn_mask is None else attn_mask.shape[-2]
        if dropout_p or is_causal or enable_gqa or not same or rows_of_mask != 1:
            raise UnsupportedError(
                "ulysses and ring split self-attention with masks over keys only; this attention is another"
            )
        assert layout is not None
        attn_mask = self._whole(attn_mask, layout)
        ulysses, ring, rank = self._split.ulysses, self._split.ring, self._split.index
        query, key, value = (layout.without_stand_ins(each, 2, rank) for each in (query, key, value))
        heads = query.shape[1]
        if ulysses.size > 1:
            query, key, value = self._to_heads(layout, query, key, value)
        if ring.size > 1:
            lengths = [sum(map(layout.own, row)) for row in self._rows]
            mask = None if attn_mask is None else layout.by_rows(attn_mask, self._rows)
            found = ring_attention(query, key, value, mask, scale, ring, lengths)
        else:
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=scale)
        found = self._to_parts(layout, found, heads) if ulysses.size > 1 else found
        return layout.with_stand_ins(found, 2, rank)

    def _whole(self, mask: torch.Tensor | None, layout: Joined) -> torch.Tensor | None:
        """The mask over the keys of all ranks, where a block has one over those of this rank."""
        if mask is None or mask.shape[-1] == layout.length:
            return mask
        if mask.shape[-1] == sum(layout.held(self._split.index)) and layout.mask is not None:
            return layout.mask
        raise UnsupportedError(
            f"attention to {layout.length} keys was given a mask over {mask.shape[-1]}, and the plan for "
            "ulysses and ring does not say which tokens are masked"
        )

    def _to_heads(self, layout: Joined, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """From all heads of this rank's part to its own heads of the whole row's parts."""
        row, ranks = self._split.ulysses, self._rows[self._split.ring.index]
        packed = torch.stack(tensors)
        kinds, batch, heads, _, width = packed.shape
        counts = even_parts(heads, row.size)
        shapes = [(kinds, batch, counts[row.index], layout.own(rank), width) for rank in ranks]
        arrived = row.exchange(packed.split(counts, dim=2), shapes, "heads for attention")
        return layout.by_sequence(torch.cat(arrived, dim=3), 3, ranks).unbind(0)

    def _to_parts(self, layout: Joined, found: torch.Tensor, heads: int) -> torch.Tensor:
        """The way back."""
        row, ranks = self._split.ulysses, self._rows[self._split.ring.index]
        lengths = [layout.own(rank) for rank in ranks]
        found = layout.by_rank(found, 2, ranks)
        batch, _, _, width = found.shape
        shapes = [(batch, count, lengths[row.index], width) for count in even_parts(heads, row.size)]
        return torch.cat(row.exchange(found.split(lengths, dim=2), shapes, "parts after attention"), dim=1)
