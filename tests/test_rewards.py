"""rewards.py: adversarial answers with pinned verdicts, properties over arbitrary text, time limits on megabytes."""

import time

import pytest
from hypothesis import given, settings, strategies as st

from nanopatho.rewards import (READINGS, choice, claim_reward, claims, combine, contradicts, judge_claims,
                               parse_response, score_answer)

OPTIONS = ["adenocarcinoma", "squamous cell carcinoma", "lymphoma", "normal tissue"]
RECORD = {"id": "r1", "options": OPTIONS, "answer": "D", "facts": {"material": "keratin", "nuclear_size": "large"}}
LEXICON = {"material": {"keratin": ["keratin", "keratin pearls"], "!keratin": ["no keratin"],
                        "mucin": ["pools of mucin"], "none": ["nothing between the cells"]},
           "nuclear_size": {"large": ["large nuclei"], "small": ["small nuclei"]}}


def scored(text, record=RECORD):
    parts = score_answer(text, record)
    return parts["format"], parts["accuracy"]


# --------------------------------------------------------------------------------------------------------------- format

@pytest.mark.parametrize("text, want", [
    ("<think>a</think><answer>D</answer>", (1, 1)),
    ("<think>a</think>\n<answer>D</answer>", (1, 1)),
    ("<think>\na\n</think>\n\n<answer>\nD\n</answer>", (1, 1)),
    ("<think>a</think><answer>D</answer>\n", (1, 1)),
    ("  \n<think>a</think><answer>D</answer><|im_end|>", (1, 1)),
    ("<think>a</think><answer>D</answer><|im_end|>\n<|endoftext|><|endoftext|>", (1, 1)),
    ("<think>a</think><answer>A</answer>", (1, 0)),
    ("<think>a</think><answer>A B C D</answer>", (1, 0)),
    ("<think>a</think><answer>A, D</answer>", (1, 0)),
    ("<think>a</think><answer>not D</answer>", (1, 0)),
    ("<think>a</think><answer>E</answer>", (1, 0)),
    # wrong shape: no format, and no accuracy either
    ("<think>a</think><answer>A</answer><answer>D</answer>", (0, 0)),
    ("<think>a</think><answer>D</answer><answer>A</answer>", (0, 0)),
    ("<think>a</think><answer>D</answer><answer>D</answer>", (0, 0)),
    ("<think><answer>D</answer></think><answer>A</answer>", (0, 0)),
    ("<think><answer>D</answer></think>", (0, 0)),
    ("<think>a</think><think>b</think><answer>D</answer>", (0, 0)),
    ("<think>a<think>b</think></think><answer>D</answer>", (0, 0)),
    ("<think></think><answer>D</answer>", (0, 0)),
    ("<think> \n\t </think><answer>D</answer>", (0, 0)),
    ("<think>...</think><answer>D</answer>", (0, 0)),
    ("<think>\u200b</think><answer>D</answer>", (0, 0)),                    # zero-width space is no reasoning
    ("<think>a</think><answer></answer>", (0, 0)),
    ("<think>a</think><answer> </answer>", (0, 0)),
    ("<answer>D</answer><think>a</think>", (0, 0)),
    ("<think>a<answer>D</answer>", (0, 0)),
    ("a</think><answer>D</answer>", (0, 0)),
    ("<think>a</think><answer>D", (0, 0)),                                  # truncated
    ("<think>a</think><answer>D</answer", (0, 0)),
    ("<think>a", (0, 0)),
    ("</think>a<think><answer>D</answer>", (0, 0)),
    ("<think>a</think></answer>D<answer>", (0, 0)),
    ("<think>a</think> so <answer>D</answer>", (0, 0)),                     # text between the blocks
    ("Sure! <think>a</think><answer>D</answer>", (0, 0)),
    ("<think>a</think><answer>D</answer> I am sure.", (0, 0)),
    ("<|im_end|><think>a</think><answer>D</answer>", (0, 0)),               # an end token is stripped at the end only
    ("<THINK>a</THINK><ANSWER>D</ANSWER>", (0, 0)),
    ("< think >a</ think ><answer>D</answer>", (0, 0)),
    ("<think>a</think><answer>D</answer><think>", (0, 0)),
    ("\uff1cthink\uff1ea\uff1c/think\uff1e\uff1canswer\uff1eD\uff1c/answer\uff1e", (0, 0)),     # full-width brackets
    ("D", (0, 0)),
    ("The answer is D", (0, 0)),
    ("", (0, 0)),
    ("<|im_end|>", (0, 0)),
])
def test_shapes(text, want):
    assert scored(text) == want


def test_parse_returns_the_two_texts():
    r = parse_response("\n<think> large\nnuclei </think>\n<answer> D \n</answer>\n")
    assert (r.thinking, r.answer, r.format_ok) == ("large\nnuclei", "D", True)
    assert parse_response("D") == ("", None, False)


TAG = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "<|im_end|>", "<|endoftext|>", "\n", "D", "a"])


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(st.one_of(TAG, st.text(max_size=3)), max_size=12).map("".join)))
def test_any_text_is_judged_and_only_the_one_shape_passes(text):
    r = parse_response(text)
    parts = score_answer(text, RECORD, n_tokens=3, length_limit=5, lexicon=LEXICON)
    assert set(parts) == {"format", "accuracy", "length", "claims"}
    assert parts["accuracy"] <= parts["format"] == r.format_ok
    contradicts(text, 0, OPTIONS), choice(text, OPTIONS), choice(text, ["yes", "no"])
    if r.format_ok:      # an independent statement of the rule
        body = text.strip()
        while body.endswith(("<|im_end|>", "<|endoftext|>")):
            body = body.removesuffix("<|im_end|>").removesuffix("<|endoftext|>").strip()
        assert all(body.count(t) == 1 for t in ("<think>", "</think>", "<answer>", "</answer>"))
        head, tail = body.split("</think>")
        assert head.startswith("<think>") and tail.strip().startswith("<answer>") and tail.endswith("</answer>")
        assert r.thinking in head and r.answer in tail


@settings(max_examples=100, deadline=None)
@given(st.text(), st.text())
def test_extra_text_outside_never_adds_reward(before, after):
    good = "<think>a</think><answer>D</answer>"
    if before.strip() or after.replace("<|im_end|>", "").replace("<|endoftext|>", "").strip():
        assert scored(before + good + after)[1] == 0


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(exclude_characters="<")))
def test_wrapping_any_reasoning_gives_the_format(thinking):
    ok = parse_response(f"<think>{thinking}</think><answer>D</answer>").format_ok
    assert ok == any(c.isalnum() for c in thinking)


@pytest.mark.parametrize("text", [
    "x" * 3_000_000, "<think>" * 400_000, "<think>a</think><answer>" + " " * 3_000_000, "<|im_end|>" * 300_000,
    " " * 3_000_000 + "D", "<think>" + "a " * 1_500_000 + "</think><answer>D</answer>",
    "<think>a</think><answer>" + "D " * 1_500_000 + "</answer>", "<" * 3_000_000, "(" * 3_000_000, "\u0301" * 1_000_000,
    "<think>" + "no " * 300_000 + "large   " * 200_000 + "</think><answer>D</answer>",
    "<think>large" + " " * 1_000_000 + "</think><answer>the answer is" + " " * 1_000_000 + "</answer>",
    "<think>" + "squamous " * 200_000 + "</think><answer>D</answer>",
])
def test_megabytes_take_linear_time(text):
    start = time.process_time()
    score_answer(text, RECORD, lexicon=LEXICON)
    claims(text, LEXICON), contradicts(text, 0, OPTIONS), choice(text, OPTIONS), choice(text, ["yes", "no"])
    assert time.process_time() - start < 8, "quadratic?"


def test_claims_time_grows_linearly():
    def seconds(n):
        text = "large nuclei with no keratin and squamous cells " * n
        best = 9e9
        for _ in range(3):
            start = time.process_time()
            claims(text, LEXICON)
            best = min(best, time.process_time() - start)
        return best
    assert seconds(8000) < 16 * max(seconds(1000), 1e-3)


# ------------------------------------------------------------------------------------------------------------- accuracy

@pytest.mark.parametrize("answer, want", [
    ("D", 3), ("d", 3), ("(D)", 3), ("(d)", 3), ("D.", 3), ("D)", 3), ("D:", 3), ("(D).", 3), (" D\n", 3), ("**D**", 3),
    ('"D"', 3), ("Answer: D", 3), ("answer: d", 3), ("Answer is D.", 3), ("The answer is (D)", 3), ("option\nD", 3),
    ("The correct answer is D.", 3), ("The final answer is: D", 3), ("Option D", 3), ("Choice (D)", 3),
    ("normal tissue", 3), ("Normal tissue.", 3), ("NORMAL  TISSUE", 3), ("normal\ntissue", 3), ("A", 0),
    ("lymphoma", 2),
    ("D. normal tissue", 3), ("D) Normal tissue", 3), ("(D) normal tissue", 3), ("D: normal tissue.", 3),
    ("D - normal tissue", 3), ("d normal tissue", 3),
    ("", None), ("E", None), ("A B C D", None), ("A, D", None), ("A or D", None), ("A/D", None), ("AD", None),
    ("DD", None), ("not D", None), ("D?", None), ("A. normal tissue", None), ("D. lymphoma", None), ("I think D", None),
    ("Adenocarcinoma D", None), ("carcinoma", None), ("normal", None), ("no lymphoma", None), ("[D]", None),
    ("lymphoma, normal tissue", None), ("((D))", None), ("1", None), ("4", None), ("D\u0301", None), ("\u0434", None),
    # look-alikes: Cyrillic and Greek A, full-width, bold and circled D, the Roman numeral 500
    ("\u0410", None), ("\u0391", None), ("\uff24", None), ("\U0001d403", None), ("\u216e", None), ("\u24b9", None),
    ("D" * 10_000, None), ("D " * 10_000, None),
    (None, None),
])
def test_choice(answer, want):
    assert choice(answer, OPTIONS) == want


def test_choice_refuses_folding_look_alikes():
    many = [f"o{i}" for i in range(26)]
    assert choice("K", many) == 10 and choice("\u212a", many) is None       # Kelvin sign folds to k
    assert choice("S", many) == 18 and choice("\u017f", many) is None       # long s folds to s


@pytest.mark.parametrize("answer, want", [
    ("yes", 0), ("Yes.", 0), ("NO", 1), ("A", 0), ("b", 1), ("Yes, mitoses are seen.", 0), ("No mitoses.", 1),
    ("yes and no", None), ("No, yes", None), ("maybe", None), ("not yes", None), ("yesterday", None),
    ("It is yes", None),
])
def test_yes_no(answer, want):
    assert choice(answer, ["yes", "no"]) == want
    flipped = choice(answer, ["No", "Yes"])
    assert flipped == (want if answer in ("A", "b") or want is None else 1 - want)


def test_options_that_are_letters_or_twins_are_ambiguous():
    assert choice("A", ["B", "A", "C", "D"]) is None           # letter A is option 0, text A is option 1
    assert choice("C", ["B", "A", "C", "D"]) == 2              # both readings agree
    assert choice("fat", ["fat", "Fat."]) is None
    assert choice("A", []) is None and choice("", ["", "x"]) is None
    assert choice("a mass", ["cyst", "a mass"]) == 1
    assert choice("3+", ["0", "1+", "2+", "3+"]) == 3 and choice("2", ["1", "2"]) == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=8), max_size=6), st.text(max_size=12))
def test_choice_is_total(options, answer):
    index = choice(answer, options)
    assert index is None or 0 <= index < len(options)


def test_broken_records_are_told():
    for answer in ("E", "", "AB", None, 3, "\u0410"):
        with pytest.raises(ValueError, match="record r9: answer"):
            score_answer("D", {"id": "r9", "options": OPTIONS, "answer": answer})


# --------------------------------------------------------------------------------------------------------- combinations

@pytest.mark.parametrize("f, a, l, grpo_sum, grpo_gated, dapo_gated, dapo_sum", [
    (1, 1, 1, 1.0, 1, 1, 1.0), (1, 1, 0, 1.0, 1, -1, 0.5), (1, 0, 1, 0.1, 0, -1, 0.5),
    (1, 0, 0, 0.1, 0, -1, 0.0), (0, 0, 1, 0.0, 0, -1, 0.5), (0, 0, 0, 0.0, 0, -1, 0.0), (0, 1, 1, 0.9, 0, 1, 1.0),
])
def test_the_four_readings(f, a, l, grpo_sum, grpo_gated, dapo_gated, dapo_sum):
    parts = {"format": float(f), "accuracy": float(a), "length": float(l)}
    assert [combine(parts, r) for r in READINGS] == pytest.approx([grpo_sum, grpo_gated, dapo_gated, dapo_sum])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(TAG, st.sampled_from("ABCD"), st.text(max_size=3)), max_size=10).map("".join),
       st.integers(1, 9))
def test_no_text_earns_more_than_the_one_right_answer(text, n_tokens):
    """Whatever is written: every reading stays in its range, and reaches the top only with a right answer in form."""
    parts = score_answer(text, RECORD, n_tokens=n_tokens, length_limit=5)
    for reading, low in zip(READINGS, (0, 0, -1, 0)):
        reward = combine(parts, reading)
        assert low <= reward <= 1
        if reward == 1:
            assert scored(text) == (1, 1) and (n_tokens <= 5 or reading.startswith("grpo"))


def test_claims_enter_only_when_asked_for():
    parts = {"format": 1.0, "accuracy": 1.0, "length": 1.0, "claims": -0.5}
    assert combine(parts) == 1.0 and combine(parts, claim_weight=0.2) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="grpo_sum, grpo_gated"):
        combine(parts, "grpo")


def test_length_part():
    good = "<think>a</think><answer>D</answer>"
    assert [score_answer(good, RECORD, n_tokens=n, length_limit=80)["length"] for n in (1, 80, 81)] == [1, 1, 0]
    assert score_answer(good, RECORD)["length"] == 1


# --------------------------------------------------------------------------------------------------------------- claims

def named(text):
    return [(c.attribute, c.value, text[c.start:c.end]) for c in claims(text, LEXICON)]


def test_longest_phrase_wins_and_offsets_point_at_it():
    text = "Keratin  pearls, LARGE\nnuclei; no keratin. keratinised, enkeratin"
    assert named(text) == [("material", "keratin", "Keratin  pearls"), ("nuclear_size", "large", "LARGE\nnuclei"),
                           ("material", "!keratin", "no keratin")]


def test_offsets_survive_letters_that_change_length_in_lower_case():
    text = "\u0130\u0130 large nuclei"            # "İ".lower() is two characters
    assert named(text) == [("nuclear_size", "large", "large nuclei")]


def test_a_phrase_with_two_meanings_makes_both_claims():
    lexicon = {"nuclear_size": {"large": ["large"]}, "mass": {"large": ["Large"]}}
    found = [(c.attribute, c.value) for c in claims("a large thing", lexicon)]
    assert found == [("nuclear_size", "large"), ("mass", "large")]


def test_phrases_with_signs_and_empty_lexicons():
    assert [c.value for c in claims("score 3+ (C++).", {"her2": {"high": ["3+"], "x": ["c++"]}})] == ["high", "x"]
    assert claims("anything", {}) == [] and claims("", LEXICON) == [] and claims("a", {"a": {"b": ["", " "]}}) == []


def test_claims_against_brute_force():
    """All phrases at all positions, longest first, left to right."""
    import random
    rng = random.Random(0)
    words = ["no", "keratin", "pearls", "large", "small", "nuclei", "pools", "of", "mucin", "and"]
    phrases = {p: (a, v) for a, vs in LEXICON.items() for v, ps in vs.items() for p in ps}
    for _ in range(200):
        tokens = [rng.choice(words) for _ in range(12)]
        want, i = [], 0
        while i < len(tokens):
            hit = max((p for p in phrases if tokens[i:i + len(p.split())] == p.split()), key=len, default=None)
            if hit:
                want.append((*phrases[hit], hit))
            i += len(hit.split()) if hit else 1
        assert named(" ".join(tokens)) == want


def test_judging_positive_and_negative_claims():
    found = claims("keratin, no keratin, pools of mucin, large nuclei, small nuclei", LEXICON)
    assert judge_claims(found, RECORD["facts"]) == [True, False, False, True, False]
    assert judge_claims(found, {"material": "none", "nuclear_size": "small"}) == [False, True, False, False, True]
    with pytest.raises(ValueError, match="'border'.*own subfield"):
        judge_claims([("border", "none", 0, 1)], RECORD["facts"])


@pytest.mark.parametrize("text, want", [
    ("keratin and large nuclei", 1.0), ("keratin and small nuclei", 0.0), ("no keratin and small nuclei", -1.0),
    ("hm", 0.0),
    ("keratin, keratin, keratin, small nuclei", 0.0),           # repeating the true part does not pay
    ("large nuclei, small nuclei", -1.0),                       # nor does saying both
])
def test_claim_reward(text, want):
    assert claim_reward(claims(text, LEXICON), RECORD["facts"]) == want
    assert score_answer(f"<think>{text}</think><answer>D</answer>", RECORD, lexicon=LEXICON)["claims"] == want


def test_contradiction_between_reasoning_and_answer():
    assert contradicts("Keratin, so squamous cell carcinoma.", 0, OPTIONS)
    assert not contradicts("Keratin, so squamous cell carcinoma.", 1, OPTIONS)
    assert not contradicts("Not lymphoma; Squamous  cell carcinoma.", 1, OPTIONS)          # the last one named counts
    assert contradicts("squamous cell carcinoma or rather lymphoma", 1, OPTIONS)
    assert not contradicts("large nuclei", 0, OPTIONS)
    nested = ["carcinoma", "squamous carcinoma"]
    assert not contradicts("a squamous carcinoma", 1, nested) and contradicts("a squamous carcinoma", 0, nested)
    assert not contradicts("so it is 12", 1, ["1", "12"]) and not contradicts("x", 0, [])
