"""Families whose text and picture are two sequences: every dimension gives the pictures of one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import tiny_flux
import tiny_sd3
from dims_jobs import Call, Made, check, difference, layout_rank
from pipeline_jobs import CALL, resolved_for

from vaepp_sdk.errors import SpecError
from vaepp_sdk.request import make_request
from vaepp_sdk.testing import run_ranks

LONG, SHORT = "a futuristic city at sunset, high resolution", "two cats"
CFG, TENSOR, PIPELINE, DATA, ULYSSES, RING = (
    "cfg_parallel_size",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "ulysses_degree",
    "ring_degree",
)
Layout = Mapping[str, int]


@attrs.frozen
class Family:
    """What is asked of one family: its checkpoint, `[call]` table, requests and layouts.

    The first two requests differ in guidance only, and have prompts of unlike length.

    Attributes:
        exact: the dimensions that leave every sum as it is.
    """

    build: Callable[[Path], None]
    base: Call
    calls: tuple[Call, ...]
    two: tuple[tuple[str, ...], ...]
    four: tuple[tuple[str, ...], ...]
    exact: frozenset[str]


_BASE = dict(CALL) | {"max_sequence_length": 48}
FAMILIES: Mapping[str, Family] = {
    "flux": Family(
        build=tiny_flux.build,
        base=_BASE,
        calls=(
            {"prompt": [LONG, SHORT], "guidance_scale": 4.0},
            {
                "prompt": [LONG, SHORT],
                "guidance_scale": 4.0,
                "negative_prompt": [SHORT, ""],
                "true_cfg_scale": 3.0,
            },
            {"prompt": [SHORT, LONG], "prompt_2": [LONG, SHORT], "num_images_per_prompt": 2, "width": 80},
        ),
        two=((TENSOR,), (PIPELINE,), (DATA,), (ULYSSES,), (RING,), (CFG,)),
        four=((PIPELINE, TENSOR), (CFG, ULYSSES), (ULYSSES, RING), (DATA, RING)),
        exact=frozenset({CFG, PIPELINE, ULYSSES}),
    ),
    "sd3": Family(
        build=tiny_sd3.build,
        base=_BASE,
        calls=(
            {"prompt": [LONG, SHORT], "guidance_scale": 1.0},
            {"prompt": [LONG, SHORT], "guidance_scale": 4.0, "negative_prompt": [SHORT, ""]},
            {"prompt": [SHORT, LONG], "num_images_per_prompt": 2, "width": 80, "guidance_scale": 2.0},
        ),
        two=((TENSOR,), (PIPELINE,), (DATA,), (ULYSSES,), (RING,), (CFG,)),
        four=((CFG, PIPELINE), (TENSOR, ULYSSES), (PIPELINE, RING), (ULYSSES, RING)),
        exact=frozenset({PIPELINE, ULYSSES}),
    ),
}


def families_rank(
    rank: int, jobs: Sequence[tuple[str, Call, Sequence[Layout], Sequence[Call]]]
) -> list[list[dict[str, Any]]]:
    """Each job's calls on each of its layouts."""
    return [layout_rank(rank, model, layouts, calls, base) for model, base, layouts, calls in jobs]


@attrs.frozen
class Model:
    """A checkpoint and what one process makes of it."""

    path: str
    family: Family
    wanted: list[Made]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("families")
    for name, family in FAMILIES.items():
        family.build(folder / name)
    jobs: list[Any] = [
        (str(folder / name), family.base, [{}], family.calls) for name, family in FAMILIES.items()
    ]
    (found,) = run_ranks(1, families_rank, jobs)
    return {
        name: Model(str(folder / name), family, made[0]["made"])
        for (name, family), made in zip(FAMILIES.items(), found, strict=True)
    }


def check_on(ranks: int, models: Mapping[str, Model], chosen: Mapping[str, Sequence[Layout]]) -> None:
    """Run layouts of every family in one launch, and compare them to one process."""
    jobs = [
        (models[name].path, models[name].family.base, layouts, models[name].family.calls)
        for name, layouts in chosen.items()
    ]
    found = run_ranks(ranks, families_rank, jobs, timeout=900, collective=300)
    for index, (name, layouts) in enumerate(chosen.items()):
        for number, layout in enumerate(layouts):
            everyone = [rank[index][number] for rank in found]
            check(everyone, models[name].wanted, exact=set(layout) <= models[name].family.exact)


def test_one_dimension_on_two_ranks(models: dict[str, Model]) -> None:
    check_on(2, models, {name: [dict.fromkeys(keys, 2) for keys in of.two] for name, of in FAMILIES.items()})


def test_two_dimensions_on_four_ranks(models: dict[str, Model]) -> None:
    check_on(4, models, {name: [dict.fromkeys(keys, 2) for keys in of.four] for name, of in FAMILIES.items()})


def test_guidance_and_prompts_change_pictures(models: dict[str, Model]) -> None:
    """Else agreement with one process would say nothing."""
    for model in models.values():
        plain, guided, several = (made.pictures for made in model.wanted)
        assert difference(plain, guided) > 0.01
        assert difference(plain[0], plain[1]) > 0.01
        assert difference(several[0], several[2]) > 0.01


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("flux", {TENSOR: 3}, ("3 does not divide attention heads = 4", "sizes that work: 2, 4")),
        ("flux", {PIPELINE: 4}, ("the model has layers = 3", "at most 3 work")),
        ("flux", {ULYSSES: 5}, ("attention heads = 4", "at most 4 work")),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    models: dict[str, Model], name: str, sizes: Layout, words: tuple[str, ...]
) -> None:
    with pytest.raises(SpecError) as caught:
        resolved_for(models[name].path, parallel=dict(sizes), call=dict(models[name].family.base))
    for word in words:
        assert word in str(caught.value)


def test_a_size_that_brings_nothing_is_told(models: dict[str, Model]) -> None:
    """FLUX.1 is truly guided where there is a negative prompt and the scale is above 1."""
    model = models["flux"]
    plain, guided, _ = model.family.calls
    half = {key: value for key, value in guided.items() if key != "true_cfg_scale"}
    told = "parallel.cfg_parallel_size takes no effect for [call]: without guidance a step calls"
    for call, expected in ((plain, True), (half, True), (guided, False)):
        notices = resolved_for(
            model.path, parallel={CFG: 2}, call=dict(model.family.base) | dict(call)
        ).notices
        assert any(notice.startswith(told) for notice in notices) is expected


def test_arguments_that_do_not_work_on_a_layout_are_refused(models: dict[str, Model]) -> None:
    """Its numbers count blocks, and a list of blocks that is spread is called as one."""
    model = models["sd3"]
    call = dict(model.family.base) | {"skip_guidance_layers": [1]}
    told = r"\$.call.skip_guidance_layers: it does not work with pipeline_parallel_size=2; .*data, cfg"
    with pytest.raises(SpecError, match=told):
        resolved_for(model.path, parallel={PIPELINE: 2}, call=call)
    resolved = resolved_for(model.path, parallel={PIPELINE: 2}, call=dict(model.family.base))
    with pytest.raises(SpecError, match=told):
        make_request(resolved, {"skip_guidance_layers": [1]}, 0, False)
    resolved_for(model.path, parallel={CFG: 2}, call=call)
