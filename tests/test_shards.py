"""Shards: there and back without loss, the same bytes each time, readable by index and by plain tarfile; damage is named.

Truth: the records and image bytes that went in, and tarfile's own reading.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_prep import __main__ as command
from data_prep import records, shards
from nanopatho.data import DataError
from nanopatho.image import open_image


@pytest.fixture
def data(tmp_path):
    """captions.jsonl (23 records, a PNG or JPEG each, one image missing), sft.jsonl (two images, and one)."""
    rng, folder = np.random.default_rng(0), tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for i in range(24):
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(folder / "images" / f"{i}.{'png' if i % 2 else 'JPG'}",
                                                                          "PNG" if i % 2 else "JPEG")
    name = lambda i: f"images/{i}.{'png' if i % 2 else 'JPG'}"
    captions = [{"id": f"c/{i}", "source": "s", "license": "CC0-1.0", "split": "train", "group": f"g{i // 4}", "image": name(i),
                 "caption": f"fat, {i} µm"} for i in range(23)] + [{"id": "gone", "image": "images/none.png", "caption": "x"}]
    turn = lambda *texts: [{"role": r, "content": t} for r, t in zip(("user", "assistant") * 2, texts)]
    sft = [{"id": "two", "image": [name(3), name(4)], "messages": turn("<image><image>Same?", "No."), "level": "easy",
            "task": "reasoning", "subfield": "IHC"}, {"id": "one", "image": name(5), "messages": turn("<image>Fat?", "Yes.")}]
    records.write(folder / "captions.jsonl", captions)
    records.write(folder / "sft.jsonl", sft)
    (folder / "lexicon.json").write_text("{}")
    return folder


def pack(data, out, per_shard=10):
    return shards.pack([data / "captions.jsonl", data / "sft.jsonl"], out, per_shard)


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_there_and_back(data, tmp_path):
    pack(data, tmp_path / "s")
    assert shards.unpack(tmp_path / "s", tmp_path / "back") == [] and (tmp_path / "back" / "lexicon.json").is_file()
    for pool in ("captions", "sft"):
        before = {r["id"]: r for _, r, _ in records.lines(data / f"{pool}.jsonl", print) if r["id"] != "gone"}
        after = {r["id"]: r for _, r, _ in records.lines(tmp_path / "back" / f"{pool}.jsonl", print)}
        assert list(after) == sorted(before, key=lambda i: hashlib.sha256(i.encode()).digest())
        for i, r in before.items():
            assert {**after[i], "image": 0} == {**r, "image": 0} and isinstance(after[i].get("image"), type(r.get("image")))
            for a, b in zip(records.names_of(r), records.names_of(after[i]), strict=True):
                assert (data / a).read_bytes() == (tmp_path / "back" / b).read_bytes()


def test_the_format_as_the_docstring_says(data, tmp_path):
    card = pack(data, tmp_path / "s").data
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    assert index["format"] == "nanopatho-shards-1" and list(index["pools"]) == ["captions", "sft"]
    assert index["pools"]["captions"]["records"] == 23
    assert [s["records"] for s in index["pools"]["captions"]["shards"]] == [10, 10, 3]
    number = 0
    for shard in index["pools"]["captions"]["shards"]:
        raw = (tmp_path / "s" / shard["file"]).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == shard["sha256"] and len(raw) == shard["bytes"]
        table = json.loads((tmp_path / "s" / shard["file"]).with_suffix(".json").read_text())
        with tarfile.open(tmp_path / "s" / shard["file"]) as whole:
            names = whole.getnames()
            assert names == sorted(names, key=lambda n: (n[:9], not n.endswith(".json"), n))
            assert all(m.mtime == m.uid == 0 and not m.uname for m in whole)
        for i, ident in enumerate(table["ids"]):                          # random access: one slice, a small tar by itself
            piece = tarfile.open(fileobj=io.BytesIO(raw[table["offsets"][i]:table["offsets"][i + 1]]))
            record = json.load(piece.extractfile(f"{number:09d}.json"))
            assert record["id"] == ident and record["image"] in (f"{number:09d}.png", f"{number:09d}.jpg")
            assert piece.getnames() == [f"{number:09d}.json", record["image"]]
            Image.open(piece.extractfile(record["image"])).load()
            number += 1
        assert raw[table["offsets"][-1]:].strip(b"\0") == b""
    with tarfile.open(tmp_path / "s" / "sft-000000.tar") as tar:
        assert set(tar.getnames()) >= {f"{k:09d}.json" for k in (0, 1)}
        assert sorted(n.split(".", 1)[1] for n in tar.getnames() if not n.endswith("json")) == ["0.png", "1.jpg", "png"]
    assert card["records"] == 25 and card["images"] == 23 and card["groups"] == 7
    assert card["licenses"] == {"CC0-1.0": 23, "not told": 2} and card["dropped"] == {"an image that cannot be used": 1}
    assert card["cells"] == {"- | - | -": 24, "IHC | easy | reasoning": 1}
    assert "none.png: no such file" in (tmp_path / "s" / "dropped.jsonl").read_text()


def test_same_records_give_the_same_bytes(data, tmp_path):
    pack(data, tmp_path / "one")
    lines = (data / "captions.jsonl").read_text().splitlines()
    (data / "captions.jsonl").write_text("\n".join(reversed(lines)) + "\n")   # another order, other times of the files
    os.utime(data / "images" / "1.png", (1, 1))
    pack(data, tmp_path / "two")
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert set(one) == set(two) and all(one[n] == two[n] for n in one if n not in ("card.json", "dropped.jsonl"))


def test_a_killed_call_goes_on_to_the_same_bytes(data, tmp_path, monkeypatch):
    pack(data, tmp_path / "whole", per_shard=4)
    want, opened = files(tmp_path / "whole"), []

    def stop_at(n):
        left = iter(range(n))

        def opens(path):
            if next(left, None) is None:
                raise KeyboardInterrupt
            opened.append(path)
            return open_image(path)
        monkeypatch.setattr(shards, "open_image", opens)

    for n in (0, 6, 3, 9):                                             # 23 + 1 images, then 3: killed four times
        stop_at(n)
        with pytest.raises(KeyboardInterrupt):
            pack(data, tmp_path / "again", per_shard=4)
        assert not (tmp_path / "again").exists()
        with open(tmp_path / ".again.part" / "progress.jsonl", "a") as file:
            file.write('{"pool": "captions", "dro')                    # what a kill may leave
    stop_at(1000)
    pack(data, tmp_path / "again", per_shard=4)
    assert files(tmp_path / "again") == want and len(opened) < 27 + 4 * 4     # at most a shard is done again each time
    stop_at(7)
    with pytest.raises(KeyboardInterrupt):
        pack(data, tmp_path / "other", per_shard=4)
    stop_at(1000)
    pack(data, tmp_path / "other", per_shard=5)                         # other settings: from the beginning
    monkeypatch.undo()
    pack(data, tmp_path / "five", per_shard=5)
    assert files(tmp_path / "other") == files(tmp_path / "five")


def test_validate_reads_shards_and_names_damage(data, tmp_path, capsys):
    pack(data, tmp_path / "s")
    assert records.validate(tmp_path / "s") == [] and command.main(["validate", str(tmp_path / "s")]) == 0
    raw = bytearray((tmp_path / "s" / "captions-000001.tar").read_bytes())
    raw[600] ^= 1
    (tmp_path / "s" / "captions-000001.tar").write_bytes(raw)
    (tmp_path / "s" / "sft-000000.tar").unlink()
    problems = "\n".join(records.validate(tmp_path / "s"))
    assert "captions-000001.tar: its sha256 is not the one in index.json" in problems and "sft-000000.tar" in problems
    assert command.main(["unshard", str(tmp_path / "s"), "--out", str(tmp_path / "rest")]) == 1
    assert len((tmp_path / "rest" / "captions.jsonl").read_text().splitlines()) == 13             # the rest goes on
    (tmp_path / "s" / "index.json").write_text("{")
    with pytest.raises(DataError, match="index.json: cannot be read"):
        shards.unpack(tmp_path / "s", tmp_path / "x")


def test_a_hostile_shard(data, tmp_path):
    """Members and pools with names that lead elsewhere: refused, nothing is written outside."""
    pack(data, tmp_path / "s")
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    tar, text = tmp_path / "s" / "sft-000000.tar", json.dumps({"id": "x", "caption": "y", "image": "../../up.jpg"}).encode()
    with tarfile.open(tar, "w") as out:
        for name, body in (("0.json", text), ("../../up.jpg", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            out.addfile(info, io.BytesIO(body))
    tar.with_suffix(".json").write_text(json.dumps({"ids": ["x"], "offsets": [0, tar.stat().st_size]}))
    index["pools"]["sft"]["shards"][0]["sha256"] = hashlib.sha256(tar.read_bytes()).hexdigest()
    (tmp_path / "s" / "index.json").write_text(json.dumps(index))
    before = set(files(tmp_path))
    problems = shards.unpack(tmp_path / "s", tmp_path / "a" / "back")
    assert len(problems) == 1 and "sft-000000.tar: it leads out of the folder" in problems[0]
    assert all(n.startswith("a/back/") for n in set(files(tmp_path)) - before)


def test_places(data, tmp_path):
    shutil.copytree(data, tmp_path / "again")
    with pytest.raises(DataError, match="have one name"):
        shards.pack([data / "sft.jsonl", tmp_path / "again" / "sft.jsonl"], tmp_path / "s")
    assert not (tmp_path / "s").exists()
    with pytest.raises(DataError, match="is not empty"):
        pack(data, data)
    assert command.main(["shard", str(data / "sft.jsonl"), "--out", str(tmp_path / "t"), "--per_shard", "1"]) == 0
    assert len(list((tmp_path / "t").glob("*.tar"))) == 2
    with pytest.raises(DataError, match="cannot be read.*data_prep shard makes"):
        shards.unpack(data, tmp_path / "u")
    assert not (tmp_path / "u").exists() and not list(tmp_path.glob(".*part"))
