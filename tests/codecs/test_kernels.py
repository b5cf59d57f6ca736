"""The native kernels against the torch reference and float64: instruction sets, codes, ragged edges."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from surgery.codecs import compile as build
from surgery.codecs import native, ops, reference
from surgery.codecs.ops import Operand
from surgery.errors import SurgeryError, UsageError

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPES = [(1, 1), (1, 300), (129, 127), (256, 256), (300, 130)]
SETS = ("portable", "avx2", "avx512")
kernels = pytest.mark.skipif(
    native.cpu().library is None, reason=f"no kernels: {native.cpu().reason or 'off'}"
)


@pytest.fixture(params=SETS)
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have the library use one instruction set, where this processor has it."""
    best = native.cpu().path.removeprefix("cpu ")
    if best not in SETS or SETS.index(request.param) > SETS.index(best):
        pytest.skip(f"this processor has no {request.param}")
    library = native.cpu().library
    chosen = ctypes.addressof(ctypes.c_char.in_dll(library, f"surgery_loops_{request.param}"))

    class Pinned:
        def surgery_cpu_decode(self, _: None, *rest: object) -> int:
            return int(library.surgery_cpu_decode(chosen, *rest))

        def surgery_cpu_combine(self, _: None, *rest: object) -> int:
            return int(library.surgery_cpu_combine(chosen, *rest))

    monkeypatch.setattr(ops, "library_for", lambda _: native.Native(Pinned(), "pinned"))
    return str(request.param)


def same(left: torch.Tensor, right: torch.Tensor) -> None:
    assert left.dtype == right.dtype and left.shape == right.shape
    if left.is_floating_point():
        assert torch.equal(left.isnan(), right.isnan())
        whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
        left, right = (each.nan_to_num(0.0).view(whole) for each in (left, right))
    assert torch.equal(left, right)


def operands(shape: tuple[int, int], magnitude: float) -> list[Operand]:
    values = [torch.randn(shape) * magnitude for _ in range(3)]
    values[0].view(-1)[0] = -0.0
    fp8 = Operand(*reference.encode_fp8_block(values[0], ue8m0=False))
    return [fp8, Operand(values[1].bfloat16()), Operand(values[2])]


@kernels
@pytest.mark.parametrize("scale", [1.0, 0.1, 2.0**-120, 3e-42, 1e35])
def test_every_code_decodes_as_the_reference_does(loops: str, scale: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    scales = torch.full((1, 2), scale)
    for dtype in (torch.float32, torch.bfloat16):
        same(ops.decode_fp8_block(codes, scales, dtype), reference.decode_fp8_block(codes, scales, dtype))


@kernels
@pytest.mark.parametrize("factor", [1.0, 1e-3, 7.7, 1e-30, 1e-44])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_every_bf16_value_encodes_as_the_reference_does(loops: str, factor: float, ue8m0: bool) -> None:
    """NaN and infinities among them: the scale is the finite values', NaN is 0x7F."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(512, 128)
    found = ops.encode_fp8_block(every.float() * factor, ue8m0=ue8m0)
    want = reference.encode_fp8_block(every.float() * factor, ue8m0=ue8m0)
    same(found[0], want[0])
    same(found[1], want[1])


@kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 1e-20, 1e-42, 1e30])
def test_weighted_sums_are_the_references(loops: str, shape: tuple[int, int], magnitude: float) -> None:
    parents = operands(shape, magnitude)
    for dtype in (torch.uint8, torch.bfloat16, torch.float32):
        for weights in ((0.5, 0.3, 0.2), (0.0, 0.7, 0.3), (0.0, 0.0, 1.0)):
            found, sums = ops.assemble(parents, weights, dtype, squares=True, ue8m0=False)
            want, wanted = ops._assemble_by_reference(parents, weights, dtype, True, False)
            same(found.values, want.values)
            if found.scales is not None and want.scales is not None:
                same(found.scales, want.scales)
            assert sums is not None and wanted is not None
            same(sums, wanted)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e18])
def test_sums_of_squares_are_those_of_float64(shape: tuple[int, int], magnitude: float) -> None:
    base, other = (torch.randn(shape) * magnitude for _ in range(2))
    found = ops.block_squares(base, [other]).sum(0)
    want = torch.stack([base.double().square().sum(), (base - other).double().square().sum()])
    torch.testing.assert_close(found, want, rtol=1e-13, atol=0.0)


@kernels
def test_threads_do_not_change_a_bit() -> None:
    parents = operands((700, 650), 0.02)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 64):
            torch.set_num_threads(threads)
            found.append(ops.assemble(parents, (0.2, 0.3, 0.5), torch.uint8, squares=True, ue8m0=False))
    finally:
        torch.set_num_threads(before)
    for result, sums in found[1:]:
        same(result.values, found[0][0].values)
        assert sums is not None and found[0][1] is not None
        same(sums, found[0][1])


def test_operands_that_do_not_fit_are_refused() -> None:
    codes, scales = torch.zeros(130, 128, dtype=torch.uint8), torch.ones(2, 1)
    for bad in (torch.ones(1, 1), torch.ones(2, 1, dtype=torch.float64), torch.ones(4, 1)[::2]):
        with pytest.raises(UsageError):
            ops.decode_fp8_block(codes, bad, torch.float32)
    with pytest.raises(UsageError):
        ops.decode_fp8_block(codes, scales, torch.float64)
    with pytest.raises(UsageError):
        ops.decode_fp8_block(codes.T, scales.T, torch.float32)


def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_KERNELS", "fast")
    with pytest.raises(UsageError, match="fast"):
        native.cpu()


def test_a_failing_compiler_is_one_line_and_the_reference(tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1 && exit 0\necho no such luck >&2\nexit 3\n'
    )
    broken.chmod(0o755)
    script = "from surgery.codecs.native import cpu; n = cpu(); print(n.path, '|', n.reason)"
    settings = {
        **os.environ,
        "CXX": str(broken),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "SURGERY_KERNELS": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=settings, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("reference | no CPU kernels:") and "no such luck" in done.stdout
    assert not list((tmp_path / "cache" / "llm-surgery" / "kernels").iterdir())


@pytest.mark.skipif(build.shutil.which("nvcc") is None, reason="no nvcc")
def test_cuda_kernels_compile_and_load_without_a_device() -> None:
    library = ctypes.CDLL(str(build.cuda_library(("90a",))))
    assert library.surgery_cuda_combine and library.surgery_cuda_decode
    with pytest.raises(SurgeryError, match="nvcc"):
        build.cuda_library(("1",))
