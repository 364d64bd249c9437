"""Which layers one decode or encode calls, in order, without computing anything.

The VAE's own forward code runs once on the meta device: shapes flow, numbers do not. What comes out is plain
data, the same on every rank, from which strategies plan their messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from vaepp_sdk.vae.live_bytes import LiveBytes

__all__ = ["INPUT", "UNKNOWN", "LayerCall", "LayerTrace", "plain_settings", "trace_layers"]

INPUT = -1
"""The source of a layer that reads the traced input itself."""

UNKNOWN = -2
"""The source of a layer whose input came from something other than a module, such as an addition."""


@attrs.frozen(kw_only=True)
class LayerCall:
    """One call of one module.

    Attributes:
        name: the module's qualified name in the VAE.
        kind: its class name.
        inside: the index of the call that made this one, or -1.
        source: the index of the innermost call whose very output is this one's input, unchanged since;
            `INPUT` or `UNKNOWN`.
        in_shape: the shape of its first argument.
        out_shape: the shape of its result, or of the first of several.
        operators: the torch operators it runs itself, outside the modules it calls, sorted.
        settings: its plain public attributes, as in `("kernel_size", (3, 3))`, sorted by name.
        before: values alive when it began; see `LayerTrace.peak`.
        peak: the most values alive at one time until it ended.
    """

    name: str
    kind: str
    inside: int
    source: int
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    operators: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...]
    before: int
    peak: int

    def setting(self, name: str, default: Any = None) -> Any:
        """One plain attribute of the module, or `default` where it has none of that name."""
        return dict(self.settings).get(name, default)


@attrs.frozen(kw_only=True, cache_hash=True)
class LayerTrace:
    """Every module call of one decode or encode, in the order in which they began.

    Attributes:
        in_shape: the shape of the traced input: batch 1 and small sides.
        calls: the calls.
        peak: the most values alive at one time: bytes, by the size of one of the VAE's own values. Weights,
            the input, and what kernels allocate inside themselves are not counted.
    """

    in_shape: tuple[int, ...]
    calls: tuple[LayerCall, ...]
    peak: int


class _Recorder(TorchDispatchMode):
    """Collects calls from hooks, the operators between them, and what is alive meanwhile.

    It keeps no tensor alive.

    Args:
        live: counts bytes.
        itemsize: bytes of one of the VAE's values.
    """

    def __init__(self, live: LiveBytes, itemsize: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[LayerCall] = []
        self._live = live
        self._itemsize = itemsize
        self._peaks: list[int] = []
        self._operators: dict[int, set[str]] = {}
        self._open: list[int] = []
        self._sources = WeakIdKeyDictionary()
        self._settings: dict[int, tuple[tuple[str, Any], ...]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note the operator with the innermost open call."""
        if self._open:
            self._operators[self._open[-1]].add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def keep(self, tensor: torch.Tensor, source: int) -> None:
        """Remember who made a tensor; the innermost call counts."""
        if self._source(tensor) == UNKNOWN:
            self._sources[tensor] = (source, tensor._version)

    def _source(self, tensor: torch.Tensor | None) -> int:
        """Who made a tensor, unless it has been written to since."""
        if tensor is None:
            return UNKNOWN
        source, version = self._sources.get(tensor, (UNKNOWN, -1))
        return int(source) if tensor._version == version else UNKNOWN

    def begin(self, name: str, module: nn.Module, arguments: Sequence[Any]) -> None:
        """A call starts."""
        tensor = next((value for value in arguments if isinstance(value, torch.Tensor)), None)
        call = LayerCall(
            name=name,
            kind=type(module).__name__,
            inside=self._open[-1] if self._open else -1,
            source=self._source(tensor),
            in_shape=() if tensor is None else tuple(tensor.shape),
            out_shape=(),
            operators=(),
            settings=self._settings_of(module),
            before=self._live.now // self._itemsize,
            peak=0,
        )
        self._peaks.append(self._live.peak)
        self._live.peak = self._live.now
        self._open.append(len(self.calls))
        self._operators[len(self.calls)] = set()
        self.calls.append(call)

    def _settings_of(self, module: nn.Module) -> tuple[tuple[str, Any], ...]:
        """Read once: a video VAE calls each layer many times."""
        if id(module) not in self._settings:
            self._settings[id(module)] = plain_settings(module)
        return self._settings[id(module)]

    def end(self, output: Any) -> None:
        """The innermost open call ends."""
        index = self._open.pop()
        if isinstance(output, tuple) and output:
            output = output[0]
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else ()
        operators = tuple(sorted(self._operators[index]))
        peak = self._live.peak
        self._live.peak = max(peak, self._peaks.pop())
        self.calls[index] = attrs.evolve(
            self.calls[index], out_shape=shape, operators=operators, peak=peak // self._itemsize
        )
        if isinstance(output, torch.Tensor):
            self.keep(output, index)


class _Run(nn.Module):
    """Gives `functional_call` a module whose forward is any function of the VAE."""

    def __init__(self, vae: nn.Module, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.vae = vae
        self.run = run

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.run(value)


def trace_layers(
    vae: nn.Module, run: Callable[[torch.Tensor], torch.Tensor], shape: Sequence[int]
) -> LayerTrace:
    """Record the module calls of one run.

    Args:
        vae: the VAE; its weights are not touched.
        run: decodes or encodes a window with it.
        shape: the shape of the input to run, `(1, channels, [frames,] rows, columns)`. Sides of several times
            the VAE's reach keep shapes at different depths apart.
    """
    dtype = _dtype(vae)
    with torch.inference_mode(False):
        value, state = torch.empty(tuple(shape), device="meta", dtype=dtype), _meta_state(vae)
    live = LiveBytes([value, *state.values()])
    recorder = _Recorder(live, dtype.itemsize)
    recorder.keep(value, INPUT)
    handles = []
    for name, module in vae.named_modules():
        handles.append(module.register_forward_pre_hook(_before(recorder, name)))
        handles.append(module.register_forward_hook(_after(recorder)))
    try:
        # Outside inference mode tensors count their versions, which show what is written in place.
        with torch.inference_mode(False), torch.no_grad(), live, recorder:
            functional_call(_Run(vae, run), state, (value,), tie_weights=False)
    finally:
        for handle in handles:
            handle.remove()
    peak = live.peak // dtype.itemsize
    return LayerTrace(in_shape=tuple(shape), calls=tuple(recorder.calls), peak=peak)


def _before(recorder: _Recorder, name: str) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, arguments: Any) -> None:
        recorder.begin(name, module, arguments)

    return hook


def _after(recorder: _Recorder) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        del module, arguments
        recorder.end(output)

    return hook


def _meta_state(vae: nn.Module) -> dict[str, torch.Tensor]:
    """Shapes in place of every tensor that each module holds itself, once for each module.

    A module registered under two names must not be given two: the second would be put back as its own.
    """
    state = {}
    for prefix, module in vae.named_modules(prefix="vae"):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                state[f"{prefix}.{name}"] = torch.empty_like(tensor, device="meta")
    return state


def _dtype(vae: nn.Module) -> torch.dtype:
    return next((value.dtype for value in vae.parameters() if value.is_floating_point()), torch.float32)


def plain_settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The module's plain public attributes; sub-modules, tensors and switches such as `training` are not."""
    plain = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and _is_plain(value)
    }
    return tuple(sorted(plain.items()))


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
