// The module: every op of the package behind both doors. The one translation unit that sees torch; its host functions
// lie in the headers beside it, one per family of ops.
#include "torch/importances.h"
#include "torch/layers.h"
#include "torch/masked.h"
#include "torch/pack.h"
#include "torch/subspaces.h"

namespace unlearn_ext {
namespace {

using Ops = Joined<ImportanceOps, LayerOps, PackOps, MaskOps, SubspaceOps>;

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = UNLEARN_VERSION;
  info["torch"] = UNLEARN_TORCH_VERSION;
  info["python"] = UNLEARN_PYTHON_VERSION;
  info["compiler"] = UNLEARN_COMPILER;
#if defined(UNLEARN_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_reason"] = UNLEARN_CUDA_REASON;
  info["cuda_architectures"] = pybind11::str(UNLEARN_CUDA_ARCHITECTURES).attr("split")();
  info["cpu_capability"] = name_of(cpu_backend());
  std::vector<std::string> capabilities;
  for (const Backend backend : compiled_cpu_backends()) capabilities.emplace_back(name_of(backend));
  info["cpu_capabilities"] = capabilities;
  info["schemas"] = Ops::schemas();
  return info;
}

// What projecting does on a GPU, wherever the tensors are.
void project_by_library_anywhere(const std::vector<at::Tensor>& grads, const std::vector<at::Tensor>& bases,
                                 bool onto) {
  const char* op = "_project_by_library";
  TORCH_CHECK_NOT_IMPLEMENTED(is_plain(grads) && is_plain(bases), op, ": tensors must be plain");
  project_in_place(op, grads, bases, onto, &project_by_library);
}

}  // namespace

TORCH_LIBRARY(unlearn_ext, m) {
  m.set_python_module("unlearn_ext.ops.fakes");
  Ops::define(m);
}
TORCH_LIBRARY_IMPL(unlearn_ext, CPU, m) { Ops::implement(m); }
#if defined(UNLEARN_CUDA)
TORCH_LIBRARY_IMPL(unlearn_ext, CUDA, m) { Ops::implement(m); }
#endif
// Other devices, and CUDA in a build without it, get kernels in plain PyTorch from unlearn_ext/ops/fallback.
TORCH_LIBRARY_IMPL(unlearn_ext, BackendSelect, m) { Ops::select_backend(m); }
TORCH_LIBRARY_IMPL(unlearn_ext, Autograd, m) { Ops::without_autograd(m, {"project_out", "project_onto"}); }

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "How this module was built, and which CPU kernels it chose.");
  m.def("_project_by_library", torch::wrap_pybind_function_no_gil(&project_by_library_anywhere),
        "For tests where there is no GPU.");
  Ops::define_direct(m);
}

}  // namespace unlearn_ext
