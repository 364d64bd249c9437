"""Runs requests stage by stage on one rank; every rank of the DiT group runs one, alike."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import torch
from PIL.Image import Image

from vaepp_sdk.agreement import latent_facts, stage_facts
from vaepp_sdk.assembly import build_pipeline, moves_by_stage, quiet_libraries
from vaepp_sdk.decoding import Decoder, set_switches
from vaepp_sdk.dit.data import Replicas
from vaepp_sdk.dit.guidance import guided
from vaepp_sdk.dit.prompts import PromptShare
from vaepp_sdk.dit.row import Row
from vaepp_sdk.dit.spread import transformers_of
from vaepp_sdk.entries import DiTPlan, load_object
from vaepp_sdk.errors import UnsupportedError, VaeppWarning
from vaepp_sdk.events import StageEnd
from vaepp_sdk.keeping import Keeper
from vaepp_sdk.latents import LatentStore, load_latents
from vaepp_sdk.model_rules import IDLE_OFFLOAD
from vaepp_sdk.nonfinite import check_latents
from vaepp_sdk.offload import Residence
from vaepp_sdk.parallel.gate import Gate
from vaepp_sdk.parallel.group import DiTGroup
from vaepp_sdk.registry import Registry
from vaepp_sdk.request import Request
from vaepp_sdk.resolve import Resolved
from vaepp_sdk.saver import Picture, Saver
from vaepp_sdk.saving import PictureFolder
from vaepp_sdk.spec import OutputSpec
from vaepp_sdk.stages import Observer, PipelineStages, PixelStages, StageRunner, step_callback
from vaepp_sdk.vae.plan_gate import PlanGate
from vaepp_sdk.vae.wrapper import ParallelVAE

__all__ = ["Executor", "RankResult"]


@attrs.frozen(eq=False)
class RankResult:
    """What one rank has of a request.

    Attributes:
        images: the pictures that landed here; with `output = "sharded"` this rank's rectangles of them.
        frames: where the pipeline makes clips, the frames of each, otherwise as `images`.
        files: what this rank saved.
        stages: the stages of this request, in order.
        seed: the first picture's.
        notices: what was done otherwise than asked for, because a rank's memory was not enough.
    """

    images: list[Image]
    frames: list[list[Image]]
    files: tuple[str, ...]
    stages: tuple[StageEnd, ...]
    seed: int
    notices: tuple[str, ...] = ()


class Executor:
    """One rank's pipeline.

    Args:
        resolved: what was decided before the ranks started.
        registry: this process's plugins.
        group: the DiT group, seen from this rank.
        timeout: the limit of one wait for another rank in the VAE; collectives of the transformer wait as
            long as the job's process group allows.
        observer: told of stages and progress on this rank.
        store: where latents are kept from `denoise` on; None keeps none.
        sharers: ranks that share this host's memory; None is all of them.
    """

    def __init__(
        self,
        resolved: Resolved,
        registry: Registry,
        group: DiTGroup,
        *,
        timeout: timedelta,
        observer: Observer,
        store: LatentStore | None = None,
        sharers: int | None = None,
    ) -> None:
        self._resolved = resolved
        self._registry = registry
        self._group = group
        self._timeout = timeout
        self._sharers = sharers or group.world_size
        self._runner = StageRunner(group.rank, group.world_size, group.device, registry, observer)
        output = resolved.spec.output
        folder = Path(output.dir) if output else resolved.spec.base / OutputSpec().dir
        self._saver = Saver(
            PictureFolder(folder, output.overwrite if output else False), resolved, group, timeout
        )
        self._keeper = Keeper(store, resolved, group, timeout, observer) if store else None
        self._prompts = PromptShare.over(group)
        self._gate = Gate(timeout)
        self._replicas = Replicas(Row.over(group.axis("data")), group.device)
        self._residence: Residence | None = None
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
            AgreementError: ranks are not about to do the same, or hold other latents; names them.
            PeerError: another rank is gone or did not answer in time.
            OutputError: a picture cannot be saved.
        """
        assert self._pipe is not None, "load() comes first"
        self._runner.ended.clear()
        pictures = self._pictures(request)
        files: tuple[str, ...] = ()
        if request.save:
            sharded = self._decoder is not None and self._decoder.leaves_sharded
            notes = self._steps_down
            if sharded:
                self._agree("save", request)
            files = self._runner.run(
                "save",
                request.number,
                lambda: self._saver.save(request, pictures, sharded=sharded, steps_down=notes),
            )
        made = [picture.image for picture in pictures]
        return RankResult(
            images=[one for one in made if not isinstance(one, list)],
            frames=[one for one in made if isinstance(one, list)],
            files=files,
            stages=tuple(self._runner.ended),
            seed=request.seed,
            notices=self._steps_down,
        )

    @property
    def _steps_down(self) -> tuple[str, ...]:
        """What the last decode did because a rank's memory was not enough, in sentences."""
        return tuple(str(step) for step in self._decoder.steps_down) if self._decoder else ()

    def _pictures(self, request: Request) -> list[Picture]:
        if request.latents:
            return self._resumed(request)
        return self._staged(request) if self._stages else self._whole(request)

    def _load(self) -> None:
        quiet_libraries(self._group.rank)
        if self._resolved.spec.output is not None and self._group.rank == 0:
            self._saver.folder.prepare()  # before hours of work, not after
        resolved, entry = self._resolved, self._resolved.entry
        model = resolved.spec.model
        self._pipe = build_pipeline(resolved, self._group)
        if entry is None:
            vae = getattr(self._pipe, "vae", None)
            set_switches(vae, resolved.use_tiling, resolved.spec.vae.vae_use_slicing)
            return
        if moves_by_stage(resolved, self._group):
            self._residence = Residence.of(self._pipe, entry, self._group.device)
        elif model.offload == "stages" and model.device == "auto" and self._group.rank == 0:
            warnings.warn(IDLE_OFFLOAD, VaeppWarning, stacklevel=2)
        self._stages = load_object(entry.stages, f"pipeline {entry.name!r}")()
        self._decoder = Decoder.build(
            self._pipe,
            self._stages,
            resolved,
            self._registry,
            self._group,
            self._timeout,
            self._runner.progress("decode"),
            self._sharers,
        )
        if isinstance(self._decoder.vae, ParallelVAE):
            self._decoder.vae.descent.on_plan = PlanGate(self._gate)

    def _staged(self, request: Request) -> list[Picture]:
        """Encode, denoise and decode; a replica without pictures of its own takes part in decode only."""
        stages, runner = self._stages, self._runner
        assert stages is not None
        assert self._decoder is not None
        self._decoder.idle.bring_back()
        own = self._replicas.own(request.images)
        call = self._replicas.call(request.call, own)
        self._agree("encode_prompt", request)
        call |= runner.run(
            "encode_prompt", request.number, lambda: self._encoded(stages, call) if own else {}
        )
        self._agree("denoise", request)
        latents = runner.run("denoise", request.number, lambda: self._denoise(stages, call, own, request))
        replica = self._group.rank // (self._group.world_size // self._group.dims.data)
        self._agree("decode", request, latents, replica)

        def decode() -> list[Picture]:
            everyone = self._replicas.gather(latents, request.images)
            if self._group.dims.data > 1:
                self._agree("decoding all replicas' latents", request, everyone)
            return self._decode(stages, everyone, call)

        return runner.run("decode", request.number, decode)

    def _enter(self, stage: str) -> None:
        if self._residence is not None:
            self._residence.enter(stage)

    def _encoded(self, stages: PipelineStages, call: dict[str, Any]) -> dict[str, Any]:
        """The encoded prompts; where the entry names text encoders, one rank of the replica encodes."""
        self._enter("encode_prompt")
        entry = self._resolved.entry
        if entry is None or not entry.text_encoders:
            return stages.encode_prompt(self._pipe, call)
        return self._prompts.share(lambda: stages.encode_prompt(self._pipe, call))

    def _denoise(
        self, stages: PipelineStages, call: dict[str, Any], own: range, request: Request
    ) -> torch.Tensor | None:
        """Make this replica's latents; they are kept, then checked."""
        latents = None
        if own:
            self._enter("denoise")
            on_step = self._runner.progress("denoise")
            calls = self._plan.calls
            paired = calls is not None and calls.pairs(request.call, self._pipe.config)
            with guided(transformers_of(self._pipe, self._plan), paired):
                latents = stages.denoise(self._pipe, call, _generators(request, own), on_step)
        if self._keeper is not None:
            self._keeper.keep(latents, own, request)
        if latents is not None:
            self._check_latents(latents)
        return latents

    def _resumed(self, request: Request) -> list[Picture]:
        """Decode latents that were kept; they are the same on every rank."""
        stages = self._stages
        if stages is None:
            raise UnsupportedError(f"no plugin says how to decode for {self._resolved.pipeline_class} alone")

        def decode() -> list[Picture]:
            latents = load_latents(request.latents, self._group.device)
            self._check_latents(latents)
            self._agree("decoding kept latents", request, latents)
            return self._decode(stages, latents, dict(request.call))

        return self._runner.run("decode", request.number, decode)

    @property
    def _plan(self) -> DiTPlan:
        """How the transformer is spread; an empty plan where there is none."""
        entry = self._resolved.entry
        return (entry.dit if entry is not None else None) or DiTPlan()

    def _agree(
        self, stage: str, request: Request, latents: torch.Tensor | None = None, replica: int | None = None
    ) -> None:
        """Go on only if all ranks are about to do the same; those of a replica with the same latents."""
        if not self._gate.is_open:
            self._gate.agree(stage, stage_facts(stage, request), latent_facts(latents, replica))

    def _check_latents(self, latents: torch.Tensor) -> None:
        output = self._resolved.spec.output
        check_latents(latents, self._group.rank, allowed=output is not None and output.allow_nonfinite)

    def _decode(self, stages: PipelineStages, latents: torch.Tensor, call: dict[str, Any]) -> list[Picture]:
        """Decode the pictures of all replicas as one batch."""
        assert self._decoder is not None
        self._enter("decode")
        sharded = self._decoder.leaves_sharded
        draw: Callable[[Any, torch.Tensor], Sequence[Image | list[Image]]] = stages.pictures
        if self._decoder.pixels is not None:
            assert isinstance(stages, PixelStages)
            draw = stages.from_pixels
        pieces = self._decoder.decode(stages.vae_input(self._pipe, latents, call))
        made: list[Picture] = []
        for piece in pieces:
            box = piece.box if sharded else None
            images: Sequence[Image | list[Image]] = draw(self._pipe, piece.tensor)
            made += [Picture(image, index, box) for index, image in enumerate(images)]
        return made

    def _whole(self, request: Request) -> list[Picture]:
        """Run a pipeline without an entry as one stage, on rank 0; other ranks have nothing to do."""
        self._agree("call", request)
        if self._group.rank != 0:
            return []
        images = self._runner.run("call", request.number, lambda: self._call(request))
        return [Picture(image, index) for index, image in enumerate(images)]

    def _call(self, request: Request) -> Sequence[Image | list[Image]]:
        parameters, extra = inspect.signature(self._pipe.__call__).parameters, dict[str, Any]()
        if "callback_on_step_end" in parameters:
            extra["callback_on_step_end"] = step_callback(self._runner.progress("call"))
        if "output_type" in parameters:
            extra["output_type"] = "pil"  # the default of pipelines that make clips is another
        result = self._pipe(**request.call, generator=_generators(request, range(request.images)), **extra)
        found: Sequence[Image | list[Image]] = result.frames if hasattr(result, "frames") else result.images
        return found


def _generators(request: Request, own: range) -> list[torch.Generator]:
    """One generator for each picture in `own`, so that a picture depends on its own seed only."""
    return [torch.Generator("cpu").manual_seed(request.seed + index) for index in own]
