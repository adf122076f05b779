"""Data for the four stages:  python -m data_prep COMMAND

  microworld --preset tiny --out DIR [--seed 0] [--workers 2] [--field value …]     draw the micro-world
  sheet OUT.png                                                                     a contact sheet of the micro-world
  folder IMAGES --out DIR [--labels "tumor=invasive tumor,non_tumor=other tissue"]  your own images, one folder a class

  list [SET …]                    the public sets: what for, size, licence, gate, layout
  fetch SET --out DIR             download what is open, print the steps where a form stands in between; resumes
  convert SET DIR --out DIR       published files -> records.jsonl, with a card of what was kept and dropped
  articles, pdf … --out DIR       open-access articles and books -> records       (each with its own --help)
  filter FILE.jsonl … --out DIR   the funnel: size, tissue, caption, duplicates, benchmarks;   stain: normalise colours
  write FILE.jsonl … --out DIR    a teacher writes reasoning for SFT or questions for RL; what passes the gates is kept
  split FILE.jsonl … --out DIR    whole groups to train, val and test -> the files that the four scripts read
  shard FILE.jsonl … --out DIR    records and images -> tar shards;  unshard DIR --out DIR: back
  validate FILE.jsonl|DIR …       check every record and image, and show a record with the trained tokens in colour

microworld writes DIR/{captions,sft,rl,val,test,test_combo,test_stain}.jsonl, DIR/images, lexicon.json (phrases that
name findings) and card.json (settings, counts). No two records share an image, and pools differ in their seeds.
Everything follows from --seed: `render.draw(world.for_drawing(record["facts"]), size)` draws an image again, with the
mask of every finding. Presets smoke and tiny hold the subfields H&E and IHC only, so that a model of a million
parameters sees each finding often enough; small holds all five, and so all 60 cells of the paper's grid (5 subfields x
3 levels x 4 tasks). """

import os
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):            # one process a core: more threads made drawing 10x slower
    os.environ.setdefault(_name, "1")
import argparse
import importlib
import json
import multiprocessing
import random
import sys
import time
from pathlib import Path

from tqdm import tqdm

from data_prep import records, writer
from data_prep.fetch import fetch
from data_prep.sources import SOURCES, convert, listing
from data_prep.world import PHRASES, SUBFIELDS, TOPICS, for_drawing, phrase, sample, space, tissue
from nanopatho.data import DataError

VERSION = 2                          # of what is drawn and written: raise it when the same settings give other data
FIELDS = {                           # name: (value for tiny, help)
    "seed": (1, "everything is drawn from it; presets were tuned on the world of seed 0 (docs/LOG.md)"),
    "size": (112, "side of an image in pixels"),
    "um_per_px": (1.0, "micrometres a pixel"),
    "subfields": ("H&E:70,IHC:30", "subfields and their shares"),
    "captions": (9000, "records of the caption pool (stages 0 and 1)"),
    "sft": (4000, "records with the teacher's reasoning (stage 2)"),
    "rl": (2500, "questions with true answers (stage 3)"),
    "val": (300, "questions to look at while training"),
    "test": (600, "held-out questions"),
    "test_combo": (300, "held-out questions on pairs of findings that no other pool shows"),
    "test_stain": (300, "held-out questions on stain colours that no other pool shows"),
    "mcq": (0.7, "share of multiple choice in the SFT pool"),
    "description": (0.1, "share of descriptions in the SFT pool"),
    "reasoning": (0.1, "share of open questions in the SFT pool"),
    "conversation": (0.1, "share of conversations of two turns in the SFT pool"),
    "p_missing": (0.15, "the SFT teacher misses a finding and guesses it"),
    "p_hasty": (0.15, "the SFT teacher names one finding and jumps to an answer"),
    "p_routine": (0.55, "the same on medium questions, which it takes for routine"),
    "verbosity": ("short", "short or long reasoning"),
    "answers": ("text", "a choice is answered with the option's text or its letter"),
}
PRESETS = {
    "tiny": {},
    "smoke": {"captions": 60, "sft": 40, "rl": 24, "val": 16, "test": 24, "test_combo": 12, "test_stain": 12},
    "small": {"size": 224, "um_per_px": 0.5, "subfields": "H&E:40,IHC:20,cytology:20,FISH:10,gross:10",
              "captions": 30000, "sft": 12000, "rl": 6000, "test": 1000, "test_combo": 500, "test_stain": 500, "mcq": 0.4, "description": 0.2, "reasoning": 0.2, "conversation": 0.2,
              "verbosity": "long"},
}
POOLS = ("captions", "sft", "rl", "val", "test", "test_combo", "test_stain")


def zero_shot_prompts(subfields):
    """Names and templates of the tissue classes, in the published CONCH form that nanopatho.evaluate_clip reads.

    An H&E image is named after its architecture when no other material fills it; its texts say so ("..., plain stroma").
    """
    names = {}
    for s in subfields:
        for facts, _ in space(s):
            name = tissue(facts)
            plain = phrase(s, "material", "none") if s == "H&E" and facts["material"] == "none" else ""
            names[name] = [f"{name}, {plain}", f"{plain}, {name}"] if plain else [name]
    return {"0": {"classnames": names, "templates": ["CLASSNAME", "CLASSNAME.", "I see CLASSNAME."]}}


def shares(text):
    """"H&E:70,IHC:30" -> {"H&E": 70.0, "IHC": 30.0}"""
    try:
        table = {name.strip(): float(share) for name, share in (part.split(":") for part in text.split(","))}
    except ValueError:
        raise SystemExit(f"--subfields {text!r}: write name:share,name:share, for example H&E:70,IHC:30") from None
    if not set(table) <= set(SUBFIELDS) or min(table.values()) < 0 or not sum(table.values()):
        raise SystemExit(f"--subfields {text!r}: names are {', '.join(SUBFIELDS)}, shares are >= 0 and not all 0")
    return table


def make_record(settings, pool, number):
    """Record `number` of a pool, without its image: a function of its arguments alone."""
    rng = random.Random(f"{settings['seed']}/{pool}/{number}")
    table = shares(settings["subfields"])
    subfield = rng.choices(list(table), list(table.values()))[0]
    level = rng.choice(("easy", "medium", "hard"))
    if pool == "captions":
        record = writer.caption_record(rng, sample(rng, subfield), rng.choice(TOPICS))
    elif pool == "sft":
        tasks = ("mcq", "description", "reasoning", "conversation")
        task = rng.choices(tasks, [settings[t] for t in tasks])[0]
        record = writer.sft_record(rng, subfield, level, task, p_missing=settings["p_missing"],
                                   p_hasty=settings["p_routine" if level == "medium" else "p_hasty"], verbosity=settings["verbosity"],
                                   answers=settings["answers"])
    else:
        record = writer.question_record(rng, subfield, level, combos=pool == "test_combo")
    # ten million images a seed and a pool: no two records can share an image
    seed = (settings["seed"] * len(POOLS) + POOLS.index(pool)) * 10_000_000 + number
    facts = {**record.pop("facts"), "seed": seed, "um_per_px": settings["um_per_px"],
             "stain_shift": pool == "test_stain"}
    name, split = f"{pool}-{number:06d}", pool.split("_")[0] if pool.startswith(("val", "test")) else "train"
    return {"id": name, "source": "microworld", "split": split, "group": f"slide-{seed:09d}",
            "image": f"images/{name}.jpg", **record, "facts": facts, "license": "CC0-1.0"}


def draw_image(job):
    """(facts, size, path) -> numbers measured on the drawn scene; writes the JPEG. Top level: workers import it."""
    from PIL import Image

    from data_prep.render import draw
    facts, size, path = job
    image, _, measured = draw(for_drawing(facts), size)                  # (S, S, 3) uint8
    Image.fromarray(image).save(path, quality=95)
    return {name: round(float(value), 4) for name, value in measured.items()}


def card_of(settings, pools, seconds):
    """Counts a reader wants to see before training: cells of the grid, letters, levels, time."""
    grid, letters, images = {}, {}, sum(map(len, pools.values()))
    for pool, rows in pools.items():
        for r in rows:
            if "level" in r:
                cell = grid.setdefault(pool, {}).setdefault(r["subfield"], {}).setdefault(r["level"], {})
                cell[r["task"]] = cell.get(r["task"], 0) + 1
            if "options" in r:
                count = letters.setdefault(pool, dict.fromkeys(writer.LETTERS, 0))
                count[r["answer"]] += 1
    return {"settings": settings, "pools": {p: len(rows) for p, rows in pools.items()}, "cells": grid,
            "letters": letters, "seconds": round(seconds, 1), "images": images,
            "images_per_second": round(images / seconds, 1)}


def same_settings(path, settings, out):
    """Compare with the settings of an earlier call -> None, or end with what differs."""
    try:
        old = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"{path}: cannot be read ({error}); remove {out} and start again") from error
    old = old.get("settings", old)
    differ = [f"{k}: {old.get(k)!r} there, {settings.get(k)!r} asked for" for k in {**old, **settings}
              if old.get(k) != settings.get(k)]
    if differ:
        raise SystemExit(f"{out} was made with other settings ({'; '.join(differ)}). Choose another --out, or remove "
                         f"{out} first.")


def microworld(settings, out, workers=2):
    """Draw the world into `out` -> card. Written beside it first; after a broken-off call, complete pools are kept."""
    out, part = Path(out), Path(f"{str(out).rstrip('/')}.part")
    if (out / "card.json").is_file():
        same_settings(out / "card.json", settings, out)
        print(f"{out}: already there")
        return json.loads((out / "card.json").read_text())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SystemExit(f"{out} exists, but holds no card.json: not made by this command, or broken. Choose another "
                         f"--out, or remove it.")
    try:
        if (part / "settings.json").is_file():
            same_settings(part / "settings.json", settings, part)
            done = ", ".join(p for p in POOLS if (part / f"{p}.jsonl").is_file())
            print(f"{part}: an earlier call was broken off; complete there and kept: {done or 'no pool'}")
        (part / "images").mkdir(parents=True, exist_ok=True)
        (part / "settings.json").write_text(json.dumps(settings))
    except OSError as error:
        raise SystemExit(f"cannot write to {part}: {error.strerror}; choose another --out") from error
    start, pools = time.time(), {}
    total = sum(settings[p] for p in POOLS)
    with multiprocessing.Pool(workers) as crew, tqdm(total=total, unit="image", desc="drawing") as bar:
        for pool in POOLS:
            path = part / f"{pool}.jsonl"
            if path.is_file():
                pools[pool] = records.read(path)
                bar.update(len(pools[pool]))
                continue
            rows = [make_record(settings, pool, n) for n in range(settings[pool])]
            jobs = [(r["facts"], settings["size"], str(part / r["image"])) for r in rows]
            for row, measured in zip(rows, crew.imap(draw_image, jobs, chunksize=8)):
                row["measured"] = measured
                bar.update(1)
            records.write(path, rows)
            pools[pool] = rows
    (part / "lexicon.json").write_text(json.dumps(PHRASES, indent=1))
    (part / "zero_shot.json").write_text(json.dumps(zero_shot_prompts(shares(settings["subfields"])), indent=1))
    card = card_of(settings, pools, time.time() - start)
    (part / "card.json").write_text(json.dumps(card, indent=1))
    (part / "settings.json").unlink()
    if out.exists():
        out.rmdir()                                          # an empty folder the user made: rename needs the place
    os.replace(part, out)
    print(f"{out}: {card['images']} images in {card['seconds']} s, {card['images_per_second']} a second")
    return card


def settings_of(args):
    """Preset and command line -> all settings, checked."""
    settings = {"version": VERSION, **{name: value for name, (value, _) in FIELDS.items()}, **PRESETS[args.preset]}
    settings.update({name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None})
    shares(settings["subfields"])
    for name in (*POOLS, "seed"):
        if not 0 <= settings[name] < 10_000_000:
            raise SystemExit(f"--{name} {settings[name]}: must lie in 0 … 9,999,999")
    for name in ("mcq", "description", "reasoning", "conversation", "p_missing", "p_hasty", "p_routine"):
        if not 0 <= settings[name] <= 1:
            raise SystemExit(f"--{name} {settings[name]}: must lie in 0 … 1")
    if not any(settings[task] for task in ("mcq", "description", "reasoning", "conversation")):
        raise SystemExit("--mcq, --description, --reasoning and --conversation are all 0: no SFT record can be drawn")
    if settings["size"] * settings["um_per_px"] < 60 or settings["um_per_px"] <= 0:
        raise SystemExit(f"--size {settings['size']} at --um_per_px {settings['um_per_px']}: an image must show 60 um or "
                         "more, or the findings have no room")
    if settings["answers"] not in ("text", "letter"):
        raise SystemExit(f"--answers {settings['answers']!r}: choose text or letter")
    if settings["verbosity"] not in writer.BANDS:
        raise SystemExit(f"--verbosity {settings['verbosity']!r}: choose one of {', '.join(writer.BANDS)}")
    return settings


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in OWN:
        return importlib.import_module(f"data_prep.{OWN[argv[0]]}").main(argv[1:]) or 0
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    world = commands.add_parser("microworld", help="draw the micro-world")
    world.add_argument("--preset", choices=list(PRESETS), default="tiny")
    world.add_argument("--out", required=True)
    world.add_argument("--workers", type=int, default=2)
    for name, (value, text) in FIELDS.items():
        world.add_argument(f"--{name}", type=type(value), help=f"{text} (tiny: {value})")
    own = commands.add_parser("folder", help="your own images, one folder a class")
    own.add_argument("images")
    own.add_argument("--out", required=True)
    own.add_argument("--labels", default="", help="folder=name,folder=name")
    own.add_argument("--subfield", choices=SUBFIELDS, default="H&E")
    own.add_argument("--topic", default="")
    own.add_argument("--distractors", default="", help="name,name: wrong options, for fewer than four classes")
    own.add_argument("--seed", type=int, default=0)
    sheet = commands.add_parser("sheet", help="a contact sheet of the micro-world")
    sheet.add_argument("out")
    known = commands.add_parser("list", help="the public sets")
    known.add_argument("sets", nargs="*", metavar="SET", help=", ".join(SOURCES))
    get = commands.add_parser("fetch", help="download a public set")
    turn = commands.add_parser("convert", help="published files of a set -> records")
    for command in (get, turn):
        command.add_argument("set", choices=list(SOURCES), metavar="SET", help=", ".join(SOURCES))
    turn.add_argument("root", help="folder of the published files")
    cut = commands.add_parser("split", help="whole groups to train, val and test")
    cut.add_argument("--seed", type=int, default=0)
    cut.add_argument("--shares", type=float, nargs=2, default=(0.15, 0.15), metavar=("TEST", "VAL"))
    cut.add_argument("--again", action="store_true", help="draw the published splits anew, too")
    pack = commands.add_parser("shard", help="records and images -> tar shards")
    pack.add_argument("--per_shard", type=int, default=1000)
    back = commands.add_parser("unshard", help="tar shards -> records and images")
    back.add_argument("folder")
    check = commands.add_parser("validate", help="check every record and image")
    check.add_argument("--show", type=int, default=1, help="records of each file to show, trained tokens in green")
    check.add_argument("--tokenizer", default="", help="folder of a model; without it, one is made from the texts")
    for command in (cut, pack, check):
        command.add_argument("files", nargs="+")
    for command in (get, turn, cut, pack, back):
        command.add_argument("--out", required=True)
    args = parser.parse_args(argv)
    return RUN[args.command](args) or 0


# --- one function a command -------------------------------------------------------------------------------------------

def run_microworld(args):
    microworld(settings_of(args), args.out, max(1, args.workers))


def run_sheet(args):
    from data_prep import render
    try:
        render.sheet(args.out)
    except (OSError, ValueError) as error:                   # ValueError: an ending that names no image format
        raise SystemExit(f"cannot write {args.out}: {error}; choose another place, ending in .png") from error


def run_folder(args):
    if any("=" not in part for part in args.labels.split(",") if part):
        raise SystemExit(f"--labels {args.labels!r}: write folder=name,folder=name")
    labels = dict(part.split("=", 1) for part in args.labels.split(",") if part)
    try:
        card = records.folder(args.images, args.out, labels=labels, subfield=args.subfield, topic=args.topic,
                              distractors=[d.strip() for d in args.distractors.split(",") if d.strip()], seed=args.seed)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    print(f"{args.out}: {card['pools']}")


def run_list(args):
    unknown = [s for s in args.sets if s not in SOURCES]
    if unknown:
        raise DataError(f"no set {', '.join(unknown)}; there are {', '.join(SOURCES)}")
    print(listing(args.sets or SOURCES))


def run_fetch(args):
    problems = fetch(args.set, args.out)
    print("\n".join(problems) or f"{args.out}: in order; next: python -m data_prep convert {args.set} {args.out} "
                                  f"--out data/{args.set}")
    return 1 if problems else 0


def run_convert(args):
    print(f"{args.out}: {convert(args.set, args.root, args.out).told()}")


def run_split(args):
    from data_prep import shards
    card = shards.split(args.files, args.out, seed=args.seed, shares=args.shares, again=args.again)
    print(f"{args.out}: {card.told()}")


def run_shard(args):
    from data_prep import shards
    print(f"{args.out}: {shards.pack(args.files, args.out, args.per_shard).told()}")


def run_unshard(args):
    from data_prep import shards
    problems = shards.unpack(args.folder, args.out)
    print("\n".join(problems) or f"{args.out}: in order")
    return 1 if problems else 0


def run_validate(args):
    problems, groups = [], {}
    for file in args.files:
        problems += records.validate(file, groups)
        for text in records.samples(file, args.show, args.tokenizer):
            print(f"--- {file}\n{text}")
    print("\n".join(problems) or f"{', '.join(args.files)}: in order")
    return 1 if problems else 0


OWN = {"articles": "articles", "pdf": "pdf", "filter": "filters", "stain": "stain",      # modules with a main of their own
       "write": "cot"}
RUN = {"microworld": run_microworld, "sheet": run_sheet, "folder": run_folder, "list": run_list, "fetch": run_fetch,
       "convert": run_convert, "split": run_split, "shard": run_shard, "unshard": run_unshard, "validate": run_validate}


if __name__ == "__main__":
    from nanopatho.log import run_main
    sys.exit(run_main(main))
