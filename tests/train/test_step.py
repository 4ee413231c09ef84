import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from slimkernels.train import WidthSampler, sandwich_step
from slimkernels.train.distill import kl
from tests.train import stand_in
from tests.train.stand_in import TinyNet, batch

pytestmark = pytest.mark.usefixtures("tiny_elastic")
WIDTHS = [1.0, 0.75, 0.5, 0.25]


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def grads(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def separate(model, data, widths, distill=None, weight=1.0):
    """Gradients and losses of every width run by itself on a fresh copy, no slimkernels.train involved."""
    x, y = data
    total, losses = {}, {}
    with torch.no_grad(), stand_in.width(model, widths[0]):
        teacher = model(x)
    for i, w in enumerate(widths):
        alone = copy.deepcopy(model)
        with stand_in.width(alone, w):
            output = alone(x)
            loss = F.cross_entropy(output, y)
            if distill is not None and i > 0:
                loss = weight * distill(output, teacher) + (1 - weight) * loss
            loss.backward()
        losses[w] = loss.detach()
        for name, grad in grads(alone).items():
            total[name] = total.get(name, 0) + grad
    return total, losses


def check_equal(actual, expected):
    assert list(actual) == list(expected)
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(("distill", "weight"), [(None, 1.0), ("kl", 1.0), ("kl", 0.3)])
def test_gradients_are_the_sum_of_the_widths_run_alone(distill, weight):
    model, data = TinyNet(), batch()
    expected, expected_losses = separate(model, data, WIDTHS, kl if distill else None, weight)
    losses = sandwich_step(
        model, data, F.cross_entropy, None, widths=WIDTHS, distill=distill, distill_weight=weight, rule="all"
    )
    check_equal(losses, expected_losses)
    check_equal(grads(model), expected)
    assert all(not loss.requires_grad for loss in losses.values())


def test_steps_the_optimizer_after_zeroing_old_gradients():
    model, data = TinyNet(), batch()
    other = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e3)
    sandwich_step(model, data, F.cross_entropy, sgd(model), widths=WIDTHS)
    expected, _ = separate(other, data, WIDTHS, kl)
    for name, p in other.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p - 0.1 * expected[name])


def test_without_optimizer_gradients_are_added():
    model, data = TinyNet(), batch()
    sandwich_step(model, data, F.cross_entropy, None, widths=WIDTHS)
    once = {name: grad.clone() for name, grad in grads(model).items()}
    sandwich_step(model, data, F.cross_entropy, None, widths=WIDTHS)
    for name, grad in grads(model).items():
        torch.testing.assert_close(grad, 2 * once[name])


def test_training_lowers_the_loss_of_every_width():
    model, data = TinyNet(), batch(24)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = sandwich_step(model, data, F.cross_entropy, optimizer, widths=WIDTHS, distill=None)
    for _ in range(60):
        last = sandwich_step(model, data, F.cross_entropy, optimizer, widths=WIDTHS, distill=None)
    assert all(last[w] < 0.5 * first[w] for w in WIDTHS)


def test_defaults_draw_four_widths_of_the_plan_the_same_in_two_processes_worth_of_models():
    runs = []
    for _ in range(2):
        model = TinyNet()
        runs.append([list(sandwich_step(model, batch(), F.cross_entropy, sgd(model))) for _ in range(5)])
        torch.randn(7)  # the global generator plays no part
    assert runs[0] == runs[1]
    assert all(step[:2] == [1.0, 0.25] and len(step) == 4 for step in runs[0])
    assert runs[0][0] != runs[0][1]


def test_rules_and_generator():
    model = TinyNet()

    def step(**options):
        return list(sandwich_step(model, batch(), F.cross_entropy, None, **options))

    assert step(rule="alternate") != step(rule="alternate")
    assert step(rule="all", widths=[0.5, 1.0]) == [1.0, 0.5]
    assert len(step(rule="random")) == 1
    assert len(step(rule="random", widths=3)) == 3
    assert step(widths=2) == [1.0, 0.25]
    assert step(widths=[0.5]) == [0.5]
    same = [step(generator=torch.Generator().manual_seed(8)) for _ in range(2)]
    assert same[0] == same[1]
    sampler = WidthSampler([0.5, 1.0], "alternate")
    assert [step(rule=sampler) for _ in range(3)] == [[1.0], [0.5], [1.0]]


@pytest.mark.parametrize("rule", ["random", "alternate"])
def test_rules_without_teacher_learn_from_the_targets(rule):
    model, data = TinyNet(), batch()
    drawn = sandwich_step(model, data, F.cross_entropy, None, rule=rule, distill="kl")
    expected, losses = separate(copy.deepcopy(model), data, list(drawn))
    check_equal(drawn, losses)
    check_equal(grads(model), expected)


def test_inputs_as_tuple_dict_and_structured_outputs():
    class TwoInputs(TinyNet):
        def forward(self, x, shift):
            return {"logits": super().forward(x + shift), "shift": 1}

    model, (x, y) = TwoInputs(), batch()
    loss_fn = lambda output, targets: F.cross_entropy(output["logits"], targets)  # noqa: E731
    seen = []

    def distill(student, teacher):
        seen.append(teacher["logits"].requires_grad)
        return kl(student["logits"], teacher["logits"])

    zero = torch.zeros(1)
    first = sandwich_step(model, ((x, zero), y), loss_fn, None, widths=[1.0, 0.5], distill=distill)
    second = sandwich_step(model, ({"x": x, "shift": zero}, y), loss_fn, None, widths=[1.0, 0.5], distill=distill)
    check_equal(first, second)
    assert seen == [False, False]
    with pytest.raises(TypeError, match="got dict; give distill a function"):
        sandwich_step(model, ((x, zero), y), loss_fn, None, widths=[1.0, 0.5])


def test_width_is_restored_also_on_an_exception():
    model, data = TinyNet(), batch()
    model.fc1.set_width(5)
    sandwich_step(model, data, F.cross_entropy, None)
    assert model.fc1.width == 5

    def failing(output, targets):
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        sandwich_step(model, data, failing, None)
    assert model.fc1.width == 5


def test_activations_of_one_width_are_freed_before_the_next():
    model, data = TinyNet(), batch()
    alive, before_each_pass = weakref.WeakSet(), []

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        saved = Saved(tensor.detach())
        alive.add(saved)
        return saved

    def note(*args):
        gc.collect()
        before_each_pass.append(len(alive))

    model.register_forward_pre_hook(note)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        sandwich_step(model, data, F.cross_entropy, None, widths=WIDTHS)
    note()
    assert before_each_pass == [0] * 5


def test_clip_and_scaler():
    model, data = TinyNet(), batch()
    start = copy.deepcopy(model.state_dict())
    sandwich_step(model, data, F.cross_entropy, sgd(model, 1.0), widths=WIDTHS, clip_grad=0.01)
    moved = torch.cat([(p - start[name]).flatten() for name, p in model.named_parameters()])
    torch.testing.assert_close(moved.norm(), torch.tensor(0.01), rtol=1e-3, atol=0)

    scaled, plain = TinyNet(), TinyNet()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        sandwich_step(scaled, data, F.cross_entropy, sgd(scaled), widths=WIDTHS, scaler=scaler, clip_grad=1.0)
        sandwich_step(plain, data, F.cross_entropy, sgd(plain), widths=WIDTHS, clip_grad=1.0)
    check_equal(dict(scaled.named_parameters()), dict(plain.named_parameters()))


def test_amp_runs_the_forward_in_bfloat16():
    model, data = TinyNet(), batch()
    seen = []
    model.fc2.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    losses = sandwich_step(model, data, F.cross_entropy, sgd(model), widths=[1.0, 0.5], amp="bf16")
    assert seen == [torch.bfloat16] * 2
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(loss.isfinite() for loss in losses.values())


def test_works_on_a_compiled_model():
    model = TinyNet()
    expected = sandwich_step(copy.deepcopy(model), batch(), F.cross_entropy, None, widths=WIDTHS)
    compiled = torch.compile(model, backend="aot_eager")
    check_equal(sandwich_step(compiled, batch(), F.cross_entropy, None, widths=WIDTHS), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rule": "best"}, ValueError, "expected rule in"),
        ({"widths": [0.5, 2]}, ValueError, r"sandwich_step: expected widths in \(0, 1\], got 2"),
        ({"widths": []}, ValueError, "sandwich_step: expected at least one width, got none"),
        ({"widths": 0}, ValueError, "expected count to be a positive integer"),
        ({"distill": "l2"}, ValueError, "distill: expected one of"),
        ({"amp": "int8"}, ValueError, "expected amp to be one of"),
        ({"clip_grad": 1.0}, ValueError, "sandwich_step: expected optimizer when clip_grad is given, got None"),
        (
            {"rule": WidthSampler([1.0], "all"), "widths": 3},
            ValueError,
            "no widths, depths or generator beside a WidthSampler",
        ),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        sandwich_step(TinyNet(), batch(), F.cross_entropy, None, **options)


@pytest.mark.parametrize(("data", "got"), [(torch.ones(3), "a Tensor"), ((torch.ones(3),), "a tuple of 1")])
def test_batch_that_is_no_pair(data, got):
    with pytest.raises(ValueError, match=rf"expected a batch \(inputs, targets\), got {got}"):
        sandwich_step(TinyNet(), data, F.cross_entropy, None)


def test_model_is_not_kept_alive():
    model = TinyNet()
    sandwich_step(model, batch(), F.cross_entropy, None)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_parameters_without_use_keep_no_gradient():
    own = stand_in.OwnWidths()
    sandwich_step(own, batch(), F.cross_entropy, sgd(own), widths=[1.0, 0.25])
    assert own.scales["8"].grad is None
