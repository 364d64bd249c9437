"""`model.compile`: torch.compile of a transformer's repeated blocks."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from vaepp_sdk.dit.chain import Chain
from vaepp_sdk.dit.takeover import hand_over
from vaepp_sdk.dit.tensor import RowwiseLinear, SharedNorm
from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.parallel.exchanges import EXCHANGES

__all__ = ["compile_blocks"]

_RECOMPILE_LIMIT = 64
"""How many graphs one kind of block may have; it has a few, for unlike arguments and then for any length."""


def compile_blocks(model: Any, backend: str) -> None:
    """Compile the blocks that a diffusers model repeats, each kind once; nothing is compiled before it runs.

    What happens around the blocks, between ranks above all, stays as it is.

    Args:
        model: the transformer, with this rank's weights, spread over its rows.
        backend: the name of a backend of torch.compile.

    Raises:
        UnsupportedError: the model does not say which blocks it repeats.
    """
    if not getattr(model, "_repeated_blocks", None):
        raise UnsupportedError(
            f"model.compile: {type(model).__name__} does not say which blocks it repeats; write 'off'"
        )
    if any(isinstance(module, RowwiseLinear | SharedNorm) for module in model.modules()):
        # Their sums are in the graphs, where nothing counts them.
        model.register_forward_pre_hook(lambda *_: EXCHANGES.begin())
    chains = [module for module in model.modules() if isinstance(module, Chain)]
    if not chains:
        model.compile_repeated_blocks(backend=backend)
        return
    for chain in chains:
        chain.leave_to_compiler()
    functions = {function for chain in chains for function in chain.functions}
    local = {name for chain in chains for name in chain.local}
    # What runs beside a graph would call torch's function and leave the other ranks waiting, so that is an
    # error. Blocks compiled too often would run beside it too; the limit is one that nothing should meet.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    # All blocks share one backend: with one each, every block would be compiled anew.
    model.compile_repeated_blocks(backend=_Backend(backend, functions, local), fullgraph=True)


class _Backend:
    """A backend of torch.compile under which some functions are this rank's own.

    Args:
        name: the backend that compiles.
        functions: what is taken over.
        local: submodules of blocks whose attention stays as it is.
    """

    def __init__(self, name: str, functions: Collection[Callable[..., Any]], local: Collection[str]) -> None:
        self._compile: Callable[..., Any] = torch._dynamo.lookup_backend(name)
        self._functions, self._local = functions, local

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        """Compile the graph of a block, or of a part of it."""
        hand_over(module.graph, self._functions, self._is_local)
        module.recompile()
        return self._compile(module, inputs)

    def _is_local(self, node: fx.Node) -> bool:
        """Whether a call comes from one of the local submodules."""
        paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        return any(_name(path).endswith(f".{name}") for path in paths for name in self._local)


def _name(path: str) -> str:
    """A submodule's name as `.attn.norm` from how a graph writes it, as `L['self']._modules['attn'].norm`."""
    words = re.findall(r"\w+", path)
    return "".join(f".{word}" for word in words if word not in ("L", "self", "_modules"))
