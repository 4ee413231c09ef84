"""The package as a whole: what importing it does and does not do, its version, and the commands that need no data."""

import json
import re
import subprocess
import sys
from importlib.resources import files

import pytest
import torch
from typer.testing import CliRunner

import slimkernels
from slimkernels import _info
from slimkernels.cli import app
from slimkernels.cuda_kernels import inr_weights, slice_accumulate

CLEAN = """
import socket, subprocess, sys, time
import numpy, torch
def refused(*args, **kwargs):
    raise AssertionError("the network or a program was used")
socket.socket.connect = subprocess.Popen.__init__ = refused
start = time.perf_counter()
import slimkernels
seconds = time.perf_counter() - start
assert not torch.cuda.is_initialized()
print(seconds)
unwanted = ("triton", "rich", "typer", "matplotlib", "torchvision", "torch._inductor")
print([m for m in unwanted if m in sys.modules])
"""


def test_import_is_fast_and_touches_nothing():
    runs = [subprocess.run([sys.executable, "-c", CLEAN], capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(run.stdout.split("\n")[0]) for run in runs) < 0.3
    assert runs[0].stdout.split("\n")[1] == "[]"


def test_version_is_written_once():
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", slimkernels.__version__)
    pyproject = files("slimkernels").joinpath("..", "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in pyproject
    assert slimkernels.__version__ not in pyproject.split("[project.optional-dependencies]")[0]


def test_package_is_typed():
    assert files("slimkernels").joinpath("py.typed").is_file()


@pytest.mark.parametrize("name", ["elastic", "models", "nn", "ops", "train", "recipes"])
def test_parts_are_reached_through_the_package(name):
    assert getattr(slimkernels, name).__name__ == f"slimkernels.{name}"


def test_unknown_part_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'slimkernels' has no attribute 'nothing'"):
        _ = slimkernels.nothing


def invoke(*args: str):
    return CliRunner().invoke(app, list(args))


def test_info_tells_what_runs_and_why_something_is_off():
    result = invoke("info", "--json")
    assert result.exit_code == 0
    sections = json.loads(result.stdout)
    assert sections["slimkernels"]["version"] == slimkernels.__version__
    assert sections["slimkernels"]["torch"] == torch.__version__
    assert sections["ops on the CPU"]["slim_linear"] in ("C++", "PyTorch reference")
    assert re.match("on|off: .+", sections["CPU"]["C++ kernels"])
    assert {"torch", "driver", "Triton"} <= set(sections["GPU"])
    assert set(sections["ops on a GPU"]) == {
        name for name, how in sections["ops on the CPU"].items() if how != "composed of other ops"
    }
    assert not torch.cuda.is_initialized()


def test_info_names_the_switch_that_turned_kernels_off():
    code = (
        "from slimkernels import _info; print(_info.collect()['CPU']['C++ kernels'], _info.collect()['ops on the CPU'])"
    )
    environment = {"SLIMKERNELS_DISABLE": "1", "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "off: switched off by SLIMKERNELS_DISABLE=1" in run.stdout
    assert "C++'" not in run.stdout


def test_info_tells_what_the_gpu_kernels_leave_to_pytorch(monkeypatch):
    for module in (_info.cuda_kernels, _info.triton_kernels):
        monkeypatch.setattr(module, "reason_missing", lambda: "")
    monkeypatch.delenv("SLIMKERNELS_DISABLE", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    told = _info._gpu_ops()
    limits = f"more than {inr_weights.HIDDEN[-1]} hidden units, {inr_weights.MOST_OUTPUTS} outputs or"
    assert told["inr_weights"].startswith(
        f"CUDA C++; in PyTorch: {limits} {(inr_weights.MOST_COLUMNS - 6) // 12} bands"
    )
    assert f"more than {slice_accumulate.DIMS} dimensions" in told["slice_accumulate_"]
    assert (told["slim_linear"], told["slim_conv"][:36]) == ("Triton", "CUDA C++ (depthwise), Triton; in PyT")
    monkeypatch.setattr(_info.cuda_kernels, "reason_missing", lambda: "not built")
    told = _info._gpu_ops()
    assert (told["inr_weights"], told["slim_conv"][:18]) == ("PyTorch reference", "Triton; in PyTorch")


def test_info_prints_a_table():
    result = invoke("info")
    assert result.exit_code == 0
    assert "instruction set" in result.stdout


@pytest.mark.parametrize(
    "command", [["--help"], ["info", "--help"], ["kernels", "--help"], ["bench", "--help"], ["train", "--help"]]
)
def test_help(command):
    result = invoke(*command)
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_bench_outside_a_checkout_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("bench")
    assert result.exit_code == 1
    assert "bench: expected to run in a source checkout" in result.output
