"""FP8 quantization: the bits of the reference, and the share of copy bandwidth."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kernels import device
from kernels.fp8 import Quantized, fp8_dtype
from kernels.quantization import quantize
from scripts.gpu_suite.harness import Check, Place, Timing
from scripts.gpu_suite.harness import measure as take_time

SHAPES = [(4096, 7168), (16384, 7168), (8192, 2048), (16640, 16384)]


def check(place: Place) -> Iterator[Check]:
    """Number of elements that differ from the reference on a CPU; the limit is zero."""
    for shape in ((257, 576), (1, 1), (130, 131), (1000, 2880))[: 3 if place.dry_run else None]:
        for dtype in (torch.bfloat16, torch.float32):
            x = hard_values(shape, dtype)
            for power_of_two in (False, True):
                case = f"{list(shape)} {str(dtype)[6:]}{' power of two' * power_of_two}"
                ours = _all_forms(x.to(place.device), power_of_two)
                fp8 = fp8_dtype(place.device)
                blocks = ((1, 128), (128, 1), (1, 128), (128, 1), (128, 128))
                wrong = sum(
                    _differing(got, quantize._reference(x, block, power_of_two, fp8))
                    for got, block in zip(ours, blocks, strict=True)
                )
                yield Check(f"{case}: elements that differ", wrong, 0)

    for E, R, K in ((1, 1, 1), (3, 130, 131), (2, 256, 2048))[: 2 if place.dry_run else None]:
        codes = torch.arange(E * R * K, device=place.device).to(torch.uint8).view(E, K, R).mT
        wrong = int((_with_rows(codes)[..., :K] != codes).sum())
        yield Check(f"{[E, R, K]} with contiguous rows: elements that differ", wrong, 0)


def measure(place: Place) -> Iterator[Timing]:
    """Time each form against a copy of the same number of bytes."""
    for shape in place.shapes([*SHAPES]):
        x = torch.randn(shape, device=place.device).bfloat16()
        forms: dict[str, tuple[Callable[[Tensor], object], int]] = {
            "quantize_1x128": (quantize.quantize_1x128, 1),
            "quantize_128x1": (quantize.quantize_128x1, 1),
            "quantize_1x128_128x1": (quantize.quantize_1x128_128x1, 2),
            "quantize_128x128": (quantize.quantize_128x128, 2),
        }
        for name, (function, copies) in forms.items():
            moved = x.numel() * (2 + copies)
            half = torch.empty(moved // 2, dtype=torch.int8, device=place.device)
            target = torch.empty_like(half)
            yield take_time(
                f"{name} {list(shape)}",
                {"ours": partial(function, x), "copy": partial(target.copy_, half)},
                place,
                bytes=moved,
            )
        codes = torch.zeros(1, *shape, dtype=torch.uint8, device=place.device)
        yield take_time(
            f"copy of FP8 with contiguous rows {list(shape)}",
            {
                "ours": partial(_with_rows, codes.mT),
                "plain torch": codes.mT.contiguous,
                "copy": codes.clone,
            },
            place,
            bytes=2 * codes.numel(),
        )


def _with_rows(codes_ERK: Tensor) -> Tensor:
    """What products on a GPU do with operands in the other memory order."""
    if not device.on_accelerator(codes_ERK):
        return codes_ERK.contiguous()
    from kernels.quantization.transpose_triton import to_row_major

    return to_row_major(codes_ERK)


def hard_values(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Sixty powers of two, outliers, both zeros, denormals, infinities, a NaN; from a seed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    x *= 2.0 ** torch.randint(-40, 20, shape, generator=generator)
    x[1::7] *= 1e-30
    x[2::11] = 0
    if min(shape) > 130:
        x[5, 7], x[6, 129], x[7] = math.inf, math.nan, -0.0
        x[8], x[9, 0], x[128, 128] = 1e-41, 3e38, -math.inf
    return x.to(dtype)


def _all_forms(x: Tensor, power_of_two: bool) -> list[Quantized]:
    square, transposed = quantize.quantize_128x128(x, power_of_two)
    assert torch.equal(transposed.contiguous().view(torch.uint8), square.data.view(torch.uint8))
    return [
        quantize.quantize_1x128(x, power_of_two),
        quantize.quantize_128x1(x, power_of_two),
        *quantize.quantize_1x128_128x1(x, power_of_two),
        square,
    ]


def _differing(ours: Quantized, reference: Quantized) -> int:
    """Elements of data and scales whose bits differ; all NaNs are one."""
    count = 0
    for a, b in zip(ours, reference, strict=True):
        a = a.cpu().contiguous()
        b = b.contiguous()
        codes = torch.uint8 if a.element_size() == 1 else torch.int32
        same = a.view(codes) == b.view(codes)
        same |= a.float().isnan() & b.float().isnan()
        count += int((~same).sum())
    return count
