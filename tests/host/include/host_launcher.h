// The launcher that runs kernels on the host executor, for the planning templates of the operators.
#pragma once

#include "../../../csrc/cuda/launch.h"

namespace latent_shift::host {

class HostLauncher {
 public:
  HostLauncher() : limits{options().arch, options().shared_per_block, options().num_sms} {}

  template <auto Kernel, class Params>
  void launch(const cuda::Grid& grid, const Params& params) const {
    host::launch(
        __PRETTY_FUNCTION__, grid.blocks, grid.threads, grid.cluster, grid.shared,
        [](const void* p) { Kernel(*static_cast<const Params*>(p)); }, &params, sizeof(params));
  }

  const cuda::Limits limits;
};

}  // namespace latent_shift::host
