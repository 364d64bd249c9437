"""Ulysses: sequence parts and heads of any size give the bits of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dims_jobs import TOLERANCE, Made, check, difference, on
from short_texts import beside_short_texts
from torch.nn import functional as F

from vaepp_sdk.dit.row import Row
from vaepp_sdk.dit.sequence import Joined, SequenceSplit, SplitAttention
from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.testing import run_ranks


def attention_rank(rank: int, size: int) -> dict[str, Any]:
    """Attention alone, over heads and lengths that do not divide, against the whole."""
    split = SequenceSplit(Row.over(torch.distributed.group.WORLD), Row(None, 0, 1))
    equal = []
    for heads, length, masked in ((7, 11, True), (3, 64, False), (4, 5, True)):
        torch.manual_seed(heads)
        query, key, value = torch.randn(3, 2, heads, length, 8)
        mask = (torch.rand(2, 1, 1, length) > 0.3) if masked else None
        whole = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        with SplitAttention(split, [Joined((split.parts(length),))]) as mode:
            own = [split.cut(tensor, 2) for tensor in (query, key, value)]
            found = F.scaled_dot_product_attention(own[0], own[1], own[2], attn_mask=mask)
        assert mode.calls == 1
        equal.append(torch.equal(split.gather(found, 2, length, "test"), whole))
    beside = [difference(*pair) for pair in beside_short_texts(split)]
    return {"equal": equal, "beside": beside, "parts": split.parts(11)}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_pictures_are_the_bits_of_one_process(
    layered_model: Path, one_process: list[Made], size: int
) -> None:
    """On 3 ranks neither the 4 heads nor the sequences divide."""
    (found,) = on(size, layered_model, {"ulysses_degree": size})
    check(found, one_process, exact=True)
    assert all(rank["groups"] == 0 for rank in found)


def test_heads_and_lengths_that_do_not_divide() -> None:
    for rank in run_ranks(3, attention_rank, 3):
        assert rank["equal"] == [True] * 3
        assert max(rank["beside"]) <= TOLERANCE  # layers over one or two rows round as no longer ones do
        assert rank["parts"] == (4, 4, 3)


def test_what_cannot_be_split_is_refused() -> None:
    split = SequenceSplit(Row(None, 0, 2), Row(None, 0, 1))
    with pytest.raises(UnsupportedError, match="a sequence of 1 cannot be cut into 2 parts"):
        split.joined([1, 0])
    query = torch.randn(1, 2, 4, 8)
    other = "this attention is another"
    for settings, words in (
        ({"is_causal": True}, other),
        ({"attn_mask": torch.ones(4, 4, dtype=torch.bool)}, other),
        ({"attn_mask": torch.ones(1, 1, 1, 4, dtype=torch.bool)}, "8 keys was given a mask over 4"),
    ):
        with SplitAttention(split, [Joined(((4, 4),))]), pytest.raises(UnsupportedError, match=words):
            F.scaled_dot_product_attention(query, query, query, **settings)
    # As long on the first rank only: refused on both.
    for index in range(2):
        split = SequenceSplit(Row(None, index, 2), Row(None, 0, 1))
        with pytest.raises(UnsupportedError, match="cannot tell them apart"):
            SplitAttention(split, [Joined(((5, 4),)), Joined(((5, 5),))])


def test_two_sequences_lie_in_the_wholes_order_after_a_trade() -> None:
    """On 2 x 2 ranks: a row's parts in the order of the whole, back again, and a mask in that of the rows."""
    joined, rows = Joined(((3, 2, 2, 2), (5, 5, 4, 4))), [range(2), range(2, 4)]
    whole = torch.arange(27)
    text, picture = whole[:9].split([3, 2, 2, 2]), whole[9:].split([5, 5, 4, 4])
    held = torch.cat([torch.cat([text[rank], picture[rank]]) for rank in rows[1]])
    ordered = joined.by_sequence(held, 0, rows[1])
    assert ordered.tolist() == [*range(5, 9), *range(19, 27)]
    assert torch.equal(joined.by_rank(ordered, 0, rows[1]), held)
    masks = joined.by_rows(whole, rows)
    assert masks.tolist() == [*range(5), *range(9, 19), *ordered.tolist()]
    assert [joined.own(rank) for rank in range(4)] == [8, 7, 6, 6]
