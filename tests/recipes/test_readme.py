"""The tables of the recipes are those of the committed results, and the README's example runs."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import recipe_tables
from slimkernels._extension import _C

README = Path(__file__).parents[2] / "README.md"


def test_tables_of_the_recipes_are_up_to_date():
    assert recipe_tables.stale() == []
    texts = [page.read_text() for page in recipe_tables.PAGES]
    for name in recipe_tables.TABLES:
        assert [f"<!-- {name}:start -->" in text for text in texts].count(True) == 1, name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the ONNX exporter that needs no further package
def test_example_runs(tmp_path, monkeypatch):
    if _C is not None and not _C.deploy_has_bfloat16():
        pytest.skip("this machine has no bfloat16 products, which the example deploys for")
    monkeypatch.chdir(tmp_path)
    first, deploying, *_ = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    found: dict = {}
    exec(first, found)
    exec(deploying, found)
    assert torch.allclose(found["quarter"], found["narrow"](found["x"]), atol=1e-5)
    assert {"narrow.pt", "narrow.pt2", "narrow.onnx"} <= {path.name for path in tmp_path.iterdir()}
    assert found["half"].shape == (8, 10)
    assert type(found["plain"]).__name__ == "CifarResNet"
    assert (tmp_path / "net.safetensors").is_file()
