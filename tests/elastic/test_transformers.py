"""Small networks of the architectures in Hugging Face's transformers, where that is installed (no test dependency)."""

import copy

import pytest
import torch
from torch import nn

from slimkernels import elastic
from tests.helpers import error

hf = pytest.importorskip("transformers", reason="transformers is not installed")

BASE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = BASE | {"vocab_size": 100}
GROUPED = TEXT | {"num_key_value_heads": 2}
IMAGE = BASE | {"image_size": 32, "patch_size": 8}
SOUND = BASE | {
    "vocab_size": 30,
    "conv_dim": (32,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
SMALL = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64]}
# Model, options of its configuration, shape of the input (whole numbers for text).
NETWORKS = {
    "Bert": (TEXT, (2, 12)),
    "DistilBert": ({"vocab_size": 100, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}, (2, 12)),
    "DebertaV2": (TEXT, (2, 12)),
    "Llama": (GROUPED, (2, 12)),
    "Mistral": (GROUPED, (2, 12)),
    "Gemma": (GROUPED | {"head_dim": 16}, (2, 12)),
    "GPTNeoX": (TEXT, (2, 12)),
    "FNet": ({"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}, (2, 12)),
    "ViT": (IMAGE, (2, 3, 32, 32)),
    "Dinov2": (IMAGE, (2, 3, 32, 32)),
    "Segformer": (SMALL, (2, 3, 64, 64)),
    "RegNet": (SMALL | {"embedding_size": 16, "groups_width": 8}, (2, 3, 64, 64)),
    "ConvNextV2": (SMALL, (2, 3, 64, 64)),
    "PoolFormer": (SMALL, (2, 3, 64, 64)),
    "Wav2Vec2": (SOUND, (1, 3000)),
    "PatchTST": (
        {
            **{"num_input_channels": 3, "context_length": 32, "patch_length": 4, "patch_stride": 4, "d_model": 32},
            **{"num_attention_heads": 4, "ffn_dim": 64, "num_hidden_layers": 2},
        },
        (2, 32, 3),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_slims_and_deploys(name):
    options, shape = NETWORKS[name]
    torch.manual_seed(0)
    net: nn.Module = getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(**options)).eval()
    x = (
        torch.randint(0, 100, shape)
        if "vocab_size" in options and len(shape) == 2 and shape[0] > 1
        else torch.randn(shape)
    )
    expected = net(x).last_hidden_state
    model = elastic.convert(copy.deepcopy(net), x)
    assert error(model(x).last_hidden_state, expected) < 1e-5
    assert elastic.cost(model, 0.5).params < elastic.cost(model, 1.0).params
    deployed = elastic.deploy(model)
    for width in (1.0, 0.5, 0.37):
        plain = elastic.extract(model, width).eval()(x)
        with elastic.width(model, width):
            assert error(model(x).last_hidden_state, plain.last_hidden_state) < 1e-5
        deployed.set_width(width)
        found = deployed(x)
        assert type(found) is type(plain)
        assert error(found.last_hidden_state, plain.last_hidden_state) < 1e-5
    assert deployed.report.layers  # some of it runs in C++
