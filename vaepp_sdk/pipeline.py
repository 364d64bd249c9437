"""Pipelines from Python: one object, one call per request, whoever starts the ranks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import attrs

from vaepp_sdk.errors import VaeppWarning
from vaepp_sdk.events import LatentsKept, StageEnd
from vaepp_sdk.kept import KeptRun, remove_run, resume_notes
from vaepp_sdk.registry import default_registry
from vaepp_sdk.request import Request, make_request
from vaepp_sdk.resolve import Resolved, resolve
from vaepp_sdk.resuming import resumed_request, resumed_tables
from vaepp_sdk.runtime.inplace import check_size, end_with_launcher, find_launch
from vaepp_sdk.runtime.job import Job
from vaepp_sdk.runtime.joined import JoinedRank
from vaepp_sdk.runtime.news import Answers, Event
from vaepp_sdk.runtime.pool import WorkerPool
from vaepp_sdk.runtime.turns import Turns
from vaepp_sdk.saving import PictureFolder
from vaepp_sdk.spec import LimitsSpec, PipelineSpec
from vaepp_sdk.spec.prompts import Upcoming

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Pipeline", "Result", "prepare"]

_TARGET = "vaepp_sdk.runtime.pipeline_work:PipelineWork"


@attrs.frozen(kw_only=True)
class Result:
    """What one call of a pipeline gives.

    Attributes:
        images: the pictures, or every rank's pieces where the output is sharded; under a launcher, what
            landed on this rank. Empty where the pipeline makes clips.
        frames: the frames of each clip, otherwise as `images`. Empty where the pipeline makes pictures.
        files: where they were saved.
        seed: image i started from noise of `seed + i`.
        stages: what each rank did, by rank; the first call's begin with `load`.
        notices: what the user was told when the pipeline was made, and what this call did otherwise because a
            rank's memory was not enough.
        latents: the folder where the latents stay, as `[output] keep_latents` asks; else None.
    """

    images: tuple[Image, ...]
    files: tuple[str, ...]
    seed: int
    stages: tuple[tuple[StageEnd, ...], ...]
    notices: tuple[str, ...]
    latents: str | None = None
    frames: tuple[tuple[Image, ...], ...] = ()


def _unheard(event: Event) -> None:
    """An event that nobody listens to."""


@attrs.define(eq=False)
class _Ear:
    """Hears where latents are kept, and passes everything on.

    Attributes:
        on_event: who else listens.
        folder: where the latents of the present call are, once they are.
    """

    on_event: Callable[[Event], None]
    folder: Path | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, LatentsKept):
            self.folder = Path(event.folder)
        self.on_event(event)


class Pipeline:
    """A loaded pipeline on all its ranks; make one with `from_spec`.

    Ranks are processes of their own, one rank included: a crash, a limit and memory then mean the same for
    every size, and this process needs no torch. They never import the script that calls, so it needs no
    `__main__` guard. Under a launcher nothing is started: this process is one of the ranks.

    Use it in a `with` block or call `close`; garbage collection and the interpreter's exit close it too.

    Attributes:
        resolved: what runs.
        notices: what the user was told.
    """

    def __init__(self, resolved: Resolved, engine: WorkerPool | JoinedRank, ear: _Ear) -> None:
        self.resolved = resolved
        self.notices = resolved.notices
        self._engine = engine
        self._ear = ear
        self._calls = 0
        self._turns = Turns()

    @classmethod
    def from_spec(
        cls,
        source: str | Path | Mapping[str, Any] | PipelineSpec,
        overrides: Sequence[str] = (),
        *,
        on_event: Callable[[Event], None] = _unheard,
        upcoming: Upcoming | None = None,
    ) -> Pipeline:
        """Check a spec, start its ranks or join a launcher's, and load the model.

        Args:
            source: a TOML file, the same tables as a mapping, or a spec.
            overrides: `table.key=value` each, as `vaepp-run --set` takes them.
            on_event: told of rank 0's stages and steps while a call waits.
            upcoming: calls that are to come; what is wrong with any of them is told before a rank starts.

        Raises:
            UserError: what was asked for cannot be done; nothing was started, or all of it has ended.
            RankError: a rank failed.
        """
        return cls._start(prepare(PipelineSpec.load(source, overrides), upcoming=upcoming), on_event)

    @classmethod
    def resume(
        cls,
        folder: str | Path,
        overrides: Sequence[str] = (),
        *,
        on_event: Callable[[Event], None] = _unheard,
    ) -> Result:
        """Decode and save latents that a run has kept, without denoising again.

        Only the VAE is loaded. The spec is the one that made the latents; the overrides may change how the
        VAE works and how many ranks there are. The latents stay where they are.

        Args:
            folder: a run's folder, as in `out/run-7`.
            overrides: `table.key=value` each; `[call]` cannot change.
            on_event: told of rank 0's stages while the call waits.

        Raises:
            UserError: the folder holds no latents that can be used, or they do not fit the model.
            RankError: a rank failed.
        """
        kept = KeptRun.read(folder)
        spec = PipelineSpec.load(resumed_tables(kept, overrides), overrides)
        spec = attrs.evolve(spec, source=str(kept.folder))
        resolved = prepare(spec, decode_only=True)
        request = resumed_request(kept, resolved)
        with cls._start(resolved, on_event) as pipe:
            pipe._ear.folder = kept.folder
            return attrs.evolve(pipe._run(request), latents=str(kept.folder))

    @classmethod
    def _start(cls, resolved: Resolved, on_event: Callable[[Event], None]) -> Pipeline:
        """Start ranks, or join a launcher's, and load the model."""
        launch = find_launch(os.environ)
        if launch is not None and "RANK" in os.environ:
            end_with_launcher()
        if launch is None or launch.rank == 0:
            for notice in resolved.notices:
                warnings.warn(notice, VaeppWarning, stacklevel=3)
        job = Job(
            world_size=resolved.dims.dit_parallel_size,
            target=_TARGET,
            payload=resolved.to_dict(),
            limits=_limits(resolved.spec),
        )
        if launch is None and resolved.spec.output is not None:
            PictureFolder(Path(resolved.spec.output.dir)).prepare()  # before a rank starts
        ear = _Ear(on_event)
        engine = JoinedRank(job, launch, ear) if launch else WorkerPool(job, ear)
        engine.start()
        return cls(resolved, engine, ear)

    def __call__(self, **call: Any) -> Result:
        """Make pictures. Calls of several threads are served one after the other.

        Args:
            call: arguments that replace those of `[call]`, or of the first `[[call]]`, `seed` included.

        Raises:
            SpecError: an argument cannot be; the pipeline goes on.
            UserError: all ranks refused the request; the pipeline goes on.
            RequestError: all ranks failed alike before they exchanged anything; the pipeline goes on.
            RankError: a rank failed; the pipeline has ended.
            RunError: the pipeline has ended before, or this call comes from `on_event`.
        """
        with self._turns.turn():
            request = make_request(self.resolved, call, self._calls, self.resolved.spec.output is not None)
            self._calls += 1
            self._ear.folder = None
            return self._settled(self._run(request))

    def close(self) -> None:
        """End the ranks; a second call does nothing."""
        self._engine.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.close(now=error is not None)

    def _run(self, request: Request) -> Result:
        try:
            return self._result(self._engine.run(request.to_dict()))
        except BaseException as error:  # a signal that ends this process costs no denoising either
            for note in resume_notes(self._ear.folder):
                error.add_note(note)
            raise

    def _settled(self, result: Result) -> Result:
        """Every rank has done its part: the latents go, unless they are to stay."""
        output, folder = self.resolved.spec.output, self._ear.folder
        if folder is None:
            return result
        if output is not None and output.keep_latents:
            return attrs.evolve(result, latents=str(folder))
        remove_run(folder)
        return result

    def _result(self, answers: Answers) -> Result:
        images = tuple(image for pictures in answers.pictures for image in pictures)
        length = max(value.get("frames", 0) for value in answers.values)
        return Result(
            images=() if length else images,
            frames=tuple(images[at : at + length] for at in range(0, len(images), length)) if length else (),
            files=tuple(name for value in answers.values for name in value["files"]),
            seed=answers.values[0]["seed"],
            stages=tuple(tuple(StageEnd(**end) for end in value["stages"]) for value in answers.values),
            notices=(*self.notices, *answers.values[0]["notices"]),
        )


def _limits(spec: PipelineSpec) -> LimitsSpec:
    """The longest waits; a later step too may compile, and peers wait for that as long as for an exchange."""
    limits = spec.limits
    if spec.model.compile == "off" or limits.denoise != LimitsSpec().denoise:
        return limits
    return attrs.evolve(limits, denoise=max(limits.denoise, limits.exchange))


def prepare(spec: PipelineSpec, *, decode_only: bool = False, upcoming: Upcoming | None = None) -> Resolved:
    """What a spec comes to, once the launcher's ranks, if there are any, are as many as it asks for.

    Args:
        spec: what to run.
        decode_only: whether latents are there already.
        upcoming: calls that are to come.

    Raises:
        UserError: as `resolve`, or the number of ranks is another.
    """
    launch = find_launch(os.environ)
    if launch is not None:
        check_size(launch, spec.parallel.dims.dit_parallel_size, spec.source)
    return resolve(spec, default_registry(), decode_only=decode_only, upcoming=upcoming)
