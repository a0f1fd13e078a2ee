"""The table of the CUDA programs: every .cu file that the package has, its kernels, and what it is compiled for."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from rwkv_miss.ops.cuda.kernel import Program
from rwkv_miss.ops.cuda.nvrtc import SOURCES

# By the tensors' dtype, the option that sets `io` of cuda/common.cuh, the type of a kernel's inputs and outputs.
IO = {torch.float32: "-DIO_BF16=0", torch.bfloat16: "-DIO_BF16=1"}
# The head sizes that cuda/wkv.cuh can be compiled for.
HEAD_SIZES = (8, 16, 24, 32, 64, 96, 128)
# By the inputs' dtype and the head size.
_WKV_VARIANTS: dict[Hashable, tuple[str, ...]] = {
    (dtype, n): (f"-DHEAD_SIZE={n}", option) for dtype, option in IO.items() for n in HEAD_SIZES
}
# The head sizes of cuda/wkv7_chunk.cu, which takes bfloat16 alone.
CHUNK_HEAD_SIZES = (32, 64, 128)


def _chunk_shared(n: int) -> dict[str, int]:
    """FORWARD_BYTES and BACKWARD_BYTES of cuda/wkv7_chunk.cu for a head size."""
    row, pairs = (n + 16) * 2, 8 * (16 * 24 * 2 + 32) + 16 * 24 * 4 + n * 4
    return {"wkv7_chunk_forward": 13 * 16 * row + pairs, "wkv7_chunk_backward": (18 * 16 + 2 * n) * row + pairs}


# CONTRIBUTING.md says how to add a program. In the names of parameters dx is the gradient of x.
PROGRAMS = {
    "wkv6": Program(
        SOURCES / "wkv6.cu",
        {
            "wkv6_forward": "r k v w u state_in seq_start y state_out saved_states steps heads",
            "wkv6_backward_values": "r k w u seq_start dy grad_state dv dstate steps heads",
            "wkv6_backward_keys": "r k v w u seq_start saved_states dy grad_state dr dk dw du steps heads",
        },
        _WKV_VARIANTS,
    ),
    "wkv7": Program(
        SOURCES / "wkv7.cu",
        {
            "wkv7_forward": "r z k v a b state_in seq_start y state_out saved_states saved_u steps heads",
            "wkv7_backward_values": "r z k a b seq_start dy grad_state dv du dstate steps heads",
            "wkv7_backward_keys": (
                "r z k v a b seq_start saved_states saved_u dy du grad_state dr dz dk da db steps heads"
            ),
        },
        _WKV_VARIANTS,
    ),
    "wkv7_chunk": Program(
        SOURCES / "wkv7_chunk.cu",
        {
            "wkv7_chunk_forward": "r z k v a b state_in seq_start y state_out saved_states steps heads",
            "wkv7_chunk_backward": (
                "r z k v a b seq_start saved_states scratch dy grad_state dr dz dk dv da db dstate steps heads"
            ),
        },
        {(torch.bfloat16, n): _WKV_VARIANTS[torch.bfloat16, n] for n in CHUNK_HEAD_SIZES},
        {(torch.bfloat16, n): _chunk_shared(n) for n in CHUNK_HEAD_SIZES},
        (8, 0),
    ),
    "fused": Program(
        SOURCES / "fused.cu",
        {
            "token_mix_forward": (
                "x last seq_start mixes extra out0 out1 out2 out3 out4 out5 batch steps channels n_mixes"
            ),
            "token_mix_backward": (
                "x last seq_start mixes extra dout0 dout1 dout2 dout3 dout4 dout5 dx dlast dmixes dextra"
                " batch steps channels n_mixes"
            ),
            "wkv7_arguments_forward": "k v v_first a nu k_k k_a k_out v_out minus_kk kk_rate rows heads n",
            "wkv7_arguments_backward": (
                "k v v_first a nu k_k k_a dk_out dv_out dminus_kk dkk_rate dk dv dv_first da dnu dk_k dk_a rows heads n"
            ),
            "wkv7_output_forward": "y r k v g weight bias r_k eps out rows heads n",
            "wkv7_output_backward": (
                "y r k v g weight bias r_k eps dout dy dr dk dv dg dweight dbias dr_k rows heads n"
            ),
            "wkv6_output_forward": "y g weight bias eps out rows heads n",
            "wkv6_output_backward": "y g weight bias eps dout dy dg dweight dbias rows heads n",
            "relu_squared_forward": "x out count",
            "relu_squared_backward": "x dout dx count",
            "gated_forward": "gate x out count",
            "gated_backward": "gate x dout dgate dx count",
        },
        {dtype: (option,) for dtype, option in IO.items()},
    ),
}
