"""What will run on this machine, and what is missing: python -m nanopatho.doctor [--out runs]

Every line is "ok", "note" (something is slower or left out) or "missing" (training will not run; with what to do). Exit code
1 if anything is missing. Two processes are started that add two numbers over gloo, as torchrun's would. Nothing is
installed, written or left behind.
"""
import argparse
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import shutil
import socket
import sys
from pathlib import Path

NEEDED = {name: name for name in ("torch", "numpy", "tokenizers", "safetensors", "tqdm", "einops")} | {"PIL": "pillow"}
EXTRAS = {"huggingface_hub": ("huggingface-hub", "fetching published weights"), "pytest": ("pytest", "make test"),
          "transformers": ("transformers", "weights compare, parity tests: extra parity"),
          "pyarrow": ("pyarrow", "reading parquet: extra data"), "pypdfium2": ("pypdfium2", "reading books: extra data"),
          "lxml": ("lxml", "reading articles: extra data"),
          "tensorboard": ("tensorboard", "--log tensorboard: extra log"), "wandb": ("wandb", "--log wandb: extra log")}
GB = 1e9


def check_packages():
    """-> [(state, text)] for Python and packages; nothing heavy is imported."""
    version = platform.python_version()
    found = [("ok" if sys.version_info >= (3, 11) else "missing", f"Python {version}, 3.11 or newer is needed")]
    for module, name in NEEDED.items():
        there = importlib.util.find_spec(module)
        found.append(("ok", f"{name} {importlib.metadata.version(name)}") if there else
                     ("missing", f"{name}: pip install {name}"))
    for module, (name, purpose) in EXTRAS.items():
        if not importlib.util.find_spec(module):
            found.append(("note", f"{name} is not installed: no {purpose}"))
    return found


def check_torch():
    """-> [(state, text)] for torch, GPUs, bf16 and kernels."""
    import torch
    release = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2])
    found = [("ok" if release >= (2, 6) else "missing", f"torch {torch.__version__}, 2.6 or newer is needed")]
    if release < (2, 9):
        found.append(("note", "--optimizer muon, which the presets tiny and small use, needs torch 2.9: give --optimizer adamw"))
    if not torch.cuda.is_available():
        built = torch.version.cuda and f"torch is built for CUDA {torch.version.cuda}, but sees no GPU (driver? nvidia-smi)"
        found.append(("note", f"no GPU: {built or 'torch is built without CUDA'}. Presets smoke and tiny run on the CPU"))
        return found
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        found.append(("ok", f"GPU {i}: {card.name}, {card.total_memory / GB:.0f} GB, capability {card.major}.{card.minor}"))
        if card.major < 8:
            found.append(("note", f"GPU {i}: no bf16 units below capability 8.0: emulated, and slow"))
        if card.major != 9:
            found.append(("note", f"GPU {i}: kernels/ is made for capability 9 (H100, H200); PyTorch's own are used"))
    if not importlib.util.find_spec("triton"):
        found.append(("note", "triton is not installed: no kernels/, PyTorch's own are used"))
    if not torch.distributed.is_nccl_available():
        found.append(("missing", "this torch has no NCCL: several GPUs cannot work together"))
    return found


def check_places(out="."):
    """-> [(state, text)] for disk, shared memory and open files."""
    place = Path(out).absolute()
    while not place.exists():
        place = place.parent
    free, writable = shutil.disk_usage(place).free, os.access(place, os.W_OK)
    found = [("ok" if writable else "missing", f"{place}: {free / GB:.0f} GB free" + ("" if writable else ", but not writable"))]
    if free < 230 * GB:                                              # two checkpoints of 12 bytes a parameter, and weights
        found.append(("note", f"{place}: 7B checkpoints take 100 GB each, two at once while saving; 3B 45, tiny 0.03"))
    if Path("/dev/shm").is_dir() and (shared := shutil.disk_usage("/dev/shm").free) < 2 * GB:
        found.append(("note", f"/dev/shm: {shared / GB:.2f} GB. Decoding workers hand pictures over there, about 0.2 GB each at "
                      "full size; in a container: docker run --shm-size=8g"))
    return found


def join(rank, port, results):
    """One of two processes: add 1 and 2 over gloo."""
    import torch
    import torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x = torch.tensor([rank + 1.0])
    dist.all_reduce(x)
    results.put(x.item())
    dist.destroy_process_group()


def check_processes(seconds=60):
    """-> [(state, text)]: can two processes of this machine meet and add numbers?"""
    kind = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    results = kind.Queue()
    both = [kind.Process(target=join, args=(rank, port, results)) for rank in range(2)]
    for p in both:
        p.start()
    for p in both:
        p.join(seconds)
        if p.exitcode is None:
            p.kill()
            p.join()                                                 # so that nothing is left behind
    codes = [p.exitcode for p in both]
    sums = [results.get() for code in codes if code == 0]
    if sums == [3.0, 3.0]:
        return [("ok", "two processes met over gloo and added 1 and 2")]
    return [("missing", f"two processes could not work together over gloo (exit codes {codes}, sums {sums}): "
             "is 127.0.0.1 reachable, and does GLOO_SOCKET_IFNAME name a network of this machine? One process still runs")]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=".", help="where runs will be written")
    out = parser.parse_args(argv).out
    found = check_packages()
    if importlib.util.find_spec("torch"):
        found += check_torch() + check_processes()
    found += check_places(out)
    for state, text in found:
        print(f"{state:8} {text}")
    wrong = sum(state == "missing" for state, _ in found)
    print("everything that is needed is there" if not wrong else f"{wrong} thing(s) missing")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
