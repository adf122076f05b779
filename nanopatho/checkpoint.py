"""Save and resume one stage. `out/last/` holds the newest complete checkpoint: weights under their published names and
train_state.pt (optimizer, step, random states). It is written beside the old one and renamed, so a kill at any moment leaves
one that can be read. Resuming continues bit for bit on CPU: N steps == k steps, kill, N - k steps (tests/test_scripts.py).

Sharded runs write the same two files: the first process gathers tensor after tensor into host memory. So any number of
processes, or none of FSDP's, can go on from it, and every program that reads the published layout can use it. The price against
torch.distributed.checkpoint, where each process writes its part: the first process needs 12 bytes a parameter of host memory
(7B: 91 GB) and writes alone.
"""
import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch

from . import distributed, lora
from .log import ConfigError

# Settings that may change when a run is resumed: none of them changes what is learned.
FREE = ("out", "threads", "save_every", "micro_batch", "pack", "recompute", "offload", "compile", "profile", "max_skipped",
        "eval_items", "eval_samples", "eval_sample_items", "workers", "max_damaged", "log")


@contextlib.contextmanager
def reading(folder, option="--init"):
    """What cannot be read inside (weights, config.json, tokenizer.json of `folder`) becomes a ConfigError naming it."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = str(error) if str(folder) in str(error) else f"{folder}: {error}"
        if (last := Path(folder) / "last").is_dir():
            whole = any(last.glob("*.safetensors"))                  # LoRA leaves an adapter there, no model
            text += ". The run there has not finished: start it again to finish it" + f", or give {last}." * whole
        raise ConfigError(f"{option}: {text}") from error


def begun(out):
    """The folder of the newest complete checkpoint, or None. A kill between the renames of `save` leaves last.old alone."""
    there = [folder for folder in (Path(out) / "last", Path(out) / "last.old") if folder.is_dir()]
    for folder in there:
        if (folder / "train_state.pt").is_file():
            return folder
    if there:
        raise ConfigError(f"{there[0]}/train_state.pt is missing, so the run cannot be resumed. Remove {there[0]} to start "
                          "this stage again.")
    return None


def check_out(config, stage):
    """Before anything is read: would starting in config.out ruin what lies there? ConfigError names each difference.

    A checkpoint is resumed, and finished weights are replaced, only with the settings of the run.json beside them.
    """
    out, init = Path(config.out), config.init
    if init and out.is_dir() and os.path.exists(init) and os.path.samefile(init, out):
        raise ConfigError(f"--out and --init are the same folder ({out}): its weights would be overwritten. Choose another "
                          "--out.")
    if not (begun(out) or (out / "model.safetensors").is_file()):
        return
    try:
        old = json.loads((out / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{out / 'run.json'} cannot be read ({error}), so it is unknown which settings the weights in {out} "
                          f"belong to. Choose another --out, or remove {out} to start this stage again.") from error
    new = {**dataclasses.asdict(config), "stage": stage}
    differ = [f"{name} was {old[name]!r}, is {value!r}" for name, value in new.items()
              if name not in FREE and name in old and old[name] != value]
    if differ:
        raise ConfigError(f"{out} holds a run with other settings: {'; '.join(differ)}. Give the old ones to go on with it, "
                          f"choose another --out, or remove {out} to start this stage again.")


def save(out, model, optimizer, state, tokenizer=None):
    """Write out/last/. state: plain dict (step, numpy bit-generator states …); torch's random state is added. All processes
    call it, the first one writes; none goes on before it is done. Of a model with LoRA only the adapter is kept."""
    adapter, moments = lora.only(model.state_dict()), distributed.whole_state(optimizer)
    whole = None if adapter else distributed.whole(model)
    adapter = distributed.whole_tensors(adapter)
    if distributed.rank() == 0:
        out = Path(out)
        fresh, last, old = out / "last.tmp", out / "last", out / "last.old"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        if whole is not None:
            whole.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save(fresh)
        torch.save(dict(state, optimizer=moments, adapter=adapter, torch_rng=torch.get_rng_state()), fresh / "train_state.pt")
        if last.exists():                                            # else `old` is the only complete one: it stays
            shutil.rmtree(old, ignore_errors=True)
            os.replace(last, old)
        os.replace(fresh, last)
        shutil.rmtree(old, ignore_errors=True)
    distributed.total(0)                                             # a barrier


def resume(out, model, optimizer):
    """Load the newest checkpoint into model and optimizer -> the state dict of `save`, or None: nothing to resume."""
    folder = begun(out)
    if folder is None:
        return None
    try:
        state = torch.load(folder / "train_state.pt", weights_only=True)
    except Exception as error:
        reason = str(error).split("\n")[0][:200]                     # torch.load raises many kinds, some with a long advice
        raise ConfigError(f"{folder}/train_state.pt cannot be read ({type(error).__name__}: {reason}). Remove {folder} to "
                          "start this stage again.") from error
    adapter = state.pop("adapter", {})                               # LoRA: the other weights are those of --init
    try:
        distributed.load_whole(model, adapter or type(model).from_pretrained(folder).state_dict(), strict=not adapter)
    except (ValueError, OSError, RuntimeError) as error:             # RuntimeError: other names or shapes
        raise ConfigError(f"{error}. The checkpoint cannot be used: remove {folder} to start this stage again.") from error
    distributed.load_whole_state(optimizer, state.pop("optimizer"))
    torch.set_rng_state(state.pop("torch_rng"))
    distributed.total(0)                                             # all have read it before one may write the next
    return state


def finish(out, model, tokenizer=None):
    """The stage is done: final weights go to out/ itself, the resume state is removed."""
    out = Path(out)
    model.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save(out)
    for name in ("last", "last.old", "last.tmp"):
        shutil.rmtree(out / name, ignore_errors=True)
