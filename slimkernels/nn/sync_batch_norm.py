"""Slimmable batch norm whose batch is that of all processes of a group."""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from slimkernels.nn.batch_norm import SlimBatchNorm
from slimkernels.ops._norm import check_norm, checked_residual, saved_for_activation
from slimkernels.ops._slots import deposit, slot_of, stand_in
from slimkernels.ops.slim_batch_norm import update_running
from slimkernels.reference.slim_batch_norm import statistics_dtype


class SlimSyncBatchNorm(SlimBatchNorm, _BatchNorm):
    """``nn.SyncBatchNorm`` on the first channels; see ``SlimBatchNorm``. It runs on the CPU too (gloo), and is no subclass
    of torch's because DistributedDataParallel refuses that one there.

    In training, with a process group of more than one rank, the statistics are those of the batches of all ranks
    together, and so are the gradients: one gather of two numbers a channel forward, one sum of two backward. Every rank
    has to run the same widths in the same order, as ``train.sandwich_step`` does. As in torch nothing is exchanged in
    eval mode; ``elastic.calibrate`` therefore measures the batches of its own process.

    A plain network gets these layers by ``nn.SyncBatchNorm.convert_sync_batchnorm`` before ``elastic.convert``. Under
    ``torch.compile`` the exchange ends a graph.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        *args,
        activation: str = "none",
        **kwargs,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, *args, **kwargs)
        self.process_group = process_group
        self._init_slim(activation)

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # the op does

    def _run(self, x, mean, var, weight, bias, batch_statistics, momentum, residual, activation) -> Tensor:
        group = self._group() if batch_statistics and self.training else None
        if group is None:
            return super()._run(x, mean, var, weight, bias, batch_statistics, momentum, residual, activation)
        activation = self.activation if activation is None else activation
        y, *statistics = _synchronized(x, weight, bias, residual, self.eps, activation, group)
        for running, batch in zip((mean, var), statistics, strict=True):
            if running is not None:
                update_running(running, batch, momentum)
        return y

    def _group(self) -> Any:
        """The processes to exchange with; None when this one is alone."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return None
        group = self.process_group or distributed.group.WORLD
        return group if distributed.get_world_size(group) > 1 else None


@torch._disable_dynamo  # the public decorator imports the compiler
def _synchronized(
    x: Tensor,  # (N, c, *)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    residual: Tensor | None,  # (N, c, *)
    eps: float,
    activation: str,
    group: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # (N, c, *); mean and unbiased variance of the whole batch (c,)
    op = "SlimSyncBatchNorm"
    check_norm(op, x, 1, activation, weight=weight, bias=bias)
    residual = checked_residual(op, x, residual)
    count, mean, var = _statistics(x.detach(), group)
    if count == 1:
        raise ValueError(f"{op}: expected more than 1 value per channel over all ranks in training, got 1")
    y = _Normalize.apply(x, stand_in(weight), stand_in(bias), residual, mean, var, count, eps, activation, group)
    return y, mean, var * (count / max(count - 1, 1))


def _statistics(x: Tensor, group: Any) -> tuple[int, Tensor, Tensor]:
    """Values per channel, mean and biased variance over all ranks, merged from those of each (Chan et al.)."""
    c, dtype = x.shape[1], statistics_dtype(x)
    own = torch.zeros(2 * c + 1, dtype=dtype, device=x.device)
    if x.numel():
        var, mean = torch.var_mean(x.to(dtype), [d for d in range(x.dim()) if d != 1], correction=0)
        own = torch.cat([mean, var, mean.new_full((1,), x.numel() // c)])
    gathered = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(gathered, own, group=group)
    every = torch.stack(gathered)
    counts = every[:, -1:]
    total = counts.sum()
    share = counts / total.clamp_min(1)
    mean = (share * every[:, :c]).sum(0)
    var = (share * (every[:, c:-1] + (every[:, :c] - mean).square())).sum(0)
    return int(total.item()), mean, var


class _Normalize(torch.autograd.Function):
    """``act((x - mean) / sqrt(var + eps) * weight[:c] + bias[:c] + residual)`` whose statistics are functions of the x of all
    ranks."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, mean, var, count, eps, activation, group):
        y, _, _ = torch.ops.slimkernels.slim_batch_norm.default(
            x, mean, var, weight, bias, False, eps, activation, residual
        )
        ctx.slots = slot_of(weight), slot_of(bias)
        ctx.constants = count, eps, activation, group
        ctx.save_for_backward(x, mean, var, weight, bias, *saved_for_activation(activation, y, residual))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, mean, var, weight, bias, output, residual = ctx.saved_tensors
        count, eps, activation, group = ctx.constants
        need_dx, need_dw, need_db, need_dresidual = ctx.needs_input_grad[:4]
        c, dtype = x.shape[1], mean.dtype
        # As for constant statistics, in float32 for 16-bit inputs: what follows is a difference, rounded once.
        scale = torch.ones_like(mean) if weight is None else weight[:c].to(dtype)
        wide = [None if t is None else t.to(dtype) for t in (dy, x, output, residual)]
        dx, dw, db, dresidual = torch.ops.slimkernels.slim_batch_norm_backward.default(
            *(wide[0], wide[1], mean, var, scale, torch.zeros_like(mean) if bias is None else bias[:c].to(dtype)),
            *(*wide[2:], False, eps, activation, need_dx, True, True, need_dresidual and activation != "none"),
        )
        if need_dx:
            sums = torch.stack([dw, db])
            distributed.all_reduce(sums, group=group)
            inverse = torch.rsqrt(var + eps)
            dw_mean, db_mean = sums / max(count, 1)
            shape = (-1, *[1] * (x.dim() - 2))
            slope, offset = ((scale * inverse * t).view(shape) for t in (dw_mean * inverse, db_mean))
            dx = (dx - (wide[1] - mean.view(shape)) * slope - offset).to(x.dtype)
        if need_dresidual:
            dresidual = dy if activation == "none" else dresidual.to(x.dtype)
        return (
            dx if need_dx else None,
            deposit(ctx.slots[0], dw.to(weight.dtype), weight.shape) if need_dw else None,
            deposit(ctx.slots[1], db.to(bias.dtype), bias.shape) if need_db else None,
            dresidual if need_dresidual else None,
            *([None] * 6),
        )
