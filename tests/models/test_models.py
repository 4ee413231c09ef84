"""The plain networks: published parameter counts, shapes at several widths, published keys, torch only."""

import copy
import subprocess
import sys

import pytest
import torch

from slimkernels import models
from slimkernels.models._width import scaled

PUBLISHED = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "mobilenet_v2": 3_504_872,
    "vgg11": 132_863_336,
    "vgg16": 138_357_544,
    "densenet121": 7_978_856,
    "googlenet": 6_624_904,
    "shufflenet_v2": 2_278_604,
    "unet": 31_037_698,
    "convnext_tiny": 28_589_128,
    "vit_small": 22_050_664,
    "DigitCNN": 390_410,
    "cifar_resnet20": 269_722,
    "cifar_resnet56": 853_018,
}


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items(), ids=PUBLISHED)
def test_parameter_count_is_the_published_one(name, count):
    with torch.device("meta"):
        model = getattr(models, name)()
    assert parameters(model) == count


def test_resnet20_with_projection_shortcuts_has_the_published_count():
    assert parameters(models.cifar_resnet20(option="B")) == 272_474


SMALL = {
    "cifar_resnet20": (lambda: models.cifar_resnet20(), (3, 32, 32), (10,)),
    "cifar_resnet20_half": (lambda: models.cifar_resnet20(0.5, option="B"), (3, 32, 32), (10,)),
    "resnet18": (lambda: models.resnet18(0.25, classes=7), (3, 64, 64), (7,)),
    "resnet50": (lambda: models.resnet50(0.25, classes=7), (3, 64, 64), (7,)),
    "mobilenet_v2": (lambda: models.mobilenet_v2(0.25, classes=7), (3, 64, 64), (7,)),
    "vgg11": (lambda: models.VGG(11, (8, 16, 24, 32, 32), 64, 7, norm=True, pool=2), (3, 64, 64), (7,)),
    "densenet": (lambda: models.DenseNet((2, 3), 8, 16, classes=7), (3, 64, 64), (7,)),
    "googlenet": (lambda: models.googlenet(0.25, classes=7), (3, 64, 64), (7,)),
    "shufflenet_v2": (lambda: models.shufflenet_v2(0.5, classes=7), (3, 64, 64), (7,)),
    "unet": (lambda: models.UNet((8, 16, 24), 1, 3), (1, 32, 48), (3, 32, 48)),
    "convnext": (lambda: models.ConvNeXt((16, 24, 32, 40), (1, 1, 1, 1), 7), (3, 64, 64), (7,)),
    "vit": (lambda: models.VisionTransformer(32, 8, 48, 2, 3, 16, classes=7), (3, 32, 32), (7,)),
    "digits": (lambda: models.DigitCNN((8, 16, 24), 40), (1, 28, 28), (10,)),
}


@pytest.mark.parametrize(("build", "shape", "expected"), SMALL.values(), ids=SMALL)
def test_output_shape_and_gradients(build, shape, expected):
    model = build()
    out = model(torch.randn(2, *shape))
    assert out.shape == (2, *expected)
    out.square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert missing == []


def test_digit_cnn_has_the_keys_of_the_published_weights():
    keys = [f"conv_layers.{i}" for i in (0, 3, 6)] + [f"fc_layers.{i}" for i in (0, 2)]
    assert list(models.DigitCNN().state_dict()) == [f"{key}.{part}" for key in keys for part in ("weight", "bias")]


def test_fixed_shortcut_is_option_a():
    """Every second pixel, with the new channels padded by zeros in front and behind."""
    shortcut = models.CifarResNet(20, (4, 8, 16)).layer2[0].shortcut
    x = torch.randn(2, 4, 6, 6)
    expected = torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
    assert torch.equal(shortcut(x), expected)
    assert not any(p.requires_grad for p in shortcut.parameters())


def test_checkpoint_without_shortcuts_loads_strictly():
    source = models.cifar_resnet20()
    plain = {key: value for key, value in source.state_dict().items() if "shortcut" not in key}
    target = copy.deepcopy(models.cifar_resnet20())
    assert target.load_state_dict(plain, strict=True).missing_keys == []
    assert "layer1.0.shortcut.weight" not in target.state_dict()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(source.eval()(x), target.eval()(x))


@pytest.mark.parametrize(("depth", "option"), [(21, "A"), (20, "C")])
def test_impossible_cifar_resnet_is_refused(depth, option):
    with pytest.raises(ValueError, match="expected depth 6 n \\+ 2 and option A or B"):
        models.CifarResNet(depth, option=option)


def test_attention_heads_follow_the_width_of_the_projection():
    wide = models.VisionTransformer(32, 8, 48, 1, 4, 12, classes=3)
    narrow = models.VisionTransformer(32, 8, 48, 1, 2, 12, classes=3)
    x = torch.randn(2, 5, 48)
    attn, ref = wide.blocks[0].attn, narrow.blocks[0].attn
    with torch.no_grad():
        ref.qkv.weight.copy_(attn.qkv.weight.view(3, 48, 48)[:, :24].reshape(72, 48))
        ref.qkv.bias.copy_(attn.qkv.bias.view(3, 48)[:, :24].reshape(72))
        ref.proj.weight.copy_(attn.proj.weight[:, :24])
        ref.proj.bias.copy_(attn.proj.bias)
        attn.proj.weight[:, 24:] = 0
    torch.testing.assert_close(attn(x), ref(x))


@pytest.mark.parametrize(
    ("channels", "mult", "expected"), [(64, 1.0, 64), (64, 0.75, 48), (24, 0.25, 8), (96, 0.3, 32), (10, 1.0, 16)]
)
def test_scaled_rounds_as_the_field_does(channels, mult, expected):
    assert scaled(channels, mult) == expected
    assert scaled(channels, mult) >= 0.9 * channels * mult


def test_models_import_torch_only():
    code = (
        "import sys, importlib.util, types, pathlib\n"
        "root = pathlib.Path(importlib.util.find_spec('slimkernels').origin).parent\n"
        "sys.modules['slimkernels'] = types.ModuleType('slimkernels')\n"
        "sys.modules['slimkernels'].__path__ = [str(root)]\n"
        "import slimkernels.models\n"
        "mine = [m for m in sys.modules if m.startswith('slimkernels.')]\n"
        "print([m for m in mine if not m.startswith('slimkernels.models')])\n"
        "print([m for m in ('torchvision', 'rich', 'typer') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
