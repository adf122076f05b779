"""Speed and error of every kernel beside PyTorch's own ways, one table. Needs a CUDA GPU.

    python -m kernels.bench                      everything, some ten minutes
    python -m kernels.bench decode logprob       cases whose name contains one of these words

First come the ceilings of this very card: a copy of 4 GiB, a bf16 product of 8192^3 random numbers. Then, case by case,
all providers in turn, ROUNDS times over (A B C A B C ...) with a second of rest between two, so that heat and clock hit
all alike; a turn is the median of triton's do_bench, which clears the L2 before every call. The table has the median
over the rounds and their spread: a lead smaller than the spread is none. Outputs and gradients are compared with the
twin in float64 on the same inputs, so error stands beside speed; compiling is not timed. Useful work counts, whoever
does it: bytes once in and once out, 4 D flops a visible pair and head, 3.5 times that with a backward.

Shapes are those of Qwen2.5-VL-3B and of the RL stage. The table belongs into kernels/RESULTS.md, with the lines above.
"""
import argparse
import itertools
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import attention, decode, logprob, norms, vision

ROUNDS = 5
FULL = dict(B=4, S=4096, prompts=8, prompt=1024, answer=512, H=16, Hk=2, D=128, windows=64, cache=256, K=4096, V=151936,
            E=2048, N=16384, F=11008)
SMALL = dict(B=1, S=40, prompts=1, prompt=20, answer=6, H=2, Hk=1, D=16, windows=2, cache=2, K=3, V=1100, E=32, N=4,
             F=48)  # for the test on a CPU


def random(device, dtype=torch.bfloat16):
    g = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=g, device=device, dtype=torch.float32).to(dtype)


def trained(function, inputs, count=None):
    """-> a call that returns the output and the gradients of the first `count` inputs."""
    leaves = [x.detach().clone().requires_grad_(i < (count or len(inputs))) for i, x in enumerate(inputs)]

    def call():
        out = function(*leaves)
        upstream = torch.ones_like(out) if out.ndim < 2 else out.detach()
        return [out, *torch.autograd.grad(out, [x for x in leaves if x.requires_grad], upstream)]
    return call


def wide(inputs):
    return [x.double() if x.is_floating_point() else x for x in inputs]


def cases(device, s):
    """-> (name, bytes, flops, {provider: call -> tensors}, call -> the same in float64). s: sizes."""
    random_, compiled = random(device), torch.compile if device == "cuda" else lambda f: f
    H, Hk, D, B, S = (s[k] for k in ("H", "Hk", "D", "B", "S"))

    q, k, v = random_(B * S, H, D), random_(B * S, Hk, D), random_(B * S, Hk, D)
    layout = attention.make_layout([i * S for i in range(B + 1)], None, device)
    causal = lambda f: lambda q, k, v: f(q, k, v, None, causal=True, layout=layout)

    def sdpa(*backends):
        def call(q, k, v):
            q, k, v = (x.view(B, S, -1, D).transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(list(backends)):
                o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return o.transpose(1, 2).flatten(0, 1)
        return call
    ways = {"kernel": causal(attention.attention)}
    if device == "cuda":
        ways |= {"SDPA flash (FA2)": sdpa(SDPBackend.FLASH_ATTENTION), "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION)}
    else:
        ways |= {"SDPA math": sdpa(SDPBackend.MATH)}
    flops, size = 2 * B * S * S * H * D, 2 * B * S * D * (2 * H + 2 * Hk)
    truth = causal(attention.attention_reference)
    yield ("attention causal fwd", size, flops, {n: lambda f=f: [f(q, k, v)] for n, f in ways.items()},
           lambda: [truth(*wide((q, k, v)))])
    yield ("attention causal fwd+bwd", 3 * size, 3.5 * flops, {n: trained(f, (q, k, v)) for n, f in ways.items()},
           trained(truth, wide((q, k, v))))

    P, R, n = s["prompt"], s["answer"], s["prompts"]
    sizes, shared = ([P] + [R] * 8) * n, [x for i in range(n) for x in [-1] + [9 * i] * 8]
    cu = [0, *itertools.accumulate(sizes)]
    q, k, v = random_(cu[-1], H, D), random_(cu[-1], Hk, D), random_(cu[-1], Hk, D)
    shares = lambda f: lambda q, k, v: f(q, k, v, cu, causal=True, shared=shared)
    pairs = [j for i in range(n) for a in range(8) for j in (9 * i, 9 * i + 1 + a)]  # prompt, answer, prompt, ...
    index = torch.cat([torch.arange(cu[j], cu[j + 1]) for j in pairs])
    first = torch.empty(cu[-1], dtype=torch.long)
    first[index.flip(0)] = torch.arange(len(index)).flip(0)  # of the copies of a prompt token the first one
    index, first, apart = index.to(device), first.to(device), [i * (P + R) for i in range(8 * n + 1)]

    def repeated(q, k, v):  # each answer with a copy of its prompt, made inside the time
        return attention.attention(*(x[index] for x in (q, k, v)), apart, causal=True)[first]
    flops = 2 * H * D * n * (P * P + 8 * R * (R + 2 * P))
    yield ("attention, shared prompt fwd+bwd", 6 * cu[-1] * D * (2 * H + 2 * Hk), 3.5 * flops,
           {"kernel": trained(shares(attention.attention), (q, k, v)), "prompt repeated": trained(repeated, (q, k, v))},
           trained(shares(attention.attention_reference), wide((q, k, v))))

    W, VH, VD = s["windows"], H, 80 if device == "cuda" else 32
    qkv, angles = random_(64 * W, 3, VH, VD), torch.rand(64 * W, VD // 2, device=device) * 6
    cu, cos, sin = torch.arange(W + 1, device=device, dtype=torch.int32) * 64, angles.cos(), angles.sin()

    def batched(qkv, cos, sin):
        q, k, v = qkv.unbind(1)
        q, k = vision.rotate(q, cos, sin), vision.rotate(k, cos, sin)
        q, k, v = (x.view(W, 64, VH, VD).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
    ways = {"kernel": lambda *x: vision.window_attention(*x, cu), "rotary, SDPA": batched}
    yield ("windows of 64 with rotary fwd", 8 * qkv[:, 0].numel(), 4 * 64 * qkv[:, 0].numel(),
           {n: lambda f=f: [f(qkv, cos, sin)] for n, f in ways.items()},
           lambda: [vision.vision_reference(*wide((qkv, cos, sin)), cu)])

    R = s["cache"]
    q, kp, vp = random_(R, H, D), *(random_(max(1, R // 8), Hk, P, D) for _ in "kv")
    k, v = (random_(R, Hk, s["answer"], D) for _ in "kv")
    full = [torch.cat((p.repeat_interleave(R // len(p), 0), x), 2) for p, x in ((kp, k), (vp, v))]

    def each_head():
        return F.scaled_dot_product_attention(q[:, :, None], *(x.repeat_interleave(H // Hk, 1) for x in full))[:, :, 0]
    flops, truth = 4 * full[0].numel() * H // Hk, lambda: [decode.decode_reference(*wide((q, *full)))]
    yield ("decode", 4 * full[0].numel(), flops, {
        "kernel": lambda: [decode.decode(q, *full)], "SDPA, K and V repeated": lambda: [each_head()],
        "SDPA": lambda: [F.scaled_dot_product_attention(q.view(R, Hk, -1, D), *full).view(R, H, D)]}, truth)
    yield ("decode, shared prompt", 4 * (kp.numel() + k.numel()), flops, {
        "kernel": lambda: [decode.cascade(q, kp, vp, k, v)], "no sharing": lambda: [decode.decode(q, *full)]}, truth)

    h, weight = random_(s["K"], s["E"]), random_(s["V"], s["E"]) * s["E"] ** -0.5
    target = torch.arange(s["K"], device=device) * 37 % s["V"]
    product, size = 2 * s["K"] * s["V"] * s["E"], 2 * (h.numel() + weight.numel())
    twin = logprob.token_logps_reference
    ways = {"kernel": logprob.token_logps, "eager": twin, "compiled": compiled(twin),
            "kernel, bf16 chunks": lambda *x: logprob.token_logps(*x, dtype=torch.bfloat16)}
    yield ("log-probability fwd", size, product, {n: lambda f=f: [f(h, weight, target)] for n, f in ways.items()},
           lambda: [twin(*wide((h, weight)), target)])
    yield ("log-probability fwd+bwd", 2 * size, 3 * product,
           {n: trained(f, (h, weight, target), 2) for n, f in ways.items()},
           trained(twin, wide((h, weight, target)), 2))

    x, w, N = random_(s["N"], s["E"]), random_(s["E"]), s["N"]
    heads, positions = random_(N, H, D), torch.arange(N, device=device).expand(3, N)
    angles = torch.arange(N, device=device)[:, None] * 1e6 ** -(torch.arange(D // 2, device=device) * 2 / D)
    axis = torch.arange(D // 2, device=device) * 3 // (D // 2)
    cos, sin, gate, up = angles.cos(), angles.sin(), random_(N, s["F"]), random_(N, s["F"])
    for name, size, kernel, twin, inputs in (
            ("RMSNorm fwd+bwd", 10 * x.numel(), norms.rms_norm, norms.rms_norm_reference, (x, w)),
            ("multimodal rotary fwd+bwd", 8 * heads.numel(), lambda x: norms.rotary(x, cos, sin, positions, axis),
             lambda x: norms.rotary_reference(x, cos, sin, positions, axis), (heads,)),
            ("SwiGLU fwd+bwd", 16 * gate.numel(), norms.swiglu, norms.swiglu_reference, (gate, up))):
        ways = {"kernel": kernel, "eager": twin, "compiled": compiled(twin)}
        yield name, size, 0, {n: trained(f, inputs) for n, f in ways.items()}, trained(twin, wide(inputs))


def milliseconds(call, device):
    if device == "cuda":
        from triton.testing import do_bench
        return do_bench(call, warmup=10, rep=50, return_mode="median")
    began = time.process_time()
    call()
    return 1000 * (time.process_time() - began)


def ceilings(device, megabytes=4096, n=8192):
    """-> bytes a second of a copy, flops a second of a bf16 product."""
    x, y = torch.empty(2, megabytes * 2 ** 20, dtype=torch.uint8, device=device)
    a = random(device)(n, n)
    copied, multiplied = milliseconds(lambda: y.copy_(x), device), milliseconds(lambda: a @ a, device)
    return 2000 * x.numel() / copied, 2000 * n ** 3 / multiplied


def table(device, sizes, words=(), rounds=ROUNDS, top=None):
    """Print the rows; yields (case, provider, error) of each."""
    copy, product = top or ceilings(device)
    print(f"copy {copy / 1e12:.2f} TB/s, bf16 product {product / 1e12:.0f} Tflop/s, {rounds} rounds\n\n"
          "| case | provider | ms | spread | error | of copy | Tflop/s | of product |\n" + "|---" * 8 + "|")
    for name, size, flops, ways, truth in cases(device, sizes):
        if words and not any(word in name for word in words):
            continue
        want, times = truth(), {n: [] for n in ways}
        errors = {n: max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(call(), want))
                  for n, call in ways.items()}
        del want
        for _ in range(rounds):
            for n, call in ways.items():
                times[n].append(milliseconds(call, device))
                time.sleep(1 if device == "cuda" else 0)
        for n, ms in times.items():
            best = statistics.median(ms)
            print(f"| {name} | {n} | {best:.3f} | {max(ms) - min(ms):.3f} | {errors[n]:.1e} | "
                  f"{1000 * size / best / copy:.0%} | {flops / best / 1e9:.0f} | {1000 * flops / best / product:.0%} |",
                  flush=True)
            yield name, n, errors[n]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="only rows whose name contains one of these")
    parts = parser.parse_args(argv).parts
    if not torch.cuda.is_available():
        sys.exit("kernels.bench measures a GPU and finds none (torch.cuda.is_available() is False). Without one there "
                 "is python -m kernels.compile_check for registers and instructions, and the tests for the numbers.")
    import triton
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
          f"triton {triton.__version__}")
    for _ in table("cuda", FULL, parts):
        pass


if __name__ == "__main__":
    main()
