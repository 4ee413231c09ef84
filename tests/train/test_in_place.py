"""What ``accumulate_passes`` does beside the ordinary way: gradients into slices, recomputed outputs, fused norms."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimkernels import elastic
from slimkernels.models.resnet import CifarResNet
from slimkernels.nn import SlimLinear
from slimkernels.ops import _recipes, _slots, slim_conv
from slimkernels.ops._slots import flush, gradient_slots
from slimkernels.train import fuse, sandwich_step
from slimkernels.train.step import accumulate_passes

WIDTHS = [1.0, 0.75, 0.5, 0.25]


def network(norm="shared", channels_last=True, depth=False, option="B"):
    torch.manual_seed(0)
    net = CifarResNet(20 if depth else 8, (8, 16, 16), option=option)
    widths = WIDTHS if norm == "switchable" else (0.25, 1.0)
    model = elastic.convert(net, torch.randn(2, 3, 8, 8), widths=widths, divisor=2, sort=None, norm=norm, depth=depth)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def data(batch=4):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, 3, 8, 8, generator=generator)
    return x.contiguous(memory_format=torch.channels_last), torch.arange(batch) % 10


def ordinary(model, batch, subnets=WIDTHS):
    """Every width's forward and backward by themselves; gradients add up in ``.grad``."""
    for subnet in subnets:
        with elastic.width(model, *(subnet if isinstance(subnet, tuple) else (subnet,))):
            F.cross_entropy(model(batch[0]), batch[1]).backward()


def check_same_gradients(model, expected, rtol=1e-4):
    """Equal to float rounding: sums over pixels cancel, so entries are compared with the tensor's own size."""
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            assert p.grad.stride() == p.stride(), name
            off = (p.grad - q.grad).norm() / q.grad.norm().clamp_min(1e-6)
            assert off < rtol, f"{name}: {off}"


@pytest.mark.parametrize("norm", ["shared", "switchable", "universal"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_gradients_equal_the_ordinary_way(norm, channels_last):
    model, other = network(norm, channels_last), network(norm, channels_last)
    accumulate_passes(model, data(), F.cross_entropy, WIDTHS)
    ordinary(other, data())
    check_same_gradients(model, other)
    for (name, b), c in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=lambda m, name=name: f"{name}: {m}")
    assert not _slots._slots
    accumulate_passes(model, data(), F.cross_entropy, WIDTHS, scale=0.5)  # added to the gradients that are there
    ordinary(other, data())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        if q.grad is not None:
            assert (p.grad - 0.75 * q.grad).norm() <= 1e-4 * q.grad.norm() + 1e-6


def test_recomputed_outputs_give_the_same_bits_and_keep_less(monkeypatch):
    gradients, kept = [], []
    monkeypatch.setattr(fuse, "conv_norm", lambda *args: None)  # what its node keeps is not seen from here
    for most in (0, 1, 2, 5):
        monkeypatch.setattr(_recipes, "MOST_NORMS", most)
        model = network()
        storages = {}

        def loss_fn(output, targets, storages=storages):
            loss = F.cross_entropy(output, targets)
            waiting, seen = [loss.grad_fn], set()
            while waiting:
                node = waiting.pop()
                if node is None or node in seen:
                    continue
                seen.add(node)
                for t in getattr(node, "saved_tensors", ()):
                    if isinstance(t, torch.Tensor) and t.dim() == 4 and not isinstance(t, nn.Parameter):
                        storages[t.data_ptr()] = t.untyped_storage().nbytes()
                waiting += [child for child, _ in node.next_functions]
            return loss

        accumulate_passes(model, data(), loss_fn, [1.0], recompute=most > 0)
        kept.append(sum(storages.values()))
        model.zero_grad()
        accumulate_passes(model, data(), F.cross_entropy, WIDTHS, recompute=most > 0)
        gradients.append([p.grad for p in model.parameters()])
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True) if a is not None)
    assert kept[0] > kept[1] > kept[2]
    assert kept[2] < 0.75 * kept[0]


def test_a_convolution_that_is_not_trained_keeps_no_input():
    x, weight = torch.randn(2, 8, 6, 6, requires_grad=True), torch.randn(12, 9, 1, 1)
    with _slots.gradient_slots([nn.Parameter(torch.ones(1))]):
        y = slim_conv(x, weight, out_channels=5, stride=2)
        assert not any(t is not None and t.shape == x.shape for t in y.grad_fn.saved_tensors)
        y.square().sum().backward()
    other = x.detach().clone().requires_grad_()
    F.conv2d(other, weight[:5, :8], stride=2).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_what_a_recipe_needs_must_not_change():
    model = network()

    def changed(output, targets):
        with torch.no_grad():
            model.bn1.weight.mul_(2.0)
        return F.cross_entropy(output, targets)

    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
        accumulate_passes(model, data(), changed, [1.0], recompute=True)


def test_hooks_of_a_parameter_run_once_with_the_sum():
    model, other = network(), network()
    seen, after = {}, {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_hook(lambda g, name=name: seen.setdefault(name, []).append(g.clone()))
            p.register_post_accumulate_grad_hook(lambda p, name=name: after.setdefault(name, []).append(p.grad.clone()))
    accumulate_passes(model, data(), F.cross_entropy, WIDTHS)
    ordinary(other, data())
    check_same_gradients(model, other)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(seen) == set(after) == trained
    for name in trained:
        assert len(seen[name]) == len(after[name]) == 1
        assert torch.equal(seen[name][0], model.get_parameter(name).grad)
        assert torch.equal(after[name][0], model.get_parameter(name).grad)


def test_parameters_that_the_last_pass_does_not_reach_get_their_sum():
    """Skipped blocks, and the entries of other widths in a switchable norm."""
    subnets = [(1.0, None), (0.5, 0.5), (0.25, 0.34)]
    model, other = network("universal", depth=True), network("universal", depth=True)
    calls = []
    last_block = model.get_submodule("layer1.2")
    last_block.conv1.weight.register_hook(lambda g: calls.append(g.clone()))
    accumulate_passes(model, data(), F.cross_entropy, subnets)
    ordinary(other, data(), subnets)
    check_same_gradients(model, other)
    assert len(calls) == 1


def test_an_exception_leaves_no_half_state():
    model, other = network(), network()
    calls = []

    def failing(output, targets):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("third width")
        return F.cross_entropy(output, targets)

    with pytest.raises(RuntimeError, match="third width"):
        accumulate_passes(model, data(), failing, WIDTHS)
    assert all(p.grad is None for p in model.parameters())
    assert not _slots._slots
    assert _recipes._active == 0
    assert "forward" not in model.__dict__
    model.zero_grad()
    accumulate_passes(model, data(), F.cross_entropy, WIDTHS)
    ordinary(other, data())
    check_same_gradients(model, other)


def test_a_compiled_model_goes_the_ordinary_way():
    model, other = network(), network()
    compiled = torch.compile(model, backend="aot_eager")
    accumulate_passes(compiled, data(), F.cross_entropy, [1.0, 0.5])
    ordinary(other, data(), [1.0, 0.5])
    check_same_gradients(model, other)


def test_bfloat16_autocast():
    model, other, exact = network(), network(), network().double()
    accumulate_passes(model, data(), F.cross_entropy, WIDTHS, amp="bf16", recompute=True)
    with torch.autocast("cpu", torch.bfloat16):
        ordinary(other, data())
    ordinary(exact, (data()[0].double(), data()[1]))
    ours, plain, truth = (
        torch.cat([p.grad.double().flatten() for p in net.parameters() if p.grad is not None])
        for net in (model, other, exact)
    )
    assert (ours - truth).norm() <= 2 * (plain - truth).norm()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_frozen_parameters_and_parameters_used_twice():
    model, other = network(), network()
    for net in (model, other):
        net.layer2[0].conv1.weight.requires_grad_(False)
        net.layer1[0].conv2.weight = net.layer1[0].conv1.weight
    accumulate_passes(model, data(), F.cross_entropy, WIDTHS)
    ordinary(other, data())
    check_same_gradients(model, other)


@pytest.mark.parametrize("amp", [None, "bf16"])
@pytest.mark.parametrize("blocks", [(1, 1), (2, 1), (1, 3)], ids=str)
def test_linear_layers_add_to_their_slots(blocks, amp):
    torch.manual_seed(0)
    linear, x = SlimLinear(12, 18), torch.randn(5, 8)
    linear.in_blocks, linear.out_blocks = blocks
    other, seen = copy.deepcopy(linear), []
    for p in linear.parameters():
        p.register_hook(lambda g: seen.append(g.clone()))
    with torch.autocast("cpu", torch.bfloat16, enabled=amp is not None):
        with gradient_slots(linear.parameters()) as slots:
            for n in (18, 12, 6):
                linear.set_width(n)
                for slot in slots if n == 6 else ():
                    slot.last = True
                linear(x).square().sum().backward()
            flush(slots)
        for n in (18, 12, 6):
            other.set_width(n)
            other(x).square().sum().backward()
    for p, q in zip(linear.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=2e-2 if amp else 1e-5, atol=1e-5)
    assert {g.shape for g in seen} == {linear.bias.shape, linear.weight.shape}
    assert len(seen) == 2


# The fused forward


def test_every_norm_of_a_residual_network_is_fused():
    model = network("universal")
    called = []
    original = fuse.conv_norm

    def counted(conv, norm, x, residual, activation):
        called.append((residual is not None, activation))
        return original(conv, norm, x, residual, activation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuse, "conv_norm", counted)
        accumulate_passes(model, data(), F.cross_entropy, [1.0])
    # Shortcuts: nothing after them; stem and first norms: relu; second norms: sum and relu.
    assert sorted(called) == [(False, "none")] * 2 + [(False, "relu")] * 4 + [(True, "relu")] * 3


class Block(nn.Module):
    """One norm in a forward that a test chooses."""

    def __init__(self, forward):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.head, self.scale, self.calls = nn.Conv2d(8, 10, 1), 1.0, 0
        self.run = forward

    def forward(self, x):
        return self.head(self.run(self, self.norm(self.conv(x)))).mean((2, 3))


def with_attribute(self, y):
    return self.relu(y) * self.scale


def with_alias(self, y):
    z = y * 2.0
    other = z
    other += self.norm(y)
    return self.relu(z)


def with_two_readers(self, y):
    return self.relu(y) + y.sigmoid()


def with_added_broadcast(self, y):
    return F.relu(y + y.new_ones(1, 1, 1, 1))


def with_iadd_of_a_read_tensor(self, y):
    z = torch.sigmoid(y.detach())
    w = z
    w += self.norm(y)
    return w.tanh() + z


FORWARDS = [with_attribute, with_alias, with_two_readers, with_added_broadcast, with_iadd_of_a_read_tensor]


def block(forward):
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "forward", lambda self, x: self.head(self.relu(self.norm(self.conv(x)))).mean((2, 3)))
        return elastic.convert(Block(forward), torch.randn(2, 3, 8, 8), sort=None, divisor=2, norm="shared")


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_the_fused_forward_computes_what_the_forward_does(forward):
    model, other = block(forward), block(forward)
    for scale in (1.0, 3.0):
        model.scale = other.scale = scale
        model.zero_grad()
        other.zero_grad()
        accumulate_passes(model, data(), F.cross_entropy, [1.0, 0.5])
        ordinary(other, data(), [1.0, 0.5])
        check_same_gradients(model, other)


def random_forward(self, y):
    return self.relu(y) if torch.rand(()) < 0.5 else y.tanh()


def counting_forward(self, y):
    self.calls += 1
    return self.relu(y)


def value_forward(self, y):
    return self.relu(y) if y.sum() > 0 else y.tanh()


@pytest.mark.parametrize("forward", [random_forward, counting_forward, value_forward], ids=lambda f: f.__name__)
def test_a_forward_that_a_trace_would_not_repeat_runs_as_it_is(forward):
    model, other = block(forward), block(forward)
    torch.manual_seed(5)
    for _ in range(4):
        accumulate_passes(model, data(), F.cross_entropy, [1.0, 0.5])
    torch.manual_seed(5)
    for _ in range(4):
        ordinary(other, data(), [1.0, 0.5])
    check_same_gradients(model, other)
    assert model.calls in (0, 8)


def change_in_between(self, x):
    x = x * 1.0
    y = self.conv(x)
    x.mul_(2.0)
    return self.head(self.relu(self.norm(y) + x.mean(1, keepdim=True))).mean((2, 3))


def nothing_in_between(self, x):
    return self.head(self.relu(self.norm(self.conv(x)) + 1.0)).mean((2, 3))


@pytest.mark.parametrize("forward", [change_in_between, nothing_in_between], ids=lambda f: f.__name__)
def test_a_convolution_stays_where_its_input_changes_afterwards(forward):
    model = block(with_attribute)
    model.conv.padding = (1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "forward", forward)
        traced = fuse._trace(model)
    assert model.norm in traced.modules
    assert (model.conv in traced.modules) == (forward is nothing_in_between)


def test_hooks_on_modules_are_called():
    model, seen = network(), []
    model.layer1.register_forward_hook(lambda m, args, output: seen.append("stage"))
    model.layer2[0].bn1.register_forward_hook(lambda m, args, output: seen.append(bool((output < 0).any())))
    model.relu.register_forward_hook(lambda m, args, output: seen.append("relu"))
    accumulate_passes(model, data(), F.cross_entropy, [1.0, 0.5])
    assert seen == ["relu", "stage", True] * 2
    other = network()
    handle = other.layer1.register_forward_hook(lambda m, args, output: seen.append("handle"))
    handle.remove()
    assert fuse._find(other) is not None


def test_a_step_changes_with_the_model():
    model = network()
    accumulate_passes(model, data(), F.cross_entropy, [1.0])
    first = fuse._find(model)
    model.eval()
    assert fuse._find(model) is not first
    model.train()
    assert fuse._find(model) is first
    model.layer1[0].relu = nn.Tanh()
    assert fuse._find(model) is not first


def test_training_lowers_the_loss():
    model = network("switchable")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = [sandwich_step(model, data(8), F.cross_entropy, optimizer, widths=WIDTHS, distill=None) for _ in range(15)]
    assert all(losses[-1][w] < 0.5 * losses[0][w] for w in WIDTHS)
