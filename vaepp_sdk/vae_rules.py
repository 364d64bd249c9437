"""Whether and how VAE patch parallelism runs: the allowlist, the size, the strategy, tiling."""

from __future__ import annotations

import attrs

from vaepp_sdk.entries import PipelineEntry, load_object
from vaepp_sdk.entry_checks import AUTO
from vaepp_sdk.errors import Fault, PluginError
from vaepp_sdk.model_folder import ModelFolder
from vaepp_sdk.options import nearest, option_faults
from vaepp_sdk.registry import Registry
from vaepp_sdk.spec import VaeSpec
from vaepp_sdk.text import shown, told

__all__ = ["VaeDecision", "decide_vae", "serves_one_rank", "unfit_faults", "vae_faults"]


@attrs.frozen
class VaeDecision:
    """What the rules make of the settings.

    Attributes:
        size: ranks that share the VAE's work; 1 is the plain VAE, unless `serves_one_rank` says otherwise.
        use_tiling: whether the VAE's tiling is on; None leaves the model's own setting.
        notices: what the user is told, one sentence each.
    """

    size: int
    use_tiling: bool | None
    notices: tuple[str, ...]


def vae_faults(vae: VaeSpec, size: int, entry: PipelineEntry | None, registry: Registry) -> list[Fault]:
    """Every fault in the strategy and its options."""
    if vae.strategy == AUTO:
        faults = _adapter_faults(size, entry, registry) + _auto_faults(size, entry, registry)
        if vae.options:
            fix = "name a strategy, or leave the options out"
            faults.append(Fault("$.vae.options", "strategy 'auto' takes no options", fix))
        return faults
    allowed = entry.strategies if entry is not None else ()
    faults = _adapter_faults(size, entry, registry)
    if vae.strategy not in registry.strategies:
        known = [AUTO, *(allowed or registry.strategies)]
        fix = "; ".join([nearest(vae.strategy[:100], known), *registry.problems])
        return [*faults, Fault("$.vae.strategy", f"no plugin registers {shown(vae.strategy)}", fix)]
    faults += option_faults(registry.strategies[vae.strategy], vae.options, "$.vae.options")
    if entry is not None and allowed and vae.strategy not in allowed:
        found = f"{shown(vae.strategy)} is not validated for {entry.name}"
        faults.append(Fault("$.vae.strategy", found, f"it must be one of {', '.join([AUTO, *allowed])}"))
    return faults


def unfit_faults(
    vae: VaeSpec, folder: ModelFolder, entry: PipelineEntry | None, registry: Registry
) -> list[Fault]:
    """Options, each of which is fine, that do not fit this model's VAE, as far as its configuration shows.

    Raises:
        SpecError: the VAE's `config.json` cannot be read.
        PluginError: the strategy's rule `unfit` raised, or cannot be imported.
    """
    strategy = registry.strategies.get(vae.strategy)
    served = registry.vaes.get(entry.vae) if entry is not None else None
    rule = strategy.unfit if strategy is not None else None
    read = served.facts if served is not None else None
    if not vae.options or strategy is None or rule is None or read is None:
        return []
    try:
        facts = read(folder.config("vae"))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return []  # what its configuration leaves out, the VAE itself knows once it is loaded
    try:
        unfit = load_object(rule, f"strategy {strategy.name!r}")(vae.options, facts)
        return [Fault("$.vae.options", *map(str, unfit))] if unfit is not None else []
    except Exception as error:
        problem = f"its rule 'unfit' raised {told(error)}"
        raise PluginError(f"for strategy {strategy.name}", problem) from error


def decide_vae(
    vae: VaeSpec, size: int, ranks: int, pipeline: str, entry: PipelineEntry | None, registry: Registry
) -> VaeDecision:
    """Apply the rules to settings without faults.

    Args:
        vae: the `[vae]` table.
        size: `vae_patch_parallel_size`.
        ranks: ranks in the DiT group.
        pipeline: the pipeline class.
        entry: its entry, if there is one.
        registry: the allowlist and the strategies.
    """
    notices = []
    if size > 1 and (entry is None or not entry.strategies):
        allowed = ", ".join(registry.allowlist) or "no pipeline"
        notices.append(
            f"vae_patch_parallel_size={size} is set but VAE patch parallelism is only enabled for {allowed}; "
            "ignoring."
        )
        size = 1
    if size > ranks:
        notices.append(
            f"vae_patch_parallel_size={size} is larger than the DiT group of {ranks}; reduced to {ranks}."
        )
        size = ranks
    use_tiling = vae.vae_use_tiling
    if entry is None or not (size > 1 or serves_one_rank(vae, entry, registry)):
        notices += _idle(vae, ranks, pipeline)
    elif not _uses_tiling(vae.strategy, entry, registry):
        if use_tiling:
            told = f"strategy {vae.strategy!r} does not work tile by tile"
            notices.append(f"vae.vae_use_tiling takes no effect: {told}.")
            use_tiling = None
    elif not use_tiling:
        notices.append(f"vae_use_tiling is switched on for VAE patch parallelism over {size} ranks.")
        use_tiling = True
    return VaeDecision(size, use_tiling, tuple(notices))


def serves_one_rank(vae: VaeSpec, entry: PipelineEntry | None, registry: Registry) -> bool:
    """Whether the named strategy and its options have work to do where one rank does all the VAE's work."""
    strategy = registry.strategies.get(vae.strategy)
    validated = entry is not None and vae.strategy in entry.strategies
    return strategy is not None and validated and strategy.serves_one_rank(vae.options)


def _adapter_faults(size: int, entry: PipelineEntry | None, registry: Registry) -> list[Fault]:
    """A pipeline whose VAE class nobody adapts, as where that plugin is blocked."""
    if size == 1 or entry is None or not entry.strategies or entry.vae in registry.vaes:
        return []
    found = f"no plugin registers {entry.vae}, the VAE of {entry.name}"
    fix = "; ".join(["install or unblock the plugin, or write 1", *registry.problems])
    return [Fault("$.parallel.vae_patch_parallel_size", found, fix)]


def _auto_faults(size: int, entry: PipelineEntry | None, registry: Registry) -> list[Fault]:
    """`auto` may pick any validated strategy, so each must be there before a rank starts."""
    missing = [name for name in entry.strategies if name not in registry.strategies] if entry else []
    if size == 1 or entry is None or not missing:
        return []
    found = f"'auto' may choose {', '.join(missing)}, which no plugin registers"
    fix = "; ".join(["install or unblock the plugin, or name another strategy", *registry.problems])
    return [Fault("$.vae.strategy", found, fix)]


def _uses_tiling(strategy: str, entry: PipelineEntry, registry: Registry) -> bool:
    names = entry.strategies if strategy == AUTO else (strategy,)
    return any(registry.strategy(name).uses_tiling for name in names)


def _idle(vae: VaeSpec, ranks: int, pipeline: str) -> list[str]:
    """One sentence naming the settings that only matter where ranks share the VAE's work."""
    default = VaeSpec()
    named = {name: getattr(vae, name) for name in ("strategy", "output", "options")}
    if ranks > 1 and vae.output == "all":
        del named["output"]  # each rank then decodes for itself
    names = [name for name, value in named.items() if value != getattr(default, name)]
    if not names:
        return []
    keys = ", ".join(f"vae.{name}" for name in names)
    verb = "takes" if len(names) == 1 else "take"
    return [f"{keys} {verb} no effect: one rank does all of the VAE's work for {pipeline}."]
