import math

import pytest
import torch

from slimkernels.train.distill import alpha, ce, distillation, kl

SHAPES = [(5, 7), (3, 6, 4, 2)]


def logits(shape):
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return student, teacher


def probabilities(student, teacher, temperature):
    """Softmax by hand, over dimension 1."""
    p, q = (teacher / temperature).exp(), (student / temperature).exp()
    return p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)


def alpha_divergence(p, q, a):
    if a == 1:
        return (p * (p / q).log()).sum(1)
    if a == 0:
        return (q * (q / p).log()).sum(1)
    return ((p**a * q ** (1 - a)).sum(1) - 1) / (a * (a - 1))


def check(actual, expected, student):
    torch.testing.assert_close(actual, expected)
    (ours,) = torch.autograd.grad(actual, student, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_and_ce_are_the_written_formulas(shape, temperature):
    student, teacher = logits(shape)
    p, q = probabilities(student, teacher, temperature)
    positions = math.prod(shape) / shape[1]
    check(kl(student, teacher, temperature), temperature**2 * (p * (p / q).log()).sum() / positions, student)
    p, q = probabilities(student, teacher, temperature)
    check(ce(student, teacher, temperature), -(temperature**2) * (p * q.log()).sum() / positions, student)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("orders", [(-1.0, 1.0), (-1.0, 0.5), (0.0, 2.0), (0.0, 1.0)], ids=str)
def test_alpha_without_clip_is_the_larger_divergence(shape, orders):
    student, teacher = logits(shape)
    p, q = probabilities(student, teacher, 2.0)
    low, high = (alpha_divergence(p, q, a) for a in orders)
    expected = 4 * torch.maximum(low, high).mean()
    check(alpha(student, teacher, 2.0, alpha_min=orders[0], alpha_max=orders[1], clip=math.inf), expected, student)


def test_alpha_clip_bounds_the_gradient():
    student = torch.tensor([[30.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 30.0]])
    loss = alpha(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad.abs().max() <= 5
    # Below the clip nothing changes.
    student, teacher = logits((4, 3))
    torch.testing.assert_close(
        alpha(student * 0.01, teacher * 0.01), alpha(student * 0.01, teacher * 0.01, clip=math.inf)
    )


@pytest.mark.parametrize("loss", [kl, ce, alpha])
def test_teacher_gets_no_gradient_and_agreement_costs_nothing(loss):
    student, _ = logits((4, 5))
    teacher = student.detach().clone().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert teacher.grad is None
    assert student.grad.abs().max() < 1e-12
    if loss is not ce:
        assert abs(value.item()) < 1e-12


def test_16_bit_logits_are_compared_in_float32():
    student, teacher = (t.detach().bfloat16() for t in logits((4, 5)))
    assert kl(student, teacher).dtype == torch.float32
    torch.testing.assert_close(kl(student, teacher), kl(student.float(), teacher.float()))


def test_distillation_by_name_function_and_none():
    student, teacher = logits((4, 5))
    assert distillation(None) is None
    assert distillation("ce", 3.0)(student, teacher) == ce(student, teacher, 3.0)
    own = lambda s, t: (s - t).square().mean()  # noqa: E731
    assert distillation(own) is own


def test_errors():
    student, teacher = logits((4, 5))
    with pytest.raises(ValueError, match=r"distill: expected one of \('kl', 'ce', 'alpha'\), .*, got 'l2'"):
        distillation("l2")
    with pytest.raises(ValueError, match="distill: expected temperature above 0, got 0"):
        distillation("kl", 0)
    with pytest.raises(ValueError, match=r"one shape with classes in dimension 1, got \(4, 5\) and \(3, 5\)"):
        kl(student, teacher[:3])
    with pytest.raises(TypeError, match="distill: expected outputs that are tensors of logits, got dict"):
        kl({"logits": student}, teacher)
