"""The table of the GPU kernels: its kernels are in the sources, and it says what the compilers say."""

import pytest
from typer.testing import CliRunner

from slimkernels import cli, gpu_kernels
from tests.emulation import table


def test_table_has_rows_of_every_kernel_of_the_sources_and_of_no_other():
    triton, cuda = table.triton_kernels(), set(table.cuda_kernels())
    assert len(triton) >= 10
    assert len(cuda) >= 9
    listed = {row.kernel.split("<")[0] for row in gpu_kernels.read()}
    assert listed == triton | cuda, "the table is stale: python -m tests.emulation.table"


def test_table_has_no_row_twice():
    rows = [(row.kernel, row.op, row.dtype, row.target) for row in gpu_kernels.read()]
    assert len(set(rows)) == len(rows)


def test_table_is_of_the_sources_as_they_are():
    stale = {(row.op, row.source) for row in gpu_kernels.read() if row.source != table.source_of(row.op, row.compiler)}
    assert not stale, "python -m tests.emulation.table FAMILY --op OP, with Triton's and nvcc's releases of the table"


def test_table_sees_a_change_of_the_code_and_not_of_a_comment():
    text = 'def f(x):\n    """Doc."""\n    return x + 1\n'
    assert table.python_code(text) == table.python_code("def f(x):\n    return x + 1  # one\n")
    assert table.python_code(text) != table.python_code("def f(x):\n    return x + 2\n")
    norm = table.triton_sources("slim_group_norm")
    assert {"slim_group_norm", "_channel_norm", "_channel_norm_backward", "_norm", "_rows", "_common"} <= set(norm)
    assert "_conv" not in norm


def test_table_bounds_the_occupancy_of_every_kernel():
    for row in gpu_kernels.read():
        assert (row.occupancy == "") == (row.target == "gfx942"), row.kernel
        assert row.shared, row.kernel


def test_table_in_the_documentation_is_that_of_the_package():
    assert table.MARKDOWN.read_text() == table.markdown(gpu_kernels.read())


def test_table_claims_no_run_on_a_gpu_and_no_spill():
    rows = gpu_kernels.read()
    assert {row.gpu for row in rows} == {"never"}
    assert {row.spills for row in rows} == {"0"}
    assert all(row.rungs for row in rows)
    assert all(row.rungs == table.rungs(table.family_of(row), row.op) for row in rows)


@pytest.mark.slow_emulation
@pytest.mark.parametrize("op", ["slim_batch_norm", "slim_layer_norm", "slim_linear", "slim_conv"])
def test_table_says_what_the_compiler_says(op):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    rows = [row for row in gpu_kernels.read() if (row.op, row.direction, row.dtype) == (op, "forward", "bf16")]
    if rows[0].compiler != f"Triton {triton.__version__}":
        pytest.skip(f"the table is of {rows[0].compiler}, installed is {triton.__version__}")
    found = table.rows_of_problem(table.family_of(rows[0]), op, "forward", "bf16", rows[0].moved, ["sm_80"])
    listed = {row.kernel: row for row in rows if row.target == "sm_80"}
    assert {row.kernel: row for row in found} == listed, "the table is stale: python -m tests.emulation.table"


def test_kernels_command_prints_the_table():
    shown = CliRunner().invoke(cli.app, ["kernels"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "_row_norm_fwd_kernel" in shown.output
    assert "never" in shown.output
    wrong = CliRunner().invoke(cli.app, ["kernels", "--target", "sm_1"])
    assert wrong.exit_code == 1
