"""What the README shows of a study: its tables as Markdown and its figure as SVG. Pure functions from dicts to text.

    tables(study, demo)    docs/study.json, docs/demo.json (or None) -> {name of the README's marker: Markdown}
    draw(study)            docs/study.json -> docs/study.svg, light and dark, with a background of its own
    trim(results)          a run's results.json without its long lists -> docs/demo.json

Numbers are means over the seeds. Behind a mean stand the ends of the seeds' own 95 % intervals, averaged: the interval
of one seed, so it is too wide rather than too narrow for the mean. Gains have paired intervals (study.summary).
"""
import numpy as np

from .page import duration, esc, interval, marker, number, ticks
from .report import get

ARMS = {                             # name: (title, what was learned)
    "clip": ("Patho-CLIP", "which caption belongs to which image"),
    "pretrain": ("continued pretraining", "to name what is there"),
    "sft": ("SFT", "to reason aloud, then answer"),
    "grpo": ("GRPO, from SFT", "which of eight own answers are better"),
    "dapo": ("DAPO, from SFT", "the same, on questions that teach"),
    "bare_sft": ("SFT on bare answers", "to answer without reasoning"),
    "nopretrain_sft": ("SFT, no pretraining", "SFT from random weights"),
    "nopretrain_dapo": ("DAPO, no pretraining", "DAPO after that SFT"),
    "nosft_grpo": ("GRPO, no SFT", "GRPO right after pretraining"),
}
NUMBERS = (("greedy_accuracy", "greedy"), ("sampled_accuracy", "sampled"), ("claim_accuracy", "claims true"))
MISSING = "*Not measured yet: run `make {}`.*"


def over_seeds(rows, key):
    """Results of each seed -> (mean, [low, high] averaged or None, every seed's value); (None, None, []) if one lacks it."""
    found = [get(r, key) for r in rows]
    if not found or any(value is None for value, _ in found):
        return None, None, []
    values, ends = [value for value, _ in found], [ci for _, ci in found]
    return float(np.mean(values)), np.mean(ends, axis=0).tolist() if all(ends) else None, values


def trim(results):
    """A dict without by_… tables, examples and single classes, at every depth: what a reader of the README needs."""
    if not isinstance(results, dict):
        return results
    return {k: trim(v) for k, v in results.items() if not k.startswith("by_") and k not in ("examples", "zero_shot_classes")}


# -------------------------------------------------------------------------------------------------------------- tables

def cell(rows, key):
    """-> "62.1 (57–65)" in percent, "–" where there is no such number."""
    value, ci, _ = over_seeds(rows, key)
    return "–" if value is None else f"{100 * value:.1f}" + (f" ({interval(ci)})" if ci else "")


def shifted(rows):
    """Greedy accuracy on the two shifted pools -> "52.0 · 48.5". A pool is a number (study) or a dict (demo)."""
    flat = [{p: v["greedy_accuracy"] if isinstance(v, dict) else v for p, v in r.get("pools", {}).items()} for r in rows]
    return " · ".join(cell(flat, pool) for pool in ("test_combo", "test_stain")) if any(flat) else "–"


def markdown(head, rows):
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return "\n".join([line(head), line(["---"] * 2 + ["---:"] * (len(head) - 2)), *map(line, rows)])


def stage_table(arms):
    """{arm: list of its results, one a seed} -> one row an arm."""
    rows = []
    for name, (title, learned) in ARMS.items():
        if not arms.get(name):
            continue
        found = arms[name]
        clip = f"{cell(found, 'zero_shot_accuracy')} · {cell(found, 'recall_at_1')}" if name == "clip" else "–"
        seconds = over_seeds(found, "wall_seconds" if all(get(r, "wall_seconds")[0] for r in found) else "seconds")[0]
        words = over_seeds(found, "mean_length")[0]
        rows.append([title, learned, clip, *(cell(found, key) for key, _ in NUMBERS), shifted(found),
                     "–" if words is None else f"{words:.1f}", "–" if seconds is None else f"{seconds:.0f}"])
    return markdown(["stage", "what was learned", "zero-shot · first of 100", "greedy", "sampled", "claims true",
                     "greedy: new pairs · new stain", "words", "seconds"], rows)


def points(value):
    return f"{100 * value:+.1f}"


def tables(study, demo):
    """The Markdown between the README's markers. study, demo: the dicts of docs/study.json and docs/demo.json, or None."""
    out = {"study table": MISSING.format("study"), "demo table": MISSING.format("demo")}
    if study:
        gains = markdown(["gain", "points, 95 % interval", "each seed", "questions"],
                         [[name, f"{points(g['gain'])} ({points(g['ci'][0])} to {points(g['ci'][1])})",
                           ", ".join(map(points, g["seeds"])), str(g["n"])] for name, g in study["gains"].items()])
        count = len(study["seeds"])
        out["study table"] = (
            f"{stage_table(study['arms'])}\n\nMeans over {count} seed{'s' * (count > 1)}, in percent, with the seeds' own "
            f"95 % intervals averaged; seconds of training alone. Preset {study['preset']}, {study['machine']}.\n\n{gains}"
            "\n\n![Accuracy and claims of every stage and ablation, with intervals, seeds and cost](docs/study.svg)")
    if demo:
        blind = ", ".join(f"{k.replace('_', ' ')} {100 * v:.1f}" for k, v in demo.get("blind", {}).items())
        out["demo table"] = (
            f"{stage_table({name: [stage] for name, stage in demo['stages'].items()})}\n\nOne seed, in percent, with 95 % "
            f"intervals; seconds with evaluation. In all {duration(demo['seconds'])} and {demo['peak_memory_gb']:.1f} GB of "
            f"memory at most. Without looking: {blind}. Preset {demo['preset']}, {demo['machine']}.")
    return out


def fill(text, bodies):
    """README text with each `<!-- name -->…<!-- /name -->` holding its body. ValueError names a marker that is missing."""
    for name, body in bodies.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"README: needs the line {begin} once, and {end} once below it; the table goes between them")
        text = f"{text[:text.index(begin)]}{begin}\n{body}\n{text[text.index(end):]}"
    return text


# -------------------------------------------------------------------------------------------------------------- figure

STYLE = """
.back{fill:#fbfaf7}text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:#6b655e}
.name,.value{fill:#24211e}.end{text-anchor:end}.mid{text-anchor:middle}.value{font-weight:600}.small{font-size:11px}
.grid{stroke:#e5dfd6;fill:none}.level{stroke:#6b655e;stroke-dasharray:2 3;fill:none}
.sft{--c:#5d6875}.grpo{--c:#c4416b}.dapo{--c:#4a3f96}.other{--c:#99641a}
.bar{stroke:var(--c);stroke-width:3;opacity:.45;fill:none}.seed{stroke:var(--c);stroke-width:1.3;fill:none}
.dot{fill:var(--c);stroke:#fbfaf7;stroke-width:1}.dot.ring{fill:#fbfaf7;stroke:var(--c);stroke-width:2}
@media(prefers-color-scheme:dark){.back{fill:#161517}text{fill:#a8a199}.name,.value{fill:#ebe7e1}.grid{stroke:#37333a}
.level{stroke:#a8a199}.sft{--c:#a8b3c1}.grpo{--c:#f08fb0}.dapo{--c:#aca0f3}.other{--c:#dcaa5f}
.dot{stroke:#161517}.dot.ring{fill:#161517}}
"""
LEFT, PANEL, PLOT, ROW, HEAD = 176, 214, 160, 30, 48       # width of names, of a panel, of its plot; height of a row, the head


def draw(study):
    """One row an arm that answers questions; three panels with mean, interval and a stroke a seed; then words and seconds."""
    arms = [a for a in ARMS if study["arms"].get(a) and over_seeds(study["arms"][a], "greedy_accuracy")[0] is not None]
    y, places = HEAD, {}
    for arm in arms:
        y += 14 * (arm not in ("sft", "grpo", "dapo") and not any(a in places for a in arms if "_" in a))
        places[arm], y = y + ROW / 2, y + ROW
    bottom, width = y, LEFT + 3 * PANEL + 126
    out = [f'<rect class="back" width="{width}" height="{bottom + 44}" rx="10"/>']
    numbers = {key: {arm: over_seeds(study["arms"][arm], key) for arm in arms} for key, _ in NUMBERS}
    top = max([0.5] + [x for found in numbers.values() for _, ci, seeds in found.values() for x in [*(ci or []), *seeds]])
    for panel, (key, title) in enumerate(NUMBERS):                                    # one scale for all three
        left, found = LEFT + panel * PANEL, numbers[key]
        X = lambda v: left + PLOT * v / top
        out.append(f'<text class="name" x="{left}" y="26">{esc(title)}</text>')
        for t in ticks(0, top):
            out.append(f'<path class="grid" d="M{X(t):.1f} {HEAD}V{bottom}"/>'
                       f'<text class="mid small" x="{X(t):.1f}" y="{bottom + 16}">{100 * t:.3g} %</text>')
        if key != "claim_accuracy":                                                   # four options: one in four
            out.append(f'<path class="level" d="M{X(0.25):.1f} {HEAD - 4}V{bottom}"/>'
                       f'<text class="mid small" x="{X(0.25):.1f}" y="{HEAD - 7}">chance</text>')
        for arm, (value, ci, seeds) in found.items():
            css, at = arm if arm in ("sft", "grpo", "dapo") else "other", places[arm]
            if value is None:
                out.append(f'<text class="end" x="{left + PLOT + 42}" y="{at + 4.5}">–</text>')
                continue
            bar = f'<path class="bar {css}" d="M{X(ci[0]):.1f} {at}H{X(ci[1]):.1f}"/>' if ci else ""
            strokes = "".join(f"M{X(v):.1f} {at + 6}v6" for v in seeds)
            said = f"{ARMS[arm][0]}, {title}: {number(value, True)}" + (f" [{interval(ci)}]" if ci else "")
            out.append(f'<g><title>{esc(said)}</title>{bar}<path class="seed {css}" d="{strokes}"/>'
                       f'{marker(css, X(value), at)}</g>'
                       f'<text class="end value" x="{left + PLOT + 42}" y="{at + 4.5}">{100 * value:.1f}</text>')
    for offset, key, title, digits in ((46, "mean_length", "words", 1), (112, "seconds", "seconds", 0)):
        x = LEFT + 3 * PANEL + offset
        out.append(f'<text class="end name" x="{x}" y="26">{title}</text>')
        for arm in arms:
            value = over_seeds(study["arms"][arm], key)[0]
            out.append(f'<text class="end value" x="{x}" y="{places[arm] + 4.5}">'
                       f'{"–" if value is None else f"{value:.{digits}f}"}</text>')
    for arm in arms:
        out.append(f'<text class="end name" x="{LEFT - 14}" y="{places[arm] + 4.5}">{esc(ARMS[arm][0])}</text>')
    count = len(study["seeds"])
    out.append(f'<text class="small" x="22" y="{bottom + 37}">dot: mean of {count} seed{"s" * (count > 1)} · strokes: each '
               "seed · bar: 95 % interval of one seed · words: length of a greedy answer · seconds: training of this stage "
               "alone</text>")
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 44}" width="{width}" role="img" '
            f'aria-label="Accuracy and true claims of every stage and ablation"><style>{STYLE}</style>\n'
            + "\n".join(out) + "\n</svg>\n")
