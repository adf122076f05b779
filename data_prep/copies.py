"""The same again: which pictures are copies or crops of others, which texts share the wording of known ones.

Arrays and strings in, pairs and reasons out; numpy and Pillow, may be copied. filters.py drops what is found here.
No picture is compared with every other: the signs of its slowest waves are a key (a perceptual hash), all keys stand in
one index, and the keys of every window of a picture are looked up there, so that a crop finds what it was cut from.

Letters: N pictures, B batch, n = 36 windows of an axis, F = 6 frequencies a direction.
"""
import itertools
import multiprocessing
import re

import numpy as np
from PIL import Image

# --- pictures ---------------------------------------------------------------------------------------------------------

SIDE, F = 32, 6
STEP, SCALES = 1 / 28, 8                     # windows: sides 1, 27/28, … 21/28 of the image, in steps of 1/28
# Up to three of the seven smallest coefficients of a window may have the other sign. Of copies of 263 tiles of breast
# and skin, cropped to 77-100 % a side, resized, turned, JPEG 30-95, 99.8 % meet so (two of five: 99.2 % at half the
# time). By chance a key of 24 bits is met by one picture in 2 million; beyond a million records 26 or 28 are faster.
BITS, WEAK, MOST = 24, 7, 3
ORDER = sorted((v * v + u * u, v * F + u) for v in range(F) for u in range(F) if v + u)
ORDER = np.array(ORDER)[:BITS, 1]            # places of the slowest waves in F * F
FLIPS = np.array([f for f in itertools.product((0, 1), repeat=WEAK) if sum(f) <= MOST], np.float64)  # (64, WEAK)
# Least correlations of the 35 slow coefficients and of the detail (16 x 16, less its 3 x 3 mean). On the same tiles
# copies reach 0.94 and 0.61 in 99.5 of 100 cases; the closest of 63,000 other pairs 0.97 and 0.45.
SAME, DETAIL = 0.9, 0.57
PLAIN = 3.0                                  # grey levels of standard deviation under which a picture has no structure


def thumbnail(image):
    """PIL image -> uint8 (32, 32), grey, stretched to a square."""
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=3.0))


def basis(start, size):
    """Cosines of the F slowest frequencies over the window [start, start + size) of an axis of length 1 -> (F, 32)."""
    i = np.arange(SIDE)
    low, high = np.maximum(i, start * SIDE), np.minimum(i + 1, (start + size) * SIDE)
    phase = ((low + high) / 2 / SIDE - start) / size
    return np.maximum(high - low, 0) * np.cos(np.pi * np.arange(F)[:, None] * np.clip(phase, 0, 1))


WINDOWS = [(at * STEP, 1 - n * STEP) for n in range(SCALES) for at in range(n + 1)]  # the first is all
BASES = np.concatenate([basis(*w) for w in WINDOWS]).astype(np.float32)  # (36 F, 32)


def area(start, size):
    """Means over 16 equal parts of the window [start, start + size) -> (16, 32)."""
    edges, i = (start + size * np.arange(17) / 16) * SIDE, np.arange(SIDE)
    shares = np.clip(np.minimum(i + 1, edges[1:, None]) - np.maximum(i, edges[:-1, None]), 0, 1)
    return shares / shares.sum(1, keepdims=True)


AREAS = np.array([area(*w) for w in WINDOWS])  # (36, 16, 32)


def turned(c, s):
    """Coefficients (…, F, F) of a picture -> those of its symmetry s: s % 4 quarter turns, then mirrored if s >= 4.

    In a cosine transform to mirror is to change the sign of odd frequencies, and to transpose is to transpose.
    """
    sign = (-1.0) ** np.arange(F)
    for _ in range(s % 4):
        c = np.swapaxes(c, -1, -2) * sign[:, None]
    return c * sign if s >= 4 else c


def key(c):
    """Coefficients (…, F * F) -> the signs of the BITS slowest as one number, a perceptual hash."""
    return ((c[..., ORDER] > 0) @ np.exp2(np.arange(BITS))).astype(np.uint32)


def unit(c):
    """(…, F * F) -> the same without the mean grey, of length 1."""
    c = np.concatenate([np.zeros_like(c[..., :1]), c[..., 1:]], -1)
    return c / np.maximum(np.linalg.norm(c, axis=-1, keepdims=True), 1e-9)


def detail(a):
    """float (16, 16) less its mean over 3 x 3: what differs even between pictures of the same layout."""
    p = np.pad(a, 1, mode="edge")
    return a - sum(p[y:y + 16, x:x + 16] for y in range(3) for x in range(3)) / 9


def correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / max(1e-9, np.sqrt((a * a).sum() * (b * b).sum())))


def build_index(thumbs, alive, batch=1024):
    """uint8 (N, 32, 32), bool (N,) -> what `search` needs; about 140 bytes a picture and 2 MB.

    Every picture is entered under the keys of its eight symmetries; those that are not alive or plain are left out.
    """
    keys, owners, units = [], [], np.zeros((len(thumbs), F * F), np.float16)
    for at in range(0, len(thumbs), batch):
        t = np.asarray(thumbs[at:at + batch], np.float32)
        rows = np.flatnonzero(alive[at:at + batch] & (t.std((1, 2)) > PLAIN))
        c = BASES[:F] @ t[rows] @ BASES[:F].T  # (b, F, F)
        units[at + rows] = unit(c.reshape(-1, F * F))
        for s in range(8):
            keys.append(key(turned(c, s).reshape(-1, F * F)))
            owners.append(((at + rows) * 8 + s).astype(np.uint32))
    keys, owners = np.concatenate(keys), np.concatenate(owners)
    order = np.argsort(keys, kind="stable")
    there = np.zeros(1 << BITS - 3, np.uint8)  # a bit a key
    np.bitwise_or.at(there, keys >> 3, np.uint8(1) << (keys & 7).astype(np.uint8))
    return {"keys": keys[order], "owners": owners[order], "units": units, "there": there, "thumbs": thumbs}


def search(index, thumbs):
    """uint8 (B, 32, 32) -> list of (i, j, r): picture j of the index is picture i of the batch or a crop of it.

    Each of the 1296 windows of a picture is looked up under its key and 63 near ones, so no two pictures are compared
    that do not meet in a key. What meets must correlate: by SAME in its slow waves, then by DETAIL (r).
    """
    thumbs, n = np.asarray(thumbs, np.float32), len(WINDOWS)
    c = (BASES @ thumbs @ BASES.T).reshape(-1, n, F, n, F).transpose(0, 1, 3, 2, 4).reshape(-1, F * F)  # (B n n, F F)
    weakest = np.argpartition(np.abs(c[:, ORDER]), WEAK, axis=1)[:, :WEAK]
    bits = np.exp2(weakest) @ FLIPS.T  # float64: exact, and BLAS is 5 times faster
    near = key(c)[:, None] ^ bits.astype(np.uint32)  # (B n n, 64)
    window, which = np.nonzero(index["there"][near >> 3])
    wanted = near[window, which]
    hit = index["there"][wanted >> 3] >> (wanted & 7).astype(np.uint8) & 1 > 0
    window, wanted = window[hit], wanted[hit]
    low, high = (np.searchsorted(index["keys"], wanted, side) for side in ("left", "right"))
    many = high - low
    window, at = np.repeat(window, many), np.arange(many.sum()) + np.repeat(high - many.cumsum(), many)
    owner = index["owners"][at].astype(np.int64)
    mine, slow = unit(c[window]), np.zeros(len(at), np.float32)
    for s in range(8):
        rows = np.flatnonzero(owner % 8 == s)
        theirs = turned(index["units"][owner[rows] // 8].astype(np.float32).reshape(-1, F, F), s)
        slow[rows] = (mine[rows] * theirs.reshape(-1, F * F)).sum(-1)
    best, keep = {}, slow >= SAME                                            # (i, owner) -> (correlation, window)
    for r, w, o in zip(slow[keep].tolist(), window[keep].tolist(), owner[keep].tolist()):
        best[w // (n * n), o] = max(best.get((w // (n * n), o), (0, 0)), (r, w))
    found = {}
    for (i, o), (_, w) in best.items():
        y, x = divmod(w % (n * n), n)
        part = np.rot90(np.asarray(index["thumbs"][o // 8], np.float32), o % 4)
        r = correlation(detail(AREAS[y] @ thumbs[i] @ AREAS[x].T),
                        detail(AREAS[0] @ (part[:, ::-1] if o % 8 >= 4 else part) @ AREAS[0].T))
        if r >= max(DETAIL, found.get((i, o // 8), 0)):
            found[i, o // 8] = r
    return [(i, j, r) for (i, j), r in found.items()]


_held = {}


def _hold(index, thumbs):
    _held.update(index=index, thumbs=thumbs)


def _search_rows(rows):
    thumbs = np.asarray(_held["thumbs"][rows])
    good = thumbs.std((1, 2)) > PLAIN
    return [(int(rows[good][i]), j, r) for i, j, r in search(_held["index"], thumbs[good])]


def pairs(index, thumbs, alive, workers=1, batch=8):
    """All (i, j, r) of `search` for the pictures of thumbs (N, 32, 32) that are alive and not plain."""
    rows = np.flatnonzero(alive)
    with multiprocessing.Pool(workers, _hold, (index, thumbs)) as crew:
        for found in crew.imap(_search_rows, np.split(rows, range(batch, len(rows), batch)), chunksize=16):
            yield from found


# --- wording ----------------------------------------------------------------------------------------------------------


def words_of(text):
    """Text -> words in lower case, each Chinese character as one: "H&E, 肝小叶" -> ["h", "e", "肝", "小", "叶"]."""
    return re.findall(r"[a-z0-9]+|[\u4e00-\u9fff]", text.lower())


def grams(words):
    """Words -> the set of their sequences of four, as numbers."""
    return {hash(tuple(words[i:i + 4])) for i in range(len(words) - 3)}


class Texts:
    """The wording of benchmarks. A text is one of theirs if it shares a third of the 4-word sequences of the shorter of
    the two (12 words or more), or all of them (8 to 11 words); case, punctuation and digits of a label do not matter.

    On 1,000 generated captions a run of 13 equal words, a common rule, would drop 2 of 776 others (stock phrases).
    """

    def __init__(self, texts):
        self.sizes, self.where = [], {}
        for found in (grams(words_of(text)) for text in texts if len(words_of(text)) >= 8):
            for g in found:
                self.where.setdefault(g, []).append(len(self.sizes))
            self.sizes.append(len(found))

    def find(self, text):
        """-> why the text is known, or None."""
        words, shared = words_of(text), {}
        mine = grams(words)
        for g in mine if len(words) >= 8 else ():
            for t in self.where.get(g, ()):
                shared[t] = shared.get(t, 0) + 1
        best = max((n / min(len(mine), self.sizes[t]) for t, n in shared.items()), default=0)
        return f"{100 * best:.0f} % of its 4-word sequences" if best > (0.999 if len(words) < 12 else 0.34) else None
