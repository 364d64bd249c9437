"""Runs requests stage by stage on one rank; every rank of the DiT group runs one, alike."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import diffusers
import torch
from PIL.Image import Image

import vaepp_sdk
from vaepp_sdk.assembly import build_pipeline, quiet_libraries
from vaepp_sdk.decoding import Decoder, set_switches
from vaepp_sdk.dit.data import Replicas
from vaepp_sdk.dit.row import Row
from vaepp_sdk.entries import load_object
from vaepp_sdk.events import StageEnd
from vaepp_sdk.parallel.group import DiTGroup
from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.registry import Registry
from vaepp_sdk.request import Request
from vaepp_sdk.resolve import Resolved
from vaepp_sdk.saving import PictureFolder, metadata, slug
from vaepp_sdk.spec import OutputSpec
from vaepp_sdk.stages import Observer, PipelineStages, StageRunner, step_callback
from vaepp_sdk.vae.plan import Box

__all__ = ["Executor", "RankResult"]


@attrs.frozen(eq=False)
class RankResult:
    """What one rank has of a request.

    Attributes:
        images: the pictures that landed here; with `output = "sharded"` this rank's rectangles of them.
        files: what this rank saved.
        stages: the stages of this request, in order.
        seed: the first picture's.
    """

    images: list[Image]
    files: tuple[str, ...]
    stages: tuple[StageEnd, ...]
    seed: int


@attrs.frozen(eq=False)
class _Picture:
    """One picture, or a rectangle of one where the output stays sharded.

    Attributes:
        image: the pixels.
        index: its number in the request.
        box: which rectangle it is; None for a whole picture.
    """

    image: Image
    index: int
    box: Box | None = None


class Executor:
    """One rank's pipeline.

    Args:
        resolved: what was decided before the ranks started.
        registry: this process's plugins.
        group: the DiT group, seen from this rank.
        timeout: the limit of one wait for another rank in the VAE; collectives of the transformer wait as
            long as the job's process group allows.
        observer: told of stages and progress on this rank.
    """

    def __init__(
        self,
        resolved: Resolved,
        registry: Registry,
        group: DiTGroup,
        *,
        timeout: timedelta,
        observer: Observer,
    ) -> None:
        self._resolved = resolved
        self._registry = registry
        self._group = group
        self._timeout = timeout
        self._runner = StageRunner(group.rank, group.world_size, group.device, registry, observer)
        output = resolved.spec.output
        folder = Path(output.dir) if output else resolved.spec.base / OutputSpec().dir
        self._folder = PictureFolder(folder, output.overwrite if output else False)
        self._replicas = Replicas(Row.over(group.axis("data")), group.device)
        self._pipe: Any = None
        self._decoder: Decoder | None = None
        self._stages: PipelineStages | None = None

    def load(self) -> None:
        """Build the pipeline; every rank calls this once.

        Raises:
            UserError: the model or the output folder cannot be used.
            RankError: loading failed.
        """
        self._runner.run("load", -1, self._load)
        self._runner.ended.clear()

    def run(self, request: Request) -> RankResult:
        """Run one request; every rank calls this with the same request.

        Raises:
            RankError: a stage failed on this rank, or made values that are not finite.
            PeerError: another rank is gone or did not answer in time.
            OutputError: a picture cannot be saved.
        """
        assert self._pipe is not None, "load() comes first"
        self._runner.ended.clear()
        pictures = self._staged(request) if self._stages else self._whole(request)
        files: tuple[str, ...] = ()
        if request.save:
            files = self._runner.run("save", request.number, lambda: self._save(request, pictures))
        images = [picture.image for picture in pictures]
        return RankResult(images, files, tuple(self._runner.ended), request.seed)

    def _load(self) -> None:
        quiet_libraries(self._group.rank)
        if self._resolved.spec.output is not None and self._group.rank == 0:
            self._folder.prepare()  # before hours of work, not after
        resolved, entry = self._resolved, self._resolved.entry
        self._pipe = build_pipeline(resolved, self._group)
        if entry is None:
            vae = getattr(self._pipe, "vae", None)
            set_switches(vae, resolved.use_tiling, resolved.spec.vae.vae_use_slicing)
            return
        self._stages = load_object(entry.stages, f"pipeline {entry.name!r}")()
        self._decoder = Decoder.build(
            self._pipe.vae,
            resolved,
            self._registry,
            self._group,
            self._timeout,
            self._runner.progress("decode"),
        )

    def _staged(self, request: Request) -> list[_Picture]:
        """Encode, denoise and decode; a replica without pictures of its own takes part in decode only."""
        stages, pipe, runner = self._stages, self._pipe, self._runner
        assert stages is not None
        own = self._replicas.own(request.images)
        call = self._replicas.call(request.call, own)
        call |= runner.run(
            "encode_prompt", request.number, lambda: stages.encode_prompt(pipe, call) if own else {}
        )
        generators, on_step = _generators(request, own), runner.progress("denoise")
        latents = runner.run(
            "denoise",
            request.number,
            lambda: stages.denoise(pipe, call, generators, on_step) if own else None,
        )
        return runner.run("decode", request.number, lambda: self._decode(stages, latents, call, request))

    def _decode(
        self, stages: PipelineStages, latents: torch.Tensor | None, call: dict[str, Any], request: Request
    ) -> list[_Picture]:
        """Decode the pictures of all replicas as one batch."""
        assert self._decoder is not None
        sharded = self._decoder.leaves_sharded
        everyone = self._replicas.gather(latents, request.images)
        pieces = self._decoder.decode(stages.vae_input(self._pipe, everyone, call))
        return [
            _Picture(image, index, piece.box if sharded else None)
            for piece in pieces
            for index, image in enumerate(stages.pictures(self._pipe, piece.tensor))
        ]

    def _whole(self, request: Request) -> list[_Picture]:
        """Run a pipeline without an entry as one stage, on rank 0; other ranks have nothing to do."""
        if self._group.rank != 0:
            return []
        images = self._runner.run("call", request.number, lambda: self._call(request))
        return [_Picture(image, index) for index, image in enumerate(images)]

    def _call(self, request: Request) -> Sequence[Image]:
        extra: dict[str, Any] = {}
        if "callback_on_step_end" in inspect.signature(self._pipe.__call__).parameters:
            extra["callback_on_step_end"] = step_callback(self._runner.progress("call"))
        result = self._pipe(**request.call, generator=_generators(request, range(request.images)), **extra)
        images: Sequence[Image] = result.images
        return images

    def _save(self, request: Request, pictures: Sequence[_Picture]) -> tuple[str, ...]:
        """Save what this rank has; of pictures that landed on every rank, rank 0's."""
        sharded = self._decoder is not None and self._decoder.leaves_sharded
        if self._group.rank != 0 and not sharded:
            return ()
        first = self._agreed_number(request.images) if sharded else self._folder.number(request.images)
        return tuple(self._save_one(request, picture, first) for picture in pictures)

    def _agreed_number(self, count: int) -> int:
        """Rank 0's next number on every rank, so that the rectangles of a picture share a name."""
        number = self._folder.number(count) if self._group.rank == 0 else 0
        held = torch.tensor([number], dtype=torch.int64, device=self._group.device)
        VaeGroup.over(None, 1, self._timeout).broadcast(held, 0, "file number")
        return int(held)

    def _save_one(self, request: Request, picture: _Picture, first: int) -> str:
        seed = request.seed + picture.index
        prompt = request.prompts[picture.index * len(request.prompts) // request.images]
        name = f"{first + picture.index:04d}-{slug(prompt)}-seed{seed}"
        details: dict[str, Any] = {
            "spec": self._resolved.spec.to_shareable(),
            "call": dict(request.call),
            "pipeline": self._resolved.pipeline_class,
        }
        if picture.box is not None:
            name += f"-y{picture.box.top}-x{picture.box.left}"
            details["position"] = attrs.asdict(picture.box)
        info = metadata(prompt, seed, details, _software())
        return str(self._folder.save(picture.image, f"{name}.png", info))


def _generators(request: Request, own: range) -> list[torch.Generator]:
    """One generator for each picture in `own`, so that a picture depends on its own seed only."""
    return [torch.Generator("cpu").manual_seed(request.seed + index) for index in own]


def _software() -> str:
    versions = (("vaepp", vaepp_sdk), ("diffusers", diffusers), ("torch", torch))
    return ", ".join(f"{name} {module.__version__}" for name, module in versions)
