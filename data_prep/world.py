"""The micro-world: which findings exist, what they are called, and what follows from them.

Contract: facts are a dict {"subfield": …, attribute: value, …}, values as in ATTRIBUTES. Three rules read facts:
  tissue(facts)   -> a tissue class in words, for zero-shot tests ("keratin pearls", "fused glands")
  diagnose(facts) -> (diagnosis, the attributes that decide it)
  score(facts)    -> (total, [((attributes), points), …]), a small grade whose sum has to be worked out
The space of every subfield is small (H&E 640 combinations, FISH 16), so it is listed once and everything else is a
search in the list: sampling, the deciding findings, why an alternative is ruled out. Only the rules themselves are
knowledge.

These are TEACHING rules, simplified so that a student can check every step: Nottingham, Allred, HER2 0-3+, Robinson's
cytology grade and FISH ratios are recognisable, their thresholds are not complete. They are no diagnostics.

May be copied alone: standard library only.
"""

import functools
import itertools
import random

SUBFIELDS = ("H&E", "IHC", "cytology", "FISH", "gross")
TOPICS = ("breast", "colon", "lung", "skin", "kidney", "thyroid")     # independent of the image: the name tells nothing

# One entry a finding: value -> noun phrase(s). A phrase names exactly one (attribute, value) of its subfield, so that a
# finding can be read back from free text by longest match. "!keratin" = any value but keratin.
PHRASES = {
    "H&E": {
        "architecture": {"round_glands": ["round glands"], "fused_glands": ["fused glands"],
                         "solid_nests": ["solid nests"], "diffuse_sheets": ["diffuse sheets"]},
        "nuclear_size": {"small": ["small nuclei"], "large": ["large nuclei"]},
        "pleomorphism": {"uniform": ["uniform nuclei"], "pleomorphic": ["pleomorphic nuclei"]},
        "mitoses": {"absent": ["no mitoses"], "frequent": ["frequent mitoses"]},
        "inflammation": {"none": ["no inflammation"], "lymphocytes": ["lymphocytes"], "neutrophils": ["neutrophils"],
                         "eosinophils": ["eosinophils"], "!lymphocytes": ["no lymphocytes"],
                         "!neutrophils": ["no neutrophils"], "!eosinophils": ["no eosinophils"]},
        "material": {"none": ["plain stroma"], "necrosis": ["necrosis"], "keratin": ["keratin pearls"],
                     "mucin": ["mucin pools"], "fat": ["fat"], "!necrosis": ["no necrosis"],
                     "!keratin": ["no keratin pearls"], "!mucin": ["no mucin pools"], "!fat": ["no fat"]},
    },
    "IHC": {
        "proportion": {"negative": ["no positive cells"], "low": ["few positive cells"],
                       "moderate": ["many positive cells"], "high": ["mostly positive cells"]},
        "intensity": {"none": ["no brown"], "weak": ["weak brown"], "strong": ["strong brown"]},
        "location": {"none": ["no staining"], "nuclear": ["nuclear staining"], "membranous": ["membrane staining"],
                     "cytoplasmic": ["cytoplasm staining"]},
        "architecture": {"round_glands": ["round glands"], "solid_nests": ["solid nests"],
                         "diffuse_sheets": ["diffuse sheets"]},
        "inflammation": {"none": ["no inflammation", "without lymphocytes"], "lymphocytes": ["lymphocytes"]},
    },
    "cytology": {
        "stain": {"pap": ["pap stain"], "giemsa": ["giemsa stain"]},
        "arrangement": {"single": ["single cells"], "clusters": ["cell clusters"], "monolayer": ["flat sheets"]},
        "nc_ratio": {"low": ["ample cytoplasm"], "high": ["scant cytoplasm"]},
        "contour": {"smooth": ["smooth contours"], "irregular": ["irregular contours"]},
        "nucleoli": {"absent": ["no nucleoli"], "prominent": ["prominent nucleoli"]},
        "background": {"clean": ["clean background"], "inflammatory": ["inflammatory background"],
                       "bloody": ["bloody background"], "necrotic": ["necrotic background"],
                       "!inflammatory": ["no inflammation"], "!bloody": ["no blood"], "!necrotic": ["no necrosis"]},
    },
    "FISH": {
        "red": {"one": ["one red signal"], "two": ["two red signals"], "many": ["many red signals"]},
        "green": {"two": ["two green signals"], "many": ["many green signals"]},
        "arrangement": {"scattered": ["scattered signals"], "clustered": ["clustered signals"]},
        "nuclear_size": {"small": ["small nuclei"], "large": ["large nuclei"]},
    },
    "gross": {
        "surface": {"tan": ["tan surface"], "white": ["white surface"], "yellow": ["yellow surface"],
                    "red": ["red surface"]},
        "mass": {"absent": ["no mass"], "small": ["small mass"], "large": ["large mass"]},
        "border": {"none": ["no border"], "circumscribed": ["sharp border"], "infiltrative": ["infiltrative border"]},
        "necrosis": {"absent": ["no necrosis"], "present": ["necrosis"]},
        "cyst": {"absent": ["no cavity"], "present": ["cystic cavity"]},
    },
}
ATTRIBUTES = {s: {a: tuple(v for v in values if v[0] != "!") for a, values in table.items()}
              for s, table in PHRASES.items()}

# Pairs of values that only the pool test_combo may show; each value alone is common everywhere. Chosen by hand: 10-25
# % of the space is held out, every diagnosis still occurs without a pair, and most occur with one, so that the same
# questions can be asked. (FISH has 16 combinations: a quarter is the least that leaves four answers to ask for.)
HELD_OUT = {
    "H&E": [{"architecture": "fused_glands", "inflammation": "eosinophils"},
            {"material": "fat", "inflammation": "neutrophils"}],
    "IHC": [{"proportion": "low", "inflammation": "lymphocytes"},
            {"proportion": "high", "architecture": "solid_nests"}],
    "cytology": [{"stain": "giemsa", "background": "bloody"}],
    "FISH": [{"green": "many", "nuclear_size": "small"}],
    "gross": [{"surface": "red", "cyst": "present"}, {"surface": "white", "mass": "large"}],
}


def phrase(subfield, attribute, value):
    """Canonical phrase of a finding: phrase("H&E", "material", "!keratin") -> "no keratin pearls"."""
    return PHRASES[subfield][attribute][value][0]


def allowed(subfield, attribute, facts):
    """Values the attribute can take beside those before it in the table, which are in `facts` already: a negative stain
    has no strength and no place, an absent mass no border, and only many signals can cluster."""
    values = ATTRIBUTES[subfield][attribute]
    if attribute in ("intensity", "location"):
        return ("none",) if facts["proportion"] == "negative" else values[1:]
    if attribute == "border":
        return ("none",) if facts["mass"] == "absent" else values[1:]
    if subfield == "FISH" and attribute == "arrangement":
        return values if facts["red"] == "many" else ("scattered",)
    return values


@functools.cache
def space(subfield):
    """Every combination of the subfield with its probability when each attribute is drawn uniformly: ((facts, p), …).
    Shared between callers: copy before you change one."""
    rows = [({"subfield": subfield}, 1.0)]
    for attribute in ATTRIBUTES[subfield]:
        rows = [({**facts, attribute: value}, p / len(choices)) for facts, p in rows
                for choices in [allowed(subfield, attribute, facts)] for value in choices]
    return tuple(rows)


def matches(facts, where):
    """True if facts agree with `where`: None, a dict of fixed values, or a predicate."""
    if where is None:
        return True
    return where(facts) if callable(where) else all(facts[k] == v for k, v in where.items())


def held_out(facts):
    """True if the facts contain a pair of findings kept for the pool test_combo."""
    return any(matches(facts, pair) for pair in HELD_OUT[facts["subfield"]])


@functools.cache
def _pool(subfield, combos):
    return [(f, p) for f, p in space(subfield) if combos is None or held_out(f) == combos]


def for_drawing(facts):
    """Facts as the renderer takes them: where nothing is stained it still wants a place for the stain; any will do."""
    return {**facts, "location": "nuclear"} if facts.get("location") == "none" else facts


def sample(rng, subfield, where=None, combos=False):
    """Draw facts: attributes independent and uniform, conditioned on `where` (see matches).

    rng: random.Random. combos: False = never a held-out pair, True = always one, None = either.
    -> new dict of facts without seed. ValueError if nothing fits.
    """
    rows = [(f, p) for f, p in _pool(subfield, combos) if matches(f, where)]
    if not rows:
        raise ValueError(f"sample: no combination of {subfield} fits where={where!r} with combos={combos}")
    facts, p = zip(*rows)
    return dict(rng.choices(facts, p)[0])


# ---------------------------------------------------------------- the rules: tissue, diagnosis, score

def tissue(facts):
    """Tissue class in words, for zero-shot tests: what fills the field (as in NCT-CRC), else the architecture."""
    s = facts["subfield"]
    if s == "H&E":
        attribute = "architecture" if facts["material"] == "none" else "material"
    elif s == "IHC":
        attribute = "location"
    elif s == "cytology":
        attribute = "arrangement" if facts["background"] == "clean" else "background"
    elif s == "FISH":
        attribute = "arrangement" if facts["arrangement"] == "clustered" else "red"
    else:
        attribute = "mass" if facts["mass"] == "absent" else "border"
    return phrase(s, attribute, facts[attribute])


def _he(architecture, nuclear_size, pleomorphism, mitoses, inflammation, material):
    bland = (nuclear_size, pleomorphism, mitoses) == ("small", "uniform", "absent")
    if material == "keratin":
        return "keratin cyst" if bland else "squamous carcinoma"
    if material == "mucin" and not bland:
        return "mucinous carcinoma"
    if architecture == "round_glands":
        if pleomorphism == "pleomorphic":
            return "carcinoma in situ"                      # malignant nuclei, glands still round
        if not bland:
            return "adenoma"
        if inflammation != "none":
            return {"neutrophils": "acute inflammation", "lymphocytes": "chronic inflammation",
                    "eosinophils": "eosinophilic inflammation"}[inflammation]
        return {"none": "normal tissue", "necrosis": "infarct", "mucin": "mucocele", "fat": "fatty atrophy"}[material]
    if architecture == "fused_glands":
        return "adenoma" if bland else "adenocarcinoma"
    if architecture == "solid_nests":
        if mitoses == "frequent" and nuclear_size == "small":
            return "small cell carcinoma"
        if mitoses == "absent" and (nuclear_size == "small" or pleomorphism == "uniform"):
            return "neuroendocrine tumor"
        return "anaplastic carcinoma"
    if pleomorphism == "uniform":                           # diffuse sheets
        return "lymphoma"
    if nuclear_size == "large":
        return "anaplastic carcinoma"
    return "small cell carcinoma" if mitoses == "frequent" else "lymphoma"


def _ihc(proportion, intensity, location, architecture, inflammation):
    sheets = architecture == "diffuse_sheets"
    if proportion == "negative":
        return "CK negative lymphoma" if sheets else "receptor negative carcinoma"
    if location == "membranous":                            # HER2: strong in many 3+, strong in few or weak in most 2+
        if intensity == "strong":
            return "HER2 2+ carcinoma" if proportion == "low" else "HER2 3+ carcinoma"
        return "HER2 2+ carcinoma" if proportion == "high" else "HER2 1+ carcinoma"
    if location == "cytoplasmic":
        return {"round_glands": "CK adenocarcinoma", "solid_nests": "CK squamous carcinoma",
                "diffuse_sheets": "CK sarcomatoid carcinoma"}[architecture]
    if sheets:                                              # nuclear: proliferation in sheets, receptor in epithelium
        return "high Ki-67 lymphoma" if proportion == "high" else "low Ki-67 lymphoma"
    if proportion == "low":
        return "ER low carcinoma"
    return "ER weak carcinoma" if intensity == "weak" else "ER strong carcinoma"


def _cytology(stain, arrangement, nc_ratio, contour, nucleoli, background):
    if nc_ratio == "high" and contour == "irregular":
        if nucleoli == "prominent":
            return "melanoma" if arrangement == "single" else "adenocarcinoma"
        return "small cell carcinoma" if background == "necrotic" else "high grade lesion"
    if nc_ratio == "high":
        if arrangement == "single":
            return "lymphoma"
        return "reactive repair" if nucleoli == "prominent" else "low grade neoplasm"
    if contour == "irregular":
        return "atypical cells" if nucleoli == "prominent" else "low grade lesion"
    if nucleoli == "prominent":
        return "reactive repair"
    return {"clean": "benign cells", "inflammatory": "acute inflammation", "bloody": "hemorrhage",
            "necrotic": "infarct"}[background]


def _fish(red, green, arrangement, nuclear_size):
    if red == "many" and arrangement == "clustered":
        return "clustered amplification" if green == "two" else "clustered polysomy"
    if red == "many":
        return "scattered amplification" if green == "two" else "polysomy"
    if red == "two":
        if green == "many":
            return "centromere gain"
        return "disomic tumor" if nuclear_size == "large" else "normal copies"
    return "gene deletion" if green == "two" else "relative loss"


def _gross(surface, mass, border, necrosis, cyst):
    dead, cystic = necrosis == "present", cyst == "present"
    if mass == "absent":
        if dead or cystic:
            return "abscess" if dead and cystic else "infarct" if dead else "benign cyst"
        return {"tan": "normal organ", "white": "scar", "yellow": "fatty change", "red": "congestion"}[surface]
    if border == "circumscribed":
        if dead:
            return "sarcoma" if mass == "large" else "abscess" if cystic else "granuloma"
        if cystic:
            return "cystadenoma"
        return {"tan": "adenoma", "white": "fibroma", "yellow": "lipoma", "red": "hemangioma"}[surface]
    if dead or cystic:
        return "high grade carcinoma" if dead else "cystic carcinoma"
    return {"tan": "solid carcinoma", "white": "scirrhous carcinoma", "yellow": "liposarcoma",
            "red": "angiosarcoma"}[surface]


_RULES = {"H&E": _he, "IHC": _ihc, "cytology": _cytology, "FISH": _fish, "gross": _gross}


def _key(facts):
    return tuple(facts[a] for a in ATTRIBUTES[facts["subfield"]])


@functools.cache
def _decisions(subfield):
    """{values: (diagnosis, deciding attributes)}: the smallest set of findings that alone forces the diagnosis (a prime
    implicant), found by trying all subsets of attributes, small ones and early attributes first."""
    names = list(ATTRIBUTES[subfield])
    table = {_key(f): _RULES[subfield](*_key(f)) for f, _ in space(subfield)}
    found = {}
    for n in range(1, len(names) + 1):
        for subset in itertools.combinations(range(len(names)), n):
            seen = {}
            for key, diagnosis in table.items():
                seen.setdefault(tuple(key[i] for i in subset), set()).add(diagnosis)
            for key, diagnosis in table.items():
                if key not in found and len(seen[tuple(key[i] for i in subset)]) == 1:
                    found[key] = (diagnosis, tuple(names[i] for i in subset))
    return found


def diagnose(facts):
    """-> (diagnosis, deciding attributes): any case that shares these findings has the same diagnosis.

    diagnose(fused glands, large nuclei, …, plain stroma)
    -> ("adenocarcinoma", ("architecture", "nuclear_size", "material"))
    """
    return _decisions(facts["subfield"])[_key(facts)]


def score(facts):
    """-> (total, [((attributes), points), …]): a grade that is a sum of three parts.

    H&E, after Nottingham: glands 1-3, nuclei 1-3, mitoses 1 or 3; 3-9. IHC, after Allred: proportion 0-5, intensity
    0-3, and (ours) architecture 1-3; 1-11. Cytology, after Robinson: dissociation, nuclei, nucleoli; 3-9. FISH (ours):
    copies of both probes, nuclear size; 3-8. Gross (ours): mass, border, necrosis; 0-7.
    """
    s, f = facts["subfield"], facts
    if s == "H&E":
        glands = {"round_glands": 1, "fused_glands": 2, "solid_nests": 3, "diffuse_sheets": 3}
        parts = [(("architecture",), glands[f["architecture"]]),
                 (("nuclear_size", "pleomorphism"),
                  1 + (f["nuclear_size"] == "large") + (f["pleomorphism"] == "pleomorphic")),
                 (("mitoses",), 3 if f["mitoses"] == "frequent" else 1)]
    elif s == "IHC":
        parts = [(("proportion",), {"negative": 0, "low": 3, "moderate": 4, "high": 5}[f["proportion"]]),
                 (("intensity",), {"none": 0, "weak": 1, "strong": 3}[f["intensity"]]),
                 (("architecture",), {"round_glands": 1, "solid_nests": 2, "diffuse_sheets": 3}[f["architecture"]])]
    elif s == "cytology":
        parts = [(("arrangement",), {"monolayer": 1, "clusters": 2, "single": 3}[f["arrangement"]]),
                 (("nc_ratio", "contour"), 1 + (f["nc_ratio"] == "high") + (f["contour"] == "irregular")),
                 (("nucleoli",), 3 if f["nucleoli"] == "prominent" else 1)]
    elif s == "FISH":
        copies = {"one": 1, "two": 2, "many": 3}[f["red"]] + (f["arrangement"] == "clustered")
        parts = [(("red", "arrangement") if f["red"] == "many" else ("red",), copies),
                 (("green",), 2 if f["green"] == "many" else 1),
                 (("nuclear_size",), 2 if f["nuclear_size"] == "large" else 1)]
    else:
        parts = [(("mass",), {"absent": 0, "small": 1, "large": 2}[f["mass"]]),
                 (("border",), {"none": 0, "circumscribed": 1, "infiltrative": 3}[f["border"]]),
                 (("necrosis",), 2 if f["necrosis"] == "present" else 0)]
    return sum(points for _, points in parts), parts


if __name__ == "__main__":                                  # a look at the world: how common each diagnosis is
    for name in SUBFIELDS:
        rows, share = space(name), {}
        for facts, p in rows:
            share[diagnose(facts)[0]] = share.get(diagnose(facts)[0], 0) + p
        held = sum(p for f, p in rows if held_out(f))
        print(f"{name}: {len(rows)} combinations, {held:.1%} held out, totals {sorted({score(f)[0] for f, _ in rows})}")
        print("   " + ", ".join(f"{d} {p:.1%}" for d, p in sorted(share.items(), key=lambda kv: -kv[1])))
    print(sample(random.Random(0), "H&E", {"material": "mucin"}))
