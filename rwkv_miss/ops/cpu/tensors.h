// PyTorch's tensors as arguments and results of kernels: for sources that register operators.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "common.h"

namespace {

using at::Tensor;
typedef std::optional<Tensor> MaybeTensor;

// An argument: contiguous, and null where it is not given.
struct Given {
    Tensor tensor;
    Given(const Tensor& x) : tensor(x.contiguous()) {}
    Given(const MaybeTensor& x) : tensor(x ? x->contiguous() : Tensor()) {}
    template <class T>
    operator const T*() const {
        return tensor.defined() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
    }
};

// A result, to be filled, of the shape and type of x.
struct Made {
    Tensor tensor;
    Made(const Tensor& x) : tensor(at::empty_like(x, at::MemoryFormat::Contiguous)) {}
    template <class T>
    operator T*() const {
        return static_cast<T*>(tensor.mutable_data_ptr());
    }
};

// What the WKV forward keeps for the backward: of that shape and of the state's type; null, and without elements, where
// nothing is to be kept.
struct Saved {
    Tensor tensor;
    Saved(bool save, at::IntArrayRef shape, const Tensor& state)
        : tensor(at::empty(save ? shape : at::IntArrayRef(NOTHING), state.options())) {}
    operator float*() const { return tensor.numel() ? tensor.mutable_data_ptr<float>() : nullptr; }
    static constexpr int64_t NOTHING[] = {0};
};

// function(a value of the type of x's elements)
template <class Function>
void with_type(const Tensor& x, Function function) {
    if (x.scalar_type() == at::kFloat) return function(float());
    TORCH_CHECK(x.scalar_type() == at::kBFloat16, "expected float32 or bfloat16, found ", x.scalar_type());
    function(bf16());
}

}  // namespace
