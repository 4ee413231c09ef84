"""Distillation losses between the widest network's output (detached) and a narrower one's."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Distillation = Callable[[Any, Any], Tensor]  # (student output, teacher output) -> scalar


def kl(
    student: Tensor,  # (N, C, *) logits
    teacher: Tensor,  # (N, C, *) logits
    temperature: float = 1.0,
    dim: int = 1,
) -> Tensor:  # ()
    """Kullback-Leibler divergence KL(teacher || student), the mean over all positions outside ``dim``.

    Equivalent to ``T**2 * (p * (log p - log q)).sum(dim).mean()`` with p, q the softmax of teacher / T and student / T.
    """
    log_p, log_q = _log_probabilities(student, teacher, temperature, dim)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim).mean()


def ce(
    student: Tensor,  # (N, C, *) logits
    teacher: Tensor,  # (N, C, *) logits
    temperature: float = 1.0,
    dim: int = 1,
) -> Tensor:  # ()
    """Cross entropy with the teacher's soft labels: the gradient of ``kl``, the teacher's entropy not subtracted.

    Equivalent to ``-T**2 * (p * log q).sum(dim).mean()``.
    Source: Yu and Huang, Universally Slimmable Networks (arXiv 1903.05134), section 3.3.
    """
    log_p, log_q = _log_probabilities(student, teacher, temperature, dim)
    return -(temperature**2) * (log_p.exp() * log_q).sum(dim).mean()


def alpha(
    student: Tensor,  # (N, C, *) logits
    teacher: Tensor,  # (N, C, *) logits
    temperature: float = 1.0,
    dim: int = 1,
    *,
    alpha_min: float = -1.0,
    alpha_max: float = 1.0,
    clip: float = 5.0,
) -> Tensor:  # ()
    """Adaptive alpha-divergence: at every position the larger of D at ``alpha_min`` and at ``alpha_max``.

    D_a(p || q) = (sum_i q_i r_i**a - 1) / (a (a - 1)) with r = p / q; a = 1 is KL(p || q), a = 0 is KL(q || p). A
    negative a punishes a student that is too sure where the teacher is not, a positive one the reverse. The weights
    r**a, of which the gradient -1/a sum_i q_i r_i**a dlog q_i is made, are held below ``clip``; ``clip=math.inf`` gives
    the exact divergence.

    Source: Wang et al., AlphaNet (arXiv 2102.07954), section 4.
    """
    log_p, log_q = _log_probabilities(student, teacher, temperature, dim)
    low, low_surrogate = _alpha_divergence(log_p, log_q, alpha_min, clip, dim)
    high, high_surrogate = _alpha_divergence(log_p, log_q, alpha_max, clip, dim)
    value = torch.maximum(low, high)
    surrogate = torch.where(low > high, low_surrogate, high_surrogate)
    # The value of the divergence with the gradient of the surrogate, whose weights are constants.
    return temperature**2 * (value + surrogate - surrogate.detach()).mean()


def _alpha_divergence(log_p: Tensor, log_q: Tensor, a: float, clip: float, dim: int) -> tuple[Tensor, Tensor]:
    """Value (detached) and surrogate whose gradient is that of the clipped divergence, both per position."""
    q = log_q.detach().exp()
    log_r = log_p - log_q.detach()
    if a == 0:
        weight = log_r.clamp(max=math.log(clip))
        return -(q * weight).sum(dim), -(q * weight * log_q).sum(dim)
    # The exponent is clamped, not the power: nothing overflows.
    weight = (a * log_r).clamp(max=math.log(clip)).exp()
    if a == 1:
        value = (q * weight * log_r).sum(dim)
    else:
        value = ((q * weight).sum(dim) - 1) / (a * (a - 1))
    return value, -(q * weight * log_q).sum(dim) / a


def _log_probabilities(student: Tensor, teacher: Tensor, temperature: float, dim: int) -> tuple[Tensor, Tensor]:
    if not isinstance(student, Tensor) or not isinstance(teacher, Tensor):
        kind = type(teacher if isinstance(student, Tensor) else student).__name__
        raise TypeError(
            f"distill: expected outputs that are tensors of logits, got {kind}; give distill a function "
            "(student, teacher) -> loss for a model with another kind of output"
        )
    if student.shape != teacher.shape or student.dim() <= dim:
        raise ValueError(
            f"distill: expected two logits of one shape with classes in dimension {dim}, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    # Softmax in float32 for 16-bit logits.
    student, teacher = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (student, teacher))
    return F.log_softmax(teacher.detach() / temperature, dim), F.log_softmax(student / temperature, dim)


_BY_NAME: dict[str, Callable[..., Tensor]] = {"kl": kl, "ce": ce, "alpha": alpha}


def distillation(distill: str | Distillation | None, temperature: float = 1.0) -> Distillation | None:
    """The loss ``distill`` names: `kl`, `ce` or `alpha`; None gives None; a function of (student, teacher) is taken as
    it is.

    Raises: ValueError when the name is unknown or the temperature is not above 0.
    """
    if distill is None:
        return None
    if not temperature > 0:
        raise ValueError(f"distill: expected temperature above 0, got {temperature}")
    if isinstance(distill, str):
        if distill not in _BY_NAME:
            raise ValueError(f"distill: expected one of {tuple(_BY_NAME)}, a function or None, got {distill!r}")
        loss = _BY_NAME[distill]
        return lambda student, teacher: loss(student, teacher, temperature)
    if not callable(distill):
        raise ValueError(f"distill: expected one of {tuple(_BY_NAME)}, a function or None, got {distill!r}")
    return distill
