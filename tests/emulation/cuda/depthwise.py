"""Calls the depthwise launchers with tensors, for every layout that the op hands to them."""

import ctypes

import torch
from torch import Tensor

from tests.emulation.cuda.library import ACTIVATIONS, DTYPES, Kernels, pointer

STEMS = ("slim_conv_depthwise", "slim_conv_depthwise_gradient")
_PAIR, _FOUR, _THREE = (ctypes.c_int64 * n for n in (2, 4, 3))


class Shape(ctypes.Structure):
    """``SkDepthwise``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "outputs")),
        *((name, _PAIR) for name in ("input", "output", "kernel", "stride", "padding", "dilation")),
        ("x_stride", _FOUR),
        ("y_stride", _FOUR),
        ("weight_stride", _THREE),
    ]


def shape_of(x: Tensor, weight: Tensor, y: Tensor, stride, padding, dilation) -> Shape:
    w = weight.stride()
    return Shape(
        x.shape[0], x.shape[1], y.shape[1], _PAIR(*x.shape[2:]), _PAIR(*y.shape[2:]), _PAIR(*weight.shape[2:]),
        _PAIR(*stride), _PAIR(*padding), _PAIR(*dilation), _FOUR(*x.stride()), _FOUR(*y.stride()),
        _THREE(w[0], w[2], w[3]),
    )  # fmt: skip


def forward(kernels: Kernels, x, weight, bias, residual, y, geometry, activation="none") -> Tensor:
    shape = shape_of(x, weight, y, *geometry)
    kernels.launch(
        "sk_depthwise_forward", ctypes.byref(shape), pointer(x), pointer(weight), pointer(bias), pointer(residual),
        pointer(y), ACTIVATIONS.index(activation), DTYPES[x.dtype],
    )  # fmt: skip
    return y


def input_gradient(kernels: Kernels, dy, weight, dx, geometry) -> Tensor:
    shape = shape_of(dx, weight, dy, *geometry)
    kernels.launch(
        "sk_depthwise_input_gradient", ctypes.byref(shape), pointer(dy), pointer(weight), pointer(dx), DTYPES[dx.dtype]
    )
    return dx


def weight_gradient(kernels: Kernels, dy, x, weight, geometry) -> Tensor:
    shape = shape_of(x, weight, dy, *geometry)
    dw = torch.zeros_like(weight)
    scratch = torch.full((kernels.size("sk_depthwise_scratch", ctypes.byref(shape)),), float("nan"))
    kernels.allow(dy, x, dw[: dy.shape[1]], scratch).launch(
        "sk_depthwise_weight_gradient", ctypes.byref(shape), pointer(dy), pointer(x), pointer(dw), pointer(scratch),
        DTYPES[x.dtype],
    )  # fmt: skip
    return dw


class Operators:
    """What csrc/cuda/binding.cpp offers, with the emulator's launchers behind it."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def depthwise_forward(self, x, weight, bias, residual, y, geometry, activation) -> None:
        pairs = geometry[:2], geometry[2:4], geometry[4:]
        forward(self.kernels, x, weight, bias, residual, y, pairs, ACTIVATIONS[activation])

    def depthwise_input_gradient(self, dy, weight, dx, geometry) -> None:
        input_gradient(self.kernels, dy, weight, dx, (geometry[:2], geometry[2:4], geometry[4:]))

    def depthwise_weight_gradient(self, dy, x, dw, geometry) -> None:
        pairs = geometry[:2], geometry[2:4], geometry[4:]
        dw.copy_(weight_gradient(self.kernels, dy, x, dw, pairs))
