"""`model.offload = "stages"`: which modules come and go with each stage, and the same picture."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline_jobs import loaded, resolved_for, run
from torch import nn

from vaepp_sdk.errors import SpecError, VaeppWarning
from vaepp_sdk.offload import Residence, pin_device
from vaepp_sdk.registry import default_registry

CPU, AWAY = torch.device("cpu"), torch.device("meta")


class Watched(nn.Module):
    """A module that says where it is sent, and stays where it is."""

    def __init__(self, name: str, moves: list[tuple[str, str]]) -> None:
        super().__init__()
        self.name, self.moves = name, moves

    def to(self, device: torch.device) -> Watched:  # type: ignore[override]
        self.moves.append((self.name, device.type))
        return self


def residence(*names: str) -> tuple[Residence, list[tuple[str, str]]]:
    moves: list[tuple[str, str]] = []
    stages = {"encode_prompt": ("text",), "denoise": ("transformer",), "decode": ("vae",)}
    return Residence({name: Watched(name, moves) for name in names}, stages, AWAY), moves


def test_a_stage_makes_room_before_its_modules_come() -> None:
    found, moves = residence("text", "transformer", "vae")
    for stage in ("encode_prompt", "denoise", "denoise", "decode", "encode_prompt"):
        found.enter(stage)
    assert moves == [
        ("text", "meta"),
        ("text", "cpu"),
        ("transformer", "meta"),
        ("transformer", "cpu"),
        ("vae", "meta"),
        ("vae", "cpu"),
        ("text", "meta"),
    ]


def test_a_rank_without_a_text_encoder_moves_the_rest() -> None:
    found, moves = residence("transformer", "vae")
    for stage in ("encode_prompt", "denoise", "decode"):
        found.enter(stage)
    assert moves == [("transformer", "meta"), ("transformer", "cpu"), ("vae", "meta")]


def test_the_executor_enters_each_stage_and_the_picture_stays(tiny_model: Path) -> None:
    wanted = run(loaded(resolved_for(tiny_model)), resolved_for(tiny_model)).images
    model = {"id": str(tiny_model), "dtype": "float32", "device": "auto", "offload": "stages"}
    resolved = resolved_for(tiny_model, model=model)
    with pytest.warns(VaeppWarning, match=r"model.offload takes no effect: ranks compute on the CPU"):
        executor = loaded(resolved)
    entry = default_registry().pipelines["ZImagePipeline"]
    executor._residence = Residence.of(executor._pipe, entry, CPU)
    moves: list[str] = []
    for name, module in executor._residence.modules.items():
        # They have nowhere to go: on one device only the calls show what would.
        vars(module)["to"] = lambda _, name=name: moves.append(name)
    for image, whole in zip(run(executor, resolved).images, wanted, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(whole))
    assert moves == ["text_encoder", "text_encoder", "transformer", "transformer", "vae"]


def test_a_pipeline_is_told_where_it_computes(tiny_model: Path) -> None:
    pipe = loaded(resolved_for(tiny_model))._pipe
    pin_device(pipe, AWAY)
    assert (pipe.device, pipe._execution_device) == (AWAY, AWAY)
    assert type(pipe).__name__ == "ZImagePipeline"


def test_a_pipeline_without_an_entry_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}', encoding="utf-8")
    model = {"id": str(tmp_path), "offload": "stages"}
    with pytest.raises(SpecError, match=re.escape("$.model.offload: found 'stages', and no plugin says")):
        resolved_for(tmp_path, model=model, call={})
