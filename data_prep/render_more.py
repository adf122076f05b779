"""Drawn cytology smears, FISH fields and gross photographs. Called through `data_prep.render.draw`.

Cytology absorbs light like a section (Beer-Lambert), with other dyes. FISH emits it: colours add on black. A gross
photograph reflects it; its frame always holds one whole specimen, so its lengths are shares of the frame's side and
"um_per_px" only says how many pixels there are.

Letters: S = size in pixels, N = objects.
"""

import numpy as np

from .render import (Canvas, cells, darts, discs, draw_stains, harmonics, lattice, mix, photograph, pick, relax, soft,
                     stamp, transmit, wobble)
from .render_tissue import apart, draw_inflammation, nuclear_numbers, thin_out

# --- cytology --------------------------------------------------------------------------------------------------------

DYES = {"pap": ("haematoxylin", "light_green", "orange_g"), "giemsa": ("azure", "methylene_blue", "eosin")}


def place_smear(cv, arrangement, radius):
    """Cell centres of a smear: apart, in two or three heaps, or as one even sheet. -> x, y (N,)."""
    rng = cv.rng
    if arrangement == "single":
        return darts(cv, np.full(300, radius), rng.uniform(2, 4), margin=.4 * radius)[:2]
    if arrangement == "monolayer":                          # a flat honeycomb that fills most of the field
        x, y = lattice(cv, 1.86 * radius, .08)
        dx, dy = x - cv.rng.uniform(.4, .6) * cv.side, y - cv.rng.uniform(.4, .6) * cv.side
        rho = np.hypot(dx, dy) + 1e-3
        edge = 1 + .15 * wobble((dx / rho)[None], (dy / rho)[None], harmonics(rng, 1))[0]
        keep = rho < np.sqrt(.8 * cv.area / np.pi) * edge
        return x[keep], y[keep]
    # clusters: two or three crowded heaps whose cells overlap
    hub_x, hub_y = (v[:3] for v in darts(cv, np.full(60, .2 * cv.side), 0., margin=.2 * cv.side)[:2])
    hub = np.repeat(np.arange(len(hub_x)), rng.integers(7, 11, len(hub_x)))
    x, y = (h[hub] + rng.normal(0, .45 * radius, len(hub)) for h in (hub_x, hub_y))
    return relax(x, y, np.full(len(x), .58 * radius), 12)


def draw_cytology(facts, size):
    """Papanicolaou or Giemsa smear. -> image, masks, measured: see render.draw."""
    cv = Canvas(facts, size)
    rng, pap, kind = cv.rng, facts["stain"] == "pap", facts["background"]
    radius, r = {"low": (rng.uniform(12.5, 13.5), rng.uniform(4.8, 5.3)),
                 "high": (rng.uniform(8.8, 9.6), rng.uniform(7, 7.5))}[facts["nc_ratio"]]
    x, y = place_smear(cv, facts["arrangement"], radius)
    n, heap = len(x), facts["arrangement"] == "clusters"
    smooth = {"smooth": True, "irregular": False}[facts["contour"]]
    prominent = {"absent": False, "prominent": True}[facts["nucleoli"]]
    body = cells(x, y, radius * rng.normal(1, .04, n), long=rng.uniform(1, 1.15, n), angle=rng.uniform(0, 3.14, n),
                 rough=.05, dark=rng.uniform(.8, 1.2, n))
    off = (radius - r) * rng.uniform(0, .3, n) * np.exp(2j * np.pi * rng.random(n))
    nuclei = cells(x + off.real, y + off.imag, r * rng.normal(1, .05, n), angle=rng.uniform(0, 3.14, n),
                   long=1.08 if smooth else rng.uniform(1.1, 1.5, n),
                   rough=.015 if smooth else rng.uniform(.22, .34, n),
                   dark=rng.uniform(.95, 1.25) * rng.normal(1, .07, n), vesicle=.3)

    # ground and what lies in it
    a, b, c = (np.full((size, size), v, np.float32) for v in rng.uniform(0, .04, 3))
    b += .04 * cv.noise(25)
    debris = np.zeros((size, size), np.float32)
    if kind == "bloody":                                    # red cells: discs with a pale dent, in rouleaux and alone
        m = round(cv.area * rng.uniform(.0048, .0062))
        cx, cy = rng.uniform(0, cv.side, (2, m))
        cx, cy = relax(cx, cy, np.full(m, 3.), 3)
        red, debris, _ = stamp(cv, cells(cx, cy, rng.normal(3.4, .12, m), dark=rng.uniform(.5, .75), vesicle=.5))
        b, c = b + (.1 if pap else .14) * debris, c + red
    elif kind == "necrotic":                                # smeared granular dirt with nuclear crumbs and ghosts
        cloud = cv.noise(17)
        debris = soft(cloud - .42, .16) * (.35 + .65 * cv.fibres(2, 2.6, rng.uniform(0, 3), 6))
        m = round(cv.area * .016)
        cx, cy = rng.uniform(0, cv.side, (2, m))
        crumbs = cells(cx, cy, rng.uniform(.5, 1.4, m), dark=rng.uniform(.3, 1.5, m), rough=.25)
        a = np.maximum(a + .16 * debris, stamp(cv, pick(crumbs, cv.at(cloud, cx, cy) > .42))[0])
        b, c = b + .22 * debris, c + .42 * debris
    elif kind == "inflammatory":
        tries = rng.uniform(3, cv.side - 3, (2, 900))
        ok = np.flatnonzero(apart(*tries, nuclei["x"], nuclei["y"], r + 3.5))
        ok = ok[np.argsort(~apart(*tries[:, ok], x, y, radius + 2), kind="stable")]
        chosen = thin_out(*tries, ok.tolist(), max(8, round(cv.area * rng.uniform(.002, .003))), (6.5,))

    # cells: in a heap, bodies are see-through and add up where they overlap
    orange = rng.random(n) < .3 if pap else np.ones(n, bool)  # some Pap cells keratinise; all Giemsa bodies are mixed
    edge = .72 + .28 * cv.noise(3)
    body_map, body_cover, body_area = stamp(cv, body, edge=1.6, add=heap)
    warm = np.minimum(stamp(cv, {**body, "dark": body["dark"] * orange}, edge=1.6, add=heap)[0], body_map)
    rim = stamp(cv, {**body, "dark": .3 * body["dark"], "vesicle": np.ones(n, np.float32)}, edge=1.6)[0]
    veil = 1 - .8 * body_cover
    a, b, c = a * veil, b * veil, c * veil
    if pap:
        b, c = b + (.42 * (body_map - warm) + rim) * edge, c + .5 * warm * edge
    else:
        b, c = b + (.34 * body_map + rim) * edge, c + .12 * warm * edge
    dye, cover, area = stamp(cv, nuclei, add=heap)
    dye = np.minimum(dye, 2.2) * (.8 + .4 * cv.noise(1.3))
    dots = np.zeros_like(a)
    if prominent:
        turn, k = rng.uniform(0, 6.28, n), (rng.random(n) < .4)
        px = np.concatenate((nuclei["x"] + .3 * r * np.cos(turn), (nuclei["x"] - .4 * r * np.cos(turn))[k]))
        py = np.concatenate((nuclei["y"] + .3 * r * np.sin(turn), (nuclei["y"] - .4 * r * np.sin(turn))[k]))
        dots = stamp(cv, cells(px, py, max(1.35, .25 * r)), edge=.6)[1]
        dye = mix(dye * .68, 2.6, dots)                     # open chromatin round a dark nucleolus
    if kind == "inflammatory":
        guest, _, debris, _ = draw_inflammation(cv, "neutrophils", *tries[:, chosen])
        dye = np.maximum(dye * (1 - .6 * debris), guest)
        b, c = b * (1 - .5 * debris) + .05 * debris, c * (1 - .5 * debris) + .05 * debris
    a, b, c = np.maximum(a, dye), b * (1 - .75 * cover), c * (1 - .75 * cover)

    image = transmit(np.stack((a, b, c), -1), *draw_stains(facts, DYES[facts["stain"]]))
    seen = cv.inside(x, y)
    share = np.sqrt(area / np.maximum(body_area, cv.um ** 2))
    gaps = np.hypot(x[:, None] - x, y[:, None] - y) + np.where(np.eye(n, dtype=bool), np.inf, 0)
    masks = {"nuclei": cover > .5, "cytoplasm": (body_cover > .5) & (cover <= .5), "nucleoli": dots > .5,
             "background": debris > .35}
    measured = {**nuclear_numbers(cv, nuclei, area), "n_cells": int(seen.sum()), "nc_ratio": float(share[seen].mean()),
                "nearest_cell_um": float(gaps[seen].min(1).mean()), "nucleoli_fraction": float((dots > .5).mean()),
                "background_fraction": float(masks["background"].mean())}
    return photograph(image, facts), masks, measured


# --- fluorescence in situ hybridisation ------------------------------------------------------------------------------

# Emission colours (R, G, B) of DAPI, the red and the green probe; the held-out set turns all three hues.
GLOW = {False: ((.13, .27, 1.), (1., .16, .12), (.16, 1., .22)), True: ((.42, .16, 1.), (1., .52, .10), (.10, 1., .70))}


def place_signals(cv, x, y, r, count, clustered, taken):
    """`count` (N,) probe signals in each nucleus: apart from each other, or heaped in one spot. -> x, y (signals,)."""
    found = []
    for cx, cy, radius, k, old in zip(x, y, r, count, taken):
        spots = []
        if clustered:
            hub = radius * .45 * np.exp(2j * np.pi * cv.rng.random())
            spots = [hub + cv.rng.normal(0, .85) + 1j * cv.rng.normal(0, .85) for _ in range(k)]
        for room in (2.9, 2.2, 1.5, .6):                    # loosen the distance until all have found a place
            for z in np.sqrt(cv.rng.random(40)) * np.exp(2j * np.pi * cv.rng.random(40)) * .78 * radius:
                if len(spots) < k and all(abs(z - q) > room for q in spots + old):
                    spots.append(z)
        old += spots
        found += [(cx + z.real, cy + z.imag) for z in spots]
    return np.array(found).T


def draw_fish(facts, size):
    """DAPI-blue nuclei with red and green probe signals on black. -> image, masks, measured."""
    cv = Canvas(facts, size)
    rng, large = cv.rng, {"small": False, "large": True}[facts["nuclear_size"]]
    r = rng.uniform(9.4, 10.4) if large else rng.uniform(5.9, 6.5)
    x, y, _ = darts(cv, np.full(260, r), rng.uniform(1.5, 4), margin=.75 * r)
    x, y = x[:(12 if large else 22)], y[:(12 if large else 22)]
    n = len(x)
    table = cells(x, y, r * rng.normal(1, .05, n), long=rng.uniform(1.02, 1.25, n), angle=rng.uniform(0, 3.14, n),
                  rough=.03, dark=rng.uniform(.75, 1.1, n))
    glow, cover, area = stamp(cv, table, edge=1.6)
    many = (8, 12) if large else (5, 8)
    counts = {"one": (1, 2), "two": (2, 3), "many": many}
    taken = [[] for _ in range(n)]
    layers, numbers = {}, {}
    heap = facts["arrangement"] == "clustered" and facts["red"] == "many"
    for name in ("red", "green"):
        each = rng.integers(*counts[facts[name]], n)
        px, py = place_signals(cv, x, y, .92 * table["r"], each, heap and name == "red", taken)
        dx, dy, flat = cv.windows(px, py, 3.)
        bright = rng.uniform(.8, 1.1, len(px))[:, None, None] * np.exp(-(dx * dx + dy * dy) / (2 * .85 ** 2))
        layers[name] = cv.splat(flat, bright) + .3 * cv.splat(flat, bright, add=True)
        seen = cv.inside(x, y)
        numbers[f"{name}_per_nucleus"] = float(each[seen].mean())
        spots = np.split(np.stack((px, py), 1), each.cumsum()[:-1])
        numbers[f"{name}_spread_um"] = float(np.mean([s.std(0).sum() for s in spots]))
    haze = .03 + .05 * cv.noise(30)
    dapi = (glow * (.55 + .45 * cv.noise(2.6)) * rng.uniform(.7, .95) + .35 * haze)[..., None]
    blue, red, green = (np.array(v, np.float32) for v in GLOW[facts["stain_shift"]])
    blue = blue * np.random.default_rng((facts["seed"], 1)).uniform(.85, 1.1, 3).astype(np.float32)
    image = 235 * (dapi * blue * (1 - .6 * np.clip(layers["red"] + layers["green"], 0, 1))[..., None]
                   + layers["red"][..., None] * red + layers["green"][..., None] * green)
    masks = {"nuclei": cover > .5, "red": layers["red"] > .5, "green": layers["green"] > .5}
    return photograph(np.clip(image + 4, 0, 255), facts), masks, {**nuclear_numbers(cv, table, area), **numbers}


# --- gross photographs -----------------------------------------------------------------------------------------------

SURFACE = {"tan": (190, 152, 112), "white": (226, 219, 208), "yellow": (228, 188, 84), "red": (150, 58, 52)}


def mottle(cv, share):
    """Two rotated octaves of noise in 0..1 with spots of `share` of the frame: thresholds show no pixel grid."""
    cell = share * cv.side
    return .6 * cv.fibres(cell, cell, cv.rng.uniform(0, 3), cell) + .4 * cv.fibres(
        .45 * cell, .45 * cell, cv.rng.uniform(0, 3), cell)


def spiky(cv, x, y, r, rays):
    """Signed field (S, S) of an infiltrating mass: a knobbly core, tongues of uneven length and width round it."""
    bend = .10 * cv.side
    dx, dy = cv.X - x + bend * (mottle(cv, .16) - .5), cv.Y - y + bend * (mottle(cv, .16) - .5)
    turn, reach = np.arctan2(dy, dx) / (2 * np.pi) + .5, .62
    for n, strength in ((rays, .85), (2 * rays + 3, .4)):
        length = cv.rng.uniform(.15, 1, n)
        phase = turn * n + .7
        low = np.floor(phase)
        reach = reach + strength * length[low.astype(int) % n] * np.abs(np.sin(np.pi * (phase - low))) ** 2.2
    return r * reach - np.hypot(dx, dy)


def paint(picture, colour, weight):
    """Blend a colour (3,) or a picture (S, S, 3) into a picture (S, S, 3) by weight (S, S)."""
    return picture + (np.asarray(colour, np.float32) - picture) * np.asarray(weight, np.float32)[..., None]


def paint_board(cv, light):
    """A neutral board with a ruler along the lower edge. -> picture (S, S, 3)."""
    side = cv.side
    grey = light.uniform(125, 175) + light.uniform((-8, -4, 0), (4, 6, 14))
    picture = np.full((cv.size, cv.size, 3), grey, np.float32)
    picture += 8 * (cv.noise(.02 * side) - .5)[..., None] + 10 * (cv.noise(.4 * side) - .5)[..., None]
    top = cv.rng.uniform(.9, .93) * side
    ruler = (cv.Y > top) & (cv.Y < top + .065 * side) & (cv.X > .06 * side) & (cv.X < .94 * side)
    tick = np.zeros_like(ruler)
    for pitch, depth in ((.085, .04), (.0425, .02)):        # long and short marks, at least a pixel wide
        phase = ((cv.X - .08 * side) / (pitch * side) + .5) % 1
        tick |= (np.abs(phase - .5) < max(.006 / pitch, .6 / cv.size / pitch)) & (cv.Y < top + depth * side)
    return paint(paint(picture, (236, 234, 226), ruler), (45, 45, 50), ruler & tick)


def paint_mass(cv, tissue, mass, surface, sharp):
    """A firm pale mass (dusky pink in white tissue) where the field mass > 0."""
    side = cv.side
    colour = np.array((186, 138, 128) if surface == "white" else (222, 210, 200)) + cv.rng.uniform(-6, 6, 3)
    whorl = cv.fibres(.022 * side, .1 * side, cv.rng.uniform(0, 3), .2 * side) - .5
    tissue = paint(tissue, 0, .25 * np.exp(-(mass / (.03 * side)) ** 2))       # a faint shade sets it off
    tissue = paint(tissue, colour * (1 + .16 * whorl[..., None]), soft(mass, (.012 if sharp else .03) * side))
    if sharp:                                               # a thin fibrous capsule
        tissue = paint(tissue, colour * .62, .8 * np.exp(-((mass - .004 * side) / (.011 * side)) ** 2))
    return tissue


def paint_necrosis(cv, tissue, dead):
    """Chalky yellow, crumbling, with a dark red haemorrhagic rim."""
    side = cv.side
    tissue = paint(tissue, (104, 30, 30), soft(dead + .012 * side, .03 * side) * .85)
    tissue = paint(tissue, (214, 204, 128), soft(dead - .012 * side, .035 * side))
    return paint(tissue, (120, 70, 40), soft(dead, .01 * side) * np.clip((mottle(cv, .03) - .58) * 6, 0, .8))


def paint_cyst(cv, tissue, cyst, x, y, q):
    """A smooth hollow of radius q at (x, y): glistening pale wall, brown depth, the side towards the lamp in shade."""
    tissue = paint(tissue, (238, 226, 214), soft(cyst + .018 * cv.side, .012 * cv.side))
    slope = np.clip((cv.X - x + cv.Y - y) / q, -1.5, 1.5)
    shade = .72 + .22 * slope + .1 * (mottle(cv, .03) - .5)
    tissue = paint(tissue, np.array((124, 92, 78)) * shade[..., None], soft(cyst, .014 * cv.side) * .95)
    glint = np.exp(-((cv.X - x - .4 * q) ** 2 + (cv.Y - y - .4 * q) ** 2) / (.16 * q) ** 2)
    return paint(tissue, (250, 248, 244), .8 * glint)


def draw_gross(facts, size):
    """The cut surface of a specimen on a board with a ruler. -> image, masks, measured: see render.draw."""
    cv = Canvas(facts, size)
    rng, side, sharp = cv.rng, cv.side, facts["border"] == "circumscribed"
    light = np.random.default_rng((facts["seed"], 1))       # lamp and board: independent of the specimen
    balance = light.uniform((1.04, .96, .80), (1.09, 1., .87)) if facts["stain_shift"] else light.uniform(.95, 1.04, 3)
    picture = paint_board(cv, light)

    cx, cy, big = (np.array([v]) * side for v in (.5 + rng.normal(0, .01), .46, rng.uniform(.36, .41)))
    body = discs(cv, cx, cy, big, .08, harmonics(rng, 1), rim=.2 * side)
    shadow = np.roll(body, (max(1, size // 50), max(1, size // 60)), (0, 1))
    picture *= (1 - .45 * soft(shadow + .01 * side, .05 * side))[..., None]
    base = np.array(SURFACE[facts["surface"]]) + rng.uniform(-7, 7, 3)
    tissue = (base * (1 + .3 * (mottle(cv, .06) - .5))[..., None]).astype(np.float32)
    vein = np.clip(1 - 11 * np.abs(mottle(cv, .2) - .5), 0, 1) * cv.noise(.15 * side)
    tissue = paint(tissue, base * (.84, .7, .7), .7 * vein)
    tissue *= (1 - .3 * np.exp(-(body / (.02 * side)) ** 2))[..., None]        # the specimen's own capsule

    # findings: necrosis in the mass or, without one, in the tissue; cysts on the other side
    away, nothing = rng.uniform(0, 2 * np.pi), np.full((size, size), -side, np.float32)
    far = {"absent": .1, "small": rng.uniform(.1, .18), "large": rng.uniform(.08, .12)}[facts["mass"]] * side
    r = {"absent": 0., "small": rng.uniform(.1, .118), "large": rng.uniform(.19, .225)}[facts["mass"]] * side
    mx, my = cx + far * np.cos(away), cy + far * np.sin(away)
    mass = dead = cyst = nothing
    if r:
        mass = discs(cv, mx, my, np.array([r]), .035, harmonics(rng, 1), rim=.1 * side) if sharp else spiky(
            cv, mx, my, r, int(rng.integers(9, 13)))
        tissue = paint_mass(cv, tissue, mass, facts["surface"], sharp)
    if facts["necrosis"] == "present":
        q = np.array([max(.55 * r, .06 * side)])
        dead = discs(cv, mx, my, q, .2, harmonics(rng, 1)) + .06 * side * (mottle(cv, .05) - .5)
        tissue = paint_necrosis(cv, tissue, dead)
    if facts["cyst"] == "present":
        k = rng.integers(1, 3)                              # one, or a second smaller one beside it
        back = away + np.pi + rng.uniform(-.5, .5) + np.arange(k)
        d, q = rng.uniform(.21, .25) * side, rng.uniform(.075, .095) * side
        kx, ky = cx + d * np.cos(back), cy + d * np.sin(back)
        cyst = discs(cv, kx, ky, q * np.array([1, .6])[:k], .04, harmonics(rng, k))
        tissue = paint_cyst(cv, tissue, cyst, kx[0], ky[0], q)
    n = rng.integers(6, 14)                                 # wet glints
    wet = cells(*(rng.uniform(.2, .8, (2, n)) * side), rng.uniform(.006, .011, n) * side, long=rng.uniform(1, 4, n),
                angle=rng.normal(.6, .5, n), dark=rng.uniform(.2, .7, n))
    tissue = paint(tissue, (255, 252, 250), stamp(cv, wet, edge=.012 * side)[0] * (cyst < 0))
    picture = paint(picture, tissue, soft(body, .012 * side))

    inside = body > 0
    mine = (mass > 0) & inside
    masks = {"surface": inside, "mass": mine, "border": (np.abs(mass) < .02 * side) & inside,
             "necrosis": (dead > 0) & inside, "cyst": (cyst > 0) & inside}
    # raggedness = perimeter^2 / (4 pi area), 1 for a disc; counting pixel edges overestimates a perimeter by 4 / pi
    edges = (mine[1:] != mine[:-1]).sum() + (mine[:, 1:] != mine[:, :-1]).sum()
    measured = {"specimen_fraction": float(inside.mean()), "mass_fraction": float(mine.sum() / inside.sum()),
                "border_raggedness": float((edges * np.pi / 4) ** 2 / (4 * np.pi * max(mine.sum(), 1))),
                "necrosis_fraction": float(masks["necrosis"].sum() / inside.sum()),
                "cyst_fraction": float(masks["cyst"].sum() / inside.sum())}
    return photograph(picture * balance.astype(np.float32), facts), masks, measured
