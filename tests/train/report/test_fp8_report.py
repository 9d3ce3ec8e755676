"""The values of the FP8 report, against plain arithmetic; reporting does not change the
training."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from configs.model import ModelConfig
from configs.precision import FP8Config
from kernels.gemm.linear_fp8 import Fp8Weight
from kernels.layers.cross_entropy import linear_cross_entropy
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.fp8 import apply_fp8
from models.init import initialize
from tests.models.families import FAMILIES, QWEN3
from tests.runs import TINY, run
from train.report.fp8_figures import MOST_DB, Figures, Weight
from train.report.fp8_report import Fp8Diagnosis, warnings
from train.report.metrics import METRICS, read_lines

Array = npt.NDArray[np.float64]


def codes() -> Array:
    """Every nonnegative value of e4m3: 4 bits of exponent (bias 7), 3 of mantissa."""
    low = [m * 2.0**-9 for m in range(8)]
    high = [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)]
    return np.array((low + high)[:-1])  # the last code is NaN


def rounded(values: Array) -> Array:
    """Round to the nearest code, ties to the even one, by comparing with all of them."""
    table = codes()
    distance = np.abs(np.abs(values)[..., None] - table)
    best = distance.min(-1, keepdims=True)
    ties = distance == best
    even = ties & (np.arange(len(table)) % 2 == 0)
    index = np.where(even.any(-1), even.argmax(-1), ties.argmax(-1))
    return np.sign(values) * table[index]


def quantised(values: Array, height: int, width: int, power_of_two: bool) -> tuple[Array, Array]:
    """Codes and dequantized values, with a scale per block, in plain loops."""
    out, back = np.zeros_like(values), np.zeros_like(values)
    for r in range(0, values.shape[0], height):
        for c in range(0, values.shape[1], width):
            block = (slice(r, r + height), slice(c, c + width))
            scale = np.abs(values[block]).max() / 448
            if power_of_two:
                scale = 2.0 ** math.ceil(math.log2(scale))
            scale = float(np.float32(scale))
            out[block] = rounded(
                (values[block].astype(np.float32) / np.float32(scale)).astype(float)
            )
            back[block] = out[block] * scale
    return out, back


def decibels(exact: Array, found: Array) -> float:
    return float(10 * np.log10((exact**2).sum() / ((found - exact) ** 2).sum()))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_figures_equal_plain_loops(power_of_two: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(150, 140, generator=generator)
    x[:, 5] *= 3e5  # an outlier in every row, because of which many values become zero
    x[7] = 0.01
    x[3, :20] = 0  # zeros are not counted as flushed
    dy = torch.randn(150, 136, generator=generator) * 1e-4
    w = torch.randn(136, 140, generator=generator) * 0.05
    figures = Figures()
    figures.add(x, dy, Weight(w, Fp8Weight.of(w, power_of_two)), power_of_two)
    found = figures.fields()

    X, DY, W = (t.double().numpy() for t in (x, dy, w))
    forms = {
        "x": [quantised(X, 1, 128, power_of_two), quantised(X, 128, 1, power_of_two)],
        "dy": [quantised(DY, 1, 128, power_of_two), quantised(DY, 128, 1, power_of_two)],
        "w": [quantised(W, 128, 128, power_of_two)],
    }
    (_, w_back) = forms["w"][0]
    expected = {
        "forward_db": decibels(X @ W.T, forms["x"][0][1] @ w_back.T),
        "dgrad_db": decibels(DY @ W, forms["dy"][0][1] @ w_back),
        "wgrad_db": decibels(DY.T @ X, forms["dy"][1][1].T @ forms["x"][1][1]),
    }
    for name, value in expected.items():
        # sums of 150 fp32 products have errors of 1e-3 or less: far below a hundredth of a decibel
        assert found[name] == pytest.approx(value, abs=0.01)
    for name, values in (("x", X), ("dy", DY), ("w", W)):
        all_codes = [made for made, _ in forms[name]]
        size = sum(made.size for made in all_codes)
        lost = sum(int(((made == 0) & (values != 0)).sum()) for made in all_codes)
        top = sum(int((np.abs(made) == 448).sum()) for made in all_codes)
        assert found[f"{name}_flushed"] == lost / size
        assert found[f"{name}_saturated"] == top / size
    assert found["x_flushed"] > 0.05
    biggest = math.log2(np.abs(X).max() / 448)
    assert found["x_scale_high"] == pytest.approx(
        math.ceil(biggest) if power_of_two else biggest, abs=1e-6
    )


def test_a_product_whose_noise_is_known() -> None:
    # scale 1: 448 fits, 17 lies between 16 and 18 and becomes 16; the weight is exact
    x = torch.full((1, 128), 17.0)
    x[0, 0] = 448
    w = torch.ones(3, 128)
    figures = Figures()
    figures.add(x, torch.ones(1, 3), Weight(w, Fp8Weight.of(w, True)), True)
    found = figures.fields()
    total = 448 + 127 * 17
    assert found["forward_db"] == pytest.approx(20 * math.log10(total / 127), abs=1e-4)
    assert found["dgrad_db"] == MOST_DB
    assert found["x_saturated"] == 2 / 256  # 448 itself, in both forms


def test_work_that_did_not_happen_has_no_figures() -> None:
    assert Figures().fields() == {}
    w = torch.ones(4, 128)
    figures = Figures()
    figures.add(torch.ones(2, 128), torch.zeros(2, 4), Weight(w, Fp8Weight.of(w)), False)
    found = figures.fields()
    assert "forward_db" in found and "dgrad_db" not in found and "wgrad_db" not in found


def decoder(model: ModelConfig, **options: object) -> Decoder:
    made = Decoder(replace(model, init_std=0.3))
    initialize(made, made.config, seed=1)
    apply_fp8(made, FP8Config(**options))  # type: ignore[arg-type]
    return made.train()


def backward(model: Decoder, seed: int = 0) -> dict[str, Tensor]:
    """Gradients of a packed batch."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (60,), generator=generator)
    positions = torch.cat([torch.arange(40), torch.arange(20)])
    targets = torch.randint(0, model.config.vocab_size, (60,), generator=generator)
    core = DocumentAttention(positions[None])

    def output(x_TD: Tensor, head_VD: Tensor) -> Tensor:
        return linear_cross_entropy(x_TD, head_VD, targets, None)

    ahead = [(tokens, output)] * model.config.mtp_depth
    made = model(tokens, positions, core, output, ahead)
    (sum(made) if ahead else made).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# MLA and MTP, biases, groups of experts, weights on the input of experts
KINDS = {"deepseek-v3-mtp", "gpt-oss", "glm4", "llama4"}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in KINDS else [pytest.mark.slow])
        for family in FAMILIES
    ],
)
def test_every_weight_of_every_family_is_reported_and_no_gradient_changes(family: str) -> None:
    options = FP8Config(diagnose_every=2)
    model = decoder(FAMILIES[family])
    before = backward(model)
    diagnosis = Fp8Diagnosis(model, options)
    with diagnosis.watching(2):
        watched = backward(model)
    report = diagnosis.report(2)
    assert report is not None
    assert before.keys() == watched.keys()
    assert all(torch.equal(before[name], watched[name]) for name in before)
    names = {key.split("/")[1] for key in report.fields}
    assert names == set(diagnosis._weights)
    for name in names:
        for product in ("forward", "dgrad", "wgrad"):
            value = report.fields[f"fp8/{name}/{product}_db"]
            # random data without outliers: that of e4m3, higher where few values dominate
            assert 24 < value < 50, (name, product, value)
    assert f"fp8/{min(names)}/x_scales" in report.histograms
    assert all(module.observer is None for module in diagnosis._names)


def test_the_first_microbatch_is_reported() -> None:
    model = decoder(FAMILIES["glm4"])
    diagnosis = Fp8Diagnosis(model, FP8Config(diagnose_every=2))
    reports = []
    for step, seeds in ((2, (0,)), (4, (0, 1))):
        with diagnosis.watching(step):
            for seed in seeds:
                backward(model, seed)
        reports.append(diagnosis.report(step))
    assert reports[0] is not None and reports[1] is not None
    assert reports[0].fields == reports[1].fields


def test_steps_that_are_not_due_are_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("watched")

    monkeypatch.setattr(Fp8Diagnosis, "linear", refuse)
    monkeypatch.setattr(Fp8Diagnosis, "mlp", refuse)
    for every, step in ((0, 4), (3, 4)):
        model = decoder(QWEN3)
        diagnosis = Fp8Diagnosis(model, FP8Config(diagnose_every=every))
        with diagnosis.watching(step):
            backward(model)
        assert diagnosis.report(step) is None


def test_a_warning_names_the_layer_and_the_product() -> None:
    model = decoder(QWEN3)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        # no projection reads the channel of 1e6; all others share its scale and become zero
        weights["layers.1.attention_norm.weight"][3] = 1e6
        for name in ("wq", "wk", "wv"):
            weights[f"layers.1.attention.{name}.weight"][:, 3] = 0
    diagnosis = Fp8Diagnosis(model, FP8Config(diagnose_every=1))
    with diagnosis.watching(1):
        backward(model)
    report = diagnosis.report(1)
    assert report is not None
    told = [line for line in report.lines if line.startswith("WARNING")]
    assert {line.split()[1] for line in told} == {
        f"layers.1.attention.{name}:" for name in ("wq", "wk", "wv")
    }
    assert all("forward" in line and "of x became zero" in line for line in told), told
    assert "dgrad" not in "".join(told)


def test_many_warnings_are_counted() -> None:
    fields = {f"layers.{i}": {"forward_db": float(i), "x_flushed": 0.5, "x_scale_low": -3.0,
                              "x_scale_high": 4.0} for i in range(8)}  # fmt: skip
    lines = warnings(fields, 7.0)
    assert len(lines) == 6 and "layers.0: forward 0.0 dB; 50.0% of x became zero" in lines[0]
    assert lines[-1] == "WARNING: and 2 more below 7 dB"
    assert warnings(fields, 0.0) == []


@pytest.fixture(scope="module")
def options() -> Iterator[list[str]]:
    yield ["--precision.recipe=fp8_blockwise", "--train.steps=4", "--train.threads=1",
           "--parallel.recompute=selective", "--model.mtp_depth=1"]  # fmt: skip


@pytest.mark.slow
def test_training_gives_the_same_bits_with_and_without(
    options: list[str], overrides: list[str], tmp_path: Path
) -> None:
    outcomes = []
    for every in (0, 2):
        folder = tmp_path / f"every-{every}"
        rest = [*overrides[:-1], f"--run.dir={folder}"]
        asked = [f"--precision.fp8.diagnose_every={every}"] if every else []
        done = run("-m", "train", TINY, *options, *rest, *asked)
        assert "FP8 takes 100.0% of the FLOPs of projections and experts" in done.stdout
        records = read_lines(folder / METRICS)
        reported = [r["step"] for r in records if any(key.startswith("fp8/") for key in r)]
        assert reported == ([2, 4] if every else [])
        assert ("signal to noise in dB" in done.stdout) == bool(every)
        shards = sorted((folder / "checkpoints").rglob("*.safetensors"))
        outcomes.append(
            ([r["loss"] for r in records], [r["grad_norm"] for r in records],
             [path.read_bytes() for path in shards])
        )  # fmt: skip
    assert outcomes[0] == outcomes[1]


@pytest.mark.slow
def test_ranks_report_the_worst_of_all(
    options: list[str], overrides: list[str], tmp_path: Path
) -> None:
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / f"ranks-{ranks}"
        rest = [*overrides[:-1], f"--run.dir={folder}", "--precision.fp8.diagnose_every=1"]
        once = ["--train.steps=1", "--schedule.warmup_steps=1"]
        run("-m", "train", TINY, *options, *once, *rest, ranks=ranks)
        record = read_lines(folder / METRICS)[0]
        found[ranks] = {key: v for key, v in record.items() if key.startswith("fp8/")}
    assert found[1].keys() == found[2].keys()
    for product in ("forward", "dgrad", "wgrad"):
        keys = [key for key in found[1] if key.endswith(f"{product}_db")]
        differences = [found[2][key] - found[1][key] for key in keys]
        # other rows, few of them: single weights differ by a decibel or two, their median does not.
        # Without the weight's own noise forward and dgrad would be 3 dB higher.
        # not. Without the weight's own noise forward and dgrad would be 3 dB better.
        assert max(map(abs, differences)) < 4, product
        assert abs(median(differences)) < 0.7, product
