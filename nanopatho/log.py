"""What a run leaves behind to be read: a progress bar with ETA, one line a step, metrics.jsonl, samples as files.

    run = Run("runs/demo/sft", config, total=300, title="sft")
    run.step(7, loss=1.93, lr=1e-3)            # -> metrics.jsonl, log.txt, the bar
    run.text("step7", "...")                   # -> samples/step7.txt
Works alone with tqdm. Nothing leaves the machine, unless a run is started with --log wandb.
"""
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm


class ConfigError(ValueError):
    """Settings or files of a run that cannot be used as they are; the message names them and the fix."""


def run_main(main):
    """Run a program: what its user can mend ends as one message on stderr (exit code 1), a bug keeps its traceback."""
    from .data import DataError
    from .image import ImageError
    try:
        return main()
    except (ConfigError, DataError, ImageError) as error:
        who = f"process {os.environ['RANK']}: " if "RANK" in os.environ else ""
        sys.exit(f"{who}error: {error}")


def check_finite(step, records, skipped=None, limit=0, **numbers):
    """Call before the update: may it be made? A loss or gradient that is not finite would ruin weights and checkpoints.

    Such a step is noted in the list `skipped`, said, and False returned; after more than `limit` of them ConfigError.
    """
    if all(map(math.isfinite, numbers.values())):
        return True
    from .distributed import everyone
    ids = list(dict.fromkeys(everyone([r["id"] for r in records])))  # processes that stream know their own rows only
    more = f" and {len(ids) - 20} more" if len(ids) > 20 else ""
    text = (f"step {step + 1}: {', '.join(f'{k} is {v}' for k, v in numbers.items())}; nothing was updated. "
            f"Records of this step: {', '.join(ids[:20])}{more}.")
    skipped = [] if skipped is None else skipped
    skipped.append(text)
    if len(skipped) > limit:
        before = "".join(f"\n  before that, {line}" for line in skipped[-2::-1])
        raise ConfigError(f"{text} Look at them, start again in another --out with a lower --lr, or pass over up to N such "
                          f"steps with --max_skipped N (now {limit}).{before}")
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(f"skipped {text}", file=sys.stderr)
    return False


def write_json(path, data):
    """Write to a temporary name, then rename: a crash leaves the old file whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)


def board(kind, out, config, start):
    """-> function(step, numbers) that also logs to "tensorboard" (OUT/tensorboard) or "wandb", function that ends it."""
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(str(out / kind), purge_step=start)    # drops what a killed run wrote and did not save
        return lambda step, numbers: [writer.add_scalar(k, v, step) for k, v in numbers.items()], writer.close
    if kind == "wandb":
        import wandb
        web = wandb.init(project="nanopatho", name=str(out), dir=str(out), config=dataclasses.asdict(config), resume="auto")
        return lambda step, numbers: web.log(numbers, step=step), web.finish
    return lambda step, numbers: None, lambda: None


class Run:
    """Log of one stage in folder `out`. start > 0 continues: later lines of an interrupted run are dropped first.

    Under torchrun only the first process writes; the others' files are the null device. profile: so many steps, after
    three to warm up, are traced into out/trace.json (open it in Perfetto or chrome://tracing).
    """

    def __init__(self, out, config, total, title, start=0, profile=0):
        self.out, self.total, self.title = Path(out), total, title
        self.first = os.environ.get("RANK", "0") == "0"
        kept = []
        if self.first:
            try:
                (self.out / "samples").mkdir(parents=True, exist_ok=True)
                write_json(self.out / "run.json", {**dataclasses.asdict(config), "stage": title})
            except OSError as error:
                raise SystemExit(f"{self.out}: cannot write the run folder ({error}). Choose another --out.") from error
            metrics = self.out / "metrics.jsonl"
            if start and metrics.is_file():                          # a killed run may have logged steps it did not save
                for line in metrics.read_text(encoding="utf-8").splitlines():
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError:                     # the line the kill cut off
                        break
                    if row["step"] < start:
                        kept.append(line)
            metrics.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self.before = json.loads(kept[-1])["time"] if kept else 0.0
        self.file = open(self.out / "metrics.jsonl" if self.first else os.devnull, "a", encoding="utf-8")
        self.lines = open(self.out / "log.txt" if self.first else os.devnull, "a" if start else "w", encoding="utf-8")
        self.board, self.end_board = board(getattr(config, "log", "off") if self.first else "off", self.out, config, start)
        self.began = self.last = time.time()
        self.bar = tqdm(total=total, initial=start, desc=title, unit="step", dynamic_ncols=True, mininterval=0.5,
                        disable=not self.first)
        self.profiler = self.trace(profile) if profile and self.first else None

    def trace(self, steps):
        from torch.profiler import profile, schedule
        profiler = profile(schedule=schedule(wait=2, warmup=1, active=steps, repeat=1), with_flops=True,
                           on_trace_ready=lambda done: done.export_chrome_trace(str(self.out / "trace.json")))
        profiler.start()
        return profiler

    def seconds(self):
        """Seconds of training, earlier parts of a resumed run included."""
        return self.before + time.time() - self.began

    def lap(self):
        """Seconds since the last call."""
        before, self.last = self.last, time.time()
        return self.last - before

    def step(self, step, show=(), note="", **numbers):
        """Record numbers of `step` (0-based); `show` names those on the bar (default: the first four). note: what depends
        on the machine and not on the run, such as speed; it stands in log.txt and on the bar, not in metrics.jsonl."""
        row = {"step": step, "time": round(self.seconds(), 3),
               **{k: float(f"{float(v):.6g}") for k, v in numbers.items()}}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        text = " | ".join([f"{k} {v:.4g}" for k, v in row.items() if k not in ("step", "time")] + [note] * bool(note))
        self.lines.write(f"{self.title} {step + 1}/{self.total} | {row['time']:.1f}s | {text}\n")
        self.lines.flush()
        self.board(step, {k: row[k] for k in numbers})
        names = show or list(numbers)[:4]
        self.bar.set_postfix_str(" ".join([f"{k}={row[k]:.3g}" for k in names] + [note] * bool(note)), refresh=False)
        self.bar.update(step + 1 - self.bar.n)
        if self.profiler:
            self.profiler.step()

    def text(self, name, text):
        if self.first:
            (self.out / "samples" / f"{name}.txt").write_text(text, encoding="utf-8")

    def close(self):
        if self.profiler:
            self.profiler.stop()
        self.bar.close()
        self.end_board()
        self.file.close()
        self.lines.close()


# Dense bf16 operations a second, from the makers' data sheets; without an entry no MFU is shown.
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12}


def flops(*parts):
    """Operations of a training step. parts: (module, positions that pass through it). Two a weight and position forward, four
    backward (none where frozen); attention scores are left out, a few per cent below 4,000 tokens."""
    work = 0
    for module, positions in parts:
        held = list(module.parameters())
        work += (6 if any(p.requires_grad for p in held) else 2) * sum(p.numel() for p in held) * positions
    return work


def vlm_flops(model, trained, tokens, patches):
    head = model.model.embed_tokens if model.lm_head is None else model.lm_head
    return flops((model.visual.blocks, patches), (model.visual.merger, patches / model.visual.merge ** 2),
                 (model.model.layers, tokens), (head, trained))


def speed(seconds, tokens, work=None, world=1):
    """A step's seconds, and tokens and flops of all processes -> text for the log line, with this process's peak memory."""
    import torch
    text = f"{tokens / seconds:,.0f} tokens/s"
    if not torch.cuda.is_available():
        import resource
        return f"{text} | {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"
    peak = next((value for name, value in PEAK.items() if name in torch.cuda.get_device_name()), None)
    mfu = f" | MFU {work / seconds / peak / world:.1%}" if peak and work else ""
    return f"{text}{mfu} | {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
