"""A segment of a deployed network at one width: weights folded and packed, and the call that runs it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimkernels._extension import _C
from slimkernels.elastic.deploy_form import SegmentForm, Step
from slimkernels.elastic.deploy_ops import LINE, symmetric_padding
from slimkernels.elastic.deploy_report import LayerTime
from slimkernels.reference._activation import activation as apply_activation


class Misfit(Exception):
    """A step does not fit the shapes it got; PyTorch has to run that node."""

    def __init__(self, node: str) -> None:
        super().__init__(node)
        self.node = node


class Layer:
    """What a step with weights needs of its layer: convolutions and linear layers as 2d convolutions."""

    weight: Tensor  # (out, in / groups, kh, kw), transposed: (in, out / groups, kh, kw); affine: (c,)
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.stride = self.padding = self.dilation = self.output_padding = [1, 1]
        self.groups, self.transposed = 1, False


@torch.no_grad()
def layer_of(step: Step, root: nn.Module) -> Layer:
    """Weights of a step, its batch norm folded in."""
    module: Any = root.get_submodule(step.module)
    if step.kind == "affine":
        scale, shift = _scale_and_shift(module)
        return Layer(scale.to(module.running_mean.dtype), shift.to(module.running_mean.dtype))
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    if step.norm:
        scale, shift = _scale_and_shift(root.get_submodule(step.norm))
        folded = weight.double()
        if transposed:
            by_group = folded.unflatten(0, (module.groups, -1))
            by_out = scale.view(module.groups, 1, -1, *([1] * (weight.dim() - 2)))
            folded = (by_group * by_out).flatten(0, 1)
        else:
            folded = folded * scale.view(-1, *([1] * (weight.dim() - 1)))
        bias = (shift if bias is None else shift + bias.double() * scale).to(weight.dtype)
        weight = folded.to(weight.dtype)
    while weight.dim() < 4:
        weight = weight.unsqueeze(-1 if step.kind == "linear" else 2)
    layer = Layer(weight, bias)
    if step.kind == "conv":
        two = len(module.kernel_size) == 2
        lead = (lambda fill: []) if two else (lambda fill: [fill])
        padding = list(module.padding) if transposed else symmetric_padding(module)
        assert padding is not None
        layer.stride, layer.dilation = [*lead(1), *module.stride], [*lead(1), *module.dilation]
        layer.padding = [*lead(0), *padding]
        layer.output_padding = [*lead(0), *module.output_padding]
        layer.groups, layer.transposed = module.groups, transposed
    else:
        layer.padding = layer.output_padding = [0, 0]
    return layer


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """A batch norm as ``x * scale + shift``, in float64."""
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def make_segment(
    form: SegmentForm, root: nn.Module, dtype: torch.dtype, device: torch.device, winograd: bool
) -> nn.Module:
    """The segment with the weights that the layers of ``root`` have."""
    if _C is not None and device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        return NativeSegment(form, root, dtype, winograd)
    return TorchSegment(form, root, dtype)


class NativeSegment(nn.Module):
    """Runs its steps in C++ (``csrc/cpu/deploy.h``)."""

    def __init__(self, form: SegmentForm, root: nn.Module, dtype: torch.dtype, winograd: bool) -> None:
        super().__init__()
        assert _C is not None
        self.form = form
        steps = [(s.kind, s.inputs, s.output, s.residual, s.activation, s.numbers) for s in form.steps]
        packed = [_packed(step, root, dtype, winograd) for step in form.steps]
        program = _C.DeployProgram(steps, form.ranks, form.outputs)
        self.bound = _C.DeployBound(program, packed, dtype)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        assert _C is not None
        try:
            return self.bound.run(inputs)
        except _C.DeployMisfit as error:
            raise Misfit(self.form.steps[int(str(error))].node) from None

    @property
    def bytes(self) -> int:
        return self.bound.bytes

    def describe(self) -> list[str]:
        """What each step runs on; for the shapes of the last call."""
        return self.bound.describe() or ["not run yet"] * len(self.form.steps)

    def times(self, inputs: tuple[Tensor, ...], repeats: int) -> list[LayerTime]:
        says, found = self.describe(), []
        for index, seconds, flops, size in self.bound.time(inputs, repeats):
            step = self.form.steps[index] if index >= 0 else None
            name, operation = ("", "copy") if step is None else (step.module or step.node, step.fused)
            found.append(LayerTime(name, operation, says[index] if step else "", seconds, flops, size))
        return found


def _packed(step: Step, root: nn.Module, dtype: torch.dtype, winograd: bool) -> Any:
    assert _C is not None
    if not step.module:
        return _C.deploy_no_weights()
    layer = layer_of(step, root)
    if step.kind == "affine":
        return _C.deploy_pack_affine(layer.weight.float(), None if layer.bias is None else layer.bias.float())
    return _C.deploy_pack_conv(
        layer.weight,
        layer.bias,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.output_padding,
        layer.groups,
        layer.transposed,
        dtype,
        winograd,
        bool(step.norm),
    )


class TorchSegment(nn.Module):
    """The same steps in PyTorch: where there are no C++ kernels, or for another dtype or device."""

    def __init__(self, form: SegmentForm, root: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.form = form
        self.layers = [layer_of(step, root) if step.module else None for step in form.steps]
        for layer in self.layers:
            if layer is not None:
                layer.weight = layer.weight.to(dtype)
                layer.bias = None if layer.bias is None else layer.bias.to(dtype)

    @property
    def bytes(self) -> int:
        tensors = [t for layer in self.layers if layer is not None for t in (layer.weight, layer.bias)]
        return sum(t.nbytes for t in tensors if t is not None)

    def times(self, inputs: tuple[Tensor, ...], repeats: int) -> list[LayerTime]:
        raise RuntimeError("deploy: expected the C++ kernels to time their operations, got PyTorch's")

    def describe(self) -> list[str]:
        return ["PyTorch"] * len(self.form.steps)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        values: list[Tensor] = list(inputs)
        for step, layer in zip(self.form.steps, self.layers, strict=True):
            y = _run(step, layer, [values[i] for i in step.inputs])
            if step.residual >= 0:
                y = y + values[step.residual]
            if step.activation != "none":
                y = apply_activation(y, step.activation)
            if y.untyped_storage().data_ptr() in {values[i].untyped_storage().data_ptr() for i in step.inputs}:
                y = y.clone()
            values.append(y)
        return [values[i] for i in self.form.outputs]


def _run(step: Step, layer: Layer | None, inputs: list[Tensor]) -> Tensor:
    x, n = inputs[0], step.numbers
    if step.kind == "linear":
        assert layer is not None
        return F.linear(x, layer.weight.flatten(1), layer.bias)
    if step.kind == "conv":
        assert layer is not None
        line = step.rank == LINE  # weights of two dimensions run it
        y = torch.convolution(
            x.unsqueeze(-2) if line else x,
            layer.weight,
            layer.bias,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.transposed,
            layer.output_padding,
            layer.groups,
        )
        return y.squeeze(-2) if line else y
    if step.kind == "affine":
        assert layer is not None
        assert layer.bias is not None
        shape = (-1, *([1] * (step.rank - 2))) if step.rank else (-1,)
        return x * layer.weight.view(shape) + layer.bias.view(shape)
    if step.kind == "add":
        return x + inputs[1]
    if step.kind in ("max_pool", "avg_pool"):
        images = x.unsqueeze(-2) if step.rank == LINE else x
        kernel, stride, padding, dilation = n[0:2], n[2:4], n[4:6], n[6:8]
        if step.kind == "max_pool":
            y = F.max_pool2d(images, kernel, stride, padding, dilation, bool(n[8]))
        else:
            y = F.avg_pool2d(images, kernel, stride, padding, bool(n[8]), bool(n[9]))
        return y.squeeze(-2) if step.rank == LINE else y
    if step.kind == "global_pool":
        return x.mean((-1,) if step.rank == LINE else (-2, -1), keepdim=True)
    if step.kind == "cat":
        return torch.cat(inputs, -1 if n[0] else 1)
    if step.kind == "narrow":
        return x[..., n[0] : n[1]]
    if step.kind == "flatten":
        return x.flatten(1)
    return x
