"""Generates the table of the GPU kernels: ``slimkernels/gpu_kernels.csv`` and ``benchmarks/results/GPU_KERNELS.md``.

``python -m tests.emulation.table`` makes all of it in some minutes, ``python -m tests.emulation.table norm`` (or
``linear``, ``conv``, ``cuda``) only the rows of that family and keeps the others, ``python -m tests.emulation.table cuda
--op inr_weights`` only those of that op. Numbers belong to the release in the column ``compiler``.

Bytes moved are counted by the interpreter, those of CUDA C++ by the PTX simulator, in sectors of 32 bytes of each load and
store, without any cache; the fewest possible are those of every tensor that the op reads or returns, once.
"""

import argparse
import ast
import csv
import functools
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from slimkernels.gpu_kernels import COLUMNS, PATH, RUNGS, Row, read

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MARKDOWN = ROOT / "benchmarks" / "results" / "GPU_KERNELS.md"
NEVER = "never"
DTYPES = {"f32": "float32", "bf16": "bfloat16"}

# The tests that are the rungs of each family; of CUDA sources the first name that the source begins with counts.
PROOFS = {
    "norm": {"T1": ["test_row_norm_interpreted", "test_channel_norm_interpreted"], "T2": ["test_norms_aot"],
             "T3": ["test_norms_simulated"]},
    "linear": {"T1": ["test_slim_linear_interpreted"], "T2": ["test_slim_linear_aot"],
               "T3": ["test_slim_linear_simulated"]},
    "conv": {"T1": ["test_slim_conv_interpreted"], "T2": ["test_slim_conv_aot"], "T3": ["test_slim_conv_simulated"]},
    "slim_conv_depthwise": {"C1": ["cuda/test_compiled"], "C2": ["cuda/test_depthwise"],
                            "C3": ["cuda/test_simulated"], "C4": ["cuda/test_binding"]},
    "slice_accumulate": {"C1": ["cuda/test_compiled"], "C2": ["cuda/test_slice_accumulate"],
                         "C3": ["cuda/test_simulated"], "C4": ["cuda/test_binding"]},
    "inr_weights": {"C1": ["cuda/test_compiled"], "C2": ["cuda/test_inr_weights"], "C3": ["cuda/test_inr_simulated"],
                    "C4": ["cuda/test_binding"]},
}  # fmt: skip


FAMILIES = ["norm", "linear", "conv", "cuda"]


def rungs(family: str, op: str) -> str:
    """The rungs whose tests there are, of a Triton family or of a CUDA source whose name begins with a key of ``PROOFS``."""
    key = next((key for key in PROOFS if op.startswith(key)), family) if family == "cuda" else family
    proofs = PROOFS[key].items()
    return " ".join(rung for rung, tests in proofs if all((HERE / f"{test}.py").exists() for test in tests))


@functools.cache
def source_of(op: str, compiler: str) -> str:
    """A fingerprint of the code that an op's kernels and launchers are made of, without comments and docstrings."""
    if compiler.startswith("nvcc"):
        from tests.emulation.cuda.compiled import STEMS
        from tests.emulation.cuda.library import SOURCES, included

        texts = {path.name: path.read_text() for path in SOURCES.glob("*.*")}
        stems = [stem for stem in STEMS if stem == op or (op == "inr_weights" and stem.startswith(op))]
        found: dict[str, str] = {}
        for stem in stems:
            found |= included(f"{stem}.cu", texts)
        code = {name: " ".join(re.sub(r"//.*|/\*(?:.|\n)*?\*/", " ", text).split()) for name, text in found.items()}
    else:
        code = {name: python_code(text) for name, text in triton_sources(op).items()}
    return hashlib.sha256(repr(sorted(code.items())).encode()).hexdigest()[:12]


def triton_sources(op: str) -> dict[str, str]:
    """The module of an op's launchers and those of its folder that it imports, through others too."""
    folder = ROOT / "slimkernels" / "triton_kernels"
    found: dict[str, str] = {}
    waiting = [op]
    while waiting:
        name = waiting.pop()
        if name not in found and (folder / f"{name}.py").exists():
            found[name] = (folder / f"{name}.py").read_text()
            waiting += re.findall(r"from slimkernels\.triton_kernels\.(\w+) import", found[name])
            for names in re.findall(r"from slimkernels\.triton_kernels import (.+)", found[name]):
                waiting += names.split(", ")
    return found


def python_code(text: str) -> str:
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            assert node.end_lineno is not None
            for line in range(node.lineno - 1, node.end_lineno):
                lines[line] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def problem(family: str, op: str, direction: str, dtype: str) -> tuple[Callable[[], Any], list]:
    """A call of a launcher, and the tensors that it must read."""
    import torch

    kind = getattr(torch, DTYPES[dtype])
    if family == "norm":
        from tests.emulation import norm_cases

        return norm_cases.problem(op, direction, kind, norm_cases.LAYOUTS[op][0])
    bias = torch.zeros(256, dtype=kind)
    if family == "linear":
        from slimkernels.triton_kernels import slim_linear as linear

        x, dy, weight = (torch.zeros(shape, dtype=kind) for shape in [(512, 256), (512, 192), (256, 512)])
        read = [x, weight[:192, :256], dy]
        if direction == "forward":
            return lambda: linear.slim_linear(x, weight, bias, 192, 1, 1, "gelu", dy), read
        return lambda: linear.slim_linear_backward(dy, x, weight, 1, 1, True, True, False), read
    from slimkernels.triton_kernels import slim_conv as conv

    x, dy, weight = (
        torch.zeros(shape, dtype=kind).contiguous(memory_format=torch.channels_last)
        for shape in [(2, 64, 16, 16), (2, 96, 16, 16), (128, 128, 3, 3)]
    )
    read, geometry = [x, weight[:96, :64], dy], ((1, 1), (1, 1), (1, 1))
    if direction == "forward":
        return lambda: conv.slim_conv(x, weight, bias, 96, *geometry, 1, "silu", dy), read
    return lambda: conv.slim_conv_backward(dy, x, weight, *geometry, 1, True, True, False), read


def problems(family: str, only: str | None) -> Iterator[tuple[str, str, str]]:
    ops = ["slim_batch_norm", "slim_group_norm", "slim_layer_norm", "slim_rms_norm"]
    for op in ops if family == "norm" else [f"slim_{family}"]:
        if only not in (None, op):
            continue
        for direction in ("forward", "backward"):
            for dtype in DTYPES:
                yield op, direction, dtype


def count_moved(family: str, only: str | None) -> dict[str, float]:
    """Of each problem the bytes moved over the fewest; in a process with ``TRITON_INTERPRET=1``."""
    from tests.emulation import interpreter
    from tests.helpers import tensors_in

    interpreter.install()
    counted = {}
    for op, direction, dtype in problems(family, only):
        call, inputs = problem(family, op, direction, dtype)
        interpreter.LAUNCHES.clear()
        outputs = call()
        least = sum(t.numel() * t.element_size() for t in [*inputs, *tensors_in(outputs)])
        moved = sum(sum(launch.moved.values()) for launch in interpreter.LAUNCHES)
        counted[f"{op} {direction} {dtype}"] = moved / least
    return counted


def moved_in_a_process_of_its_own(family: str, only: str | None) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.emulation.table", family, "--count", *(["--op", only] if only else [])]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def triton_rows(family: str, only: str | None) -> Iterator[Row]:
    moved = moved_in_a_process_of_its_own(family, only)
    done = set()
    for op, direction, dtype in problems(family, only):
        for row in rows_of_problem(family, op, direction, dtype, f"{moved[f'{op} {direction} {dtype}']:.2f}"):
            if (row.kernel, row.op, row.dtype, row.target) not in done:
                done.add((row.kernel, row.op, row.dtype, row.target))
                yield row


def rows_of_problem(
    family: str, op: str, direction: str, dtype: str, moved: str, targets: list[str] | None = None
) -> Iterator[Row]:
    import triton

    from tests.emulation import aot
    from tests.emulation.capture import capture

    for launch in capture(problem(family, op, direction, dtype)[0]):
        for target in targets or aot.TARGETS:
            found = launch.resources(target)
            known = found.occupancy == found.occupancy
            yield Row(
                kernel=launch.name,
                op=op,
                direction=direction,
                dtype=dtype,
                target=target,
                registers=str(found.registers),
                spills=str(found.spills),
                shared=str(found.shared),
                occupancy=f"{found.occupancy:.3f}" if known else "",
                limiter=found.limiter,
                moved=moved,
                rungs=rungs(family, op),
                gpu=NEVER,
                compiler=f"Triton {triton.__version__}",
                source=source_of(op, "Triton"),
            )


def cuda_rows(only: str | None, targets: list[str] | None = None) -> Iterator[Row]:
    from tests.emulation.aot import occupancy_bound
    from tests.emulation.cuda import compiled, launched

    release = re.search(r"release ([\d.]+)", compiled.run("nvcc", "--version"))
    assert release is not None
    for stem in compiled.STEMS:
        op = "inr_weights" if stem.startswith("inr_weights") else stem
        if only not in (None, op):
            continue
        sizes, moved = launched.found(op)
        for target in targets or compiled.TARGETS:
            for name, kernel in sorted(compiled.compile_file(stem, target).items()):
                threads, dynamic = sizes[name]
                shared = kernel.shared + dynamic
                occupancy, limiter = occupancy_bound(kernel.registers, shared, threads // 32, target)
                direction = next((word for word, part in DIRECTIONS.items() if part.search(name)), "")
                times = moved.get(launched.counted_as(op, name))
                yield Row(
                    kernel=name,
                    op=op,
                    direction=direction,
                    dtype=next((short for part, short in CUDA_DTYPES.items() if part in name), ""),
                    target=target,
                    registers=str(kernel.registers),
                    spills=str(kernel.spills),
                    shared=str(shared),
                    occupancy=f"{occupancy:.3f}",
                    limiter=limiter,
                    moved=f"{times:.2f}" if times is not None and direction else "",
                    rungs=rungs("cuda", op),
                    gpu=NEVER,
                    compiler=f"nvcc {release[1]}",
                    source=source_of(op, "nvcc"),
                )


DIRECTIONS = {
    "backward": re.compile("backward|gradient|inr_sum|inr_scale"),
    "forward": re.compile("forward|depthwise|accumulate"),
}
# Of the first template argument; the kernels of inr_weights have the operand's number there (SkOperand).
CUDA_DTYPES = {
    **{"<float": "f32", "<__nv_bfloat16": "bf16", "<__half": "f16"},
    **{"<0,": "f32", "<1,": "tf32", "<2,": "bf16", "<3,": "f16", "inr_": "f32"},
}


def triton_kernels() -> set[str]:
    """Every Triton kernel of the sources."""
    pattern = re.compile(r"^def (_\w+_kernel)\(", re.MULTILINE)
    paths = (ROOT / "slimkernels" / "triton_kernels").glob("*.py")
    return {name for path in paths for name in pattern.findall(path.read_text())}


def cuda_kernels() -> dict[str, str]:
    """Every CUDA kernel of the sources: its text, with what follows it up to the next one."""
    found = {}
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu*")):
        for part in re.split(r"\b__global__\b", path.read_text())[1:]:
            name = re.match(r"\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+)?(\w+)\(", part)
            if name is None:
                raise ValueError(f"{path.name}: expected a kernel after __global__, got {part[:60]!r}")
            found[name[1]] = part
    return found


def family_of(row: Row) -> str:
    if row.compiler.startswith("nvcc"):
        return "cuda"
    return row.op.split("_")[1] if not row.op.endswith("norm") else "norm"


def markdown(rows: list[Row]) -> str:
    shown = [
        "kernel",
        "op",
        "direction",
        "dtype",
        "target",
        "registers",
        "spills",
        "shared",
        "occupancy",
        "moved",
        "rungs",
    ]
    lines = [
        "# GPU kernels",
        "",
        "Generated by `python -m tests.emulation.table`. No kernel here has been run on a GPU yet. `occupancy` is a bound"
        " from registers and shared memory, `moved` the bytes that all kernels of that op and direction move over the"
        " fewest possible, counted without a cache. CUDA C++ decides the shared memory at the launch, by the shapes: it stands"
        " here for a small one. Empty cells were not counted.",
        "",
        *(f"- {rung}: {text}" for rung, text in RUNGS.items()),
        "",
        "| " + " | ".join(shown) + " |",
        "|" + "---|" * len(shown),
        *("| " + " | ".join(str(getattr(row, name)) for name in shown) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def write(rows: list[Row]) -> None:
    with PATH.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([getattr(row, name) for name in COLUMNS] for row in rows)
    MARKDOWN.write_text(markdown(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", nargs="*", help="only these; all of them by default")
    parser.add_argument("--op", help="only the rows of this op")
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count:
        print(json.dumps(count_moved(args.family[0], args.op)))
        return
    families = args.family or FAMILIES
    for family in families:
        made = list(cuda_rows(args.op) if family == "cuda" else triton_rows(family, args.op))
        old = read() if PATH.exists() else []
        kept = [row for row in old if family_of(row) != family or args.op not in (None, row.op)]
        write(sorted(kept + made, key=lambda row: (FAMILIES.index(family_of(row)), row.op, row.kernel)))


if __name__ == "__main__":
    main()
