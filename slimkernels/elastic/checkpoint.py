"""``save`` and ``load``: an elastic model as one safetensors file, the plan in its metadata."""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slimkernels.elastic.convert import attach
from slimkernels.elastic.cost import layer_costs
from slimkernels.elastic.layers import full_size, kind_of
from slimkernels.elastic.plan import Dim, LayerCost, ParameterCost, Plan, Run, Stage, WidthGroup, plan, unwrap
from slimkernels.elastic.slices import number_side, parameter_side

_FORMAT = "slimkernels.elastic/1"


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Write weights, statistics and plan. The file appears whole or not at all: it is written aside and renamed.

    Raises: ValueError when the model is not elastic, OSError when the folder cannot be written.
    """
    known = plan(model)
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in unwrap(model).state_dict(keep_vars=True).items():
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.detach().clone().contiguous()
    metadata = {"format": _FORMAT, "plan": json.dumps(_to_json(known)), "aliases": json.dumps(aliases)}
    handle, aside = tempfile.mkstemp(prefix=path.name + ".", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, aside, metadata)
        os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load(path: str | os.PathLike, plain_model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """Turn ``plain_model``, built like the one that was converted, into the saved elastic model, and return it.

    Nothing is traced: the plan is in the file. With ``example_inputs`` MACs are counted for those, otherwise for the
    ones of ``convert``.

    Raises: FileNotFoundError, ValueError when the file is cut off, of another kind or of another model.
    """
    if "_elastic" in plain_model.__dict__:
        raise ValueError("load: expected a plain model, got one that is elastic already")
    if not Path(path).is_file():
        raise FileNotFoundError(f"load: no file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"load: {str(path)!r} is cut off or no safetensors file ({error})") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"load: {str(path)!r} was not written by slimkernels.elastic.save")
    known = _from_json(json.loads(metadata["plan"]))
    _check_fits(plain_model, known, path)
    if example_inputs is not None:
        known.layers = layer_costs(plain_model, example_inputs)
    for name, source in json.loads(metadata["aliases"]).items():
        tensors[name] = tensors[source]
    attach(plain_model, known)
    try:
        plain_model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"load: {str(path)!r} holds the weights of another model ({_first_line(error)})") from error
    return plain_model


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else lines[0]


def _check_fits(model: nn.Module, known: Plan, path: str | os.PathLike) -> None:
    modules = dict(model.named_modules())
    for stage in known.stages.values():
        for name in stage.blocks:
            if name not in modules:
                raise ValueError(f"load: {str(path)!r} is of another model: expected a block {name!r}, got none")
    for (name, side), dim in known.dims.items():
        module = modules.get(name)
        plain = parameter_side(side)
        kind = None if module is None else kind_of(module)
        size = None
        if module is not None and plain is not None and module._parameters.get(plain[1]) is not None:
            size = module._parameters[plain[1]].shape[plain[0]]
        elif module is not None and number_side(side) is not None:
            size = module.__dict__.get(number_side(side))
        elif module is not None and kind is not None and side in kind.sides:
            size = full_size(module, kind, side)
        if size != dim.size:
            found = "none" if size is None else size
            raise ValueError(
                f"load: {str(path)!r} is of another model: expected {name!r} with {dim.size} channels ({side}),"
                f" got {found}"
            )


def _to_json(known: Plan) -> dict[str, Any]:
    return {
        "widths": known.widths,
        "listed": known.listed,
        "divisor": known.divisor,
        "norm": known.norm,
        "sort": known.sort,
        "groups": [asdict(group) for group in known.groups.values()],
        "dims": [asdict(dim) for dim in known.dims.values()],
        "left_alone": known.left_alone,
        "gathers": known.gathers,
        "ignored": known.ignored,
        "layers": [asdict(layer) for layer in known.layers],
        "parameters": [asdict(parameter) for parameter in known.parameters],
        "notes": known.notes,
        "stages": [asdict(stage) for stage in known.stages.values()],
        "projections": known.projections,
        "states": known.states,
    }


def _from_json(data: dict[str, Any]) -> Plan:
    groups = [
        WidthGroup(g["name"], g["units"], g["unit"], tuple((name, side) for name, side in g["members"]))
        for g in data["groups"]
    ]
    dims = [Dim(d["module"], d["side"], tuple(Run(**run) for run in d["runs"])) for d in data["dims"]]
    widths = data["widths"] if data["listed"] else tuple(data["widths"])
    return Plan(
        widths=widths,
        divisor=data["divisor"],
        norm=data["norm"],
        sort=data["sort"],
        groups={group.name: group for group in groups},
        dims={(dim.module, dim.side): dim for dim in dims},
        left_alone=data["left_alone"],
        gathers=data["gathers"],
        ignored=data["ignored"],
        layers=[LayerCost(**{**layer, "sides": tuple(layer.get("sides", ("in", "out")))}) for layer in data["layers"]],
        parameters=[
            ParameterCost(p["numel"], tuple((a, b) for a, b in p["dims"]), tuple(p.get("owners", ())))
            for p in data["parameters"]
        ],
        notes=data["notes"],
        stages={
            s["name"]: Stage(s["name"], tuple(s["blocks"]), s["removable"])
            for s in data.get("stages", ())  # files from before there was depth have none
        },
        projections=data.get("projections", {}),
        states=data.get("states", []),
    )
