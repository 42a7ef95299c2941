// Fisher diagonals of layers, sample by sample, from their inputs and the gradients of their outputs:
//
//   F += weight * sum over samples n of |sum over positions t of g[n][t] a[n][t]^T|^power
//
// No sample's gradient is ever stored, and no unfolded batch.
#pragma once

#include "core/patches.h"

namespace unlearn_ext {

// A linear layer or a convolution. `inputs` are those of the first group; `grads` has the channels of all groups and,
// along every axis, the extent inputs.out; both are of one dtype.
struct LayerProduct {
  Patches inputs;
  Positions grads;
  int64_t groups, group_stride;  // between the inputs of neighbouring groups, in elements
  double weight;
  int power;
  bool tf32;  // CUDA, float inputs: products may be rounded to tf32

  UNLEARN_HD int64_t outputs() const { return grads.channels / groups; }  // of one group
};

// fisher: [groups * outputs][inputs.columns()], dense, of acc_t of the inputs' type.
// partial: fisher_weight_partials<B>(layer) arrays of fisher's type and size, whose order is the kernel's own,
// or null for none.
template <Backend B>
int fisher_weight(const LayerProduct& layer, void* fisher, void* partial, const Exec& exec);

// Runs that the samples are split into, of which each needs an array; 0 where a single one needs none. How many runs
// depends on the shapes alone, so that results do not depend on the number of threads or on strides.
template <Backend B>
int64_t fisher_weight_partials(const LayerProduct& layer);

// A value per channel: biases (`normalized` null) and the scales of norm layers, whose inputs after normalisation are
// `normalized`, of the same shape and dtype. fisher: [grads.channels], dense.
// partial: fisher_channels_partials<B>(...) arrays of fisher's type and size, or null if that is 1.
template <Backend B>
int fisher_channels(const Positions& grads, const Positions* normalized, double weight, int power, void* fisher,
                    void* partial, const Exec& exec);

// Runs that the samples are split into where there are few channels, by shapes and strides alone.
template <Backend B>
int64_t fisher_channels_partials(const Positions& grads, const Positions* normalized);

// An embedding table. Lookup i is position i % positions of sample i / positions; `order` lists the lookups sorted by
// index and then by number, `indices` their indices in that order. Those outside [0, rows) and `padding` are skipped.
// fisher: [rows][grads.channels], dense.
template <Backend B>
int fisher_embedding(const Positions& grads, const int64_t* indices, const int64_t* order, int64_t rows,
                     int64_t padding, double weight, int power, void* fisher, const Exec& exec);

}  // namespace unlearn_ext
