"""Records and their images <-> tar shards, for sets of many small files and for streaming from a network drive.

A shard folder holds, for every pool (captions, sft, rl, …: the name of the JSONL file it was made from):

  captions-000000.tar    for each record KEY.json, then KEY.jpg (or KEY.0.jpg, KEY.1.jpg … if it has a list of images);
                         KEY is its number in the pool, nine digits, ascending. WebDataset reads such files too.
                         KEY.json is the record itself; its "image" names the members, text or list as it was.
  captions-000000.json   {"ids": [id of each record], "offsets": [n + 1 numbers]}: bytes offsets[i] to offsets[i + 1] of
                         the tar are the members of record i, whole tar blocks: read the slice, tarfile.open(BytesIO).
  index.json             {"format": "nanopatho-shards-1", "pools": {"captions": {"records": N, "shards":
                         [{"file": "captions-000000.tar", "records": n, "bytes": b, "sha256": "…"}, …]}}}, written last
  card.json, dropped.jsonl, and lexicon.json, zero_shot.json where they lay beside the records

Records come in the order of sha256(id), which mixes sources and classes and depends on nothing else. Equal records and
images give equal bytes. Images are copied as they are; what training could not open is dropped and named.
"""
import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
from pathlib import Path

from tqdm import tqdm

from data_prep import records
from data_prep.archives import DAMAGED, Bomb, Limited, safe_name
from nanopatho.data import DataError
from nanopatho.image import ImageError, open_image

FORMAT = "nanopatho-shards-1"
UNUSABLE = "an image that cannot be used"


def pack(files, out, per_shard=1000):
    """JSONL files -> shard folder; returns its Card. DataError before anything is written. Called again after a kill,
    it keeps the shards that were complete; the result is the same, byte for byte."""
    files, index = [Path(f) for f in files], {"format": FORMAT, "pools": {}}
    if len({f.stem for f in files}) < len(files):
        raise DataError(f"two of {', '.join(map(str, files))} have one name, and each becomes a pool of that name")
    begun = {"per_shard": per_shard, "files": [[os.path.abspath(f), os.path.getsize(f), os.path.getmtime(f)]
                                               for f in files if f.is_file()]}
    with records.new_folder(out, begun) as folder, records.Card(folder, files, per_shard=per_shard) as card:
        progress = folder / "progress.jsonl"                             # one line a finished shard
        progress.touch()
        done = [json.loads(line) for line in progress.read_bytes().split(b"\n")[:-1]]
        progress.write_text("".join(json.dumps(row) + "\n" for row in done))      # without a torn last line
        for file in files:
            found = ((hashlib.sha256(r["id"].encode()).digest(), at) for _, r, at in records.lines(file, card.drop))
            order, shards, kept = iter(tqdm(sorted(found), unit="record", desc=file.stem)), [], 0
            for row in (row for row in done if row["pool"] == file.stem):
                count_again(file, order, card, row)
                shards.append(row["shard"])
                kept += row["shard"]["records"]
            while True:
                row = {"pool": file.stem, "dropped": {}}
                pairs = itertools.islice(usable(file, order, card, row), per_shard)
                first = next(pairs, None)
                if first is None:
                    break
                path = folder / f"{file.stem}-{len(shards):06d}.tar"
                shards.append(write_shard(path, kept, itertools.chain([first], pairs)))
                kept += shards[-1]["records"]
                with open(progress, "a") as log:
                    log.write(json.dumps({**row, "shard": shards[-1]}) + "\n")
            index["pools"][file.stem] = {"records": kept, "shards": shards}
            copy_beside(file.parent, folder)
        progress.unlink()
        (folder / "index.json").write_text(json.dumps(index, indent=1))
    return card


def copy_beside(folder, out):
    for name in ("lexicon.json", "zero_shot.json"):
        if os.path.isfile(f"{folder}/{name}"):
            shutil.copyfile(f"{folder}/{name}", f"{out}/{name}")


def usable(file, order, card, row):
    """-> generator of (record, [(suffix, bytes of the image)]) in the order of (hash, byte offset). row: "last" becomes
    the offset of the last one given, "dropped" {offset: why}."""
    with open(file, "rb") as source:
        for _, at in order:
            source.seek(at)
            record, images = json.loads(source.readline()), []
            try:
                for path in (file.parent / name for name in records.names_of(record)):
                    open_image(path)
                    images.append((path.suffix.lower(), path.read_bytes()))
            except ImageError as error:
                row["dropped"][str(at)] = str(error)
                card.drop(f"{file}: {record['id']}", UNUSABLE, str(error))
                continue
            card.count(record)
            row["last"] = at
            yield record, images


def count_again(file, order, card, row):
    """Take from `order` what a finished shard took, and tell the card; no image is opened."""
    with open(file, "rb") as source:
        for _, at in order:
            source.seek(at)
            record = json.loads(source.readline())
            if str(at) in row["dropped"]:
                card.drop(f"{file}: {record['id']}", UNUSABLE, row["dropped"][str(at)])
            else:
                card.count(record)
            if at == row["last"]:
                return


def write_shard(path, first, pairs):
    """Records with images -> one tar and its offsets -> its entry in the index. first: number of the first record."""
    ids, offsets = [], []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (record, images) in enumerate(pairs, first):
            many = isinstance(record.get("image"), list)
            names = [f"{number:09d}{f'.{i}' if many else ''}{suffix}" for i, (suffix, _) in enumerate(images)]
            record = records.renamed(record, names)
            ids.append(record["id"])
            offsets.append(tar.offset)
            text = json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
            for name, data in [(f"{number:09d}.json", text), *zip(names, (data for _, data in images))]:
                member = tarfile.TarInfo(name)                           # time 0, user 0: nothing of this machine
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        offsets.append(tar.offset)
    path.with_suffix(".json").write_text(json.dumps({"ids": ids, "offsets": offsets}))
    with open(path, "rb") as tar:
        sha = hashlib.file_digest(tar, "sha256").hexdigest()
    return {"file": path.name, "records": len(ids), "bytes": path.stat().st_size, "sha256": sha}


def read(folder, problem):
    """Shard folder -> generator of (pool, where, record, {name: bytes}). problem(text) is called for what is wrong."""
    folder = Path(folder)
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}/index.json: cannot be read ({error}); data_prep shard makes such folders") from error
    if index.get("format") != FORMAT:
        raise DataError(f"{folder}/index.json: format {index.get('format')!r}, this reads {FORMAT}")
    for pool, entry in index["pools"].items():
        for shard in entry["shards"]:
            path = folder / safe_name(shard["file"])
            try:
                with open(path, "rb") as tar:
                    if hashlib.file_digest(tar, "sha256").hexdigest() != shard["sha256"]:
                        raise ValueError("its sha256 is not the one in index.json; copy it again")
                    table = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
                    for i, (start, end) in enumerate(zip(table["offsets"], table["offsets"][1:])):
                        tar.seek(start)
                        where, data = f"{path}: {table['ids'][i]}", members_of(tar.read(end - start))
                        record = json.loads(data.pop(next(iter(data))))
                        yield pool, where, record, data
            except (*DAMAGED, Bomb, KeyError, IndexError, StopIteration) as error:
                problem(f"{path}: {error or type(error).__name__}")


def members_of(piece):
    """Slice of a tar -> {name: bytes}, in order."""
    with tarfile.open(fileobj=Limited(io.BytesIO(piece), len(piece)), mode="r:") as tar:
        data = {safe_name(m.name): piece[m.offset_data:m.offset_data + m.size] for m in tar if m.isreg()}
    if any("/" in name for name in data):
        raise ValueError("a member with a folder in its name")
    return data


def unpack(folder, out):
    """Shard folder -> OUT/POOL.jsonl and OUT/images/POOL/… -> list of problems."""
    problems, pools = [], {}
    with records.new_folder(out) as part, contextlib.ExitStack() as stack:
        for pool, _, record, images in read(folder, problems.append):
            if pool not in pools:
                (part / "images" / safe_name(pool)).mkdir(parents=True)
                pools[pool] = stack.enter_context(open(part / f"{pool}.jsonl", "w", encoding="utf-8"))
            for name, data in images.items():
                (part / "images" / pool / name).write_bytes(data)
            record = records.renamed(record, [f"images/{pool}/{safe_name(n)}" for n in records.names_of(record)])
            pools[pool].write(json.dumps(record, ensure_ascii=False) + "\n")
        copy_beside(folder, part)
    return problems


# --- whole groups to train, val and test ------------------------------------------------------------------------------

def split(files, out, *, seed=0, shares=(0.15, 0.15), again=False):
    """JSONL files -> OUT/{captions,sft,rl,val,test,…}.jsonl as the four scripts read them, whole groups in one split.

    A published split is kept (again=True: all drawn anew); groups without one are drawn, test first, then val. shares:
    of (test, val). val and test hold choices; other held-out records go to val_caption, test_caption, … DataError names
    groups that the publisher put into two splits. Images stay where they are. -> Card
    """
    sizes, published = {}, {}
    group_of = lambda r: r.get("group") or str(r.get("image") or r["id"])
    for file in files:
        for _, r, _ in records.lines(file, lambda *_: None):             # faults are told on the second pass
            sizes[group_of(r)] = sizes.get(group_of(r), 0) + 1
            if r.get("split") and not again:
                published.setdefault(group_of(r), set()).add(r["split"])
    torn = sorted(g for g, s in published.items() if len(s) > 1)
    if torn:
        raise DataError(f"{len(torn)} groups are in two published splits, such as {', '.join(torn[:5])}: that leaks. "
                        "Add --again to draw the splits anew, by group")
    drawn = records.split_groups({g: n for g, n in sizes.items() if g not in published}, seed, shares)
    drawn.update({g: s.pop() for g, s in published.items()})
    train, pools = {"caption": "captions", "sft": "sft", "question": "rl", "any": "others"}, {}
    with records.new_folder(out) as folder, contextlib.ExitStack() as stack, \
            records.Card(folder, files, seed=seed, shares=shares) as card:
        for file in files:
            for _, r, _ in records.lines(file, card.drop):
                r["split"], use = drawn[group_of(r)], records.use_of(r)
                r = records.renamed(r, [os.path.relpath(Path(file).parent / n, out) for n in records.names_of(r)])
                held_out = r["split"] if use == "question" else f"{r['split']}_{use}"
                pool = train[use] if r["split"] == "train" else held_out
                if pool not in pools:
                    pools[pool] = stack.enter_context(open(folder / f"{pool}.jsonl", "w", encoding="utf-8"))
                pools[pool].write(json.dumps(r, ensure_ascii=False) + "\n")
                card.count(r)
    return card
