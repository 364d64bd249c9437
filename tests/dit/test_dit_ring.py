"""Ring attention: masks cut per part, parts that nobody may see, and pictures against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dims_jobs import TOLERANCE, Made, check, difference, on
from dit_traffic import traffic
from short_texts import beside_short_texts
from torch.nn import functional as F

from vaepp_sdk.dit.ring import merged, partial_attention
from vaepp_sdk.dit.row import Row
from vaepp_sdk.dit.sequence import Joined, SequenceSplit, SplitAttention
from vaepp_sdk.testing import run_ranks


def masks(length: int) -> dict[str, torch.Tensor | None]:
    """Masks over keys of a batch of 2; the last hides whole parts of the keys from one item, or from both."""
    ragged = torch.ones(2, 1, 1, length, dtype=torch.bool)
    ragged[0, ..., 7:] = False
    hidden = torch.zeros(2, 1, 1, length, dtype=torch.bool)
    hidden[0, ..., :2], hidden[1, ..., -1:] = True, True
    return {"none": None, "ragged": ragged, "added": torch.randn(2, 1, 1, length), "hidden": hidden}


def attention_rank(rank: int, ulysses: int, ring: int) -> list[float]:
    """The largest difference to whole attention for every mask; uneven parts throughout."""
    world = torch.distributed.group.WORLD
    one = Row(None, 0, 1)
    split = SequenceSplit(Row.over(world) if ulysses > 1 else one, Row.over(world) if ring > 1 else one)
    length, found = 17, []
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 2, 3, length, 8)
    for mask in masks(length).values():
        whole = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        with SplitAttention(split, [Joined((split.parts(length),))]), traffic() as seen:
            own = [split.cut(tensor, 2) for tensor in (query, key, value)]
            mine = F.scaled_dot_product_attention(own[0], own[1], own[2], attn_mask=mask)
        assert len(seen["ring"]) == ring - 1, "keys and values pass each rank once"
        found.append(difference(split.gather(mine, 2, length, "test"), whole))
    return found + [difference(*pair) for pair in beside_short_texts(split)]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_attention_is_that_of_one_process(size: int) -> None:
    for rank in run_ranks(size, attention_rank, 1, size):
        assert max(rank) <= TOLERANCE  # values of up to 4, summed in another order


@pytest.mark.parametrize("size", [2, 3])
def test_pictures_are_those_of_one_process(layered_model: Path, one_process: list[Made], size: int) -> None:
    (found,) = on(size, layered_model, {"ring_degree": size})
    check(found, one_process)
    assert all(rank["groups"] == 0 for rank in found)


def test_a_query_that_sees_no_key_leaves_the_others_alone() -> None:
    query, key, value = torch.randn(3, 1, 2, 5, 8)
    nothing = partial_attention(query, key, value, torch.zeros(1, 1, 1, 5, dtype=torch.bool), None)
    assert torch.equal(nothing[0], torch.zeros(1, 2, 5, 8))
    assert bool(torch.isneginf(nothing[1]).all())
    something = partial_attention(query, key, value, None, None)
    for both in (merged(nothing, something), merged(something, nothing)):
        assert torch.equal(both[0], something[0])
        assert torch.equal(both[1], something[1])
    still_nothing = merged(nothing, nothing)
    assert torch.equal(still_nothing[0], nothing[0])
    assert bool(torch.isneginf(still_nothing[1]).all())


def test_half_precision_is_merged_in_float32() -> None:
    query, key, value = torch.randn(3, 1, 2, 3000, 8).bfloat16()
    output, sums = partial_attention(query, key, value, None, 0.5)
    assert output.dtype == sums.dtype == torch.float32
    wanted = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), scale=0.5)
    assert float((output - wanted).abs().max()) <= 1e-5
