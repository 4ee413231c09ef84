"""Checkpoints of the published weight generators."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slimkernels.hyper.generator import WeightGenerator
from slimkernels.hyper.networks import InrNetworks
from slimkernels.hyper.targets import Target
from slimkernels.ops.inr_weights import COMPAT
from slimkernels.reference.inr_weights import AXES

_KEY = re.compile(
    r"(?:module\.)?model\.(\w+)\.(initial_layer|residual_blocks|scalars|output_layer)(?:\.(\d+))?(?:\.(weight|bias))?"
)


class _Network(NamedTuple):
    """One published network."""

    name: str
    initial: tuple[Tensor, Tensor]  # weight and bias
    residual: list[tuple[Tensor, Tensor]]
    scalars: list[Tensor]
    output: tuple[Tensor, Tensor]


def load_published(
    checkpoint: Mapping[str, Any],
    target: nn.Module,
    tensors: str | Sequence[str] = "*",
    *,
    norm: float,
    compat: str = "neumeta",
    ema: bool = True,
    names: Mapping[str, str] | None = None,
    noise: str = "element",
    blocks: Sequence[str] | None = None,
    example_inputs: Any = None,
    convert: Mapping[str, Any] | None = None,
) -> WeightGenerator:
    """A generator with the weights of a published checkpoint, which generates what the published code does.

    Sizes of the networks are read from the checkpoint, whose keys are ``model.<network>.`` with ``initial_layer.weight``,
    ``residual_blocks.<k>.weight``, their biases, ``scalars.<k>`` and ``output_layer``. A network is known by its number (the
    place of its tensor among the generated ones) or by the tensor's name with ``_`` for each dot. As in the published code a
    kernel takes the middle of a network's outputs, and a bias or a matrix the first of them.

    Args:
        checkpoint: the loaded file (with ``model_state_dict`` or ``state_dict`` inside), or such a state dict.
        target, tensors, blocks, example_inputs, convert: as for ``WeightGenerator``; batch norms folded first, as the
            published code does.
        norm: ``dimensions.norm`` of the published configuration.
        compat: "neumeta" (ReLU; Yang et al.) or "htty" (ELU, sines before cosines, noise within 0.49; Sommariva et al.).
        ema: take the moving average of the weights where the checkpoint has one (``ema_shadow``), as its evaluation does.
        names: the checkpoint's name of a tensor, where it is another than the target's.
        noise: "element" as published, "axis" or "none".

    Raises: ValueError when keys or shapes are not those of such a checkpoint, or do not fit the tensors; a transposed
        convolution, and a matrix after a flatten, are not laid out as published.
    """
    if compat not in COMPAT:
        raise ValueError(f"load_published: expected compat to be one of {', '.join(COMPAT)}, got {compat!r}")
    networks = _networks(_state(checkpoint, ema))
    first = next(iter(networks.values()))
    hidden, encoding = first.initial[0].shape
    generator = WeightGenerator(
        target,
        tensors,
        hidden=hidden,
        layers=1 + len(first.residual),
        bands=(encoding - AXES) // (2 * AXES),
        size_bands=None,
        activation="elu" if compat == "htty" else "relu",
        base=None,
        noise=noise,
        compat=compat,
        norm=norm,
        blocks=blocks,
        example_inputs=example_inputs,
        convert=convert,
    )
    chosen = _choose(networks, generator.targets, names or {})
    with torch.no_grad():
        for part in generator._parts():
            part.scale.fill_(1)
            for i, tensor in enumerate(part.targets):
                _copy(chosen[tensor.name], part, i, tensor)
    return generator


def _state(checkpoint: Mapping[str, Any], ema: bool) -> dict[str, Tensor]:
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"load_published: expected checkpoint to be a mapping, got {type(checkpoint).__name__}")
    state = next((checkpoint[key] for key in ("model_state_dict", "state_dict") if key in checkpoint), checkpoint)
    if ema and checkpoint.get("ema_shadow"):
        state = {**state, **checkpoint["ema_shadow"]}
    return dict(state)


def _networks(state: Mapping[str, Tensor]) -> dict[str, _Network]:
    """The networks by number or name."""
    parts: dict[str, dict[tuple[str, int, str], Tensor]] = {}
    for key, value in state.items():
        match = _KEY.fullmatch(key)
        if match is None or not isinstance(value, Tensor):
            raise ValueError(
                "load_published: expected keys model.<network>.initial_layer.weight, .residual_blocks.<k>.weight, .scalars.<k>,"
                f" .output_layer.weight and the biases, got {key!r}"
            )
        name, kind, k, end = match.groups()
        parts.setdefault(name, {})[kind, int(k or 0), end or ""] = value
    if not parts:
        raise ValueError("load_published: expected a checkpoint with at least one network, got none")
    found = {name: _network(name, entries) for name, entries in parts.items()}
    reference = next(iter(found.values()))
    for network in found.values():
        ours, theirs = _size(reference), _size(network)
        if ours != theirs:
            raise ValueError(
                f"load_published: expected networks of one (hidden, inputs, layers), got {ours} for {reference.name!r} and"
                f" {theirs} for {network.name!r}"
            )
    return found


def _network(name: str, entries: dict[tuple[str, int, str], Tensor]) -> _Network:
    def take(kind: str, k: int, end: str, shape: tuple[int, ...] | None = None) -> Tensor:
        key = ".".join(
            ["model", name, kind, *([str(k)] if kind in ("residual_blocks", "scalars") else []), *filter(None, [end])]
        )
        value = entries.pop((kind, k, end), None)
        if value is None:
            raise ValueError(f"load_published: expected a key {key!r}, got none")
        if shape is not None and tuple(value.shape) != shape:
            raise ValueError(f"load_published: expected {key!r} of shape {shape}, got {tuple(value.shape)}")
        return value

    weight = take("initial_layer", 0, "weight")
    if weight.dim() != 2 or weight.shape[1] <= AXES or (weight.shape[1] - AXES) % (2 * AXES):
        raise ValueError(
            f"load_published: expected 'model.{name}.initial_layer.weight' of shape (hidden, 6 + 12 * bands), got"
            f" {tuple(weight.shape)}"
        )
    hidden = weight.shape[0]
    depth = 1 + max([k for kind, k, _ in entries if kind == "residual_blocks"], default=-1)
    output = take("output_layer", 0, "weight")
    if output.dim() != 2 or output.shape[1] != hidden or depth < 1:
        raise ValueError(
            f"load_published: expected network {name!r} with residual layers and an output layer of {hidden} inputs, got {depth}"
            f" and {tuple(output.shape)}"
        )
    network = _Network(
        name,
        (weight, take("initial_layer", 0, "bias", (hidden,))),
        [
            (take("residual_blocks", k, "weight", (hidden, hidden)), take("residual_blocks", k, "bias", (hidden,)))
            for k in range(depth)
        ],
        [take("scalars", k, "", ()) for k in range(depth)],
        (output, take("output_layer", 0, "bias", (output.shape[0],))),
    )
    if entries:
        raise ValueError(
            f"load_published: expected network {name!r} with {depth} residual layers, got also {next(iter(entries))}"
        )
    return network


def _size(network: _Network) -> tuple[int, int, int]:
    hidden, inputs = network.initial[0].shape
    return hidden, inputs, 1 + len(network.residual)


def _choose(networks: dict[str, _Network], targets: list[Target], names: Mapping[str, str]) -> dict[str, _Network]:
    """The network of each tensor."""
    numbered = all(name.isdigit() for name in networks)
    if len(networks) != len(targets):
        raise ValueError(
            f"load_published: expected {len(targets)} networks, one for each generated tensor, got {len(networks)}"
        )
    chosen = {}
    for i, tensor in enumerate(targets):
        name = str(i) if numbered else names.get(tensor.name, tensor.name).replace(".", "_")
        if name not in networks:
            raise ValueError(
                f"load_published: expected a network {name!r} for {tensor.name!r}, got {', '.join(networks)}"
            )
        if tensor.layout == "iohw" or tensor.per_unit > 1:
            what = "transposed convolutions" if tensor.layout == "iohw" else "matrices after a flatten"
            raise ValueError(f"load_published: expected tensors that are not of {what}, got {tensor.name!r}")
        found = networks[name].output[0].shape[0]
        if tensor.tile != (1, 1) or found < tensor.outputs:
            raise ValueError(
                f"load_published: expected a network of at least {tensor.outputs} outputs, and no tile, for {tensor.name!r}, got"
                f" {found} and tile {tensor.tile}"
            )
        chosen[tensor.name] = networks[name]
    return chosen


def _copy(network: _Network, part: InrNetworks, index: int, tensor: Target) -> None:
    part.w_in[index], part.b_in[index] = network.initial
    for k, (weight, bias) in enumerate(network.residual):
        part.w_hidden[index, k], part.b_hidden[index, k] = weight, bias
        part.skip[index, k] = network.scalars[k]
    weight, bias = network.output
    count = tensor.outputs
    theirs = len(weight) // 2 - count // 2 if len(tensor.shape) > 2 and count < len(weight) else 0
    ours = (part.w_out.shape[1] - count) // 2
    part.w_out[index], part.b_out[index] = 0.0, 0.0
    part.w_out[index, ours : ours + count] = weight[theirs : theirs + count]
    part.b_out[index, ours : ours + count] = bias[theirs : theirs + count]
