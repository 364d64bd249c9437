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
from vaepp_sdk.events import StageEnd
from vaepp_sdk.registry import default_registry
from vaepp_sdk.request import make_request
from vaepp_sdk.resolve import Resolved, resolve
from vaepp_sdk.runtime.inplace import check_size, find_launch
from vaepp_sdk.runtime.job import Job
from vaepp_sdk.runtime.joined import JoinedRank
from vaepp_sdk.runtime.news import Answers, Event
from vaepp_sdk.runtime.pool import WorkerPool
from vaepp_sdk.spec import PipelineSpec

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Pipeline", "Result"]

_TARGET = "vaepp_sdk.runtime.pipeline_work:PipelineWork"


@attrs.frozen(kw_only=True)
class Result:
    """What one call of a pipeline gives.

    Attributes:
        images: the pictures, or every rank's pieces where the output is sharded; under a launcher, what
            landed on this rank.
        files: where they were saved.
        seed: image i started from noise of `seed + i`.
        stages: what each rank did, by rank; the first call's begin with `load`.
        notices: what the user was told when the pipeline was made.
    """

    images: tuple[Image, ...]
    files: tuple[str, ...]
    seed: int
    stages: tuple[tuple[StageEnd, ...], ...]
    notices: tuple[str, ...]


def _unheard(event: Event) -> None:
    """An event that nobody listens to."""


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

    def __init__(self, resolved: Resolved, engine: WorkerPool | JoinedRank) -> None:
        self.resolved = resolved
        self.notices = resolved.notices
        self._engine = engine
        self._calls = 0

    @classmethod
    def from_spec(
        cls,
        source: str | Path | Mapping[str, Any] | PipelineSpec,
        overrides: Sequence[str] = (),
        *,
        on_event: Callable[[Event], None] = _unheard,
    ) -> Pipeline:
        """Check a spec, start its ranks or join a launcher's, and load the model.

        Args:
            source: a TOML file, the same tables as a mapping, or a spec.
            overrides: `table.key=value` each, as `vaepp-run --set` takes them.
            on_event: told of rank 0's stages and steps while a call waits.

        Raises:
            UserError: what was asked for cannot be done; nothing was started, or all of it has ended.
            RankError: a rank failed.
        """
        spec = PipelineSpec.load(source, overrides)
        launch = find_launch(os.environ)
        if launch is not None:
            check_size(launch, spec.parallel.dims.dit_parallel_size, spec.source)
        resolved = resolve(spec, default_registry())
        if launch is None or launch.rank == 0:
            for notice in resolved.notices:
                warnings.warn(notice, VaeppWarning, stacklevel=2)
        job = Job(
            world_size=resolved.dims.dit_parallel_size,
            target=_TARGET,
            payload=resolved.to_dict(),
            limits=spec.limits,
        )
        engine = JoinedRank(job, launch, on_event) if launch else WorkerPool(job, on_event)
        engine.start()
        return cls(resolved, engine)

    def __call__(self, **call: Any) -> Result:
        """Make pictures.

        Args:
            call: arguments that replace those of `[call]`, `seed` included.

        Raises:
            SpecError: an argument cannot be; the pipeline goes on.
            UserError: all ranks refused the request; the pipeline goes on.
            RankError: a rank failed; the pipeline has ended.
        """
        request = make_request(self.resolved, call, self._calls, self.resolved.spec.output is not None)
        self._calls += 1
        return self._result(self._engine.run(request.to_dict()))

    def close(self) -> None:
        """End the ranks; a second call does nothing."""
        self._engine.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.close(now=error is not None)

    def _result(self, answers: Answers) -> Result:
        return Result(
            images=tuple(image for pictures in answers.pictures for image in pictures),
            files=tuple(name for value in answers.values for name in value["files"]),
            seed=answers.values[0]["seed"],
            stages=tuple(tuple(StageEnd(**end) for end in value["stages"]) for value in answers.values),
            notices=self.notices,
        )
