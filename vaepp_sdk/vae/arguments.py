"""Reads a call of `decode` or `encode` as the wrapped class would, whatever its arguments are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch

__all__ = ["CallArguments", "read_arguments"]


@attrs.frozen(eq=False)
class CallArguments:
    """What a caller gave.

    Attributes:
        value: the latents or pictures.
        return_dict: whether an output object is wanted instead of a tuple.
        further: everything else that differs from its default, by name.
    """

    value: torch.Tensor
    return_dict: bool
    further: Mapping[str, Any]


def read_arguments(
    method: Callable[..., Any], owner: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> CallArguments:
    """Bind arguments to a method's own signature.

    A `generator` is dropped: it has no effect on the classes that take one here.

    Args:
        method: the wrapped VAE's bound method; its first parameter is the tensor.
        owner: the VAE class, for messages.
        args: the positional arguments.
        kwargs: the keyword arguments.

    Raises:
        TypeError: the method itself does not take them.
    """
    signature = inspect.signature(method)
    unknown = sorted(set(kwargs) - set(signature.parameters))
    if unknown:
        raise TypeError(f"{method.__name__}() of a parallel {owner} does not take {', '.join(unknown)}")
    bound = dict(signature.bind(*args, **kwargs).arguments)
    value = bound.pop(next(iter(signature.parameters)))
    return_dict = bound.pop("return_dict", True)
    bound.pop("generator", None)
    further = {
        name: given for name, given in bound.items() if given is not signature.parameters[name].default
    }
    return CallArguments(value, return_dict, further)
