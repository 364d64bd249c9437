"""Guidance parallelism: two ranks each run one of the two guidance branches.

Where one transformer call has both branches in its batch, each rank runs a part of the batch; a call without
guidance, as after truncation, is shared out by pictures. Where each branch has a call of its own, each rank
runs one of the two calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from vaepp_sdk.dit.row import Row, even_parts
from vaepp_sdk.entries import BatchPlan, CallsPlan
from vaepp_sdk.errors import UnsupportedError

__all__ = ["BatchSplit", "CallSplit", "guided"]


class BatchSplit:
    """Stands for a transformer's forward.

    Args:
        forward: the transformer's own.
        plan: which of its arguments hold a batch.
        row: the ranks that share it.
    """

    def __init__(self, forward: Callable[..., Any], plan: BatchPlan, row: Row) -> None:
        self._forward, self._plan, self._row = forward, plan, row
        self._signature = inspect.signature(forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output for the whole batch, on every rank."""
        bound = self._signature.bind(*args, **kwargs)
        batch = len(bound.arguments[self._plan.arguments[0]])
        if batch < self._row.size:
            return self._forward(*args, **kwargs)  # too few to share: every rank runs all, alike
        own = self._row.own(batch)
        for name in self._plan.arguments:
            value = bound.arguments.get(name)
            if value is not None:
                bound.arguments[name] = value[own.start : own.stop]
        result = self._forward(*bound.args, **bound.kwargs)
        whole = self._whole(result[0], even_parts(batch, self._row.size))
        return (whole, *result[1:]) if isinstance(result, tuple) else type(result)(whole)

    def _whole(self, made: Any, counts: tuple[int, ...]) -> Any:
        """All ranks' outputs, as one tensor or as a list of one tensor each, whichever the model gives."""
        if isinstance(made, torch.Tensor):
            return self._row.gather(made, 0, counts, "transformer outputs")
        return list(self._row.gather(torch.stack(made), 0, counts, "transformer outputs").unbind(0))


@attrs.frozen(eq=False)
class _First:
    """The first call of a step, whose second is still to come: the latents it was given, and its output."""

    latents: torch.Tensor
    made: torch.Tensor


class CallSplit:
    """Stands for the forward of a transformer that is called once for each guidance branch.

    The first rank runs the first call of a step and the second rank the second. On the other rank a call
    returns an empty buffer at once. When the second call is done both outputs are sent, so both ranks hold
    the bits of both before the pipeline looks at either.

    Nothing is guessed: whether steps have two calls is said before the first one (`guided`), and the two
    calls of a step are given the same latents.

    Args:
        forward: the transformer's own.
        plan: what its calls are like.
        row: the two ranks.
    """

    def __init__(self, forward: Callable[..., Any], plan: CallsPlan, row: Row) -> None:
        self._forward, self._plan, self._row = forward, plan, row
        self._signature = inspect.signature(forward)
        self._first: _First | None = None
        self.paired = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The call's output, which holds its values once all calls of the step are made.

        Raises:
            UnsupportedError: the pipeline's calls, or the output, are not as the plan says; on both ranks.
        """
        if not self.paired:
            return self._forward(*args, **kwargs)  # one call a step: every rank runs it, alike
        arguments = self._signature.bind(*args, **kwargs).arguments
        latents, first = arguments[self._plan.latents], self._first
        if first is not None and first.latents is not latents:
            raise UnsupportedError(
                "a step called the transformer once, or with other latents the second time; its plan for "
                "cfg_parallel_size expects two calls with the same latents"
            )
        own = self._row.index == (0 if first is None else 1)
        made = self._run(args, kwargs, latents) if own else _unfilled(latents)
        if first is None:
            self._first = _First(latents, made)
        else:
            self._first = None
            self._row.broadcast(first.made, 0, "output of the first guidance branch")
            self._row.broadcast(made, 1, "output of the second guidance branch")
        return Transformer2DModelOutput(sample=made) if arguments.get("return_dict", True) else (made,)

    def begin(self, paired: bool) -> None:
        """Say whether the steps to come have two calls."""
        self.paired, self._first = paired, None

    def end(self) -> None:
        """See that the last step had its second call.

        Raises:
            UnsupportedError: it had not; on both ranks.
        """
        if self._first is not None:
            raise UnsupportedError(
                "the last step called the transformer once; its plan for cfg_parallel_size expects two calls"
            )

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], latents: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self._forward(*args, **kwargs)[0]
        if (made.shape, made.dtype) != (latents.shape, latents.dtype):
            raise UnsupportedError(
                f"the transformer makes {made.dtype} of shape {tuple(made.shape)} from latents of "
                f"{latents.dtype} and {tuple(latents.shape)}; its plan for cfg_parallel_size expects the same"
            )
        return made.contiguous()


def _unfilled(latents: torch.Tensor) -> torch.Tensor:
    """An output to be filled; not-a-number shows if a pipeline reads it too early."""
    return torch.full_like(latents, torch.nan, memory_format=torch.contiguous_format)


@contextmanager
def guided(models: Sequence[Any], paired: bool) -> Iterator[None]:
    """Tell transformers what a request's steps are like, for as long as it is denoised.

    Args:
        models: the transformers.
        paired: whether each guidance branch has a call of its own.

    Raises:
        UnsupportedError: the steps were not as the plan says.
    """
    splits = [model.forward for model in models if isinstance(model.forward, CallSplit)]
    for split in splits:
        split.begin(paired)
    try:
        yield
        for split in splits:
            split.end()
    finally:
        for split in splits:
            split.begin(paired=False)  # drops what a step that ended half way has
