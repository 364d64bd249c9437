"""One rank of each replica encodes the prompts; the others hold no text encoder and get the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_jobs import CALL, loaded, resolved_for, run

from vaepp_sdk.dit.prompts import PromptShare
from vaepp_sdk.errors import OutputError, RankError, UnsupportedError
from vaepp_sdk.parallel.dims import ParallelDims
from vaepp_sdk.parallel.group import DiTGroup
from vaepp_sdk.testing import run_ranks

LAYOUTS: tuple[dict[str, int], ...] = (
    {"tensor_parallel_size": 2, "ulysses_degree": 2},
    {"data_parallel_size": 2, "cfg_parallel_size": 2},
    {"ring_degree": 2, "pipeline_parallel_size": 2},
)
REQUEST: dict[str, Any] = {
    "prompt": ["a city", "cats on a beach at night"],
    "negative_prompt": "blur",
    "guidance_scale": 4.0,
}


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for item in items for tensor in tensors(item)]


def layout_rank(rank: int, model: str) -> list[dict[str, Any]]:
    found = []
    for sizes in LAYOUTS:
        resolved = resolved_for(model, parallel=dict(sizes))
        executor = loaded(resolved)
        stages: Any = executor._stages
        seen: list[torch.Tensor] = []
        denoise, encode = stages.denoise, stages.encode_prompt
        calls = {"encoded": 0}

        def watched(pipe: Any, call: Any, *rest: Any, denoise: Any = denoise, seen: Any = seen) -> Any:
            seen += tensors({key: call[key] for key in ("prompt_embeds", "negative_prompt_embeds")})
            return denoise(pipe, call, *rest)

        def counted(pipe: Any, call: Any, encode: Any = encode, calls: Any = calls) -> Any:
            calls["encoded"] += 1
            return encode(pipe, call)

        stages.denoise, stages.encode_prompt = watched, counted
        run(executor, resolved, **REQUEST)
        found.append(
            {"encoder": executor._pipe.text_encoder is not None, "seen": seen, "encoded": calls["encoded"]}
        )
    return found


def test_one_rank_of_each_replica_encodes_for_all(tiny_model: Path) -> None:
    whole = loaded(resolved_for(tiny_model))
    assert whole._stages is not None
    wanted = whole._stages.encode_prompt(whole._pipe, dict(CALL) | REQUEST)
    everyone = run_ranks(4, layout_rank, str(tiny_model), timeout=600)
    for index, sizes in enumerate(LAYOUTS):
        replicas = sizes.get("data_parallel_size", 1)
        first = [rank % (4 // replicas) == 0 for rank in range(4)]
        assert [rank[index]["encoder"] for rank in everyone] == first
        assert [rank[index]["encoded"] for rank in everyone] == [int(is_first) for is_first in first]
        for number, rank in enumerate(everyone):
            expected = tensors(wanted)
            if replicas == 2:  # each replica has one of the two prompts, and what stands against it
                expected = expected[number // 2 :: 2]
            assert len(rank[index]["seen"]) == len(expected)
            for found, one in zip(rank[index]["seen"], expected, strict=True):
                # A batch of another size rounds otherwise; the same one gives the same bits.
                assert torch.equal(found, one) if replicas == 1 else torch.allclose(found, one, atol=1e-5)


VALUES: dict[str, Any] = {
    "half": torch.arange(5, dtype=torch.bfloat16),
    "mask": torch.tensor([[True], [False]]),
    "wide": [torch.arange(3), {"deep": torch.ones(2, 3, dtype=torch.float64)}],
    "none": None,
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5),
    "plain": [1, 2.5, "text", True],
}


def fails(error: Exception) -> dict[str, Any]:
    raise error


def share_rank(rank: int) -> tuple[bool, list[str]]:
    group = DiTGroup.create(ParallelDims(cfg=2, ulysses=2), torch.device("cpu"))
    share = PromptShare.over(group)
    assert share.encodes == (rank == 0)
    found = share.share(lambda: VALUES)
    pairs = zip(tensors(found), tensors(VALUES), strict=True)
    same = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    with pytest.raises(UnsupportedError) as odd:
        share.share(lambda: {"odd": object()})
    with pytest.raises(UnsupportedError) as refused:
        share.share(lambda: fails(OutputError("no such prompt")))
    with pytest.raises(RankError) as failed:
        share.share(lambda: fails(KeyError("style\nof old")))
    assert (failed.value.rank, failed.value.stage, failed.value.harmless) == (rank, "encode_prompt", True)
    told = [str(odd.value), str(refused.value), failed.value.cause]
    return same and found["none"] is None and found["plain"] == VALUES["plain"], told


def test_values_arrive_as_they_are_and_others_are_refused_on_all_ranks() -> None:
    found = run_ranks(4, share_rank)
    assert all(same for same, _ in found)
    assert all(
        told
        == [
            "'odd' of the encoded prompts holds what cannot be sent to ranks: object",
            "no such prompt",
            r"KeyError: 'style\nof old'",
        ]
        for _, told in found
    )
