"""The micro-world's rules, questions and teacher: against independent tables, brute force, and a blind reader."""

import itertools
import random
import re
from collections import Counter

import numpy as np
import pytest

from data_prep import questions, world, writer
from data_prep.__main__ import FIELDS, POOLS, PRESETS, make_record
from nanopatho.rewards import claims, contradicts, judge_claims, parse_response

LEVELS = ("easy", "medium", "hard")
CELLS = [(s, level) for s in world.SUBFIELDS for level in LEVELS]
TINY = {name: value for name, (value, _) in FIELDS.items()}
ALL = {**TINY, **PRESETS["small"]}


# ---------------------------------------------------------------- rules

def oracle(f):
    """Every diagnosis as a condition of its own, no order among them: exactly one may hold for each case."""
    g = f.get
    if f["subfield"] == "H&E":
        bland = g("nuclear_size") == "small" and g("pleomorphism") == "uniform" and g("mitoses") == "absent"
        keratin, mucin = g("material") == "keratin", g("material") == "mucin"
        plain = not keratin and not (mucin and not bland)                      # the architecture decides
        arch, small = g("architecture"), g("nuclear_size") == "small"
        even, quiet = g("pleomorphism") == "uniform", g("mitoses") == "absent"
        benign = plain and arch == "round_glands" and bland
        calm = benign and g("inflammation") == "none"
        nests, sheets = plain and arch == "solid_nests", plain and arch == "diffuse_sheets"
        return {
            "keratin cyst": keratin and bland, "squamous carcinoma": keratin and not bland,
            "mucinous carcinoma": mucin and not bland, "mucocele": calm and mucin,
            "infarct": calm and g("material") == "necrosis", "fatty atrophy": calm and g("material") == "fat",
            "normal tissue": calm and g("material") == "none",
            "acute inflammation": benign and g("inflammation") == "neutrophils",
            "chronic inflammation": benign and g("inflammation") == "lymphocytes",
            "eosinophilic inflammation": benign and g("inflammation") == "eosinophils",
            "carcinoma in situ": plain and arch == "round_glands" and not even,
            "adenoma": plain and (arch == "round_glands" and even and not (small and quiet)
                                  or arch == "fused_glands" and bland),
            "adenocarcinoma": plain and arch == "fused_glands" and not bland,
            "small cell carcinoma": small and not quiet and (nests or sheets and not even),
            "neuroendocrine tumor": nests and quiet and (small or even),
            "anaplastic carcinoma": not small and (nests and not (quiet and even) or sheets and not even),
            "lymphoma": sheets and (even or small and quiet)}
    if f["subfield"] == "IHC":
        arch, strong = g("architecture"), g("intensity") == "strong"
        share = ["negative", "low", "moderate", "high"].index(g("proportion"))
        sheets, where = arch == "diffuse_sheets", g("location")
        her2 = where == "membranous"
        grade = (3 if strong and share > 1 else 2 if strong or share == 3 else 1) if her2 else 0
        return {
            "CK negative lymphoma": share == 0 and sheets, "receptor negative carcinoma": share == 0 and not sheets,
            "HER2 1+ carcinoma": grade == 1, "HER2 2+ carcinoma": grade == 2, "HER2 3+ carcinoma": grade == 3,
            "CK adenocarcinoma": where == "cytoplasmic" and arch == "round_glands",
            "CK squamous carcinoma": where == "cytoplasmic" and arch == "solid_nests",
            "CK sarcomatoid carcinoma": where == "cytoplasmic" and sheets,
            "low Ki-67 lymphoma": where == "nuclear" and sheets and share < 3,
            "high Ki-67 lymphoma": where == "nuclear" and sheets and share == 3,
            "ER low carcinoma": where == "nuclear" and not sheets and share == 1,
            "ER weak carcinoma": where == "nuclear" and not sheets and share > 1 and not strong,
            "ER strong carcinoma": where == "nuclear" and not sheets and share > 1 and strong}
    if f["subfield"] == "cytology":
        single, high, rough = g("arrangement") == "single", g("nc_ratio") == "high", g("contour") == "irregular"
        loud, back = g("nucleoli") == "prominent", g("background")
        rest = not high and not rough and not loud
        return {
            "melanoma": high and rough and loud and single, "adenocarcinoma": high and rough and loud and not single,
            "small cell carcinoma": high and rough and not loud and back == "necrotic",
            "high grade lesion": high and rough and not loud and back != "necrotic",
            "lymphoma": high and not rough and single,
            "low grade neoplasm": high and not rough and not single and not loud,
            "reactive repair": loud and not rough and not (high and single),
            "atypical cells": not high and rough and loud, "low grade lesion": not high and rough and not loud,
            "benign cells": rest and back == "clean", "acute inflammation": rest and back == "inflammatory",
            "hemorrhage": rest and back == "bloody", "infarct": rest and back == "necrotic"}
    if f["subfield"] == "FISH":
        red, gain, piled = g("red"), g("green") == "many", g("arrangement") == "clustered"
        return {
            "gene deletion": red == "one" and not gain, "relative loss": red == "one" and gain,
            "centromere gain": red == "two" and gain,
            "normal copies": red == "two" and not gain and g("nuclear_size") == "small",
            "disomic tumor": red == "two" and not gain and g("nuclear_size") == "large",
            "scattered amplification": red == "many" and not gain and not piled,
            "polysomy": red == "many" and gain and not piled,
            "clustered amplification": piled and not gain, "clustered polysomy": piled and gain}
    dead, cystic, small = g("necrosis") == "present", g("cyst") == "present", g("mass") == "small"
    none, sharp, wild = g("mass") == "absent", g("border") == "circumscribed", g("border") == "infiltrative"
    clean = not dead and not cystic
    table = {"abscess": dead and cystic and (none or sharp and small), "infarct": none and dead and not cystic,
             "benign cyst": none and cystic and not dead, "sarcoma": sharp and dead and not small,
             "granuloma": sharp and dead and small and not cystic, "cystadenoma": sharp and cystic and not dead,
             "high grade carcinoma": wild and dead, "cystic carcinoma": wild and cystic and not dead}
    names = {"tan": ("normal organ", "adenoma", "solid carcinoma"), "white": ("scar", "fibroma", "scirrhous carcinoma"),
             "yellow": ("fatty change", "lipoma", "liposarcoma"), "red": ("congestion", "hemangioma", "angiosarcoma")}
    for colour, three in names.items():
        for name, kind in zip(three, (none, sharp, wild)):
            table[name] = clean and kind and g("surface") == colour
    return table


@pytest.mark.parametrize("subfield", world.SUBFIELDS)
def test_every_combination_has_exactly_one_diagnosis(subfield):
    seen = set()
    for facts, _ in world.space(subfield):
        true = [name for name, holds in oracle(facts).items() if holds]
        assert true == [world.diagnose(facts)[0]], facts
        seen.update(true)
    assert seen == set(oracle(facts)), "a diagnosis of the table never occurs"


@pytest.mark.parametrize("subfield", world.SUBFIELDS)
def test_deciding_findings_are_sufficient_and_minimal(subfield):
    cases = [f for f, _ in world.space(subfield)]
    answer = {id(f): next(n for n, holds in oracle(f).items() if holds) for f in cases}
    for facts in cases[::7]:
        deciding = world.diagnose(facts)[1]
        def forced(names):
            return len({answer[id(f)] for f in cases if all(f[a] == facts[a] for a in names)}) == 1
        assert forced(deciding)
        assert not any(forced(names) for names in itertools.combinations(world.ATTRIBUTES[subfield], len(deciding) - 1))


def test_totals_against_hand_counted_cases():
    he = dict(subfield="H&E", architecture="fused_glands", nuclear_size="large", pleomorphism="pleomorphic",
              mitoses="frequent", inflammation="none", material="none")
    assert world.score(he) == (8, [(("architecture",), 2), (("nuclear_size", "pleomorphism"), 3), (("mitoses",), 3)])
    calm = dict(architecture="round_glands", nuclear_size="small", pleomorphism="uniform", mitoses="absent")
    assert world.score({**he, **calm})[0] == 3
    ihc = dict(subfield="IHC", proportion="high", intensity="strong", location="nuclear", architecture="round_glands",
               inflammation="none")
    assert world.score(ihc)[0] == 8 + 1                                        # Allred 8, architecture 1
    assert world.score({**ihc, "proportion": "negative", "intensity": "none", "location": "none"})[0] == 1
    cyto = dict(subfield="cytology", stain="pap", arrangement="single", nc_ratio="high", contour="irregular",
                nucleoli="prominent", background="clean")
    assert world.score(cyto)[0] == 9
    fish = dict(subfield="FISH", red="many", green="many", arrangement="clustered", nuclear_size="large")
    assert world.score(fish)[0] == 4 + 2 + 2 and world.score({**fish, "red": "one", "arrangement": "scattered"})[0] == 5
    gross = dict(subfield="gross", surface="tan", mass="large", border="infiltrative", necrosis="present",
                 cyst="absent")
    assert world.score(gross)[0] == 2 + 3 + 2
    for subfield in world.SUBFIELDS:                                   # the parts name what they count, and add up
        for facts, _ in world.space(subfield):
            total, parts = world.score(facts)
            assert total == sum(p for _, p in parts)
            assert {a for names, _ in parts for a in names} <= set(world.ATTRIBUTES[subfield])


# ---------------------------------------------------------------- phrases

@pytest.mark.parametrize("subfield", world.SUBFIELDS)
def test_phrases_are_unique_and_read_back(subfield):
    table = [(p, a, v) for a, values in world.PHRASES[subfield].items() for v, ps in values.items() for p in ps]
    assert len({p for p, _, _ in table}) == len(table)
    assert all(1 <= len(p.split()) <= 3 and p == p.lower() for p, _, _ in table)
    for p, a, v in table:
        assert [(c.attribute, c.value) for c in claims(f"I see {p}.", world.PHRASES[subfield])] == [(a, v)]
    for facts, _ in world.space(subfield):                             # a whole description reads back as itself
        text = ", ".join(writer.say(facts, world.ATTRIBUTES[subfield]))
        read = claims(text, world.PHRASES[subfield])
        assert {c.attribute: c.value for c in read} == {a: facts[a] for a in world.ATTRIBUTES[subfield]}
    for name in (*oracle(facts), *world.TOPICS, *writer.ASPECT.values(), "Not", "Closest is", "no positive"):
        assert not claims(name, world.PHRASES[subfield]), f"{name!r} reads as a finding"


def test_the_vocabulary_stays_small():
    words = set()
    for i in range(1500):
        for pool in ("captions", "sft"):
            record = make_record(ALL, pool, i)
            words.update(re.findall(r"\w+", str([record.get("caption"), record.get("messages")])))
    assert len(words) < 700


# ---------------------------------------------------------------- sampling

def test_attributes_are_drawn_independently_and_uniformly():
    rng, n = random.Random(0), 6000
    drawn = [world.sample(rng, "H&E", combos=None) for _ in range(n)]
    for a, values in world.ATTRIBUTES["H&E"].items():
        counts = Counter(f[a] for f in drawn)
        assert sum((counts[v] - n / len(values)) ** 2 / (n / len(values)) for v in values) < 21     # chi-square(4)
    pairs = Counter((f["architecture"], f["material"]) for f in drawn)
    assert len(pairs) == 20 and sum((c - n / 20) ** 2 / (n / 20) for c in pairs.values()) < 44      # chi-square(19)
    ihc = Counter(world.sample(rng, "IHC", combos=None)["proportion"] for _ in range(n))
    assert all(abs(ihc[v] - n / 4) < 4 * (n * 3 / 16) ** .5 for v in world.ATTRIBUTES["IHC"]["proportion"])


def test_impossible_findings_never_occur():
    for f, _ in world.space("IHC"):
        assert (f["intensity"] == "none") == (f["location"] == "none") == (f["proportion"] == "negative")
    for f, _ in world.space("gross"):
        assert (f["border"] == "none") == (f["mass"] == "absent")
    for f, _ in world.space("FISH"):
        assert f["arrangement"] == "scattered" or f["red"] == "many"
    for s in world.SUBFIELDS:
        assert sum(p for _, p in world.space(s)) == pytest.approx(1)
        assert len({str(f) for f, _ in world.space(s)}) == len(world.space(s))


def test_sample_takes_a_dict_or_a_predicate_and_refuses_the_impossible():
    rng = random.Random(0)
    assert world.sample(rng, "H&E", {"material": "mucin", "mitoses": "absent"})["material"] == "mucin"
    assert world.sample(rng, "FISH", lambda f: f["arrangement"] == "clustered")["red"] == "many"
    with pytest.raises(ValueError, match="IHC.*where"):
        world.sample(rng, "IHC", {"proportion": "negative", "intensity": "strong"})
    with pytest.raises(ValueError, match="combos=False"):
        world.sample(rng, "H&E", world.HELD_OUT["H&E"][0])


def test_held_out_pairs_appear_in_test_combo_only():
    for pool in POOLS:
        facts = [make_record(ALL, pool, i)["facts"] for i in range(400)]
        assert all(world.held_out(f) == (pool == "test_combo") for f in facts)
    for s in world.SUBFIELDS:
        assert .08 < sum(p for f, p in world.space(s) if world.held_out(f)) <= .25
        common = [f for f, _ in world.space(s) if not world.held_out(f)]       # every value and diagnosis is taught
        assert {(a, f[a]) for f in common for a in world.ATTRIBUTES[s]} == {
            (a, v) for a, values in world.ATTRIBUTES[s].items() for v in values}
        assert {world.diagnose(f)[0] for f in common} == set(oracle(common[0]))


# ---------------------------------------------------------------- questions

@pytest.mark.parametrize("combos", [False, True])
@pytest.mark.parametrize("subfield,level", CELLS)
def test_options_hold_the_truth_once(subfield, level, combos):
    rng = random.Random(subfield + level)
    for _ in range(60):
        kind, _, options, right, facts = questions.draw_question(rng, subfield, level, combos)
        assert len(set(options)) == 4 and kind.label(facts) == options[right] and world.held_out(facts) == combos
        if kind.name == "diagnosis":
            assert options[right] == world.diagnose(facts)[0]
        if kind.name == "score":
            assert options[right] == str(world.score(facts)[0])


@pytest.mark.parametrize("subfield,level", CELLS)
def test_every_family_can_be_asked(subfield, level):
    for kind in questions.kinds(subfield, level):
        assert kind.sets and all(len(s) == 4 for s in kind.sets)
        assert all(s in kind.sets_for(False) or s in kind.sets_for(True) for s in kind.sets), kind.name
    if level != "easy":
        named = questions.FAMILIES[subfield, level]
        assert questions.kinds(subfield, level)[0].sets == [tuple(f.split("|")) for f in named]


@pytest.mark.parametrize("subfield,level", CELLS)
def test_an_answer_never_reads_as_a_false_finding(subfield, level):
    for kind in questions.kinds(subfield, level):
        for answer, cases in kind.cases.items():
            said = claims(answer or "", world.PHRASES[subfield])
            assert all(all(judge_claims(said, f)) for f, _ in cases), answer


@pytest.mark.parametrize("subfield", world.SUBFIELDS)
def test_distractors_share_findings_with_the_right_answer(subfield):
    """A case of each distractor can look like the image in at least one of the findings that decide the diagnosis."""
    rng, shared = random.Random(1), []
    for level in ("medium", "hard"):
        for _ in range(100):
            kind, _, options, right, facts = questions.draw_question(rng, subfield, level)
            if kind.name == "diagnosis":
                needed = world.diagnose(facts)[1]
                shared += [max(sum(f[a] == facts[a] for a in needed) for f, _ in kind.cases[o])
                           for i, o in enumerate(options) if i != right]
    assert np.mean(np.array(shared) > 0) > .8          # not all: an unstained slide shares nothing with a stained one


def _asked(n, settings, pool="rl", start=0):
    return [make_record(settings, pool, i) for i in range(start, start + n)]


def test_letters_are_balanced():
    counts = Counter(r["answer"] for r in _asked(4000, TINY))
    assert sum((counts[c] - 1000) ** 2 / 1000 for c in "ABCD") < 16.3                       # chi-square(3), p < .001


def test_a_blind_reader_stays_at_chance():
    """Logistic regression on each option's words, alone and with the question, its rivals, its place and its length;
    and the rules of thumb "longest" and "shortest". All five subfields, ordinary and held-out pools. Chance is 25 %."""
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression

    def features(record, i):
        option, q = record["options"][i], re.sub(r"^\S+ \w+\. ", "", record["question"])
        lengths = [len(o) for o in record["options"]]
        words = option.split() + [f"{record['subfield']}|{option}", f"{q}|{option}", f"at {i}",
                                  f"topic {record['topic']}|{option}", "|".join(sorted(record["options"])) + option,
                                  f"longer than {sum(x < len(option) for x in lengths)}"]
        return dict.fromkeys(words, 1.)

    for pool in ("rl", "test_combo"):
        train, test = _asked(3000, ALL, pool), _asked(1000, ALL, pool, start=50_000)
        rows = DictVectorizer()
        x = rows.fit_transform([features(r, i) for r in train for i in range(4)])
        y = [i == "ABCD".index(r["answer"]) for r in train for i in range(4)]
        model = LogisticRegression(max_iter=200, C=.3).fit(x, y)
        p = model.predict_proba(rows.transform([features(r, i) for r in test for i in range(4)]))[:, 1].reshape(-1, 4)
        right = np.array(["ABCD".index(r["answer"]) for r in test])
        blind = (p.argmax(1) == right).mean()
        assert abs(blind - .25) < .05, f"{pool}: a blind reader is right in {blind:.1%}"
        for name, pick in (("longest", max), ("shortest", min)):
            lengths = [[len(o) for o in r["options"]] for r in test]
            hit = np.mean([(n[i] == pick(n)) / n.count(n[i]) for n, i in zip(lengths, right)])
            assert abs(hit - .25) < .05, f"{pool}: the {name} option is right in {hit:.1%}"


def test_option_lengths_are_alike():
    """Within 25 % of their mean in half of the questions ("lymphoma" is short); length never tells (test above)."""
    lengths = np.array([[len(o) for o in r["options"]] for r in _asked(1500, ALL)])
    off = np.abs(lengths / lengths.mean(1, keepdims=True) - 1).max(1)
    assert np.mean(off <= .25) > .5


# ---------------------------------------------------------------- the teacher

def _thinking(record):
    return parse_response(record["messages"][-1]["content"]).thinking


def test_a_perfect_teacher_is_right_and_says_nothing_false():
    for i, (subfield, level) in enumerate(CELLS * 6):
        for task in ("mcq", "description", "reasoning", "conversation"):
            for verbosity in ("short", "long"):
                r = writer.sft_record(random.Random(f"{i}{task}"), subfield, level, task, p_missing=0, p_hasty=0,
                                      verbosity=verbosity)
                assert r["teacher"]["wrong"] == [] and r["teacher"]["answer"] == r["answer"], r
                for m in r["messages"][1::2]:
                    assert parse_response(m["content"]).format_ok
                    assert all(judge_claims(claims(m["content"], world.PHRASES[subfield]), r["facts"]))


@pytest.mark.parametrize("verbosity", ["short", "long"])
@pytest.mark.parametrize("subfield,level", CELLS)
def test_reasoning_keeps_to_the_band_of_its_level(subfield, level, verbosity):
    low, high = writer.BANDS[verbosity][level]
    for i in range(40):
        r = writer.sft_record(random.Random(i), subfield, level, "mcq", p_hasty=0, verbosity=verbosity)
        words = len(_thinking(r).split())
        assert (low if subfield in ("H&E", "IHC") or verbosity == "long" else .6 * low) <= words <= high, _thinking(r)


def test_reasoning_names_what_decides_and_concludes_on_its_answer():
    for i, (subfield, level) in enumerate(CELLS * 20):
        r = writer.sft_record(random.Random(i), subfield, level, "mcq", p_hasty=0)
        said = claims(_thinking(r), world.PHRASES[subfield])
        if r["kind"] == "diagnosis":                          # what it saw forces its conclusion, or "Closest is"
            believed = {c.attribute: c.value for c in said if c.value[0] != "!"}
            fits = {world.diagnose(f)[0] for f, _ in world.space(subfield) if world.matches(f, believed)}
            assert len(fits) == 1 and (("Closest" in _thinking(r)) == (fits.pop() not in r["options"]))
            assert len(believed) >= (4 if level == "hard" else 2)
        if r["kind"] == "score":
            parts, total = re.search(r"([\d +]+) = (\d+)", _thinking(r)).groups()
            assert sum(map(int, parts.split("+"))) == int(total)
        assert not contradicts(_thinking(r), "ABCD".index(r["teacher"]["answer"]), r["options"])


def test_the_teacher_errs_as_often_as_stated():
    rng, n, wrong = random.Random(0), 6000, Counter()
    for _ in range(n):
        facts = world.sample(rng, "H&E")
        beliefs = writer.believe(rng, facts, .25)
        wrong.update(a for a in world.ATTRIBUTES["H&E"] if beliefs[a] != facts[a])
    for a, values in world.ATTRIBUTES["H&E"].items():                     # missing 25 %, of these 1/k right by luck
        p = .25 * (1 - 1 / len(values))
        assert abs(wrong[a] / n - p) < 4 * (p * (1 - p) / n) ** .5
    rows = [writer.sft_record(rng, "H&E", "hard", "mcq", p_missing=.25, p_hasty=.3) for _ in range(2000)]
    hasty = [r for r in rows if r["teacher"]["hasty"]]
    assert abs(len(hasty) / 2000 - .3) < 4 * (.21 / 2000) ** .5
    assert all(len(claims(_thinking(r), world.PHRASES["H&E"])) == 1 for r in hasty)
    right = {h: np.mean([r["teacher"]["answer"] == r["answer"] for r in rows if r["teacher"]["hasty"] == h])
             for h in (True, False)}
    assert right[False] - right[True] > .2                                     # looking pays: what RL can find out
    for r in rows[:300]:
        said = claims(r["messages"][1]["content"], world.PHRASES["H&E"])
        false = {c.attribute for c, ok in zip(said, judge_claims(said, r["facts"])) if not ok}
        assert set(r["teacher"]["wrong"]) == false


# ---------------------------------------------------------------- records

def test_captions_are_true_and_complete():
    for i in range(500):
        r = make_record(ALL, "captions", i)
        f, lexicon = r["facts"], world.PHRASES[r["subfield"]]
        for text in (r["caption"], r["morphology"]):
            said = claims(text, lexicon)
            assert all(judge_claims(said, f))
            assert [c.attribute for c in said] == list(world.ATTRIBUTES[r["subfield"]])     # all of them, in the table's order
            assert not any(topic in text for topic in world.TOPICS)      # the organ cannot be seen
        assert r["caption"].startswith(f"{r['subfield']} with {r['morphology']}")
        assert ("This fits" in r["caption"]) == (f["diagnosis"] in r["caption"])


def test_same_seed_same_record_and_no_shared_images():
    assert [make_record(TINY, "sft", i) for i in range(50)] == [make_record(TINY, "sft", i) for i in range(50)]
    assert make_record({**TINY, "seed": 0}, "sft", 0) != make_record({**TINY, "seed": 1}, "sft", 0)
    seeds = [make_record({**TINY, "seed": s}, pool, i)["facts"]["seed"]
             for s in (0, 1) for pool in POOLS for i in (0, 1, 9999)]
    assert len(set(seeds)) == len(seeds)


def test_tiny_holds_two_subfields_and_small_all_sixty_cells():
    assert {make_record(TINY, "sft", i)["subfield"] for i in range(200)} == {"H&E", "IHC"}
    cells = {(r["subfield"], r["level"], r["task"]) for r in (make_record(ALL, "sft", i) for i in range(2500))}
    assert len(cells) == 60
    rows = [make_record(TINY, "sft", i) for i in range(1500)]
    assert abs(np.mean([r["task"] == "mcq" for r in rows]) - .7) < .05
    assert abs(np.mean([r["subfield"] == "H&E" for r in rows]) - .7) < .05
    assert all("messages" not in make_record(TINY, pool, i) for pool in ("rl", "val", "test") for i in range(20))
