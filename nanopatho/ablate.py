"""Which ingredient of DAPO does what: each is taken away alone, one is added, from the same SFT models, over several seeds.

    python -m nanopatho.ablate ingredients --sft runs/study/seed{seed}/sft --data data/tiny --out runs/ingredients

Every run is train_rl.py as a user would start it. What is finished is not run again, what was killed resumes. The table goes
to OUT/ingredients.md and OUT/ingredients.json. Needs study.py and what that needs.
"""
import argparse
import json
from pathlib import Path

import numpy as np

from .evaluate import paired_gain
from .log import ConfigError, run_main, write_json
from .study import machine, run_all

ARMS = {                             # name: (what it is, how its arguments differ from --algo dapo)
    "dapo": ("DAPO, complete", ()),
    "no_clip_higher": ("clip 0.2 / 0.2 in place of 0.2 / 0.28", ("--clip_high", "0.2")),
    "no_token_mean": ("mean over answers in place of tokens", ("--aggregation", "sequence-mean")),
    "no_dynamic": ("no dynamic sampling", ("--dynamic", "off")),
    # 1 if right else 0: divided by the group's deviation that is +1 / -1 on accuracy alone
    "no_length": ("no length in the reward", ("--reward", "grpo_gated")),
    "with_kl": ("a KL to the start, 0.01 k3, as in GRPO", ("--kl", "0.01")),
    "grpo": ("GRPO: all of these at once", ("--algo", "grpo")),
    "claims": ("and one added: a reward for true findings, weight 0.5", ("--claim_weight", "0.5")),
}
NUMBERS = {"greedy_accuracy": "greedy", "sampled_accuracy": "sampled", "claim_accuracy": "claims true"}


def ingredients(preset, data, sft, out, seeds, threads=1, more=()):
    """-> {name: (arguments, needs, folder)} for study.run_all, seed by seed. `sft` may hold {seed}."""
    table = {}
    for seed in seeds:
        for arm, (_, changes) in ARMS.items():
            folder = Path(out) / f"seed{seed}"
            table[f"seed{seed}/{arm}"] = (["train_rl.py", "--preset", preset, "--algo", "dapo", "--data", str(data), "--init",
                                           str(sft).format(seed=seed), "--out", str(folder / arm), "--seed", str(seed),
                                           "--threads", str(threads), *changes, *more], (), folder)
    return table


def summary(out, seeds):
    """Finished run folders -> {"arms": {name: numbers a seed and gains over complete DAPO}}.

    A gain is the mean over questions of the difference on the same question, averaged over the seeds; its 95 % interval
    resamples questions. Three seeds are too few to resample: each one's gain is listed.
    """
    def read(seed, arm, name):
        return json.loads((Path(out) / f"seed{seed}" / arm / name).read_text(encoding="utf-8"))

    each = {arm: [read(seed, arm, "each.json") for seed in seeds] for arm in ARMS}
    arms = {}
    for arm, (title, _) in ARMS.items():
        results = [read(seed, arm, "results.json") for seed in seeds]
        row = {"title": title, **{k: [r.get(k) for r in results] for k in (*NUMBERS, "sampled_length", "seconds")}}
        logs = [(Path(out) / f"seed{seed}" / arm / "metrics.jsonl").read_text("utf-8").splitlines() for seed in seeds]
        row["rollout_tokens"] = [sum(json.loads(line)["rollout_tokens"] for line in log) for log in logs]
        for kind in ("greedy", "sampled"):
            pairs = [(np.array(whole[kind]), np.array(part[kind])) for whole, part in zip(each["dapo"], each[arm])]
            value, ci = paired_gain(*(np.mean(side, axis=0) for side in zip(*pairs)))
            row[f"{kind}_gain"] = {"gain": value, "ci": ci, "seeds": [float(np.mean(b - a)) for a, b in pairs]}
        arms[arm] = row
    return {"seeds": list(seeds), "machine": machine(), "arms": arms}


def markdown(study):
    """The dict of `summary` -> one table: mean over the seeds in percent, the gain over complete DAPO with its interval."""
    def mean(values, scale=1.0):
        return "–" if None in values else f"{scale * np.mean(values):.1f}"

    lines = ["| arm | " + " | ".join(NUMBERS.values()) + " | sampled, minus DAPO's | each seed | words | million tokens "
             "sampled | seconds |", "| --- |" + " ---: |" * (len(NUMBERS) + 5)]
    for arm, row in study["arms"].items():
        gain = row["sampled_gain"]
        low, high = (100 * x for x in gain["ci"])
        cells = [row["title"], *(mean(row[k], 100) for k in NUMBERS),
                 "" if arm == "dapo" else f"{100 * gain['gain']:+.1f} ({low:+.1f} to {high:+.1f})",
                 "" if arm == "dapo" else " ".join(f"{100 * x:+.1f}" for x in gain["seeds"]),
                 mean(row["sampled_length"]), f"{np.mean(row['rollout_tokens']) / 1e6:.2f}", f"{np.mean(row['seconds']):.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\nSeeds {', '.join(map(str, study['seeds']))}; in percent; {study['machine']}.\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ingredients",))
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--data", default="", help="data folder (default: data/PRESET)")
    parser.add_argument("--sft", default="runs/study/seed{seed}/sft", help="folder all arms start from; {seed} is replaced")
    parser.add_argument("--out", default="runs/ingredients")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each")
    c, more = parser.parse_known_args(argv)                          # the rest are options of train_rl.py, for all arms alike
    seeds = range(c.seeds)
    for folder in {c.sft.format(seed=seed) for seed in seeds}:
        if not (Path(folder) / "model.safetensors").is_file():
            raise ConfigError(f"--sft {c.sft}: {folder}/model.safetensors is missing. Train it first: python train_sft.py "
                              f"--preset {c.preset} --out {folder} ...")
    table = ingredients(c.preset, c.data or f"data/{c.preset}", c.sft, c.out, seeds, c.threads, more)
    for _, _, folder in table.values():
        folder.mkdir(parents=True, exist_ok=True)
    run_all(table, c.jobs, lambda name, seconds: print(f"done: {name}, {seconds:.0f} s", flush=True))
    study = summary(c.out, seeds)
    write_json(Path(c.out) / "ingredients.json", study)
    (Path(c.out) / "ingredients.md").write_text(markdown(study), encoding="utf-8")
    print(markdown(study), end="")


if __name__ == "__main__":
    run_main(main)
