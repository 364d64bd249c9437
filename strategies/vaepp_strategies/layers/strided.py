"""Convolutions with a stride whose output is one column wide."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["convolve"]


def convolve(
    convolution: nn.Conv2d | nn.Conv3d, values: torch.Tensor, padding: Sequence[int]
) -> torch.Tensor:
    """Convolve with zero padding.

    On CPUs with bfloat16 instructions, torch 2.13 computes only the first row of an output of one column
    where columns have a stride. Then two columns are computed, of which one is dropped.

    Args:
        convolution: the layer: its weights and settings, but for its padding.
        values: `(batch, channels, [frames,] rows, columns)`.
        padding: zeros on both ends of each axis behind the channels.
    """
    run: Callable[..., torch.Tensor] = F.conv2d if values.dim() == 4 else F.conv3d
    settings = convolution.dilation, convolution.groups
    kernel, stride = convolution.kernel_size[-1], convolution.stride[-1]
    one_column = stride > 1 and values.shape[-1] + 2 * padding[-1] < kernel + stride
    if not (one_column and values.dtype == torch.bfloat16 and values.device.type == "cpu"):
        return run(values, convolution.weight, convolution.bias, convolution.stride, padding, *settings)
    wider = F.pad(values, (0, stride))
    two = run(wider, convolution.weight, convolution.bias, convolution.stride, padding, *settings)
    return two[..., :1].contiguous()
