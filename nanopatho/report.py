"""One page to look at: `python -m nanopatho.report RUN` writes RUN/report.html, complete in one file.

    from nanopatho.report import write
    write("runs/demo")                      # -> Path("runs/demo/report.html")

Reads whatever is there, so that it can be called after every stage; what is missing is named as still to come.
    RUN/results.json                        preset, seconds, machine, stages, blind (all optional)
    RUN/{clip,pretrain,sft,grpo,dapo}/      run.json (settings), metrics.jsonl, speed.jsonl, results.json,
                                            samples/questions.json
A file that is there but broken stops the page with its name, the line or question, and what is wrong with it.

Needs its sibling page.py for the drawing (and that Pillow, for pictures). Numbers are shown as recorded; only the
curves get a running mean. Every text from outside, a model's answers above all, is escaped.
"""

import json
import math
import os
import sys
from pathlib import Path

from nanopatho.page import (dot_chart, duration, esc, interval, legend, line_chart, marked, number, page, parts_svg,
                            picture, thumbnail)

STAGES = {"clip": ("Patho-CLIP", "image and caption find each other"),
          "pretrain": ("Continued pretraining", "say what is there"),
          "sft": ("Fine-tuning (SFT)", "reason aloud, then answer"),
          "grpo": ("RL: GRPO", "the better of eight answers become likelier"),
          "dapo": ("RL: DAPO", "the same start; clip-higher, questions that teach")}
SHORT = {"clip": "Patho-CLIP", "pretrain": "captions", "sft": "SFT", "grpo": "GRPO", "dapo": "DAPO"}
QUESTION_STAGES = ("sft", "grpo", "dapo")

# name in metrics.jsonl -> (title, one line of explanation, is it a share of one?)
METRICS = {
    "loss": ("Loss", "cross-entropy, nats", False),
    "accuracy": ("Right answers", "of all answers sampled in a step", True),
    "reward": ("Reward", "what is maximised; the two scales differ", False),
    "length": ("Length", "tokens an answer; falling means reasoning is given up", False),
    "claims": ("Truth of the reasoning", "claims on the image: +1 all true, -1 all false", False),
    "entropy": ("Entropy", "nats a token; near 0 nothing new is tried", False),
    "mixed": ("Groups that teach", "questions with both right and wrong answers", True),
    "pass_at_k": ("At least one right", "of the answers to a question", True),
    "format": ("Format kept", "one think block, one answer block, nothing else", True),
    "truncated": ("Cut off", "answers that reached the longest length", True),
    "clip_high": ("Clipped above", "tokens that may not become likelier for now", True),
    "clip_low": ("Clipped below", "tokens that may not become rarer for now", True),
    "kl": ("KL to the start", "nats a token from the SFT model; GRPO only", False),
    "old_kl": ("KL inside a step", "how far the updates on one rollout went", False),
    "sampler_gap": ("Sampler gap", "log-probability, sampling against training pass", False),
    "rounds": ("Rollout rounds", "a step, until enough groups teach", False),
    "rollout_tokens_s": ("Sampling speed", "answer tokens a second", False),
    "update_tokens_s": ("Update speed", "answer tokens a second, all updates on a rollout", False),
    "rollout_tokens": ("Tokens sampled", "in a step, dropped groups too", False),
    "update_tokens": ("Tokens learned from", "in a step, counted once an update", False),
    "length_std": ("Spread of the length", "standard deviation, tokens", False),
    "length_ok": ("Not overlong", "the length part of the reward", False),
    "zero_variance": ("Groups that teach nothing", "all rewards equal", True),
    "groups": ("Groups in the update", "", False),
    "filled": ("Masked groups", "in place of missing ones, when the search was given up", False),
    "skipped": ("Steps without an update", "1: no group taught anything", False),
    "grad_norm": ("Gradient norm", "before clipping", False),
    "lr": ("Learning rate", "", False),
    "logit_scale": ("Logit scale", "inverse temperature of the contrastive softmax", False),
    "hard": ("Hard questions", "share of the batch: the curriculum", True),
}
FIRST = {"clip": ("loss", "logit_scale"), "pretrain": ("loss",), "sft": ("loss", "hard")}
RL_FIRST = ("accuracy", "reward", "length", "claims", "entropy", "mixed", "format", "clip_high")


class ReportError(ValueError):
    """A file of the run folder is there but cannot be used; the message names it."""


# -------------------------------------------------------------------------------------------------------------- reading

def read_json(path, kind=dict):
    """The object in a JSON file, or None when there is no such file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReportError(f"{path}: cannot be read ({error}). Delete it or run the stage again.") from error
    if not isinstance(data, kind):
        raise ReportError(f"{path}: holds a {type(data).__name__}, expected a {kind.__name__}.")
    return data


def read_metrics(path):
    """metrics.jsonl -> list of dicts. A last line without its end is being written right now: left out."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: cannot be read ({error}).") from error
    rows = []
    for n, line in enumerate(lines[:-1], 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ReportError(f"{path}, line {n}: not JSON ({error}): {line[:60]!r}. Delete the line.") from error
        if not isinstance(row, dict) or not is_number(row.get("step")):
            raise ReportError(f"{path}, line {n}: no number 'step': {line[:60]!r}. Delete the line.")
        rows.append(row)
    return rows


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_run(run):
    """-> (RUN/results.json, {stage: {"results", "metrics", "settings", "questions"}}); only stages that have begun."""
    results = read_json(run / "results.json") or {}
    stages = {}
    for name in STAGES:
        own, listed = read_json(run / name / "results.json"), (results.get("stages") or {}).get(name)
        path = run / name / "samples" / "questions.json"
        speed = {row["step"]: row for row in read_metrics(run / name / "speed.jsonl")}   # a resumed run repeats steps
        metrics = [{**row, **speed.get(row["step"], {})} for row in read_metrics(run / name / "metrics.jsonl")]
        stage = {"results": {**(own or {}), **(listed or {})}, "metrics": metrics,
                 "settings": read_json(run / name / "run.json") or {},
                 "questions": check_questions(read_json(path, list) or [], path)}
        if any(stage.values()):
            stages[name] = stage
    return results, stages


def check_questions(questions, path):
    """Refuse a samples file that would be drawn wrongly; tells the question and the field."""
    for i, q in enumerate(questions):
        try:
            for field, kind in dict(id=str, question=str, options=list, answer=str, answers=list).items():
                if not isinstance(q[field], kind):
                    raise TypeError(f"field {field!r} is {q[field]!r}, expected a {kind.__name__}")
            for a in q["answers"]:
                size = len(a["text"])
                for c in a.get("claims", []):
                    if not 0 <= c["start"] < c["end"] <= size:
                        raise ValueError(f"claim {c['start']} to {c['end']} lies outside a text of {size} characters")
                    c["attribute"], c["value"], c["true"]
            heat = q.get("heatmap") or [[0.0]]
            if not all(isinstance(row, list) and len(row) == len(heat[0]) and all(map(is_number, row)) for row in heat):
                raise ValueError("heatmap is not a table of numbers with rows of one length")
        except (KeyError, TypeError, ValueError) as error:
            what = f"field {error} is missing" if isinstance(error, KeyError) else error
            name = q.get("id") if isinstance(q, dict) else "?"
            raise ReportError(f"{path}, question {i + 1} ({name}): {what}. Run the stage again.") from error
    return questions


def get(results, key):
    """(value, [low, high] or None) of a result: a number with `key_ci` or `ci` beside it, or {"value", "low", "high"}.

    >>> get({"a": 0.5, "a_ci": [0.4, 0.6]}, "a"), get({"a": {"value": 0.5, "low": 0.4, "high": 0.6}}, "a")
    ((0.5, [0.4, 0.6]), (0.5, [0.4, 0.6]))
    """
    value, ci = results.get(key), results.get(f"{key}_ci") or results.get("ci")
    if isinstance(value, dict):
        value, ci = value.get("value"), [value.get("low"), value.get("high")]
    if not is_number(value) or not math.isfinite(value):
        return None, None
    ok = isinstance(ci, (list, tuple)) and len(ci) == 2 and all(is_number(x) and math.isfinite(x) for x in ci)
    return value, list(ci) if ok else None


# --------------------------------------------------------------------------------------------------------------- header

def header(results, stages):
    facts = ["nanopatho", results.get("preset") and f"preset {results['preset']}", results.get("machine"),
             is_number(results.get("seconds")) and duration(results["seconds"])]
    missing = [title for name, (title, _) in STAGES.items() if not stages.get(name, {}).get("results")]
    soon = (f'<p class="soon"><b>Still to come:</b> {esc(", ".join(missing))}. '
            "This page is written again every minute and after every stage; reload it.</p>" if missing else "")
    return (f'<p class="eyebrow">{esc(" · ".join(f for f in facts if f))}</p>'
            "<h1>Learning to look, to reason, and to reason better</h1>"
            '<p class="lead">Patho-R1 in miniature, from the first pixel to the last reward: a small vision-language '
            "model learns to see tissue, to say what it sees before it answers, and then, by comparing eight of its "
            "own answers to each question, to answer better.</p>"
            '<p class="warn">Research and teaching software, not a medical device. Nothing here may be used for '
            f"diagnosis.</p>{soon}{cards(stages)}")


def cards(stages):
    """Headline numbers of the last stage that answers questions, each beside where it started."""
    last = next((s for s in ("dapo", "grpo", "sft") if stages.get(s, {}).get("results")), None)
    start = "sft" if last in ("grpo", "dapo") else None
    wanted = [(last, key, label, percent, f"after {SHORT.get(last)}") for key, label, percent in (
        ("sampled_accuracy", "Sampled accuracy", True), ("greedy_accuracy", "Greedy accuracy", True),
        ("claim_accuracy", "True claims", True), ("mean_length", "Words an answer", False))]
    wanted.append(("clip", "zero_shot_accuracy", "Zero-shot tissue", True, "Patho-CLIP, no label seen"))
    if not last:
        wanted += [("clip", "recall_at_1", "Found first of 100", True, "Patho-CLIP, image and caption"),
                   ("pretrain", "claim_accuracy", "True claims", True, "captions after pretraining")]
    out = []
    for stage, key, label, percent, note in wanted:
        value, ci = get(stages.get(stage, {}).get("results", {}), key)
        if value is None:
            continue
        before = get(stages.get(start, {}).get("results", {}), key)[0] if stage == last else None
        lines = [f"95 % interval {interval(ci, percent)}"] if ci else []
        lines.append(note if before is None else f"{note}; {number(before, percent)} before")
        out.append(f'<div class="card"><p>{esc(label)}</p><div class="big">{number(value, percent)}</div>'
                   f'<p>{"<br>".join(map(esc, lines))}</p></div>')
    return f'<div class="cards">{"".join(out)}</div>' if out else ""


# ------------------------------------------------------------------------------------------------------ table and dots

def stage_table(stages):
    """One row a stage; accuracy, truth and length stand side by side, because each can be won by losing another."""
    columns = [("zero_shot_accuracy", "zero-shot", True), ("recall_at_1", "first of 100", True),
               ("greedy_accuracy", "right, greedy", True), ("sampled_accuracy", "right, sampled", True),
               ("claim_accuracy", "claims true", True), ("claim_recall", "findings named", True),
               ("contradiction", "contradicts itself", True), ("mean_length", "words an answer", False)]
    columns = [c for c in columns if any(get(s["results"], c[0])[0] is not None for s in stages.values())]
    if not columns:
        return ""
    rows = []
    for name, (title, what) in STAGES.items():
        results = stages.get(name, {}).get("results", {})
        cells = []
        for key, _, percent in columns:
            value, ci = get(results, key)
            shown = f"<b>{number(value, percent)}</b>" if value is not None else ""
            cells.append(f"<td>{shown}<small>{interval(ci, percent)}</small></td>")
        cost = duration(results["seconds"]) if is_number(results.get("seconds")) else "" if results else "to come"
        rows.append(f'<tr{"" if results else " class=later"}><td><span class="key {name}"></span>{esc(title)}'
                    f"<small>{esc(what)}</small></td>{''.join(cells)}<td>{cost}</td></tr>")
    head = "".join(f"<th>{esc(label)}</th>" for _, label, _ in columns)
    return ("<h2>What each stage gained</h2><p>Held-out questions, 95 % intervals in small print. GRPO and DAPO both "
            "start from the fine-tuned model. The captions of pretraining are judged by the same claims.</p>"
            f'<div class="scroll"><table><thead><tr><th>stage</th>{head}<th>time</th></tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>")


def comparison(stages, blind):
    """The table as dots, with what a guesser without eyes would get; then greedy accuracy split in four ways."""
    lines = [(v, k.replace("_", " ")) for k, v in (blind or {}).items() if is_number(v)]
    have = [s for s in QUESTION_STAGES if stages.get(s, {}).get("results")]

    def chart(key, title, note, percent=True, names=have, **more):
        rows = [(SHORT[s], [(s, value, ci)], number(value, percent)) for s in names
                for value, ci in [get(stages.get(s, {}).get("results", {}), key)]]
        return dot_chart(title, rows, note=note, percent=percent, **more)

    also = ("pretrain", *have)                                             # captions make claims too
    charts = [chart("greedy_accuracy", "Right answers, greedy", "the likeliest answer to each question", top=1,
                    lines=lines),
              chart("sampled_accuracy", "Right answers, sampled", "mean of several answers at temperature 1", top=1,
                    lines=lines),
              chart("claim_accuracy", "True claims", "statements on the image that are true", names=also, top=1),
              chart("claim_recall", "Findings named", "true findings that are mentioned", names=also, top=1),
              chart("contradiction", "Contradicts itself", "concludes on one option, answers another"),
              chart("mean_length", "Words an answer", "reasoning that shrinks shows here first", percent=False)]
    out = f'<div class="grids">{"".join(charts)}</div>' if any(charts) else ""
    notes = {"pools": "test; new combinations of findings; new stain colours"}
    titles = {"pools": "Pool", "by_level": "Level", "by_subfield": "Subfield", "by_topic": "Tissue system"}
    splits = "".join(split(stages, have, key, title, notes.get(key, "number of questions on the right"))
                     for key, title in titles.items())
    if splits:
        out += (f"<h2>Where it is right</h2><p>Greedy accuracy on held-out questions, split.</p>{stage_legend(have)}"
                f'<div class="grids packed">{splits}</div>')
    return out


def split(stages, have, key, title, note):
    """One chart of greedy accuracy by level, subfield, topic or pool: a row a part, a dot a stage."""
    found = {}                                                             # part -> {stage: its results}
    for s in have:
        parts = stages[s]["results"].get(key) or {}
        if key == "pools" and parts:
            parts = {"test": stages[s]["results"], **parts}
        for name, results in parts.items():
            if isinstance(results, dict):
                found.setdefault(name, {})[s] = results
    known = ["easy", "medium", "hard", "test"]
    names = sorted(found, key=lambda name: (known.index(name) if name in known else len(known), name))
    rows = []
    for name in names:
        n = next((r["n"] for r in found[name].values() if is_number(r.get("n"))), None)
        dots = [(s, *get(results, "greedy_accuracy")) for s, results in found[name].items()]
        rows.append((name.removeprefix("test_"), dots, f"{n:.0f}" if n is not None else ""))
    return dot_chart(title, rows, top=1, note=note)


def stage_legend(names, cost=None):
    return legend([(s, SHORT[s] + (cost or {}).get(s, "")) for s in names])


# --------------------------------------------------------------------------------------------------------------- curves

def curve(stages, key, names, x="step", prefix="", **more):
    """One metric of one or more stages over steps (or seconds)."""
    title, note, share = METRICS.get(key, (key, "", False))
    value = lambda row, k: row[k] if is_number(row.get(k)) else None
    series = [(s, [value(r, x) for r in stages[s]["metrics"]], [value(r, key) for r in stages[s]["metrics"]])
              for s in names]
    return line_chart(prefix + more.pop("title", title), series, note=more.pop("note", note), percent=share, **more)


def other_curves(stages, names, shown, of=""):
    keys = dict.fromkeys(k for s in names for row in stages[s]["metrics"] for k, v in row.items() if is_number(v))
    charts = [c for c in (curve(stages, k, names) for k in keys if k not in shown and k not in ("step", "time")) if c]
    return (f"<details><summary>{len(charts)} more numbers that were logged{esc(of)}</summary>"
            f'<div class="grids">{"".join(charts)}</div></details>' if charts else "")


def curves(stages):
    """Training curves: GRPO and DAPO over each other, then the stages that lead to the model they start from."""
    out = ""
    rl = [s for s in ("grpo", "dapo") if stages.get(s, {}).get("metrics")]
    if rl:
        cost = {}
        for s in rl:
            row, seconds = stages[s]["metrics"][-1], stages[s]["results"].get("seconds")
            cost[s] = f": {row['step'] + 1:.0f} steps in {duration(seconds or row.get('time') or 0)}"
        charts = [curve(stages, "accuracy", rl, x="time", title="Right answers against cost", x_name="seconds",
                        note="DAPO's extra rollouts are paid for here")] + [curve(stages, k, rl) for k in RL_FIRST]
        out += ("<h2>Reinforcement learning, step by step</h2><p>Two branches from one model on the same questions. "
                "The loss is missing on purpose: it is about zero by construction and says nothing. Length and truth "
                "stand beside accuracy. Faint lines are single steps, strong ones running means.</p>"
                f'{stage_legend(rl, cost)}<div class="grids">{"".join(charts)}</div>'
                + other_curves(stages, rl, RL_FIRST))
    early = [s for s in FIRST if stages.get(s, {}).get("metrics")]
    if early:
        charts = [curve(stages, key, [s], prefix=f"{STAGES[s][0]}: ") for s in early for key in FIRST[s]]
        seen = stages.get("pretrain", {}).get("results", {}).get("by_finding") or {}
        charts.append(dot_chart("Findings seen after pretraining", [
            (name.replace("_", " "), [("pretrain", value, None)], number(value, True)) for name, value in seen.items()
            if is_number(value)], top=1, note="captions that name the right value"))
        out += (f'<h2>{"The stages before" if rl else "Training so far"}</h2>'
                f'<div class="grids packed">{"".join(charts)}</div>'
                + "".join(other_curves(stages, [s], FIRST[s], f" by {STAGES[s][0]}") for s in early))
    return out


# ------------------------------------------------------------------------------------------------------------ questions

def questions(run, stages):
    """Chosen questions with picture, saliency, and all their answers before and after reinforcement learning."""
    by_id = {s: {q["id"]: q for q in stages[s]["questions"]} for s in QUESTION_STAGES
             if stages.get(s, {}).get("questions")}
    if not by_id:
        return ""
    before = next(iter(by_id))
    after = next((s for s in ("dapo", "grpo") if s in by_id and s != before), None)
    cards = "".join(question(run, by_id, key, before, after, is_open=i < 2) for i, key in enumerate(by_id[before]))
    return ("<h2>Eight answers to one question</h2><p>The tournament that reinforcement learning learns from. The "
            "reward adds up the parts; the advantage is the reward minus the group's mean, divided by its spread. "
            "Above zero an answer becomes likelier, below zero rarer. A group of equals teaches nothing.</p>"
            '<p><mark class="yes">a statement that is true of this image<i>✓</i></mark> &nbsp; '
            '<mark class="no">a false one<i>✗</i></mark> &nbsp; judged by program from the facts that the image was '
            "drawn from. Warm squares: the patches on which the first answer hangs most (saliency: influence, not "
            "proof of a reason).</p>" + cards)


def question(run, by_id, key, before, after, is_open):
    q, later = by_id[before][key], by_id.get(after, {}).get(key)
    path = run / (q.get("image") or "image")                               # an absolute path wins over run
    try:
        source, shape = thumbnail(path)
    except OSError as error:
        raise ReportError(f"{path}: is no picture that can be opened ({error}). Replace or delete it.") from error
    pictures = picture("the image", there=bool(source))
    for stage, found in ((before, q), (after, later)):
        if source and found and found.get("heatmap"):
            pictures += picture(f"what swayed {SHORT[stage]}", found["heatmap"])
    options = "".join(f'<li{" class=right" if chr(65 + n) == q["answer"] else ""}><b>{chr(65 + n)}</b>{esc(text)}</li>'
                      for n, text in enumerate(q["options"]))
    chips = "".join(f'<span class="chip">{esc(q[field])}</span>' for field in ("subfield", "level") if q.get(field))
    sides = side(before, q, "Before: " if later else "") + (side(after, later, "After: ") if later else "")
    more = "".join(f"<details><summary>The same question after {esc(SHORT[s])}</summary>"
                   f'<div class="sides">{side(s, by_id[s][key])}</div></details>'
                   for s in by_id if s not in (before, after) and key in by_id[s])
    count = " → ".join(f"{SHORT[s]} {sum(bool(a.get('correct')) for a in x['answers'])}/{len(x['answers'])}"
                       for s, x in ((before, q), (after, later)) if x)
    style = f' style="--image:url({esc(source)});--shape:{shape:.3f}"' if source else ""
    return (f'<details class="question"{" open" if is_open else ""}{style}><summary>{esc(q["question"])}'
            f'<small>{esc(count)} right</small></summary>'
            f'<div class="ask"><div class="pictures">{pictures}</div>'
            f'<div><ul class="options">{options}</ul>{chips}</div></div>'
            f'<div class="sides">{sides}</div>{more}</details>')


def side(stage, q, when=""):
    """All answers of one stage to a question, best first."""
    answers = sorted(q["answers"], key=lambda a: -(a.get("advantage") or 0))        # stable: equals keep their order
    right = sum(bool(a.get("correct")) for a in answers)
    return (f'<section class="side"><h3><span class="key {stage}"></span>{esc(when + SHORT[stage])}'
            f'<small>{right} of {len(answers)} right</small></h3>{"".join(map(answer, answers))}</section>')


def answer(a):
    css, word = ("yes", "✓ right") if a.get("correct") else ("no", "✗ wrong")
    reward = f"<span>reward <b>{a['reward']:+.2f}</b></span>" if is_number(a.get("reward")) else ""
    parts = {k: v for k, v in (a.get("parts") or {}).items() if is_number(v)}
    advantage = a.get("advantage") if is_number(a.get("advantage")) else None
    return (f'<article class="answer"><header><span class="verdict {css}">{word}</span>{reward}'
            f'</header><div class="scores">'
            f'{parts_svg(parts, advantage)}<p>{marked(a["text"], a.get("claims", []))}</p></div></article>')


# ----------------------------------------------------------------------------------------------------------------- page

def settings(stages):
    out = []
    for name, stage in stages.items():
        if stage["settings"]:
            rows = "".join(f"<div><span>{esc(k)}</span><span>{esc(v)}</span></div>"
                           for k, v in stage["settings"].items())
            out.append(f"<details><summary>{esc(STAGES[name][0])}</summary>"
                       f'<div class="settings">{rows}</div></details>')
    return f"<h2>Settings of each stage</h2>{''.join(out)}" if out else ""


GLOSSARY = {
    "Greedy, sampled": "Greedy takes the likeliest token each time; sampled draws at temperature 1, as in training. "
                       "Reinforcement learning improves what is sampled.",
    "Claim": "A known phrase about a finding inside the reasoning. Images are drawn from facts, so every claim is true "
             "or false. Phrases outside the list are not counted.",
    "Contradicts itself": "The option that the reasoning names last is not the one that is answered.",
    "Blind baselines": "What can be had without looking: chance, always the most frequent letter, always the longest "
                       "option, a model of the text alone. They should lie near chance, or the questions leak.",
    "Pools": "test: as in training, other images. combo: findings that never met in training. stain: new colours.",
}


def write(run_folder):
    """Write RUN/report.html from what is in the run folder -> its path. Replaces an older page in one move."""
    run = Path(run_folder)
    if not run.is_dir():
        raise ReportError(f"{run}: no such folder. Give a run folder that holds {', '.join(STAGES)}.")
    results, stages = read_run(run)
    if not stages:
        raise ReportError(f"{run}: holds none of the stage folders {', '.join(STAGES)}. If it is one stage's own "
                          f"folder, give the folder above it.")
    glossary = "".join(f"<dt>{esc(term)}</dt><dd>{esc(text)}</dd>" for term, text in GLOSSARY.items())
    body = "\n".join([
        header(results, stages), stage_table(stages), comparison(stages, results.get("blind")), questions(run, stages),
        curves(stages), settings(stages), f"<h2>Words used here</h2><dl>{glossary}</dl>",
        f"<footer>Made by <b>python -m nanopatho.report</b> from the files of {esc(run.resolve().name)}. Research "
        "software, not a medical device.</footer>"])
    target, temporary = run / "report.html", run / "report.html.tmp"
    temporary.write_text(page(f"nanopatho: {run.resolve().name}", body), encoding="utf-8")
    os.replace(temporary, target)
    return target


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1 or argv[0].startswith("-"):
        raise SystemExit("usage: python -m nanopatho.report RUN      writes RUN/report.html, one self-contained page")
    try:
        print(write(argv[0]))
    except ReportError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
