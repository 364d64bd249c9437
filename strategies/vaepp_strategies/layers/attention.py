"""Self-attention over a picture whose parts are held by several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from vaepp_strategies.layers.exchange import Exchange

__all__ = ["shared_attention"]


def shared_attention(attention: Any, exchange: Exchange) -> Callable[..., torch.Tensor]:
    """A forward for diffusers' `Attention` in which every position attends to the whole picture.

    As `AttnProcessor2_0` does it, but each rank projects keys and values of its own core only, and all ranks
    exchange them. The layer's group normalisation must be replaced too, so that it is the whole picture's.

    Args:
        attention: a self-attention layer over `(batch, channels, rows, columns)` without masks, spatial or
            query and key normalisation; see `inspect.unknown_layers`.
        exchange: this rank's place among the active ranks.
    """

    def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        normed = hidden_states
        if attention.group_norm is not None:
            normed = attention.group_norm(hidden_states)
        keys, values = _everyones_keys_and_values(attention, normed, exchange)
        query = _split_heads(attention.to_q(_tokens(normed)), attention.heads)
        mixed = F.scaled_dot_product_attention(
            query, _split_heads(keys, attention.heads), _split_heads(values, attention.heads)
        )
        mixed = mixed.transpose(1, 2).flatten(2).to(query.dtype)
        mixed = attention.to_out[1](attention.to_out[0](mixed))
        # Contiguous: transposed strides would reach the next convolutions and switch them to other kernels.
        result = mixed.transpose(1, 2).reshape(hidden_states.shape).contiguous()
        if attention.residual_connection:
            result = result + hidden_states
        scaled: torch.Tensor = result / attention.rescale_output_factor
        return scaled

    return forward


def _everyones_keys_and_values(
    attention: Any, normed: torch.Tensor, exchange: Exchange
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all cores, each `(batch, positions, inner width)`.

    Both travel in one message. Where columns are split, positions stand in another order than in the whole
    picture, which attention does not see.
    """
    own = _tokens(exchange.core(normed))
    mine = torch.stack([attention.to_k(own), attention.to_v(own)])
    keys, values = torch.cat(exchange.gather(mine, exchange.core_areas(normed), 2, "keys and values"), dim=2)
    return keys, values


def _tokens(picture: torch.Tensor) -> torch.Tensor:
    """`(batch, channels, rows, columns)` as `(batch, positions, channels)`."""
    return picture.flatten(2).transpose(1, 2)


def _split_heads(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """`(batch, positions, width)` as `(batch, heads, positions, width / heads)`."""
    batch, positions, width = tokens.shape
    return tokens.view(batch, positions, heads, width // heads).transpose(1, 2)
