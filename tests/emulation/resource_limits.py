"""What rung T2 asks of every matrix kernel that a launcher launches."""

from tests.emulation.aot import LIMITS, Resources
from tests.emulation.capture import Captured


def check_matrix_kernel(launch: Captured, target: str, rows: str) -> Resources:
    """No spills, shared memory within sm_80's limit, and the tensor cores in use; ``rows`` names the tile's rows.

    Float32 that is multiplied exactly ("ieee") has no tensor core to use.
    """
    found = launch.resources(target)
    what = f"{launch.name} for {target}, {launch.constants}"
    # On AMD a scalar register that spills goes to a lane of a vector register: what counts is memory, the stack.
    spilled = found.stack if target == "gfx942" else found.spills
    assert spilled == 0, f"{spilled} bytes of spills in {what}"
    assert found.shared <= LIMITS["sm_80"].shared_per_block, f"{found.shared} bytes of shared memory in {what}"
    exact = launch.constants["PRECISION"] == "ieee" and "*fp32" in (
        launch.signature.get("x_ptr") or launch.signature["src_ptr"]
    )
    if not exact:
        assert found.tensor_core_instructions > 0, f"no tensor core in {what}"
        if target == "sm_90" and launch.constants[rows] >= 64:
            assert found.mix["WGMMA"] > 0, f"no wgmma in {what}"
    return found
