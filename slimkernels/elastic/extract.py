"""``extract``: a sub-network as a plain network of torch layers."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

from slimkernels.elastic.attention import ATTENTION, CutMasks, out_proj_of
from slimkernels.elastic.depth import SkippableBlock, always_run, remove, renumber
from slimkernels.elastic.layers import RECURRENT, full_size, kind_of, slim_class
from slimkernels.elastic.parameters import SlicedParameters, plain_parameters_again
from slimkernels.elastic.plan import Depth, Width, is_inside, plan
from slimkernels.elastic.recurrent import CutStates, refresh, state_sizes
from slimkernels.elastic.slices import Dims, Sliced, number_side, sliced_tensors, take
from slimkernels.elastic.transform import batch_norms, combined, fast_path_again
from slimkernels.elastic.width import view
from slimkernels.nn._base import SlimModule
from slimkernels.nn.attention import AnySizeMultiheadAttention


def extract(
    model: nn.Module,
    width: Width | None = None,
    depth: Depth = None,
    *,
    max_params: float | None = None,
    max_macs: float | None = None,
    max_latency_ms: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    example_inputs: Any = None,
) -> nn.Module:
    """A sub-network of ``model`` as a network of its own: same class, layers of torch sized to the width, copied
    weights.

    A network built at that width and depth loads its state_dict: skipped blocks are not there, and the modules of a
    Sequential or ModuleList are numbered anew. Where the forward needs a block's place, an ``nn.Identity`` fills it. Where
    it writes initial states of a recurrent layer at the full size, or attention masks for all heads, a hook of the layer cuts
    them. ``nn.MultiheadAttention`` is extracted as such where the channels of its heads, ``num_heads * head_dim``, are as many
    as the features around it; at other widths, which torch's layer cannot have, as ``nn.AnySizeMultiheadAttention`` of
    slimkernels. The model stays as it is.

    Args:
        width, depth: as in ``set_width``; or, instead of them:
        max_params, max_macs, max_latency_ms: limits. With ``evaluate`` the uniform sub-network within them that has the
            best score (see ``search``), without it the one with the most MACs, which need not be the best.
        example_inputs: what a limit of the latency is measured on.

    Raises: ValueError when the width or depth is not a legal one, a limit is given beside them or is impossible.
    """
    limits = {"params": max_params, "macs": max_macs, "latency_ms": max_latency_ms}
    limited = any(limit is not None for limit in limits.values())
    if limited == (width is not None) or (limited and depth is not None):
        raise ValueError(
            "extract: expected either a width (and depth) or limits, got " + ("both" if limited else "none")
        )
    if width is None:
        width, depth = _within(model, limits, evaluate, example_inputs)
    made, skipped = subnetwork(model, width, depth)
    if skipped:
        renumber(made, plan(model).stages.values())
    return made


def subnetwork(model: nn.Module, width: Width, depth: Depth) -> tuple[nn.Module, Collection[str]]:
    """What ``extract`` gives with the names that the modules have in ``model``, and the blocks that are not there."""
    known = plan(model)
    units = known.units("extract", width)
    made = view(model, width, depth)
    del made.__dict__["_elastic"]
    skipped = known.skipped("extract", depth)
    remove(made, known.stages.values(), skipped)
    dims = {key: dim for key, dim in known.dims.items() if not is_inside(key[0], skipped)}
    sliced = {(s.owner, s.name): s for s in sliced_tensors(made, dims)}
    norms = batch_norms(made)
    selected = {name: norm.selected() for name, norm in norms.items()}
    copies: dict[tuple, Tensor] = {}
    for name, module in list(made.named_modules()):
        for child in ("switch", "calibrated") if name in norms else ():
            module._modules.pop(child, None)
        if name.rpartition(".")[0] in norms or name.rpartition(".")[0].rpartition(".")[0] in norms:
            continue
        _copy_tensors(name, module, selected.get(name, {}), sliced, units, copies)
        if isinstance(module, SkippableBlock):
            always_run(module)
        if isinstance(module, SlicedParameters):
            plain_parameters_again(module)
        if isinstance(module, SlimModule) and "_plain_attributes" in module.__dict__:
            _become_plain(module)
        cut = None
        if name in known.states:
            cut = CutMasks(module.num_heads) if isinstance(module, ATTENTION) else CutStates(state_sizes(module))
        _resize(name, module, dims, units)
        if cut is not None:
            module.register_forward_pre_hook(cut, with_kwargs=True)
        if isinstance(module, RECURRENT):
            refresh(module)
    for (name, side), dim in dims.items():
        if (number := number_side(side)) is not None:
            setattr(made.get_submodule(name), number, dim.active(units))
    for module in made.modules():
        fast_path_again(module)
    return made, skipped


def _within(
    model: nn.Module,
    limits: Mapping[str, float | None],
    evaluate: Callable[[nn.Module], float] | None,
    example_inputs: Any,
) -> tuple[Width, Depth]:
    from slimkernels.elastic.search import largest, search  # search measures what extract gives

    if evaluate is None:
        return largest(model, limits, example_inputs)
    best = search(
        model,
        evaluate,
        max_params=limits["params"],
        max_macs=limits["macs"],
        max_latency_ms=limits["latency_ms"],
        example_inputs=example_inputs,
    ).best
    return best.width, best.depth


def _copy_tensors(
    owner: str,
    module: nn.Module,
    state: Mapping[str, Tensor | None],
    sliced: Mapping[tuple[str, str], Sliced],
    units: Mapping[str, int],
    copies: dict[tuple, Tensor],
) -> None:
    """Give a module slices of its own; tied tensors stay tied. ``state`` replaces what a batch norm uses at this
    width."""
    stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for tensors in stores:
        for name, tensor in list(tensors.items()):
            if tensor is None:
                continue
            cut = sliced.get((owner, name))
            source = state.get(name, tensor)
            assert source is not None
            sizes = () if cut is None else tuple((axis, dim.active(units)) for axis, dim in sorted(cut.axes.items()))
            key = (id(tensor), sizes)
            if key not in copies:
                data = source.detach().clone() if cut is None else take(cut, units, source)
                is_parameter = tensors is module._parameters
                copies[key] = nn.Parameter(data, requires_grad=tensor.requires_grad) if is_parameter else data
            tensors[name] = copies[key]


def _become_plain(module: Any) -> None:
    cls = type(module)
    kind = kind_of(module)
    assert kind is not None
    # The class that convert made of a user's subclass has it as a base beside the slimmable one.
    slim = slim_class(kind)
    assert slim is not None
    own = [base for base in cls.__bases__ if base not in slim.__mro__]
    module.__class__ = own[0] if own else kind.torch_class
    hooks = module._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "__module__", "").startswith("slimkernels.")]:
        del hooks[key]
    kept = module.__dict__["_plain_attributes"]
    for name in [name for name in module.__dict__ if name not in kept]:
        del module.__dict__[name]


def _resize(name: str, module: nn.Module, dims: Dims, units: Mapping[str, int]) -> None:
    """Set the attributes that say how large a layer is."""
    kind = kind_of(module)
    if kind is None:
        return
    heads = full_size(module, kind, "heads") if "heads" in kind.sides else 0
    for side in kind.sides:
        dim = dims.get((name, side))
        if dim is None or not kind.sizes[side]:
            continue
        active, attribute = dim.active(units), kind.sizes[side]
        for groups in ("groups", "num_groups"):
            if side != "in" and getattr(module, groups, 1) > 1:
                per_group = full_size(module, kind, side) // getattr(module, groups)
                setattr(module, groups, active // per_group)
        setattr(module, attribute, (active,) if isinstance(getattr(module, attribute), tuple) else active)
    if isinstance(module, ATTENTION):
        made, out = dims.get((name, "heads")), dims.get((out_proj_of(name), "out"))
        heads = heads if made is None else made.active(units)
        module.num_heads = heads // module.head_dim
        given: Any = type(module)
        if not module.embed_dim == heads == (module.out_proj.out_features if out is None else out.active(units)):
            any_size: Any = AnySizeMultiheadAttention
            module.__class__ = any_size if given is nn.MultiheadAttention else combined(any_size, given)
