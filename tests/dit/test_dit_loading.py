"""A rank's slices of the safetensors files: what is read, and which files are refused. No ranks needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from pipeline_jobs import resolved_for
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vaepp_plugins.tiny_z_image import build

from vaepp_sdk.assembly import build_pipeline
from vaepp_sdk.dit import loading
from vaepp_sdk.dit.loading import load_sharded, weight_files
from vaepp_sdk.dit.row import Row
from vaepp_sdk.entries import TensorPlan
from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.parallel.group import DiTGroup
from vaepp_sdk.registry import default_registry

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def plan() -> TensorPlan:
    dit = default_registry().pipelines["ZImagePipeline"].dit
    assert dit is not None
    assert dit.tensor is not None
    return dit.tensor


def load(
    folder: Path,
    index: int = 0,
    size: int = 2,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Any:
    group = Row(None, index, size)
    return load_sharded(
        ZImageTransformer2DModel, folder, plan(), group, dtype=dtype, device=CPU, variant=variant
    )


@pytest.fixture
def transformer(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_model / "transformer", tmp_path / "transformer"))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_slices_of_all_ranks_are_the_stored_weights(tiny_model: Path, size: int) -> None:
    stored = load_file(tiny_model / "transformer" / WEIGHTS)
    ranks = [load(tiny_model / "transformer", index, size).state_dict() for index in range(size)]
    assert set(ranks[0]) == set(stored)
    cut = 0
    for key, whole in stored.items():
        parts = [rank[key] for rank in ranks]
        if parts[0].shape == whole.shape:
            assert all(torch.equal(part, whole) for part in parts)
            continue
        dim = next(d for d in (0, 1) if parts[0].shape[d] != whole.shape[d])
        assert torch.equal(torch.cat(parts, dim), whole), key
        cut += 1
    assert cut == (0 if size == 1 else 6 * 7)


def test_a_rank_reads_its_own_slices_only(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count what the files hand out: whole tensors, and slices of the cut ones."""
    handed: dict[str, int] = {}
    opened: Any = safe_open

    class Slice:
        def __init__(self, inner: Any, key: str) -> None:
            self._inner, self._key = inner, key

        def __getitem__(self, index: Any) -> torch.Tensor:
            tensor: torch.Tensor = self._inner[index]
            handed[self._key] = handed.get(self._key, 0) + tensor.numel()
            return tensor

    class File:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._context = opened(*args, **kwargs)

        def __enter__(self) -> File:
            self._file = self._context.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self._context.__exit__(*args)

        def keys(self) -> Any:
            return self._file.keys()

        def get_slice(self, key: str) -> Slice:
            return Slice(self._file.get_slice(key), key)

        def get_tensor(self, key: str) -> torch.Tensor:
            tensor: torch.Tensor = self._file.get_tensor(key)
            handed[key] = handed.get(key, 0) + tensor.numel()
            return tensor

    monkeypatch.setattr(loading, "safe_open", File)
    model = load(tiny_model / "transformer", 1, 4)
    assert handed == {key: value.numel() for key, value in model.state_dict().items()}
    assert handed["layers.0.feed_forward.w2.weight"] == 48 * 128 // 4


def test_many_files_with_an_index_give_the_same_weights(tiny_model: Path, tmp_path: Path) -> None:
    """The same seed gives the same weights, in files of at most 300 KB."""
    split = build(tmp_path / "split", vae_width=8, sample_size=64, max_shard_size="300KB") / "transformer"
    assert len(set(weight_files(split).values())) > 2
    one, many = load(tiny_model / "transformer", 1), load(split, 1)
    assert all(torch.equal(value, many.state_dict()[key]) for key, value in one.state_dict().items())


def test_dtypes_are_as_asked_and_kept_modules_stay_float32(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ZImageTransformer2DModel, "_keep_in_fp32_modules", ["t_embedder"])
    model = load(tiny_model / "transformer", dtype=torch.bfloat16)
    plain = ZImageTransformer2DModel.from_pretrained(tiny_model / "transformer", dtype=torch.bfloat16)
    wanted = {key: value.dtype for key, value in plain.state_dict().items()}
    assert {key: value.dtype for key, value in model.state_dict().items()} == wanted
    assert set(wanted.values()) == {torch.bfloat16, torch.float32}
    assert not model.training


def test_missing_and_unknown_weights_are_named(transformer: Path) -> None:
    state = load_file(transformer / WEIGHTS)
    state["layers.9.extra"] = state.pop("layers.1.feed_forward.w2.weight")
    save_file(state, transformer / WEIGHTS)
    with pytest.raises(
        UnsupportedError, match=r"missing: layers\.1\.feed_forward\.w2\.weight; unknown: layers\.9\.extra"
    ):
        load(transformer)


def test_weights_in_pickles_are_refused(transformer: Path) -> None:
    torch.save({}, transformer / "diffusion_pytorch_model.bin")
    (transformer / WEIGHTS).unlink()
    with pytest.raises(UnsupportedError, match="no weights in safetensors files"):
        load(transformer)


def test_an_index_that_points_elsewhere_is_refused(transformer: Path) -> None:
    (transformer / WEIGHTS).rename(transformer.parent / WEIGHTS)
    index = {"weight_map": {"x_pad_token": f"../{WEIGHTS}"}}
    (transformer / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedError, match="files outside its folder"):
        load(transformer)


def test_quantized_weights_are_refused(transformer: Path) -> None:
    config = json.loads((transformer / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (transformer / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="is quantized"):
        load(transformer)


def test_a_variant_is_read_where_it_exists(transformer: Path) -> None:
    state = load_file(transformer / WEIGHTS)
    save_file(
        {key: value + 1 for key, value in state.items()}, transformer / WEIGHTS.replace(".", ".fp16.", 1)
    )
    plain, variant = load(transformer), load(transformer, variant="fp16")
    assert torch.equal(variant.state_dict()["x_pad_token"], plain.state_dict()["x_pad_token"] + 1)
    assert torch.equal(load(transformer, variant="ema").x_pad_token, plain.x_pad_token)


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_a_pipeline_with_pickled_weights_is_refused(tiny_model: Path, tmp_path: Path, component: str) -> None:
    """By each rank too: of a pipeline without an entry, nobody knows before what has weights."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    resolved = resolved_for(folder)
    for file in (folder / component).glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(UnsupportedError, match=rf"{component} has its weights in .*\.bin only"):
        build_pipeline(resolved, DiTGroup.create(resolved.dims, CPU))
