"""Records on disk: the validator finds each kind of fault, the commands work end to end, folders become records."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import __main__ as command
from data_prep import records
from nanopatho.data import DataError

ROOT = Path(__file__).resolve().parents[1]
BCSS = Path(os.environ.get("NANOPATHO_SHARED", ROOT.parent / "shared")) / "data" / "bcss"
FEW = "--captions 5 --sft 6 --rl 4 --val 3 --test 3 --test_combo 3 --test_stain 3".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "data"
    assert command.main(["microworld", "--preset", "smoke", "--out", str(out), *FEW]) == 0
    return out


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- microworld

def test_the_command_from_end_to_end(tmp_path):
    """As a user starts it; a second call returns at once, one with other settings refuses."""
    call = ["microworld", "--preset", "smoke", *FEW, "--workers", "2", "--out", str(tmp_path / "d")]
    run = lambda: subprocess.run([sys.executable, "-m", "data_prep", *call], cwd=ROOT, capture_output=True, text=True)
    first = run()
    assert first.returncode == 0, first.stderr
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "d").rglob("*")}
    second = run()
    assert second.returncode == 0 and "already there" in second.stdout
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "d").rglob("*")}
    with pytest.raises(SystemExit, match="p_hasty: 0.15 there, 0.5 asked for.*--out"):
        command.main([*call, "--p_hasty", "0.5"])


def test_what_is_written(made):
    names = {f"{pool}.jsonl" for pool in command.POOLS} | {"images", "lexicon.json", "zero_shot.json", "card.json"}
    assert {p.name for p in made.iterdir()} == names
    card = json.loads((made / "card.json").read_text())
    everything = [r for pool in command.POOLS for r in rows(made / f"{pool}.jsonl")]
    assert card["pools"]["sft"] == 6 and card["images"] == len(everything) == 27
    assert sum(n for levels in card["cells"]["sft"].values() for tasks in levels.values() for n in tasks.values()) == 6
    assert sum(card["letters"]["rl"].values()) == 4
    assert len({r["id"] for r in everything}) == len({r["group"] for r in everything}) == 27
    assert json.loads((made / "lexicon.json").read_text())["H&E"]["material"]["!keratin"] == ["no keratin pearls"]
    for r in everything:
        with Image.open(made / r["image"]) as image:
            assert image.size == (112, 112) and image.format == "JPEG"
        assert r["measured"] and r["facts"]["stain_shift"] == r["id"].startswith("test_stain")


def test_an_image_can_be_drawn_again_with_its_masks(made):
    from data_prep.render import draw
    from data_prep.world import for_drawing
    r = rows(made / "sft.jsonl")[0]
    image, masks, measured = draw(for_drawing(r["facts"]), 112)
    assert masks and {k: round(float(v), 4) for k, v in measured.items()} == r["measured"]
    again = np.asarray(Image.open(made / r["image"])).astype(float)                  # JPEG loses some
    assert np.abs(again - image).mean() < 12


def test_a_broken_off_call_goes_on_with_its_complete_pools(made, tmp_path, monkeypatch, capsys):
    def fail(path, rows, write=records.write):
        if path.name == "rl.jsonl":
            raise KeyboardInterrupt
        write(path, rows)
    out = tmp_path / "d"
    call = ["microworld", "--preset", "smoke", *FEW, "--workers", "1", "--out", str(out)]
    monkeypatch.setattr(records, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        command.main(call)
    assert not out.exists()
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="seed: 1 there, 3 asked for"):
        command.main([*call, "--seed", "3"])
    assert command.main(call) == 0
    assert "complete there and kept: captions, sft" in capsys.readouterr().out
    assert not (tmp_path / "d.part").exists()
    for pool in command.POOLS:                                                       # same data as in one go
        assert (out / f"{pool}.jsonl").read_text() == (made / f"{pool}.jsonl").read_text()


@pytest.mark.parametrize("more,told", [
    (["--subfields", "H&E:1,liver:2"], "liver"), (["--subfields", "H&E"], "name:share"),
    (["--p_missing", "1.5"], "p_missing"), (["--p_routine", "-0.1"], "p_routine"),
    (["--captions", "-1"], "captions"), (["--answers", "both"], "text or letter"), (["--size", "28"], "60 um"),
    ("--mcq 0 --description 0 --reasoning 0 --conversation 0".split(), "all 0"),
    (["--verbosity", "loud"], "short, long")])
def test_wrong_fields_are_told_before_anything_is_drawn(tmp_path, more, told):
    with pytest.raises(SystemExit, match=told):
        command.main(["microworld", "--out", str(tmp_path / "d"), *more])
    assert not list(tmp_path.iterdir())


def test_unknown_preset_and_field_end_with_a_list(tmp_path, capsys):
    for more, told in ((["--preset", "huge"], "smoke"), (["--colour", "7"], "--colour")):
        with pytest.raises(SystemExit):
            command.main(["microworld", "--out", str(tmp_path / "d"), *more])
        assert told in capsys.readouterr().err


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit, match="cannot write"):
        command.main(["microworld", "--preset", "smoke", "--out", str(tmp_path / "file" / "d")])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(SystemExit, match="no card.json"):
        command.main(["microworld", "--preset", "smoke", "--out", str(tmp_path / "full")])
    assert (tmp_path / "full" / "thesis.txt").read_text() == "x"


# ---------------------------------------------------------------- validate

@pytest.mark.parametrize("name", [*command.OWN, *command.RUN])
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main([name, "--help"])
    assert ended.value.code == 0 and f"python -m data_prep {name}" in capsys.readouterr().out and name in command.__doc__


def test_what_was_written_is_in_order(made, capsys):
    assert command.main(["validate", *(str(p) for p in made.glob("*.jsonl"))]) == 0
    assert "in order" in capsys.readouterr().out
    assert len(records.read(made / "sft.jsonl")) == 6


ASKED, REPLY = {"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "A"}
GOOD = {"id": "a", "image": "i.png", "caption": "fat", "question": "Which?",
        "options": ["fat", "mucin", "bone", "skin"], "answer": "A", "messages": [ASKED, REPLY], "level": "easy",
        "task": "mcq", "subfield": "H&E", "split": "train", "facts": {}}


@pytest.mark.parametrize("change,field", [
    ({"id": ""}, "id"), ({"id": 7}, "id"), ({"image": "missing.png"}, "image"), ({"image": "cut.jpg"}, "image"),
    ({"image": 3}, "image"), ({"options": ["fat", "Fat ", "bone", "skin"]}, "options"), ({"options": "fat"}, "options"),
    ({"options": ["fat"]}, "options"), ({"answer": "E"}, "answer"), ({"answer": "fat"}, "answer"),
    ({"level": "simple"}, "level"), ({"task": "quiz"}, "task"), ({"subfield": "MRI"}, "subfield"),
    ({"split": "dev"}, "split"), ({"facts": "none"}, "facts"), ({"caption": " "}, "caption"),
    ({"messages": [{"role": "user", "content": "Which?"}, REPLY]}, "messages"), ({"messages": [ASKED]}, "messages"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "messages"),
])
def test_every_kind_of_fault_is_found(tmp_path, capsys, change, field):
    Image.new("RGB", (60, 60)).save(tmp_path / "i.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    records.write(tmp_path / "x.jsonl", [GOOD, {**GOOD, "id": "b", **change}])
    problems = records.validate(tmp_path / "x.jsonl")
    assert problems
    assert all(f"x.jsonl:2 id={change.get('id', 'b')}" in p and f"'{field}'" in p for p in problems), problems
    assert command.main(["validate", str(tmp_path / "x.jsonl")]) == 1
    assert field in capsys.readouterr().out


def test_all_faults_are_told_at_once(tmp_path):
    Image.new("RGB", (60, 60)).save(tmp_path / "i.png")
    lines = [json.dumps(GOOD), '{"id": "cut', "[1, 2]", json.dumps(GOOD), json.dumps({"id": "c"}),
             json.dumps({**GOOD, "id": "d", "answer": "Z"})]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    problems = "\n".join(records.validate(tmp_path / "x.jsonl"))
    for told in ("x.jsonl:2: not valid JSON", "x.jsonl:3", "already used on line 1", "id=c", "none of the fields",
                 "id=d", "'Z'"):
        assert told in problems
    with pytest.raises(DataError):
        records.read(tmp_path / "x.jsonl")
    assert "no such file" in records.validate(tmp_path / "y.jsonl")[0]
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "no records" in records.validate(tmp_path / "empty.jsonl")[0]


def test_text_that_is_none_and_records_without_use(tmp_path):
    Image.new("RGB", (60, 60)).save(tmp_path / "i.png")
    lines = [json.dumps(GOOD).encode(), b'{"id": "b", "image": "i.png", "caption": "\xff"}',
             b'{"id": "c", "image": "i.png", "caption": "\\ud800 \\u00e9"}', b'{"id": "d", "image": "i.png", "caption": "a\\u0000"}',
             b'{"id": "e", "image": "i.png", "question": "Open?"}', b'{"id": "f", "facts": {"tissue": "fat"}}',
             b'{"id": "g", "image": "i.png", "question": "Open?", "answer": "fat"}', b"[" * 100_000]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    problems = records.validate(tmp_path / "x.jsonl")
    told = [("x.jsonl:2: not UTF-8 text",), ("id=c", "'caption' holds a NUL byte or bytes that are no UTF-8"), ("id=d", "NUL byte"),
            ("id=e", "'answer' is missing"), ("id=f", "'image' is missing"), ("x.jsonl:8: not valid JSON",)]
    assert len(problems) == 6 and all(t in p for p, parts in zip(problems, told) for t in parts), problems
    with open(tmp_path / "x.jsonl", "rb") as file:                       # the byte offsets lead back to the records
        for _, record, at in records.lines(tmp_path / "x.jsonl", lambda *_: None):
            file.seek(at)
            assert json.loads(file.readline()) == record


def test_what_is_shown_as_trained(tmp_path, capsys):
    """The green parts are the assistant's turns with their end and nothing else, and all parts give the whole text."""
    from nanopatho.chat import train_tokenizer
    tokenizer, turns = train_tokenizer(["Which fat? µ"], 300), [{"role": "user", "content": "<image>Which µ?"},
                                                               {"role": "assistant", "content": "fat"},
                                                               {"role": "user", "content": "Sure?"}, REPLY]
    cut = lambda text: (text.split("[")[0], [part.split("]") for part in text.split("[")[1:]])
    head, parts = cut(records.show({"id": "a", "image": "i.png", "messages": turns}, tokenizer, ("[", "]")))
    assert head == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
                    "<|vision_end|>Which µ?<|im_end|>\n<|im_start|>assistant\n")
    assert parts == [["fat<|im_end|>", "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"], ["A<|im_end|>", "\n"]]
    caption = records.show({"id": "a", "image": ["i.png", "j.png"], "caption": "fat"}, tokenizer, ("[", "]"))
    assert caption == "<|vision_start|><|image_pad|><|vision_end|>" * 2 + "[fat<|endoftext|>]"
    assert "[" not in records.show({**{k: GOOD[k] for k in ("id", "image", "question", "options")}}, tokenizer, ("[", "]"))
    Image.new("RGB", (60, 60)).save(tmp_path / "i.png")
    records.write(tmp_path / "x.jsonl", [GOOD, {**GOOD, "id": "b"}])
    assert command.main(["validate", str(tmp_path / "x.jsonl"), "--show", "2"]) == 0
    assert capsys.readouterr().out.count("[trained: A<|im_end|>]") == 2


# ---------------------------------------------------------------- splits by group

def caption(i, group, **more):
    return {"id": f"r{i}", "image": "i.png", "caption": "fat", "group": group, **more}


def test_split_keeps_groups_whole_and_published_splits(tmp_path, capsys):
    Image.new("RGB", (60, 60)).save(tmp_path / "i.png")
    asked = {k: v for k, v in GOOD.items() if k not in ("messages", "split", "caption")}
    made = [caption(i, f"g{i % 20}") for i in range(200)] + [{**asked, "id": f"q{i}", "group": f"g{i}"} for i in range(20)]
    made += [caption(i, f"p{i % 2}", split=("val", "test")[i % 2]) for i in range(200, 210)]
    records.write(tmp_path / "a.jsonl", made)
    assert command.main(["split", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "o" / "s")]) == 0
    pools = {p.stem: rows(p) for p in (tmp_path / "o" / "s").glob("*.jsonl") if p.stem != "dropped"}
    assert set(pools) == {"captions", "rl", "val", "test", "val_caption", "test_caption"}
    assert sorted(r["id"] for p in pools.values() for r in p) == sorted(r["id"] for r in made)
    split = {r["group"]: r["split"] for p in pools.values() for r in p}                        # every record of a group agrees
    assert all(split[r["group"]] == r["split"] == (pool.split("_")[0] if pool[0] in "vt" else "train")
               for pool, p in pools.items() for r in p)
    assert split["p0"] == "val" and split["p1"] == "test"
    assert [sum(split[f"g{i}"] == s for i in range(20)) for s in ("train", "val", "test")] == [14, 3, 3]   # 15 % of 20 groups each
    groups = {}
    assert all(records.validate(tmp_path / "o" / "s" / f"{pool}.jsonl", groups) == [] for pool in pools)
    card = json.loads((tmp_path / "o" / "s" / "card.json").read_text())
    assert card["records"] == 230 and card["groups"] == 22 and card["cells"] == {"- | - | -": 210, "H&E | easy | mcq": 20}
    records.write(tmp_path / "b.jsonl", [caption(0, "g", split="train"), caption(1, "g", split="test"), caption(2, "h")])
    call = ["split", str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "t")]
    with pytest.raises(DataError, match="1 groups are in two published splits, such as g: that leaks. Add --again"):
        command.main(call)
    assert not (tmp_path / "t").exists() and command.main([*call, "--again"]) == 0
    assert len({r["split"] for p in (tmp_path / "t").glob("*captions*") for r in rows(p) if r["group"] == "g"}) <= 1
    with pytest.raises(DataError, match="c.jsonl: no such file"):
        command.main(["split", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "u")])


# ---------------------------------------------------------------- a folder of real images

@pytest.fixture
def tiles(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("tumor", "non_tumor"):
        (tmp_path / "tiles" / name).mkdir(parents=True)
        for i in range(12):
            image = Image.fromarray(rng.integers(0, 255, (56, 56, 3), np.uint8))
            image.save(tmp_path / "tiles" / name / f"slide{i // 3}_{i}.png")
    return tmp_path / "tiles"


def test_folder_becomes_records_split_by_group(tiles, tmp_path, capsys):
    out = tmp_path / "out"
    labels = "tumor=invasive tumor,non_tumor=other tissue"
    assert command.main(["folder", str(tiles), "--out", str(out), "--labels", labels]) == 0
    pools = {p.stem: rows(p) for p in out.glob("*.jsonl")}
    groups = {split: {r["group"] for name in names for r in pools[name]}
              for split, names in (("train", ("captions", "sft", "rl")), ("val", ("val",)), ("test", ("test",)))}
    assert all(groups.values()) and not groups["train"] & groups["test"]
    assert not groups["val"] & (groups["train"] | groups["test"])
    assert len(pools["captions"]) + len(pools["val"]) + len(pools["test"]) == 24
    assert command.main(["validate", *(str(p) for p in out.glob("*.jsonl"))]) == 0
    for r in pools["test"]:
        right = r["options"]["ABCD".index(r["answer"])]
        assert right == ("invasive tumor" if "/tumor/" in r["image"] else "other tissue") and len(r["options"]) == 4
    assert {"invasive tumor", "other tissue"} == {r["facts"]["tissue"] for r in pools["rl"]}


def test_folder_tells_what_is_wrong(tiles, tmp_path):
    call = lambda *more: command.main(["folder", *map(str, more)])
    with pytest.raises(SystemExit, match="no such folder"):
        call(tmp_path / "nowhere", "--out", tmp_path / "o")
    with pytest.raises(SystemExit, match="lung.*non_tumor, tumor"):
        call(tiles, "--out", tmp_path / "o", "--labels", "lung=lung")
    with pytest.raises(SystemExit, match="folder=name"):
        call(tiles, "--out", tmp_path / "o", "--labels", "tumor")
    with pytest.raises(SystemExit, match="not empty"):
        call(tiles, "--out", tiles)
    (tiles / "tumor" / "slide9_x.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="slide9_x.png"):
        call(tiles, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_groups_are_split_whole():
    for n in range(1, 8):
        groups = {f"g{i}": 10 + i for i in range(n)}
        split = records.split_groups(groups, seed=0)
        assert set(split) == set(groups) and "train" in split.values()
        assert ("test" in split.values()) == (n > 1) and ("val" in split.values()) == (n > 2)


@pytest.mark.skipif(not BCSS.is_dir(), reason=f"no real tiles at {BCSS}: set NANOPATHO_SHARED to their root")
def test_real_tiles(tmp_path):
    labels = {"tumor": "invasive tumor tissue", "non_tumor": "tissue without tumor"}
    card = records.folder(BCSS, tmp_path / "o", labels=labels)
    assert {g: n for g, (_, n) in card["groups"].items()} == {"roi1008": 67, "roi1015": 67, "roi1019": 84}
    assert sorted(s for s, _ in card["groups"].values()) == ["test", "train", "val"]
    for pool in ("captions", "sft", "rl", "val", "test"):
        assert records.validate(tmp_path / "o" / f"{pool}.jsonl") == []
