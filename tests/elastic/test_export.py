"""A width leaves as a state_dict, as ONNX and through torch.export; each is loaded back and run."""

import io

import pytest
import torch

from slimkernels import elastic, models
from tests.elastic.nets import build
from tests.helpers import error

NETS = ("resnet20", "mobilenet_v2", "densenet", "convnext", "vit")
WIDTHS = (1.0, 0.5, 0.31)


def extracted(name: str, width: float):
    net, x = build(name)
    return elastic.extract(elastic.convert(net, x, divisor=1), width).eval(), x


@pytest.mark.parametrize("width", WIDTHS)
@torch.no_grad()
def test_state_dict_loads_into_a_plain_network_of_that_size(width):
    torch.manual_seed(0)
    net, x = models.CifarResNet(20, (16, 32, 64), option="B").eval(), torch.randn(2, 3, 16, 16)
    plain = elastic.extract(elastic.convert(net, x, divisor=1), width).eval()
    file = io.BytesIO()
    torch.save(plain.state_dict(), file)
    file.seek(0)
    channels = [plain.get_submodule(f"layer{i}.0.bn2").num_features for i in (1, 2, 3)]
    inner = [plain.get_submodule(f"layer{i}.0.bn1").num_features for i in (1, 2, 3)]
    loaded = models.CifarResNet(20, channels, inner, option="B").eval()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded(x), plain(x))


# The exporter that needs no further package: it warns that a newer one is to replace it, and of constants it records.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_onnx_runs_in_onnxruntime(name, width, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    plain, x = extracted(name, width)
    path = tmp_path / "net.onnx"
    torch.onnx.export(plain, (x,), path, dynamo=False, input_names=["x"], output_names=["y"], opset_version=17)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(["y"], {"x": x.numpy()})
    assert error(torch.from_numpy(y), plain(x)) < 1e-5


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_torch_export_is_saved_and_loaded(name, width, tmp_path):
    plain, x = extracted(name, width)
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(plain, (x,)), path)
    assert error(torch.export.load(path).module()(x), plain(x)) < 1e-6
