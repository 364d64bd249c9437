"""`Pipeline` in a plain script: real ranks on a small model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
from PIL import ImageChops
from runtime.processes import wait_until_gone

from vaepp_sdk import Pipeline, SpecError, VaeppWarning
from vaepp_sdk.errors import RequestError, RunError
from vaepp_sdk.request import Request, make_request
from vaepp_sdk.resolve import Resolved
from vaepp_sdk.runtime.pool import WorkerPool


def spec(model: Path, **tables: Any) -> dict[str, Any]:
    return {
        "model": {"id": str(model), "dtype": "float32", "device": "cpu"},
        "parallel": {"tensor_parallel_size": 2, "vae_patch_parallel_size": 2},
        "vae": {"vae_use_tiling": True},
        "call": {
            "prompt": "a red cube",
            "height": 96,
            "width": 64,
            "num_inference_steps": 2,
            "max_sequence_length": 64,
        },
        **tables,
    }


def unchecked_request(resolved: Resolved, call: Mapping[str, Any], number: int, saves: bool) -> Request:
    """What would fail on ranks is refused before it reaches them; this lets it through."""
    request = make_request(resolved, {}, number, saves)
    return attrs.evolve(request, call={**request.call, **call})


def test_one_pipeline_serves_many_calls(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    output = {"dir": str(tmp_path / "out")}
    with Pipeline.from_spec(
        spec(tiny_model, output=output), on_event=lambda event: events.append(event.stage)
    ) as pipe:
        assert isinstance(pipe._engine, WorkerPool)
        pids = pipe._engine.pids()
        first = pipe(seed=3)
        again = pipe(seed=3)
        other = pipe(seed=4, width=128)
        drawn = pipe()
        (picture,), (same,) = first.images, again.images
        assert picture.size == (64, 96)
        assert ImageChops.difference(picture, same).getbbox() is None, "a picture depends on its seed only"
        assert other.images[0].size == (128, 96)
        assert (first.seed, other.seed) == (3, 4)
        assert len({first.seed, other.seed, drawn.seed}) == 3
        assert len({*first.files, *again.files, *other.files, *drawn.files}) == 4
        assert all(Path(file).is_file() for result in (first, drawn) for file in result.files)
        assert [end.stage for end in first.stages[1]][:4] == ["load", "encode_prompt", "denoise", "decode"]
        assert [end.stage for end in again.stages[0]] == ["encode_prompt", "denoise", "decode", "save"]
        assert {"load", "denoise", "decode"} <= set(events)
        with pytest.raises(SpecError, match=r"\$\.call\.height"):
            pipe(height="96")
        with pytest.raises(SpecError, match=r"found 100; multiples of 16 work; 96 and 112 are nearest"):
            pipe(height=100)
        with monkeypatch.context() as unchecked:
            unchecked.setattr("vaepp_sdk.pipeline.make_request", unchecked_request)
            with pytest.raises(RequestError, match=r"in stage encode_prompt, .*: OverflowError: "):
                pipe(max_sequence_length=-1)  # the one rank that encodes tells the other
        assert len(pipe(seed=3).images) == 1, "a refused call harms nobody, nor does one that fails alike"
    assert wait_until_gone(pids, 0) == []
    with pytest.raises(RunError, match="closed"):
        pipe()


def test_one_rank_is_a_process_too_and_nothing_is_saved_unasked(tiny_model: Path, tmp_path: Path) -> None:
    parallel = {"vae_patch_parallel_size": 2}
    with pytest.warns(VaeppWarning, match="larger than the DiT group of 1"):
        pipe = Pipeline.from_spec(spec(tiny_model, parallel=parallel))
    result = pipe(prompt=["a cup", "a cat"], seed=1)
    assert len(result.images) == 2
    assert result.files == ()
    assert len(result.notices) == 1
    assert isinstance(pipe._engine, WorkerPool)
    assert len(pipe._engine.pids()) == 1
    pipe.close()
    pipe.close()


def test_a_bad_spec_starts_nothing(tiny_model: Path) -> None:
    with pytest.raises(SpecError, match=r"\$\.parallel\.tensor_parallel_size"):
        Pipeline.from_spec(spec(tiny_model), ["parallel.tensor_parallel_size=0"])
