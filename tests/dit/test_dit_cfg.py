"""Guidance parallelism: each of two ranks runs one half of a call's batch, or one call of two."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from dims_jobs import TRUNCATED, Made, check, on
from dit_traffic import traffic
from pipeline_jobs import loaded, resolved_for, run

from vaepp_sdk.dit.guidance import BatchSplit, CallSplit, guided
from vaepp_sdk.dit.row import Row
from vaepp_sdk.entries import BatchPlan, CallsPlan
from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.testing import run_ranks


def counted_rank(rank: int, model: str) -> list[Any]:
    """What each transformer call runs and what is sent, guided with truncation."""
    resolved = resolved_for(model, parallel={"cfg_parallel_size": 2})
    executor = loaded(resolved)
    transformer, batches = executor._pipe.transformer, []
    whole = transformer.forward._forward

    def spy(x: Any, t: Any, cap_feats: Any, *others: Any, **settings: Any) -> Any:
        batches.append((len(x), len(t), len(cap_feats)))
        return whole(x, t, cap_feats, *others, **settings)

    transformer.forward._forward = spy
    with traffic() as seen:
        run(executor, resolved, **TRUNCATED)
    return [batches, seen, split_outputs(rank), split_calls(rank)]


def split_outputs(rank: int) -> bool:
    """Outputs of every form, of a batch of 3 and of one that is too small to share."""
    row, plan = Row.over(torch.distributed.group.WORLD), BatchPlan(arguments=("x",))
    value = torch.arange(3.0)[:, None]
    as_tuple = BatchSplit(lambda x, scale=1: (x * scale, "rest"), plan, row)
    as_object = BatchSplit(lambda x: Transformer2DModelOutput(sample=x + rank), plan, row)
    shared, rest = as_tuple(value, scale=2)
    found = as_object(x=value).sample
    assert torch.equal(shared, value * 2)
    assert rest == "rest"
    assert torch.equal(found, value + torch.tensor([[0.0], [0.0], [1.0]])), (
        "the second rank has the last item"
    )
    return torch.equal(as_object(x=value[:1]).sample, value[:1] + rank)


CALLS = CallsPlan(latents="x", paired=lambda call: bool(call["on"]))


def split_calls(rank: int) -> list[int]:
    """Pairs of calls, and what is no pair; returns the bytes that were sent."""
    ran: list[int] = []

    def forward(x: Any, scale: int, return_dict: bool = True) -> Any:
        ran.append(scale)
        made = (x * scale).expand(2, -1) if scale == 9 else x * scale
        return Transformer2DModelOutput(sample=made) if return_dict else (made,)

    model = SimpleNamespace(forward=CallSplit(forward, CALLS, Row.over(torch.distributed.group.WORLD)))
    split = model.forward
    with traffic() as seen:
        with guided([model], paired=True):
            for step in (1.0, 2.0):
                latents = torch.arange(3.0) + step
                first = split(latents, scale=2, return_dict=False)[0]
                assert bool(torch.isfinite(first).all()) is (rank == 0), "the other rank has it after both"
                second = split(latents, 3).sample
                assert torch.equal(first, latents * 2)
                assert torch.equal(second, latents * 3)
        assert ran == [2 + rank] * 2
        with guided([model], paired=False):
            assert torch.equal(split(latents, 5).sample, latents * 5)
        assert ran.pop() == 5
    split.begin(True)
    split(latents, 2)
    with pytest.raises(UnsupportedError, match="the last step called the transformer once"):
        split.end()
    with pytest.raises(UnsupportedError, match="once, or with other latents"):
        split(latents.clone(), 2)
    split.begin(True)
    with pytest.raises(UnsupportedError, match=r"of shape \(2, 3\) from"):
        _ = split(latents, 9), split(latents, 9)
    return seen.pop("broadcast")


def half_a_step(split: CallSplit, fails: bool, seen: list[Any]) -> None:
    """Make the first of a step's two calls only; notes the latents without holding them."""
    latents = torch.ones(3)
    seen.append(weakref.ref(latents))
    with guided([SimpleNamespace(forward=split)], paired=True):
        split(latents)
        if fails:
            raise ZeroDivisionError


@pytest.mark.parametrize("fails", [True, False], ids=["an error", "one call only"])
def test_an_unfinished_step_keeps_no_latents(fails: bool) -> None:
    split, seen = CallSplit(lambda x: (x * 2,), CALLS, Row(None, 0, 2)), list[Any]()
    with pytest.raises(ZeroDivisionError if fails else UnsupportedError):
        half_a_step(split, fails, seen)
    gc.collect()  # frames of the error, which hold each other
    assert seen[0]() is None
    assert not split.paired


def test_pictures_are_those_of_one_process(layered_model: Path, one_process: list[Made]) -> None:
    (found,) = on(2, layered_model, {"cfg_parallel_size": 2})
    check(found, one_process)
    assert all(rank["groups"] == 0 for rank in found)


def test_each_rank_runs_half_of_the_batch(tiny_model: Path) -> None:
    guided, plain = 6, 3
    for rank, (batches, seen, small, calls) in enumerate(run_ranks(2, counted_rank, str(tiny_model))):
        assert small
        assert calls == [3 * 4] * 2, "a rank sends the output of its own call, once a step"
        own = {6: 3, 3: 2 - rank}
        steps = [tuple([own[size]] * 3) for size in (guided, guided, plain)]
        assert sorted(batches, reverse=True) == steps
        # 16 latent channels of 12 x 16 in float32; uneven halves are sent as the larger one.
        assert sorted(seen.pop("all_gather")) == [n * 16 * 12 * 16 * 4 for n in (2, 3, 3)]
        assert not seen, "nothing else is sent"
