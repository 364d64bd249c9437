"""What a pipeline plugin does in each stage, and how a stage is run, timed and reported."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import attrs
import torch
from PIL.Image import Image

from vaepp_sdk.errors import RankError, VaeppError, is_check
from vaepp_sdk.events import Event, Progress, StageEnd, StageStart
from vaepp_sdk.parallel.exchanges import EXCHANGES
from vaepp_sdk.registry import Registry
from vaepp_sdk.text import first_line, message_of, named

__all__ = ["Observer", "PipelineStages", "PixelStages", "StageRunner", "step_callback"]

Observer = Callable[[Event], None]
"""Told what happens on this rank, as it happens."""

ResultT = TypeVar("ResultT")


@runtime_checkable
class PipelineStages(Protocol):
    """A pipeline plugin's stage functions: calls into the pipeline's own code, never a copy of it.

    In every method `pipe` is the diffusers pipeline and `call` its keyword arguments as the user gave them,
    checked, without a seed. All ranks of the DiT group run `encode_prompt` and `denoise` alike.
    """

    def encode_prompt(self, pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the prompts.

        Returns:
            Keyword arguments that stand in for the prompts, the prompts themselves as None among them.
        """
        ...

    def denoise(
        self,
        pipe: Any,
        call: Mapping[str, Any],
        generators: Sequence[torch.Generator],
        on_step: Callable[[int, int], None],
    ) -> torch.Tensor:
        """Make the latents.

        Args:
            pipe: the pipeline.
            call: its arguments, with what `encode_prompt` returned.
            generators: one for each picture, on the CPU.
            on_step: told `(done, total)` after each step; see `step_callback`.

        Returns:
            The latents as the pipeline's `output_type="latent"` returns them, the same on every rank.
        """
        ...

    def vae_input(self, pipe: Any, latents: torch.Tensor, call: Mapping[str, Any]) -> torch.Tensor:
        """What the pipeline itself would give `vae.decode` for these latents, in the VAE's dtype."""
        ...

    def pictures(self, pipe: Any, sample: torch.Tensor) -> list[Image] | list[list[Image]]:
        """What the pipeline makes of a decoded sample, or of a rectangle cut from one.

        Returns:
            One picture each, or the frames of one clip each.
        """
        ...


@runtime_checkable
class PixelStages(PipelineStages, Protocol):
    """Stages whose pictures can travel as 8-bit values: `pictures` in two steps, with the same result."""

    def to_pixels(self, pipe: Any, sample: torch.Tensor) -> torch.Tensor:
        """The 8-bit values of the pictures, uint8, in the shape of the sample.

        Called on a rectangle of the decoded sample on the rank that made it, so each value may depend on the
        values at its own place alone.
        """
        ...

    def from_pixels(self, pipe: Any, pixels: torch.Tensor) -> list[Image] | list[list[Image]]:
        """The pictures, as `pictures` returns them."""
        ...


def step_callback(on_step: Callable[[int, int], None]) -> Callable[..., dict[str, Any]]:
    """A diffusers `callback_on_step_end` that reports steps and changes nothing."""

    def callback(pipe: Any, step: int, timestep: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
        del timestep, tensors
        on_step(step + 1, pipe.num_timesteps)
        return {}

    return callback


@attrs.define(eq=False)
class StageRunner:
    """Runs stages on one rank: times them, and tells the observers.

    Attributes:
        rank: this rank in the DiT group.
        world_size: ranks in the DiT group.
        device: where this rank computes.
        registry: whose plugins are told of each stage.
        observer: told of each stage besides.
        ended: the stages that have ended since `ended` was last cleared.
    """

    rank: int
    world_size: int
    device: torch.device
    registry: Registry
    observer: Observer
    ended: list[StageEnd] = attrs.field(factory=list)

    def run(self, stage: str, request: int, work: Callable[[], ResultT]) -> ResultT:
        """Run one stage.

        Raises:
            VaeppError: as the stage raised it.
            RankError: the stage raised something else, which is the cause.
        """
        start = StageStart(rank=self.rank, world_size=self.world_size, stage=stage, request=request)
        self.observer(start)
        self.registry.stage_start(start)
        _forget_peak(self.device)
        began, exchanges = time.perf_counter(), EXCHANGES.begun
        problem: str | None = None
        try:
            result = work()
            _synchronize(self.device)
        except VaeppError as error:
            problem = _one_line(error)
            raise
        except Exception as error:
            problem = _one_line(error)
            # What fails while loading is no request's: nothing could be served after it.
            harmless = request >= 0 and is_check(error) and EXCHANGES.begun == exchanges
            raise RankError(self.rank, stage, problem, harmless=harmless) from error
        finally:
            self._end(start, time.perf_counter() - began, problem)
        return result

    def progress(self, stage: str) -> Callable[[int, int], None]:
        """A function that reports `(done, total)` of a stage."""
        return lambda done, total: self.observer(Progress(stage, done, total))

    def _end(self, start: StageStart, seconds: float, problem: str | None) -> None:
        end = StageEnd(
            **attrs.asdict(start), seconds=seconds, peak_bytes=_peak_bytes(self.device), error=problem
        )
        self.ended.append(end)
        self.observer(end)
        self.registry.stage_end(end)


def _one_line(error: Exception) -> str:
    """An error as one line; vaepp's own need no class name, and lists of faults keep their first line."""
    return first_line(message_of(error)) if isinstance(error, VaeppError) else named(error)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _synchronize(device: torch.device) -> None:
    """Let the device finish, so that its time counts for the stage that asked for the work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(device: torch.device) -> int:
    """The allocator's peak since `_forget_peak`; on CPU the process's resident peak so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
