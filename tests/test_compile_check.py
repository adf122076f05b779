"""kernels/compile_check.py: real compilation for sm_90a in other processes; of kernels/bench.py what needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from interpreter import GATES, shim
from kernels import bench, compile_check

shim()
ROOT = Path(__file__).resolve().parent.parent
FINE = dict(regs=100, spills=0, smem=1000, wgmma=4, mma=0, tma=0)

# Kernels whose machine code is known beforehand: a product of 64 rows, of 16, none, one that has too few registers.
KNOWN = """
import sys, torch, triton, triton.language as tl
from kernels import compile_check as C
@triton.jit
def product(X, Y, Z, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    k = tl.arange(0, N)[:, None]
    tl.store(Z + m * N + n, tl.dot(tl.load(X + m * N + n), tl.load(Y + k * N + n)))
@triton.jit
def total(X, Y, N: tl.constexpr):
    tl.store(Y, tl.sum(tl.load(X + tl.arange(0, N)), 0))
triton.runtime.driver.set_active(C.PaperDriver())
x, z = (torch.empty(64, 64, dtype=d, device="meta") for d in (torch.bfloat16, torch.float32))
for M in (64, 16):
    print(C.resources(product.warmup(x, x, z, M, 64, grid=(1,), num_warps=4)))
print(C.resources(total.warmup(z, z, 1024, grid=(1,), num_warps=4)))
print(C.resources(product.warmup(z, z, z, 64, 64, grid=(1,), num_warps=1, maxnreg=64)))
C.SHARED_MEMORY = -1
sys.exit(C.main(["logprob"]))
"""


def run(*command, **env):
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=clean | env)


def test_known_kernels_and_exit_code_of_a_violation(tmp_path):
    (tmp_path / "known.py").write_text(KNOWN)  # triton.jit reads the source file
    done = run(tmp_path / "known.py", PYTHONPATH=str(ROOT))
    wgmma, mma, none, spilling = (eval(line) for line in done.stdout.splitlines()[:4])
    assert wgmma["wgmma"] > 0 and wgmma["mma"] == 0 and wgmma["smem"] >= 2 * 64 * 64 * 2  # both factors, bf16
    assert mma["wgmma"] == 0 and mma["mma"] > 0
    assert none["wgmma"] == none["mma"] == none["spills"] == 0 and none["regs"] < 64 and none["smem"] <= 64
    assert spilling["regs"] <= 64 and spilling["spills"] > 0  # 128 sums a thread that may have 64 registers
    assert done.returncode == 1 and done.stdout.count("violation: ") == 4, done.stderr


def test_each_kernel_compiles_within_the_rules():
    done = run("-m", "kernels.compile_check", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 with violations" in done.stdout


def test_results_are_those_of_these_sources():
    """Compiling all configurations takes minutes: RESULTS.md holds what came out, and hashes of what was compiled."""
    text = compile_check.RESULTS.read_text()
    assert compile_check.sources() in text, "kernels changed: run python -m kernels.compile_check --write"
    assert " 0 with violations" in text and "violation: " not in text
    for file in compile_check.FILES:
        for name, *_, allowed in __import__(f"kernels.{file}", fromlist=["configs"]).configs():
            row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
            found = dict(zip(compile_check.COLUMNS, map(int, row.split("|")[2:8])))
            assert compile_check.violations(found, allowed) == [], row


@pytest.mark.parametrize("change, allowed, words", [
    (dict(), {}, None), (dict(spills=1), {}, "1 spills"), (dict(spills=9), dict(spills=9), None),
    (dict(smem=232449), {}, "232449 bytes"), (dict(smem=232448), {}, None), (dict(wgmma=0), {}, "no tensor cores"),
    (dict(mma=3), {}, "slow"), (dict(wgmma=0, mma=3), dict(hmma=True), None),
    (dict(wgmma=0), dict(hmma=True), "no tensor"),
    (dict(wgmma=0), dict(tensor_cores=False), None), (dict(), dict(spils=1), "unknown allowance spils")], ids=str)
def test_rules(change, allowed, words):
    found = compile_check.violations(FINE | change, allowed)
    assert not found if words is None else len(found) == 1 and words in found[0]


def test_mistakes_end_with_a_hint():
    with pytest.raises(SystemExit, match="TRITON_INTERPRET is set"):
        next(compile_check.check())
    with pytest.raises(SystemExit, match="no kernels in nroms: choose from attention"):
        compile_check.main(["nroms"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_says_that_it_needs_a_gpu():
    with pytest.raises(SystemExit, match="finds none"):
        bench.main([])


def test_every_provider_of_the_bench_computes_the_same(capsys):
    """The whole table at toy size in the interpreter: times mean nothing, errors are those of bf16."""
    rows = list(bench.table("cpu", bench.SMALL, rounds=1, top=(1e12, 1e12)))
    assert len({case for case, _, _ in rows}) == 11 and all(error < GATES[torch.bfloat16] for *_, error in rows), rows
    assert capsys.readouterr().out.count("\n| ") == len(rows) + 1
