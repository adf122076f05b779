"""Compile every shipped configuration for an H100/H200 (sm_90a) on a computer without a GPU, and read what came out.

    python -m kernels.compile_check                  all files: minutes, and a second time seconds, from Triton's cache
    python -m kernels.compile_check decode norms     these files
    python -m kernels.compile_check --quick          the first configuration of each kernel
    python -m kernels.compile_check --write          all files, and the table in RESULTS.md with a hash of each source

Triton compiles for the device of its active driver. Here that is a stand-in that says "compute capability 9.0" and has
no memory: `warmup` with tensors on "meta" then makes the machine code that a launch would, and the tools in Triton's
own wheel (cuobjdump, nvdisasm) count in it. No CUDA toolkit is needed. Columns and what is demanded of them:

    regs    registers a thread, 255 at most          spills  STL: registers written to memory for lack of room: 0
    smem    bytes of shared memory a program: at most 232,448, what a program may have (Triton does not look)
    wgmma   HGMMA, Hopper's tensor-core products: present where there are products
    mma     HMMA, the older and slower ones: absent       tma     UTMALDG, loads by the copy engine: for reading

An allowance stands beside its configuration, in `configs()` of the kernel's file: spills=n, hmma=True (mma may stand in
for wgmma), tensor_cores=False (no products, or fp32 ones, which tensor cores cannot do exactly). Exit code 1 on a
violation. Registers and instructions here are facts; speed is not: that needs `python -m kernels.bench` and a GPU.
"""
import hashlib
import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

FILES = "attention", "vision", "decode", "logprob", "norms"
SHARED_MEMORY = 232_448  # bytes: 227 KiB
COLUMNS = "regs", "spills", "smem", "wgmma", "mma", "tma"
RESULTS = Path(__file__).with_name("RESULTS.md")


class PaperDriver:
    """What Triton asks its driver while it compiles, answered for a Hopper GPU."""
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_active_torch_device = staticmethod(lambda: torch.device("meta"))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    set_current_device = staticmethod(lambda device: None)


def resources(compiled) -> dict:
    """Of a compiled kernel -> one number for each of COLUMNS."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (subprocess.run([tools / tool, option, file.name], capture_output=True, text=True,
                                      check=True).stdout
                       for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c")))
    count = {name: len(re.findall(rf"\b{word}\b", code))
             for name, word in (("spills", "STL"), ("wgmma", "HGMMA"), ("mma", "HMMA"), ("tma", r"UTMALDG"))}
    return dict(regs=int(re.search(r"REG:(\d+)", usage)[1]), smem=compiled.metadata.shared, **count)


def violations(found: dict, allowed: dict) -> list[str]:
    """What breaks the rules of the docstring, in words."""
    unknown = set(allowed) - {"spills", "hmma", "tensor_cores"}
    products = allowed.get("tensor_cores", True)
    return [words for wrong, words in (
        (unknown, f"unknown allowance {', '.join(sorted(unknown))}"),
        (found["spills"] > allowed.get("spills", 0), f"{found['spills']} spills, {allowed.get('spills', 0)} allowed"),
        (found["smem"] > SHARED_MEMORY, f"{found['smem']} bytes of shared memory, a program has {SHARED_MEMORY}"),
        (products and not found["wgmma"] and not (allowed.get("hmma") and found["mma"]), "no tensor cores"),
        (products and found["mma"] and not allowed.get("hmma"), f"{found['mma']} slow tensor-core instructions (HMMA)"),
    ) if wrong]


def check(files=FILES, quick=False):
    """Compile the configurations of these files -> (name, resources, violations, allowances); quick: one a kernel."""
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: a process that interprets kernels cannot compile them; unset it")
    triton.runtime.driver.set_active(PaperDriver())
    done = set()
    for file in files:
        for name, kernel, args, options, allowed in importlib.import_module(f"kernels.{file}").configs():
            if quick and kernel in done:
                continue
            done.add(kernel)
            found = resources(kernel.warmup(*args, grid=(1,), **options))
            yield name, found, violations(found, allowed), allowed


def sources() -> str:
    """A line that changes when a kernel file does."""
    digest = lambda file: hashlib.sha256(RESULTS.with_name(f"{file}.py").read_bytes()).hexdigest()[:12]
    return "Sources: " + ", ".join(f"{file}.py {digest(file)}" for file in FILES)


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    write, quick, files = argv == ["--write"], argv == ["--quick"], [a for a in argv if a[:2] != "--"] or FILES
    if unknown := set(files) - set(FILES):
        sys.exit(f"no kernels in {', '.join(sorted(unknown))}: choose from {', '.join(FILES)}")
    lines = [f"sm_90a, triton {triton.__version__}, torch {torch.__version__}", "",
             f"| configuration | {' | '.join(COLUMNS)} | allowed |", "|---" + "|---:" * len(COLUMNS) + "|---|"]
    failed = 0
    print(*lines, sep="\n")
    for name, found, wrong, allowed in check(files, quick):
        note = "".join(f" **violation: {w}**" for w in wrong) or " " + ", ".join(f"{k}={v}" for k, v in allowed.items())
        lines.append(f"| {name} | " + " | ".join(f"{found[c]}" for c in COLUMNS) + f" |{note} |")
        print(lines[-1], flush=True)
        failed += bool(wrong)
    lines += ["", f"{len(lines) - 4} configurations, {failed} with violations. {sources()}."]
    print(*lines[-2:], sep="\n")
    if write:
        before, after = re.split(r"(?s)(?<=<!-- compile -->\n).*(?=<!-- /compile -->)", RESULTS.read_text())
        RESULTS.write_text(before + "\n".join(lines) + "\n" + after)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
