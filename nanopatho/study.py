"""The chain as one command: `demo` runs every stage once, `study` three seeds and the ablations, `table` writes the README's.

    python -m nanopatho.study demo  --preset tiny --out runs/demo       # what `make demo` calls
    python -m nanopatho.study study --preset tiny --out runs/study      # what `make study` calls; resumable
    python -m nanopatho.study table                                     # docs/{study,demo}.json -> README.md, docs/study.svg

Nothing is trained here: each task is one of the four scripts as a user would start it, printed before it runs. A task whose
results.json exists is not run again; a task that was killed resumes from its last checkpoint.
"""
import argparse
import json
import platform
import os
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from . import report, study_figure
from .data import read_records
from .evaluate import blind, paired_gain
from .log import write_json

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)


def tasks(preset, data, out, seed=0, ablations=False, threads=0):
    """-> {name: (script, arguments, names it needs)}, in the order of the paper. GRPO and DAPO start from the same SFT model."""
    def run(script, name, *more):
        return [script, "--preset", preset, "--data", str(data), "--out", f"{out}/{name}", "--seed", str(seed),
                "--threads", str(threads), *more]
    at = lambda name: ("--init", f"{out}/{name}")
    table = {
        "clip": (run("train_clip.py", "clip"), ()),
        "pretrain": (run("train_pretrain.py", "pretrain"), ()),
        "sft": (run("train_sft.py", "sft", *at("pretrain")), ("pretrain",)),
        "grpo": (run("train_rl.py", "grpo", "--algo", "grpo", *at("sft")), ("sft",)),
        "dapo": (run("train_rl.py", "dapo", "--algo", "dapo", *at("sft")), ("sft",)),
    }
    if ablations:
        table |= {
            "bare_sft": (run("train_sft.py", "bare_sft", "--style", "bare", *at("pretrain")), ("pretrain",)),
            "nopretrain_sft": (run("train_sft.py", "nopretrain_sft"), ()),
            "nopretrain_dapo": (run("train_rl.py", "nopretrain_dapo", "--algo", "dapo", *at("nopretrain_sft")),
                                ("nopretrain_sft",)),
            "nosft_grpo": (run("train_rl.py", "nosft_grpo", "--algo", "grpo", *at("pretrain")), ("pretrain",)),
        }
    return table


def finished(out, name):
    return (Path(out) / name / "results.json").is_file()


def run_all(table, jobs, after=lambda name, seconds: None, meanwhile=lambda: None, every=60.0):
    """Run tasks {name: (arguments, needs, folder)} with at most `jobs` processes at a time; stop at the first failure.
    after: called when one ends; meanwhile: every so many seconds."""
    waiting = {n: t for n, t in table.items() if not finished(t[2], Path(t[0][t[0].index("--out") + 1]).name)}
    done, running, looked = set(table) - set(waiting), {}, time.time()
    while waiting or running:
        if time.time() - looked >= every:
            meanwhile()
            looked = time.time()
        for name in [n for n, t in waiting.items() if set(t[1]) <= done][:jobs - len(running)]:
            command = [sys.executable, *waiting.pop(name)[0]]
            print(f"\n$ {shlex.join(['python', *command[1:]])}", flush=True)
            running[name] = (subprocess.Popen(command, cwd=ROOT), time.time())
        time.sleep(0.2)
        for name, (process, began) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            if process.returncode:
                for other, _ in running.values():
                    other.terminate()
                raise SystemExit(f"{name} ended with exit code {process.returncode}; its message stands above. "
                                 f"Start the same command again to go on from here.")
            done.add(name)
            after(name, time.time() - began)


def make_data(preset, data):
    command = [sys.executable, "-m", "data_prep", "microworld", "--preset", preset, "--out", str(data), "--workers",
               str(os.cpu_count())]
    print(f"$ {shlex.join(['python', *command[1:]])}", flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def machine():
    """One line that names the machine: processor, cores, Python, torch."""
    import torch
    name = platform.processor() or platform.machine()
    if os.path.isfile("/proc/cpuinfo"):
        found = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        name = found[0] if found else name
    gpu = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}, Python {platform.python_version()}, torch {torch.__version__}"


def demo(c):
    data, out = Path(c.data or f"data/{c.preset}"), Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    clock = out / "seconds.json"
    spent = json.loads(clock.read_text()) if clock.is_file() else {}

    def collect(name=None, seconds=0.0):
        """Gather results.json of the stages, write the page. Called after every stage."""
        if name:
            spent[name] = round(spent.get(name, 0.0) + seconds, 1)
            write_json(clock, spent)
        stages = {n: json.loads((out / n / "results.json").read_text()) for n in ("clip", "pretrain", "sft", "grpo", "dapo")
                  if finished(out, n)}
        for n in stages:
            stages[n]["wall_seconds"] = spent.get(n)
        test = read_records(data / "test.jsonl", use="question")
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1e6
        write_json(out / "results.json", {
            "preset": c.preset, "seed": c.seed, "machine": machine(), "seconds": round(sum(spent.values()), 1),
            "peak_memory_gb": max(round(peak, 2), spent_peak(out)), "stages": stages,
            "blind": blind(read_records(data / "rl.jsonl", use="question"), test), "data": str(data)})
        if stages:
            print(f"the page so far: {report.write(out)}  ({sum(spent.values()):.0f} s)", flush=True)

    make_data(c.preset, data)
    spent["data"] = json.loads((data / "card.json").read_text(encoding="utf-8"))["seconds"]     # drawn now, or by an earlier call
    collect()
    table = {n: (a, needs, out) for n, (a, needs) in tasks(c.preset, data, out, c.seed).items()}
    first = out / "clip" / "metrics.jsonl"
    run_all(table, 1, collect, lambda: report.write(out) if first.is_file() else None)    # curves that grow, from the first minute
    collect()


def spent_peak(out):
    """Peak memory of an earlier call: a second call, which runs nothing, must not forget it."""
    path = Path(out) / "results.json"
    return json.loads(path.read_text()).get("peak_memory_gb", 0.0) if path.is_file() else 0.0


def study(c):
    data, out = Path(c.data or f"data/{c.preset}"), Path(c.out)
    make_data(c.preset, data)
    table = {}
    for seed in SEEDS[:c.seeds]:
        folder = out / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        table |= {f"seed{seed}/{n}": (a, tuple(f"seed{seed}/{x}" for x in needs), folder)
                  for n, (a, needs) in tasks(c.preset, data, folder, seed, ablations=True, threads=c.threads).items()}
    run_all(table, c.jobs, lambda name, seconds: print(f"done: {name}, {seconds:.0f} s", flush=True))
    write_json(c.json, summary(out, SEEDS[:c.seeds], c.preset))
    print(f"wrote {c.json}; `python -m nanopatho.study table` puts it into the README")


def summary(out, seeds, preset):
    """Run folders of the study -> the dict of docs/study.json: every seed's numbers, and paired gains over all seeds.

    A gain is the mean over questions of the difference on the same question; its interval resamples questions, with each
    question's difference averaged over the seeds. Three seeds are too few to resample seeds: each is listed instead.
    """
    arms = ("clip", "pretrain", "sft", "grpo", "dapo", "bare_sft", "nopretrain_sft", "nopretrain_dapo", "nosft_grpo")
    keep = ("greedy_accuracy", "sampled_accuracy", "claim_accuracy", "claim_recall", "mean_length", "sampled_length", "format",
            "contradiction", "pass_at_k", "seconds", "zero_shot_accuracy", "recall_at_1")
    result, each = {a: [] for a in arms}, {a: [] for a in arms}
    for seed in seeds:
        for arm in arms:
            folder = Path(out) / f"seed{seed}" / arm
            found = json.loads((folder / "results.json").read_text())
            row = {k: found[k] for k in found if k in keep or k.endswith("_ci") and k[:-3] in keep}
            row["hard_greedy"] = found.get("by_level", {}).get("hard", {}).get("greedy_accuracy")
            row["pools"] = {p: v["greedy_accuracy"] for p, v in found.get("pools", {}).items()}
            result[arm].append(row)
            path = folder / "each.json"
            each[arm].append(json.loads(path.read_text()) if path.is_file() else None)
    records = {r["id"]: r for r in read_records(Path(data_of(out, seeds)) / "test.jsonl", use="question")}

    def gain(before, after, kind, level=None):
        ids = each[after][0]["ids"][:len(each[after][0][kind])]
        chosen = [i for i, name in enumerate(ids) if level is None or records[name].get("level") == level]
        a = np.mean([[e[kind][i] for i in chosen] for e in each[before]], axis=0)
        b = np.mean([[e[kind][i] for i in chosen] for e in each[after]], axis=0)
        value, ci = paired_gain(a, b)
        return {"gain": value, "ci": ci, "n": len(chosen), "seeds": [
            float(np.mean([y[kind][i] - x[kind][i] for i in chosen])) for x, y in zip(each[before], each[after])]}

    gains = {f"{algo} over sft, {kind}": gain("sft", algo, kind) for algo in ("grpo", "dapo") for kind in ("greedy", "sampled")}
    gains |= {"pretraining, greedy after dapo": gain("nopretrain_dapo", "dapo", "greedy"),
              "pretraining, sampled after dapo": gain("nopretrain_dapo", "dapo", "sampled"),
              "pretraining, greedy after sft": gain("nopretrain_sft", "sft", "greedy"),
              "reasoning over bare answers, greedy, hard": gain("bare_sft", "sft", "greedy", "hard"),
              "reasoning over bare answers, greedy, all": gain("bare_sft", "sft", "greedy")}
    return {"preset": preset, "seeds": list(seeds), "machine": machine(), "arms": result, "gains": gains}


def data_of(out, seeds):
    return json.loads((Path(out) / f"seed{seeds[0]}" / "sft" / "run.json").read_text())["data"]


def readme_table(path, run="runs/demo", readme=ROOT / "README.md"):
    """Write the tables between the README's markers, and the figure beside `path`; both are made from committed numbers.

    path: docs/study.json; demo.json stands beside it. Is there a finished demo in folder `run`, its numbers (without the
    long lists) replace demo.json first. What is missing is named in the README as not measured yet.
    """
    study, demo, fresh = Path(path), Path(path).with_name("demo.json"), Path(run) / "results.json"
    found = json.loads(fresh.read_text()) if fresh.is_file() else {}
    if set(found.get("stages", ())) == {"clip", "pretrain", "sft", "grpo", "dapo"}:
        write_json(demo, study_figure.trim(found))
        print(f"{fresh} -> {demo}")
    study, demo = (json.loads(p.read_text()) if p.is_file() else None for p in (study, demo))
    text = study_figure.fill(Path(readme).read_text(encoding="utf-8"), study_figure.tables(study, demo))
    if study:
        Path(path).with_name("study.svg").write_text(study_figure.draw(study), encoding="utf-8")
    Path(readme).write_text(text, encoding="utf-8")
    print(f"{readme}: study {'written' if study else 'not measured yet'}, demo {'written' if demo else 'not measured yet'}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("demo", "study", "table"))
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--data", default="", help="data folder, made if missing (default: data/PRESET)")
    parser.add_argument("--out", default="runs/demo")
    parser.add_argument("--seed", type=int, default=0, help="seed of the demo")
    parser.add_argument("--seeds", type=int, default=3, help="study: how many seeds")
    parser.add_argument("--jobs", type=int, default=2, help="study: stages run side by side")
    parser.add_argument("--threads", type=int, default=1, help="study: CPU threads of each")
    parser.add_argument("--json", default="docs/study.json", help="study: where the numbers go; table: where they are")
    c = parser.parse_args(argv)
    {"demo": demo, "study": study, "table": lambda c: readme_table(c.json, c.out)}[c.what](c)


if __name__ == "__main__":
    main()
