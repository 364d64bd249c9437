"""Functions of torch that a rank runs in its own way while its blocks run, compiled or not.

Blocks that run as they are meet a mode, which sees every function they call. Compiled code asks no mode: in
its graphs the calls are replaced by operators into which the compiler does not look (`hand_over`), and these
find what has the function now. So a graph knows nothing of a layout, and one serves all requests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import fx, library
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["Takeover", "hand_over"]

_RUNNING: dict[Callable[..., Any], Takeover] = {}
"""What has taken over a function in the compiled blocks that run now."""


class Takeover(TorchFunctionMode):
    """Inside its block, one function of torch is this rank's own.

    Attributes:
        function: the one it stands for.
    """

    function: ClassVar[Any]

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """What is called in its place, with the same arguments."""
        raise NotImplementedError

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Take over the one function."""
        call = self.own if func is self.function else func
        return call(*args, **(kwargs or {}))

    @contextmanager
    def over(self, *, compiled: bool) -> Iterator[None]:
        """Have the function in blocks that run as they are, or in compiled ones."""
        if not compiled:
            with self:
                yield
            return
        _RUNNING[self.function] = self
        try:
            yield
        finally:
            del _RUNNING[self.function]


def hand_over(
    graph: fx.Graph, functions: Collection[Callable[..., Any]], local: Callable[[fx.Node], bool]
) -> None:
    """Replace calls in the graph of a compiled block by those of operators that do what `Takeover`s say.

    Args:
        graph: as torch.compile gives it to a backend.
        functions: which are taken over.
        local: whether a call of attention is not to the sequence, and so stays as it is.
    """
    last: fx.Node | None = None
    for node in graph.nodes:
        if node.target not in functions:
            continue
        if node.target is F.linear and _ndim_of_input(node) == 2:
            node.target = torch.ops.vaepp_sdk.linear.default
        elif node.target is F.scaled_dot_product_attention and not local(node):
            node.target = torch.ops.vaepp_sdk.attention.default
            if last is not None:
                node.update_kwarg("after", last)
            last = node


def _ndim_of_input(node: fx.Node) -> int:
    given: Any = node.args[0] if node.args else node.kwargs["input"]
    return int(given.meta["example_value"].ndim)


def _now(function: Callable[..., Any]) -> Callable[..., Any]:
    """What is called for a function; itself in blocks of lists that nothing spreads."""
    running = _RUNNING.get(function)
    return function if running is None else running.own


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    del after
    settings = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    made: torch.Tensor = _now(F.scaled_dot_product_attention)(query, key, value, attn_mask, **settings)
    return made.contiguous()


def _linear(given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    made: torch.Tensor = _now(F.linear)(given, weight, bias)
    return made.clone()  # an output must have its own memory, and begin where that does


# As torch's own, but for `after`: each attention of a graph is given the output of the one before, so that no
# compiler lets ranks trade parts of them in different order.
library.custom_op(
    "vaepp_sdk::attention",
    _attention,
    mutates_args=(),
    schema=(
        "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
        "bool is_causal=False, float? scale=None, bool enable_gqa=False, Tensor? after=None) -> Tensor"
    ),
).register_fake(lambda query, *_, **__: query.new_empty(query.shape))
library.custom_op(
    "vaepp_sdk::linear",
    _linear,
    mutates_args=(),
    schema="(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
).register_fake(lambda given, weight, *_: given.new_empty(len(given), len(weight)))
