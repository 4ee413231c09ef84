// The operators of inr_weights. The networks arrive packed (slimkernels/cuda_kernels/inr_weights.py: pack), the jobs as
// rows of integers in the order of SkInrJob; addresses and sizes are checked here.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "binding.h"
#include "launchers.h"

namespace slimkernels {
namespace {

constexpr int64_t kJobColumns = sizeof(SkInrJob) / sizeof(int64_t);

ScalarType storage(int64_t operand) {
  STD_TORCH_CHECK(operand >= kSkOperandFloat && operand <= kSkOperandHalf, "inr_weights: expected operand 0 to 3, got ",
                  operand);
  return operand == kSkOperandBfloat16 ? ScalarType::BFloat16
         : operand == kSkOperandHalf   ? ScalarType::Half
                                       : ScalarType::Float;
}

// `alignment`: bytes; the kernels read most of what is packed in steps of 16.
void check_packed(const char* name, const Tensor& t, ScalarType dtype, const Tensor& like,
                  const std::vector<int64_t>& sizes, uintptr_t alignment = 16) {
  check_sizes("inr_weights", name, t, sizes);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % alignment == 0, "inr_weights: expected ", name,
                  " aligned to ", alignment, " bytes");
  STD_TORCH_CHECK(
      t.scalar_type() == dtype && t.is_contiguous() && t.is_cuda() && t.get_device_index() == like.get_device_index(),
      "inr_weights: expected ", name, " packed, contiguous and on the CUDA device of w_in");
}

// What the kernels are called with, and the tensors that it points to.
struct Call {
  SkInr c{};
  int64_t total = 0;  // weights
  std::vector<SkInrJob> jobs;
  std::vector<Tensor> alive;
};

// One past the last number of `base` that the job reads, and whether it lies inside.
bool base_fits(const SkInrJob& job, const Tensor& base) {
  int64_t extent = 1;
  for (int64_t d = 0; d < base.dim(); ++d) extent += (base.size(d) - 1) * base.stride(d);
  const int64_t last =
      (job.c_out - 1) * job.base_out + (job.c_in - 1) * job.base_in + (job.kernel - 1) * job.base_kernel;
  return job.base_out >= 0 && job.base_in >= 0 && job.base_kernel >= 0 && last < extent;
}

Call make_call(const std::vector<Tensor>& networks, const std::optional<Tensor>& scale, const std::vector<Tensor>& base,
               const std::optional<Tensor>& seed, const std::vector<int64_t>& rows, const std::vector<int64_t>& numbers,
               double norm, double limit, bool per_sample) {
  const char* op = "inr_weights";
  STD_TORCH_CHECK(networks.size() == 7 && numbers.size() == 7 && rows.size() % kJobColumns == 0 && !rows.empty(), op,
                  ": expected 7 tensors of networks, 7 numbers and ", kJobColumns, " integers a job");
  const Tensor& w_in = networks[0];
  STD_TORCH_CHECK(w_in.is_cuda() && w_in.dim() == 4 && networks[4].dim() == 2 && networks[6].dim() == 2, op,
                  ": expected packed networks on a CUDA device");
  Call call;
  SkInr& c = call.c;
  const ScalarType operands = storage(numbers[0]);
  c.activation = numbers[1], c.neumeta = numbers[2], c.noise = numbers[3], c.samples = numbers[4];
  c.first_sample = numbers[5], c.real_outputs = numbers[6], c.norm = float(norm), c.limit = float(limit);
  c.mlps = w_in.size(0), c.hidden = w_in.size(3), c.bands = (w_in.size(2) - 1) / 2;
  c.depth = networks[4].size(1), c.outputs = networks[6].size(1);
  const int64_t tile = sk_inr_tile(c.hidden), p = c.mlps, d = c.depth, h = c.hidden, o = c.outputs;
  STD_TORCH_CHECK(tile && o % 64 == 0 && o <= 128 && o <= h && c.real_outputs <= o && c.samples >= 1 && c.bands <= 31, op,
                  ": expected packed networks of 64, 128, 256 or 512 hidden units and at most 128 outputs");
  check_packed("w_in", w_in, ScalarType::Float, w_in, {p, 6, 1 + 2 * c.bands, h});
  check_packed("b_in", networks[1], ScalarType::Float, w_in, {p, h});
  check_packed("w_hidden", networks[2], operands, w_in, {p, d, h, h});
  check_packed("b_hidden", networks[3], ScalarType::Float, w_in, {p, d, h});
  check_packed("skip", networks[4], ScalarType::Float, w_in, {p, d}, 4);
  check_packed("w_out", networks[5], operands, w_in, {p, o, h});
  check_packed("b_out", networks[6], ScalarType::Float, w_in, {p, o}, 4);
  const auto floats = [](const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); };
  c.w_in = floats(w_in), c.b_in = floats(networks[1]), c.w_hidden = networks[2].const_data_ptr();
  c.b_hidden = floats(networks[3]), c.skip = floats(networks[4]), c.w_out = networks[5].const_data_ptr();
  c.b_out = floats(networks[6]), c.scale = scale ? floats(*scale) : nullptr;

  c.job_count = int64_t(rows.size()) / kJobColumns;
  std::vector<SkInrJob>& jobs = call.jobs;
  jobs.resize(c.job_count);
  for (int64_t j = 0; j < c.job_count; ++j) {
    const int64_t* r = rows.data() + j * kJobColumns;
    SkInrJob& job = jobs[j];
    job = {r[0],  r[1],  r[2],  r[3],  r[4],  r[5],  r[6],    r[7],  r[8],  r[9],
           r[10], r[11], r[12], r[13], r[14], r[15], nullptr, r[17], r[18], r[19]};
    STD_TORCH_CHECK(job.mlp >= 0 && job.mlp < p && job.kernel >= 1 && job.tile_out >= 1 && job.tile_in >= 1 &&
                        job.kernel * job.tile_out * job.tile_in <= c.real_outputs && job.c_out >= 1 && job.c_in >= 1 &&
                        job.places_out >= 1 && job.places_in >= 1 &&
                        job.tensor >= 0 && (!scale || job.tensor < scale->size(0)) &&
                        (base.empty() || job.tensor < int64_t(base.size())),
                    op, ": expected jobs[", j, "] to fit the networks");
    const int64_t height = (job.c_out + job.tile_out - 1) / job.tile_out;
    const int64_t width = (job.c_in + job.tile_in - 1) / job.tile_in;
    STD_TORCH_CHECK(job.tile_begin == c.tiles && job.tiles == (height * width + tile - 1) / tile &&
                        job.table_begin == c.table_rows && job.start >= 0,
                    op, ": expected the tiles of jobs[", j, "] to follow those before");
    c.tiles += job.tiles * (per_sample ? c.samples : 1);
    if (c.noise != 2) c.table_rows += c.samples * (height + width);
    const int64_t end = job.start + job.c_out * job.c_in * job.kernel;
    if (end > call.total) call.total = end;
    if (!base.empty() && base[job.tensor].numel()) {
      const Tensor& b = base[job.tensor];
      STD_TORCH_CHECK(b.is_cuda() && b.get_device_index() == w_in.get_device_index() && base_fits(job, b), op,
                      ": expected base[", job.tensor, "] on the device of w_in and to contain the slice of its job");
      job.base = b.const_data_ptr();
    }
  }
  STD_TORCH_CHECK(c.tiles < (int64_t(1) << 31) && c.table_rows < (int64_t(1) << 31), op,
                  ": expected fewer coordinates");
  if (scale) check_packed("scale", *scale, ScalarType::Float, w_in, {scale->size(0)}, 4);
  if (seed) {
    STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1 &&
                        (!seed->is_cuda() || seed->get_device_index() == w_in.get_device_index()),
                    op, ": expected seed to be one number of dtype int64, on the CPU or on the device of w_in");
    const int64_t* at = static_cast<const int64_t*>(seed->const_data_ptr());
    if (seed->is_cuda()) {
      c.seed = at;
    } else {
      c.seed_value = *at;
    }
  }
  const Tensor table = torch::stable::new_empty(w_in, {c.job_count * kJobColumns}, ScalarType::Long);
  const Tensor rows_of_axes = torch::stable::new_empty(w_in, {c.table_rows * h}, ScalarType::Float);
  c.jobs = static_cast<const SkInrJob*>(table.mutable_data_ptr());
  c.tables = static_cast<float*>(rows_of_axes.mutable_data_ptr());
  check_launch(op, sk_upload(table.mutable_data_ptr(), jobs.data(), int64_t(jobs.size() * sizeof(SkInrJob)),
                             current_stream(w_in)));
  call.alive = {table, rows_of_axes};
  return call;
}

// numbers: operand, activation, neumeta, noise, samples, first_sample, outputs of the networks.
void inr_forward(std::vector<Tensor> networks, std::optional<Tensor> scale, std::vector<Tensor> base,
                 std::optional<Tensor> seed, std::vector<int64_t> jobs, std::vector<int64_t> numbers, double norm,
                 double limit, Tensor weights) {
  const char* op = "inr_weights";
  STD_TORCH_CHECK(!networks.empty() && networks[0].is_cuda(), op, ": expected packed networks on a CUDA device");
  torch::stable::accelerator::DeviceGuard guard(networks[0].get_device_index());
  const Call call = make_call(networks, scale, base, seed, jobs, numbers, norm, limit, false);
  STD_TORCH_CHECK(weights.is_cuda() && weights.is_contiguous() && weights.numel() == call.total &&
                      weights.get_device_index() == networks[0].get_device_index(),
                  op, ": expected room for ", call.total, " weights");
  for (const Tensor& b : base) {
    STD_TORCH_CHECK(!b.numel() || b.scalar_type() == weights.scalar_type(), op,
                    ": expected base of the result's dtype");
  }
  check_launch(op, sk_inr_forward(&call.c, weights.mutable_data_ptr(), int(numbers[0]), dtype_code(op, weights),
                                  current_stream(weights)));
}

// gradients: of the hidden layers and the last one, of the first one, and of the scales; they are added to.
void inr_backward(std::vector<Tensor> networks, std::vector<Tensor> transposed, std::optional<Tensor> scale,
                  std::optional<Tensor> seed, std::vector<int64_t> jobs, std::vector<int64_t> numbers, double norm,
                  double limit, Tensor dy, int64_t bytes, std::vector<Tensor> gradients) {
  const char* op = "inr_weights_backward";
  STD_TORCH_CHECK(!networks.empty() && networks[0].is_cuda() && transposed.size() == 2 && gradients.size() == 3, op,
                  ": expected packed networks on a CUDA device, 2 transposed matrices and 3 gradients");
  const Tensor& like = networks[0];
  torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const Call call = make_call(networks, scale, {}, seed, jobs, numbers, norm, limit, true);
  const SkInr& c = call.c;
  SkInrPlan plan;
  sk_inr_plan(&c, call.jobs.data(), int(numbers[0]), bytes, &plan);
  const int64_t h = c.hidden, o = c.outputs, rows = plan.wave_tiles * plan.tile_rows;
  const ScalarType e = storage(numbers[0]), f = ScalarType::Float;
  check_packed("dy", dy, f, like, {call.total}, 4);
  check_packed("transposed[0]", transposed[0], e, like, {c.mlps, c.depth, h, h});
  check_packed("transposed[1]", transposed[1], e, like, {c.mlps, h, o});
  check_packed("gradients[0]", gradients[0], f, like, {c.mlps, plan.numbers});
  check_packed("gradients[1]", gradients[1], f, like, {c.mlps, plan.first_numbers / h, h});
  check_packed("gradients[2]", gradients[2], f, like, {scale ? scale->size(0) : 0}, 4);
  std::vector<Tensor> alive;
  const auto room = [&](ScalarType dtype, int64_t count) {
    alive.push_back(torch::stable::new_empty(like, {count}, dtype));
    return alive.back().mutable_data_ptr();
  };
  const auto floats = [&](int64_t count) { return static_cast<float*>(room(f, count)); };
  SkInrBackward w{};
  w.dy = static_cast<const float*>(dy.const_data_ptr());
  w.w_hidden = transposed[0].const_data_ptr(), w.w_out = transposed[1].const_data_ptr();
  w.runs = static_cast<SkInrRun*>(room(ScalarType::Long, 2 * plan.runs * int64_t(sizeof(SkInrRun) / 8)));
  w.inputs = room(e, (c.depth + 1) * rows * h), w.gradients = room(e, c.depth * rows * h);
  w.results = room(e, rows * o), w.first = floats(rows * h);
  w.dskip = floats(plan.wave_tiles * c.depth), w.dscale = floats(plan.wave_tiles);
  w.dtables = floats(c.table_rows * h), w.partial = floats(plan.partial);
  w.total = static_cast<float*>(gradients[0].mutable_data_ptr());
  w.first_total = static_cast<float*>(gradients[1].mutable_data_ptr());
  w.scale_total = scale ? static_cast<float*>(gradients[2].mutable_data_ptr()) : nullptr;
  w.tensors = scale ? scale->size(0) : 0;
  check_launch(op, sk_inr_backward(&c, call.jobs.data(), &w, int(numbers[0]), bytes, current_stream(like)));
}

}  // namespace
}  // namespace slimkernels

STABLE_TORCH_LIBRARY_FRAGMENT(slimkernels_cuda, m) {
  m.def(
      "inr_forward(Tensor[] networks, Tensor? scale, Tensor[] base, Tensor? seed, int[] jobs, int[] numbers, float "
      "norm,"
      " float limit, Tensor(a!) weights) -> ()");
  m.def(
      "inr_backward(Tensor[] networks, Tensor[] transposed, Tensor? scale, Tensor? seed, int[] jobs, int[] numbers,"
      " float norm, float limit, Tensor dy, int bytes, Tensor(a!)[] gradients) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(slimkernels_cuda, CUDA, m) {
  m.impl("inr_forward", TORCH_BOX(&slimkernels::inr_forward));
  m.impl("inr_backward", TORCH_BOX(&slimkernels::inr_backward));
}
