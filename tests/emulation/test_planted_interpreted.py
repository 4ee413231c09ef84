"""Rung T1 finds a bug of every Triton kernel."""

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
planted = pytest.importorskip("tests.emulation.planted", reason="needs Triton")
pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("op", planted.TESTS)
def test_copies_without_a_bug_pass(op, tmp_path):
    with planted.kernels_with(None, op, tmp_path):
        planted.check(op)


@pytest.mark.parametrize("name", planted.BUGS)
def test_planted_bugs_are_found_interpreted(name, tmp_path):
    bug = planted.BUGS[name]
    with (
        planted.kernels_with(bug, bug.op, tmp_path),
        pytest.raises((AssertionError, triton.runtime.interpreter.InterpreterError)),
    ):
        planted.check(bug.op)
