"""The stream of shards: every record once a pass, wherever it is stopped and however it is split; damage is named.

Truth: the records and pictures that were packed, and arithmetic on their numbers.
"""

import collections
import io
import itertools
import json
import multiprocessing
import os
import resource
import signal
import threading
import time

import numpy as np
import pytest
from PIL import Image

from data_prep import records as prep
from data_prep import shards
from nanopatho import stream as module
from nanopatho.data import DataError, augment
from nanopatho.log import ConfigError
from nanopatho.stream import batches, images_of, mixture, shard_folders, source, stream


def jpeg(rng, side=24):
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (side, side + 4, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write(folder, pool, n, per_shard=10, picture=None):
    """A shard folder of n synthetic records by shards.write_shard, so in its own format, without files on the way."""
    rng, index = np.random.default_rng(n), []
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, n, per_shard):
        pairs = (({"id": f"{pool}-{i}", "image": "x.jpg", "caption": f"number {i}"}, [(".jpg", picture or jpeg(rng))])
                 for i in range(first, min(n, first + per_shard)))
        index.append(shards.write_shard(folder / f"{pool}-{first // per_shard:06d}.tar", first, pairs))
    file, before = folder / "index.json", {}
    if file.is_file():
        before = json.loads(file.read_text())["pools"]
    pools = {**before, pool: {"records": n, "shards": index}}
    file.write_text(json.dumps({"format": shards.FORMAT, "pools": pools}))
    return source(folder, pool)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write(folder, "a", 97), write(folder, "b", 31)
    return folder


def take(n, *args, **options):
    """The first n batches -> (ids of each, last state)."""
    found, generator = [], stream(*args, **options)
    for _ in range(n):
        rows, state = next(generator)
        found.append([r["id"] for r in rows])
    return found, state


@pytest.mark.parametrize("workers", [0, 2])
def test_every_record_once_a_pass_with_the_pictures_that_were_packed(folder, workers):
    generator, seen, orders = stream([source(folder, "a")], 97, window=3, workers=workers), {}, []
    for _ in range(2):                                                  # two passes: a batch is one
        rows, _ = next(generator)
        orders.append([r["id"] for r in rows])
        seen.update((r["id"], images_of(r)[0]) for r in rows)
    assert all(sorted(o) == sorted(f"a-{i}" for i in range(97)) for o in orders) and orders[0] != orders[1]
    packed = {r["id"]: images[r["image"]] for _, _, r, images in shards.read(folder, pytest.fail) if r["id"] in seen}
    assert all(np.array_equal(seen[i], np.asarray(Image.open(io.BytesIO(b)))) for i, b in packed.items())
    # window 3 of 10 records a shard: any 30 draws in a row of one group come from at most 3 shards
    assert all(len({int(i[2:]) // 10 for i in orders[0][at:at + 10]}) <= 3 for at in (0, 10, 20))
    assert len({int(i[2:]) // 10 for i in orders[0][:10]}) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_anywhere_it_goes_on_exactly(folder, workers):
    sources = [source(folder, "a"), source(folder, "b")]
    whole, _ = take(40, sources, 7, seed=3, window=2)                     # 280 records: both sources begin again
    for at in (1, 13, 14, 29) if not workers else (13,):
        before, state = take(at, sources, 7, seed=3, window=2, workers=workers)
        state = json.loads(json.dumps(state))                             # what can be kept in a file
        after, _ = take(40 - at, sources, 7, seed=3, window=2, workers=workers, state=state)
        assert before + after == whole
        assert len(json.dumps(state)) < 300
    assert take(40, sources, 7, seed=4, window=2)[0] != whole
    with pytest.raises(DataError, match="seed, window and numbers of records"):
        take(1, sources, 7, seed=4, window=2, state=state)


def noted(folder, log, n):
    """Go on behind the last batch noted in `log` and note each batch with its state, up to n."""
    lines = [x for x in log.read_text().splitlines() if x.endswith("}]")] if log.exists() else []   # a kill cuts lines off
    log.write_text("".join(x + "\n" for x in lines))
    state = json.loads(lines[-1])[1] if lines else None
    with open(log, "a") as file:
        for rows, state in itertools.islice(stream([source(folder, p) for p in "ab"], 7, seed=3, window=2, state=state),
                                            n - len(lines)):
            file.write(json.dumps([[r["id"] for r in rows], state]) + "\n")
            file.flush()


def test_killed_it_goes_on_exactly(folder, tmp_path):
    whole, _ = take(60, [source(folder, "a"), source(folder, "b")], 7, seed=3, window=2)
    log, left = tmp_path / "log", []
    for moment in (0.02, 0.05, 0.03, 0.04, 0.06, None):                  # kill -9 after so many seconds at work
        child = multiprocessing.get_context("fork").Process(target=noted, args=(folder, log, 60))
        child.start()
        if moment:
            time.sleep(moment)
            child.kill()
        child.join(60)
        left.append(child.exitcode)
    assert left[-1] == 0 and -9 in left
    assert [json.loads(x)[0] for x in log.read_text().splitlines()] == whole


def test_ranks_and_workers_share_the_same_batches(folder, world=4):
    sources = [source(folder, "a", 1), source(folder, "b", 1)]
    whole, state = take(20, sources, 8)
    for workers in (0, 2):
        parts = [take(20, sources, 8, mine=slice(r * 8 // world, (r + 1) * 8 // world), workers=workers) for r in range(world)]
        assert [sum(step, []) for step in zip(*(p for p, _ in parts))] == whole
        assert all(s == state for _, s in parts)                          # one rank's state serves all


def test_weights():
    """Against arithmetic: after n places a source has had its share of n, to within the number of sources."""
    sources = [dict(weight=w) for w in (5, 3, 1.5, 0.5, 0)]
    state, counts = dict(batch=0, owed=[0.0] * 5, taken=[0] * 5), collections.Counter()
    for n, (rows, state) in zip(range(500), batches(sources, 13, state)):
        counts.update(k for k, _ in rows)
        assert all(abs(counts[k] - s["weight"] / 10 * 13 * (n + 1)) <= 2 for k, s in enumerate(sources))
        assert state["taken"] == [counts[k] for k in range(5)]
    moving = batches(sources[:2], 10, dict(batch=0, owed=[0.0] * 2, taken=[0] * 2), lambda n: (9 - n, n))
    second = np.cumsum([sum(k for k, _ in next(moving)[0]) for _ in range(10)])          # a curriculum: 0, 1, … 9 of ten
    assert abs(second - np.cumsum(range(10)) * 10 / 9).max() <= 1
    with pytest.raises(DataError, match="weights .* for 2 sources"):
        next(batches(sources[:2], 1, dict(batch=0, owed=[0.0] * 2, taken=[0] * 2), lambda n: (0, 0)))


def test_turned_alike_on_every_process_and_made_in_the_worker(folder):
    a = [source(folder, "a")]
    plain, turned = next(stream(a, 8))[0], next(stream(a, 8, turn=True, workers=1))[0]
    for k, (p, t) in enumerate(zip(plain, turned)):
        assert np.array_equal(t["_images"][0], augment(p["_images"][0], np.random.default_rng([0, 0, k])))
    half = next(stream(a, 8, turn=True, mine=slice(4, 8)))[0]
    assert all(np.array_equal(x["_images"][0], y["_images"][0]) for x, y in zip(half, turned[4:]))
    made = next(stream(a, 8, workers=1, make=lambda rows, number: [r["caption"] for r in rows]))[0]
    assert made == [r["caption"] for r in plain]


def damage(folder, pool, which, how):
    """Change the bytes of some records inside the tars; lengths stay."""
    index = json.loads((folder / "index.json").read_text())["pools"][pool]["shards"]
    first = 0
    for shard in index:
        path = folder / shard["file"]
        raw, offsets = bytearray(path.read_bytes()), json.loads(path.with_suffix(".json").read_text())["offsets"]
        for i in range(shard["records"]):
            if first + i in which:
                how(raw, offsets[i], offsets[i + 1])
        first += shard["records"]
        path.write_bytes(raw)


def test_damaged_records_are_named_and_the_next_sound_one_stands_in(tmp_path, capsys):
    write(tmp_path, "c", 40)

    def picture(raw, start, end):                                         # header block, json block, header block, picture
        raw[start + 1536 + 300:end] = bytes(end - start - 1836)

    def header(raw, start, end):
        raw[start + 150] ^= 1                                            # inside the checksum

    def caption(raw, start, end):
        at = raw.index(b'"caption"', start)
        raw[at:at + 9] = b'"captiox"'

    damage(tmp_path, "c", {3, 4}, picture), damage(tmp_path, "c", {19}, header), damage(tmp_path, "c", {25}, caption)
    c = [source(tmp_path, "c")]
    found, state = take(5, c, 8)
    counts = collections.Counter(i for step in found for i in step)
    assert counts == collections.Counter({f"c-{i}": 1 for i in range(40) if i not in (3, 4, 19, 25)}) + collections.Counter(
        {"c-5": 2, "c-10": 1, "c-26": 1})                                 # 3 and 4 -> 5; the last of its shard -> the first
    told = "\n".join(state["damaged"])
    for at, why in ((3, "damaged or cut off"), (4, "damaged or cut off"), (19, "checksum"), (25, "'caption' is missing")):
        assert any(f"c-{at}: " in line and why in line for line in state["damaged"]), told
    assert len(state["damaged"]) == 4 and "c-00000" in told and told.count("\n") == 3
    assert capsys.readouterr().err.count("damaged: ") == 4
    assert len(take(5, c, 8, state=state)[1]["damaged"]) == 4             # the second pass meets the same ones
    with pytest.raises(DataError, match=r"damaged records, more than --max_damaged 3.*(\n.*c-\d+: .*){4}"):
        take(5, c, 8, workers=1, max_damaged=3)


def test_folders_that_cannot_be_used(tmp_path):
    write(tmp_path, "d", 20)
    with pytest.raises(DataError, match="no pool 'x', it has d"):
        source(tmp_path, "x")
    table = tmp_path / "d-000001.json"
    good = table.read_text()
    table.write_text(good.replace('"offsets": [0', '"offsets": [7777'))
    with pytest.raises(DataError, match="d-000001.json: cannot be used .*do not fit"):
        take(3, [source(tmp_path, "d")], 8)
    table.write_text(good)
    with open(tmp_path / "d-000000.tar", "ab") as file:
        file.write(b"x")
    table.unlink()
    with pytest.raises(DataError, match="2 of 2 shards of d are not there .*d-000000.tar .*d-000001.tar"):
        source(tmp_path, "d")
    with pytest.raises(DataError, match="index.json: cannot be used"):
        source(tmp_path / "none", "d")
    write(tmp_path, "e", 5)
    with pytest.raises(DataError, match="not one of its 5 records can be used; .*field 'morphology' is missing"):
        take(1, [source(tmp_path, "e", also=("morphology",))], 2)
    assert shard_folders(tmp_path, "x") == {str(tmp_path): (1.0, ["d", "e"])} and shard_folders(tmp_path / "none", "") == {}
    with pytest.raises(ConfigError, match="give --init"):
        shard_folders(tmp_path, "")
    (tmp_path / "index.json").write_text("[1]")
    with pytest.raises(DataError, match="index.json: cannot be used"):
        shard_folders(tmp_path, "x")


def test_folders_in_a_mixture(tmp_path):
    """30 records, 20 that come three times as often, 10 that come half as often: 30, 60 and 5 of 95 places."""
    for name, n in (("a", 30), ("b", 20), ("c", 10)):
        write(tmp_path / name, "d", n)
    a, b, c = (str(tmp_path / name) for name in "abc")
    found = shard_folders(a, "x", f"{b}=3, {c}=0.5")
    assert found == {a: (1.0, ["d"]), b: (3.0, ["d"]), c: (0.5, ["d"])}
    sizes = [collections.Counter() for _ in range(3)]
    flow = stream(mixture(found, "d"), 95)
    for _ in range(10):
        for r in next(flow)[0]:
            sizes["abc".index(r["_where"].split("/d-")[0][-1])][r["id"]] += 1
    assert all(abs(sum(s.values()) - want) <= 2 for s, want in zip(sizes, (300, 600, 50)))
    assert [len(s) for s in sizes] == [30, 20, 10] and {*sizes[0].values()} == {10} and {*sizes[1].values()} == {30}
    assert shard_folders(a, "x", b) == {a: (1.0, ["d"]), b: (1.0, ["d"])}
    for mix, why in ((f"{b}=x", "write FOLDER=WEIGHT"), (f"{b}=0", "weights above 0"), (f"{b}=1,{b}=2", "each folder once"),
                     (f"{a}=2", "each folder once"), (f"{b}=1,", "write FOLDER=WEIGHT"), (f"{tmp_path}=2", "no index.json")):
        with pytest.raises(ConfigError, match=why):
            shard_folders(a, "x", mix)
    with pytest.raises(ConfigError, match="--data among them"):
        shard_folders(tmp_path, "x", b)
    with pytest.raises(DataError, match="no pool 'e', it has d"):
        mixture(found, "e")


def test_workers_leave_signals_to_the_one_that_trains(folder):
    """Slurm's signal reaches the workers too; the stream goes on, so that the run can save."""
    children = lambda: {int(p) for p in os.listdir("/proc") if p.isdigit() and stat(p) == os.getpid()}
    others = children()                                                # of other tests in this process
    generator = stream([source(folder, "a")], 8, workers=2)
    next(generator)
    own = children() - others
    for pid in own:
        os.kill(pid, signal.SIGTERM)
    for _ in range(20):
        next(generator)
    generator.close()
    assert len(own) >= 2 and not any(os.path.exists(f"/proc/{p}") and stat(p) == os.getpid() for p in own)


def test_a_signal_before_a_worker_has_its_handlers_waits(folder, monkeypatch):
    """The workers take half a second to begin, and are signalled meanwhile: without holding signals back they would die."""
    real = module.leave_signals
    monkeypatch.setattr(module, "leave_signals", lambda *a: (time.sleep(0.5), real(*a)))
    children = lambda: {int(p) for p in os.listdir("/proc") if p.isdigit() and stat(p) == os.getpid()}
    others, hit = children(), []

    def signals():
        limit = time.time() + 10
        while len(own := children() - others) < 2 and time.time() < limit:
            time.sleep(0.01)
        time.sleep(0.1)
        hit.extend(own)
        for pid in own:
            os.kill(pid, signal.SIGTERM)

    thread = threading.Thread(target=signals)
    thread.start()
    flow = stream([source(folder, "a")], 8, workers=2)
    for _ in range(6):
        next(flow)
    thread.join()
    flow.close()
    assert len(hit) == 2


def fails(folder):
    flow = stream([source(folder, "a")], 8, workers=2)
    next(flow)
    raise KeyError("a fault elsewhere")


def test_a_process_that_fails_ends_with_its_workers(folder):
    """The traceback keeps the stream open, and Python waits for the workers, which leave signals to others."""
    child = multiprocessing.get_context("fork").Process(target=fails, args=(folder,))
    child.start()
    child.join(20)
    code, _ = child.exitcode, child.kill()
    assert code == 1


def stat(pid):
    """-> the parent of a process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rsplit(")", 1)[1].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def test_twenty_thousand_records(tmp_path):
    file, seen = io.BytesIO(), set()
    Image.new("RGB", (4, 4)).save(file, "BMP")                           # quick to open; known by content, not by its name
    write(tmp_path, "e", 1000, 1000, file.getvalue())
    index = json.loads((tmp_path / "index.json").read_text())
    first, = index["pools"]["e"]["shards"]
    index["pools"]["e"]["shards"] = [{**first, "file": f"e-{i:06d}.tar"} for i in range(20)]
    for i in range(1, 20):
        for suffix in ("tar", "json"):
            os.link(tmp_path / f"e-000000.{suffix}", tmp_path / f"e-{i:06d}.{suffix}")
    (tmp_path / "index.json").write_text(json.dumps(index))
    for n, (rows, state) in zip(range(40), stream([source(tmp_path, "e")], 500)):
        seen.update(r["_where"] for r in rows)
        if n == 9:
            early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(seen) == 20_000 and state["taken"] == [20_000]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - early < 20_000          # KB


def benchmark(folder, n=200_000, workers=2, side=64):
    """python -c "from tests.test_stream import benchmark; benchmark('/tmp/bench')"  -> prints rate, CPU time, memory."""
    from pathlib import Path
    folder, rng = Path(folder), np.random.default_rng(0)
    picture = jpeg(rng, side)
    if not (folder / "index.json").is_file():
        write(folder, "f", n, 1000, picture)
    used = lambda who: (lambda u: u.ru_utime + u.ru_stime)(resource.getrusage(who))
    began, cpu, ids, peak = time.time(), used(resource.RUSAGE_SELF), 0, []
    for k, (rows, state) in zip(range(n // 200), stream([source(folder, "f")], 200, workers=workers)):
        ids += sum(hash(r["id"]) for r in rows)
        if (k + 1) % (n // 2000) == 0:
            own = [os.getpid(), *(p for p in os.listdir("/proc") if p.isdigit() and stat(p) == os.getpid())]
            peak.append(sum(int(open(f"/proc/{p}/smaps_rollup").read().split("Pss:")[1].split()[0]) for p in own) // 1024)
    seconds = time.time() - began
    own = used(resource.RUSAGE_SELF) - cpu
    began = time.process_time()
    for _ in range(1000):
        np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    pillow = time.process_time() - began
    assert ids == sum(hash(f"f-{i}") for i in range(n))
    print(f"{n:,} records, {workers} workers: {n / seconds:,.0f}/s by the clock; CPU ms a record: consumer {own / n * 1e3:.3f}, "
          f"workers {used(resource.RUSAGE_CHILDREN) / n * 1e3:.3f}, pillow alone {pillow:.3f}; MB at each tenth {peak}")
