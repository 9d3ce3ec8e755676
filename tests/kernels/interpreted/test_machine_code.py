"""Every Triton kernel, compiled for GPUs that are not present: it fits, and uses the expected
instructions."""

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
from triton.runtime.cache import get_cache_manager

from kernels.gemm.gemm_fp8_gluon import gemm as gluon_gemm
from kernels.gemm.gemm_fp8_triton import TILES, gemm
from kernels.mlp.swiglu_fp8_triton import backward as backward_to_fp8
from kernels.paged_attention.batch import PagedBatch
from kernels.paged_attention.paged_attention_triton import attend
from kernels.quantization.quantize_triton import quantize_groups
from scripts.kernel_table import offline as tools
from scripts.kernel_table.__main__ import cases
from scripts.kernel_table.case import TARGETS, TENSOR_CORES, Case, build, fp8_of
from scripts.kernel_table.offline import SHARED_BYTES, Build, offline

REGISTERS = {"sm_90": 255, "sm_100": 255, "gfx942": 512, "gfx950": 512}
"""Registers per thread; on AMD the sum of vector and accumulation registers."""


@pytest.fixture(autouse=True, scope="module")
def code_is_read_once() -> Iterator[None]:
    """Keep what the tools print about a kernel where Triton keeps the kernel: a reading takes
    0.5 s. The tools are part of Triton, so its version is part of the key."""
    shipped = tools._tool

    def tool(name: str, *options: str, content: bytes) -> str:
        given = repr((triton.__version__, name, options)).encode() + content
        kept = get_cache_manager(hashlib.sha256(given).hexdigest())
        if found := kept.get_file("printed"):
            return Path(found).read_text()
        printed = shipped(name, *options, content=content)
        kept.put(printed, "printed", binary=False)
        return printed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools, "_tool", tool)
        yield


def assert_sound(
    made: Build, target: str, multiplies: bool, cores: str = "fp8", descriptors: bool = True
) -> None:
    assert made.spilled == 0, made
    assert 0 < made.registers <= REGISTERS[target], made
    assert made.shared <= SHARED_BYTES[TARGETS[target][1]], made
    if multiplies:
        assert made.instructions.get(TENSOR_CORES[cores][target], 0) > 0, made
        copied = target.startswith("gfx") or made.instructions.get("UTMALDG", 0) > 0
        assert copied or not descriptors, made


def some() -> Iterator[tuple[Case, str]]:
    """The cases of the default run, each for one of its targets: they alternate between NVIDIA and
    AMD, and among the targets of each, for every kind of product on its own."""
    seen = Counter[str]()
    for case in cases():
        if not case.everyday:
            continue
        kind = case.cores if case.multiplies else ""
        makers = [[t for t in case.targets if t.startswith(m)] for m in ("sm", "gfx")]
        made = [targets for targets in makers if targets]
        targets = made[seen[kind] % len(made)]
        yield case, targets[seen[kind] // 2 % len(targets)]
        seen[kind] += 1


@pytest.mark.parametrize(("case", "target"), [pytest.param(*s, id=s[0].name) for s in some()])
def test_every_kernel(case: Case, target: str) -> None:
    assert_sound(build(case, target), target, case.multiplies, case.cores, case.descriptors)


def test_some_are_enough() -> None:
    """Every kind of product is compiled for both vendors, and every target has some of each."""
    seen = {(case.cores, target) for case, target in some() if case.multiplies}
    assert seen == {(cores, target) for cores in TENSOR_CORES for target in TARGETS}
    assert {target for _, target in some()} == set(TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_and_type(target: str) -> None:
    """The full table."""
    for case in cases():
        if target in case.targets:
            assert_sound(build(case, target), target, case.multiplies, case.cores, case.descriptors)


def test_gluon_warps_specialise() -> None:
    """Two warp groups that multiply and a loader, each with own registers, code and barriers."""
    (case,) = (case for case in cases() if case.name == "gemm_fp8_nt Gluon 256x128 bf16")
    made = build(case, "sm_90")
    # 128 of K in steps of 32, for two waves of each group
    assert made.instructions["QGMMA"] == 2 * 2 * 4
    assert made.instructions["UTMALDG"] == 4  # the loader's copies of a, b and their scales
    assert re.search(r"warp_specialize.*partition0\(.*partition1\(", made.kernel.asm["ttgir"], re.S)
    ptx = made.kernel.asm["ptx"]
    given = set(re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx))
    assert {"240", "24"} <= given
    # before a group releases a slot, its warps wait for their products and for each other
    releases = re.findall(
        r"wgmma\.wait_group\.sync\.aligned 0;(.*?)mbarrier\.arrive\.shared::cta\.b64", ptx, re.S
    )
    releases = [between.rsplit("wgmma.wait_group", 1)[-1] for between in releases]
    assert len(releases) == 2 and all("wgmma" not in between for between in releases)
    groups = [re.findall(r"bar(?:rier)?\.sync\s+(\d+), 128;", between) for between in releases]
    assert [len(barriers) for barriers in groups] == [1, 1] and groups[0] != groups[1]


@pytest.mark.parametrize("layout", ["nt", "tn"])
def test_gluon_with_sizes_of_one(layout: str) -> None:
    """Triton compiles integers equal to 1 into the code as constants, which the partitions must
    support."""
    data, scales = torch.empty(1, 1, dtype=torch.float8_e4m3fn), torch.empty(1, 1)
    wide = torch.empty(300, 1, dtype=torch.float8_e4m3fn)
    scales_b = torch.empty(3, 1) if layout == "nt" else torch.empty(1, 300).T
    with offline("cuda", 90) as builds:
        gluon_gemm(data, scales, data, scales, torch.empty(1, 1))
        gluon_gemm(data, scales, wide, scales_b, torch.empty(1, 300))
    for made in builds:
        assert_sound(made, "sm_90", True)


@pytest.mark.parametrize("grouped", [False, True])
def test_swiglu_of_one_row(grouped: bool) -> None:
    """Also a number of rows that Triton compiles into the code."""
    ends = torch.ones(1, dtype=torch.int64) if grouped else None
    for rows in (1, 16, 37):
        h, x = (torch.empty(rows, size, dtype=torch.bfloat16) for size in (128, 256))
        with offline("cuda", 90) as builds:
            backward_to_fp8(
                h, x, torch.empty(rows), "swiglu", fp8_of("sm_90"), False, ends, ends, None
            )
        assert builds[0].spilled == 0


def test_a_spill_is_seen() -> None:
    """Tests the check itself: two accumulators of 128x128 do not fit into 4 warps."""
    a, scales = torch.empty(1024, 1024, dtype=torch.float8_e4m3fn), torch.empty(8, 1024).T
    few_warps = dataclasses.replace(TILES[0], warps=4)
    with offline("cuda", 90) as builds:
        gemm(a, scales, a, torch.empty(8, 8), torch.empty(1024, 1024), tile=few_warps)
    assert builds[0].spilled > 0


def test_sm_80_has_no_fp8() -> None:
    """Triton also refuses the targets that `kernels.quantization.quantize.fp8_dtype` refuses with
    an error message."""
    with pytest.raises(Exception, match="fp8e4nv not supported"), offline("cuda", 80):
        quantize_groups(torch.empty(128, 128), fp8_of("sm_80"), False, True, False)


def test_attention_over_pages_is_compiled_once() -> None:
    """One kernel for decodes and one for chunks, for any requests, rows and widths of the table."""
    keys = torch.empty(9, 4, 64, 16, dtype=torch.bfloat16)
    with offline("cuda", 90) as builds:
        for B, P, n_decodes, T in ((8, 256, 8, 8), (1, 1, 1, 1), (16, 64, 0, 99), (5, 99, 1, 60)):
            integers = torch.zeros(B + 1, dtype=torch.int32)
            tables = torch.zeros(B, P, dtype=torch.int32)
            batch = PagedBatch(tables, integers, integers[:-1], n_decodes)
            q = torch.empty(T, 32, 64, dtype=torch.bfloat16)
            attend(q, keys, keys.transpose(2, 3), batch, 0.1, 0, 0, None)
    assert sorted(made.name for made in builds) == ["attend", "attend", "combine"]
