"""LoRA adapters: the weights of one process and of tensor-parallel slices, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch
from diffusers import WanTransformer3DModel, ZImageTransformer2DModel
from pipeline_jobs import loaded, resolved_for, run
from safetensors.torch import load_file, save_file

from vaepp_sdk.dit.loading import load_sharded
from vaepp_sdk.dit.row import Row
from vaepp_sdk.errors import SpecError, UnsupportedError
from vaepp_sdk.registry import default_registry
from vaepp_sdk.spec import PipelineSpec
from vaepp_sdk.spec.adapters import Adapter

CPU = torch.device("cpu")
COLUMNS, ROWS, WHOLE = "layers.0.attention.to_q", "layers.1.feed_forward.w2", "cap_embedder.1"
RANK = 3


@pytest.fixture(scope="module")
def stored(tiny_model: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(
        tiny_model / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    return found


def factors(stored: dict[str, torch.Tensor], *layers: str, seed: int = 0) -> dict[str, torch.Tensor]:
    random, found = torch.Generator().manual_seed(seed), {}
    for layer in layers:
        out, width = stored[f"{layer}.weight"].shape
        found[f"transformer.{layer}.lora_A.weight"] = torch.randn(RANK, width, generator=random)
        found[f"transformer.{layer}.lora_B.weight"] = torch.randn(out, RANK, generator=random)
    return found


def written(path: Path, state: dict[str, torch.Tensor], **metadata: Any) -> Adapter:
    told = {f"transformer.{key}": value for key, value in metadata.items()}
    save_file(state, path, {"lora_adapter_metadata": json.dumps(told)} if told else None)
    return Adapter(str(path))


def load(
    model: Path,
    *adapters: Adapter,
    index: int = 0,
    size: int = 1,
    pipeline: str = "ZImagePipeline",
    kind: Any = ZImageTransformer2DModel,
) -> dict[str, torch.Tensor]:
    dit = default_registry().pipelines[pipeline].dit
    assert dit is not None
    transformer = load_sharded(
        kind,
        model / "transformer",
        dit.tensor,
        Row(None, index, size),
        dtype=torch.float32,
        device=CPU,
        adapters=adapters,
    )
    found: dict[str, torch.Tensor] = transformer.state_dict()
    return found


def change(state: dict[str, torch.Tensor], layer: str, scale: float) -> torch.Tensor:
    up, down = state[f"transformer.{layer}.lora_B.weight"], state[f"transformer.{layer}.lora_A.weight"]
    return scale * (up.double() @ down.double())


def near(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Up to the rounding of a few additions in float32."""
    return torch.allclose(found.double(), exact, rtol=1e-6, atol=1e-6)


def test_slices_of_all_ranks_are_the_fused_weights(
    tiny_model: Path, tmp_path: Path, stored: dict[str, torch.Tensor]
) -> None:
    one, two = factors(stored, COLUMNS, ROWS, WHOLE), factors(stored, COLUMNS, seed=1)
    adapters = (
        written(tmp_path / "one.safetensors", one, r=RANK, lora_alpha=6),
        Adapter(written(tmp_path / "two.safetensors", two).path, -0.5),
    )
    expected = {layer: stored[f"{layer}.weight"] + change(one, layer, 2) for layer in (COLUMNS, ROWS, WHOLE)}
    expected[COLUMNS] += change(two, COLUMNS, -0.5)
    for size in (1, 2, 4):
        ranks = [load(tiny_model, *adapters, index=index, size=size) for index in range(size)]
        for layer, dim in ((COLUMNS, 0), (ROWS, 1)):
            joined = torch.cat([rank[f"{layer}.weight"] for rank in ranks], dim)
            assert near(joined, expected[layer])
        for rank in ranks:
            assert near(rank[f"{WHOLE}.weight"], expected[WHOLE])
            assert torch.equal(rank["x_pad_token"], stored["x_pad_token"])


def test_slices_of_another_family_are_the_fused_weights(tmp_path: Path) -> None:
    """Norms over all heads and two kinds of attention are no matter to it."""
    tiny_wan.build(tmp_path)
    stored = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    layers = ("blocks.0.attn1.to_q", "blocks.2.ffn.net.2", "condition_embedder.time_embedder.linear_1")
    state = factors(stored, *layers)
    adapter = written(tmp_path / "style.safetensors", state, r=RANK, lora_alpha=6)
    ranks = [
        load(tmp_path, adapter, index=index, size=2, pipeline="WanPipeline", kind=WanTransformer3DModel)
        for index in range(2)
    ]
    columns, rows, whole = (stored[f"{layer}.weight"] + change(state, layer, 2) for layer in layers)
    for layer, dim, wanted in ((layers[0], 0, columns), (layers[1], 1, rows)):
        assert near(torch.cat([rank[f"{layer}.weight"] for rank in ranks], dim), wanted)
    assert all(near(rank[f"{layers[2]}.weight"], whole) for rank in ranks)


def test_other_programs_names_and_strengths_are_read(
    tiny_model: Path, tmp_path: Path, stored: dict[str, torch.Tensor]
) -> None:
    state = factors(stored, COLUMNS)
    renamed = {
        f"diffusion_model.{COLUMNS}.lora_down.weight": state[f"transformer.{COLUMNS}.lora_A.weight"],
        f"diffusion_model.{COLUMNS}.lora_up.weight": state[f"transformer.{COLUMNS}.lora_B.weight"],
        f"diffusion_model.{COLUMNS}.alpha": torch.tensor(1.5),
    }
    found = load(tiny_model, written(tmp_path / "other.safetensors", renamed))
    exact = stored[f"{COLUMNS}.weight"] + change(state, COLUMNS, 1.5 / RANK)
    assert near(found[f"{COLUMNS}.weight"], exact)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state | {"transformer.layers.0.odd": torch.ones(1)}, "layers.0.odd is no factor"),
        (
            lambda state: {key.replace("to_q", "to_z"): value for key, value in state.items()},
            "the transformer has no layer layers.0.attention.to_z",
        ),
        (
            lambda state: {key: value[:, :2].contiguous() for key, value in state.items()},
            "has factors of shapes (3, 2) and (48, 2)",
        ),
        (
            lambda state: {key: value for key, value in state.items() if "lora_B" not in key},
            f"{COLUMNS} has no up projection",
        ),
        (
            lambda state: {
                key: torch.cat([value, value]) if "lora_B" in key else value for key, value in state.items()
            },
            f"{COLUMNS}.weight has the shape (48, 48), and its change (96, 48)",
        ),
        (
            lambda state: state | {f"transformer.{COLUMNS}.alpha": torch.ones(2)},
            f"{COLUMNS} has an alpha of shape (2,)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tiny_model: Path, tmp_path: Path, stored: dict[str, torch.Tensor], spoil: Any, message: str
) -> None:
    adapter = written(tmp_path / "bad.safetensors", spoil(factors(stored, COLUMNS)))
    with pytest.raises(UnsupportedError, match=re.escape(message)) as caught:
        load(tiny_model, adapter)
    assert "bad.safetensors cannot be used" in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(UnsupportedError, match=r"torn.safetensors cannot be used: it cannot be read"):
        load(tiny_model, Adapter(str(tmp_path / "torn.safetensors")))


def test_strengths_that_are_not_known_are_refused(
    tiny_model: Path, tmp_path: Path, stored: dict[str, torch.Tensor]
) -> None:
    adapter = written(tmp_path / "dora.safetensors", factors(stored, COLUMNS), use_dora=True)
    with pytest.raises(UnsupportedError, match="its metadata asks for use_dora"):
        load(tiny_model, adapter)
    adapter = written(tmp_path / "text.safetensors", factors(stored, COLUMNS), lora_alpha="6")
    with pytest.raises(UnsupportedError, match='its metadata gives the strength "6", which is no number'):
        load(tiny_model, adapter)
    metadata = {"lora_adapter_metadata": "[1]"}
    save_file(factors(stored, COLUMNS), tmp_path / "list.safetensors", metadata=metadata)
    with pytest.raises(UnsupportedError, match=r"list.safetensors cannot be used: it cannot be read"):
        load(tiny_model, Adapter(str(tmp_path / "list.safetensors")))


def test_a_spec_names_adapters_beside_it(
    tiny_model: Path, tmp_path: Path, stored: dict[str, torch.Tensor]
) -> None:
    state = factors(stored, COLUMNS, ROWS)
    path = written(tmp_path / "style.safetensors", state).path
    table = {"id": str(tiny_model), "dtype": "float32", "device": "cpu"}
    plain, fused = (
        resolved_for(tiny_model, model=table | {"lora": adapters})
        for adapters in ([], [{"path": path, "weight": 0.5}])
    )
    executor = loaded(fused)
    weights = executor._pipe.transformer.state_dict()
    exact = stored[f"{ROWS}.weight"] + change(state, ROWS, 0.5)
    assert near(weights[f"{ROWS}.weight"], exact)
    before, after = run(loaded(plain), plain).images[0], run(executor, fused).images[0]
    assert before.tobytes() != after.tobytes()
    assert PipelineSpec.load(fused.spec.to_dict()) == fused.spec
    assert fused.spec.to_shareable()["model"]["lora"] == [{"path": "style.safetensors", "weight": 0.5}]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("style.safetensors", 'found "style.safetensors"; write paths'),
        ([3], "found 3; write paths"),
        ([{"path": "a", "strength": 1}], "write paths"),
        ([{"path": "a", "weight": 0}], "found the weight 0; it must be a number other than 0"),
        ([{"path": "a", "weight": True}], "found the weight true"),
        (["style.bin"], "give a file whose name ends in .safetensors"),
    ],
)
def test_a_spec_with_other_adapters_is_refused(tiny_model: Path, lora: Any, message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)) as caught:
        PipelineSpec.load({"model": {"id": str(tiny_model), "lora": lora}})
    assert [fault.path for fault in caught.value.faults] == ["$.model.lora"]
