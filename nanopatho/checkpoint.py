"""Save and resume one stage. `out/last/` holds the newest complete checkpoint: weights under their published names and
train_state.pt (optimizer, step, random states). It is written beside the old one and renamed, so a kill at any moment leaves
one that can be read. Resuming continues bit for bit on CPU: N steps == k steps, kill, N - k steps (tests/test_scripts.py).
"""
import os
import shutil
from pathlib import Path

import torch


def save(out, model, optimizer, state, tokenizer=None):
    """Write out/last/. state: plain dict (step, numpy bit-generator states …); torch's random state is added."""
    out = Path(out)
    fresh, last, old = out / "last.tmp", out / "last", out / "last.old"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    model.save_pretrained(fresh)
    if tokenizer is not None:
        tokenizer.save(fresh)
    torch.save(dict(state, optimizer=optimizer.state_dict(), torch_rng=torch.get_rng_state()), fresh / "train_state.pt")
    if last.exists():                                                # else `old` is the only complete one: it stays
        shutil.rmtree(old, ignore_errors=True)
        os.replace(last, old)
    os.replace(fresh, last)
    shutil.rmtree(old, ignore_errors=True)


def resume(out, model, optimizer):
    """Load out/last/ into model and optimizer -> the state dict of `save`, or None when there is nothing to resume.

    A kill between the two renames of `save` leaves `last.old` alone: then that one is read.
    """
    for folder in (Path(out) / "last", Path(out) / "last.old"):
        if (folder / "train_state.pt").is_file():
            break
    else:
        return None
    try:
        state = torch.load(folder / "train_state.pt", weights_only=True)
    except Exception as error:
        raise SystemExit(f"{folder}/train_state.pt cannot be read ({error}). Remove {out} to start this stage again.") \
            from error
    saved = type(model).from_pretrained(folder)
    model.load_state_dict(saved.state_dict())
    optimizer.load_state_dict(state.pop("optimizer"))
    torch.set_rng_state(state.pop("torch_rng"))
    return state


def finish(out, model, tokenizer=None):
    """The stage is done: final weights go to out/ itself, the resume state is removed."""
    out = Path(out)
    model.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save(out)
    for name in ("last", "last.old", "last.tmp"):
        shutil.rmtree(out / name, ignore_errors=True)
