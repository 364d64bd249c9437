"""Families beyond Z-Image: every dimension gives the pictures of one process; what cannot be is refused."""

from __future__ import annotations

from typing import Any

import pytest
from dims_jobs import Call, difference
from families import CFG, FAMILIES, PIPELINE, TENSOR, ULYSSES, Layout
from family_jobs import Model, check_on, models_in
from pipeline_jobs import resolved_for

from vaepp_sdk.errors import SpecError
from vaepp_sdk.request import make_request
from vaepp_sdk.resolve import Resolved


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    return models_in(tmp_path_factory.mktemp("families"), FAMILIES)


def resolved_on(model: Model, sizes: Layout, call: Call | None = None) -> Resolved:
    return resolved_for(model.path, parallel=dict(sizes), call=dict(model.family.base) | dict(call or {}))


def test_one_dimension_on_two_ranks(models: dict[str, Model]) -> None:
    check_on(2, models, {name: family.two for name, family in FAMILIES.items()})


def test_two_dimensions_on_four_ranks(models: dict[str, Model]) -> None:
    check_on(4, models, {name: family.four for name, family in FAMILIES.items()})


def test_guidance_prompts_and_the_second_transformer_change_pictures(models: dict[str, Model]) -> None:
    """Else agreement with one process would say nothing."""
    for name, model in models.items():
        guided, plain, several = (made.pictures for made in model.wanted)
        assert (difference(guided[0], plain[0]) > 0.01) is (name != "distilled")
        assert difference(guided[0], guided[1]) > 0.01
        assert difference(several[0], several[2]) > 0.01
    older, newer = (models[name].wanted[0].pictures for name in ("wan", "newer"))
    assert difference(older, newer) > 0.01


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("flux", {TENSOR: 3}, ("3 does not divide attention heads = 4", "sizes that work: 2, 4")),
        ("flux", {PIPELINE: 4}, ("the model has layers = 3", "at most 3 work")),
        ("flux", {ULYSSES: 5}, ("attention heads = 4", "at most 4 work")),
        ("flux2", {TENSOR: 3}, ("attention heads = 4, feed-forward width = 160", "sizes that work: 2, 4")),
        ("flux2", {PIPELINE: 4}, ("the model has layers = 3", "at most 3 work")),
        ("flux2", {CFG: 2}, ("how to split Flux2Pipeline by cfg", "Flux2KleinPipeline")),
        ("qwen", {TENSOR: 3}, ("3 does not divide attention heads = 4", "sizes that work: 2, 4")),
        ("newer", {TENSOR: 3}, ("attention heads of transformer_2 = 4", "sizes that work: 2, 4")),
        ("qwen", {PIPELINE: 4}, ("the model has layers = 3", "at most 3 work")),
        ("wan", {ULYSSES: 5}, ("attention heads = 4", "at most 4 work")),
        ("wan", {CFG: 3}, ("guidance has two branches",)),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    models: dict[str, Model], name: str, sizes: Layout, words: tuple[str, ...]
) -> None:
    with pytest.raises(SpecError) as caught:
        resolved_on(models[name], sizes)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "call", "guided"),
    [
        ("flux", FAMILIES["flux"].guided, True),
        ("flux", {"negative_prompt": "blurred"}, False),
        ("flux", {"true_cfg_scale": 3.0}, False),
        ("qwen", FAMILIES["qwen"].guided, True),
        ("qwen", {"negative_prompt": "blurred"}, True),
        ("qwen", {}, False),
        ("wan", {}, True),
        ("newer", {"guidance_scale": 1.0}, False),
        ("klein", {}, True),
        ("klein", {"guidance_scale": 1.0}, False),
        ("distilled", {}, False),
    ],
)
def test_a_size_that_brings_nothing_is_told(
    models: dict[str, Model], name: str, call: dict[str, Any], guided: bool
) -> None:
    told = "parallel.cfg_parallel_size takes no effect for [call]: without guidance a step calls"
    notices = resolved_on(models[name], {CFG: 2}, call).notices
    assert any(notice.startswith(told) for notice in notices) is not guided


def test_arguments_that_do_not_work_on_a_layout_are_refused(models: dict[str, Model]) -> None:
    """Its numbers count blocks, and a list of blocks that is spread is called as one."""
    skips = {"skip_guidance_layers": [1]}
    told = r"\$.call.skip_guidance_layers: it does not work with pipeline_parallel_size=2; .*data, cfg"
    with pytest.raises(SpecError, match=told):
        resolved_on(models["sd3"], {PIPELINE: 2}, skips)
    resolved = resolved_on(models["sd3"], {PIPELINE: 2})
    with pytest.raises(SpecError, match=told):
        make_request(resolved, skips, 0, False)
    resolved_on(models["sd3"], {CFG: 2}, skips)
