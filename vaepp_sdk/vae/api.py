"""`parallelize_vae`: the one line for people with a diffusers script of their own."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from vaepp_sdk.entries import load_object
from vaepp_sdk.entry_checks import AUTO
from vaepp_sdk.errors import AgreementError, UnsupportedError, VaeppWarning
from vaepp_sdk.parallel.gate import Gate
from vaepp_sdk.parallel.view import VaeGroup, backend_of
from vaepp_sdk.registry import Registry, default_registry
from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.chooser import StrategyChooser
from vaepp_sdk.vae.descent import OnOom
from vaepp_sdk.vae.plan import Output
from vaepp_sdk.vae.plan_gate import PlanGate
from vaepp_sdk.vae.wrapper import ParallelVAE

__all__ = ["parallelize_vae"]


def parallelize_vae(
    vae: Any,
    *,
    group: dist.ProcessGroup | None = None,
    size: int | None = None,
    strategy: str = AUTO,
    output: Output = "all",
    timeout: timedelta = timedelta(minutes=10),
    on_oom: OnOom = "step_down",
    registry: Registry | None = None,
    **strategy_options: Any,
) -> Any:
    """Spread a VAE's decode and encode over ranks that already exist; creates no process group.

    Every rank of the group calls this once, with the same arguments::

        pipe.vae = parallelize_vae(pipe.vae)

    Args:
        vae: a diffusers VAE, loaded alike on every rank.
        group: the process group that runs the DiT; None is the world group. Errors count ranks within it.
        size: how many of its first ranks share the work; None is all of them. A larger size is reduced,
            with a warning.
        strategy: a registered strategy, or `auto` for the VAE class's own rule.
        output: where results land: `all`, `rank0` (others get an empty batch) or `sharded` (a
            `vaepp_sdk.vae.landing.ShardedSample` on every rank).
        timeout: the limit of one wait for other ranks.
        on_oom: what happens where a rank's memory is not enough: all ranks `step_down` to a lighter plan
            together, or `fail`.
        registry: where strategies and VAE classes are looked up; None is this process's own.
        strategy_options: options of the named strategy.

    Returns:
        The VAE itself, untouched, where one rank would do all the work, unless an option of the strategy
        gives that rank something to do; else a `ParallelVAE`. Arguments are checked alike in both cases, and
        a warning names those that take no effect on one rank.

    Raises:
        UnsupportedError: the VAE class, strategy or an option is not known, an argument cannot be, or the
            strategy cannot run this VAE; on every rank alike. This rank is not in the group; on this rank.
        AgreementError: the ranks were given different arguments; on every rank.
    """
    registry = registry or default_registry()
    world_size = _world_size(group)
    if world_size > 1:
        # Before anything that one rank alone could refuse: a rank that raises must not leave others waiting.
        options = sorted(strategy_options.items())
        settings = (type(vae).__name__, size, strategy, output, timeout, on_oom, options)
        _agree(repr(settings), group, timeout if _is_limit(timeout) else timedelta(minutes=10))
    _check_arguments(vae, strategy, output, timeout, on_oom)
    size = _checked_size(size, world_size, group)
    entry = registry.vae(type(vae))
    chooser = StrategyChooser(registry, strategy, entry.strategies, entry.pick, strategy_options)
    if size == 1 and not chooser.serves_one_rank:
        # Where rank 0 is the only one, it is also all of them.
        idle_output = output == "sharded" or (output == "rank0" and world_size > 1)
        _tell_idle({"strategy": strategy != AUTO, "output": idle_output}, strategy_options, group)
        return vae
    adapter: VaeAdapter = load_object(entry.adapter, f"VAE class {entry.name!r}")(vae)
    chooser.check(adapter)
    _switch_tiling_on(chooser, adapter, size, group)
    view = VaeGroup.over(group, size, timeout)
    # A launcher says how many ranks this machine has; without one it may have all of them.
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    made = ParallelVAE(adapter, view, chooser, output, on_oom=on_oom, sharers=sharers)
    made.descent.on_plan = PlanGate(Gate(timeout, group), sharers=view)
    return made


def _world_size(group: dist.ProcessGroup | None) -> int:
    """How many ranks the group has."""
    size = dist.get_world_size(group) if dist.is_initialized() else 1
    if size < 1:
        raise UnsupportedError(
            "this rank is not in the group that parallelize_vae was given; call it on the group's ranks only"
        )
    return size


def _is_limit(timeout: object) -> bool:
    return isinstance(timeout, timedelta) and timeout > timedelta(0)


def _check_arguments(vae: object, strategy: object, output: object, timeout: object, on_oom: object) -> None:
    """Refuse what can be told from an argument alone."""
    if isinstance(vae, ParallelVAE):
        raise UnsupportedError(
            "this VAE is parallel already; to change how, give the VAE within it, its `vae`"
        )
    if not isinstance(strategy, str):
        raise UnsupportedError(f"strategy is {strategy!r}; it must be 'auto' or the name of a strategy")
    if output not in ("rank0", "all", "sharded"):
        raise UnsupportedError(f"output is {output!r}; it must be 'rank0', 'all' or 'sharded'")
    if not _is_limit(timeout):
        raise UnsupportedError(
            f"timeout is {timeout!r}; it must be a timedelta above 0, as in timedelta(minutes=10)"
        )
    if on_oom not in ("step_down", "fail"):
        raise UnsupportedError(f"on_oom is {on_oom!r}; it must be 'step_down' or 'fail'")


def _checked_size(size: int | None, world_size: int, group: dist.ProcessGroup | None) -> int:
    if size is None:
        return world_size
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UnsupportedError(f"size is {size!r}; it must be an integer from 1 to {world_size}")
    if size > world_size:
        _tell(f"size={size} is larger than the group of {world_size}; reduced to {world_size}.", group)
        return world_size
    return size


def _tell_idle(idle: Mapping[str, bool], options: Mapping[str, Any], group: dist.ProcessGroup | None) -> None:
    """Warn of arguments that only matter where ranks share the VAE's work."""
    names = [*(name for name, is_idle in idle.items() if is_idle), *options]
    if names:
        verb = "takes" if len(names) == 1 else "take"
        told = f"{', '.join(names)} {verb} no effect: one rank does all of the VAE's work"
        _tell(f"{told}, and the VAE is returned as it is.", group)


def _switch_tiling_on(
    chooser: StrategyChooser, adapter: VaeAdapter, size: int, group: dist.ProcessGroup | None
) -> None:
    """Switch the VAE's tiling on where a strategy that may be chosen works on its tiles, and say so."""
    if chooser.uses_tiling and not adapter.facts().use_tiling:
        _tell(f"the VAE's tiling is switched on for VAE patch parallelism over {size} ranks", group)
        adapter.vae.enable_tiling()


def _tell(message: str, group: dist.ProcessGroup | None) -> None:
    """Warn from one rank, of the call that the caller's caller made."""
    if not dist.is_initialized() or dist.get_rank(group) == 0:
        warnings.warn(message, VaeppWarning, stacklevel=4)


def _agree(settings: str, group: dist.ProcessGroup | None, timeout: timedelta) -> None:
    """Compare settings over the group. As its first collective it also readies NCCL for point to point."""
    cuda = torch.device("cuda")
    device = cuda if backend_of(group, cuda) == "nccl" else torch.device("cpu")
    digest = int.from_bytes(hashlib.sha256(settings.encode()).digest()[:7], "big")
    mine = torch.tensor([digest], dtype=torch.int64, device=device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    work = dist.all_gather(found, mine, group=group, async_op=True)
    assert work is not None
    work.wait(timeout)
    digests = [int(value) for value in found]
    if len(set(digests)) > 1:
        common = max(set(digests), key=digests.count)
        others = [rank for rank, value in enumerate(digests) if value != common]
        raise AgreementError(
            f"parallelize_vae was called with different arguments on ranks {others}; here: {settings}"
        )
