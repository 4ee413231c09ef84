import copy
import io

import pytest
import torch
from torch import nn

from slimkernels.nn import SlimBatchNorm1d, SlimBatchNorm2d, SlimBatchNorm3d
from tests.helpers import check_graphs

PAIRS = [
    (SlimBatchNorm1d, nn.BatchNorm1d, (6, 16)),
    (SlimBatchNorm1d, nn.BatchNorm1d, (6, 16, 5)),
    (SlimBatchNorm2d, nn.BatchNorm2d, (4, 16, 5, 3)),
    (SlimBatchNorm3d, nn.BatchNorm3d, (2, 16, 3, 2, 4)),
]
WIDTHS = ((0.25, 4), (0.5, 8), (1.0, 16))


def trained(slim=SlimBatchNorm2d, **kwargs):
    """A batch norm with parameters and statistics that tell its channels apart."""
    bn = slim(16, **kwargs)
    with torch.no_grad():
        bn.weight.normal_()
        bn.bias.normal_()
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    return bn


@pytest.mark.parametrize(("slim", "plain", "shape"), PAIRS, ids=lambda v: str(v) if isinstance(v, tuple) else "")
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("mode", ["shared", "switchable", "universal"])
def test_batch_norm_at_full_width_is_torchs(mode, momentum, slim, plain, shape):
    ours, theirs = trained(slim, momentum=momentum), plain(16, momentum=momentum)
    ours.set_mode(mode, WIDTHS)
    theirs.load_state_dict({key: value for key, value in ours.state_dict().items() if "." not in key})
    for step in range(4):
        ours.train(step < 3)
        theirs.train(step < 3)
        x, dy = torch.randn(shape), torch.randn(shape)
        xs = [x.clone().requires_grad_() for _ in range(2)]
        for bn, own in zip((ours, theirs), xs, strict=True):
            bn.zero_grad()
            bn(own).backward(dy)
        torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-4, atol=1e-5)
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(getattr(ours, name).grad, parameter.grad, rtol=1e-4, atol=1e-4)
        for name, value in theirs.named_buffers():
            torch.testing.assert_close(getattr(ours, name), value)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_batch_norm_activation_and_residual():
    bn = trained(activation="relu").eval()
    x, residual = torch.randn(2, 2, 16, 3, 3)
    plain = nn.BatchNorm2d(16).eval()
    plain.load_state_dict(bn.state_dict())
    torch.testing.assert_close(bn(x, residual), torch.relu(plain(x) + residual))


def test_batch_norm_shared_updates_the_first_channels():
    bn, before = trained(), None
    before = bn.running_mean.clone()
    x = torch.randn(8, 6, 4, 4)
    bn(x)
    torch.testing.assert_close(bn.running_mean[:6], before[:6] * 0.9 + 0.1 * x.mean((0, 2, 3)))
    assert torch.equal(bn.running_mean[6:], before[6:])
    assert bn.num_batches_tracked == 1


def test_switchable_has_statistics_and_affine_of_its_own():
    bn = trained()
    bn.set_mode("switchable", WIDTHS)
    base = {key: value.clone() for key, value in bn.state_dict().items()}
    bn.set_width(8)
    assert bn.ratio == 0.5
    bn(torch.randn(8, 8, 4, 4) + 5).sum().backward()
    changed = {key for key, value in bn.state_dict().items() if not torch.equal(value, base[key])}
    assert changed == {f"switch.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert {name for name, p in bn.named_parameters() if p.grad is not None} == {"switch.1.weight", "switch.1.bias"}
    with pytest.raises(
        ValueError, match=r"one of the listed ratios 0.25 \(4 channels\), 0.5 \(8 channels\), 1 \(16 cha"
    ):
        bn.set_width(7)
    with pytest.raises(ValueError, match=r"got 0\.75"):
        bn.set_width(8, 0.75)
    assert (bn.width, bn.ratio) == (8, 0.5)


def test_two_ratios_of_one_width_keep_different_statistics():
    bn = trained().train()
    bn.set_mode("switchable", ((0.45, 8), (0.5, 8), (1.0, 16)))
    bn.set_width(8, 0.45)
    bn(torch.randn(8, 8, 4, 4) + 5)
    bn.set_width(8, 0.5)
    assert torch.equal(bn.switch[1].running_mean, bn.running_mean)
    assert not torch.equal(bn.switch[0].running_mean, bn.running_mean)


def calibrate(bn, batches, widths):
    bn.start_calibration([ratio for ratio, _ in widths])
    for x in batches:
        for ratio, n in widths:
            bn.set_width(n, ratio)
            bn(x[:, :n])
    bn.stop_calibration()


@pytest.mark.parametrize("mode", ["switchable", "universal"])
def test_calibration_of_all_widths_gives_the_cumulative_average(mode):
    bn = trained().eval()
    bn.set_mode(mode, WIDTHS)
    batches = [torch.randn(6, 16, 4, 4) * 2 + 1 for _ in range(3)]
    for _ in range(2):  # the second calibration forgets the first
        calibrate(bn, batches, WIDTHS)
    assert bn.calibrated_ratios == (0.25, 0.5, 1.0)
    x = torch.randn(6, 16, 4, 4)
    for ratio, n in WIDTHS:
        plain = nn.BatchNorm2d(n, momentum=None)
        for batch in batches:
            plain(batch[:, :n])
        with torch.no_grad():
            plain.weight.copy_(bn.weight[:n])
            plain.bias.copy_(bn.bias[:n])
        bn.set_width(n, ratio)
        torch.testing.assert_close(bn(x[:, :n]), plain.eval()(x[:, :n]), rtol=1e-4, atol=1e-5)


def test_universal_interpolates_between_calibrated_neighbours():
    bn = trained().eval()
    bn.set_mode("universal", WIDTHS)
    pretrained = bn.running_mean.clone(), bn.running_var.clone()
    bn.set_width(8, 0.5)  # nothing calibrated: the pre-trained statistics
    x = torch.randn(5, 16, 2, 2)
    torch.testing.assert_close(bn._fixed_mean, pretrained[0])
    calibrate(bn, [torch.randn(6, 16, 4, 4)], WIDTHS[:2])
    assert torch.equal(bn.running_mean, pretrained[0])
    low, high = bn.calibrated.mean
    bn.set_width(6, 0.375)
    torch.testing.assert_close(bn._fixed_mean[:4], (low[:4] + high[:4]) / 2)
    torch.testing.assert_close(bn._fixed_mean[4:6], high[4:6])
    expected = nn.functional.batch_norm(
        x[:, :6], bn._fixed_mean[:6], bn._fixed_var[:6], bn.weight[:6], bn.bias[:6], eps=bn.eps
    )
    torch.testing.assert_close(bn(x[:, :6]), expected)
    bn.set_width(12)
    torch.testing.assert_close(bn._fixed_mean[:8], (high[:8] + pretrained[0][:8]) / 2)
    torch.testing.assert_close(bn._fixed_mean[8:12], pretrained[0][8:12])
    bn.set_width(3, 0.2)
    torch.testing.assert_close(bn._fixed_mean[:3], low[:3])
    bn.set_width(None)
    assert bn._fixed_mean is None


def test_universal_training_updates_running_statistics_at_full_width_only():
    bn = trained()
    bn.set_mode("universal", WIDTHS)
    before = bn.running_mean.clone()
    bn.set_width(8, 0.5)
    bn(torch.randn(4, 8, 3, 3))
    assert torch.equal(bn.running_mean, before)
    bn.set_width(None)
    bn(torch.randn(4, 16, 3, 3))
    assert not torch.equal(bn.running_mean, before)


@pytest.mark.parametrize("mode", ["shared", "switchable", "universal"])
def test_plain_checkpoint_loads_strictly_and_fills_the_extras(mode):
    bn, plain = trained(), trained(nn.BatchNorm2d)
    bn.set_mode(mode, WIDTHS)
    if mode == "universal":
        calibrate(bn, [torch.randn(6, 16, 4, 4)], WIDTHS)
    model, checkpoint = nn.Sequential(nn.ReLU(), bn), nn.Sequential(nn.ReLU(), plain).state_dict()
    model.load_state_dict(checkpoint, strict=True)
    for entry in getattr(bn, "switch", ()):
        for name, value in plain.state_dict().items():
            own = entry.state_dict()[name]
            assert torch.equal(own, value)
            assert own.data_ptr() != bn.state_dict()[name].data_ptr()
    if mode == "universal":
        assert bn.calibrated_ratios == (1.0,)
    with torch.no_grad():
        bn.set_width(8, 0.5)
        x = torch.randn(3, 8, 2, 2)
        expected = nn.functional.batch_norm(
            x, plain.running_mean[:8], plain.running_var[:8], plain.weight[:8], plain.bias[:8]
        )
        torch.testing.assert_close(bn.eval()(x), expected)


@pytest.mark.parametrize("copy_by", ["state_dict", "assign", "deepcopy", "pickle", "float64"])
@pytest.mark.parametrize("mode", ["switchable", "universal"])
def test_extras_survive_copies(mode, copy_by):
    bn = trained()
    bn.set_mode(mode, WIDTHS)
    calibrate(bn, [torch.randn(6, 16, 4, 4)], WIDTHS)
    bn.eval().set_width(8, 0.5)
    x = torch.randn(3, 8, 2, 2)
    expected = bn(x)
    if copy_by in ("state_dict", "assign"):
        other = SlimBatchNorm2d(16)
        other.set_mode(mode, WIDTHS)
        other.set_width(8, 0.5)
        other.load_state_dict(bn.state_dict(), assign=copy_by == "assign")
    elif copy_by == "deepcopy":
        other = copy.deepcopy(bn)
        if mode == "switchable":
            assert other._entry is other.switch[1]
    elif copy_by == "pickle":
        file = io.BytesIO()
        torch.save(bn, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(bn).double()
        x = x.double()
    torch.testing.assert_close(other.eval()(x).float(), expected, rtol=1e-4, atol=1e-5)


def test_wrong_shape_of_an_extra_is_an_error():
    for mode, key in (("switchable", "switch.0.weight"), ("universal", "calibrated.mean")):
        bn = trained()
        bn.set_mode(mode, WIDTHS)
        state = bn.state_dict()
        state[key] = torch.zeros(1, 3)
        with pytest.raises(RuntimeError, match=f"size mismatch for {key}"):
            bn.load_state_dict(state)


@pytest.mark.parametrize("mode", ["shared", "switchable", "universal"])
def test_shallow_copies_hold_different_widths_and_share_all_tensors(mode):
    bn = trained().eval()
    bn.set_mode(mode, WIDTHS)
    if mode != "shared":
        calibrate(bn, [torch.randn(6, 16, 4, 4)], WIDTHS)
    other = copy.copy(bn)
    bn.set_width(4, 0.25)
    other.set_width(8, 0.5)
    assert (bn.width, other.width) == (4, 8)
    x = torch.randn(3, 8, 2, 2)
    y4, y8 = bn(x[:, :4]), other(x)
    bn.set_width(8, 0.5)
    torch.testing.assert_close(bn(x), y8)
    bn.set_width(4, 0.25)
    torch.testing.assert_close(bn(x[:, :4]), y4)
    assert other.weight is bn.weight


def test_a_listed_width_always_reads_its_statistics_in_the_same_place():
    """What a CUDA graph of one width needs once another width was set."""
    bn = trained().eval()
    bn.set_mode("universal", (*WIDTHS, (0.75, 12)))
    calibrate(bn, [torch.randn(6, 16, 4, 4)], WIDTHS)
    places = {}
    with torch.inference_mode():
        for ratio in (0.25, 0.5, 0.75):
            bn.set_width(int(16 * ratio), ratio)
            places[ratio] = bn._fixed_mean
    before = places[0.75].clone()
    bn.running_mean.add_(1.0)  # as training at full width does
    for ratio in (0.25, 0.75):
        bn.set_width(int(16 * ratio), ratio)
        assert bn._fixed_mean is places[ratio]
    torch.testing.assert_close(bn._fixed_mean[:8] - before[:8], torch.full((8,), 0.5))
    x = torch.randn(3, 12, 2, 2, requires_grad=True)
    first = bn(x)
    bn.set_width(12, 0.75)  # between a forward and its backward
    (first + bn(x)).sum().backward()
    bn.set_width(11)
    bn.set_width(10)
    assert set(bn.calibrated.places) == {0.25, 0.5, 0.75}


def test_calibrated_ratios_are_not_rounded_with_the_module():
    bn = trained().eval()
    bn.set_mode("universal", [(0.3, 5)])
    calibrate(bn, [torch.randn(6, 16, 4, 4)], [(0.3, 5)])
    bn.half().float()
    assert bn.calibrated_ratios == (0.3, 1.0)
    other = trained()
    other.set_mode("universal", [(0.3, 5)])
    other.load_state_dict(bn.state_dict())
    assert other.calibrated_ratios == (0.3, 1.0)
    other.set_width(5, 0.3)
    torch.testing.assert_close(other._fixed_mean[:5], bn.calibrated.mean[0, :5])


@pytest.mark.parametrize("mode", ["shared", "universal"])
def test_in_index_reads_and_writes_the_gathered_channels(mode):
    bn = trained()
    bn.set_mode(mode, WIDTHS)
    index = torch.tensor([0, 1, 2, 8, 9])
    bn.in_index = index
    if mode == "universal":
        bn.set_width(5, 0.3)
        bn.start_calibration([0.3])
    before = bn.running_mean.clone()
    x = torch.randn(6, 5, 3, 3)
    y = bn(x)
    expected = nn.functional.batch_norm(x, None, None, bn.weight[index], bn.bias[index], True)
    torch.testing.assert_close(y, expected)
    statistics = bn.running_mean if mode == "shared" else bn.calibrated.mean[0]
    momentum = 0.1 if mode == "shared" else 1.0
    torch.testing.assert_close(statistics[index], before[index] * (1 - momentum) + momentum * x.mean((0, 2, 3)))
    if mode == "universal":
        assert bn.calibrated.active[0].nonzero().flatten().tolist() == index.tolist()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mode", ["shared", "switchable", "universal"])
def test_batch_norm_compiles_to_few_graphs(mode, train):
    bn = trained(activation="relu")
    ratios = [(n / 16, n) for n in range(4, 16)] + [(1.0, 16)]
    bn.set_mode(mode, ratios)
    calibrate(
        bn, [torch.randn(6, 16, 4, 4)], ratios[:5] if mode == "universal" else ratios[:1] * (mode == "shared") or ratios
    )
    bn.train(train)
    state = copy.deepcopy(bn.state_dict())

    def inputs():
        for ratio, n in reversed(ratios):
            bn.load_state_dict(state)
            bn.set_width(n, ratio)
            yield (torch.randn(3, n, 4, 5, requires_grad=True),)

    check_graphs(lambda x: bn(x), inputs())


def test_running_without_statistics_or_affine():
    x = torch.randn(4, 8, 3, 3)
    bn = SlimBatchNorm2d(16, affine=False, track_running_stats=False).eval()
    torch.testing.assert_close(bn(x), nn.functional.batch_norm(x, None, None, training=True))
    bn.set_mode("universal")
    bn.set_width(8)
    bn.start_calibration([0.5])
    torch.testing.assert_close(bn(x), nn.functional.batch_norm(x, None, None, training=True))
    assert bn.calibrated_ratios == (1.0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda bn: bn.set_mode("own"), "expected mode to be one of shared, switchable, universal, got 'own'"),
        (lambda bn: bn.set_mode("switchable"), "expected widths with at least one ratio for mode switchable"),
        (
            lambda bn: bn.set_mode("universal", [(1.5, 16)]),
            r"ratios in \(0, 1\] and channels between 1 and 16, got \(1.5",
        ),
        (lambda bn: bn.set_mode("universal", [(0.5, 8), (0.5, 9)]), "every ratio once in widths, got 0.5 twice"),
        (lambda bn: bn.set_width(17), "expected a width between 1 and 16, got 17"),
        (lambda bn: bn.set_width(8, 1.5), r"expected a ratio in \(0, 1\], got 1.5"),
        (lambda bn: bn.start_calibration([]), r"expected ratios in \(0, 1\] to calibrate, got \[\]"),
        (lambda bn: bn.start_calibration([0.25, 0.5]), "expected one ratio to calibrate in mode shared"),
        (lambda bn: bn(torch.randn(3, 8)), "expected 4D input"),
    ],
)
def test_batch_norm_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(SlimBatchNorm2d(16))


def test_batch_norm_width_and_calibration_errors():
    bn = trained()
    bn.set_mode("universal", WIDTHS)
    with pytest.raises(ValueError, match="expected x to have the 16 channels of set_width in mode universal"):
        bn(torch.randn(3, 8, 2, 2))
    bn.start_calibration([0.5])
    with pytest.raises(ValueError, match=r"one of the ratios being calibrated \[0.5\], got 1"):
        bn(torch.randn(3, 16, 2, 2))
    bn.set_mode("switchable", WIDTHS)
    with pytest.raises(ValueError, match=r"expected ratios to calibrate among 0.25, 0.5, 1, got 0.75"):
        bn.start_calibration([0.75])
    with pytest.raises(ValueError, match="expected activation to be one of"):
        SlimBatchNorm2d(16, activation="swish")
