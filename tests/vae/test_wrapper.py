"""The drop-in autoencoder on real ranks: what people's scripts do with `pipe.vae`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from vae.scenes import error_of, latents, said, tiled
from vae_models import tiny_kl

from vaepp_sdk import parallelize_vae
from vaepp_sdk.testing import run_ranks
from vaepp_sdk.vae.landing import ShardedSample
from vaepp_sdk.vae.wrapper import ParallelVAE


def scene_delegation(rank: int) -> dict[str, Any]:
    vae = tiny_kl()
    wrapped, _ = said(lambda: parallelize_vae(vae, strategy="tile"))
    wrapped.disable_tiling()
    off = vae.use_tiling
    wrapped.enable_tiling()
    wrapped.tile_sample_min_size = 48
    wrapped.tile_latent_min_size = 6
    wrapped.use_slicing = True
    found = wrapped.decode(latents(batch=2)).sample
    assert wrapped.last_plan is not None
    return {
        "switched": (off, vae.use_tiling, vae.use_slicing),
        "set there": (vae.tile_sample_min_size, vae.tile_latent_min_size),
        "used": wrapped.last_plan.rows[0].length,
        "same": torch.equal(found, vae.decode(latents(batch=2)).sample),
        "same object": wrapped.config is vae.config and wrapped.vae is vae,
        "like": (wrapped.dtype, wrapped.device) == (vae.dtype, vae.device),
        "missing": error_of(lambda: wrapped.no_such_thing),
        "forward": error_of(lambda: wrapped(latents())),
        "argument": error_of(lambda: wrapped.decode(latents(), temb=3)),
        "is": type(wrapped) is ParallelVAE,
    }


def scene_return(rank: int) -> dict[str, Any]:
    vae = tiled(quant=True)
    wrapped = parallelize_vae(vae, strategy="tile")
    pictures = torch.randn(1, 3, 96, 72, generator=torch.Generator().manual_seed(1))
    posterior = wrapped.encode(pictures).latent_dist
    (as_tuple,) = wrapped.encode(pictures, return_dict=False)
    return {
        "decode": torch.equal(
            wrapped.decode(latents(), return_dict=False)[0], vae.decode(latents(), return_dict=False)[0]
        ),
        "generator": wrapped.decode(latents(), generator=torch.Generator()).sample.shape,
        "mode": torch.equal(posterior.mode(), vae.encode(pictures).latent_dist.mode()),
        "tuple": torch.equal(as_tuple.mode(), posterior.mode()),
        "no grad": not wrapped.decode(latents().requires_grad_()).sample.requires_grad,
    }


def scene_sizes(rank: int) -> dict[str, Any]:
    vae = tiled()
    larger, warned = said(lambda: parallelize_vae(vae, size=5))
    _, later = said(lambda: larger.decode(latents()))
    alone, silent = said(lambda: parallelize_vae(tiny_kl(), size=1))
    return {
        "larger": warned,
        "later": later,
        "size": larger._group.size,
        "alone": (type(alone).__name__, alone.use_tiling, silent),
        "zero": error_of(lambda: parallelize_vae(vae, size=0)),
        "text": error_of(lambda: parallelize_vae(vae, size="2")),  # type: ignore[arg-type]
    }


def scene_tiling_off(rank: int) -> dict[str, Any]:
    vae = tiny_kl()
    _, warned = said(lambda: parallelize_vae(vae, strategy="tile"))
    return {"warned": warned, "on": vae.use_tiling}


def scene_outputs(rank: int) -> dict[str, Any]:
    vae = tiled()
    expected = vae.decode(latents()).sample.detach()
    pictures = torch.randn(1, 3, 96, 72, generator=torch.Generator().manual_seed(1))
    first = parallelize_vae(vae, strategy="tile", output="rank0")
    left = parallelize_vae(vae, strategy="tile", output="sharded").decode(latents()).sample
    assert isinstance(left, ShardedSample)
    return {
        "rank0": tuple(first.decode(latents()).sample.shape),
        "rank0 encode": tuple(first.encode(pictures).latent_dist.parameters.shape),
        "shape": left.shape == tuple(expected.shape),
        "pieces": [torch.equal(piece.tensor, expected[(..., *piece.box.slices)]) for piece in left.pieces],
        "no posterior": error_of(lambda: getattr(left, "sample")),  # noqa: B009  # as a pipeline would
        "unknown": error_of(lambda: parallelize_vae(vae, output="rank1")),  # type: ignore[arg-type]
    }


def scene_refused(rank: int) -> dict[str, Any]:
    vae = tiled()
    wrapped = parallelize_vae(vae, strategy="tile")
    found = {
        "class": error_of(lambda: parallelize_vae(nn.Linear(2, 2))),
        "strategy": error_of(lambda: parallelize_vae(vae, strategy="TILE")),
        "option": error_of(lambda: parallelize_vae(vae, strategy="tile", tile_sise=64)),
        "kind": error_of(lambda: parallelize_vae(vae, strategy="tile", tile_size="64")),
        "auto": error_of(lambda: parallelize_vae(vae, tile_size=64)),
        "rank": error_of(lambda: wrapped.decode(latents()[0])),
        "channels": error_of(lambda: wrapped.decode(latents()[:, :4])),
        "empty": error_of(lambda: wrapped.decode(latents()[:, :, :0])),
        "dtype": error_of(lambda: wrapped.decode(latents(torch.bfloat16))),
        "encode": error_of(lambda: wrapped.encode(latents())),
        "geometry": error_of(lambda: parallelize_vae(vae, strategy="tile", tile_size=20)),
    }
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = error_of(lambda: wrapped.decode(latents()))
    found["after"] = (str(torch.equal(wrapped.decode(latents()).sample, vae.decode(latents()).sample)), "")
    return found


def scene_disagree(rank: int) -> dict[str, Any]:
    vae = tiled()
    wrapped = parallelize_vae(vae, strategy="tile")
    own = torch.randn(1, 16, 13, 11, generator=torch.Generator().manual_seed(rank))
    return {
        "latents": error_of(lambda: wrapped.decode(own)),
        "pictures": error_of(lambda: wrapped.encode(own[:, :3])),
        "shape": error_of(lambda: wrapped.decode(own[:, :, rank:])),
        "after": torch.equal(wrapped.decode(latents()).sample, vae.decode(latents()).sample),
        "size": error_of(lambda: parallelize_vae(vae, size=rank + 1)),
        "strategy": error_of(lambda: parallelize_vae(vae, strategy=["tile", "patch"][rank])),
        "bad on one": error_of(lambda: parallelize_vae(vae, output=["all", "nowhere"][rank])),  # type: ignore[arg-type]
    }


class CountingHook(ModelHook):  # type: ignore[misc]  # accelerate has no types
    def __init__(self) -> None:
        self.calls: list[str] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(type(module).__name__)
        return args, kwargs


def scene_hooks(rank: int) -> dict[str, Any]:
    """accelerate's offload hooks, on the VAE before it is wrapped and on the wrapper afterwards."""
    inner, outer = CountingHook(), CountingHook()
    vae = tiled()
    add_hook_to_module(vae, inner)
    hooked = vae.forward
    wrapped = parallelize_vae(vae, strategy="tile")
    seen_through = wrapped._hf_hook is inner
    wrapped.decode(latents())
    add_hook_to_module(wrapped, outer)
    untouched = vae.forward == hooked and wrapped._hf_hook is outer and vae._hf_hook is inner
    wrapped.decode(latents())
    remove_hook_from_module(wrapped, recurse=True)
    clean = not hasattr(wrapped, "_hf_hook") and not hasattr(vae, "_old_forward")
    wrapped.decode(latents())
    return {
        "inner": inner.calls,
        "outer": outer.calls,
        "seen through": seen_through,
        "untouched": untouched,
        "clean": clean,
        "forward": error_of(lambda: wrapped(latents()))[0],
        "vae": vae(torch.zeros(1, 3, 64, 64)).sample.shape,
    }


def scene_upcast(rank: int) -> dict[str, Any]:
    """What SDXL's pipeline does with a float16 VAE that must run in float32."""
    vae = tiled(quant=True, dtype=torch.float16, force_upcast=True)
    wrapped = parallelize_vae(vae, strategy="tile")
    needed = wrapped.dtype == torch.float16 and wrapped.config.force_upcast
    wrapped.to(dtype=torch.float32)
    z = latents(torch.float16).to(next(iter(wrapped.post_quant_conv.parameters())).dtype)
    found = wrapped.decode(z, return_dict=False)[0]
    same = torch.equal(found, vae.decode(z, return_dict=False)[0])
    wrapped.to(dtype=torch.float16)
    return {"needed": needed, "same": same, "dtype": found.dtype, "back": vae.dtype}


SCENES = {
    name.removeprefix("scene_"): scene
    for name, scene in sorted(globals().items())
    if name.startswith("scene_")
}


def play(rank: int) -> dict[str, Any]:
    with torch.no_grad():
        return {name: scene(rank) for name, scene in SCENES.items()}


@pytest.fixture(scope="module")
def played() -> list[dict[str, Any]]:
    """Every scene on two ranks, in one launch."""
    found: list[dict[str, Any]] = run_ranks(2, play)
    return found


@pytest.fixture
def both(played: list[dict[str, Any]], request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Both ranks' records of the scene that the test is named after."""
    name = request.node.name.removeprefix("test_")
    return [rank[name] for rank in played]


def test_delegation(both: list[dict[str, Any]]) -> None:
    for seen in both:
        assert seen["switched"] == (False, True, True)
        assert seen["set there"] == (48, 6)
        assert seen["used"] == 6
        assert seen["same"]
        assert seen["same object"]
        assert seen["like"]
        assert seen["is"]
        assert seen["missing"][0] == "AttributeError"
        assert "no_such_thing" in seen["missing"][1]
        assert seen["forward"][0] == "NotImplementedError"
        assert "temb" in seen["argument"][1]


def test_return(both: list[dict[str, Any]]) -> None:
    for seen in both:
        assert seen["decode"]
        assert seen["mode"]
        assert seen["tuple"]
        assert seen["no grad"]
        assert seen["generator"] == (1, 3, 104, 88)


def test_sizes(both: list[dict[str, Any]]) -> None:
    larger = "size=5 is larger than the group of 2; reduced to 2."
    assert [seen["larger"] for seen in both] == [[larger], []]
    for seen in both:
        assert seen["later"] == []
        assert seen["size"] == 2
        assert seen["alone"] == ("AutoencoderKL", False, [])
        assert seen["zero"] == ("UnsupportedError", "size is 0; it must be an integer from 1 to 2")
        assert seen["text"][0] == "UnsupportedError"


def test_tiling_off(both: list[dict[str, Any]]) -> None:
    assert [len(seen["warned"]) for seen in both] == [1, 0]
    assert "the VAE's tiling is switched on" in both[0]["warned"][0]
    assert all(seen["on"] for seen in both)


def test_outputs(both: list[dict[str, Any]]) -> None:
    assert [seen["rank0"] for seen in both] == [(1, 3, 104, 88), (0, 3, 104, 88)]
    assert [seen["rank0 encode"] for seen in both] == [(1, 32, 12, 9), (0, 32, 12, 9)]
    for seen in both:
        assert seen["shape"]
        assert seen["pieces"]
        assert all(seen["pieces"])
        kind, words = seen["no posterior"]
        assert kind == "AttributeError"
        assert words.startswith("an output that was left sharded has no 'sample': each rank holds its own")
        assert "'rank0', 'all' or 'sharded'" in seen["unknown"][1]


def test_refused(both: list[dict[str, Any]]) -> None:
    assert both[0] == both[1]
    seen = both[0]
    assert seen.pop("after") == ("True", "")
    for what, (error, _) in seen.items():
        assert error == "UnsupportedError", what
    words = {
        "class": "no plugin registers the VAE class 'Linear'",
        "strategy": "no plugin registers the strategy 'TILE'",
        "option": "did you mean 'tile_size'?",
        "kind": "it must be an integer",
        "auto": "name a strategy",
        "rank": "latents of shape (batch, 16, rows, columns); found (16, 13, 11)",
        "channels": "found (1, 4, 13, 11)",
        "empty": "none of them 0",
        "dtype": "found torch.bfloat16: convert with .to(vae.dtype)",
        "encode": "pictures of shape (batch, 3, rows, columns)",
        "geometry": "multiple of 8",
        "autocast": "does not run under autocast",
    }
    assert {what: part for what, part in words.items() if part not in seen[what][1]} == {}


def test_disagree(both: list[dict[str, Any]]) -> None:
    for seen in both:
        for what in ("size", "strategy", "bad on one"):
            assert seen[what][0] == "AgreementError", what
            assert "different arguments on ranks" in seen[what][1]
        for what, before in (("latents", "decoding"), ("pictures", "encoding")):
            kind, words = seen[what]
            assert kind == "AgreementError"
            said = (
                f"ranks do not agree before {before}: the input (seed all ranks alike, or broadcast it) is "
            )
            assert words.startswith(f"{said}float32 [1, ")
        assert "the work plan is tile" in seen["shape"][1]
        assert seen["after"]


def test_hooks(both: list[dict[str, Any]]) -> None:
    for seen in both:
        assert seen["inner"] == ["AutoencoderKL"] * 2
        assert seen["outer"] == ["ParallelVAE"]
        assert seen["seen through"]
        assert seen["untouched"]
        assert seen["clean"]
        assert seen["forward"] == "NotImplementedError"
        assert seen["vae"] == (1, 3, 64, 64)


def test_upcast(both: list[dict[str, Any]]) -> None:
    for seen in both:
        assert seen == {"needed": True, "same": True, "dtype": torch.float32, "back": torch.float16}


def in_a_pipeline(rank: int, folder: str) -> Any:
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_tiling()

    def picture() -> torch.Tensor:
        call = {"height": 128, "width": 96, "num_inference_steps": 2, "max_sequence_length": 64}
        generator = torch.Generator("cpu").manual_seed(3)
        found: torch.Tensor = pipe(
            prompt="a lighthouse", generator=generator, output_type="pt", **call
        ).images
        return found

    alone = picture()
    pipe.vae = parallelize_vae(pipe.vae)
    together = picture()
    return torch.equal(alone, together), type(pipe.vae).__name__, pipe.vae.last_plan.strategy


def test_in_a_pipeline(tmp_path: Path) -> None:
    from vaepp_plugins import tiny_z_image

    folder = tiny_z_image.build(tmp_path / "model", sample_size=64)
    for seen in run_ranks(2, in_a_pipeline, str(folder)):
        assert seen == (True, "ParallelVAE", "tile")
