"""Tar shards as an endless stream of batches, for sets that are too many files or too large to lie in memory.

    sources = [source("shards/atlas", "captions", 2.0), source("shards/articles", "captions", 1.0)]
    for rows, state in stream(sources, batch=64, mine=distributed.share(64), workers=4, state=saved):
        ...                              # rows: this process's records, r["_images"] their pictures; images_of(r)
        saved = state                    # small and plain: what to keep to go on behind this batch

Which record stands where is a function of the seed and its number in the stream, and of nothing else: not of the number
of processes or workers, nor of where a run was stopped. So a resumed run begins at once, wherever it was, and 1 x 8 rows,
2 x 4 and 4 x 2 are the same batches. In each pass over a source its shards are drawn in a new order, and records are
shuffled among `window` neighbouring shards: all reads fall into those few files, each record is one read of its slice, and
a shard is read from a network drive once a node, the rest comes from the system's cache. Decoding happens in worker
processes ahead of the consumer, each at its own batch; memory depends on batch, workers and window, not on the set.

A record that cannot be used gives its place to the next sound one of its shard, which then comes twice in that pass. It
is named on stderr and in state["damaged"]; after more than max_damaged of them on one process the stream ends. Flipped
bits that leave a readable picture are found by `python -m data_prep validate FOLDER`, which reads everything, not here.

Needs data.py, distributed.py, image.py and torch's DataLoader. The format is described in data_prep/shards.py.
"""
import bisect
import collections
import functools
import io
import json
import math
import multiprocessing
import os
import signal
import sys
import tarfile
from itertools import accumulate
from multiprocessing.util import Finalize
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .data import DataError, augment, check_record
from .distributed import everyone
from .image import ImageError, open_image
from .log import ConfigError

FORMAT = "nanopatho-shards-1"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
UNUSABLE = (ImageError, ValueError, KeyError, OSError, EOFError, OverflowError, tarfile.TarError)


def shard_folders(folder, init, mix=""):
    """A script's --data, --init and --mix -> {folder of shards: (weight of its records, names of its pools)}, --data first,
    with weight 1; {} if --data is a folder of plain files, which has no index.json.

    mix: "data/books=2,data/web=0.5", more folders of shards: a record of the first comes twice as often as one of --data.
    Shards need --init: they are not read in advance to make a tokenizer.
    """
    wanted = {str(folder): 1.0}
    for name, _, weight in (part.strip().partition("=") for part in mix.split(",") if mix):
        try:
            number = math.nan if not name or name in wanted else float(weight or 1)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise ConfigError(f"--mix {mix}: write FOLDER=WEIGHT,FOLDER=WEIGHT, each folder once, weights above 0")
        wanted[name] = number
    plain = [name for name in wanted if not (Path(name) / "index.json").is_file()]
    if plain and not mix:
        return {}
    if plain:
        raise ConfigError(f"--mix {mix}: {', '.join(plain)} hold(s) no index.json. Only folders of shards can be mixed, --data "
                          "among them; `python -m data_prep shard` makes them")
    if not init:
        raise ConfigError(f"--data {folder} holds shards, which are not read in advance to make a tokenizer: give --init")
    return {name: (weight, [*index_of(name)]) for name, weight in wanted.items()}


def index_of(folder):
    """-> {pool: its entry} of a folder's index.json."""
    path = Path(folder) / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"format {index['format']!r}, this reads {FORMAT}")
        return dict(index["pools"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be used ({error}); `python -m data_prep shard` makes such folders") from error


def mixture(folders, pool, also=()):
    """What shard_folders found -> the sources of one pool, one a folder."""
    return [source(folder, pool, weight, also) for folder, (weight, _) in folders.items()]


def source(folder, pool, weight=1.0, also=()):
    """One pool of a shard folder -> dict(name, shards, records, weight, also). weight: of each record; in the dict that of
    all, its share of the stream beside others'. also: fields that its records must have besides those of the use.
    Only index.json is read; every shard must be there in full length."""
    folder, held = Path(folder), index_of(folder)
    if pool not in held:
        raise DataError(f"{folder}/index.json: no pool {pool!r}, it has {', '.join(held)}")
    try:
        shards = [dict(path=str(folder / Path(s["file"]).name), records=int(s["records"]), bytes=int(s["bytes"]))
                  for s in held[pool]["shards"] if s["records"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}/index.json: pool {pool} cannot be used ({error}); `python -m data_prep shard` makes such "
                        "folders") from error
    there = lambda path, size: path.is_file() and path.stat().st_size == size and path.with_suffix(".json").is_file()
    wrong = [f"{s['path']} ({s['bytes']:,} bytes)" for s in shards if not there(Path(s["path"]), s["bytes"])]
    if wrong or not shards:
        raise DataError(f"{folder}: pool {pool} holds no records" if not shards else
                        f"{folder}: {len(wrong)} of {len(shards)} shards of {pool} are not there with this length and their "
                        f".json; copy them again: {', '.join(wrong[:20])}")
    records = sum(s["records"] for s in shards)
    return dict(name=f"{folder}/{pool}", shards=shards, records=records, weight=weight * records, also=also)


def images_of(record):
    """-> list of uint8 (H, W, 3), as data.Images gives them: the `images` argument of data.vlm_batch."""
    return record["_images"]


def batches(sources, batch, state, weights=None):
    """-> endless generator of (rows, state behind them); rows: [(number of the source, record number in its stream)].

    Each place goes to the source that is owed most, so after n places every source has had its share of n to within
    one or two records, whatever the seed. weights: function of the batch number -> weights (a curriculum over sources).
    """
    number, owed, taken = state["batch"], list(state["owed"]), list(state["taken"])
    while True:
        now = np.array(weights(number) if weights else [s["weight"] for s in sources], dtype=float)
        if now.shape != (len(sources),) or not now.min() >= 0 or not 0 < now.sum() < np.inf:
            raise DataError(f"batch {number}: weights {now.tolist()} for {len(sources)} sources; give each 0 or more")
        rows = []
        for _ in range(batch):
            owed = [o + float(w) for o, w in zip(owed, now / now.sum())]
            k = max(range(len(sources)), key=lambda k: (owed[k], -k))
            rows.append((k, taken[k]))
            owed[k], taken[k] = owed[k] - 1.0, taken[k] + 1
        number += 1
        yield rows, dict(batch=number, owed=[*owed], taken=[*taken])


def agreed(state):
    """A state with the damaged records of all processes, to be saved. Every process calls it."""
    return state and {**state, "damaged": [*dict.fromkeys(everyone(state["damaged"]))]}


class Shards:
    """[(source, record number)] -> records, as a worker reads them. At most two windows of shards a source are open."""

    def __init__(self, sources, use, seed, window, turn, make):
        self.sources, self.use, self.seed, self.window, self.turn, self.make = sources, use, seed, window, turn, make
        self.tables = {}

    @functools.lru_cache(16)
    def groups(self, k, epoch):
        """Source k in pass `epoch` -> its shards in their order, in groups of `window`; records before each group."""
        shards = self.sources[k]["shards"]
        order = np.random.default_rng([self.seed, k, epoch]).permutation(len(shards)).tolist()
        groups = [order[i:i + self.window] for i in range(0, len(order), self.window)]
        return groups, [0, *accumulate(sum(shards[s]["records"] for s in g) for g in groups)]

    @functools.lru_cache(16)
    def shuffled(self, k, epoch, group):
        """-> (n, 2) array of (shard, record in it): the records of one group in the order they are drawn in."""
        shards, members = self.sources[k]["shards"], self.groups(k, epoch)[0][group]
        pairs = np.array([(s, i) for s in members for i in range(shards[s]["records"])])
        return np.random.default_rng([self.seed, k, epoch, group]).permutation(pairs)

    def place(self, k, number):
        """Record `number` of the endless stream of source k -> (shard, record in it)."""
        epoch, at = divmod(number, self.sources[k]["records"])
        before = self.groups(k, epoch)[1]
        group = bisect.bisect_right(before, at) - 1
        return self.shuffled(k, epoch, group)[at - before[group]].tolist()

    def table(self, k, s):
        """Shard s of source k -> (open file, ids, offsets)."""
        if (k, s) not in self.tables:
            shard, path = self.sources[k]["shards"][s], Path(self.sources[k]["shards"][s]["path"])
            try:
                table = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
                ids, offsets = table["ids"], table["offsets"]
                if not len(ids) == len(offsets) - 1 == shard["records"] or offsets[-1] > shard["bytes"] or \
                        any(a >= b for a, b in zip([-1, *offsets], offsets)):
                    raise ValueError("its ids and offsets do not fit the tar")
                file = open(path, "rb")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path.with_suffix('.json')}: cannot be used ({error}); copy the shard again") from error
            while len(self.tables) >= 2 * self.window * len(self.sources):
                self.tables.pop(next(iter(self.tables)))[0].close()
            self.tables[k, s] = file, ids, offsets
        return self.tables[k, s]

    def read(self, file, start, end, also=()):
        """One slice of a shard -> its record with its pictures; one of UNUSABLE if it cannot be used."""
        file.seek(start)
        piece = file.read(end - start)
        with tarfile.open(fileobj=io.BytesIO(piece), mode="r:") as tar:
            data = {m.name: piece[m.offset_data:m.offset_data + m.size] for m in tar if m.isreg()}
        record = json.loads(data[next(iter(data), "its .json")])
        problems = check_record(record, self.use)
        if problems := problems or [(name, "is missing") for name in also if not record.get(name)]:
            raise ValueError("; ".join(f"field '{field}' {problem}" for field, problem in problems))
        names = record.get("image") or []
        return {**record, "_images": [decode(n, data[n]) for n in ([names] if isinstance(names, str) else names)]}

    def sound(self, k, number, problems):
        """-> the record of this number; in place of a damaged one the next sound one of its shard."""
        s, first = self.place(k, number)
        (file, ids, offsets), path = self.table(k, s), self.sources[k]["shards"][s]["path"]
        for i in [*range(first, len(ids)), *range(first)]:
            try:
                return {**self.read(file, offsets[i], offsets[i + 1], self.sources[k]["also"]), "_where": f"{path}: {ids[i]}"}
            except UNUSABLE as error:
                why = f"{error} is not in the tar" if isinstance(error, KeyError) else error
                problems.append(f"{path}: {ids[i]}: {why}")
        raise DataError(f"{path}: not one of its {len(ids)} records can be used; {problems[-1]}")

    def batch(self, rows, number):
        """-> what `make` makes of the records, or the records and their pictures; what was wrong with others."""
        problems = []
        records = [self.sound(k, n, problems) for k, n in rows]
        for r, (k, n) in zip(records, rows if self.turn else []):        # by its number, so alike on every process
            rng = np.random.default_rng([self.seed, k, n])
            r["_images"] = [augment(a, rng) for a in r["_images"]]
        if self.make:
            return self.make(records, number), None, problems
        # One piece of shared memory a batch: a file descriptor for every picture would use them up.
        flat = [a.reshape(-1) for r in records for a in r["_images"]]
        shapes = [{**r, "_images": [a.shape for a in r["_images"]]} for r in records]
        return shapes, torch.from_numpy(np.concatenate(flat)) if flat else torch.empty(0, dtype=torch.uint8), problems


class Member(io.BytesIO):
    """A file in memory that messages call by its name."""

    def __init__(self, name, data):
        super().__init__(data)
        self.name = name

    def __str__(self):
        return self.name


def decode(name, data):
    """Bytes of the picture `name` -> uint8 (H, W, 3); ImageError says what is wrong."""
    try:
        return np.asarray(open_image(Member(name, data)))
    except TypeError as error:                                           # what open_image says of bytes PIL does not know
        raise ImageError(f"{name}: not an image PIL knows ({len(data):,} bytes)") from error


def leave_signals(leaving, worker):
    """Slurm and torchrun signal every process; the one that trains saves and then ends its workers. At its own end, in
    whatever way, Python sends SIGTERM to them and waits: after `leaving` is set they heed it."""
    for number in SIGNALS:
        signal.signal(number, lambda received, frame: os._exit(0) if leaving.is_set() else None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)              # `ahead` held them back until here


class Jobs(Dataset):
    """job -> make(*job). Data that cannot be used comes back as a value: a worker's traceback would bury the message."""

    def __init__(self, make):
        self.make = make

    def __getitem__(self, job):
        try:
            return self.make(*job)
        except ValueError as error:                                      # DataError, ImageError, …
            return error


def ahead(make, jobs, workers=0, deep=2, seed=0):
    """make(*job) of each job, in their order: a generator. `workers` processes make them, each at most `deep` jobs before
    they are asked for, so that a GPU does not wait for pictures; 0: the process that asks. Tensors come in pinned memory
    where there is CUDA."""
    leaving = multiprocessing.Event()
    Finalize(None, leaving.set, exitpriority=1)                      # called before Python ends its children
    # A generator of its own: torch's random state is the run's, and it must not matter whether batches were made ahead.
    # Forked, so that `make` may be any function.
    options = dict(prefetch_factor=deep, multiprocessing_context="fork",
                   worker_init_fn=functools.partial(leave_signals, leaving)) if workers else {}
    loader = DataLoader(Jobs(make), batch_size=None, sampler=jobs, num_workers=workers, collate_fn=as_it_is,
                        pin_memory=torch.cuda.is_available(), generator=torch.Generator().manual_seed(seed), **options)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)       # a new worker must not be hit before it has its handlers
    try:
        made_ahead = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for made in made_ahead:
        if isinstance(made, Exception):
            raise made
        yield made


def as_it_is(made):
    return made


def stream(sources, batch, *, mine=slice(None), use="caption", seed=0, window=8, workers=0, deep=2, turn=False, make=None,
           weights=None, max_damaged=100, state=None):
    """Endless generator of (rows, state): `batch` records of all sources, of them those in the slice `mine`.

    use: the fields that must be there (data.NEEDED). workers: processes that decode (0: none, in the consumer itself),
    each `deep` batches before the consumer at most. turn: pictures are turned and mirrored (data.augment). make: a
    function of the rows and the batch's number that the workers call; its result is then what comes as `rows`.
    state: as it came with the last batch that counts; what it belongs to (sources, seed, window) must be the same.
    """
    key = [seed, window, *(s["records"] for s in sources)]
    state = state or dict(batch=0, owed=[0.0] * len(sources), taken=[0] * len(sources), damaged=[], key=key)
    if state["key"] != key:
        raise DataError(f"the stream was left with seed, window and numbers of records {state['key']}, now they are {key}: "
                        "it cannot go on where it was. Give the old ones, or start again in another --out")
    behind, damaged = collections.deque(), [*state["damaged"]]

    def ours():
        for rows, after in batches(sources, batch, state, weights):
            behind.append(after)
            yield rows[mine], after["batch"] - 1

    for rows, flat, problems in ahead(Shards(sources, use, seed, window, turn, make).batch, ours(), workers, deep, seed):
        for text in problems:
            if text not in damaged:
                damaged.append(text)
                tqdm.write(f"damaged: {text}", file=sys.stderr)
        if len(damaged) > max_damaged:
            raise DataError(f"{len(damaged)} damaged records, more than --max_damaged {max_damaged}; the last ones:\n"
                            + "\n".join(damaged[-20:]))
        if flat is not None:
            pieces = iter(np.split(flat.numpy(), np.cumsum([np.prod(shape) for r in rows for shape in r["_images"]])[:-1]))
            for r in rows:
                r["_images"] = [next(pieces).reshape(shape) for shape in r["_images"]]
        yield rows, dict(behind.popleft(), damaged=[*damaged], key=key)
