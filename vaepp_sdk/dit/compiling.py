"""`model.compile`: torch.compile of a transformer's repeated blocks."""

from __future__ import annotations

from typing import Any

from vaepp_sdk.errors import UnsupportedError

__all__ = ["compile_blocks"]


def compile_blocks(model: Any, backend: str) -> None:
    """Compile the blocks that a diffusers model repeats, each kind once; nothing is compiled before it runs.

    What happens around the blocks, between ranks above all, stays as it is.

    Args:
        model: the transformer, with this rank's weights.
        backend: the name of a backend of torch.compile.

    Raises:
        UnsupportedError: the model does not say which blocks it repeats.
    """
    if not getattr(model, "_repeated_blocks", None):
        raise UnsupportedError(
            f"model.compile: {type(model).__name__} does not say which blocks it repeats; write 'off'"
        )
    model.compile_repeated_blocks(backend=backend)
