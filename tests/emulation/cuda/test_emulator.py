"""The emulator itself: what is wrong with a kernel is reported, and in which words."""

import pytest

from tests.emulation.cuda import library
from tests.emulation.cuda.library import EmulationError, Kernels, skip_unless_possible

# Kernels of 64 threads: body, bytes of shared memory, what is reported ("": nothing).
BODIES = [
    ("shared[t] = t; __syncthreads(); shared[t] = __shfl_xor_sync(~0u, t, 1);", 256, ""),
    ("if (t < 32) __syncthreads();", 256, "returned while others wait at __syncthreads"),
    ("if (t < 32) __syncthreads(); else\n __syncthreads();", 256, "while another thread waits at"),
    ("if (t != 3) shared[t] = __shfl_sync(~0u, t, 0);", 256, "mask names lanes that have returned|deadlock"),
    ("if (t & 1) shared[t] = __shfl_sync(0x55555555u, t, 0);", 256, "lane not in the mask it passes"),
    ("cp_async_16(shared, shared, true); cp_commit();", 256, "copies in flight"),
    ("cp_async_16(shared + 1, shared, true);", 256, "cp.async: misaligned"),
    ("", 200 * 1024, "bytes of dynamic shared memory"),
]
KERNEL = """
__global__ void kernel_{i}(int* out) {{
  SK_DYN_SMEM(int, shared);
  const int t = threadIdx.x;
  {body}
  if (out) out[t] = shared[t];
}}
extern "C" int sk_{i}(void* stream) {{
  SK_LAUNCH(kernel_{i}, dim3(1), dim3(64), {size}, stream, static_cast<int*>(nullptr));
  return int(cudaGetLastError());
}}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    skip_unless_possible()
    folder = tmp_path_factory.mktemp("kernels")
    for path in library.SOURCES.glob("*.*h"):
        (folder / path.name).write_text(path.read_text())
    bodies = "".join(KERNEL.format(i=i, body=body, size=size) for i, (body, size, _) in enumerate(BODIES))
    source = f'#include "numeric.cuh"\n#include "ptx.cuh"\nusing namespace slimkernels;\n{bodies}'
    (folder / "broken.cu").write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "SOURCES", folder)
        return Kernels(("broken",))


@pytest.mark.parametrize("i", range(len(BODIES)))
def test_emulator_reports(kernels, i):
    message = BODIES[i][2]
    if not message:
        kernels.launch(f"sk_{i}")
        return
    with pytest.raises(EmulationError, match=message):
        kernels.launch(f"sk_{i}")
