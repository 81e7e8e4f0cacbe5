"""The Triton row kernels in Triton's interpreter, against the plain PyTorch rows; and that a GPU compiler takes them.

Triton decides when it is imported whether it interprets, and other tests may have imported it: so one test runs this
file again in a process of its own, and the tests of that process are defined there only.
"""
from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from frpo.kernels import ReferenceHead, chunks, linear_logprobs, linear_token_loss, rows
from frpo.kernels.chunks import ChunkedLogits
from frpo.kernels.reference import naive_stats, naive_token_loss
from frpo.kernels.rows import ReferenceLogits
from frpo.kernels.stats import LogitScale, slope

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
C, V = 5, 37
SCALES = [LogitScale(), LogitScale(temperature=0.7), LogitScale(temperature=1.3, softcap=2.5)]


def run_alone(*arguments: str, **environment: str) -> None:
    process = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stdout + process.stderr


if INTERPRETED:
    from frpo.kernels import triton_rows

    BLOCK = triton_rows._BLOCK

    @pytest.fixture(autouse=True)
    def small_blocks(monkeypatch):
        """Three blocks of columns, the last of them not full."""
        monkeypatch.setattr(triton_rows, "_BLOCK", 16)

    def logits(dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        z_CV, u_CV = (3 * torch.randn(C, V, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
        u_CV[:2] = z_CV[:2] + 0.1 * u_CV[:2]
        return z_CV, u_CV, torch.randint(V, (C,), generator=generator)

    def fields(stats):
        values = {f.name: getattr(stats, f.name) for f in dataclasses.fields(stats)}
        return {name: value for name, value in values.items() if value is not None}

    def assert_same(given, expected, **tolerance):
        given, expected = fields(given), fields(expected)
        assert given.keys() == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(given[name], values, **tolerance)

    @pytest.mark.parametrize("paired", [False, True])
    @pytest.mark.parametrize("dtype, scale, tolerance", [
        *((torch.float64, scale, 1e-13) for scale in SCALES), (torch.float32, SCALES[2], 3e-6)])
    def test_statistics_and_gradients_are_those_of_the_plain_rows(dtype, tolerance, scale, paired):
        z_CV, u_CV, target_C = logits(dtype)
        u_scale = dataclasses.replace(scale, softcap=3.0)
        reference = ReferenceLogits(u_CB=u_CV, scale=u_scale) if paired else None
        expected = rows.statistics(z_CV, target_C, scale, reference)
        assert_same(triton_rows.statistics(z_CV, target_C, scale, reference), expected, rtol=tolerance, atol=tolerance)
        derivatives_KC = torch.randn(4 if paired else 2, C, dtype=dtype)
        derivatives_KC[:, 3] = 0
        singles = torch.eye(len(derivatives_KC), dtype=torch.bool).tolist()
        for chosen in (*singles, [True] * len(singles), [False] * len(singles)):
            given_slope = slope(expected, *(d_C if use else None for d_C, use in zip(derivatives_KC, chosen)))
            for columns in (slice(0, V), slice(11, 30)):
                dz_CB = []
                for module in (rows, triton_rows):
                    u = ReferenceLogits(u_CB=u_CV[:, columns].clone(), scale=u_scale) if paired else None
                    dz_CB.append(module.gradient_(z_CV[:, columns].contiguous(), columns.start, target_C, expected,
                                                  given_slope, scale, u, dtype=dtype))
                torch.testing.assert_close(*dz_CB, rtol=tolerance, atol=tolerance)
                assert not dz_CB[1][3].any() and dz_CB[1].any() == any(chosen)

    def test_the_gradient_may_be_written_as_bfloat16():
        z_CV, _, target_C = logits(torch.float32)
        stats = rows.statistics(z_CV, target_C, SCALES[0], None)
        given_slope = slope(stats, torch.ones(C))
        wide, narrow = (
            triton_rows.gradient_(z_CV.clone(), 0, target_C, stats, given_slope, SCALES[0], None, dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16))
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow.float(), wide, rtol=2.0**-7, atol=0)  # the interpreter truncates

    @pytest.mark.parametrize("vocabulary", [128_256, 152_064])
    def test_a_vocabulary_of_a_large_model_in_blocks_as_on_a_gpu(monkeypatch, vocabulary):
        monkeypatch.setattr(triton_rows, "_BLOCK", BLOCK)
        generator = torch.Generator().manual_seed(0)
        z_CV = 3 * torch.randn(3, vocabulary, generator=generator)
        target_C = torch.tensor([0, vocabulary - 1, 70_000])
        expected = rows.statistics(z_CV, target_C, SCALES[0], None)
        stats = triton_rows.statistics(z_CV, target_C, SCALES[0], None)
        assert_same(stats, expected, rtol=2e-6, atol=5e-6)
        given_slope = slope(expected, torch.tensor([1.0, 0.0, -2.0]))
        dz_CV = [module.gradient_(z_CV.clone(), 0, target_C, expected, given_slope, SCALES[0], None,
                                  dtype=torch.float32) for module in (rows, triton_rows)]
        torch.testing.assert_close(*dz_CV, rtol=1e-5, atol=1e-6)
        assert not dz_CV[1][1].any()

    def test_ties_go_to_the_lowest_index_across_blocks():
        z_CV, u_CV, target_C = logits()
        z_CV[:, [5, 9, 20, 36]] = 50.0
        u_CV[:, [18, 33]] = 50.0
        stats = triton_rows.statistics(z_CV, target_C, SCALES[0], ReferenceLogits(u_CB=u_CV, scale=SCALES[0]))
        assert set(stats.z_argmax_N.tolist()) == {5} and set(stats.u_argmax_N.tolist()) == {18}

    def test_extreme_logits_and_dead_rows_of_nan():
        z_CV, u_CV, target_C = logits(torch.float32)
        z_CV[0, 20], z_CV[1, :], u_CV[1, 30], z_CV[2, 0] = 1e4, -1e4, 1e4, -1e4
        z_CV[3], u_CV[4] = torch.nan, torch.inf
        reference = ReferenceLogits(u_CB=u_CV, scale=SCALES[0])
        stats = triton_rows.statistics(z_CV, target_C, SCALES[0], reference)
        for name, values_C in fields(stats).items():
            torch.testing.assert_close(values_C[:3], fields(rows.statistics(
                z_CV, target_C, SCALES[0], reference))[name][:3], rtol=1e-6, atol=1e-5)
        assert stats.kl_N[3].isnan() and stats.logprobs_N[3].isnan() and stats.kl_N[4].isnan()
        live_C = torch.tensor([1.0, 1, 1, 0, 0])
        dz_CV = triton_rows.gradient_(z_CV, 0, target_C, stats, slope(stats, live_C, live_C, live_C, live_C), SCALES[0],
                                      reference, dtype=torch.float32)
        assert dz_CV.isfinite().all() and dz_CV[:3].any(1).all() and not dz_CV[3:].any()

    def test_a_target_outside_the_vocabulary_is_nan():
        z_CV, _, _ = logits()
        target_C = torch.tensor([0, -100, V, V - 1, 3])
        finite = triton_rows.statistics(z_CV, target_C, SCALES[0], None).logprobs_N.isfinite()
        assert finite.tolist() == [True, False, False, True, True]

    @pytest.mark.parametrize("scale", [{}, {"temperature": 0.7, "softcap": 2.5}], ids=str)
    def test_whole_losses_run_on_them(scale, monkeypatch):
        monkeypatch.setattr(ChunkedLogits, "row_ops", triton_rows)
        monkeypatch.setattr(chunks, "_MIN_COLUMNS", 5)
        generator = torch.Generator().manual_seed(1)
        hidden_ND, head_VD = (torch.randn(n, 4, generator=generator).double().requires_grad_() for n in (7, V))
        target_N = torch.arange(7)
        reference = ReferenceHead(hidden_NE=hidden_ND.detach() + 0.2, head_VE=head_VD.detach() ** 2)

        def loss(stats, where):
            return (stats.logprobs_N * stats.entropy_N + stats.kl_N.sin() * stats.margin_N).sum()

        def gradients(value):
            hidden_ND.grad = head_VD.grad = None
            value.backward()
            return value.detach(), hidden_ND.grad, head_VD.grad

        operands = (hidden_ND, head_VD, target_N)
        stats = naive_stats(*operands, **scale)
        for given, expected in (
            (linear_token_loss(*operands, loss, reference=reference, chunk_rows=3, **scale),
             naive_token_loss(*operands, loss, reference=reference, **scale)),
            (torch.mul(*linear_logprobs(*operands, chunk_rows=3, **scale)).sum(),
             (stats.logprobs_N * stats.entropy_N).sum()),
        ):
            for one, other in zip(gradients(given), gradients(expected), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

else:
    def test_the_kernels_in_the_interpreter():
        run_alone("-m", "pytest", str(Path(__file__)), "-W", "ignore::RuntimeWarning", TRITON_INTERPRET="1")

    def test_a_cpu_never_loads_triton_kernels():
        run_alone("-c", """
import sys, torch
from frpo.kernels import linear_token_loss
h, w = torch.ones(2, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
linear_token_loss(h, w, torch.tensor([0, 1]), lambda stats, rows: stats.entropy_N.sum()).backward()
assert "frpo.kernels.triton_rows" not in sys.modules""")

    def test_a_gpu_compiler_takes_the_kernels():
        """For the H100's architecture, without one: types and layouts that the interpreter does not check."""
        run_alone("-c", """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from frpo.kernels import triton_rows

def compiled(kernel, pointers, **constants):
    types = {name: pointers.get(name, "*fp32") if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    positions = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=positions)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": triton_rows._WARPS})

integers = {name: "*i64" for name in ("target_ptr", "argmax_ptr", "aligned_ptr", "own_ptr")} | {"live_ptr": "*i8"}
sizes = {"BLOCK": triton_rows._BLOCK, "T": 0.7, "CAP": 30.0}
compiled(triton_rows._single_kernel, integers, **sizes)
compiled(triton_rows._pair_kernel, integers, **sizes, U_CAP=None)
compiled(triton_rows._gradient_kernel, integers | {"dz_ptr": "*bf16"}, **sizes, U_CAP=None)
absent = ("z_slope_ptr", "u_ptr", "u_max_ptr", "u_slope_ptr", "margin_slope_ptr", "aligned_ptr", "own_ptr")
compiled(triton_rows._gradient_kernel, integers, **sizes | {"CAP": None}, U_CAP=None, **dict.fromkeys(absent))
""", TRITON_INTERPRET="0")
