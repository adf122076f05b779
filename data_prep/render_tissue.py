"""Drawn tissue sections: haematoxylin-eosin and immunohistochemistry. Called through `data_prep.render.draw`.

Order of a section: plan (where is material, epithelium, lumen; where sits every nucleus) -> guests take their places
and nuclei under them make room -> ground (stroma, cytoplasm, lumens, material) -> nuclei -> light. Nuclei are merged
by maximum and everything has soft edges, so that nothing on the slide is cut off by what was drawn later.

A field of 112 x 112 um holds 3-7 glands, or 60-110 small or 30-50 large nuclei. Counts scale with the area.
Sizes (um) follow textbook ranges: lymphocyte 6-7, small nucleus 7-8, large nucleus 13-15, mitotic plate 9-11.

Letters: S = size in pixels, N = objects.
"""

import numpy as np

from .render import (Canvas, blur, cells, darts, discs, draw_stains, harmonics, lattice, mix, photograph, pick, relax,
                     soft, stamp, territories, transmit, voronoi, wobble)

# --- plan: where the material, the epithelium, its lumens and its nuclei are ----------------------------------------


def seeds(cv, spacing, jitter):
    """Jittered lattice points that own a part of the frame. -> x, y."""
    x, y = lattice(cv, spacing, jitter)
    near = cv.inside(x, y, -.7 * spacing)
    return x[near], y[near]


def plan_material(cv, kind):
    """Where the extra material lies: signed field (S, S) in um, positive inside; None for kind "none".

    The level of the field is set at its quantile, so that 17-27 % of the frame is covered however the blobs overlap.
    """
    if kind == "none":
        return None
    target = cv.rng.uniform(.17, .27)
    count = max(1, round(cv.area / (4200 if kind == "keratin" else 6500) * cv.rng.uniform(.8, 1.2)))
    r = np.sqrt(target * cv.area / count / np.pi)
    x, y, r = darts(cv, r * np.linspace(1, .6, 40 * count), 2., margin=.42 * r)
    x, y, r = (v[:count, None, None].astype(np.float32) for v in (x, y, r))                      # (N, 1, 1)
    dx, dy = cv.X - x, cv.Y - y
    rho = np.sqrt(dx * dx + dy * dy) + np.float32(1e-3)                                          # (N, S, S)
    edge = r * (1 + {"keratin": .07}.get(kind, .18) * wobble(dx / rho, dy / rho, harmonics(cv.rng, len(x))))
    field = (edge - rho).max(0)
    if kind == "necrosis":
        field += 8 * (cv.noise(9) - .5) + 3 * (cv.noise(3.5) - .5)
    elif kind == "mucin":
        field += 6 * (cv.noise(13) - .5)
    if kind != "fat":
        return field - np.float32(np.quantile(field, 1 - target))
    # fat: whole polygons of a Voronoi tiling, those nearest to the blobs first, until the target is covered
    sx, sy = seeds(cv, min(29., cv.side / 4), .27)
    wall, near = voronoi(cv, sx, sy, 3.)
    owner = near.argmax(0)
    area = np.bincount(owner.ravel(), minlength=len(sx)) * cv.um ** 2
    order = np.argsort(1e3 * ~cv.inside(sx, sy) - cv.at(field, sx, sy))
    chosen = order[:1 + np.searchsorted(area[order].cumsum(), target * cv.area)]
    fat = np.zeros(len(sx), bool)
    fat[chosen] = True
    side = 1.5 * np.log((near[fat].max(0) + 1e-30) / (near[~fat].max(0) + 1e-30))   # > 0 nearer to a fat cell's seed
    return np.where(fat[owner], np.minimum(wall, side), side)


def plan_glands(cv, step, diameter, uniform, free):
    """Round glands: one layer of tall cells round a lumen, nuclei at the base. -> epi, lumen, x, y, angle."""
    rng = cv.rng
    height = diameter * rng.uniform(1.1, 1.25) + 4.5
    hole, gap = rng.uniform(5, 8), rng.uniform(2, 5)        # lumen radius; stroma between two glands
    x, y = lattice(cv, 2 * (height + hole) + gap, .16)
    r = height + hole * rng.uniform(.75, 1.3, len(x))
    relax(x, y, r + gap / 2, 4)
    coef = harmonics(rng, len(x))
    keep = free(x, y, 0 * r) & cv.inside(x, y, -1.1 * r)
    if not (keep & cv.inside(x, y)).any():                  # crowded out: one gland may overlap the material
        keep[np.argmax(cv.inside(x, y) + 1. * free(x, y, -r))] = True
    x, y, r, coef = x[keep], y[keep], r[keep], coef[keep]
    each = np.maximum(5, np.round(2 * np.pi * (r - .6 * diameter) / step)).astype(int)
    gland = np.repeat(np.arange(len(x)), each)
    turn = np.concatenate([(np.arange(n) + rng.random()) / n for n in each]) * 2 * np.pi
    turn += rng.normal(0, .1, len(turn)) * step / r[gland]
    base = r[gland] * (1 + .07 * wobble(np.cos(turn), np.sin(turn), coef[gland])) - .62 * diameter - .8
    base -= np.abs(rng.normal(0, .3 if uniform else 1.8, len(turn)))
    return (discs(cv, x, y, r, .07, coef), discs(cv, x, y, r - height, .12, coef),
            x[gland] + base * np.cos(turn), y[gland] + base * np.sin(turn), turn)


def plan_tissue(cv, architecture, diameter, uniform, material, body=1.5):
    """Lay out the epithelium. -> epi, lumen: signed fields (S, S) in um; nuclei: table of N candidates; fits: bool (N,)
    those that lie in epithelium; step: cell spacing in um.

    diameter = mean nuclear diameter; uniform = False scatters the sizes (log-normal) and loosens the polarity;
    body = cytoplasm between two nuclei, in um.
    """
    rng = cv.rng
    epi, lumen = np.full((cv.size, cv.size), 30, np.float32), np.full((cv.size, cv.size), -9, np.float32)
    step = diameter * rng.uniform(1.14, 1.26) + body         # distance between neighbouring cells

    def free(x, y, r):                                      # far enough from the material?
        return np.full(np.shape(x), True) if material is None else cv.at(material, x, y) < -r

    if architecture == "round_glands":
        epi, lumen, x, y, angle = plan_glands(cv, step, diameter, uniform, free)
        long, spin = (1.45, .1) if uniform else (1.3, .5)
    else:
        if architecture == "fused_glands":                  # one island of epithelium punched by many lumens
            count = max(1, round(cv.area / 9000))
            big = np.sqrt(cv.area * rng.uniform(.85, 1.1) / np.pi / count)
            centre = rng.uniform(.38, .62, (2, 1)) if count == 1 else rng.uniform(.1, .9, (2, count))
            epi = discs(cv, *(centre * cv.side), np.full(count, big), .2, harmonics(rng, count))
            r = rng.uniform(4, 8.5, 500) * np.linspace(1.15, .75, 500)
            lx, ly, lr = darts(cv, r, .7 * step + 4.5, lambda x, y: (cv.at(epi, x, y) > r + .6 * step) & free(x, y, r))
            lumen = discs(cv, lx, ly, lr, .22, harmonics(rng, len(lx)))
        elif architecture == "solid_nests":                 # rounded Voronoi cells with stroma in the seams
            bend = (cv.noise(16) - .5) * 9, (cv.noise(16) - .5) * 9
            epi = voronoi(cv, *seeds(cv, 38 + 1.6 * step, .2), 4., bend)[0] - rng.uniform(4, 6.5)
        x, y = lattice(cv, step, .25)
        x, y = (v[cv.inside(x, y, -.6 * step)] for v in (x, y))
        angle, long, spin = rng.uniform(0, np.pi, len(x)), 1.15 if uniform else 1.3, 1.
    n, spread = len(x), .06 if uniform else .5
    r = diameter / 2 * np.exp(np.clip(rng.normal(0, spread, n), -2 * spread, 1.5 * spread) - .33 * spread ** 2)
    angle = angle + rng.normal(0, spin, n)
    long = np.clip(long * rng.normal(1, .06 if uniform else .2, n), 1, 2.2)
    dark = rng.uniform(1.05, 1.45) * (rng.normal(1, .07, n) if uniform else rng.uniform(.65, 1.6, n))
    rough = np.zeros(n) if uniform else rng.uniform(.06, .22, n)
    if material is not None:
        epi = np.minimum(epi, -material - 1.5)
    if architecture == "round_glands":
        relax(x, y, r * .9, 2)
        fits = (cv.at(epi, x, y) > .3 * r) & (cv.at(lumen, x, y) < -.45 * r)
    else:
        if architecture == "fused_glands":                  # nuclei give way to the lumens, which stay where they are
            room = np.append(1.15 * lr + 2, np.maximum(r, .4 * step))
            x, y = relax(np.append(lx, x), np.append(ly, y), room, 4, pinned=len(lx))
        else:
            relax(x, y, np.maximum(r * 1.1, .4 * step), 3)
        fits = (cv.at(epi, x, y) > np.minimum(.5 * r, 3.)) & (cv.at(lumen, x, y) < -np.minimum(.75 * r, 5))
    fits &= free(x, y, np.minimum(.7 * r, 4)) & cv.inside(x, y, -1.2 * r)
    return epi, lumen, cells(x, y, r, long=long, angle=angle, rough=rough, dark=dark), fits, step


def apart(x, y, guest_x, guest_y, room, axis=1):
    """bool (N,): points at least `room` (scalar or (N,)) um away from every guest; axis=0: the same for the guests."""
    gap = (x[:, None] - guest_x) ** 2 + (y[:, None] - guest_y) ** 2                              # (N, guests)
    return (gap > np.square(room).reshape(-1, 1)).all(axis)


def thin_out(x, y, order, want, distances, kept=()):
    """Greedy choice of `want` points in this order, at least distances[0] um apart, then distances[1], ... -> list."""
    kept, px, py = list(kept), x.tolist(), y.tolist()
    for room in distances:
        for i in order:
            if len(kept) >= want:
                return kept
            if i not in kept and all((px[i] - px[j]) ** 2 + (py[i] - py[j]) ** 2 > room ** 2 for j in kept):
                kept.append(i)
    return kept


def place_mitoses(cv, nuclei, fits, epithelium):
    """Where cells divide: 6-8 in a 112 um field, 5 at least, spread out; up to a third of the nuclei may be the ones
    that divide, the rest of the figures go anywhere in the epithelium (bool map). -> x, y."""
    want = max(5, round(cv.rng.uniform(5.6, 8.4) * cv.area / 112 ** 2))
    shuffled = cv.rng.permutation(len(fits))
    extra = cv.rng.uniform(0, cv.side, (2, 300))
    x, y = np.append(nuclei["x"][shuffled], extra[0]), np.append(nuclei["y"][shuffled], extra[1])
    able = np.append(fits[shuffled], cv.at(epithelium, *extra)) & cv.inside(x, y, .05 * cv.side)
    first = np.flatnonzero(able[:len(fits)])
    order = [*first[:len(first) // 3], *len(fits) + np.flatnonzero(able[len(fits):]), *first[len(first) // 3:]]
    chosen = thin_out(x, y, order, want, (20, 13, 9))
    return x[chosen], y[chosen]


def place_inflammation(cv, stroma, blocked, nuclei, avoid_x, avoid_y):
    """16-26 cells in a 112 um field: half in crowds, half scattered, in the stroma and between the nuclei (over them
    only where there is no other room). -> x, y."""
    rng = cv.rng
    want = max(8, round(rng.uniform(16, 26) * cv.area / 112 ** 2))
    tries = 24 * want
    hubs = rng.uniform(.1, .9, (2, max(2, round(cv.area / 4500)))) * cv.side
    hub, crowd = rng.integers(hubs.shape[1], size=tries), rng.random(tries) < .5
    x, y = np.where(crowd, hubs[:, hub] + rng.normal(0, 11, (2, tries)), rng.random((2, tries)) * cv.side)
    good = rng.random(tries) < .3 + cv.at(stroma, x, y)     # stroma takes all comers, epithelium three in ten
    good &= cv.inside(x, y, 2.5) & ~cv.at(blocked, x, y) & apart(x, y, avoid_x, avoid_y, 8.)
    x, y = x[good], y[good]
    crowded = ~apart(nuclei["x"], nuclei["y"], x, y, .9 * nuclei["r"] + 2.4, axis=0)
    kept = thin_out(x, y, np.argsort(crowded, kind="stable").tolist(), want, (6.2, 4.5))
    return x[kept], y[kept]


# --- figures ---------------------------------------------------------------------------------------------------------

def draw_mitoses(cv, x, y):
    """Chromosomes without a membrane: plates, anaphases, clumped rings, three-armed figures. -> dye, cover (S, S)."""
    rng, parts = cv.rng, []
    for cx, cy, kind, turn in zip(x, y, rng.choice(4, len(x), p=[.45, .25, .2, .1]), rng.uniform(0, np.pi, len(x))):
        c, s = np.cos(turn), np.sin(turn)
        if kind == 0:                                       # metaphase: one plate seen from the side
            parts.append((cx, cy, 3.1, 2.9, turn, .22))
        elif kind == 1:                                     # anaphase: two parallel plates
            parts += [(cx - s * k, cy + c * k, 2.5, 2.8, turn, .2) for k in (-2.9, 2.9)]
        elif kind == 2:                                     # prometaphase: a clumped, hairy ring
            parts += [(cx + q * np.cos(t), cy + q * np.sin(t), w, 1.3, t + 1, .35) for t, q, w in
                      zip(turn + np.arange(6) * 1.05, rng.uniform(1.6, 3.1, 6), rng.uniform(1.3, 2.1, 6))]
        else:                                               # atypical: three arms
            parts += [(cx + 2.4 * np.cos(t), cy + 2.4 * np.sin(t), 2.1, 2.4, t, .2)
                      for t in turn + np.arange(3) * 2.094]
    px, py, r, long, angle, rough = np.array(parts).T
    return stamp(cv, cells(px, py, r, long=long, angle=angle, rough=rough, dark=3.), edge=.6)[:2]


def draw_inflammation(cv, kind, x, y):
    """-> dye and cover of the nuclei, halo (the cell's pale body), granules (orange cytoplasm): maps (S, S)."""
    rng, n = cv.rng, len(x)
    turn, granules = rng.uniform(0, 2 * np.pi, n), np.zeros((cv.size, cv.size), np.float32)
    if kind == "lymphocytes":                               # round, dense, hardly any cytoplasm
        rim, body = 4.1, cells(x, y, rng.normal(3.1, .15, n), long=1.06, angle=turn, dark=2.3)
    elif kind == "neutrophils":                             # two to four small lobes on an arc, pale cytoplasm
        lobes = rng.choice([2, 3, 4], n, p=[.25, .45, .3])
        who = np.repeat(np.arange(n), lobes)
        k = np.concatenate([np.arange(m) - (m - 1) / 2 for m in lobes])
        t = turn[who] + k * 1.3
        q = 2.1 + rng.normal(0, .25, len(who))
        rim, body = 4.8, cells(x[who] + q * np.cos(t), y[who] + q * np.sin(t), rng.normal(1.45, .12, len(who)),
                               long=1.2, angle=t + 1.57, dark=2.8)
    else:                                                   # eosinophils: two lobes in coarse orange granules
        who, k = np.repeat(np.arange(n), 2), np.tile([-1.7, 1.7], n)
        c, s = np.cos(turn[who]), np.sin(turn[who])
        rim, body = 5.6, cells(x[who] + k * c + 1.5 * s, y[who] + k * s - 1.5 * c, 1.65, long=1.15, dark=2.1)
        granules = stamp(cv, cells(x, y, rng.normal(5, .25, n), long=1.15, angle=turn, rough=.08), edge=1.4)[0]
        granules *= .62 + .7 * cv.noise(1.2)
    dye, cover, _ = stamp(cv, body, edge=.6)
    halo = stamp(cv, cells(x, y, rim), edge=2.)[1]
    return dye, cover, halo, granules


def paint_material(cv, kind, m, h, e, o):
    """Blend the material into the dye maps; m = its signed field. -> h, e, o."""
    rng, w = cv.rng, soft(m, 2.)
    if kind == "necrosis":                                  # pink granular ghosts of cells, with nuclear dust
        grain = .5 * cv.noise(1.3) + .5 * cv.noise(4)
        h, o = mix(h, .04 + .1 * cv.noise(6), w), mix(o, .08, w)
        e = mix(e, rng.uniform(.62, .85) + 1.1 * (grain - .5), w)
        x, y = rng.uniform(0, cv.side, (2, int(.02 * cv.area)))
        dust = cells(x, y, rng.uniform(.5, 1.25, len(x)), dark=rng.uniform(.5, 2., len(x)), rough=.2)
        h = np.maximum(h, stamp(cv, pick(dust, cv.at(m, x, y) > 1))[0])
        x, y = rng.uniform(0, cv.side, (2, int(.0025 * cv.area)))
        ghosts = cells(x, y, rng.uniform(3, 5, len(x)), long=1.2, dark=.3, vesicle=.9)
        h = np.maximum(h, stamp(cv, pick(ghosts, cv.at(m, x, y) > 4))[0])
    elif kind == "keratin":                                 # onion skins: the lamellae follow the field's level lines
        layers = (rng.random(64) - .5 + .5 * (-1.) ** np.arange(64)).astype(np.float32)     # one skin = 2.4 um
        bent = (m + 5 * (cv.noise(11) - .5) + 1.6 * (cv.noise(4) - .5)) / 2.4
        wave = np.interp(bent, np.arange(64) - 2, layers).astype(np.float32) * (.5 + .7 * cv.noise(6))
        ripe = np.clip(m / 14, 0, 1)                        # the centre is older, denser, more orange
        h, e, o = mix(h, .02, w), mix(e, .42 - .15 * ripe + .2 * wave, w), mix(o, .25 + .35 * ripe + .3 * wave, w)
        x, y = rng.uniform(0, cv.side, (2, int(.003 * cv.area)))
        ghosts = cells(x, y, rng.uniform(1.3, 2, len(x)), long=2.4, angle=rng.uniform(0, 3.14, len(x)), dark=.55)
        h = np.maximum(h, stamp(cv, pick(ghosts, cv.at(m, x, y) > 3))[0])
    elif kind == "mucin":                                   # pale blue-grey pools with wispy strands
        strand = np.clip(1 - 3.5 * np.abs(cv.fibres(5, 40, rng.uniform(0, np.pi), 30) - .5), 0, 1) * cv.noise(7)
        cloud = cv.noise(11)
        h, e, o = mix(h, .16 + .42 * strand + .16 * cloud, w), mix(e, .01 + .06 * strand, w), mix(o, 0, w)
    else:                                                   # fat: empty polygons between thin walls
        hole = soft(m - .9, 1.2)
        thin = soft(m + 1.8, 2) * (1 - hole)
        h, e, o = mix(mix(h, .08, thin), .01, hole), mix(mix(e, .7, thin), .02, hole), mix(o, 0, np.maximum(hole, thin))
    return h, e, o


def stroma_nuclei(cv, clear, direction):
    """Spindle nuclei along the fibres where `clear` (bool map). -> table."""
    rng, n = cv.rng, round(cv.area * cv.rng.uniform(.0038, .0055))
    x, y = rng.uniform(0, cv.side, (2, n))
    table = cells(x, y, rng.uniform(1.6, 2.2, n), long=rng.uniform(2.6, 4.5, n), angle=direction + rng.normal(0, .2, n),
                  dark=rng.uniform(.9, 1.4, n))
    return pick(table, cv.at(clear, x, y))


def nuclear_numbers(cv, table, areas):
    """Size statistics (um) of the nuclei whose centre is in view; zeros where there is none."""
    width = 2 * np.sqrt(areas[cv.inside(table["x"], table["y"])] / np.pi)
    mean, spread = (float(width.mean()), float(width.std())) if len(width) else (0., 0.)
    return {"n_nuclei": len(width), "mean_nuclear_diameter_um": mean, "nuclear_diameter_cv": spread / max(mean, 1e-6)}


# --- haematoxylin and eosin ------------------------------------------------------------------------------------------

def draw_he(facts, size):
    """Haematoxylin and eosin. -> image, masks, measured: see render.draw."""
    cv = Canvas(facts, size)
    rng, kind, large = cv.rng, facts["material"], facts["nuclear_size"] == "large"
    uniform = {"uniform": True, "pleomorphic": False}[facts["pleomorphism"]]
    diameter = {"small": rng.uniform(7, 7.8), "large": rng.uniform(12.2, 13.4)}[facts["nuclear_size"]]
    m = plan_material(cv, kind)
    epi, lumen, nuclei, fits, step = plan_tissue(cv, facts["architecture"], diameter, uniform, m)
    inside, in_lumen, in_material = epi > 0, lumen > 0, np.zeros((size, size), bool) if m is None else m > 0

    # dividing cells and guests take their places; nuclei that would lie under them make room
    mx = my = ix = iy = np.zeros(0)
    cv.stage(1)
    if facts["mitoses"] == "frequent":
        mx, my = place_mitoses(cv, nuclei, fits, (epi > 1.5) & (lumen < -2.5))
        fits &= apart(nuclei["x"], nuclei["y"], mx, my, 4.2 + .42 * nuclei["r"])
    cv.stage(2)
    if facts["inflammation"] != "none":
        ix, iy = place_inflammation(cv, ~inside & ~in_lumen, in_lumen | in_material, pick(nuclei, fits), mx, my)
        fits &= apart(nuclei["x"], nuclei["y"], ix, iy, 1.8 + .75 * nuclei["r"])

    # ground
    rng = cv.stage(3)
    direction = rng.uniform(0, np.pi)
    e = rng.uniform(.22, .4) + rng.uniform(.35, .65) * cv.fibres(2.6, 22, direction, 22) ** 1.5
    h, o = np.full_like(e, rng.uniform(.02, .08)), np.zeros_like(e)
    share, _ = territories(cv, nuclei["x"][fits], nuclei["y"][fits], .95 * step, nuclei["r"][fits])
    grain, w = cv.noise(2.2), soft(epi, 1.6)
    border = np.clip((.85 - share) / .3, 0, 1)
    e = mix(e, rng.uniform(.28, .6) * (.8 + .4 * cv.noise(14)) + .18 * (grain - .5) + .12 * border, w)
    h = mix(h, rng.uniform(.08, .26) * (.75 + .5 * grain), w)
    e += .3 * np.exp(-((epi + .8) / 1.1) ** 2)              # basement membrane
    if facts["architecture"] == "solid_nests":              # retraction cleft, here and there
        e *= 1 - .45 * np.exp(-((epi + 3) / 1.3) ** 2) * cv.noise(20)
    w = soft(lumen, 1.4)
    e = mix(e + .3 * np.exp(-((lumen + .9) / 1.1) ** 2), rng.uniform(0, .16) * cv.noise(8) + .02, w)
    h = mix(h, .015, w)
    if m is not None:
        h, e, o = paint_material(cv, kind, m, h, e, o)

    # nuclei
    rng, n = cv.stage(4), len(fits)
    open_chromatin = np.ones(n) if uniform else rng.uniform(.2, 1.3, n)
    nuclei["vesicle"] = ((.42 if large else .15) * open_chromatin).astype(np.float32)
    nuclei["nucleolus"] = (large & (rng.random(n) < .75)).astype(np.float32)
    spindle = stroma_nuclei(cv, (epi < -2.2) & ~(in_material if m is None else m > -2), direction)
    spindle = pick(spindle, apart(spindle["x"], spindle["y"], ix, iy, 6.))
    tumour = pick(nuclei, fits)
    dye, cover, areas = stamp(cv, tumour)
    spindle_dye, spindle_cover, _ = stamp(cv, spindle)
    dye, cover = np.maximum(dye, spindle_dye) * (.8 + .4 * cv.noise(1.4)), np.maximum(cover, spindle_cover)
    guests = figures = np.zeros_like(e)
    cv.stage(5)
    if len(ix):
        guest_dye, guest_cover, guests, granules = draw_inflammation(cv, facts["inflammation"], ix, iy)
        fade = 1 - .7 * guests
        e, h, o = e * fade + .08 * guests, h * fade, np.maximum(o * fade, granules)
        dye, cover = np.maximum(dye * fade, guest_dye), np.maximum(cover * fade, guest_cover)
    cv.stage(6)
    if len(mx):
        halo = stamp(cv, cells(mx, my, .25 * diameter + 4.8, rough=.04), edge=2.5)[1]
        figure_dye, figures = draw_mitoses(cv, mx, my)
        e, h, o = mix(e, .2, .75 * halo), h * (1 - .9 * halo), o * (1 - halo)
        dye, cover = np.maximum(dye * (1 - halo), figure_dye), np.maximum(cover * (1 - halo), figures)
    e, h = np.clip(e, 0, None) * (1 - .55 * cover), np.maximum(h, dye)
    # The laboratory stains to the eye: each dye's mean over the field is drawn, whatever lies in it, so that the mean
    # colour of the image does not tell fat from keratin (a linear probe on it stays near chance, tests/test_render.py).
    rng = cv.stage(7)
    h *= np.clip(rng.uniform(.36, .56) / h.mean(), .72, 1.5)
    e *= np.clip((rng.uniform(.28, .48) - o.mean()) / e.mean(), .45, 1.7)
    image = transmit(np.stack((h, e, o), -1), *draw_stains(facts, ("haematoxylin", "eosin", "orange")))
    masks = {"nuclei": cover > .5, "architecture": inside, "mitoses": figures > .5, "inflammation": guests > .5,
             "material": in_material}
    measured = {**nuclear_numbers(cv, tumour, areas), "n_mitoses": len(mx), "n_inflammatory": len(ix),
                "material_fraction": float(in_material.mean()), "epithelium_fraction": float(inside.mean()),
                "lumen_fraction": float((in_lumen & ~in_material).mean())}
    return photograph(image, facts), masks, measured


# --- immunohistochemistry --------------------------------------------------------------------------------------------

POSITIVE = {"negative": (0., 0.), "low": (.14, .23), "moderate": (.47, .58), "high": (.89, .99)}   # of the tumour cells
DAB = {"none": 0., "weak": .58, "strong": 1.6}


def choose_positive(cv, proportion, nuclei):
    """Which tumour cells stain: an exact share of those in view, at random places. -> bool (N,)."""
    level, rank = cv.rng.uniform(*POSITIVE[proportion]), cv.rng.random(len(nuclei["x"]))
    brown, in_view = rank < level, np.flatnonzero(cv.inside(nuclei["x"], nuclei["y"]))
    brown[in_view] = False
    brown[in_view[np.argsort(rank[in_view])[:round(level * len(in_view))]]] = True
    return brown


def read_dab(cv, stain, nuclei, reach):
    """Mean DAB within `reach` (N,) um of every nucleus, the pixels of its own territory only. -> (N,)."""
    x, y = nuclei["x"], nuclei["y"]
    _, owner = territories(cv, x, y, 2 * reach.max(), np.arange(1, len(x) + 1, dtype=np.float32))
    dx, dy, flat = cv.windows(x, y, reach.max())
    own = np.append(owner.ravel(), 0)[flat] == np.arange(1, len(x) + 1)[:, None, None]           # (N, K, K)
    own &= dx * dx + dy * dy < np.square(reach)[:, None, None]
    return (np.append(stain.ravel(), 0)[flat] * own).sum((1, 2)) / np.maximum(own.sum((1, 2)), 1)


def draw_ihc(facts, size):
    """Brown DAB in nuclei, membranes or cytoplasm over a blue counterstain. -> image, masks, measured."""
    cv = Canvas(facts, size)
    where, direction = facts["location"], cv.rng.uniform(0, np.pi)
    diameter = cv.rng.uniform(7.8, 8.8)
    epi, lumen, nuclei, fits, step = plan_tissue(cv, facts["architecture"], diameter, True, None, body=4.)
    inside, in_lumen = epi > 0, lumen > 0
    ix = iy = np.zeros(0)
    cv.stage(1)
    if facts["inflammation"] == "lymphocytes":
        ix, iy = place_inflammation(cv, ~inside & ~in_lumen, in_lumen, pick(nuclei, fits), ix, iy)
        fits &= apart(nuclei["x"], nuclei["y"], ix, iy, 1.8 + .75 * nuclei["r"])
    nuclei, rng = pick(nuclei, fits), cv.stage(2)
    brown = choose_positive(cv, facts["proportion"], nuclei)
    depth = DAB[facts["intensity"]] * rng.uniform(.88, 1.12) * rng.normal(1, .08, len(brown)) * brown
    depth = depth.astype(np.float32)                        # DAB of every cell, 0 where negative

    # ground: no eosin, so the counterstain alone must tell epithelium from stroma
    rng = cv.stage(3)
    pale = 1 - .85 * soft(lumen, 1.4)
    w = soft(epi, 1.6)
    h = mix(.02 + .09 * cv.fibres(2.6, 22, direction, 22), rng.uniform(.13, .2) + .08 * cv.noise(3), w)
    h = (h + .07 * np.exp(-((epi + .5) / 1.) ** 2)) * pale
    d = (rng.uniform(.01, .04) + .03 * cv.noise(5)) * pale   # unspecific ground, in negative controls as well
    nuclei["vesicle"][:] = .2
    nuclei["dark"] *= rng.uniform(.5, .65)
    blue, cover, areas = stamp(cv, nuclei)
    share, owned = territories(cv, nuclei["x"], nuclei["y"], .95 * step, depth)
    w = w * (1 - soft(lumen, 1.4))
    if where == "nuclear":
        stain = stamp(cv, {**nuclei, "dark": depth})[0] * (.85 + .3 * cv.noise(1.4))
        blue = blue * (1 - .45 * np.clip(stain / .3, 0, 1))
    elif where == "membranous":                             # a thin line on the positive side of every border
        edge = np.exp(-((np.minimum(epi, -lumen) - 1) / 1.1) ** 2)            # towards the stroma and the lumen
        stain = owned * np.maximum(np.clip((.74 - share) / .17, 0, 1), edge) * w
    elif where == "cytoplasmic":
        stain = owned * (.5 + .35 * cv.noise(1.8)) * soft(share - .66, .3) * (1 - .95 * cover) * w
    else:                                                   # a negative control
        stain = np.zeros_like(h)
    blue = np.maximum(blue, .55 * stamp(cv, stroma_nuclei(cv, epi < -2.2, direction))[0])
    guests = np.zeros_like(h)
    if len(ix):
        dye, _, guests, _ = draw_inflammation(cv, "lymphocytes", ix, iy)
        h, stain = h * (1 - .6 * guests), stain * (1 - .9 * guests)
        blue = np.maximum(blue * (1 - .8 * guests), .62 * dye)
    h = np.maximum(h, blue * (.85 + .3 * cv.noise(1.4)))
    spread = stain if where == "nuclear" else blur(stain, .2)        # two territories meet without a pixel edge
    image = transmit(np.stack((h, d + spread), -1), *draw_stains(facts, ("haematoxylin", "dab")))

    reach = .7 * nuclei["r"] if where == "nuclear" else np.full(len(brown), .95 * step, np.float32)
    positive = (read_dab(cv, stain, nuclei, reach) > .04)[cv.inside(nuclei["x"], nuclei["y"])]
    masks = {"nuclei": cover > .5, "architecture": inside, "proportion": stain > .15, "inflammation": guests > .5}
    measured = {**nuclear_numbers(cv, nuclei, areas), "n_inflammatory": len(ix),
                "positive_fraction": float(positive.sum() / max(len(positive), 1)),
                "mean_dab": float(stain[stain > .15].mean()) if (stain > .15).any() else 0.}
    return photograph(image, facts), masks, measured
