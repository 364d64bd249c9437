"""The executor on one rank: plain diffusers, bit for bit, and what it says and saves."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from PIL import Image
from pipeline_jobs import CALL, generators, loaded, resolved_for, run

from vaepp_sdk.errors import OutputError, RankError, VaeppWarning
from vaepp_sdk.events import Event, Progress, StageEnd, StageStart
from vaepp_sdk.executor import Executor
from vaepp_sdk.markers import hookimpl
from vaepp_sdk.nonfinite import bad_region
from vaepp_sdk.parallel.exchanges import EXCHANGES
from vaepp_sdk.registry import Plugin, Registry, default_registry
from vaepp_sdk.resolve import Resolved
from vaepp_sdk.stages import StageRunner

LONG, SHORT = "a futuristic city at sunset, high resolution, 8k", "cats"
CASES: tuple[Mapping[str, Any], ...] = (
    {},
    {"guidance_scale": 4.0, "negative_prompt": ""},
    {"prompt": [LONG, SHORT], "guidance_scale": 4.0, "negative_prompt": "dull", "num_images_per_prompt": 2},
    {"prompt": [LONG, SHORT], "guidance_scale": 4.0, "height": 96, "width": 160},
)


@pytest.fixture(scope="module")
def resolved(tiny_model: Path) -> Resolved:
    return resolved_for(tiny_model)


@pytest.fixture(scope="module")
def executor(resolved: Resolved) -> Executor:
    return loaded(resolved)


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Any:
    pipe = ZImagePipeline.from_pretrained(tiny_model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_check_is_harmless_before_the_first_exchange_of_its_stage() -> None:
    events: list[Event] = []
    runner = StageRunner(0, 2, torch.device("cpu"), Registry(), events.append)

    def harmless(error: Exception, exchanges: int, request: int = 0) -> bool:
        def work() -> None:
            for _ in range(exchanges):
                EXCHANGES.begin()
            raise error

        with pytest.raises(RankError) as caught:
            runner.run("denoise", request, work)
        return caught.value.harmless

    assert harmless(ValueError("no such size"), 0)
    assert not harmless(ValueError("no such size"), 1)
    assert not harmless(ValueError("no such size"), 0, request=-1)
    assert not harmless(torch.OutOfMemoryError("full"), 0)
    assert not harmless(OSError("gone"), 0)


def of_diffusers(plain: Any, case: Mapping[str, Any]) -> list[Image.Image]:
    call = {key: value for key, value in {**CALL, **case}.items() if key != "seed"}
    call = {key: list(value) if isinstance(value, list) else value for key, value in call.items()}
    prompts = call["prompt"] if isinstance(call["prompt"], list) else [call["prompt"]]
    if isinstance(call.get("negative_prompt"), str):
        call["negative_prompt"] = [call["negative_prompt"]] * len(prompts)
    count = len(prompts) * call.get("num_images_per_prompt", 1)
    found: list[Image.Image] = plain(**call, generator=generators(7, count)).images
    return found


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_those_of_diffusers_bit_for_bit(
    executor: Executor, resolved: Resolved, plain: Any, case: dict[str, Any]
) -> None:
    wanted = of_diffusers(plain, case)
    found = run(executor, resolved, **case).images
    assert len(found) == len(wanted)
    assert all(same(one, other) for one, other in zip(found, wanted, strict=True))
    again = run(executor, resolved, **case).images  # nothing of a request is left in the next
    assert all(same(one, other) for one, other in zip(again, wanted, strict=True))


def test_a_picture_depends_on_its_own_seed_only(executor: Executor, resolved: Resolved) -> None:
    both = run(executor, resolved, num_images_per_prompt=2, seed=7).images
    second = run(executor, resolved, seed=8).images[0]
    assert not same(*both)
    # Kernels for a batch of 2 round otherwise than for one picture: at most one level of 255.
    assert np.abs(np.asarray(both[1], int) - np.asarray(second, int)).max() <= 1


def test_latents_are_the_pipelines_own(executor: Executor, resolved: Resolved, plain: Any) -> None:
    """Compared before the rounding to 255 levels, where a difference could hide."""
    seen: list[torch.Tensor] = []
    vae = executor._pipe.vae
    decode = vae.decode

    def spy(latents: torch.Tensor, **settings: Any) -> Any:
        seen.append(latents)
        return decode(latents, **settings)

    vae.decode = spy
    try:
        run(executor, resolved)
    finally:
        del vae.decode
    call = {key: value for key, value in CALL.items() if key != "seed"}
    latents = plain(**call, generator=generators(7, 1), output_type="latent").images
    config = plain.vae.config
    assert torch.equal(seen[0], latents / config.scaling_factor + config.shift_factor)


class Watcher:
    """A plugin that watches, and one that fails."""

    VAEPP_API = 1

    def __init__(self, fails: bool = False) -> None:
        self.seen: list[str] = []
        self.fails = fails

    @hookimpl
    def vaepp_on_stage_start(self, event: StageStart) -> None:
        self.seen.append(f"+{event.stage}")
        if self.fails:
            raise ValueError("broken")

    @hookimpl
    def vaepp_on_stage_end(self, event: StageEnd) -> None:
        self.seen.append(f"-{event.stage}")


def watched_registry(watcher: Watcher) -> Registry:
    registry = Registry.load()
    registry.add(Plugin("watcher", "test"), watcher)
    return registry


def test_stages_progress_and_observers(resolved: Resolved, tmp_path: Path) -> None:
    events: list[Any] = []
    watcher = Watcher()
    spec = attrs.evolve(resolved.spec, output=None, base=tmp_path)
    executor = loaded(
        attrs.evolve(resolved, spec=spec), observer=events.append, registry=watched_registry(watcher)
    )
    result = run(executor, resolved, save=True)
    stages = ["encode_prompt", "denoise", "decode", "save"]
    assert [end.stage for end in result.stages] == stages
    assert all(end.seconds > 0 and end.peak_bytes > 1 << 20 and end.error is None for end in result.stages)
    assert watcher.seen == [f"{sign}{stage}" for stage in ["load", *stages] for sign in "+-"]
    starts = [event for event in events if isinstance(event, StageStart)]
    assert [(event.stage, event.request) for event in starts] == [("load", -1), *((s, 0) for s in stages)]
    steps = [event for event in events if isinstance(event, Progress)]
    assert steps == [Progress("denoise", done, 3) for done in (1, 2, 3)]


def test_a_failing_observer_does_not_end_the_run(resolved: Resolved) -> None:
    watcher = Watcher(fails=True)
    with pytest.warns(UserWarning, match="'watcher'.*broken"):
        executor = loaded(resolved, registry=watched_registry(watcher))
    assert len(run(executor, resolved).images) == 1
    assert watcher.seen == ["+load"]


def test_files_hold_what_made_them(tiny_model: Path, tmp_path: Path) -> None:
    resolved = resolved_for(tiny_model, output={"dir": str(tmp_path / "out")})
    executor = loaded(resolved)
    call = {"prompt": [LONG, SHORT], "num_images_per_prompt": 2}
    result = run(executor, resolved, save=True, **call)
    long = "a-futuristic-city-at-sunset-high-resolution-8k"
    names = [
        f"0000-{long}-seed7.png",
        f"0001-{long}-seed8.png",
        "0002-cats-seed9.png",
        "0003-cats-seed10.png",
    ]
    assert [Path(file).name for file in result.files] == names
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for index, (file, image) in enumerate(zip(result.files, result.images, strict=True)):
        with Image.open(file) as saved:
            assert same(saved, image)
            text = saved.text  # type: ignore[attr-defined]
        assert text["prompt"] == (LONG, SHORT)[index // 2]
        assert text["seed"] == str(7 + index)
        assert "vaepp 0" in text["Software"]
        held = json.loads(text["vaepp"])
        assert held["spec"] == resolved.spec.to_shareable()
        assert str(resolved.model_path.parent) not in str(held)
        assert held["call"] | {"seed": 7} == {**CALL, **call}
        assert held["pipeline"] == "ZImagePipeline"
    again = run(executor, resolved, save=True)
    assert [Path(file).name for file in again.files] == ["0004-a-futuristic-city-at-sunset-seed7.png"]
    fresh = run(loaded(resolved), resolved, save=True)
    assert [Path(file).name for file in fresh.files] == ["0005-a-futuristic-city-at-sunset-seed7.png"]
    # Two runs at once: the other one has taken the next name meanwhile.
    between = run(executor, resolved, save=True)
    assert [Path(file).name for file in between.files] == ["0006-a-futuristic-city-at-sunset-seed7.png"]


def test_an_unusable_folder_is_refused_before_the_model_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    resolved = resolved_for(tiny_model, output={"dir": str(tmp_path / "out" / "below")})
    (tmp_path / "out").write_text("a file")  # since the spec was checked
    events: list[Any] = []
    with pytest.raises(OutputError, match="cannot write"):
        loaded(resolved, observer=events.append)
    assert events[-1].stage == "load"
    assert "cannot write" in events[-1].error


def poisoned(resolved: Resolved, poison: Callable[[Any], None]) -> Executor:
    executor = loaded(resolved)
    poison(executor._pipe)
    return executor


def nan_vae(pipe: Any) -> None:
    pipe.vae.decoder.conv_out.bias.data[1] = float("nan")


def infinite_latents(pipe: Any) -> None:
    pipe.transformer.all_final_layer["2-1"].linear.bias.data[:] = float("inf")


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        (
            nan_vae,
            r"rank 0 failed in stage decode: .* not finite .* in rows 0 to 127, columns 0 to 127",
        ),
        (infinite_latents, "rank 0 failed in stage denoise: the latents hold values that are not finite"),
    ],
)
def test_nothing_black_is_saved(
    tiny_model: Path, tmp_path: Path, poison: Callable[[Any], None], message: str
) -> None:
    resolved = resolved_for(tiny_model, output={"dir": str(tmp_path / "out")})
    executor = poisoned(resolved, poison)
    with pytest.raises(RankError, match=message):
        run(executor, resolved, save=True)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("poison", "words"),
    [(nan_vae, "stage decode: the picture has"), (infinite_latents, "stage denoise: the latents")],
)
def test_what_is_not_finite_can_be_allowed(
    tiny_model: Path, tmp_path: Path, poison: Callable[[Any], None], words: str
) -> None:
    output = {"dir": str(tmp_path / "out"), "allow_nonfinite": True}
    resolved = resolved_for(tiny_model, output=output)
    executor = poisoned(resolved, poison)
    with pytest.warns(VaeppWarning, match="rank 0, stage") as caught:
        (image,) = run(executor, resolved, save=True).images
    assert any(words in str(warning.message) for warning in caught)
    # What is not finite is black: one channel of the spoiled VAE's, everything where latents are infinite.
    low = np.asarray(image).min(axis=(0, 1)).tolist()
    high = np.asarray(image).max(axis=(0, 1)).tolist()
    assert high[1] == low[1] == 0
    assert (high[0] > 0) is (poison is nan_vae)
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_the_pictures_of_a_batch_that_are_not_finite_are_named() -> None:
    bad = torch.zeros(3, 2, 5, 6, dtype=torch.bool)
    bad[1, 0, 2:4, 1] = bad[2, 1, 3, 4] = True
    assert bad_region(bad, top=10, left=20) == "rows 12 to 13, columns 21 to 24 of pictures 1, 2"


def short(resolved: Resolved, most: int) -> Executor:
    """A VAE for which so many latents are the most that fits."""
    executor = loaded(resolved)

    def hook(module: Any, arguments: tuple[Any, ...]) -> None:
        del module
        if not arguments[0].is_meta and arguments[0].shape[-2] * arguments[0].shape[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    executor._pipe.vae.decoder.register_forward_pre_hook(hook)
    return executor


def test_one_rank_steps_down_from_the_plain_vae(resolved: Resolved) -> None:
    """Untiled 16 x 16 latents do not fit, in blocks of rows neither; tiles lighter than those do."""
    executor = short(resolved, 8 * 8)
    blocks = "rank 0 ran out of memory with the VAE as it is; going on with strategy 'shard' (row_blocks = 8)"
    tiles = "rank 0 ran out of memory with strategy 'shard' (row_blocks = 8); going on with strategy 'tile'"
    with (
        pytest.warns(VaeppWarning, match=re.escape(f"decode: {blocks}; its promise: equal up to rounding")),
        pytest.warns(VaeppWarning, match=re.escape(f"decode: {tiles}") + ".*; its promise: bit-identical"),
    ):
        first = run(executor, resolved)
    assert first.notices == (blocks, f"{tiles} (tile_size = 32)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once, and what is too large is not tried again
        again = run(executor, resolved)
    assert again.notices == first.notices
    assert same(first.images[0], again.images[0])
    assert run(executor, resolved, height=64, width=64).notices == (), "what fits is left as it is"
    tiled = attrs.evolve(resolved, use_tiling=True)
    plain = loaded(tiled)
    plain._pipe.vae.tile_sample_min_size, plain._pipe.vae.tile_latent_min_size = 32, 4
    assert same(first.images[0], run(plain, tiled).images[0])


def test_what_never_fits_ends_after_three_attempts(resolved: Resolved) -> None:
    executor = short(resolved, 0)
    with (
        pytest.warns(VaeppWarning, match="going on with"),
        pytest.raises(
            RankError, match=r"rank 0 failed in stage decode: out of memory on rank 0 with each of"
        ),
    ):
        run(executor, resolved)


def test_stepping_down_can_be_forbidden(tiny_model: Path) -> None:
    resolved = resolved_for(tiny_model, vae={"on_oom": "fail"})
    with pytest.raises(
        RankError, match="rank 0 failed in stage decode: OutOfMemoryError: CUDA out of memory"
    ):
        run(short(resolved, 8 * 8), resolved)


def test_an_error_names_rank_and_stage_and_keeps_its_cause(resolved: Resolved) -> None:
    def divide(*args: Any, **kwargs: Any) -> float:
        return 1 / 0

    def breaks(pipe: Any) -> None:
        pipe.transformer.forward = divide

    with pytest.raises(
        RankError, match=r"rank 0 failed in stage denoise: ZeroDivisionError: division"
    ) as caught:
        run(poisoned(resolved, breaks), resolved)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def without_entries() -> Registry:
    """A registry that knows no pipeline."""
    return Registry()


@pytest.mark.parametrize("tiling", [None, True])
def test_a_pipeline_without_an_entry_runs_in_one_stage(
    tiny_model: Path, plain: Any, tmp_path: Path, tiling: bool | None
) -> None:
    registry = without_entries()
    vae = {} if tiling is None else {"vae_use_tiling": tiling}
    resolved = resolved_for(tiny_model, registry, vae=vae, output={"dir": str(tmp_path)})
    assert resolved.entry is None
    executor = loaded(resolved, registry=registry)
    result = run(executor, resolved, save=True, prompt=[LONG, SHORT])
    assert [end.stage for end in result.stages] == ["call", "save"]
    plain.vae.use_tiling = bool(tiling)
    try:
        wanted = of_diffusers(plain, {"prompt": [LONG, SHORT]})
    finally:
        plain.vae.use_tiling = False
    assert all(same(one, other) for one, other in zip(result.images, wanted, strict=True))
    assert [Path(file).name[-9:] for file in result.files] == ["seed7.png", "seed8.png"]


@pytest.mark.parametrize("switch", ["vae_use_tiling", "vae_use_slicing"])
def test_switches_reach_the_vae(tiny_model: Path, switch: str) -> None:
    pipe = loaded(resolved_for(tiny_model, vae={switch: True}))._pipe
    assert getattr(pipe.vae, switch.removeprefix("vae_")) is True
    assert pipe.vae.use_tiling + pipe.vae.use_slicing == 1


def test_every_built_in_pipeline_has_stages() -> None:
    from vaepp_sdk.entries import load_object
    from vaepp_sdk.stages import PipelineStages

    for entry in default_registry().pipelines.values():
        assert isinstance(load_object(entry.stages, entry.name)(), PipelineStages)
