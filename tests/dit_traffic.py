"""Counts the bytes of the transformer's exchanges without the help of the code under test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from pipeline_jobs import loaded, resolved_for, run

from vaepp_sdk.dit.prompts import PromptShare
from vaepp_sdk.dit.row import Row
from vaepp_sdk.events import Event, StageEnd, StageStart


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def traffic() -> Iterator[dict[str, list[int]]]:
    """The bytes this rank puts in, by kind of exchange; of an all-to-all, what leaves the rank."""
    seen: dict[str, list[int]] = {}
    encode = PromptShare.share

    def count(kind: str, nbytes: int) -> None:
        seen.setdefault(kind, []).append(nbytes)

    def uncounted(share: PromptShare, *args: Any) -> Any:
        """Encoded prompts are no exchange of the transformer's."""
        before = {kind: list(sizes) for kind, sizes in seen.items()}
        found = encode(share, *args)
        seen.clear()
        seen.update(before)
        return found

    plain = {
        name: getattr(dist, name)
        for name in (
            "all_reduce",
            "all_gather",
            "all_to_all_single",
            "broadcast",
            "batch_isend_irecv",
            "isend",
        )
    }

    def all_reduce(tensor: torch.Tensor, **settings: Any) -> Any:
        count("all_reduce", _nbytes(tensor))
        return plain["all_reduce"](tensor, **settings)

    def all_gather(parts: list[torch.Tensor], tensor: torch.Tensor, **settings: Any) -> Any:
        count("all_gather", _nbytes(tensor))
        return plain["all_gather"](parts, tensor, **settings)

    def all_to_all(
        arrived: torch.Tensor, sent: torch.Tensor, into: list[int], out: list[int], *, group: Any
    ) -> Any:
        leaving = sum(out) - out[dist.get_rank(group)]
        count("all_to_all", leaving * sent.element_size())
        return plain["all_to_all_single"](arrived, sent, into, out, group=group)

    def broadcast(tensor: torch.Tensor, *, group: Any, group_src: int) -> Any:
        if dist.get_rank(group) == group_src:
            count("broadcast", _nbytes(tensor))
        return plain["broadcast"](tensor, group=group, group_src=group_src)

    def batch(operations: list[dist.P2POp]) -> Any:
        send, receive = operations
        assert send.tensor.data_ptr() != receive.tensor.data_ptr(), "a buffer is sent and received"
        count("ring", _nbytes(send.tensor))
        return plain["batch_isend_irecv"](operations)

    send_on = Row.send

    def send(row: Row, tensor: torch.Tensor, to: int, what: str) -> Any:
        count("send", _nbytes(tensor))
        return send_on(row, tensor, to, what)

    replaced = {
        "all_reduce": all_reduce,
        "all_gather": all_gather,
        "all_to_all_single": all_to_all,
        "broadcast": broadcast,
        "batch_isend_irecv": batch,
    }
    with ExitStack() as stack:
        # A batch of messages names dist.isend itself, so single ones are counted where they are asked for.
        stack.enter_context(patch.object(Row, "send", send))
        stack.enter_context(patch.object(PromptShare, "share", uncounted))
        for name, function in replaced.items():
            stack.enter_context(patch.object(dist, name, function))
        yield seen


def denoised_rank(rank: int, jobs: Sequence[tuple[str, Mapping[str, int], Mapping[str, Any]]]) -> list[int]:
    """The bytes that this rank puts in while it denoises, for each checkpoint, `[parallel]` and `[call]`."""
    del rank
    found = []
    for model, sizes, call in jobs:
        resolved = resolved_for(model, parallel=dict(sizes), call=dict(call))
        with traffic() as seen:
            total: list[int] = []

            def note(event: Event, seen: dict[str, list[int]] = seen, total: list[int] = total) -> None:
                if isinstance(event, StageStart | StageEnd) and event.stage == "denoise":
                    total.append(sum(map(sum, seen.values())))

            run(loaded(resolved, note), resolved)
        before, after = total
        found.append(after - before)
    return found
