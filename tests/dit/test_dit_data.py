"""Data parallelism: pictures dealt over replicas are those that one process makes of the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dims_jobs import CASES, GUIDED, PLAIN, SEVERAL, TRUNCATED, Made, alone, check, on
from pipeline_jobs import CALL

from vaepp_sdk.dit.data import Replicas
from vaepp_sdk.dit.row import Row, even_parts


def replica(index: int, size: int) -> Replicas:
    return Replicas(Row(None, index, size), torch.device("cpu"))


@pytest.mark.parametrize(("images", "size"), [(1, 2), (2, 2), (5, 2), (3, 4), (9, 4)])
def test_every_picture_has_one_replica(images: int, size: int) -> None:
    owned = [replica(index, size).own(images) for index in range(size)]
    assert [number for own in owned for number in own] == list(range(images))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1
    assert tuple(map(len, owned)) == even_parts(images, size)


def test_a_replica_is_asked_for_its_own_pictures() -> None:
    call = {"prompt": ["a", "b"], "negative_prompt": ["x", "y"], "num_images_per_prompt": 2, "height": 64}
    ask = replica(0, 2).call
    assert ask(call, range(4)) == call
    assert ask(call, range(2)) == {**call, "prompt": ["a"], "negative_prompt": ["x"]}
    cut = ask(call, range(1, 4))  # not a whole number of prompts
    assert cut == {
        **call, "prompt": ["a", "b", "b"], "negative_prompt": ["x", "y", "y"], "num_images_per_prompt": 1
    }  # fmt: skip
    assert ask({"prompt": "a", "negative_prompt": "x"}, range(1)) == {"prompt": ["a"], "negative_prompt": "x"}
    assert ask({"prompt": "a", "num_images_per_prompt": 3}, range(2)) == {
        "prompt": ["a", "a"], "num_images_per_prompt": 1
    }  # fmt: skip
    assert replica(0, 1).call(call, range(4)) == call


def batches(call: Any, size: int) -> list[dict[str, Any]]:
    """The calls of one process that make what each replica makes."""
    call = {"seed": CALL["seed"], **call}
    images = len(call["prompt"]) * call.get("num_images_per_prompt", 1)
    found = []
    for index in range(size):
        own = replica(index, size).own(images)
        if own:
            found.append({**replica(index, size).call(call, own), "seed": call["seed"] + own.start})
    return found


def test_pictures_are_those_of_the_same_batches(layered_model: Path, one_process: list[Made]) -> None:
    layouts = {2: CASES, 4: (PLAIN, TRUNCATED, SEVERAL)}  # on 4 replicas some have no picture
    wanted = alone(
        layered_model, [part for size in layouts for call in layouts[size] for part in batches(call, size)]
    )
    found = {
        size: on(size, layered_model, {"data_parallel_size": size}, calls=calls)[0]
        for size, calls in layouts.items()
    }
    for size, calls in layouts.items():
        check(found[size], [one_process[CASES.index(call)] for call in calls])
        for index, call in enumerate(calls):
            same = [wanted.pop(0) for _ in batches(call, size)]
            for rank in found[size]:
                assert torch.equal(rank["made"][index].latents, torch.cat([part.latents for part in same]))
        assert all(rank["groups"] == 0 for rank in found[size]), "the world group serves"


def test_the_layouts_cover_uneven_and_idle_replicas() -> None:
    assert len(batches(TRUNCATED, 2)) == 2
    assert [len(part["prompt"]) for part in batches(TRUNCATED, 2)] == [2, 1]
    assert len(batches(TRUNCATED, 4)) == 3
    assert len(batches(GUIDED, 2)) == 2
