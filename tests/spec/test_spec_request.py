"""Requests: merged, checked, with a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from spec_models import model_folder, stand_in_registry

from vaepp_sdk.errors import SpecError
from vaepp_sdk.request import Request, make_request
from vaepp_sdk.resolve import Resolved, resolve
from vaepp_sdk.spec import PipelineSpec

CALL = {"prompt": "a", "height": 64, "seed": 7}


@pytest.fixture
def resolved(tmp_path: Path) -> Resolved:
    tables = {"model": {"id": str(model_folder(tmp_path / "m"))}, "call": CALL}
    return resolve(PipelineSpec.load(tables), stand_in_registry())


def faults(resolved: Resolved, **overrides: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        make_request(resolved, overrides, 3, False)
    assert str(caught.value).startswith("request 3: ")
    return [str(fault) for fault in caught.value.faults]


def test_the_specs_call_and_overrides_are_merged(resolved: Resolved) -> None:
    request = make_request(resolved, {"prompt": ["b", "c"], "num_images_per_prompt": 2}, 0, True)
    assert request.call == {"prompt": ["b", "c"], "height": 64, "num_images_per_prompt": 2}
    assert (request.seed, request.save, request.prompts, request.images) == (7, True, ("b", "c"), 4)
    assert resolved.spec.call == CALL
    assert Request.from_dict(json.loads(json.dumps(request.to_dict()))) == request


def test_a_request_shares_no_list_with_the_caller(resolved: Resolved) -> None:
    prompts = ["b"]
    request = make_request(resolved, {"prompt": prompts}, 0, True)
    prompts.append("c")
    assert request.prompts == ("b",)


def test_a_seed_is_drawn_where_none_is_given(resolved: Resolved) -> None:
    drawn = {make_request(resolved, {"seed": None}, 0, True).seed for _ in range(8)}
    assert len(drawn) > 1
    assert all(0 <= seed < 2**32 for seed in drawn)
    assert make_request(resolved, {"seed": 0}, 0, True).seed == 0


def test_none_leaves_an_argument_to_the_pipeline(resolved: Resolved) -> None:
    """An argument of None would reach it otherwise, and most of them are not made for that."""
    left = ("height", "num_images_per_prompt", "num_inference_steps", "guidance_scale")
    request = make_request(resolved, dict.fromkeys(left), 0, True)
    assert not set(left) & set(request.call)
    assert request.images == 1
    assert faults(resolved, hieght=None)[0].startswith("$.call.hieght: ZImagePipeline takes no such argument")


def test_prompts(resolved: Resolved) -> None:
    assert make_request(resolved, {"prompt": ""}, 0, True).prompts == ("",)
    missing = "$.call.prompt: it is missing; write a string, or a list of strings"
    assert faults(resolved, prompt=None) == [missing]
    assert faults(resolved, prompt=[]) == [
        "$.call.prompt: found an empty list; a list of prompts must hold 1 to 1024"
    ]
    assert faults(resolved, prompt=("a", "b"))[0].startswith("$.call.prompt: found a list of 2")
    assert faults(resolved, prompt=["a"] * 1025)[0].startswith("$.call.prompt: found a list of 1025")
    assert faults(resolved, prompt=["a", "b"], negative_prompt=["c"]) == [
        "$.call.negative_prompt: found a list of 1; write one string for all, or a list of 2, one per prompt"
    ]
    assert make_request(resolved, {"prompt": ["a", "b"], "negative_prompt": "c"}, 0, True).images == 2


def test_every_fault_once(resolved: Resolved) -> None:
    found = faults(resolved, prompt=3, heigth=1, width=64.5, seed=-1, latents=object(), generator=None)
    names = ["generator", "heigth", "latents", "prompt", "seed", "width"]
    assert sorted(fault.split(":")[0] for fault in found) == [f"$.call.{name}" for name in names]


def test_as_many_pictures_and_seeds_as_there_are(resolved: Resolved) -> None:
    many = {"prompt": ["a"] * 32, "num_images_per_prompt": 33}
    assert "at most 1024 work" in faults(resolved, **many)[0]
    last = 2**63 - 1
    assert make_request(resolved, {"seed": last}, 0, True).seed == last
    assert (
        f"it must be at most {last - 1} for 2 pictures" in faults(resolved, seed=last, prompt=["a", "b"])[0]
    )
