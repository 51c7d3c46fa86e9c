// torch's operations on the fake GPU: its memory is the host's, so each runs as the CPU's kernel on the same bytes. As on a GPU, tensors of
// two devices do not meet, a generator belongs to its device, and an operation that waits for the device says so in the sync debug mode.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAFunctions.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <set>

namespace {
using at::Tensor;
using Optional = std::optional<Tensor>;
const c10::Device GPU(at::kCUDA, 0);

// The same bytes as a tensor of the CPU.
Tensor on_host(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  auto options = tensor.options().device(at::kCPU);
  if (tensor.numel() == 0) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), options);
}

// A result, copied to new memory of the device.
Tensor on_device(const Tensor& result) {
  if (!result.defined() || result.is_cuda()) return result;
  auto dense = result.is_non_overlapping_and_dense() ? result : result.contiguous();
  auto tensor = at::empty_strided(dense.sizes(), dense.strides(), dense.options().device(GPU));
  if (dense.numel()) memcpy(tensor.data_ptr(), dense.data_ptr(), dense.nbytes());
  return tensor;
}

// A generator for one draw, which moves the device's on.
at::Generator for_one_draw(at::Generator generator) {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  auto offset = generator.get_offset();
  generator.set_offset(offset + 4);
  return at::detail::createCPUGenerator(generator.current_seed() * 6364136223846793005ull + offset * 1442695040888963407ull + 1);
}

void wait_for_device() {
  if (c10::cuda::warning_state().get_sync_debug_mode() != c10::cuda::SyncDebugMode::L_DISABLED) c10::cuda::warn_or_error_on_sync();
}

bool waits(const std::string& name, const std::vector<c10::IValue>& given) {
  static const std::set<std::string> always = {"aten::nonzero", "aten::equal", "aten::_unique2", "aten::masked_select", "aten::bincount"};
  if (always.count(name)) return true;
  if (name == "aten::copy_") return given[0].toTensor().is_cuda() != given[1].toTensor().is_cuda() && !given[2].toBool();
  if (name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_")
    for (const Optional& index : given[1].toOptionalTensorVector())
      if (index && index->defined() && (index->scalar_type() == at::kBool || !index->is_cuda())) return true;
  return false;
}

bool is_output(const c10::Argument& argument) {
  return argument.kwarg_only() && argument.alias_info() && argument.alias_info()->isWrite();
}

void run(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  const auto first = stack->size() - arguments.size();
  const std::vector<c10::IValue> given(stack->begin() + first, stack->end());
  const auto& name = schema.name();
  bool on_gpu = false, stray = false;
  auto seen = [&](const Tensor& tensor) {
    if (tensor.defined()) (tensor.is_cuda() ? on_gpu : stray) |= tensor.is_cuda() || tensor.dim() > 0;  // a CPU's scalar goes anywhere
  };

  for (size_t i = 0; i < arguments.size(); i++) {
    auto& value = (*stack)[first + i];
    if (value.isTensor()) {
      seen(value.toTensor());
      if (is_output(arguments[i])) value = at::empty({0}, value.toTensor().options().device(at::kCPU));
      else value = on_host(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) seen(tensor), list.push_back(on_host(tensor));
      value = list;
    } else if (value.isOptionalTensorList()) {  // of indices, which may lie on the CPU
      c10::List<Optional> list;
      for (const Optional& tensor : value.toOptionalTensorVector()) list.push_back(tensor ? Optional(on_host(*tensor)) : tensor);
      value = list;
    } else if (value.isDevice()) {
      value = c10::Device(at::kCPU);
    } else if (value.isGenerator()) {
      TORCH_CHECK(value.toGenerator().device().is_cuda(), name, ": expected a generator of the GPU, got one of the CPU");
      value = for_one_draw(value.toGenerator());
    } else if (arguments[i].name() == "generator") {
      value = for_one_draw(at::globalContext().defaultGenerator(GPU));
    }
  }
  const bool crosses = name == "aten::copy_" || name == "aten::_foreach_copy_";
  TORCH_CHECK(!(on_gpu && stray) || crosses, name, ": expected all tensors on one device, got some on the GPU and some on the CPU");
  if (waits(name, given)) wait_for_device();

  if (name == "aten::native_dropout") {  // takes no generator: the CPU's stands aside
    auto generator = at::detail::getDefaultCPUGenerator();
    auto kept = generator.get_state();
    generator.set_state(for_one_draw(at::globalContext().defaultGenerator(GPU)).get_state());
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    generator.set_state(kept);
  } else {
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }

  const auto& returns = schema.returns();
  for (size_t r = 0; r < returns.size(); r++) {
    auto& value = (*stack)[stack->size() - returns.size() + r];
    const auto* alias = returns[r].alias_info();
    if (alias && alias->isWrite()) {  // the argument that was written to, itself
      for (size_t i = 0; i < arguments.size(); i++) {
        const auto* own = arguments[i].alias_info();
        if (!own || own->beforeSets() != alias->beforeSets()) continue;
        auto target = given[i].toTensor();
        if (is_output(arguments[i])) {
          target.resize_(value.toTensor().sizes());
          on_host(target).copy_(value.toTensor());
        }
        value = target;
        break;
      }
    } else if (value.isTensor()) {
      value = on_device(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(on_device(tensor));
      value = list;
    }
  }
}

void install(const std::vector<std::string>& names) {
  static auto& library = *new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  for (const auto& name : names) library.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&run>());
}
}  // namespace

PYBIND11_MODULE(fake_gpu_kernels, module) { module.def("install", &install); }
