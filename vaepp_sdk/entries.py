"""What plugins register: strategies, VAE classes and pipelines.

Entries are plain data, so that a spec can be checked against them before anything heavy is imported. Where an
entry must name code that imports torch, it names it as `"package.module:attribute"`, imported at first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import attrs

from vaepp_sdk import entry_checks as checks
from vaepp_sdk.errors import PluginError
from vaepp_sdk.rules import ConflictRule, FactsRule, LighterRule, PickRule, UnfitRule

__all__ = [
    "BatchPlan",
    "CallsPlan",
    "ChainPlan",
    "ConflictRule",
    "DiTPlan",
    "FactsRule",
    "LighterRule",
    "Option",
    "PickRule",
    "PipelineEntry",
    "PipelinePlan",
    "Rung",
    "SequencePlan",
    "SizeRule",
    "StrategyEntry",
    "TensorPlan",
    "UnfitRule",
    "VaeEntry",
    "load_object",
]


@attrs.frozen(kw_only=True, field_transformer=checks.checked)
class Option:
    """One setting of a strategy, written in the spec under `[vae.options]`.

    Attributes:
        name: the key.
        kind: the TOML type it takes; there is no coercion.
        default: the value where the spec names none; None means the strategy chooses.
        help: one sentence, with the unit.
        minimum: the smallest number allowed, or None.
        maximum: the largest number allowed, or None.
        choices: the only values allowed, or empty.
    """

    name: str
    kind: Literal["integer", "number", "string", "boolean"]
    default: int | float | str | bool | None = None
    help: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = attrs.field(default=(), validator=checks.own_default)


@attrs.frozen(field_transformer=checks.checked)
class Rung:
    """A strategy and its options, as a way to do some work with less memory.

    Attributes:
        strategy: a strategy's name; it is tried where it is registered and validated for the VAE.
        options: its options.
    """

    strategy: str
    options: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True, field_transformer=checks.checked)
class StrategyEntry:
    """A way to cut, run and join VAE work.

    Attributes:
        name: what a spec writes as `vae.strategy`.
        factory: the strategy's class as `"module:attribute"`, or a callable; it is called with the options
            as keyword arguments and returns a `vaepp_sdk.vae.strategy.Strategy`.
        promise: what it guarantees and against which reference, in one sentence.
        options: the settings it takes.
        uses_tiling: True where the VAE's own tiling must be on for it to do its work; False where it does
            not look at that switch.
        single_rank_options: options that make it do on one rank what the plain VAE does not, where they
            are not at their defaults.
        validated_for: VAE classes and pipelines of other plugins, by name, that this strategy's author has
            validated it for; it joins the strategies their entries allow.
        conflict: the rule that says whether options, each of which is fine, go together. It is called before
            a rank starts, with the options as they were written, so it must not import torch.
        unfit: the rule that says whether options fit a VAE, as `"module:attribute"`, or a callable. Where the
            VAE's entry reads `facts` from its configuration, it is called before a rank starts, with the
            options as they were written and these facts, so it must not import torch.
        lighter: the rule that names what to try, in this order, where a rank's memory is not enough, as
            `"module:attribute"`, or a callable. It is called with the options in use, the VAE's facts and the
            work, and returns `Rung`s; what cannot be planned, and what needs as much, is passed over. None:
            only fewer pictures at a time are tried.
    """

    name: str = attrs.field(validator=checks.free_name)
    factory: str | Callable[..., Any] = attrs.field(validator=checks.reference)
    promise: str
    options: tuple[Option, ...] = attrs.field(default=(), validator=checks.distinct_names)
    uses_tiling: bool = False
    single_rank_options: tuple[str, ...] = attrs.field(default=(), validator=checks.declared_names)
    validated_for: tuple[str, ...] = ()
    conflict: ConflictRule | None = None
    unfit: str | UnfitRule | None = attrs.field(default=None, validator=checks.reference)
    lighter: str | LighterRule | None = attrs.field(default=None, validator=checks.reference)

    def serves_one_rank(self, options: Mapping[str, Any]) -> bool:
        """Whether it has work to do where one rank does all the VAE's work, given its options."""
        defaults = {option.name: option.default for option in self.options}
        return any(options.get(name, defaults[name]) != defaults[name] for name in self.single_rank_options)


@attrs.frozen(kw_only=True, field_transformer=checks.checked)
class VaeEntry:
    """A VAE class that can be decoded over several ranks.

    Attributes:
        name: the diffusers class name; subclasses that keep its decode and encode are served too.
        adapter: the adapter's class as `"module:attribute"`, called with the VAE.
        strategies: the strategies validated for this class.
        pick: the rule behind `strategy = "auto"`.
        facts: the rule that reads facts from `config.json`, so that options can be checked before the VAE is
            loaded; only the pixels per latent and the tiles need be exact. None: options are checked then.
    """

    name: str
    adapter: str | Callable[..., Any] = attrs.field(validator=checks.reference)
    strategies: tuple[str, ...]
    pick: PickRule
    facts: FactsRule | None = None


@attrs.frozen(kw_only=True, field_transformer=checks.checked)
class TensorPlan:
    """Which layers tensor parallelism shards; module names are relative to a block.

    Attributes:
        blocks: module lists whose every member is a block, as in `layers`.
        colwise: linear layers split by output features.
        rowwise: linear layers split by input features; their outputs are summed over the ranks.
        head_attributes: integer attributes of a block's submodules to divide by the number of ranks, as in
            `attention.heads`.
        widths: what must divide by the number of ranks, in `further` too: a name for the message, and the
            rule that reads the width from the component's `config.json`.
        packed: of the layers above those whose features are several parts one after another, each of which
            is split by itself; the rule reads the parts' widths from `config.json`.
        optional: of the names above those that some blocks lack.
        further: the plans of lists whose blocks are built in another way.
        norms: RMS norms over features that `colwise` cuts, as those over all heads at once; norms over one
            head need no change.
    """

    blocks: tuple[str, ...]
    colwise: tuple[str, ...]
    rowwise: tuple[str, ...]
    head_attributes: tuple[str, ...]
    widths: Mapping[str, Callable[[Mapping[str, Any]], int]] = attrs.field(factory=dict)
    packed: Mapping[str, Callable[[Mapping[str, Any]], tuple[int, ...]]] = attrs.field(factory=dict)
    optional: tuple[str, ...] = ()
    further: tuple[TensorPlan, ...] = ()
    norms: tuple[str, ...] = ()


@attrs.frozen(kw_only=True, field_transformer=checks.checked)
class BatchPlan:
    """How the transformer's call is shared out where it has both guidance branches in its batch.

    Attributes:
        arguments: the arguments of its forward that hold a batch, as a tensor or as a list; its first output
            holds one too.
        guided: whether a call has both branches, read from the pipeline's keyword arguments as the user gave
            them; those left out are at the pipeline's defaults. None: nothing is said of calls that have one.
    """

    arguments: tuple[str, ...]
    guided: Callable[[Mapping[str, Any]], bool] | None = None


@attrs.frozen(kw_only=True, field_transformer=checks.checked)
class CallsPlan:
    """How guidance is shared out where a step calls the transformer twice, once for each branch.

    The pipeline must hand both calls of a step the very same latents, and look at the first call's output
    after the second call only.

    Attributes:
        latents: the argument of its forward that holds them; its first output has their shape and dtype.
        paired: whether a step makes two calls, read from the pipeline's keyword arguments as the user gave
            them; those left out are at the pipeline's defaults.
        unguided: a setting in `model_index.json` that, where it is true, leaves steps with one call whatever
            is asked for, as of a model that was distilled to need no guidance.
    """

    latents: str
    paired: Callable[[Mapping[str, Any]], bool]
    unguided: str | None = None

    def pairs(self, call: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
        """Whether a step of this call makes two calls, with a pipeline of these settings."""
        distilled = self.unguided is not None and bool(settings.get(self.unguided))
        return not distilled and self.paired(call)


@attrs.frozen(kw_only=True, field_transformer=checks.checked)
class ChainPlan:
    """A list of blocks that the transformer calls one after another with the same arguments.

    Attributes:
        blocks: the module list, as in `layers`.
        carried: the arguments of a block that are what the one before returned, in that order.
        batched: the arguments that hold a batch along their first dimension, where they are tensors.
        sequence: the arguments that hold the sequence, and the dimension it lies on; those of one token are
            worked on alone everywhere but in attention. `(dimension, dims)` is for an argument that holds
            it only where it has that many dimensions.
        joins: the carried sequences that attention sees one after another, once for each kind of attention
            in a block; left out, all of them in their order.
        joined: the arguments that hold something for every token of the first of `joins`, as positions do,
            and the dimension it lies on.
        masks: of carried sequences, the argument that says which of their tokens are seen, boolean and
            `(batch, tokens)`, where a block makes attention's mask of it.
        dropped: the carried arguments that the last block does not return; it gives None in their place.
        local: submodules of a block whose attention is to tokens outside the sequence, as to those of a text,
            which every rank holds.
    """

    blocks: str
    carried: tuple[str, ...]
    batched: tuple[str, ...]
    sequence: Mapping[str, int | tuple[int, int]]
    joins: tuple[tuple[str, ...], ...] = ()
    joined: Mapping[str, int] = attrs.field(factory=dict)
    masks: Mapping[str, str] = attrs.field(factory=dict)
    dropped: tuple[str, ...] = ()
    local: tuple[str, ...] = ()


@attrs.frozen(kw_only=True, field_transformer=checks.checked)
class SequencePlan:
    """What ulysses and ring split.

    Attributes:
        chains: the lists of blocks that run on parts of the sequence.
        heads: reads the number of attention heads from the component's `config.json`.
    """

    chains: tuple[ChainPlan, ...]
    heads: Callable[[Mapping[str, Any]], int]


@attrs.frozen(kw_only=True, field_transformer=checks.checked)
class PipelinePlan:
    """What pipeline parallelism splits.

    Attributes:
        chain: the list of blocks that is dealt over the ranks in runs; all else runs on every rank.
        layers: reads the number of these blocks from the component's `config.json`; that of the shortest
            list, where `further` names others.
        further: lists behind it that are dealt over the same ranks, each by itself.
    """

    chain: ChainPlan
    layers: Callable[[Mapping[str, Any]], int]
    further: tuple[ChainPlan, ...] = ()

    @property
    def chains(self) -> tuple[ChainPlan, ...]:
        """All lists."""
        return self.chain, *self.further


@attrs.frozen(kw_only=True, field_transformer=checks.checked)
class DiTPlan:
    """How a pipeline's diffusion transformer is spread over the DiT group; what is left out is not supported.

    Attributes:
        component: the pipeline's component, as named in `model_index.json`.
        others: further components of the same kind that take turns with it; a model may lack them.
        tensor: for `tensor_parallel_size`.
        batch: for `cfg_parallel_size`, where one call has both guidance branches.
        calls: for `cfg_parallel_size`, where each branch has a call of its own.
        sequence: for `ulysses_degree` and `ring_degree`.
        pipeline: for `pipeline_parallel_size`.
        data: for `data_parallel_size`: whether the stages take lists of prompts and one generator a picture.
        excludes: arguments of the pipeline's call that do not work together with some dimensions, and which,
            as `vaepp_sdk.parallel.dims.AXES` names them.
    """

    component: str = "transformer"
    others: tuple[str, ...] = ()
    tensor: TensorPlan | None = None
    batch: BatchPlan | None = None
    calls: CallsPlan | None = None
    sequence: SequencePlan | None = None
    pipeline: PipelinePlan | None = None
    data: bool = False
    excludes: Mapping[str, tuple[str, ...]] = attrs.field(factory=dict)

    @property
    def components(self) -> tuple[str, ...]:
        """All components that are spread."""
        return self.component, *self.others

    @property
    def axes(self) -> tuple[str, ...]:
        """The dimensions it supports, outermost first, as `vaepp_sdk.parallel.dims.AXES` names them."""
        supported = {
            "data": self.data,
            "cfg": self.batch is not None or self.calls is not None,
            "pipeline": self.pipeline is not None,
            "ring": self.sequence is not None,
            "ulysses": self.sequence is not None,
            "tensor": self.tensor is not None,
        }
        return tuple(axis for axis, able in supported.items() if able)


@attrs.frozen(kw_only=True, field_transformer=checks.checked)
class SizeRule:
    """Which values of one argument of a pipeline's call work; the library refuses or changes others.

    Attributes:
        argument: the argument, as in `height`; calls that leave it out are at the pipeline's default.
        step: how far the values are apart. It is called with a function that gives a component's
            `config.json`, as in `config("vae")["block_out_channels"]`: checkpoints of a family differ.
        first: the smallest value; None is the step itself, so that the values are its multiples.
    """

    argument: str
    step: Callable[[Callable[[str], Mapping[str, Any]]], int]
    first: int | None = None


@attrs.frozen(kw_only=True, field_transformer=checks.checked)
class PipelineEntry:
    """A pipeline vaepp knows how to run stage by stage.

    Attributes:
        name: the diffusers class name, as in `model_index.json`.
        module: the module that defines it. Its source is read, not imported, to check `[call]`.
        vae: the VAE class the pipeline uses, registered as a `VaeEntry`.
        strategies: the strategies validated for this pipeline. Empty: not allowlisted for VAE PP.
        stages: the stage functions' class as `"module:attribute"`, or a callable; it is called with no
            argument and returns a `vaepp_sdk.stages.PipelineStages`.
        pick: the rule behind `strategy = "auto"`; None takes the VAE entry's.
        dit: the DiT plan; None where the DiT runs on one rank only.
        text_encoders: components that only the stage `encode_prompt` uses. Where there are any, one rank of
            each replica holds them and encodes for the others, whose pipelines have None in their place.
        fps: frames a second of its clips, where a spec says nothing else; None where it makes pictures.
        sizes: which sizes it can make; others are refused before a rank starts.
    """

    name: str
    module: str
    vae: str
    strategies: tuple[str, ...]
    stages: str | Callable[..., Any] = attrs.field(validator=checks.reference)
    pick: PickRule | None = None
    dit: DiTPlan | None = None
    text_encoders: tuple[str, ...] = ()
    fps: int | None = None
    sizes: tuple[SizeRule, ...] = ()


def load_object(reference: str | Callable[..., Any], owner: str) -> Callable[..., Any]:
    """Import what an entry names.

    Args:
        reference: `"module:attribute"`, or the object itself.
        owner: the plugin or entry to blame.

    Raises:
        PluginError: the reference is malformed, or cannot be imported.
    """
    if not isinstance(reference, str):
        return reference
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise PluginError(owner, f'{reference!r} is not of the form "module:attribute"')
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise PluginError(owner, f"cannot import {reference}: {error}") from error
    if not callable(found):
        raise PluginError(owner, f"{reference} is {type(found).__name__}, not something that can be called")
    return found
