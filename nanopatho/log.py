"""What a run leaves behind to be read: a progress bar with ETA, one line a step, metrics.jsonl, samples as files.

    run = Run("runs/demo/sft", config, total=300, title="sft")
    run.step(7, loss=1.93, lr=1e-3)            # -> metrics.jsonl, log.txt, the bar
    run.text("step7", "...")                   # -> samples/step7.txt
Works alone with tqdm; no web logger, nothing leaves the machine.
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
        sys.exit(f"error: {error}")


def check_finite(step, records, **numbers):
    """Call before the update: a loss or gradient that is not finite would ruin the weights and all later checkpoints."""
    if not all(map(math.isfinite, numbers.values())):
        ids = [r["id"] for r in records]
        more = f" and {len(ids) - 20} more" if len(ids) > 20 else ""
        raise ConfigError(f"step {step + 1}: {', '.join(f'{k} is {v}' for k, v in numbers.items())}; nothing was updated. "
                          f"Records of this step: {', '.join(ids[:20])}{more}. Look at them, or start again in another "
                          "--out with a lower --lr.")


def write_json(path, data):
    """Write to a temporary name, then rename: a crash leaves the old file whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)


class Run:
    """Log of one stage in folder `out`. start > 0 continues: later lines of an interrupted run are dropped first."""

    def __init__(self, out, config, total, title, start=0):
        self.out, self.total, self.title = Path(out), total, title
        try:
            (self.out / "samples").mkdir(parents=True, exist_ok=True)
            write_json(self.out / "run.json", {**dataclasses.asdict(config), "stage": title})
        except OSError as error:
            raise SystemExit(f"{self.out}: cannot write the run folder ({error}). Choose another --out.") from error
        metrics = self.out / "metrics.jsonl"
        kept = []
        if start and metrics.is_file():                              # a killed run may have logged steps it did not save
            for line in metrics.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:                         # the line the kill cut off
                    break
                if row["step"] < start:
                    kept.append(line)
        metrics.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self.before = json.loads(kept[-1])["time"] if kept else 0.0
        self.file = open(metrics, "a", encoding="utf-8")
        self.lines = open(self.out / "log.txt", "a" if start else "w", encoding="utf-8")
        self.began = time.time()
        self.bar = tqdm(total=total, initial=start, desc=title, unit="step", dynamic_ncols=True, mininterval=0.5)

    def seconds(self):
        """Seconds of training, earlier parts of a resumed run included."""
        return self.before + time.time() - self.began

    def step(self, step, show=(), **numbers):
        """Record numbers of `step` (0-based); `show` names those on the bar (default: the first four)."""
        row = {"step": step, "time": round(self.seconds(), 3),
               **{k: float(f"{float(v):.6g}") for k, v in numbers.items()}}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        text = " | ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in ("step", "time"))
        self.lines.write(f"{self.title} {step + 1}/{self.total} | {row['time']:.1f}s | {text}\n")
        self.lines.flush()
        names = show or list(numbers)[:4]
        self.bar.set_postfix_str(" ".join(f"{k}={row[k]:.3g}" for k in names), refresh=False)
        self.bar.update(step + 1 - self.bar.n)

    def text(self, name, text):
        (self.out / "samples" / f"{name}.txt").write_text(text, encoding="utf-8")

    def close(self):
        self.bar.close()
        self.file.close()
        self.lines.close()
