"""The driver: order and needs of the stages, failures, and the gains of a made-up study by hand."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from nanopatho import study, study_figure
from nanopatho.study import finished, run_all, summary, tasks

MAIN = ["clip", "pretrain", "sft", "grpo", "dapo"]
ABLATIONS = ["bare_sft", "nopretrain_sft", "nopretrain_dapo", "nosft_grpo"]


def value(arguments, name):
    return arguments[arguments.index(name) + 1] if name in arguments else None


def test_tasks_stand_in_the_papers_order():
    table = tasks("smoke", "some/data", "runs/x", seed=3, threads=2)
    assert list(table) == MAIN
    for name, (arguments, needs) in table.items():
        assert arguments[0] == {"clip": "train_clip.py", "pretrain": "train_pretrain.py", "sft": "train_sft.py"}.get(
            name, "train_rl.py")
        assert [value(arguments, f"--{x}") for x in ("preset", "data", "out", "seed", "threads")] == [
            "smoke", "some/data", f"runs/x/{name}", "3", "2"]
        start = value(arguments, "--init")                             # what a stage starts from must be there
        assert needs == (() if start is None else (start.removeprefix("runs/x/"),))
        assert all(list(table).index(n) < list(table).index(name) for n in needs)
    assert {n: value(a, "--init") for n, (a, _) in table.items()} == {
        "clip": None, "pretrain": None, "sft": "runs/x/pretrain", "grpo": "runs/x/sft", "dapo": "runs/x/sft"}
    assert [value(table[n][0], "--algo") for n in ("grpo", "dapo")] == ["grpo", "dapo"]

    table = tasks("smoke", "d", "runs/x", ablations=True)
    assert list(table) == MAIN + ABLATIONS
    assert value(table["bare_sft"][0], "--style") == "bare" and table["bare_sft"][1] == ("pretrain",)
    assert value(table["nopretrain_sft"][0], "--init") is None         # the same SFT, from random weights
    assert table["nopretrain_dapo"][1] == ("nopretrain_sft",) and table["nosft_grpo"][1] == ("pretrain",)
    for name, (arguments, _) in table.items():                         # every argument is a field of its script
        script = __import__(arguments[0].removesuffix(".py"))
        assert {a[2:] for a in arguments if a.startswith("--")} <= set(script.Config.__dataclass_fields__), name


def fake(folder, name, code="", needs=()):
    """A task that writes results.json, and its name into a common log."""
    run = folder / name
    body = (f"import os, pathlib\nrun = pathlib.Path({str(run)!r})\nlog = run.parent / 'log.txt'\n"
            f"with open(log, 'a') as f: f.write({name!r} + '\\n')\n{code}\n"
            "run.mkdir()\n(run / 'results.json').write_text('{}')\n")
    return ["-c", body, "--out", str(run)], tuple(needs), folder


def log(folder):
    return (folder / "log.txt").read_text().split() if (folder / "log.txt").is_file() else []


@pytest.mark.parametrize("jobs", [1, 2])
def test_run_all_waits_for_what_a_task_needs(jobs, tmp_path):
    seen = "assert (run.parent / 'late').is_dir()"                     # fails when it is started too early
    table = {"first": fake(tmp_path, "first", seen, needs=("late",)),
             "late": fake(tmp_path, "late", "import time; time.sleep(.3)")}
    times = {}
    run_all(table, jobs, lambda name, seconds: times.update({name: seconds}))
    assert log(tmp_path) == ["late", "first"] and list(times) == ["late", "first"] and times["late"] > 0.2
    assert finished(tmp_path, "first") and not finished(tmp_path, "other")
    run_all(table, jobs)                                               # a second call has nothing to do
    assert log(tmp_path) == ["late", "first"]
    (tmp_path / "first" / "results.json").unlink()
    (tmp_path / "first").rmdir()
    run_all(table, jobs)                                               # only what is missing is run
    assert log(tmp_path) == ["late", "first", "first"]


def test_run_all_looks_up_meanwhile(tmp_path):
    pages = []
    run_all({"a": fake(tmp_path, "a", "import time; time.sleep(0.9)")}, 1, meanwhile=lambda: pages.append(finished(tmp_path, "a")),
            every=0.3)
    assert pages and not pages[0]                                      # while it ran, not only after it


def test_run_all_stops_at_a_failure(tmp_path):
    table = {"good": fake(tmp_path, "good"), "bad": fake(tmp_path, "bad", "raise SystemExit(7)", needs=("good",)),
             "never": fake(tmp_path, "never", needs=("bad",))}
    told = []
    with pytest.raises(SystemExit, match="bad ended with exit code 7.*Start the same command again"):
        run_all(table, 1, lambda name, seconds: told.append(name))
    assert log(tmp_path) == ["good", "bad"] and told == ["good"]
    table["bad"] = fake(tmp_path, "bad")                               # mended: it goes on from there
    run_all(table, 1)
    assert log(tmp_path) == ["good", "bad", "bad", "never"]


def test_two_jobs_run_side_by_side_and_fall_together(tmp_path):
    wait = ("import time\nfor _ in range(200):\n    if (run.parent / 'log.txt').read_text().count('\\n') == 2: break\n"
            "    time.sleep(.05)\nelse: raise SystemExit(3)")
    run_all({n: fake(tmp_path, n, wait) for n in ("a", "b")}, 2)       # each waits until it sees the other
    other = tmp_path / "two"
    other.mkdir()
    with pytest.raises(SystemExit, match="quick ended with exit code 5"):
        run_all({"slow": fake(other, "slow", "import time; time.sleep(60)"),
                 "quick": fake(other, "quick", "raise SystemExit(5)")}, 2)
    assert not finished(other, "slow")


# --- summary ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    """Run folders of two seeds with four test questions (two of them hard), three of them sampled."""
    data = tmp_path / "data"
    data.mkdir()
    levels = ["easy", "hard", "medium", "hard"]
    (data / "test.jsonl").write_text("".join(json.dumps({
        "id": f"t{i}", "image": "x", "question": "Which?", "options": ["a", "b"], "answer": "A", "level": level}) + "\n"
        for i, level in enumerate(levels)))
    greedy = {                                                         # arm: right or wrong, a row for each seed
        "sft": [[0, 0, 1, 0], [0, 1, 1, 0]], "grpo": [[1, 0, 1, 0], [0, 1, 1, 1]], "dapo": [[1, 1, 1, 1], [1, 1, 1, 0]],
        "bare_sft": [[0, 0, 1, 0], [1, 0, 1, 0]], "nopretrain_sft": [[0, 0, 0, 0], [0, 0, 1, 0]],
        "nopretrain_dapo": [[0, 0, 1, 0], [0, 0, 1, 0]], "nosft_grpo": [[0, 0, 0, 0], [0, 0, 0, 0]]}
    sampled = {"sft": [[0.25, 0.25, 0.5], [0.0, 0.5, 0.5]], "dapo": [[0.75, 0.5, 1.0], [0.5, 0.5, 0.75]]}
    for seed in (0, 1):
        for arm in ["clip", "pretrain", *greedy]:
            folder = tmp_path / "study" / f"seed{seed}" / arm
            folder.mkdir(parents=True)
            results = {"seconds": 10 + seed, "by_finding": {"x": 1}}
            if arm in greedy:
                right = greedy[arm][seed]
                results |= {"greedy_accuracy": float(np.mean(right)), "greedy_accuracy_ci": [0, 1],
                            "claim_accuracy": 0.5, "by_level": {"hard": {"greedy_accuracy": (right[1] + right[3]) / 2}},
                            "pools": {"test_combo": {"greedy_accuracy": 0.125 * seed, "n": 8}}}
                (folder / "each.json").write_text(json.dumps({
                    "ids": [f"t{i}" for i in range(4)], "greedy": right,
                    "sampled": sampled.get(arm, [[0, 0, 0]] * 2)[seed]}))
            if arm == "clip":
                results |= {"zero_shot_accuracy": {"value": 0.9, "low": 0.8, "high": 1.0}}
            (folder / "results.json").write_text(json.dumps(results))
            (folder / "run.json").write_text(json.dumps({"data": str(data)}))
    return tmp_path / "study"


def test_summary_by_hand(runs):
    out = summary(runs, (0, 1), "tiny")
    assert out["preset"] == "tiny" and out["seeds"] == [0, 1] and "cores" in out["machine"]
    assert list(out["arms"]) == MAIN + ABLATIONS and all(len(rows) == 2 for rows in out["arms"].values())
    first, second = out["arms"]["dapo"]
    assert [r["greedy_accuracy"] for r in (first, second)] == [1.0, 0.75] and first["greedy_accuracy_ci"] == [0, 1]
    assert (first["hard_greedy"], second["hard_greedy"]) == (1.0, 0.5)
    assert (first["pools"], second["pools"]) == ({"test_combo": 0.0}, {"test_combo": 0.125})
    assert out["arms"]["clip"][0]["zero_shot_accuracy"]["value"] == 0.9 and out["arms"]["clip"][1]["seconds"] == 11

    gains = out["gains"]
    want = {  # mean over questions and seeds of after - before; the gain of each seed; questions
        "dapo over sft, greedy": (0.5, [0.75, 0.25], 4),               # differences 1 .5 0 .5
        "grpo over sft, greedy": (0.25, [0.25, 0.25], 4),
        "dapo over sft, sampled": ((0.5 + 0.125 + 0.375) / 3, [1.25 / 3, 0.75 / 3], 3),
        "pretraining, greedy after dapo": (0.625, [0.75, 0.5], 4),
        "pretraining, greedy after sft": (0.25, [0.25, 0.25], 4),
        "reasoning over bare answers, greedy, hard": (0.25, [0.0, 0.5], 2),
        "reasoning over bare answers, greedy, all": (0.0, [0.0, 0.0], 4)}
    for name, (mean, seeds, n) in want.items():
        assert gains[name]["gain"] == pytest.approx(mean) and gains[name]["seeds"] == pytest.approx(seeds), name
        assert gains[name]["n"] == n and gains[name]["ci"][0] <= mean <= gains[name]["ci"][1]
    # questions are resampled after averaging over seeds: means of four draws from 1 .5 0 .5
    low, high = gains["dapo over sft, greedy"]["ci"]
    draws = np.array([np.mean(d) for d in np.random.default_rng(5).choice([1, 0.5, 0, 0.5], (20000, 4))])
    assert [low, high] == pytest.approx(np.quantile(draws, [0.025, 0.975]).tolist(), abs=0.07)
    json.dumps(out, allow_nan=False)


def test_summary_names_a_run_that_is_missing(runs):
    (runs / "seed1" / "dapo" / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match="seed1/dapo/results.json"):
        summary(runs, (0, 1), "tiny")


def test_command_line_knows_its_words(capsys):
    with pytest.raises(SystemExit) as ended:
        study.main(["everything"])
    assert ended.value.code == 2 and "demo" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        study.main(["--help"])
    assert ended.value.code == 0 and "--seeds" in capsys.readouterr().out


# --- what the README shows of it --------------------------------------------------------------------------------------


def filled(text, marker):
    return text.split(f"<!-- {marker} -->\n")[1].split(f"\n<!-- /{marker} -->")[0]


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- demo table -->\n<!-- /demo table -->\nb\n<!-- study table -->old<!-- /study table -->\nc\n")
    return path


def test_tables_and_figure_by_hand(runs):
    found = summary(runs, (0, 1), "tiny")
    for row, seconds in zip(found["arms"]["dapo"], (10, 30)):
        row |= {"sampled_accuracy": 0.5 + seconds / 1000, "sampled_accuracy_ci": [seconds / 100, 0.75], "mean_length": 16.4,
                "seconds": seconds}
    text = study_figure.tables(found, None)["study table"]
    lines = {line.split(" | ")[0].removeprefix("| "): line.strip("| ").split(" | ") for line in text.splitlines()}
    assert lines["Patho-CLIP"][2:] == ["90.0 (80–100) · –", "–", "–", "–", "–", "–", "10"]
    assert lines["DAPO, from SFT"][2:] == ["–", "87.5 (0–100)", "52.0 (20–75)", "50.0", "6.2 · –", "16.4", "20"]
    assert lines["dapo over sft, greedy"][2:] == ["+75.0, +25.0", "4"]
    assert lines["dapo over sft, greedy"][1].startswith("+50.0 (") and " to +" in lines["dapo over sft, greedy"][1]
    assert [title for title, _ in study_figure.ARMS.values() if title not in lines] == []
    del found["arms"]["dapo"][1]["sampled_accuracy"]                   # one seed lacks it: no mean that hides the gap
    assert "| 87.5 (0–100) | – | 50.0 |" in study_figure.tables(found, None)["study table"]

    drawn = ElementTree.fromstring(study_figure.draw(found))           # well-formed, and complete
    texts = [e.text for e in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"SFT", "GRPO, from SFT", "DAPO, no pretraining", "87.5", "seconds", "chance"} <= set(texts)
    assert "Patho-CLIP" not in texts and not any("nan" in (v or "").lower() for e in drawn.iter() for v in e.attrib.values())
    said = [e.text for e in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert "DAPO, from SFT, greedy: 87.5 % [0–100]" in said and not any("sampled" in t for t in said if "DAPO, from" in t)


def test_readme_table_fills_what_is_measured(runs, readme, tmp_path):
    docs, demo = tmp_path / "docs", tmp_path / "demo"
    docs.mkdir(), demo.mkdir()
    study.readme_table(docs / "study.json", demo, readme)
    text = readme.read_text()
    assert "make study" in filled(text, "study table") and "make demo" in filled(text, "demo table")
    assert text.startswith("a\n") and text.endswith("\nc\n") and "old" not in text and not list(docs.iterdir())

    (docs / "study.json").write_text(json.dumps(summary(runs, (0, 1), "tiny")))
    stages = {n: {"wall_seconds": 30.2, "seconds": 20, "greedy_accuracy": 0.5, "greedy_accuracy_ci": [0.4, 0.6],
                  "by_level": {"hard": 1}, "pools": {"test_combo": {"greedy_accuracy": 0.25, "by_topic": {}},
                                                     "test_stain": {"greedy_accuracy": 0.125}}} for n in MAIN[:4]}
    whole = {"preset": "tiny", "machine": "two cores", "seconds": 125, "peak_memory_gb": 1.84, "stages": stages,
             "blind": {"text_only": 0.26}}
    (demo / "results.json").write_text(json.dumps(whole))
    study.readme_table(docs / "study.json", demo, readme)
    assert not (docs / "demo.json").exists()                           # a demo that is not finished is not shown
    stages["dapo"] = stages["grpo"]
    (demo / "results.json").write_text(json.dumps(whole))
    study.readme_table(docs / "study.json", demo, readme)
    table = filled(readme.read_text(), "demo table")
    assert "| GRPO, from SFT | which of eight own answers are better | – | 50.0 (40–60) | – | – | 25.0 · 12.5 | – | 30 |" in table
    assert "2 min 5 s and 1.8 GB" in table and "text only 26.0" in table and "two cores" in table
    kept = json.loads((docs / "demo.json").read_text())
    assert "by_" not in json.dumps(kept) and kept["stages"]["dapo"]["pools"]["test_stain"] == {"greedy_accuracy": 0.125}
    assert (docs / "study.svg").read_text() == study_figure.draw(json.loads((docs / "study.json").read_text()))
    before = readme.read_text()
    study.readme_table(docs / "study.json", tmp_path / "none", readme)   # from committed numbers alone: the same
    assert readme.read_text() == before and "make study" not in before


def test_readme_without_markers_is_left_alone(readme, tmp_path):
    readme.write_text(readme.read_text().replace("<!-- /study table -->", ""))
    before = readme.read_text()
    with pytest.raises(ValueError, match="<!-- study table --> once, and <!-- /study table --> once below it"):
        study.readme_table(tmp_path / "study.json", tmp_path, readme)
    assert readme.read_text() == before
