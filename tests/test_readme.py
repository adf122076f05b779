"""The README says what is so: its commands run (at smoke size), its paths and options exist, its tables have not drifted."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data_prep.__main__ as prep
from nanopatho import ablate, evaluate, presets, report, study, study_figure
from nanopatho.data import check_record
from nanopatho.vlm import PathoVLM
from smoke import strict

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE)
INLINE = [re.sub(r"\s*\n", " ", text) for text in re.findall(r"`([^`]+)`", PROSE)]
MADE_LATER = ("runs/", "data/", "weights/", "tiles/", ".venv")         # what the commands make, or the reader brings
NAMES_IN_FOLDERS = {"captions.jsonl", "sft.jsonl", "rl.jsonl", "val.jsonl", "test.jsonl", "metrics.jsonl", "funnel.html", "report.html"}
# Needs what a test has not: the network, other people's files, minutes, a GPU. Their options are looked up in their own --help.
ONLY_HELP = ("data_prep fetch", "data_prep convert", "data_prep articles", "data_prep pdf", "data_prep filter", "data_prep split",
             "data_prep write", "data_prep shard", "kernels.bench", "kernels.compile_check", "nanopatho.weights fetch",
             "nanopatho.weights bench", "nanopatho.doctor",
             "nanopatho.bench_rl", "nanopatho.bench_train", "nanopatho.ablate ingredients", "nanopatho.scale")
SCRIPTS = {name: importlib.import_module(f"train_{name}") for name in ("clip", "pretrain", "sft", "rl")}


def commands():
    """Lines of bash blocks and inline commands, without comments, in order, each once."""
    lines = [line for kind, body in BLOCKS if kind == "bash" for line in body.splitlines()] + [
        text for text in INLINE if re.match(r"(python|make|source|pip|torchrun) ", text)]
    return list(dict.fromkeys(line.split("  #")[0].strip() for line in lines if line.strip()))


@pytest.fixture
def run(world, tmp_path, monkeypatch, capsys):
    """Run one command of the README at smoke size, with every folder under tmp_path; full-size lines are only parsed."""
    monkeypatch.chdir(tmp_path)
    places = {"data/tiny": str(world), "--preset tiny": "--preset smoke",       # published weights: the demo's stand in
              "weights/Qwen2.5-VL-7B-Instruct --image": "runs/demo/dapo --image",
              "mine.png": str(next((world / "images").glob("test-*")))}

    def main(module, argv, *more):
        monkeypatch.setattr("sys.argv", ["main", *argv, *more])        # as a program of its own reads it
        return module.main()

    def command(line):
        for name, place in places.items():
            line = re.sub(rf"{name}(?=[\s/]|$)", place, line)
        words = shlex.split(line)
        if words[0] == "make":
            rules = (ROOT / "Makefile").read_text()
            assert len(words) == 2 and re.search(rf"^{words[1]}:", rules, re.MULTILINE)
        elif words[0] == "source":
            assert words[1:] == [".venv/bin/activate"] and "VENV  ?= .venv\n" in (ROOT / "Makefile").read_text()
        elif words[0] == "pip":
            assert words[1:3] == ["install", "-e"] and re.search(rf"^{words[3][2:-1]} = ", (ROOT / "pyproject.toml").read_text(), re.M)
        elif any(re.match(r"train_\w+\.py$", w) for w in words):
            at = next(i for i, w in enumerate(words) if w.startswith("train_"))
            assert words[:at] in (["python"], ["torchrun", "--nproc-per-node", "8"]) and (ROOT / words[at]).is_file()
            stage, argv = words[at][6:-3], words[at + 1:]
            if "--dry-run" in argv:
                with pytest.raises(SystemExit) as ended:
                    presets.parse(SCRIPTS[stage].Config, stage, argv)
                assert not ended.value.code
                return
            config = presets.parse(SCRIPTS[stage].Config, stage, argv)
            if config.preset == "smoke":
                SCRIPTS[stage].main(argv)
                assert (Path(config.out) / "results.json").is_file()
        elif " ".join(words[2:]).startswith(ONLY_HELP):
            sub = [w for w in words[3:4] if not w.startswith("-") and " ".join(words[2:4]) in ONLY_HELP]
            if words[2].startswith("kernels."):                        # they compile: not in a process that interprets
                env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
                done = subprocess.run([sys.executable, *words[1:3], "--help"], cwd=ROOT, env=env, capture_output=True, text=True)
                assert done.returncode == 0 and [w for w in words if w.startswith("--") and w not in done.stdout] == []
                return
            before = capsys.readouterr().out
            with pytest.raises(SystemExit) as ended:
                main(importlib.import_module(words[2] + ".__main__" * (words[2] == "data_prep")), [*sub, "--help"])
            text = capsys.readouterr().out
            print(before)
            assert not ended.value.code and [w for w in words if w.startswith("--") and w not in text] == []
        elif words[:4] == ["python", "-m", "data_prep", "sheet"]:      # seconds of drawing: test_render.py draws it
            monkeypatch.setattr("data_prep.render.sheet", lambda path: Path(path).write_text("drawn"))
            assert prep.main(words[3:]) == 0 and Path(words[4]).is_file()
        elif words[:3] == ["python", "-m", "data_prep"]:
            if "--help" in words:
                with pytest.raises(SystemExit) as ended:
                    prep.main(words[3:])
                assert ended.value.code == 0
            else:
                assert prep.main(words[3:]) == 0
        elif words == ["python", "-m", "nanopatho.study", "table"]:
            copy = tmp_path / "README.md"
            copy.write_text(TEXT)
            (tmp_path / "docs").mkdir()
            for name in ("study.json", "demo.json"):
                if (ROOT / "docs" / name).is_file():
                    shutil.copyfile(ROOT / "docs" / name, tmp_path / "docs" / name)
            monkeypatch.setattr(study.readme_table, "__defaults__", ("runs/none", copy))
            study.main(["table", "--out", "runs/none"])
            assert copy.read_text() == TEXT
        else:
            assert words[:2] == ["python", "-m"] and words[2].startswith("nanopatho."), f"what is this? {line}"
            less = ["--items", "4", "--samples", "2", "--max_new_tokens", "8"] if words[2].endswith(".evaluate") else []
            less += ["--max_new_tokens", "8"] if words[2].endswith(".chat") else []
            main(importlib.import_module(words[2]), words[3:], *less)
    return command


def test_every_command_runs(run, world, tmp_path, capsys):
    for kind in ("tumor", "non_tumor"):                                # the reader's own tiles: two classes, four regions
        (tmp_path / "tiles" / kind).mkdir(parents=True)
        for i, path in enumerate(sorted((world / "images").glob("captions-*"))[:16]):
            if i % 2 == (kind == "tumor"):
                shutil.copyfile(path, tmp_path / "tiles" / kind / f"R{i % 8 // 2}_{i}.jpg")
    for line in commands():
        try:
            run(line)
        except (SystemExit, Exception) as error:
            raise AssertionError(f"the README's command `{line}` fails: {error!r}") from error
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()
    shown = capsys.readouterr().out
    assert "sft.jsonl" in shown and "in order" in shown and '"real_tissue"' in shown


def test_commands_are_found():
    found = commands()
    assert {"make demo", "make test", "make study", "python -m nanopatho.study table"} <= set(found)
    assert {f"train_{s}.py" for s in SCRIPTS} == set(re.findall(r"train_\w+\.py", "\n".join(found)))
    assert sum("--preset 7b" in line for line in found) == 4
    assert 'make test' in (ROOT / ".ci" / "run").read_text()           # the check of every change calls what is shown


def test_every_path_exists():
    looks = [t for t in INLINE if re.fullmatch(r"[\w./-]+", t) and ("/" in t or re.search(r"\.(\w{2,5})$", t))]
    looks += re.findall(r"\]\(([^)]+)\)", PROSE) + re.findall(r'src="([^"]+)"', PROSE)
    checked = [p for p in looks if not p.startswith(("http", *MADE_LATER)) and p not in NAMES_IN_FOLDERS]
    assert len(checked) > 10 and [p for p in checked if not (ROOT / p).exists()] == []


def test_the_layout_is_the_repositorys():
    tree = next(body for kind, body in BLOCKS if kind == "text" and body.startswith("train_clip.py"))
    folder, named = "", set()
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else ""
        named.add(folder + name)
        folder = name if name.endswith("/") else folder
    assert [p for p in sorted(named) if not (ROOT / p).exists()] == []
    real = {str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.py"), *ROOT.glob("nanopatho/*.py"), *ROOT.glob("data_prep/*.py")]
            if not p.name.startswith("__")}
    assert real - named == set()


def test_every_option_and_column_exists(capsys):
    known = {name for s in SCRIPTS.values() for name in s.Config.__dataclass_fields__} | set(prep.FIELDS) | {"help", "dry", "world"}
    for main, argv in ((evaluate.main, ["qa", "--help"]), (prep.main, ["write", "--help"]), (prep.main, ["pdf", "--help"])):
        with pytest.raises(SystemExit):
            main(argv)
        known |= set(re.findall(r"--(\w+)", capsys.readouterr().out))
    flags = {f for text in INLINE if not text.startswith("python -m") for f in re.findall(r"--(\w+)", text)}
    assert len(flags) > 10 and flags - known == set()
    table = PROSE[PROSE.index("| you see |"):].split("\n\n")[0]
    columns = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert columns and columns <= set(report.METRICS)


def test_what_is_said_of_the_sizes():
    cells = len(prep.shares(prep.FIELDS["subfields"][0])) * 3 * 4
    assert f"{cells} of the 60 cells" in TEXT and len(prep.shares(prep.PRESETS["small"]["subfields"])) * 12 == 60
    assert prep.FIELDS["answers"][0] == "text" and "answers" not in prep.PRESETS["small"]
    assert f"{sum(p.numel() for p in PathoVLM(presets.VLM['tiny']).parameters()) / 1e6:.0f}" == "2"   # "two million weights"
    assert presets.TRAIN["tiny"]["sft"]["train"] == "projector,decoder"                      # "freezes the vision tower"
    assert len(TEXT.splitlines()) <= 460 and (ROOT / "docs" / "contact_sheet.png").stat().st_size < 900_000


def test_the_record_is_a_record():
    record = json.loads(next(body for kind, body in BLOCKS if kind == "json"))
    assert [check_record(record, use) for use in ("caption", "sft", "question")] == [[], [], []]


def test_tables_have_not_drifted():
    found = [strict(p) if p.is_file() else None for p in (ROOT / "docs" / "study.json", ROOT / "docs" / "demo.json")]
    assert study_figure.fill(TEXT, study_figure.tables(*found)) == TEXT, "run `python -m nanopatho.study table`"
    figure = ROOT / "docs" / "study.svg"
    assert (figure.read_text(encoding="utf-8") if figure.is_file() else None) == (
        study_figure.draw(found[0]) if found[0] else None), "run `python -m nanopatho.study table`"


def test_the_table_of_cards_is_the_dry_runs(capsys):
    rows = re.findall(r"^\| `train_(\w+)\.py ([^`]+)`[^|]*\| (\d+) \| ([\d.]+) \|$", TEXT, re.M)
    assert len(rows) > 5
    for stage, line, world, told in rows:
        with pytest.raises(SystemExit) as ended:
            presets.parse(SCRIPTS[stage].Config, stage, [*line.split(), "--dry-run", "--world", world])
        plain, recomputed = re.search(r"at most +([\d.]+) +([\d.]+)", capsys.readouterr().out).groups()
        assert not ended.value.code and told == f"{float(plain if 'small' in line else recomputed):.1f}", (line, plain, recomputed)


def test_the_table_of_ingredients_is_the_committed_one():
    assert ablate.markdown(json.loads((ROOT / "docs" / "ingredients.json").read_text())) in TEXT
