"""The executor on several ranks: where pictures land, what they are, and who fails."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_jobs import loaded, resolved_for, run
from torch.distributed import distributed_c10d

from vaepp_sdk.errors import PeerError, RankError, UnsupportedError, VaeppWarning
from vaepp_sdk.events import Progress
from vaepp_sdk.executor import Executor
from vaepp_sdk.registry import default_registry
from vaepp_sdk.resolve import Resolved
from vaepp_sdk.testing import run_ranks
from vaepp_sdk.vae.wrapper import ParallelVAE

SHORT = "cats"


@attrs.frozen
class Job:
    """One executor and one request on every rank."""

    name: str
    vae_size: int
    vae: Mapping[str, Any] = attrs.field(factory=dict)
    call: Mapping[str, Any] = attrs.field(factory=dict)


def jobs(ranks: int) -> list[Job]:
    """Tiles have 64 pixels, so 128 x 128 is tiled and 64 x 64 is not."""
    two = {"prompt": ["a city", SHORT], "guidance_scale": 4.0}
    found = [
        Job("plain-rank0", 1),
        Job("plain-all", 1, {"output": "all"}),
        Job("tile-rank0", ranks, {"strategy": "tile"}, two),
        Job("tile-all", ranks, {"strategy": "tile", "output": "all"}, {"num_images_per_prompt": 2}),
        Job("tile-sharded", ranks, {"strategy": "tile", "output": "sharded"}, two),
        Job("tile-slicing", ranks, {"strategy": "tile", "vae_use_slicing": True}, two),
        Job("patch-rank0", ranks, {"strategy": "patch"}),
        Job("patch-all", ranks, {"strategy": "patch", "output": "all"}),
        Job("shard-rank0", ranks, {"strategy": "shard"}),
        Job("auto-small", ranks, {}, {"height": 64, "width": 64}),
    ]
    if ranks == 4:
        found += [
            Job("tile-two-of-four", 2, {"strategy": "tile"}),
            Job("patch-three-of-four", 3, {"strategy": "patch"}),
        ]
    return found


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(int)


def rank_job(rank: int, model: str, folder: str, tensor: int, todo: list[Job]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for job in todo:
        events: list[Any] = []
        resolved = resolved_for(
            model,
            parallel={"tensor_parallel_size": tensor, "vae_patch_parallel_size": job.vae_size},
            vae=dict(job.vae),
            output={"dir": f"{folder}/{job.name}"},
        )
        executor = loaded(resolved, observer=events.append)
        result = run(executor, resolved, save=True, **job.call)
        assert executor._decoder is not None
        found[job.name] = {
            "images": [pixels(image) for image in result.images],
            "files": [Path(file).name for file in result.files],
            "stages": [end.stage for end in result.stages],
            "parallel": isinstance(executor._decoder.vae, ParallelVAE),
            "progress": [
                event for event in events if isinstance(event, Progress) and event.stage == "decode"
            ],
            "groups": len(distributed_c10d._world.pg_map),
            "sent": sent_as_floats_too(rank, executor, resolved, job),
        }
    return found


def sent_as_floats_too(rank: int, executor: Executor, resolved: Resolved, job: Job) -> dict[str, Any]:
    """The same request without the conversion before pictures travel; empty where they do not travel."""
    decoder = executor._decoder
    assert decoder is not None
    if decoder.pixels is None or not isinstance(decoder.vae, ParallelVAE):
        return {}
    group, found = decoder.vae.descent.group, {}
    for name in ("pixels", "floats"):
        if name == "floats":
            decoder.pixels = group.finish = None
        group.traffic.reset()
        images = [pixels(image) for image in run(executor, resolved, **job.call).images]
        plan = decoder.vae.last_plan
        assert plan is not None
        parts = 2 if "slicing" in job.name else 1
        assert group.traffic.nbytes == parts * plan.bytes_sent(rank), job
        found[name] = (images, sum(move.nbytes for move in plan.moves if move.kind == "output"))
    return found


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


def alone(model: str, folder: Path, todo: list[Job]) -> dict[str, Any]:
    """The same requests on one rank, tiled alike: `patch` and `shard` promise the untiled picture."""
    untiled = ("patch", "shard-")
    single = [
        attrs.evolve(job, vae_size=1, vae={"vae_use_tiling": not job.name.startswith(untiled)})
        for job in todo
    ]
    # Plain jobs have tiling off on any number of ranks.
    single = [attrs.evolve(job, vae={}) if "plain" in job.name else job for job in single]
    found: dict[str, Any] = run_ranks(1, rank_job, model, str(folder / "alone"), 1, single)[0]
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_pictures_land_where_output_says(tiny_model: Path, outputs: Path, ranks: int) -> None:
    todo, folder = jobs(ranks), outputs / str(ranks)
    wanted = alone(str(tiny_model), folder, todo)
    found = run_ranks(ranks, rank_job, str(tiny_model), str(folder), ranks, todo, timeout=600)
    for job in todo:
        everyone = [rank[job.name] for rank in found]
        assert {rank["groups"] for rank in everyone} == {1}, "a process group was created"
        assert [rank["parallel"] for rank in everyone] == [job.vae_size > 1] * ranks
        assert all(rank["stages"] == ["encode_prompt", "denoise", "decode", "save"] for rank in everyone)
        for rank in everyone[: job.vae_size if job.vae_size > 1 else 0]:
            assert rank["progress"][-1].done == rank["progress"][-1].total > 0
        for rank in everyone:
            check_pixels(job, rank)
        check_landing(job, everyone, wanted[job.name]["images"], folder / job.name)


def check_pixels(job: Job, rank: dict[str, Any]) -> None:
    """Pictures that traveled as pixels are those that traveled as float32, in a quarter of the bytes."""
    assert bool(rank["sent"]) == (job.vae_size > 1 and job.vae.get("output") != "sharded")
    if rank["sent"]:
        (images, few), (floats, many) = rank["sent"]["pixels"], rank["sent"]["floats"]
        assert 4 * few == many > 0
        for mine, one, other in zip(rank["images"], images, floats, strict=True):
            assert np.array_equal(mine, one)
            assert np.array_equal(one, other), job


def check_landing(job: Job, everyone: list[Any], wanted: list[Any], folder: Path) -> None:
    on_disk = sorted(path.name for path in folder.iterdir())
    assert on_disk == sorted(name for rank in everyone for name in rank["files"])
    output = job.vae.get("output", "rank0")
    if output == "sharded":
        check_pieces(everyone, wanted, folder)
        return
    for index, rank in enumerate(everyone):
        assert len(rank["images"]) == (len(wanted) if output == "all" or index == 0 else 0)
        assert len(rank["files"]) == (len(wanted) if index == 0 else 0)
        for image, whole in zip(rank["images"], wanted, strict=False):
            check_same(job, image, whole)
    for image, name in zip(everyone[0]["images"], everyone[0]["files"], strict=True):
        with Image.open(folder / name) as saved:
            assert np.array_equal(pixels(saved), image)


def check_same(job: Job, image: Any, whole: Any) -> None:
    """Sums over tensor-parallel ranks round in another order: at most one level of 255."""
    assert image.shape == whole.shape
    difference = np.abs(image - whole)
    if "patch" in job.name or job.name == "auto-small":
        # The patch strategy's promise: under 0.5 % of the range in the mean.
        assert difference.mean() / 255 < 0.005, job
    else:
        assert difference.max() <= 1, job


def check_pieces(everyone: list[Any], wanted: list[Any], folder: Path) -> None:
    """Each rank saved its own rectangles; together they are the pictures, each pixel once."""
    joined = [np.full(whole.shape, -1000) for whole in wanted]
    for rank in everyone:
        assert len(rank["images"]) == len(rank["files"]) > 0
        for image, name in zip(rank["images"], rank["files"], strict=True):
            stem = name.removesuffix(".png")
            top, left = (int(part[1:]) for part in stem.split("-")[-2:])
            picture = joined[int(stem[:4])]
            target = picture[top : top + image.shape[0], left : left + image.shape[1]]
            assert (target == -1000).all()
            target[:] = image
            with Image.open(folder / name) as saved:
                assert '"position": {"top": %d, "left": %d' % (top, left) in saved.text["vaepp"]  # type: ignore[attr-defined]  # noqa: UP031
    assert all(np.abs(one - other).max() <= 1 for one, other in zip(joined, wanted, strict=True))


def short_of_memory(module: Any, arguments: tuple[Any, ...]) -> None:
    """A decoder for which 4 x 4 latents are the most that fits."""
    del module
    if not arguments[0].is_meta and arguments[0].shape[-2] * arguments[0].shape[-1] > 16:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def refused_while_loading(model: str) -> str:
    """What is said, before anything is denoised, of tiles that only the loaded VAE shows not to fit."""
    registry = default_registry()
    entry = registry._vaes.entries["AutoencoderKL"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._vaes.entries, entry.name, attrs.evolve(entry, facts=None))
        resolved = resolved_for(
            model,
            parallel={"tensor_parallel_size": 2, "vae_patch_parallel_size": 2},
            vae={"strategy": "tile", "options": {"tile_size": 20}},
        )
    try:
        loaded(resolved)
    except UnsupportedError as error:
        return str(error)
    return "nothing"


def short_rank(rank: int, model: str, folder: str) -> dict[str, Any]:
    """Requests for which rank 1's memory is not enough, and one with the tiles they come to."""
    found: dict[str, Any] = {"refused": refused_while_loading(model)}
    small = {"strategy": "tile", "options": {"tile_size": 32}}
    todo = (("spread", 2, {"strategy": "tile"}), ("plain", 1, {"output": "all"}), ("at once", 2, small))
    for name, size, vae in todo:
        resolved = resolved_for(
            model,
            parallel={"tensor_parallel_size": 2, "vae_patch_parallel_size": size},
            vae=vae,
            output={"dir": f"{folder}/{name}"},
        )
        executor = loaded(resolved)
        if rank == 1 and name != "at once":
            executor._pipe.vae.decoder.register_forward_pre_hook(short_of_memory)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", VaeppWarning)
            result = run(executor, resolved, save=True)
        found[name] = {
            "images": [pixels(image) for image in result.images],
            "files": result.files,
            "notices": result.notices,
            "warned": [str(one.message) for one in caught],
        }
    return found


def test_the_picture_comes_out_where_a_ranks_memory_is_short(tiny_model: Path, tmp_path: Path) -> None:
    everyone = run_ranks(2, short_rank, str(tiny_model), str(tmp_path))
    first = everyone[0]
    sentence = "rank 1 ran out of memory with strategy 'tile'; going on with strategy 'tile' (tile_size = 32)"
    for rank, found in enumerate(everyone):
        assert "20" in found["refused"]
        assert "tile_size" in found["refused"]
        assert found["spread"]["notices"] == (sentence,)
        assert found["spread"]["warned"] == ([] if rank else [f"decode: {sentence}"])
        assert found["plain"]["notices"] == first["plain"]["notices"]
        assert found["plain"]["notices"][0].startswith("rank 1 ran out of memory with the VAE as it is; ")
        assert len(found["plain"]["images"]) == 1, "it lands where it was to land"
    (file,) = first["spread"]["files"]
    with Image.open(file) as saved:
        assert json.loads(saved.text["vaepp"])["stepped_down"] == [sentence]  # type: ignore[attr-defined]
    assert np.array_equal(first["spread"]["images"][0], first["at once"]["images"][0])
    assert first["at once"]["notices"] == ()


def poisoned_rank(rank: int, model: str, folder: str) -> str:
    resolved = resolved_for(
        model,
        parallel={"tensor_parallel_size": 2, "vae_patch_parallel_size": 2},
        vae={"strategy": "tile"},
        output={"dir": folder},
    )
    executor = loaded(resolved)
    if rank == 1:
        executor._pipe.vae.decoder.conv_out.bias.data[0] = float("nan")
    try:
        run(executor, resolved, save=True)
    except (PeerError, RankError) as error:
        return str(error)
    return "no error"


def test_the_rank_that_computed_nonsense_is_named(tiny_model: Path, tmp_path: Path) -> None:
    """Only rank 1's weights are spoiled; it looks before its part of the picture travels as pixels."""
    first, second = run_ranks(2, poisoned_rank, str(tiny_model), str(tmp_path / "out"))
    assert second.startswith("rank 1 failed in stage decode: ")
    assert "not finite (NaN or Inf) in rows" in second
    assert first.startswith("rank 0 waited for rank 1 (decode): the picture has values that are not finite")
    assert list((tmp_path / "out").iterdir()) == []
