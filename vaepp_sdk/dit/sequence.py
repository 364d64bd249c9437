"""Ulysses and ring: each rank works on a part of the sequence, and only attention needs the other parts.

Ulysses trades parts of the sequence for heads, ring passes keys and values on. Together, the ranks of one
Ulysses row hold neighbouring parts of the sequence, and the rings run over the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vaepp_sdk.dit.ring import ring_attention
from vaepp_sdk.dit.row import Row, even_parts
from vaepp_sdk.errors import UnsupportedError

__all__ = ["SequenceSplit", "SplitAttention"]


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
        """The lengths of the parts of a sequence.

        Raises:
            UnsupportedError: it is too short for every rank to have some of it.
        """
        if length < self.size:
            raise UnsupportedError(
                f"a sequence of {length} cannot be cut into {self.size} parts; "
                f"ulysses_degree x ring_degree can be at most {length} for it"
            )
        return even_parts(length, self.size)

    def cut(self, value: Any, dim: int) -> Any:
        """This rank's part of a tensor, or of every tensor in a tuple or list; None stays None."""
        if isinstance(value, (tuple, list)):
            return type(value)(self.cut(item, dim) for item in value)
        if value is None:
            return None
        parts = self.parts(value.shape[dim])
        return value.narrow(dim, sum(parts[: self.index]), parts[self.index]).contiguous()

    def gather(self, tensor: torch.Tensor, dim: int, length: int, what: str) -> torch.Tensor:
        """The whole sequence, of `length`, from the parts on all ranks."""
        rows = self.rows(self.parts(length))
        chunk = self.ulysses.gather(tensor, dim, rows[self.ring.index], what)
        return self.ring.gather(chunk, dim, [sum(row) for row in rows], what)

    def rows(self, parts: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The parts, one Ulysses row after the other."""
        size = self.ulysses.size
        return [parts[start : start + size] for start in range(0, len(parts), size)]


class SplitAttention(TorchFunctionMode):
    """Inside its block, scaled-dot-product attention sees the sequence of all ranks.

    So the processors of a model stay its own: whatever they do around attention works on one token at a time.

    Args:
        split: how the sequence lies on the ranks.
        parts: the lengths of its parts.
    """

    def __init__(self, split: SequenceSplit, parts: tuple[int, ...]) -> None:
        super().__init__()
        self._split = split
        self._rows = split.rows(parts)
        self.calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Take over the one function."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._attend(*args, **(kwargs or {}))

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
        same = query.shape == key.shape == value.shape
        rows_of_mask = 1 if attn_mask is None else attn_mask.shape[-2]
        if dropout_p or is_causal or enable_gqa or not same or rows_of_mask != 1:
            raise UnsupportedError(
                "ulysses and ring split self-attention with masks over keys only; this attention is another"
            )
        ulysses, ring = self._split.ulysses, self._split.ring
        heads = query.shape[1]
        if ulysses.size > 1:
            query, key, value = self._to_heads(query, key, value)
        if ring.size > 1:
            lengths = [sum(row) for row in self._rows]
            found = ring_attention(query, key, value, attn_mask, scale, ring, lengths)
        else:
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=scale)
        return self._to_parts(found, heads) if ulysses.size > 1 else found

    def _to_heads(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """From all heads of this rank's part to its own heads of the whole row's parts."""
        row = self._split.ulysses
        packed = torch.stack(tensors)
        kinds, batch, heads, _, width = packed.shape
        counts = even_parts(heads, row.size)
        shapes = [
            (kinds, batch, counts[row.index], length, width) for length in self._rows[self._split.ring.index]
        ]
        arrived = row.exchange(packed.split(counts, dim=2), shapes, "heads for attention")
        return torch.cat(arrived, dim=3).unbind(0)

    def _to_parts(self, found: torch.Tensor, heads: int) -> torch.Tensor:
        """The way back."""
        row = self._split.ulysses
        lengths = self._rows[self._split.ring.index]
        batch, _, _, width = found.shape
        shapes = [(batch, count, lengths[row.index], width) for count in even_parts(heads, row.size)]
        return torch.cat(row.exchange(found.split(lengths, dim=2), shapes, "parts after attention"), dim=1)
