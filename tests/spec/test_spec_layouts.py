"""Layouts that cannot be are refused for every family before a rank starts, with the sizes that work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
from spec_models import model_folder

from vaepp_sdk.dit_rules import KEYS
from vaepp_sdk.errors import SpecError
from vaepp_sdk.parallel.dims import AXES
from vaepp_sdk.pipeline import prepare
from vaepp_sdk.registry import default_registry
from vaepp_sdk.request import make_request
from vaepp_sdk.resolve import Resolved
from vaepp_sdk.spec import PipelineSpec
from vaepp_sdk.spec.prompts import NamedCall, Upcoming


@attrs.frozen
class Model:
    """A published model.

    Attributes:
        pipeline: its class.
        config: of its transformer, as far as layouts need it.
        heads: attention heads.
        layers: that pipeline parallelism deals, of the shortest list.
        tensor: the sizes that work.
    """

    pipeline: str
    config: Mapping[str, Any]
    heads: int
    layers: int
    tensor: tuple[int, ...]


def sizes_of(**config: Any) -> Mapping[str, Any]:
    return config


CLIP_VAE = {"temperal_downsample": [False, True, True], "scale_factor_spatial": 8, "scale_factor_temporal": 4}
"""What the VAEs of Qwen-Image and Wan say of their scales."""


MODELS: Mapping[str, Model] = {
    "Z-Image": Model(
        "ZImagePipeline", sizes_of(n_heads=30, dim=3840, n_layers=30), heads=30, layers=30, tensor=(2, 5, 10)
    ),
    "FLUX.1": Model(
        "FluxPipeline",
        sizes_of(num_attention_heads=24, attention_head_dim=128, num_layers=19, num_single_layers=38),
        heads=24,
        layers=19,
        tensor=(2, 3, 4, 6, 8, 12, 24),
    ),
    "FLUX.2 [dev]": Model(
        "Flux2Pipeline",
        sizes_of(
            num_attention_heads=48, attention_head_dim=128, num_layers=8, num_single_layers=48, mlp_ratio=3.0
        ),
        heads=48,
        layers=8,
        tensor=(2, 3, 4, 6, 8, 12, 16, 24, 48),
    ),
    "SD3.5 Large": Model(
        "StableDiffusion3Pipeline",
        sizes_of(num_attention_heads=38, attention_head_dim=64, num_layers=38),
        heads=38,
        layers=38,
        tensor=(2, 19, 38),
    ),
    "Qwen-Image": Model(
        "QwenImagePipeline",
        sizes_of(num_attention_heads=24, attention_head_dim=128, num_layers=60),
        heads=24,
        layers=60,
        tensor=(2, 3, 4, 6, 8, 12, 24),
    ),
    "Wan 2.1 14B": Model(
        "WanPipeline",
        sizes_of(
            num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=40, patch_size=[1, 2, 2]
        ),
        heads=40,
        layers=40,
        tensor=(2, 4, 8),
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


def axes_of(name: str) -> tuple[str, ...]:
    plan = default_registry().pipelines[MODELS[name].pipeline].dit
    assert plan is not None
    return plan.axes


def prepared(
    name: str, folder: Path, sizes: Mapping[str, int], call: Mapping[str, Any] | None = None
) -> Resolved:
    """What `vaepp-run` and `Pipeline.from_spec` do before they start or join ranks."""
    model = MODELS[name]
    vae = CLIP_VAE if model.pipeline in ("QwenImagePipeline", "WanPipeline") else None
    path = model_folder(folder / "model", model.pipeline, dict(model.config), vae)
    parallel = {KEYS[axis]: size for axis, size in sizes.items()}
    asked = {"prompt": "a cup", **(call or {})}
    tables = {"model": {"id": str(path)}, "parallel": parallel, "call": asked}
    return prepare(PipelineSpec.load(tables))


def refused(name: str, folder: Path, **sizes: int) -> str:
    with pytest.raises(SpecError) as caught:
        prepared(name, folder, sizes)
    (fault,) = caught.value.faults
    return str(fault)


@each_model
def test_tensor_sizes_that_divide_no_heads_or_widths(name: str, tmp_path: Path) -> None:
    """30 heads on 4 ranks among them."""
    model = MODELS[name]
    for size in range(2, model.heads + 2):
        if size in model.tensor:
            assert prepared(name, tmp_path / str(size), {"tensor": size}).dims.tensor == size
            continue
        told = refused(name, tmp_path / str(size), tensor=size)
        assert told.startswith(f"$.parallel.tensor_parallel_size: {size} does not divide ")
        assert told.endswith(f"; sizes that work: {', '.join(map(str, model.tensor))}")


@each_model
def test_more_stages_than_layers(name: str, tmp_path: Path) -> None:
    layers = MODELS[name].layers
    assert prepared(name, tmp_path / "most", {"pipeline": layers}).dims.pipeline == layers
    assert refused(name, tmp_path / "more", pipeline=layers + 1) == (
        f"$.parallel.pipeline_parallel_size: found {layers + 1}, and the model has layers = {layers}; "
        f"at most {layers} work"
    )


@each_model
def test_more_ulysses_ranks_than_heads(name: str, tmp_path: Path) -> None:
    """Any number of ranks up to the heads works, and tensor parallelism leaves each rank fewer of them."""
    if "ulysses" not in axes_of(name):
        pytest.skip("the entry has no ulysses")
    heads, tensor = MODELS[name].heads, MODELS[name].tensor[0]
    left = heads // tensor
    for number, (sizes, most) in enumerate((({}, heads), ({"tensor": tensor}, left))):
        works = prepared(name, tmp_path / f"{number}", {"ulysses": most, **sizes})
        assert works.dims.dit_parallel_size == heads
        told = refused(name, tmp_path / f"{number} more", ulysses=most + 1, **sizes)
        assert told.startswith(f"$.parallel.ulysses_degree: found {most + 1}, and there are attention heads")
        assert told.endswith(f"to share out; at most {most} work")


@each_model
def test_guidance_has_two_branches(name: str, tmp_path: Path) -> None:
    if "cfg" not in axes_of(name):
        pytest.skip("the model has guidance of another kind")
    assert refused(name, tmp_path, cfg=3) == (
        "$.parallel.cfg_parallel_size: found 3, and guidance has two branches; "
        "write 2, one rank for each branch, or 1"
    )


@each_model
def test_what_the_entry_lacks(name: str, tmp_path: Path) -> None:
    for axis in set(AXES) - set(axes_of(name)):
        told = refused(name, tmp_path / axis, **{axis: 2})
        assert told.startswith(f"$.parallel.{KEYS[axis]}: found 2, and no plugin says how to split ")
        assert f"{MODELS[name].pipeline} can use {', '.join(KEYS[one] for one in axes_of(name))}" in told


@each_model
def test_another_number_of_ranks_than_the_product(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher's 6 ranks for a product of 8."""
    place = {"RANK": "5", "WORLD_SIZE": "6", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for key, value in place.items():
        monkeypatch.setenv(key, value)
    told = "its sizes make 8 ranks and the launcher started 6 (WORLD_SIZE); start 8 ranks, or use sizes whose"
    assert told in refused(name, tmp_path, data=2, pipeline=2, tensor=2)


@each_model
def test_every_fault_is_told_at_once(name: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        prepared(name, tmp_path, {"cfg": 3, "pipeline": MODELS[name].layers + 1, "tensor": 7})
    wanted = [f"$.parallel.{KEYS[axis]}" for axis in ("cfg", "pipeline", "tensor")]
    assert [fault.path for fault in caught.value.faults] == wanted


def test_an_argument_that_a_layout_excludes_is_found_in_every_request(tmp_path: Path) -> None:
    model = MODELS["SD3.5 Large"]
    path = model_folder(tmp_path / "model", model.pipeline, dict(model.config))
    tables = {"model": {"id": str(path)}, "parallel": {"ulysses_degree": 2}}
    layers = {"skip_guidance_layers": [1]}
    told = "it does not work with ulysses_degree=2; leave it out, or use other dimensions: data, cfg, tensor"

    def faults(call: Any, upcoming: Upcoming | None = None) -> list[str]:
        with pytest.raises(SpecError) as caught:
            prepare(PipelineSpec.load({**tables, "call": call}), upcoming=upcoming)
        return [str(fault) for fault in caught.value.faults]

    assert faults({"prompt": "a", **layers}) == [f"$.call.skip_guidance_layers: {told}"]
    later = [{"prompt": "a"}, {"prompt": "b", **layers}, {"prompt": "c"}]
    assert faults(later) == [f"$.call[1].skip_guidance_layers: {told}"]
    line = Upcoming([NamedCall("p:1", "p:1: $", dict(layers))])
    assert faults({"prompt": "a"}, line) == [f"p:1: $.skip_guidance_layers: {told}"]
    resumed = prepare(PipelineSpec.load({**tables, "call": {"prompt": "a", **layers}}), decode_only=True)
    assert make_request(resumed, {}, 0, save=False).call["skip_guidance_layers"] == [1], "it is denoised"


@pytest.mark.parametrize(
    ("name", "sizes", "call", "told"),
    [
        ("Z-Image", {"cfg": 2}, {"guidance_scale": 0.0}, "without guidance there is one picture in a batch"),
        ("Z-Image", {"cfg": 2}, {}, ""),
        ("Z-Image", {"cfg": 2}, {"guidance_scale": 0.0, "prompt": ["a", "b"]}, ""),
        ("Z-Image", {"cfg": 2, "data": 2}, {"guidance_scale": 0.0, "prompt": ["a", "b"]}, "one picture"),
        ("SD3.5 Large", {"cfg": 2}, {"guidance_scale": 1.0}, "without guidance there is one picture"),
        ("SD3.5 Large", {"cfg": 2}, {}, ""),
        ("FLUX.1", {"cfg": 2}, {"true_cfg_scale": 4.0}, "without guidance a step calls the transformer once"),
        ("Wan 2.1 14B", {"cfg": 2}, {"guidance_scale": 1.0}, "without guidance a step calls"),
        ("FLUX.1", {"data": 4}, {"prompt": ["a", "b", "c"]}, "makes 3 pictures, and of 4 replicas 1 have"),
        ("FLUX.1", {"data": 3}, {"num_images_per_prompt": 3}, ""),
    ],
)
def test_sizes_that_work_and_bring_nothing_are_told(
    name: str, sizes: dict[str, int], call: dict[str, Any], told: str, tmp_path: Path
) -> None:
    notices = prepared(name, tmp_path, sizes, call).notices
    own = [notice for notice in notices if notice.startswith("parallel.")]
    assert len(own) == bool(told)
    assert all(told in notice for notice in own)
