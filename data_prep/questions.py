"""Questions with four answers about the micro-world, made so that their text alone tells nothing.

  1. draw the kind of question and its set of four answers, all of one family, so that they share findings;
  2. draw the right one uniformly among the four, and shuffle the letters;
  3. only then draw the facts, that is the image, from the cases that have this answer.
Whatever a blind reader sees (kind, set, order) is independent of which answer is right, so every blind reader is at
chance; tests/test_world.py trains one to make sure. Every pool keeps to this, also the one of held-out pairs: there,
sets of which an answer cannot be shown are not asked.

Levels: easy = one finding or one pair; medium = a diagnosis; hard = a total that has to be worked out, or a diagnosis
told by four findings or more. May be copied together with world.py; standard library only.
"""

import functools
import itertools

from data_prep.world import ATTRIBUTES, diagnose, held_out, phrase, score, space

# Families of confusable diagnoses: four that share findings, so that one finding is rarely enough.
FAMILIES = {
    ("H&E", "medium"): [
        "squamous carcinoma|keratin cyst|mucinous carcinoma|mucocele",
        "adenoma|carcinoma in situ|acute inflammation|chronic inflammation",
        "normal tissue|infarct|fatty atrophy|mucocele",
        "adenocarcinoma|mucinous carcinoma|squamous carcinoma|lymphoma",
        "eosinophilic inflammation|acute inflammation|chronic inflammation|normal tissue",
        "lymphoma|neuroendocrine tumor|adenocarcinoma|keratin cyst",
        "adenoma|adenocarcinoma|keratin cyst|squamous carcinoma",
        "carcinoma in situ|adenocarcinoma|lymphoma|mucinous carcinoma"],
    ("H&E", "hard"): [
        "normal tissue|adenoma|carcinoma in situ|adenocarcinoma",
        "neuroendocrine tumor|small cell carcinoma|lymphoma|anaplastic carcinoma",
        "small cell carcinoma|anaplastic carcinoma|adenocarcinoma|carcinoma in situ",
        "small cell carcinoma|squamous carcinoma|lymphoma|mucinous carcinoma"],
    ("IHC", "medium"): [
        "HER2 1+ carcinoma|HER2 2+ carcinoma|HER2 3+ carcinoma|receptor negative carcinoma",
        "CK adenocarcinoma|CK squamous carcinoma|CK sarcomatoid carcinoma|CK negative lymphoma",
        "ER low carcinoma|HER2 1+ carcinoma|CK adenocarcinoma|low Ki-67 lymphoma",
        "low Ki-67 lymphoma|high Ki-67 lymphoma|CK negative lymphoma|CK sarcomatoid carcinoma"],
    ("IHC", "hard"): [
        "ER weak carcinoma|ER strong carcinoma|HER2 2+ carcinoma|HER2 3+ carcinoma",
        "ER low carcinoma|ER weak carcinoma|low Ki-67 lymphoma|HER2 1+ carcinoma",
        "ER strong carcinoma|high Ki-67 lymphoma|CK squamous carcinoma|HER2 3+ carcinoma"],
    ("cytology", "medium"): [
        "benign cells|acute inflammation|hemorrhage|infarct",
        "adenocarcinoma|melanoma|high grade lesion|atypical cells",
        "low grade lesion|high grade lesion|low grade neoplasm|benign cells",
        "lymphoma|melanoma|low grade neoplasm|adenocarcinoma",
        "reactive repair|atypical cells|low grade lesion|adenocarcinoma"],
    ("cytology", "hard"): [
        "small cell carcinoma|high grade lesion|lymphoma|melanoma",
        "small cell carcinoma|adenocarcinoma|low grade neoplasm|infarct",
        "high grade lesion|reactive repair|lymphoma|atypical cells"],
    ("FISH", "medium"): [
        "normal copies|gene deletion|centromere gain|relative loss",
        "normal copies|scattered amplification|gene deletion|centromere gain",
        "relative loss|centromere gain|polysomy|clustered polysomy"],
    ("FISH", "hard"): [
        "normal copies|disomic tumor|gene deletion|scattered amplification",
        "relative loss|centromere gain|polysomy|clustered polysomy",
        "clustered amplification|scattered amplification|clustered polysomy|polysomy"],
    ("gross", "medium"): [
        "adenoma|fibroma|normal organ|scar",
        "lipoma|liposarcoma|hemangioma|angiosarcoma",
        "fatty change|lipoma|congestion|hemangioma",
        "benign cyst|cystadenoma|infarct|granuloma",
        "cystic carcinoma|cystadenoma|benign cyst|abscess"],
    ("gross", "hard"): [
        "abscess|granuloma|sarcoma|cystadenoma",
        "high grade carcinoma|cystic carcinoma|sarcoma|cystadenoma",
        "solid carcinoma|scirrhous carcinoma|adenoma|fibroma"],
}


class Kind:
    """One kind of question. label(facts) -> the answer as text (None: not askable of these facts); needed(facts) ->
    attributes that have to be seen; sets: the sets of four answers to draw from. The rest is a search in the list of
    all cases."""

    def __init__(self, subfield, level, name, questions, label, needed, sets):
        self.subfield, self.level, self.name, self.questions = subfield, level, name, questions
        self.label, self.needed, self.cases = label, needed, {}
        for facts, p in space(subfield):
            self.cases.setdefault(label(facts), []).append((facts, p))
        self.sets = [s for s in map(tuple, sets) if all(answer in self.cases for answer in s)]
        self.drawable = functools.cache(self._drawable)
        self.sets_for = functools.cache(self._sets_for)
        self.why_not = functools.cache(self._why_not)

    def _drawable(self, answer, combos):
        """Cases with this answer that a pool may show -> (list of facts, list of their probabilities)."""
        rows = [(f, p) for f, p in self.cases[answer] if held_out(f) == combos]
        return [f for f, _ in rows], [p for _, p in rows]

    def _sets_for(self, combos):
        """Sets of which a pool can show every answer: only then the right one can be drawn uniformly."""
        return [s for s in self.sets if all(self.drawable(answer, combos)[0] for answer in s)]

    def _why_not(self, findings, answer):
        """The fewest findings that rule an answer out: ((attribute, value), …) -> attributes; () if nothing does."""
        for n in range(1, len(findings) + 1):
            for subset in itertools.combinations(findings, n):
                if all(any(f[a] != v for a, v in subset) for f, _ in self.cases[answer]):
                    return tuple(a for a, _ in subset)
        return ()

    def nearest(self, facts, options, rng):
        """Index of the option that needs the fewest findings changed; ties at random."""
        names = ATTRIBUTES[self.subfield]
        away = [min(sum(f[a] != facts[a] for a in names) for f, _ in self.cases[o]) for o in options]
        return rng.choice([i for i, d in enumerate(away) if d == min(away)])


# ---------------------------------------------------------------- easy: one finding or one pair

def _one(subfield, attribute, *questions):
    """Asks for one attribute; answers are its phrases, four at a time."""
    texts = [phrase(subfield, attribute, v) for v in ATTRIBUTES[subfield][attribute]]
    return Kind(subfield, "easy", attribute, questions, lambda f: phrase(subfield, attribute, f[attribute]),
                lambda f: (attribute,), itertools.combinations(texts, 4))


def _pair(subfield, first, second, words, *questions):
    """Asks for two attributes; answers are two values of each, so that every answer shares a finding with two others.
    words: {value of first: text}, {value of second: text}; a value without words is not asked."""
    def text(a, b):
        return f"{words[0][a]} {words[1][b]}" if a in words[0] and b in words[1] else None
    sets = [[text(a, b) for a in pair for b in other] for pair in itertools.combinations(words[0], 2)
            for other in itertools.combinations(words[1], 2)]
    return Kind(subfield, "easy", f"{first}+{second}", questions, lambda f: text(f[first], f[second]),
                lambda f: (first, second), sets)


def _easy(subfield):
    if subfield == "H&E":
        both = {(0, 0): "neither of them", (1, 0): "only mitoses", (0, 1): "only necrosis", (1, 1): "both of them"}
        return [_one("H&E", "architecture", "Which architecture?", "How is it built?"),
                _pair("H&E", "nuclear_size", "pleomorphism", ({"small": "small", "large": "large"},
                      {"uniform": "uniform", "pleomorphic": "pleomorphic"}), "Which nuclei?", "How are the nuclei?"),
                _one("H&E", "material", "Which material?", "What fills the background?"),
                _one("H&E", "inflammation", "Which inflammatory cells?", "Which inflammation?"),
                Kind("H&E", "easy", "mitoses+material", ["Are there mitoses or necrosis?"],
                     lambda f: both[f["mitoses"] == "frequent", f["material"] == "necrosis"],
                     lambda f: ("mitoses", "material"), [both.values()])]
    if subfield == "IHC":
        return [_one("IHC", "proportion", "How many cells are positive?", "Which share is positive?"),
                _pair("IHC", "intensity", "location", ({"weak": "weak", "strong": "strong"},
                      {"nuclear": "nuclear", "membranous": "membrane", "cytoplasmic": "cytoplasm"}),
                      "Which staining?", "How is the stain?"),
                _pair("IHC", "architecture", "inflammation",
                      ({"round_glands": "glands", "solid_nests": "nests", "diffuse_sheets": "sheets"},
                       {"none": "without lymphocytes", "lymphocytes": "with lymphocytes"}),
                      "Which architecture?", "How is it built?")]
    if subfield == "cytology":
        return [_one("cytology", "background", "Which background?"),
                _pair("cytology", "nc_ratio", "contour", ({"low": "ample cytoplasm,", "high": "scant cytoplasm,"},
                      {"smooth": "smooth contours", "irregular": "irregular contours"}), "Which cells?"),
                _pair("cytology", "arrangement", "stain",
                      ({"single": "single,", "clusters": "clusters,", "monolayer": "sheets,"},
                       {"pap": "pap stain", "giemsa": "giemsa stain"}), "Which arrangement and stain?"),
                _pair("cytology", "nucleoli", "arrangement", ({"absent": "no nucleoli,", "prominent": "nucleoli,"},
                      {"single": "single cells", "clusters": "cell clusters", "monolayer": "flat sheets"}),
                      "Which nucleoli and arrangement?")]
    if subfield == "FISH":
        few = {"one": "one", "two": "two"}
        return [_pair("FISH", "red", "green", ({"one": "one red,", "two": "two red,", "many": "many red,"},
                      {"two": "two green", "many": "many green"}), "Which signals?", "How many signals a nucleus?"),
                _pair("FISH", "nuclear_size", "red", ({"small": "small nuclei,", "large": "large nuclei,"},
                      {"one": "one red", "two": "two red", "many": "many red"}), "Which nuclei and red signals?"),
                Kind("FISH", "easy", "red+arrangement", ["Which red signals?"],
                     lambda f: few.get(f["red"], "many " + f["arrangement"]), lambda f: ("red", "arrangement"),
                     [("one", "two", "many scattered", "many clustered")])]
    return [_one("gross", "surface", "Which surface?"),
            _pair("gross", "mass", "border", ({"small": "small", "large": "large"},
                  {"circumscribed": "sharp mass", "infiltrative": "infiltrative mass"}), "Which mass?"),
            _pair("gross", "necrosis", "cyst", ({"absent": "no necrosis,", "present": "necrosis,"},
                  {"absent": "no cavity", "present": "cystic cavity"}), "Is there necrosis or a cavity?")]


# ---------------------------------------------------------------- medium and hard

def _deciding(facts):
    return diagnose(facts)[1]


def _at_least_four(facts):
    """The deciding findings, filled up to four with others: what a hard diagnosis cites."""
    names, deciding = list(ATTRIBUTES[facts["subfield"]]), diagnose(facts)[1]
    extra = [a for a in names if a not in deciding][:max(0, 4 - len(deciding))]
    return tuple(a for a in names if a in deciding or a in extra)


@functools.cache
def kinds(subfield, level):
    """All kinds of questions of one subfield and level."""
    if level == "easy":
        return _easy(subfield)
    families = [family.split("|") for family in FAMILIES[subfield, level]]
    if level == "medium":
        return [Kind(subfield, level, "diagnosis", ["Which diagnosis fits?", "What is the diagnosis?"],
                     lambda f: diagnose(f)[0], _deciding, families)]
    totals = sorted({score(f)[0] for f, _ in space(subfield)})
    return [Kind(subfield, level, "diagnosis", ["Which diagnosis remains?"], lambda f: diagnose(f)[0], _at_least_four,
                 families),
            Kind(subfield, level, "score", ["Which total score?", "What is the total score?"],
                 lambda f: str(score(f)[0]), lambda f: tuple(a for names, _ in score(f)[1] for a in names),
                 [map(str, totals[i:i + 4]) for i in range(len(totals) - 3)])]


def draw_question(rng, subfield, level, combos=False):
    """-> (kind, question, options (4 texts), index of the right one, facts without seed).

    rng: random.Random. combos: True = the facts hold a held-out pair, False = never.
    """
    usable = [k for k in kinds(subfield, level) if k.sets_for(combos)]
    kind = rng.choice(usable)
    options = list(rng.choice(kind.sets_for(combos)))
    rng.shuffle(options)
    right = rng.randrange(4)
    facts = dict(rng.choices(*kind.drawable(options[right], combos))[0])
    return kind, rng.choice(kind.questions), options, right, facts
