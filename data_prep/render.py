"""A small procedural renderer of tissue: facts in, photograph out, and the scene measured back.

    image, masks, measured = draw({"subfield": "H&E", "architecture": "round_glands", ..., "seed": 7,
                                   "um_per_px": 1.0, "stain_shift": False}, size=112)

Contract
  * Deterministic: the same facts and size give the same bytes. The seed feeds three independent streams (scene, stain,
    sensor), so the colour of a slide says nothing about what lies on it.
  * Scene lengths are MICROMETRES; only `Canvas` knows pixels. 112 px at 1.0 um/px and 224 px at 0.5 um/px show the same
    112 um of tissue (exactly the same scene for the same facts, up to what falls between the pixels).
  * `masks` holds only findings that are there: {"nuclei", "architecture", "mitoses", ...} -> bool (size, size).
  * `measured` is counted and integrated on the drawn scene, never copied from the facts.

Colour is absorption (Beer-Lambert, as in Ruifrok & Johnston 2001): every dye has a concentration map c >= 0 and a unit
optical-density vector, I = I0 * exp(-sum_dye c_dye * od_dye); dyes add in optical density, never in RGB.
Geometry is teaching material, not a model of disease: glands, nests and sheets are drawn to be recognisable.

Cost, measured on one core: about 9 ms for an H&E image of 112 px, 26 ms at 224 px (0.5 um/px).

Only numpy. This file: optics, primitives, entry points. `render_tissue.py`: H&E and IHC. `render_more.py`: cytology,
FISH and gross photographs.
    python -m data_prep.render sheet.png      # a labelled sheet of examples (needs Pillow)

Letters: S = size in pixels, N = objects drawn in one call, K = side of an object's window in pixels.
"""

import sys

import numpy as np

# --- optics ----------------------------------------------------------------------------------------------------------

# Unit-free OD centres and half-widths (R, G, B). H and E: between the vectors of Ruifrok, Macenko and measured slides.
# DAB after Ruifrok. "orange" is eosin bound densely (eosinophil granules, keratin), which turns from pink to orange. It
# and the four dyes of the cytology stains (Giemsa, Papanicolaou) are set by eye: a guess.
TRAIN_STAINS = {"haematoxylin": ((.62, .68, .32), .08), "eosin": ((.22, .90, .38), .08),
                "dab": ((.27, .55, .79), .05), "orange": ((.06, .66, .75), .05),
                "azure": ((.55, .78, .30), .07), "methylene_blue": ((.80, .52, .22), .06),
                "light_green": ((.85, .35, .38), .06), "orange_g": ((.06, .45, .88), .05)}
# The held-out slides: a teal-blue haematoxylin, an orange eosin, a darker DAB. Disjoint from the training box even
# after scaling to unit length, because the first (H, DAB) or last (E, orange) component is out of its reach.
SHIFT_STAINS = {"haematoxylin": ((.86, .46, .26), .04), "eosin": ((.12, .76, .60), .04),
                "dab": ((.41, .56, .71), .025), "orange": ((.08, .46, .88), .03),
                "azure": ((.36, .88, .30), .04), "methylene_blue": ((.90, .36, .08), .03),
                "light_green": ((.62, .30, .72), .04), "orange_g": ((.08, .66, .74), .03)}


def draw_stains(facts, names):
    """Dyes and light of one slide, from the seed alone: OD matrix float32 (len(names), 3), I0 float32 (3,).

    The rows are unit vectors times a gain in 0.7..1.4 (section thickness, staining time).
    """
    rng = np.random.default_rng((facts["seed"], 1))
    table = SHIFT_STAINS if facts["stain_shift"] else TRAIN_STAINS
    matrix = np.empty((len(names), 3), np.float32)
    for row, name in zip(matrix, names):
        centre, width = table[name]
        vector = np.array(centre) + rng.uniform(-width, width, 3)
        row[:] = vector / np.linalg.norm(vector) * rng.uniform(.7, 1.4)
    return matrix, rng.uniform(235, 250, 3).astype(np.float32)


def transmit(concentrations, matrix, light):
    """Beer-Lambert: concentrations (S, S, dyes) >= 0, matrix (dyes, 3), light (3,) -> intensities float (S, S, 3)."""
    return light * np.exp(-(concentrations @ matrix))


def blur(image, amount):
    """A 3-tap blur, (amount, 1 - 2 amount, amount) along both axes, edges repeated: the lens. (S, S, ...) -> same."""
    for axis in (0, 1):
        step = amount * np.diff(image, axis=axis)
        image = image.copy()
        ahead, behind = image.swapaxes(0, axis)[:-1], image.swapaxes(0, axis)[1:]
        ahead += step.swapaxes(0, axis)
        behind -= step.swapaxes(0, axis)
    return image


def photograph(light_field, facts):
    """Lens and sensor: uneven light, slight blur, noise, 8 bits. float (S, S, 3) in 0..255 -> uint8 (S, S, 3)."""
    rng = np.random.default_rng((facts["seed"], 2))
    size = light_field.shape[0]
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    slope_x, slope_y, vignette = rng.uniform(-.03, .03, 2).tolist() + [rng.uniform(0, .04)]
    shade = 1 + slope_x * ramp + slope_y * ramp[:, None] - vignette * (ramp ** 2 + ramp[:, None] ** 2) / 2
    image = blur(light_field * shade[..., None], rng.uniform(.03, .12))
    image += rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(1, 2.5)
    return np.clip(image + .5, 0, 255).astype(np.uint8)


# --- canvas and primitives -------------------------------------------------------------------------------------------

class Canvas:
    """A square field of view: side = size * um_per_px micrometres, pixel centres X (1, S) and Y (S, 1) in um."""

    def __init__(self, facts, size):
        self.size, self.um = size, float(facts["um_per_px"])
        self.side = size * self.um
        self.area = self.side ** 2
        self.seed, self.rng = facts["seed"], np.random.default_rng((facts["seed"], 0))
        line = ((np.arange(size) + .5) * self.um).astype(np.float32)
        self.X, self.Y = line[None, :], line[:, None]

    def stage(self, number):
        """Start the stage's own random stream and return it: if a nucleus on an edge counts at one pixel size and not
        at another, only the details of its stage change, not all that follows."""
        self.rng = np.random.default_rng((self.seed, 0, number))
        return self.rng

    def noise(self, cell):
        """Smooth value noise in 0..1 with bumps of `cell` um, float32 (S, S): a random grid between smoothsteps."""
        knots = int(self.side / cell) + 3
        grid = self.rng.random((knots, knots), dtype=np.float32)
        weights = []
        for line in (self.Y[:, 0], self.X[0]):
            near = np.clip(1 - np.abs(line[:, None] / cell + self.rng.random() - np.arange(knots)), 0, 1)
            weights.append((near * near * (3 - 2 * near)).astype(np.float32))                    # (S, knots)
        return weights[0] @ grid @ weights[1].T

    def fibres(self, width, length, angle, waviness):
        """Wavy collagen in 0..1: value noise stretched along `angle`, bent by slow noise. float32 (S, S)."""
        bend = (self.noise(30) - .5) * waviness
        c, s = float(np.cos(angle)), float(np.sin(angle))   # Python floats keep float32 arrays float32
        u = (self.X * c + self.Y * s) / length
        v = (self.Y * c - self.X * s + bend) / width
        u, v = u - u.min(), v - v.min()
        # the grid covers the whole diagonal plus the bend, whatever the pixel size, so that both scales draw one scene
        grid = self.rng.random((int((1.5 * self.side + 2 * waviness) / width) + 3, int(1.5 * self.side / length) + 3),
                               dtype=np.float32)
        i, j = v.astype(np.int32), u.astype(np.int32)
        fv, fu = v - i, u - j
        fv, fu = fv * fv * (3 - 2 * fv), fu * fu * (3 - 2 * fu)
        top = grid[i, j] + fu * (grid[i, j + 1] - grid[i, j])
        bottom = grid[i + 1, j] + fu * (grid[i + 1, j + 1] - grid[i + 1, j])
        return top + fv * (bottom - top)

    def windows(self, x, y, reach):
        """Local windows round N points. -> dx (N, 1, K), dy (N, K, 1) in um, flat pixel index (N, K, K).

        Pixels beyond the frame get index S*S, the spare last entry that `splat` drops.
        """
        half = int(np.ceil(reach / self.um))
        steps = np.arange(-half, half + 1)
        col = np.floor(x / self.um).astype(np.intp)[:, None] + steps                             # (N, K)
        row = np.floor(y / self.um).astype(np.intp)[:, None] + steps
        dx = ((col + .5) * self.um - x[:, None]).astype(np.float32)[:, None, :]
        dy = ((row + .5) * self.um - y[:, None]).astype(np.float32)[:, :, None]
        spare = self.size ** 2                              # the sum passes it wherever one of the two is outside
        col = np.where((col >= 0) & (col < self.size), col, spare)
        row = np.where((row >= 0) & (row < self.size), row, self.size) * self.size
        return dx, dy, np.minimum(row[:, :, None] + col[:, None, :], spare)

    def splat(self, flat, value, fill=0., add=False):
        """Merge windows (N, K, K) into one map (S, S) by maximum (or sum): no object erases another."""
        layer = np.full(self.size ** 2 + 1, fill, np.float32)
        (np.add if add else np.maximum).at(layer, flat.ravel(), np.asarray(value, np.float32).ravel())
        return layer[:-1].reshape(self.size, self.size)

    def at(self, field, x, y):
        """Values (N,) of a map (S, S) at points in um; points beyond the frame read the nearest edge."""
        col = np.clip(np.floor(np.asarray(x) / self.um), 0, self.size - 1).astype(np.int64)
        row = np.clip(np.floor(np.asarray(y) / self.um), 0, self.size - 1).astype(np.int64)
        return field[row, col]

    def inside(self, x, y, margin=0.):
        return (x > margin) & (y > margin) & (x < self.side - margin) & (y < self.side - margin)


def soft(signed, width=1.):
    """Signed distance (um, positive inside) -> coverage 0..1 with an edge `width` um wide."""
    return np.clip(.5 + signed / width, 0, 1)


def mix(a, b, weight):
    return a + (b - a) * weight


def harmonics(rng, n):
    """Random outline of n closed shapes: complex coefficients (n, 3) of the angular frequencies 2, 3 and 5."""
    amplitude = np.array([.6, .5, .35]) * rng.uniform(.5, 1, (n, 3))
    return (amplitude * np.exp(2j * np.pi * rng.random((n, 3)))).astype(np.complex64)


def wobble(c, s, coef):
    """Outline deviation Re(sum_k coef_k exp(i k phi)), k = 2, 3, 5, about -1..1, in the directions (c, s) = (cos phi,
    sin phi) of shape (N, ...) for coef (N, 3). Angle sums instead of powers of complex numbers: 4 times as fast."""
    re, im = (v.reshape(len(coef), 3, *[1] * (c.ndim - 1)) for v in (coef.real, coef.imag))
    c2, s2 = 2 * c * c - 1, 2 * s * c
    c3, s3 = c * c2 - s * s2, s * c2 + c * s2
    return (re[:, 0] * c2 - im[:, 0] * s2 + re[:, 1] * c3 - im[:, 1] * s3
            + re[:, 2] * (c2 * c3 - s2 * s3) - im[:, 2] * (s2 * c3 + c2 * s3))


def discs(cv, x, y, r, amount, coef, rim=9.):
    """Union of N wobbly discs as one signed field (S, S) in um: positive inside, cut off at -rim outside."""
    if len(x) == 0:
        return np.full((cv.size, cv.size), -rim, np.float32)
    dx, dy, flat = cv.windows(x, y, (1 + amount) * r.max() + rim)
    rho = np.sqrt(dx * dx + dy * dy) + np.float32(1e-3)                                          # (N, K, K)
    edge = r[:, None, None].astype(np.float32) * (1 + amount * wobble(dx / rho, dy / rho, coef))
    return cv.splat(flat, edge - rho, fill=-rim)


def cells(x, y, r, *, long=1., angle=0., rough=0., dark=1., vesicle=0., nucleolus=0.):
    """A table of nuclei: dict of float32 arrays (N,). r = radius in um of the disc of equal area, long = axis ratio."""
    columns = dict(x=x, y=y, r=r, long=long, angle=angle, rough=rough, dark=dark, vesicle=vesicle, nucleolus=nucleolus)
    return {k: np.full(np.shape(x), v, np.float32) for k, v in columns.items()}


def pick(table, keep):
    return {k: v[keep] for k, v in table.items()}


def stamp(cv, table, edge=.8, add=False):
    """Draw nuclei. -> (dye map (S, S), coverage map (S, S), whole area of each nucleus in um^2 (N,)).

    The outline wobbles with `rough`; `vesicle` empties the middle (open chromatin); `nucleolus` adds one or two dots.
    Overlapping nuclei are merged by maximum, or with add=True summed, as in a thick smear.
    """
    n = len(table["x"])
    if n == 0:
        return np.zeros((cv.size, cv.size), np.float32), np.zeros((cv.size, cv.size), np.float32), np.zeros(0)
    span = table["r"] * np.sqrt(table["long"]) * (1 + table["rough"])
    giant = span > 1.5 * np.median(span)
    if n > 16 and giant.any():                              # their wide windows would be wasted on all the others
        area, parts = np.empty(n), []
        for some in (giant, ~giant):
            *maps, area[some] = stamp(cv, pick(table, some), edge, add)
            parts.append(maps)
        (dye, cover), (more, wider) = parts
        return dye + more if add else np.maximum(dye, more), np.maximum(cover, wider), area
    col = {k: v[:, None, None] for k, v in table.items()}                                        # (N, 1, 1)
    coef, spot = harmonics(cv.rng, n), cv.rng.uniform(-.35, .35, (4, n, 1, 1)).astype(np.float32)
    two = cv.rng.random((n, 1, 1)) < .35
    dx, dy, flat = cv.windows(table["x"], table["y"], span.max() + edge)
    c, s, root = np.cos(col["angle"]), np.sin(col["angle"]), np.sqrt(col["long"])
    u, v = (dx * c + dy * s) / root, (dy * c - dx * s) * root                                    # (N, K, K)
    rho = np.sqrt(u * u + v * v) + np.float32(1e-3)
    d = rho / col["r"]
    if table["rough"].any():
        d = d / (1 + col["rough"] * wobble(u / rho, v / rho, coef))
    cover = soft((1 - d) * col["r"], max(edge, cv.um))
    dye = col["dark"] * cover
    if table["vesicle"].any():
        dye *= 1 - col["vesicle"] * np.clip(1.35 - 1.5 * d * d, 0, 1)
    if table["nucleolus"].any():
        big = np.maximum(.24 * col["r"], 1.25)
        for k in (0, 2):
            gap = np.sqrt((u - spot[k] * col["r"]) ** 2 + (v - spot[k + 1] * col["r"]) ** 2)
            on = col["nucleolus"] if k == 0 else col["nucleolus"] * two
            dye = np.maximum(dye, 2. * on * soft(big - gap, cv.um))
    area = (cover > .5).sum((1, 2)) * cv.um ** 2
    return cv.splat(flat, dye, add=add), cv.splat(flat, cover), area


def darts(cv, radii, gap, accept=None, margin=0.):
    """Greedy dart throwing in the frame: one try per radius. -> x, y, r of the discs kept (gap um apart at least).

    accept(x, y) -> bool array filters the tries first.
    """
    low, high = margin, cv.side - margin
    tx, ty = cv.rng.uniform(low, high, (2, len(radii)))
    fine = np.ones(len(radii), bool) if accept is None else accept(tx, ty)
    kept = []
    for x, y, r, ok in zip(tx.tolist(), ty.tolist(), np.asarray(radii).tolist(), fine.tolist()):
        if ok and all((x - a) ** 2 + (y - b) ** 2 > (r + q + gap) ** 2 for a, b, q in kept):
            kept.append((x, y, r))
    found = np.array(kept, np.float64).reshape(-1, 3)
    return found[:, 0], found[:, 1], found[:, 2]


def relax(x, y, r, rounds=4, pinned=0):
    """Push overlapping discs apart, in place; the first `pinned` stay where they are. -> x, y of the others.

    Crowded cells share the room as real ones do. O(N^2) a round.
    """
    want = (r[:, None] + r).astype(np.float32)
    for _ in range(rounds):
        dx, dy = ((v[:, None] - v).astype(np.float32) for v in (x, y))                           # (N, N)
        d = np.sqrt(dx * dx + dy * dy) + np.float32(1e-3)
        push = np.clip(want / d - 1, 0, 2) * np.float32(.25)
        x[pinned:] += (push * dx).sum(1)[pinned:]
        y[pinned:] += (push * dy).sum(1)[pinned:]
    return x[pinned:], y[pinned:]


def lattice(cv, spacing, jitter):
    """Jittered hexagonal lattice over the frame and one spacing beyond. -> x, y (N,) in um."""
    rows = np.arange(-spacing, cv.side + spacing, spacing * .866)
    cols = np.arange(-spacing, cv.side + 1.5 * spacing, spacing)
    x = cols[None, :] + (np.arange(len(rows)) % 2)[:, None] * spacing / 2 + cv.rng.uniform(0, spacing)  - spacing / 2
    y = np.broadcast_to(rows[:, None], x.shape) + cv.rng.uniform(-.5, .5) * spacing
    wiggle = cv.rng.uniform(-jitter, jitter, (2, x.size)) * spacing
    return x.ravel() + wiggle[0], y.ravel() + wiggle[1]


def voronoi(cv, x, y, roundness, bend=(0., 0.)):
    """Cells round N seeds. -> wall: distance (S, S) in um to the nearest wall, corners rounded over `roundness` um;
    near = exp(-distance / roundness) (N, S, S) to every seed. bend displaces the plane: two maps in um.

    With T = roundness, the sum of `near` over the other seeds is exp(-d2 / T) for the soft minimum d2 of their
    distances, so that (d2 - d1) / 2 = T / 2 * log(near of the owner / near of all the others).
    """
    dx = cv.X + bend[0] - x.astype(np.float32)[:, None, None]
    dy = cv.Y + bend[1] - y.astype(np.float32)[:, None, None]
    near = np.exp(np.sqrt(dx * dx + dy * dy) * np.float32(-1 / roundness))                       # (N, S, S)
    first = near.max(0)
    return roundness / 2 * np.log(first / np.maximum(near.sum(0) - first, 1e-6 * first)), near


def territories(cv, x, y, radius, weight):
    """Soft Voronoi cells round N nuclei. -> share (S, S) of the nearest cell in 0..1 (1 = deep inside, about 1/2 on a
    border), owned (S, S): weight (N,) of the nearest cell, 0 beyond every cell.

    Each cell casts exp(-(2.2 d / radius)^2); the winner's share falls to 1/2 where two cells tie, and a constant rival
    exp(-2.2^2) ends a cell at `radius` where it has no neighbour.
    """
    dx, dy, flat = cv.windows(x, y, 1.15 * radius)
    cast = np.exp(-(dx * dx + dy * dy) * np.float32((2.2 / radius) ** 2))                        # (N, K, K)
    rival = np.float32(np.exp(-2.2 ** 2))
    total, top = cv.splat(flat, cast, add=True), cv.splat(flat, cast)
    share = top / (total + rival)
    winner = cast >= np.append(top.ravel(), 9.)[flat]        # the spare pixel S*S is won by nobody
    owned = cv.splat(flat, np.where(winner, weight[:, None, None], 0))
    return share, owned * (top > .3 * rival)


# --- entry points ----------------------------------------------------------------------------------------------------

def check(facts, size):
    """Raise ValueError naming the field, its value and what would do, if these facts cannot be drawn."""
    from .world import ATTRIBUTES
    subfield = facts.get("subfield")
    if subfield not in ATTRIBUTES:
        raise ValueError(f"facts['subfield'] = {subfield!r}: choose one of {', '.join(ATTRIBUTES)}")
    for name, values in ATTRIBUTES[subfield].items():
        if facts.get(name) not in values:
            raise ValueError(f"{subfield} facts[{name!r}] = {facts.get(name)!r}: choose one of {', '.join(values)}")
    missing = {"seed", "um_per_px", "stain_shift"} - facts.keys()
    if missing:
        raise ValueError(f"{subfield} facts lack {', '.join(sorted(missing))}: give seed (int >= 0), "
                         "um_per_px (float), stain_shift (bool)")
    if size * facts["um_per_px"] < 60:
        raise ValueError(f"size {size} px at um_per_px {facts['um_per_px']} shows {size * facts['um_per_px']:.0f} um: "
                         "take 60 um or more, or the findings have no room")


def draw(facts, size):
    """Draw one micro-world image.

    facts: {"subfield": ..., one value per attribute (world.ATTRIBUTES), "seed": int >= 0, "um_per_px": float,
    "stain_shift": bool}; size: side in pixels.
    -> image uint8 (S, S, 3); masks {finding: bool (S, S)}, present findings only; measured {name: number}.
    Raises ValueError naming the field and its value when the facts cannot be drawn.
    """
    from . import render_more, render_tissue                # here, not above: they build on this file's primitives
    check(facts, size)
    painters = {"H&E": render_tissue.draw_he, "IHC": render_tissue.draw_ihc, "cytology": render_more.draw_cytology,
                "FISH": render_more.draw_fish, "gross": render_more.draw_gross}
    image, masks, measured = painters[facts["subfield"]](facts, size)
    return image, {name: mask for name, mask in masks.items() if mask.any()}, measured


def contact_sheet(rows, size=224, scale=1, um_per_px=.5):
    """A grid of examples, findings in words above. rows: lists of facts; scale: whole magnification. -> PIL image."""
    import textwrap

    from PIL import Image, ImageDraw, ImageFont

    from .world import PHRASES
    cell, label = size * scale, 40
    page = Image.new("RGB", (max(map(len, rows)) * (cell + 4), len(rows) * (cell + label)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for j, row in enumerate(rows):
        for i, facts in enumerate(row):
            left, top = i * (cell + 4), j * (cell + label)
            tile = Image.fromarray(draw({"stain_shift": False, **facts, "um_per_px": um_per_px}, size)[0])
            page.paste(tile.resize((cell, cell), Image.Resampling.BICUBIC), (left, top + label))
            words = [p[facts[name]][0] for name, p in PHRASES[facts["subfield"]].items()
                     if facts[name] not in ("none", "absent")]
            lines = textwrap.wrap(", ".join(words), cell // 6)[:3]
            pen.text((left + 2, top + 2), "\n".join(lines), fill="black", font=font, spacing=1)
    return page


EXAMPLES = {                                                # attribute values in the order of world.ATTRIBUTES
    "H&E": ["round_glands small uniform absent none none", "fused_glands small uniform absent lymphocytes none",
            "solid_nests large uniform frequent none none", "diffuse_sheets large pleomorphic frequent none none",
            "round_glands small uniform absent eosinophils none",
            "solid_nests small pleomorphic absent neutrophils none",
            "fused_glands large pleomorphic absent none necrosis", "solid_nests large uniform absent none keratin",
            "round_glands small uniform absent none mucin", "round_glands large uniform absent none fat",
            "diffuse_sheets small uniform frequent lymphocytes necrosis",
            "fused_glands large uniform absent eosinophils mucin"],
    "IHC": ["low strong nuclear solid_nests lymphocytes", "high weak nuclear round_glands none",
            "high strong membranous solid_nests none", "moderate weak membranous round_glands none",
            "moderate strong cytoplasmic diffuse_sheets none", "negative none none solid_nests lymphocytes"],
    "cytology": ["pap single low smooth absent clean", "pap clusters high irregular prominent inflammatory",
                 "pap monolayer low smooth prominent bloody", "giemsa single high irregular prominent necrotic",
                 "giemsa clusters low smooth absent bloody", "giemsa monolayer high smooth prominent clean"],
    "FISH": ["two two scattered small", "one many scattered small", "many two scattered large",
             "many two clustered large", "two two scattered large", "many many clustered small"],
    "gross": ["tan absent none absent absent", "white small circumscribed absent present",
              "yellow large infiltrative absent absent", "red large circumscribed present absent",
              "tan small infiltrative absent present", "yellow absent none present present"],
}


def sheet(path, per_row=6):
    """Write the contact sheet of EXAMPLES, all five subfields, as PNG."""
    from .world import ATTRIBUTES
    rows = [[{"subfield": s, **dict(zip(ATTRIBUTES[s], text.split())), "seed": 30 + i} for i, text in enumerate(part)]
            for s, texts in EXAMPLES.items() for part in (texts[k:k + per_row] for k in range(0, len(texts), per_row))]
    contact_sheet(rows).save(path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m data_prep.render sheet.png")
    sheet(sys.argv[1])
