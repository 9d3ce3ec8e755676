"""`python -m scripts.fp8_products`: signal to noise of single products under each arithmetic.

Loss curves of small models are not sensitive enough: their sums are short and their activations
have a small range. Here each arithmetic of `train.fp8_emulation` multiplies data of known types,
compared with fp64. The result is the signal to noise in decibels that nine of ten rows exceed,
since a sum of squares over all rows would be that of the largest.

| data | model of |
|---|---|
| normal | activations and weights at the start, K = 4096 |
| outliers | the same with one channel 100,000 times as large, of weight zero |
| gradients | tokens whose gradients differ by orders of magnitude: e to 4 times a normal number |
| positive | activations of one sign, K = 4096: the worst case of a short accumulator |
"""

import torch
from torch import Tensor

from train.fp8_emulation import VARIANTS, Arithmetic

M, K, N = 256, 4096, 128


def data(kind: str) -> tuple[Tensor, Tensor]:
    """Operands `[M, K]` and `[K, N]`, fp32, always the same."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(M, K, generator=generator)
    b = torch.randn(K, N, generator=generator) * 0.02
    if kind == "outliers":
        a[:, 0] *= 1e5
        b[0] = 0
    elif kind == "gradients":
        a *= (4 * torch.randn(M, 1, generator=generator)).exp()
    elif kind == "positive":
        a, b = a.abs(), b.abs()
    return a, b


KINDS = ("normal", "outliers", "gradients", "positive")


def decibels(arithmetic: Arithmetic, kind: str) -> float:
    """Signal to noise that nine of ten rows of a product exceed."""
    a, b = data(kind)
    quantize = arithmetic.gradient if kind == "gradients" else arithmetic.activation
    made = arithmetic.product(quantize(a, 1, a), arithmetic.weight(b.T).T).double()
    exact = a.double() @ b.double()
    signal, noise = exact.square().sum(1), (made - exact).square().sum(1)
    return float((10 * (signal / noise).log10()).quantile(0.1))


def main() -> None:
    """Print the table."""
    print(f"| arithmetic | {' | '.join(KINDS)} |")
    print("|---|" + "---|" * len(KINDS))
    for name, arithmetic in VARIANTS.items():
        found = [f"{decibels(arithmetic, kind):.1f}" for kind in KINDS]
        print(f"| {name} | {' | '.join(found)} |")


if __name__ == "__main__":
    main()
