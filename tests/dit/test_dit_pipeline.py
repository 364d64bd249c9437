"""Pipeline parallelism: each rank holds a run of the layers, and the bits are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from dims_jobs import Made, check, on
from dit_traffic import traffic
from pipeline_jobs import loaded, resolved_for, run
from torch import nn

from vaepp_sdk.dit import loading
from vaepp_sdk.dit.line import Stage
from vaepp_sdk.dit.loading import load_sharded
from vaepp_sdk.dit.row import Row
from vaepp_sdk.entries import ChainPlan
from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.testing import run_ranks

PLAN = ChainPlan(blocks="layers", carried=("x",), batched=("x", "attn_mask"), sequence={"x": 1})


def layers_of(names: list[str]) -> set[int]:
    return {int(name.split(".")[1]) for name in names if name.startswith("layers.")}


@pytest.mark.parametrize("size", [2, 4])
def test_pictures_are_the_bits_of_one_process(
    layered_model: Path, one_process: list[Made], size: int
) -> None:
    (found,) = on(size, layered_model, {"pipeline_parallel_size": size})
    check(found, one_process, exact=True)
    held = [layers_of(rank["weights"]) for rank in found]
    assert held == {2: [{0, 1, 2}, {3, 4}], 4: [{0, 1}, {2}, {3}, {4}]}[size]
    assert all(rank["groups"] == 0 for rank in found)


def counted_rank(rank: int, model: str) -> Any:
    resolved = resolved_for(model, parallel={"pipeline_parallel_size": 2})
    executor = loaded(resolved)
    order: list[Any] = []
    with traffic() as seen:
        block = executor._pipe.transformer.layers[rank]
        block.register_forward_pre_hook(lambda *_: order.append(len(seen.get("send", ()))))
        run(executor, resolved, num_inference_steps=1, num_images_per_prompt=2)
    return seen, order


def test_bytes_of_a_step_and_parts_of_the_batch(tiny_model: Path) -> None:
    """Each picture goes on alone, so that the second is worked on while the first is in the next stage."""
    (first, order), (last, _) = run_ranks(2, counted_rank, str(tiny_model))
    one = (64 + 64) * 48 * 4  # tokens of text and picture, channels, bytes
    assert first.pop("send") == [one, one]
    assert order == [0, 1], "the first picture is sent before the second is begun"
    assert last.pop("broadcast") == [2 * one]
    assert not first
    assert not last


def test_weights_of_other_stages_are_never_read(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    parts = loading._parts

    def spy(files: Any, shards: Any) -> Any:
        for key, tensor in parts(files, shards):
            read.append(key)
            yield key, tensor

    monkeypatch.setattr(loading, "_parts", spy)
    model = load_sharded(
        ZImageTransformer2DModel,
        tiny_model / "transformer",
        None,
        Row(None, 0, 1),
        dtype=torch.float32,
        device=torch.device("cpu"),
        stages=(Stage(PLAN, Row(None, 1, 2)),),
    )
    assert layers_of(read) == layers_of(list(model.state_dict())) == {1}
    assert sorted(read) == sorted(model.state_dict())


def test_more_stages_than_layers_are_refused() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(UnsupportedError, match="pipeline_parallel_size=2 is more than the 1 layers"):
        Stage(PLAN, Row(None, 0, 2)).keep_own(model)
