"""Ring attention: keys and values travel round the ranks; each rank keeps its own queries.

Every part of the keys gives an output and the logarithm of its softmax's sum; two such pairs merge in
float32. A rank holds two parts at a time: the one it works on and the one that arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch.nn import functional as F

from vaepp_sdk.dit.row import Row

__all__ = ["merged", "partial_attention", "ring_attention"]

_ROWS = 1024
"""Queries at a time on the CPU, so that the scores of long sequences stay small."""

Partial = tuple[torch.Tensor, torch.Tensor]
"""An output `(batch, heads, queries, width)` and log-sums `(batch, heads, queries)`, both in float32."""


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    ring: Row,
    lengths: Sequence[int],
) -> torch.Tensor:
    """Attention of this rank's queries to the keys of all ranks.

    Args:
        query: `(batch, heads, own queries, width)`.
        key: this rank's keys, `(batch, heads, own keys, width)`.
        value: this rank's values, as `key`.
        mask: of all keys, True or added to the scores, `(batch or 1, heads or 1, 1, keys)`; or None.
        scale: of the scores; None for the usual one.
        ring: the ranks, in the order of their keys.
        lengths: how many keys each of them has.

    Returns:
        `(batch, heads, own queries, width)`, in the queries' dtype.

    Raises:
        PeerError: a neighbour is gone, or did not answer in time.
    """
    starts = [0, *accumulate(lengths)]
    held = torch.stack((key, value))
    total: Partial | None = None
    for step in range(ring.size):
        source = (ring.index - step) % ring.size
        passing = None
        if step < ring.size - 1:
            coming = held.new_empty((*held.shape[:3], lengths[source - 1], held.shape[4]))
            passing = ring.rotate(held, coming, f"keys and values of part {source}")
        seen = None if mask is None else mask[..., starts[source] : starts[source + 1]]
        found = partial_attention(query, held[0], held[1], seen, scale)
        total = found if total is None else merged(total, found)
        if passing is not None:
            passing.wait()
            held = coming
    assert total is not None
    return total[0].to(query.dtype)


def merged(one: Partial, other: Partial) -> Partial:
    """Attention to two sets of keys from attention to each."""
    log_sum = torch.logaddexp(one[1], other[1])
    # Where no key at all was seen yet both are -inf, and their difference is no number.
    weights = [(part[1] - log_sum).exp().nan_to_num(0.0).unsqueeze(-1) for part in (one, other)]
    return one[0] * weights[0] + other[0] * weights[1], log_sum


def partial_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> Partial:
    """Attention to one part of the keys, with its log-sums; a query that sees none gives 0 and -inf."""
    if query.device.type == "cuda":
        return _fused(query, key, value, mask, scale)
    found = [
        _exact(rows, key.float(), value.float(), mask, scale) for rows in query.float().split(_ROWS, dim=2)
    ]
    outputs, sums = zip(*found, strict=True)
    return torch.cat(outputs, 2), torch.cat(sums, 2)


def _exact(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> Partial:
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * factor) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + _bias(mask, torch.float32)
    log_sum = scores.logsumexp(-1)
    chances = (scores - log_sum.unsqueeze(-1)).exp().nan_to_num(0.0)
    return chances @ value, log_sum


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> Partial:
    """The GPU's memory-efficient kernel, which takes a mask, every dtype, and gives the log-sums."""
    bias = None
    if mask is not None:
        count = key.shape[2]
        # The kernel wants rows of the bias to start at multiples of 16 bytes.
        padded = F.pad(_bias(mask, query.dtype), (0, -count % 16))[..., :count]
        bias = padded.expand(*query.shape[:3], count)
    output, sums = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, scale=scale
    )[:2]
    output, sums = output.float(), sums[..., : query.shape[2]].float()
    if mask is None:
        return output, sums
    blind = torch.isneginf(_bias(mask, torch.float32)).all(-1)
    return output.masked_fill(blind.unsqueeze(-1), 0.0), sums.masked_fill(blind, float("-inf"))


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores: a mask of True and False as 0 and -inf."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))
