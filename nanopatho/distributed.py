"""One process or many: torchrun, sharded weights (FSDP2), and sums that are exact whatever the split.

    device, rank, world = start()                  # under torchrun: meet the other processes
    shard(model, blocks, device)                   # of weights, gradients, moments each process keeps its part
    tokens = total(tokens_here)                    # the divisor of the loss counts the tokens of all processes
    loss = call(model, f, batch) / tokens          # f(model, batch), each block's weights gathered while they are needed
    (loss * world).backward()                      # FSDP takes the mean over the processes: times world it is the sum
    norm = clip_gradients(parameters, 1.0)
    whole(model)                                   # a plain copy with all the weights: to save, to sample from

Every process must make the same calls in the same order, or all wait for ever: equal numbers of rows and micro-batches,
decisions from numbers that all know. Without torchrun on a CPU nothing here does anything. On CUDA there is always a
group, of one process if need be, so that one GPU and eight run alike: weights, gradients and moments in fp32, computing
in bf16. Needs data.py, log.py and lora.py.
"""
import copy
import os
import signal
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from . import lora
from .data import augment, image_paths
from .log import ConfigError, run_main

STOP = signal.SIGTERM, signal.SIGUSR1                                # "save and stop"; Slurm sends what --signal names
signals = []                                                         # received so far

# ------------------------------------------------------------------------------------------------------- begin and end


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def launch(main):
    """Run a training script as a program: signals ask it to save and stop, and torchrun learns why it failed."""
    for number in STOP:
        signal.signal(number, lambda received, frame: signals.append(received))
    if "RANK" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record
        main = record(main)
    run_main(main)


def start():
    """-> device, rank, world. Two backends on CUDA: what goes over gloo lies in host memory and waits for no GPU."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        store, number, count = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":                # torchrun --max-restarts on one node keeps its store, and
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)    # in it dead addresses
        dist.init_process_group(backend, store=store, rank=number, world_size=count)
    elif cuda and not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # No TF32: what is fp32 in the forward pass (losses, similarities) is little, and there the digits are wanted.
    torch.set_float32_matmul_precision("highest")
    return device, rank(), world()


def asked_to_stop():
    """Was any process asked to stop? One answer for all: call it once a step on each."""
    return total(len(signals)) > 0


def stop(step):
    """After saving at a signal: end with an exit code that says "not finished"."""
    sys.exit(f"stopped by a signal after step {step}; it is saved. Start the same command again to go on."
             if rank() == 0 else 1)


def leave():
    """After the last collective. What follows, evaluation on the first process, ends at a signal as any program does."""
    for number in STOP:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if dist.is_initialized():
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------- rows and numbers


def share(n, name="batch_size"):
    """The slice of n rows that this process computes."""
    if n % world():
        raise ConfigError(f"--{name} {n} cannot be split evenly over {world()} processes: choose a multiple of it")
    return slice(rank() * n // world(), (rank() + 1) * n // world())


def pieces(rows, size):
    """Cut into micro-batches of `size` rows; 0 = one piece."""
    size = size or len(rows)
    return [rows[at:at + size] for at in range(0, len(rows), size)]


def skip_augmentation(records, rng):
    """Draw what data.augment would draw for these records: a picture is turned alike whoever computes it."""
    for record in records:
        for _ in image_paths(record) if record.get("image") else []:
            augment(np.zeros((1, 1, 3), np.uint8), rng)


def to(batch, device):
    """A dict of tensors (or None) -> the same on the device."""
    return {k: v if v is None else v.to(device, non_blocking=True) for k, v in batch.items()}


def total(*numbers):
    """The sum of each number over all processes, exact for counts."""
    if world() > 1:
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        numbers = sums.tolist()
    return numbers if len(numbers) > 1 else numbers[0]


def counts(batches):
    """Micro-batches of vlm_batch -> trained tokens, tokens, image patches; over all processes."""
    return total(sum(int((b["labels"][:, 1:] >= 0).sum()) for b in batches),
                 sum(int(b["attention_mask"].sum()) for b in batches),
                 sum(0 if b["pixel_values"] is None else len(b["pixel_values"]) for b in batches))


def add_up(tensors):
    """Sum each tensor over all processes, in place."""
    if world() > 1:
        for work in [dist.all_reduce(t, async_op=True) for t in tensors]:
            work.wait()
    return tensors


def gather(x):
    """(b, ...) of each process -> (world * b, ...), without a graph."""
    if world() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def everyone(items):
    """The lists of all processes as one, in the order of ranks, on each."""
    if world() == 1:
        return items
    found = [None] * world()
    dist.all_gather_object(found, items)
    return [x for part in found for x in part]


def read(loss, norm):
    """The losses of all processes added up, and the norm -> two floats. Only here a step waits for the device."""
    add_up([loss])
    return torch.stack([loss, norm.to(loss)]).tolist()


# ------------------------------------------------------------------------------------------------------- sharded models


def shard(model, blocks, device, offload=False, compile=False):
    """Move the model to the device; where there is a group, keep on each process only its part of every weight.

    blocks: the modules that are gathered, used and freed one after the other; the rest is gathered as one. Freeze
    before, make the optimizer after. offload: the parts stay in host memory. compile: torch.compile for each block.
    """
    if (compile or offload) and not dist.is_initialized():
        raise ConfigError("--compile and --offload are for GPUs, or for processes of torchrun: leave them out here")
    if not dist.is_initialized():
        return model.to(device)
    for block in blocks if compile else []:
        block.forward = torch.compile(block.forward)                 # inside FSDP's hooks, which cannot be compiled
    half = torch.bfloat16 if device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = dict(mesh=init_device_mesh(device.type, (world(),), mesh_dim_names=("data",)), mp_policy=policy,
                   offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy())
    for block in [*blocks, model]:
        fully_shard(block, **options)
    model.under_hooks = lambda function, *args: function(model, *args)
    register_fsdp_forward_method(model, "under_hooks")
    return model


def call(model, function, *args):
    """function(model, *args) -> what it returns. Inside it, and only there, sharded weights are whole when they are
    used: compute up to the loss there."""
    return model.under_hooks(function, *args) if hasattr(model, "under_hooks") else function(model, *args)


def token_loss(model, batch):
    """Cross-entropy summed over the trained tokens of one micro-batch of vlm_batch. A text without a picture sends an
    empty one through the vision tower, times 0: every process must gather the same blocks in the same order."""
    inputs, nothing = {k: v for k, v in batch.items() if k != "labels"}, 0.0
    if inputs["pixel_values"] is None:
        merge, width = model.visual.merge, model.visual.patch_embed.proj.weight[0].numel()
        blank = torch.zeros(merge ** 2, width, device=batch["labels"].device)
        nothing = 0.0 * model.visual(blank, torch.tensor([[1, merge, merge]])).sum()
    return model.loss(model.hidden_states(**inputs), batch["labels"], reduction="sum") + nothing


def clip_gradients(parameters, limit):
    """Scale the gradients down to norm `limit` -> their norm before, () tensor, over all processes."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def whole_tensors(tensors, wanted=True, device="cpu", dtype=None):
    """{name: tensor, perhaps sharded} -> the same whole, where they are wanted; every process takes part. The matrices of
    LoRA keep their own dtype."""
    state, adapter = {}, lora.only(tensors)
    for name, p in tensors.items():
        full = p.full_tensor() if isinstance(p, DTensor) else p
        if wanted:
            state[name] = full.to(device=device, dtype=None if name in adapter else dtype)
    return state


def whole(model, everywhere=False, device="cpu", dtype=None):
    """A plain model with all the weights, LoRA added in, for saving, evaluation or sampling: on the first process (None
    elsewhere), or everywhere. A model without LoRA that is not sharded is returned as it is. Drop the copy before training
    goes on, or it stays in memory."""
    tensors, wanted = model.state_dict(), everywhere or rank() == 0
    if not hasattr(model, "under_hooks") and not lora.only(tensors):
        return model
    state = whole_tensors(tensors, wanted, device, dtype)
    if not wanted:
        return None
    with torch.device("meta"):
        plain = type(model)(model.config)                            # FSDP's subclass makes the plain class
    plain.load_state_dict(lora.merged(state), assign=True)
    vars(plain).update({k: v for k, v in vars(model).items() if k in vars(plain) and not k.startswith("_")})
    return plain.requires_grad_(False).eval()


def for_evaluation(plain, device):
    """-> itself on a CPU, else a copy in bf16 on the device."""
    return plain if device.type == "cpu" else copy.deepcopy(plain).to(device, torch.bfloat16)


def laid_out(tensor, like):
    """This process's part of a whole tensor, in the form of the parameter `like`; not sharded: the tensor itself."""
    if not isinstance(like, DTensor):
        return tensor
    tensor = tensor.to(like.device_mesh.device_type)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def load_whole(model, state, strict=True):
    """load_state_dict for whole tensors into a model that may be sharded."""
    current = model.state_dict()
    model.load_state_dict({k: laid_out(v, current.get(k)) for k, v in state.items()}, strict)


def whole_state(optimizers):
    """state_dict() of optim.Optimizers with whole tensors on the host: the same file from any number of processes."""
    return tree_map(lambda x: x.full_tensor().cpu() if isinstance(x, DTensor) else x, optimizers.state_dict())


def load_whole_state(optimizers, states):
    """The inverse of whole_state, for any number of processes."""
    for optimizer, state in zip(optimizers, states):
        held = [p for group in optimizer.param_groups for p in group["params"]]
        for i, values in state["state"].items():
            values.update({k: laid_out(v, held[i]) for k, v in values.items() if v.shape == held[i].shape})
    optimizers.load_state_dict(states)
