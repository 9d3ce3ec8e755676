"""Matrix products of blockwise-quantized FP8 operands, one for each product of a linear layer.

| product | function | sums over | a | b |
|---|---|---|---|---|
| output `x @ w.T` | `gemm_fp8_nt` | input width | x, 1x128 | w, 128x128 |
| input gradient `dy @ w` | `gemm_fp8_nn` | output width | dy, 1x128 | w, 128x128 |
| weight gradient `dy.T @ x` | `gemm_fp8_tn` | tokens | dy, 128x1 | x, 128x1 |

After every 128 elements of the summed dimension the partial product is multiplied by its two scales
and added in fp32. So each block has its own scale, and the tensor cores' short accumulators never
add more than 128 products (DeepSeek-V3, arXiv:2412.19437, section 3.3).

The result is bf16 or fp32, or is added to an fp32 matrix: a main gradient that accumulates
microbatches without rounding and without a second pass. A NaN scale makes its row, or its 128
columns, NaN.

On a CPU the operands are dequantized to fp32 and multiplied by its BLAS. If all scales are powers
of two, bf16 represents data x scale exactly: then a bf16 result is computed by bf16 products, if
the CPU has them. It differs only by the order of the sum and is several times as fast. On a GPU
`implementation` selects the kernel: "triton" runs everywhere, "gluon"
(`kernels.gemm.gemm_fp8_gluon`) on Hopper; the latter has not been measured, so it is never the
default.

M, N and K are arbitrary. FP8 tensor cores require both operands contiguous along K, as
`kernels.quantization.quantize` stores them; other memory orders are copied. Not supported: e5m2,
biases.

Shapes: M x N output, K summed; m, n, k their numbers of blocks of 128, rounded up.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from kernels import device
from kernels.fp8 import BLOCK, fp8_dtype, fp8_values

Implementation = Literal["triton", "gluon"]
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
OUT_DTYPES = (torch.bfloat16, torch.float32)


def gemm_fp8_nt(
    a_MK: Tensor, scales_a_Mk: Tensor, b_NK: Tensor, scales_b_nk: Tensor,
    out_dtype: torch.dtype = torch.bfloat16, implementation: Implementation = "triton",
) -> Tensor:  # fmt: skip
    """`a @ b.T`: `[M, N]` in `out_dtype` (bf16 or fp32)."""
    _check("nt", a_MK, b_NK, out_dtype, implementation)
    _check_scales("a", scales_a_Mk, a_MK, (1, BLOCK))
    _check_scales("b", scales_b_nk, b_NK, (BLOCK, BLOCK))
    operands = a_MK, scales_a_Mk, b_NK, scales_b_nk
    return _run("nt", operands, out_dtype, implementation)


def gemm_fp8_nn(
    a_MK: Tensor, scales_a_Mk: Tensor, b_KN: Tensor, scales_b_kn: Tensor,
    out_dtype: torch.dtype = torch.bfloat16, implementation: Implementation = "triton",
) -> Tensor:  # fmt: skip
    """`a @ b`, otherwise as `gemm_fp8_nt`. b: the column-major form that `quantize_128x128` also
    returns; row-major data is copied on CUDA."""
    _check("nn", a_MK, b_KN.T, out_dtype, implementation)
    _check_scales("a", scales_a_Mk, a_MK, (1, BLOCK))
    _check_scales("b", scales_b_kn, b_KN, (BLOCK, BLOCK))
    operands = a_MK, scales_a_Mk, b_KN, scales_b_kn
    return _run("nn", operands, out_dtype, implementation)


def gemm_fp8_tn(
    a_KM: Tensor, scales_a_kM: Tensor, b_KN: Tensor, scales_b_kN: Tensor,
    out_dtype: torch.dtype = torch.bfloat16, implementation: Implementation = "triton",
) -> Tensor:  # fmt: skip
    """`a.T @ b` of operands from `quantize_128x1`, otherwise as `gemm_fp8_nt`."""
    _check("tn", a_KM.T, b_KN.T, out_dtype, implementation)
    _check_scales("a", scales_a_kM, a_KM, (BLOCK, 1))
    _check_scales("b", scales_b_kN, b_KN, (BLOCK, 1))
    operands = a_KM, scales_a_kM, b_KN, scales_b_kN
    return _run("tn", operands, out_dtype, implementation)


def gemm_fp8_nt_reference(
    a_MK: Tensor, scales_a_Mk: Tensor, b_NK: Tensor, scales_b_nk: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """Plain loop over the blocks of K, in the kernel's order."""
    scales_b_Nk = scales_b_nk.repeat_interleave(BLOCK, 0)[: b_NK.shape[0]]
    total = _blockwise(a_MK, scales_a_Mk, b_NK, scales_b_Nk)
    return total.to(out_dtype)


def gemm_fp8_nn_reference(
    a_MK: Tensor, scales_a_Mk: Tensor, b_KN: Tensor, scales_b_kn: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """Plain loop over the blocks of K, in the kernel's order."""
    return gemm_fp8_nt_reference(a_MK, scales_a_Mk, b_KN.T, scales_b_kn.T, out_dtype)


def gemm_fp8_tn_reference(
    a_KM: Tensor, scales_a_kM: Tensor, b_KN: Tensor, scales_b_kN: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """Plain loop over the blocks of K, in the kernel's order."""
    total = _blockwise(a_KM.T, scales_a_kM.T, b_KN.T, scales_b_kN.T)
    return total.to(out_dtype)


def _blockwise(a_MK: Tensor, scales_a_Mk: Tensor, b_NK: Tensor, scales_b_Nk: Tensor) -> Tensor:
    total = torch.zeros(a_MK.shape[0], b_NK.shape[0], device=a_MK.device)
    for k in range(scales_a_Mk.shape[1]):
        along = slice(k * BLOCK, (k + 1) * BLOCK)
        product = a_MK[:, along].float() @ b_NK[:, along].float().T
        total += product * scales_a_Mk[:, k, None] * scales_b_Nk[None, :, k]
    return total


def factors(scales: tuple[Tensor, ...], out_dtype: torch.dtype) -> torch.dtype:
    """Dtype in which a CPU stores data x scale for a product: bf16 if that is exact and fast."""
    if out_dtype != torch.bfloat16 or not device.bf16_is_fast(scales[0].device):
        return torch.float32
    exact = all(not (s.contiguous().view(torch.int32) & 0x7FFFFF).any() for s in scales)
    return torch.bfloat16 if exact else torch.float32


def operand(
    data: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """data x scale, one scale per block, in data's memory order and in a dtype of `factors`.

    Converted bitwise, as in `kernels.fp8.fp8_values`, but the required factor 2^120 is multiplied
    into the scales if they cannot overflow, and NaNs are checked first.
    """
    if data.stride(0) == 1 and data.stride(1) != 1:
        return operand(data.T, scales.T, block[::-1], dtype).T
    codes = data.view(torch.int8)
    is_plain = (
        data.dtype == torch.float8_e4m3fn and data.numel() and bool(scales.max() < 2.0**7)
        and codes.max() != 127 and data.view(torch.uint8).max() != 255
    )  # fmt: skip
    for dim, repeats in enumerate(block):
        if repeats > 1:
            scales = scales.repeat_interleave(repeats, dim)
    scales = scales[: data.shape[0], : data.shape[1]]
    if not is_plain:
        return fp8_values(data).to(dtype).mul_(scales.to(dtype))
    shifted = codes.to(torch.int16).bitwise_left_shift_(4).bitwise_and_(-30736)  # 0x87F0
    return shifted.view(torch.bfloat16).to(dtype).mul_((scales * 2.0**120).to(dtype))


def _run(
    layout: str, operands: tuple[Tensor, Tensor, Tensor, Tensor], out_dtype: torch.dtype,
    implementation: Implementation,
) -> Tensor:  # fmt: skip
    c_MN: Tensor = _product(layout, *operands, out_dtype, implementation)
    return c_MN


@torch.library.custom_op("phalanx::gemm_fp8", mutates_args=())
def _product(
    layout: str, a: Tensor, scales_a: Tensor, b: Tensor, scales_b: Tensor,
    out_dtype: torch.dtype, implementation: str,
) -> Tensor:  # fmt: skip
    c_MN = a.new_empty(_shape(layout, a, b), dtype=out_dtype)
    _compute(layout, a, scales_a, b, scales_b, c_MN, implementation)
    return c_MN


@_product.register_fake
def _(
    layout: str, a: Tensor, scales_a: Tensor, b: Tensor, scales_b: Tensor,
    out_dtype: torch.dtype, implementation: str,
) -> Tensor:  # fmt: skip
    return a.new_empty(_shape(layout, a, b), dtype=out_dtype)


def _shape(layout: str, a: Tensor, b: Tensor) -> tuple[int, int]:
    return a.shape[1 if layout == "tn" else 0], b.shape[0 if layout == "nt" else 1]


def _compute(
    layout: str, a: Tensor, scales_a: Tensor, b: Tensor, scales_b: Tensor, c_MN: Tensor,
    implementation: str,
) -> None:  # fmt: skip
    if not device.on_accelerator(a):
        dtype = factors((scales_a, scales_b), c_MN.dtype)
        by_columns = layout == "tn"
        a = operand(a, scales_a, (BLOCK, 1) if by_columns else (1, BLOCK), dtype)
        b = operand(b, scales_b, (BLOCK, 1 if by_columns else BLOCK), dtype)
        _matmul(a.T if by_columns else a, b.T if layout == "nt" else b, c_MN)
        return
    gemm = dense_kernel(implementation)
    fp8_dtype(a.device)  # raises on devices without FP8
    if layout == "tn":
        a, scales_a = a.T, scales_a.T
    if layout != "nt":
        b, scales_b = b.T, scales_b.T
    if c_MN.numel() and a.shape[1]:
        with device.launching_on(a):
            gemm(a, scales_a, b, scales_b, c_MN)
    else:
        c_MN.zero_()


def _matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def dense_kernel(implementation: str) -> Callable[..., None]:
    """Import the kernel when it is needed: a CPU has no Triton, and Gluon changes between
    versions."""
    if implementation == "triton":
        from kernels.gemm.gemm_fp8_triton import gemm

        return gemm
    try:
        from kernels.gemm.gemm_fp8_gluon import gemm as gluon_gemm
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"implementation 'gluon' needs Gluon for Hopper, as Triton 3.6 to 3.9 have it: {error}"
        ) from error
    return gluon_gemm


def _check(
    name: str, a_MK: Tensor, b_NK: Tensor, out_dtype: torch.dtype, implementation: Implementation
) -> None:
    problem = None
    if a_MK.dim() != 2 or b_NK.dim() != 2 or a_MK.shape[1] != b_NK.shape[1]:
        problem = f"cannot sum over {list(a_MK.shape)[1:]} of a and {list(b_NK.shape)[1:]} of b"
    elif a_MK.dtype != b_NK.dtype or a_MK.dtype not in FP8_DTYPES:
        problem = f"operands are {a_MK.dtype} and {b_NK.dtype}, must both be e4m3"
    elif out_dtype not in OUT_DTYPES:
        problem = f"out_dtype is {out_dtype}, must be bf16 or fp32"
    problem = problem or problem_of_implementation(implementation, a_MK)
    if problem:
        raise ValueError(f"gemm_fp8_{name}: {problem}")


def problem_of_implementation(implementation: Implementation, a: Tensor) -> str | None:
    """Why this implementation cannot multiply a, or None."""
    if implementation not in get_args(Implementation):
        return f"implementation is {implementation!r}, must be 'triton' or 'gluon'"
    if implementation == "gluon" and not device.on_accelerator(a):
        return f"implementation 'gluon' needs a Hopper GPU, a is on {a.device}"
    return None


def _check_scales(name: str, scales: Tensor, data: Tensor, block: tuple[int, int]) -> None:
    grid = tuple(-(-size // side) for size, side in zip(data.shape, block, strict=True))
    if scales.shape != grid or scales.dtype != torch.float32:
        raise ValueError(
            f"scales of {name} are {list(scales.shape)} in {scales.dtype}, must be {list(grid)} in "
            f"fp32: one per {block[0]}x{block[1]} of {list(data.shape)}"
        )
