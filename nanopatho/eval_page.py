"""The page of an evaluation: `python -m nanopatho.evaluate page OUT [--compare OTHER]` writes OUT/report.html.

Reads OUT/results.json and items.jsonl of `evaluate qa`, and faithful.json, judge.json, clip.json where they lie beside
them. Every number stands with its interval and with what a guesser without eyes gets on the same questions. Drawing is
page.py's: no script, nothing loaded from elsewhere, every foreign text escaped.
"""
import argparse
import json
import os
from pathlib import Path

from .log import ConfigError
from .page import dot_chart, esc, interval, line_chart, marked, number, page, picture, thumbnail

COLUMNS = {
    "accuracy": "right", "sampled": "right, sampled", "majority": "vote", "pass@2": "pass@2", "pass@4": "pass@4",
    "pass@8": "pass@8", "pass@16": "pass@16", "pass@32": "pass@32", "pass@64": "pass@64", "loglik": "log-likelihood",
    "loglik_per_token": "… a token", "lenient": "right without tags", "unreadable": "not readable", "f1": "open: F1",
    "recall": "open: recall", "open_unreadable": "open: not readable", "without_image": "image withheld",
    "blind: random": "chance", "blind: most_frequent_letter": "frequent letter",
    "blind: longest_option": "longest option", "blind: text_only": "text only"}
TITLES = {"subset": "Subset", "pool": "Pool", "level": "Level", "subfield": "Subfield", "topic": "Topic",
          "kind": "Kind of question"}
BESIDE = {"faithful": "Is the reasoning true?", "judge": "A language model's verdict", "clip": "Patho-CLIP"}


def parts(results):
    """results.json -> list of (what it is split by, name, number of questions, cell), all questions first."""
    rows = [("", "all", results["overall"]), ("", "all, by subset size", results.get("size_weighted"))]
    rows += [(title, *part) for key, title in TITLES.items() for part in results.get(f"by_{key}", {}).items()]
    count = lambda cell: max((c["n"] for c in cell.values() if "n" in c), default=results["n"])
    return [(title, name, count(cell), cell) for title, name, cell in rows if cell]


def as_text(results):
    """The table for the terminal: a line a part, percent with intervals; then published numbers and paired tests."""
    lines = [f"{title} {name}".strip().ljust(26) + f"n={n:<6d} " + " · ".join(
        f"{COLUMNS[k]} {100 * cell[k]['value']:.1f} ({interval(cell[k]['ci'])})" for k in COLUMNS if k in cell)
        for title, name, n, cell in parts(results)]
    if results.get("reference"):
        r = results["reference"]
        n = sum(r.get("sizes", {}).values()) or r.get("n", "?")
        lines.append(f"published, NOT RUN HERE, on {n} questions ({r['source']}):")
        lines += [f"    {model:30s} {row}" for model, row in r["rows"].items()]
    lines += [f"against {results['compare']['with']}: {name} {100 * t['gain']:+.1f} ({interval(t['ci'])}), "
              f"p = {t['p']:.3g}, {t['better']} better, {t['worse']} worse of {t['n']}" for name, t in tests(results)]
    return "\n".join(lines)


def tests(results):
    return [(name, t) for name, t in results.get("compare", {}).items() if isinstance(t, dict)]


def table(title, note, head, rows):
    """A section with a table; cells are text. A cell that is a list has its second part in small print."""
    cell = lambda c: f"<b>{esc(c[0])}</b><small>{esc(c[1])}</small>" if isinstance(c, list) else esc(c)
    body = "".join(f"<tr>{''.join(f'<td>{cell(c)}</td>' for c in row)}</tr>" for row in rows)
    top = "".join(f"<th>{esc(h)}</th>" for h in head)
    return (f"<h2>{esc(title)}</h2><p>{esc(note)}</p><div class=\"scroll\"><table><thead><tr>{top}</tr></thead>"
            f"<tbody>{body}</tbody></table></div>" if rows else "")


def charts(results, other):
    """Accuracy by part as dots, the other run's beside it, blind guessers as dashed lines; calibration of the vote."""
    eyeless = [k for k in results["overall"] if k.startswith("blind") or k == "without_image"]
    lines, out = [(results["overall"][k]["value"], COLUMNS[k]) for k in eyeless], []
    dot = lambda css, cell: [(css, cell["accuracy"]["value"], cell["accuracy"]["ci"])] if "accuracy" in cell else []
    for key, title in {"": "All questions", **TITLES}.items():
        of = lambda r: {"all": r["overall"]} if not key else r.get(f"by_{key}", {})
        there = of(other) if other else {}
        rows = [(name, dot("sft", there.get(name, {})) + dot("dapo", cell), str(cell["accuracy"]["n"]))
                for name, cell in of(results).items() if "accuracy" in cell]
        out.append(dot_chart(title, rows, top=1, lines=lines, note="right answers; on the right the questions"))
    found = results.get("calibration")
    if found:
        x, y = [b["confidence"] for b in found["bins"]], [b["accuracy"] for b in found["bins"]]
        note = f"right against agreement: ECE {found['ece']:.3f}, Brier {found['brier']:.3f}; grey: both equal"
        out.append(line_chart("Calibration of the vote", [("sft", [0, *x, 1], [0, *x, 1]), ("dapo", x, y)], note=note,
                              percent=True, x_name="share that agrees"))
    return f'<div class="grids packed">{"".join(out)}</div>'


def flat(data, path=""):
    """Nested results -> rows (name, value, interval as text), numbers only."""
    if isinstance(data, dict) and isinstance(data.get("value"), float):
        return [(path, f"{data['value']:.3f}", interval(data.get("ci") or [data["low"], data["high"]], False))]
    if isinstance(data, dict):
        return [row for key, value in data.items() for row in flat(value, f"{path} {key}".strip())]
    return [(path, f"{data:.4g}", "")] if isinstance(data, (int, float)) and not isinstance(data, bool) else []


def verdict(row):
    n = row["numbers"]
    word = row["why"] or ("right" if n.get("accuracy") else "wrong" if "accuracy" in n else f"F1 {n['f1']:.2f}")
    return word + (f", {100 * n['sampled']:.0f} % of the samples right" if "sampled" in n else "")


def question(row, other):
    """One question that can be opened: image, options, the answers of both runs."""
    source, shape = next((found for found in map(thumbnail, map(Path, row["image"])) if found[0]), (None, 1.0))
    style = f' style="--image:url({esc(source)});--shape:{shape:.3f}"' if source else ""
    options = "".join(f'<li{" class=right" if chr(65 + i) == row["answer"] else ""}><b>{chr(65 + i)}</b>{esc(o)}</li>'
                      for i, o in enumerate(row["options"] or ())) or f"<li>{esc(row['answer'])}</li>"
    sides = "".join(f'<section class="side"><h3>{title}<small>{esc(verdict(r))}</small></h3><article class="answer"><p>'
                    f'{marked(r["text"], r.get("claims", []))}</p></article></section>'
                    for title, r in (("The other run", other), ("This run", row)) if r)
    chips = "".join(f'<span class="chip">{esc(row[name])}</span>' for name in (*TITLES, "id") if row.get(name))
    shown = picture("the image", there=bool(source)) if row["image"] else ""
    head = f"<summary>{esc(row['question'])}<small>{esc(verdict(row))}</small></summary>"
    return (f'<details class="question"{style}>{head}'
            f'<div class="ask"><div class="pictures">{shown}</div><div><ul class="options">{options}</ul>{chips}</div>'
            f'</div><div class="sides">{sides}</div></details>')


def browse(items, others, most):
    """Questions in drawers, `most` of each: what changed between the runs, not readable, wrong, right, open."""
    right = lambda r: r["numbers"].get("accuracy")
    was = lambda r: right(others[r["id"]]) if others else None
    drawers = {"Right now, not in the other run": lambda r: right(r) == 1 and was(r) == 0,
               "Right in the other run, not now": lambda r: right(r) == 0 and was(r) == 1,
               "Not readable": lambda r: r["why"], "Wrong": lambda r: not r["why"] and right(r) == 0,
               "Right": lambda r: right(r) == 1, "Open": lambda r: not r["why"] and right(r) is None}
    out = "<h2>Questions</h2><p>Open a drawer, then a question. All of them are in items.jsonl.</p>"
    for title, belongs in drawers.items():
        rows = [r for r in items if belongs(r)]
        if rows:
            out += (f"<details><summary>{title}: {len(rows)}, the first {min(most, len(rows))} here</summary>"
                    + "".join(question(r, others.get(r["id"])) for r in rows[:most]) + "</details>")
    return out


def write(folder, compare=None, most=20):
    """Write FOLDER/report.html -> its path."""
    from .benchmark import read_items
    folder, items = Path(folder), read_items(folder)
    read = lambda path: json.loads(path.read_text(encoding="utf-8"))
    results, others = read(folder / "results.json"), {r["id"]: r for r in read_items(compare)} if compare else {}
    if compare and any(r["id"] not in others for r in items):
        raise ConfigError(f"--compare {compare}: is of other questions than {folder}")
    there, r = [k for k in COLUMNS if k in results["overall"]], results.get("reference")
    cell = lambda c: [number(c["value"], True), interval(c["ci"])] if c else ""
    paired = [[name, [f"{100 * t['gain']:+.1f}", interval(t["ci"])], f"{t['p']:.3g}", t["better"], t["worse"], t["n"],
               t["method"]] for name, t in tests(results)]
    body = [
        f'<p class="eyebrow">nanopatho · {esc(results["model"])} · {esc(results["questions"])}</p>'
        f'<h1>{results["n"]} questions</h1><p class="warn">Research and teaching software, not a medical device.</p>',
        table("How many are right", "Percent with 95 % intervals, beside what a guesser without eyes gets on the same "
              "questions. An answer that cannot be read counts as wrong.", ["", "n", *(COLUMNS[k] for k in there)],
              [[[name, title], str(n), *(cell(of.get(k)) for k in there)] for title, name, n, of in parts(results)]),
        charts(results, read(Path(compare) / "results.json") if compare else None),
        table("Against the other run", "The same questions, paired: points gained, and the chance of a difference as "
              "large if the runs were equal.", ["", "gain", "p", "better", "worse", "n", "test"], paired),
        table("What could not be read, and why", "", ["reason", "answers", "share"],
              [[why, n, number(n / results["n"], True)] for why, n in results["why"].items()]),
        *(table(title, "", ["", "value", "95 %"], flat(read(folder / f"{name}.json")))
          for name, title in BESIDE.items() if (folder / f"{name}.json").is_file())]
    if r:
        keys = dict.fromkeys(k for row in r["rows"].values() for k in row)
        body.append(table("Published, not run here", f"{r['metric']}; {r['source']}. {r.get('note', '')} Other "
                          "prompts, parsers and copies of the data: to be read beside, not as a test.", ["model", *keys],
                          [[model, *(row.get(k, "") for k in keys)] for model, row in r["rows"].items()]))
    body.append(browse(items, others, most))
    part = folder / f"report.html.{os.getpid()}"
    part.write_text(page(f"nanopatho: {folder.resolve().name}", "\n".join(body)), encoding="utf-8")
    os.replace(part, folder / "report.html")
    return folder / "report.html"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m nanopatho.evaluate page", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="results of `evaluate qa`")
    parser.add_argument("--compare", help="results of another run on the same questions")
    parser.add_argument("--most", type=int, default=20, help="questions shown in each drawer")
    c = parser.parse_args(argv)
    print(write(c.folder, c.compare, c.most))
