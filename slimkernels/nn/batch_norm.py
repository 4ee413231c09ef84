"""Slimmable batch norm: one set of parameters, and statistics that fit the width in use."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimkernels.nn._base import SlimModule
from slimkernels.nn._statistics import BatchNormEntry, CalibratedStatistics, forget
from slimkernels.ops._common import check_activation
from slimkernels.ops.slim_batch_norm import slim_batch_norm

if TYPE_CHECKING:  # the mixin stands before one of torch's batch norm classes and uses what they have
    _Torch = _BatchNorm
else:
    _Torch = object

MODES = ("shared", "switchable", "universal")


class SlimBatchNorm(SlimModule, _Torch):
    """Mixin of the slimmable batch norms, placed before the torch class.

    ``SlimBatchNorm1d/2d/3d``: constructor of torch's class plus ``activation`` (a fused activation, applied last);
    ``forward(x, residual=None)`` adds ``residual`` before the activation. The active channels are those of ``x``.

    Three modes say which statistics and affine parameters a width has (``set_mode``):

    - ``shared`` (the default): one set for all widths, read and updated on its first channels.
    - ``switchable``: every listed ratio below 1 has its own statistics and affine parameters, in ``self.switch``
      (state_dict keys ``switch.<i>.weight`` and so on, ``i`` counting the listed ratios upwards); ratio 1 uses the
      module's own.
    - ``universal``: one set of affine parameters; statistics per *calibrated* ratio, in ``self.calibrated``,
      interpolated linearly between the two calibrated neighbours (a channel that only the wider one has takes the wider
      one's; below the smallest calibrated ratio its statistics are used). The module's own running statistics stand for
      ratio 1.

    In training the batch's statistics normalise, as in torch. The running statistics updated are those of the current
    ratio (``switchable``), the first channels of the module's own (``shared``), or the module's own at ratio 1 only
    (``universal``: other ratios are calibrated afterwards).

    ``set_width(n, ratio)`` selects. The ratio is the model-level width: two ratios may round to the same ``n`` and
    still have different statistics. All that depends on the width is a plain attribute of this object, so shallow
    copies (``elastic.view``) share parameters and statistics and hold different widths.

    Calibration, all widths in one pass over the data (model in either train or eval mode)::

        bn.start_calibration(ratios)          # forgets what these ratios had
        for x in batches:
            for ratio, n in widths:
                bn.set_width(n, ratio)
                ...                           # forward: batch statistics normalise, and join the ratio's cumulative
                average
        bn.stop_calibration()                 # back to running statistics; ``bn.calibrated_ratios`` lists what there is
    """

    switch: nn.ModuleList  # of BatchNormEntry, mode switchable only
    calibrated: CalibratedStatistics  # mode universal only
    _entry: BatchNormEntry | None  # the entry in use; None: the module's own parameters and statistics
    _fixed_mean: Tensor | None  # statistics in use that no entry holds (mode universal below ratio 1)
    _fixed_var: Tensor | None
    _fixed_count: Tensor | None

    def _init_slim(self, activation: str = "none") -> None:
        """What the constructor adds to torch's; call it too when turning a torch module into this class in place."""
        check_activation(type(self).__name__, activation)
        self.activation = activation
        self.mode = "shared"
        self.widths: tuple[tuple[float, int], ...] = ()
        self._ratio = 1.0
        self._calibrating: tuple[float, ...] = ()
        self._collects = False
        self._init_width(self.num_features)
        self.register_load_state_dict_post_hook(_select_after_load)
        self._select()

    # Modes and widths

    def set_mode(self, mode: str, widths: Sequence[tuple[float, int]] = ()) -> None:
        """Choose ``shared``, ``switchable`` or ``universal``; ``widths`` are the (ratio, channels) pairs a user will
        run.

        ``switchable`` needs them; the others keep them for what ``set_width`` can find out by itself. New entries start
        as a copy of the module's own parameters and statistics; entries of another mode are dropped. The width becomes
        full.

        Raises: ValueError for another mode, a ratio outside (0, 1], channels outside the full width, or a ratio listed
        twice.
        """
        name = type(self).__name__
        if mode not in MODES:
            raise ValueError(f"{name}: expected mode to be one of {', '.join(MODES)}, got {mode!r}")
        listed = tuple(sorted((float(ratio), int(channels)) for ratio, channels in widths))
        for i, (ratio, channels) in enumerate(listed):
            if not 0 < ratio <= 1 or not 1 <= channels <= self.full_width:
                raise ValueError(
                    f"{name}: expected widths with ratios in (0, 1] and channels between 1 and {self.full_width}, got"
                    f" ({ratio}, {channels})"
                )
            if i and abs(ratio - listed[i - 1][0]) < 1e-6:
                raise ValueError(f"{name}: expected every ratio once in widths, got {ratio} twice")
        if mode == "switchable" and not listed:
            raise ValueError(f"{name}: expected widths with at least one ratio for mode switchable, got none")
        for child in ("switch", "calibrated"):
            self._modules.pop(child, None)
        self.mode, self.widths = mode, listed
        self._calibrating, self._collects = (), False
        if mode == "switchable":
            entries = [BatchNormEntry(self) for ratio, _ in listed if not _is_full(ratio)]
            self.switch = nn.ModuleList(entries)
        elif mode == "universal" and self.running_mean is not None:
            self.calibrated = CalibratedStatistics(self.running_mean)
        self.set_width(None)

    @property
    def ratio(self) -> float:
        """The ratio whose statistics are in use."""
        return self._ratio

    def set_width(self, n: int | None, ratio: float | None = None) -> None:
        """Run on ``n`` channels (None: all) with the statistics of ``ratio``.

        Without ``ratio``: the listed one with ``n`` channels if there is one, else ``n / full_width``.

        Raises: ValueError when ``n`` is not between 1 and the full width, or (``switchable``) the ratio is not a listed
        one.
        """
        n = self.full_width if n is None else n
        self._check_width(n)
        if ratio is None:
            found = [listed for listed, channels in self.widths if channels == n]
            ratio = 1.0 if n == self.full_width else found[0] if found else n / self.full_width
        name = type(self).__name__
        if not 0 < ratio <= 1:
            raise ValueError(f"{name}: expected a ratio in (0, 1], got {ratio}")
        if self.mode == "switchable" and not _is_full(ratio) and self._switch_index(ratio) is None:
            legal = ", ".join(f"{listed:g} ({channels} channels)" for listed, channels in self.widths)
            raise ValueError(f"{name}: expected one of the listed ratios {legal}, got {ratio:g} ({n} channels)")
        self._set_width(n)
        self.__dict__["_ratio"] = float(ratio)
        self._select()

    def _switch_index(self, ratio: float) -> int | None:
        near = [i for i, (listed, _) in enumerate(self.widths) if abs(listed - ratio) < 1e-6]
        return near[0] if near else None

    def _select(self) -> None:
        """Set the plain attributes that ``forward`` reads to what the current ratio uses.

        Own parameters and statistics are read when running, never kept here: FSDP and ``functional_call`` swap them.
        The entry is set through ``__dict__``, so that it isn't registered as a submodule a second time.
        """
        full = _is_full(self._ratio)
        entry: BatchNormEntry | None = None
        fixed: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        keeps = True
        if self.mode == "switchable" and not full:
            index = self._switch_index(self._ratio)
            assert index is not None
            found = self.switch[index]
            assert isinstance(found, BatchNormEntry)
            entry = found
        elif self.mode == "universal" and not full and self.running_mean is not None and self.running_var is not None:
            keeps = False
            row = self.calibrated.row(self._ratio) if self._collects else None
            if row is not None:
                fixed = self.calibrated.mean[row], self.calibrated.var[row], self.calibrated.batches[row]
            else:
                fixed = *self._interpolate(self.running_mean, self.running_var), None
        mean, var, count = fixed
        self.__dict__.update(_entry=entry, _fixed_mean=mean, _fixed_var=var, _fixed_count=count, _keeps_running=keeps)

    def selected(self) -> dict[str, Tensor]:
        """Affine parameters and running statistics that the current ratio uses, by their names in torch's batch norm;
        full size, those that the module does not have left out."""
        source: SlimBatchNorm | BatchNormEntry = self if self._entry is None else self._entry
        names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        state = {name: getattr(source, name) for name in names}
        if self._fixed_mean is not None:
            state |= {"running_mean": self._fixed_mean, "running_var": self._fixed_var}
        return {name: tensor for name, tensor in state.items() if tensor is not None}

    @torch.no_grad()
    def _interpolate(self, full_mean: Tensor, full_var: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics for the current ratio from its calibrated neighbours, of full size. Nothing is read from the device."""
        known, ratio = self.calibrated, self._ratio
        listed = known.row(ratio) is not None or any(abs(own - ratio) < 1e-6 for own, _ in self.widths)
        made = known.place(ratio, full_mean, keep=listed)
        measured = known.measured()
        below = [(row, at) for row, at in measured if at <= ratio + 1e-6]
        above = [(row, at) for row, at in measured if at > ratio + 1e-6]
        high_ratio = above[0][1] if above else 1.0
        high = (known.mean[above[0][0]], known.var[above[0][0]]) if above else (full_mean, full_var)
        for i, (own, to) in enumerate(((known.mean, made[0]), (known.var, made[1]))):
            # As .data: a backward that waits for the old numbers, of the same ratio, may read the new ones.
            if not below:
                to.data.copy_(high[i])
                continue
            low, low_ratio = below[-1]
            t = max(0.0, (ratio - low_ratio) / (high_ratio - low_ratio))
            torch.where(known.active[low], torch.lerp(own[low], high[i], t), high[i], out=to.data)
        return made

    # Calibration

    @property
    def calibrated_ratios(self) -> tuple[float, ...]:
        """Ratios with their own statistics: calibrated ones and 1 (universal), all listed (switchable), 1 (shared)."""
        if self.mode == "switchable":
            return tuple(sorted({ratio for ratio, _ in self.widths} | {1.0}))
        own = self.calibrated if self.mode == "universal" and self.running_mean is not None else None
        if own is None:
            return (1.0,)
        if self._collects:
            own.changed()
        return (*(ratio for _, ratio in own.measured()), 1.0)

    def start_calibration(self, ratios: Sequence[float]) -> None:
        """Forget the statistics of ``ratios``; from now on every forward adds its batch to those of the current ratio.

        The batch's statistics normalise, whatever ``train()`` says. Calibrating ratio 1 replaces the module's own
        running statistics. Without running statistics (``track_running_stats=False``) there is nothing to calibrate and
        nothing happens.

        Raises: ValueError for a ratio that the mode has no statistics for.
        """
        name = type(self).__name__
        wanted = tuple(sorted({float(ratio) for ratio in ratios}))
        if not wanted or not all(0 < ratio <= 1 for ratio in wanted):
            raise ValueError(f"{name}: expected ratios in (0, 1] to calibrate, got {list(ratios)}")
        if self.mode == "shared" and len(wanted) > 1:
            raise ValueError(f"{name}: expected one ratio to calibrate in mode shared, got {list(wanted)}")
        if self.mode == "switchable":
            for ratio in wanted:
                if not _is_full(ratio) and self._switch_index(ratio) is None:
                    legal = ", ".join(f"{listed:g}" for listed, _ in self.widths)
                    raise ValueError(f"{name}: expected ratios to calibrate among {legal}, got {ratio:g}")
        if self.running_mean is None:
            return
        self._calibrating, self._collects = wanted, True
        for ratio in wanted:
            if self.mode == "universal" and not _is_full(ratio):
                self.calibrated.add(ratio)
                continue
            index = self._switch_index(ratio) if self.mode == "switchable" and not _is_full(ratio) else None
            forget(self if index is None else self.switch[index])
        self._select()

    def stop_calibration(self) -> None:
        """Use the statistics that were collected."""
        if self._collects and self.mode == "universal":
            self.calibrated.changed()
        self._calibrating, self._collects = (), False
        self._select()

    # Running

    def forward(
        self,
        x: Tensor,  # (N, c, *)
        residual: Tensor | None = None,  # (N, c, *)
        *,
        activation: str | None = None,  # in place of the module's own
    ) -> Tensor:  # (N, c, *)
        self._check_input_dim(x)
        source: SlimBatchNorm | BatchNormEntry = self if self._entry is None else self._entry
        mean: Tensor | None
        var: Tensor | None
        count: Tensor | None
        if self._fixed_mean is None:
            mean, var, count = source.running_mean, source.running_var, source.num_batches_tracked
        else:
            mean, var, count = self._fixed_mean, self._fixed_var, self._fixed_count
        collects = self._collects
        if collects:
            self._check_calibrating()
        if self.mode != "shared" and x.shape[1] != self.width:
            raise ValueError(
                f"{type(self).__name__}: expected x to have the {self.width} channels of set_width in mode {self.mode},"
                f" got shape {tuple(x.shape)}"
            )
        keeps = collects or (self.training and self._keeps_running)
        batch_statistics = collects or self.training or mean is None
        momentum: float | Tensor = 0.0
        if keeps and count is not None:
            count.add_(1)
            if self.momentum is not None:
                momentum = self.momentum
            if collects or self.momentum is None:
                momentum = 1.0 / count.to(torch.float32)
        if batch_statistics and not keeps:
            mean = var = None
        index = self.in_index
        if index is None:
            return self._run(x, mean, var, source.weight, source.bias, batch_statistics, momentum, residual, activation)
        own = mean, var, source.weight, source.bias
        part_mean, part_var, weight, bias = (None if t is None else t.index_select(0, index) for t in own)
        y = self._run(x, part_mean, part_var, weight, bias, batch_statistics, momentum, residual, activation)
        for t, part in ((mean, part_mean), (var, part_var)) if keeps else ():
            if t is not None and part is not None:
                t.index_copy_(0, index, part)
        return y

    def _run(self, x, mean, var, weight, bias, batch_statistics, momentum, residual, activation) -> Tensor:
        return slim_batch_norm(
            x,
            mean,
            var,
            weight,
            bias,
            training=batch_statistics,
            momentum=momentum,
            eps=self.eps,
            activation=self.activation if activation is None else activation,
            residual=residual,
        )

    def _check_calibrating(self) -> None:
        if not any(abs(self._ratio - ratio) < 1e-6 for ratio in self._calibrating):
            raise ValueError(
                f"{type(self).__name__}: expected the width set to be one of the ratios being calibrated"
                f" {list(self._calibrating)}, got {self._ratio:g}"
            )
        if self.mode == "universal" and not _is_full(self._ratio):
            row = self.calibrated.row(self._ratio)
            if self.in_index is None:
                self.calibrated.active[row, : self.width] = True
            else:
                self.calibrated.active[row, self.in_index] = True

    # State

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._select()
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """A plain checkpoint has no entries: they start from its base parameters and statistics."""
        super()._load_from_state_dict(state_dict, prefix, *args)  # may add num_batches_tracked
        for i in range(len(self.switch) if self.mode == "switchable" else 0):
            own = f"{prefix}switch.{i}."
            if not any(key.startswith(own) for key in state_dict):
                for name in self.switch[i].state_dict():
                    if prefix + name in state_dict:
                        state_dict[own + name] = state_dict[prefix + name].clone()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, width={self.width}, mode={self.mode}, activation={self.activation}"


def _is_full(ratio: float) -> bool:
    return ratio > 1 - 1e-6


def _select_after_load(module: SlimBatchNorm, incompatible_keys) -> None:
    module._select()


class SlimBatchNorm1d(SlimBatchNorm, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` on the first channels; see ``SlimBatchNorm``."""

    def __init__(self, *args, activation: str = "none", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._init_slim(activation)


class SlimBatchNorm2d(SlimBatchNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` on the first channels; see ``SlimBatchNorm``."""

    def __init__(self, *args, activation: str = "none", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._init_slim(activation)


class SlimBatchNorm3d(SlimBatchNorm, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` on the first channels; see ``SlimBatchNorm``."""

    def __init__(self, *args, activation: str = "none", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._init_slim(activation)
