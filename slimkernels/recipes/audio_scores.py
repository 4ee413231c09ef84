"""How close an estimated signal is to the clean one: to train on, and to report."""

from torch import Tensor

from slimkernels.recipes.data import DataError


def si_sdr(estimate: Tensor, clean: Tensor) -> Tensor:  # (b, samples) each -> (b,) dB
    """Scale-invariant signal-to-distortion ratio, to train on. The tables' numbers are torchmetrics' (``si_sdr_db``)."""
    target = clean * (estimate * clean).sum(-1, keepdim=True) / clean.square().sum(-1, keepdim=True).clamp_min(1e-8)
    return snr(estimate, target)


def snr(estimate: Tensor, clean: Tensor) -> Tensor:  # (b, samples) each -> (b,) dB
    """Signal-to-noise ratio, to train on: the level of the estimate counts."""
    ratio = clean.square().sum(-1) / (estimate - clean).square().sum(-1).clamp_min(1e-8)
    return 10 * ratio.clamp_min(1e-8).log10()


def si_sdr_db(estimate: Tensor, clean: Tensor) -> Tensor:  # (b, samples) each -> (b,) dB
    """SI-SDR by torchmetrics."""
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

    return scale_invariant_signal_distortion_ratio(estimate, clean)


def require_torchmetrics() -> None:
    """Raises: DataError when torchmetrics is not installed."""
    try:
        import torchmetrics  # noqa: F401
    except ImportError:
        raise DataError("measuring SI-SDR needs torchmetrics; type 'pip install torchmetrics'") from None
