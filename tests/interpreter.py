"""What the kernel tests share: Triton's interpreter made right for bf16, error gates, poisoned memory.

conftest.py sets TRITON_INTERPRET before triton is imported anywhere. The interpreter (triton 3.6 to 3.9) keeps a bf16
number as the 16 bits it consists of, in an integer array, and calculates with those: products come out wrong by ten
orders of magnitude, without a word; and it cuts off where a GPU rounds to the nearest even bf16. `shim` repairs
products and rounding, and turns all other bf16 arithmetic into an error: a kernel should write .to(tl.float32) there.
"""

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

GATES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}  # of `relative` against float64


def relative(got, want):
    """Frobenius norm of the difference over that of `want`, in float64; NaN if anything is NaN."""
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).norm() / want.norm()).item() if want.norm() else got.norm().item()


def poison(monkeypatch):
    """torch.empty and torch.empty_like give NaN, as freed memory may: an element that no kernel writes shows."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poisoned(*args, _make=make, **kwargs):
            x = _make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, poisoned)


def to_bits(x):
    """fp32 -> the 16 bits of the nearest bf16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16).reshape(np.shape(x))


def shim():
    """Repair the interpreter of this process, once. Does nothing where kernels are compiled for a GPU."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "nanopatho_shim", False):
        return
    old = {name: getattr(builder, name) for name in ("create_dot", "cast_impl", "binary_op", "unary_op")}

    def is_bf16(x):
        return isinstance(x, handle) and x.dtype.scalar == tl.bfloat16

    def widened(x):
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if is_bf16(x) else x

    def create_dot(self, a, b, *rest):
        return old["create_dot"](self, widened(a), widened(b), *rest)

    def cast_impl(self, x, dtype):
        if x.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            return handle(to_bits(x.data), tl.bfloat16)
        return old["cast_impl"](self, x, dtype)

    def refusing(name):
        def checked(self, *args):
            if any(map(is_bf16, args)):
                raise TypeError("the interpreter cannot calculate in bf16: write .to(tl.float32) in the kernel")
            return old[name](self, *args)
        return checked

    def create_descriptor_reduce(self, kind, descriptor, value, offsets):  # TMA's reduce-add, which is missing
        assert kind == ir.DESCRIPTOR_REDUCE_KIND.ADD
        pointers, mask = descriptor.materialize_pointers(offsets)
        self.create_atomic_rmw(ir.ATOMIC_OP.FADD, pointers, value, handle(mask, tl.int1), ir.MEM_SEMANTIC.RELAXED,
                               ir.MEM_SYNC_SCOPE.GPU)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.create_descriptor_reduce = create_descriptor_reduce
    builder.binary_op, builder.unary_op = refusing("binary_op"), refusing("unary_op")
    builder.nanopatho_shim = True
