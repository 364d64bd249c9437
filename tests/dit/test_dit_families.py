"""Families with two transformer calls a step: every dimension gives the pictures of one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import pytest
import tiny_qwen_image
import tiny_wan
import torch
from dims_jobs import Made, check
from families import QWEN, WAN, Family, Layout, alone, run_jobs
from pipeline_jobs import resolved_for

from vaepp_sdk.errors import SpecError

CFG, TENSOR, PIPELINE, DATA, ULYSSES, RING = (
    "cfg_parallel_size",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "ulysses_degree",
    "ring_degree",
)
EXACT = {CFG, PIPELINE, ULYSSES}
"""What leaves every sum as it is."""

ON_TWO: Mapping[str, tuple[str, ...]] = {
    "qwen": (CFG, TENSOR, PIPELINE, DATA),
    "wan": (CFG, TENSOR, PIPELINE, DATA, ULYSSES, RING),
    "newer": (CFG, TENSOR, PIPELINE, ULYSSES, RING),
}
ON_FOUR: Mapping[str, tuple[tuple[str, str], ...]] = {
    "qwen": ((CFG, PIPELINE), (DATA, TENSOR)),
    "wan": ((CFG, ULYSSES), (ULYSSES, RING)),
    "newer": ((CFG, PIPELINE), (RING, TENSOR)),
}


@attrs.frozen
class Model:
    """A checkpoint and what one process makes of it."""

    path: str
    family: Family
    wanted: list[Made]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("families")
    tiny_qwen_image.build(folder / "qwen")
    tiny_wan.build(folder / "wan")
    tiny_wan.build(folder / "newer", newer=True)
    kinds = {"qwen": QWEN, "wan": WAN, "newer": WAN}
    made = alone([(str(folder / name), family) for name, family in kinds.items()])
    return {
        name: Model(str(folder / name), family, wanted)
        for (name, family), wanted in zip(kinds.items(), made, strict=True)
    }


def found_on(ranks: int, models: Mapping[str, Model], layouts: Mapping[str, Sequence[Layout]]) -> Any:
    """By model and layout what every rank has, all of it from one launch."""
    jobs = [
        (models[name].path, models[name].family.base, chosen, models[name].family.calls)
        for name, chosen in layouts.items()
    ]
    return dict(zip(layouts, run_jobs(ranks, jobs), strict=True))


def test_one_dimension_on_two_ranks(models: dict[str, Model]) -> None:
    layouts: dict[str, list[Layout]] = {name: [{key: 2} for key in keys] for name, keys in ON_TWO.items()}
    for name, found in found_on(2, models, layouts).items():
        for layout, everyone in zip(layouts[name], found, strict=True):
            check(everyone, models[name].wanted, exact=set(layout) <= EXACT)
            assert all(rank["groups"] == 0 for rank in everyone), "the world group serves"


def test_two_dimensions_on_four_ranks(models: dict[str, Model]) -> None:
    layouts: dict[str, list[Layout]] = {
        name: [dict.fromkeys(pair, 2) for pair in pairs] for name, pairs in ON_FOUR.items()
    }
    for name, found in found_on(4, models, layouts).items():
        for layout, everyone in zip(layouts[name], found, strict=True):
            check(everyone, models[name].wanted, exact=set(layout) <= EXACT)


def test_guidance_prompts_and_the_second_transformer_change_pictures(models: dict[str, Model]) -> None:
    """Else agreement with one process would say nothing."""
    for model in models.values():
        guided, _, several = (made.pictures for made in model.wanted)
        assert float((guided[0] - guided[1]).abs().max()) > 0.01
        assert float((several[0] - several[2]).abs().max()) > 0.01
    older, newer = (models[name].wanted[0].pictures for name in ("wan", "newer"))
    assert float((older - newer).abs().max()) > 0.01
    assert not torch.equal(older, newer)


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("qwen", {TENSOR: 3}, ("3 does not divide attention heads = 4", "sizes that work: 2, 4")),
        ("newer", {TENSOR: 3}, ("attention heads of transformer_2 = 4", "sizes that work: 2, 4")),
        ("qwen", {PIPELINE: 4}, ("the model has layers = 3", "at most 3 work")),
        ("wan", {ULYSSES: 5}, ("attention heads = 4", "at most 4 work")),
        ("wan", {CFG: 3}, ("guidance has two branches",)),
        ("qwen", {RING: 2}, ("how to split QwenImagePipeline by ring", "ZImagePipeline")),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    models: dict[str, Model], name: str, sizes: Layout, words: tuple[str, ...]
) -> None:
    with pytest.raises(SpecError) as caught:
        resolved_for(models[name].path, parallel=dict(sizes), call=dict(models[name].family.base))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("name", "guided"), [("qwen", False), ("wan", True), ("newer", True)])
def test_a_size_that_brings_nothing_is_told(models: dict[str, Model], name: str, guided: bool) -> None:
    """Qwen-Image is guided where there is a negative prompt, Wan where the scale is above 1, by default 5."""
    family = models[name].family
    plain, full = (
        resolved_for(models[name].path, parallel={CFG: 2}, call=dict(family.base) | dict(call)).notices
        for call in ({}, family.guided)
    )
    told = "parallel.cfg_parallel_size takes no effect for [call]: without guidance a step calls"
    assert any(notice.startswith(told) for notice in plain) is not guided
    assert not any(notice.startswith(told) for notice in full)
