"""Rewards that a program can check: format, accuracy, length, and the truth of what was said on the way.

Contract: plain strings and dicts in, plain numbers out; every function returns for every string, in linear time, and
never raises because of what a model wrote (it raises for a broken record, which is our own fault). Imports the
standard library only and may be copied alone. Parts are returned by name and combined in one place, so that a run can
log each of them.

The shape asked for is Patho-R1's (arXiv 2505.11404, README): `<think> reasoning </think><answer> letter </answer>`.
A policy under optimisation finds every loose screw of a reward. So: each tag exactly once, in order, nothing outside;
the answer is read from that one block and nowhere else; more than one reading of the answer means no answer. A search
for the first letter pays `<answer>A B C D</answer>`; a search for the first `<answer>` pays one hidden inside the
reasoning.

Readings. The text that is known of Patho-R1 allows two readings of each reward, so all four are here by name (combine).
"""

import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
END_TOKENS = ("<|im_end|>", "<|endoftext|>")   # decoded texts may keep them at the end; they are not part of the answer
READINGS = ("grpo_sum", "grpo_gated", "dapo_gated", "dapo_sum")


# -------------------------------------------------------------------------------------------------------------- format

class Response(NamedTuple):
    thinking: str          # text inside <think>, stripped; "" when the format is wrong
    answer: str | None     # text inside <answer>, stripped; None when the format is wrong
    format_ok: bool


def parse_response(text):
    """Reads one answer. format_ok iff, but for outer space and end tokens, the text is one <think> block with at
    least one letter or digit in it and one <answer> block with something in it, and only space between and around them.

    >>> parse_response("<think>keratin</think>\\n<answer>D</answer><|im_end|>")
    Response(thinking='keratin', answer='D', format_ok=True)
    >>> parse_response("D")
    Response(thinking='', answer=None, format_ok=False)

    Written with count and find, not with a regular expression: `<think>.*?</think>` finds a match in too many wrong
    texts (two answers, an answer inside the reasoning, a second <think>), and needs DOTALL in every place it is
    repeated.
    """
    wrong = Response("", None, False)
    start, end = _trim(text)
    if any(text.count(tag) != 1 for tag in TAGS):
        return wrong
    think_open, think_close, answer_open, answer_close = (text.index(tag) for tag in TAGS)
    if think_open != start or answer_close + len("</answer>") != end or not think_open < think_close < answer_open:
        return wrong
    thinking = text[think_open + len("<think>"):think_close].strip()
    between = text[think_close + len("</think>"):answer_open].strip()
    answer = text[answer_open + len("<answer>"):answer_close].strip()
    if between or not answer or not any(c.isalnum() for c in thinking):
        return wrong
    return Response(thinking, answer, True)


def _trim(text):
    """Start and end of the text without outer space and without end tokens at its end. Moves indices, copies nothing: a
    loop of text = text[:-10] is quadratic, and a policy can write thousands of end tokens."""
    start, end = 0, len(text)
    while True:
        while end > start and text[end - 1].isspace():
            end -= 1
        token = next((t for t in END_TOKENS if text.endswith(t, start, end)), None)
        if token is None:
            break
        end -= len(token)
    while start < end and text[start].isspace():
        start += 1
    return start, end


# ------------------------------------------------------------------------------------------------------------ accuracy

# "D", "(d)", "D.", "Answer: D", "The correct option is (D)". ASCII only and no IGNORECASE: Python folds the Kelvin sign
# to k and the long s to s, and a look-alike letter must not be an answer. Every repeat is bounded by the length check.
LETTER = re.compile(r"(?:(?:[Tt]he )?(?:[Ff]inal |[Cc]orrect )?(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?: is)? ?[:=]? ?)?"
                    r"(?:\(([A-Za-z])\)|([A-Za-z]))[.):]?", re.ASCII)
LETTER_AND_TEXT = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z]))(?:[.):] ?| - | )(.+)", re.ASCII)


def choice(answer_text, options):
    """Which option does the text inside <answer> name? -> its index, or None when it names none, two, or another thing.

    Understood: the letter ("D", "d", "(D)", "D.", "Answer: D"), the option's text in any case with or without a full
    stop, both together if they agree ("D. squamous carcinoma"), and for yes/no options a sentence that opens with one
    of them and does not hold the other. All readings are collected; only a single common one counts.

    >>> choice("(b)", ["yes", "no"]), choice("No, none is seen.", ["yes", "no"]), choice("A B", ["yes", "no"])
    (1, 1, None)
    """
    if answer_text is None or not options:
        return None
    plain = [_plain(option) for option in options]
    yes_no = sorted(plain) == ["no", "yes"]
    answer = answer_text.strip()
    if len(answer) > max(map(len, options)) + 40 and not (yes_no and len(answer) < 300):
        return None                                        # too long to be only an answer; also bounds all work below
    answer = " ".join(answer.split()).strip("*_`\"'")      # markdown or quotes around the answer are harmless
    found = {i for i, text in enumerate(plain) if text and text == _plain(answer)}
    if m := LETTER.fullmatch(answer):
        found.add(_index(m[1] or m[2]))
    elif m := LETTER_AND_TEXT.fullmatch(answer):
        index = _index(m[1] or m[2])
        if index < len(options) and _plain(m[3]) == plain[index]:
            found.add(index)
    if yes_no and not found:
        words = re.findall(r"[^\W_]+", answer.lower())
        if words and words[0] in plain and plain[1 - plain.index(words[0])] not in words:
            found.add(plain.index(words[0]))
    index = found.pop() if len(found) == 1 else None
    return index if index is not None and index < len(options) else None


def _index(letter):
    return ord(letter.upper()) - ord("A")


def _plain(text):
    """One spelling for comparing option texts: composed accents, lower case, single spaces, no full stop at the end."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split()).rstrip(".").rstrip()


# ----------------------------------------------------------------------------------------------- parts and combinations

def score_answer(text, record, *, n_tokens=None, length_limit=None, lexicon=None):
    """The named parts of the reward of one answer, each a float.

    record: "options" and "answer" (a letter), "facts" too if a lexicon is given. Returns
      format    1 iff parse_response accepts the text
      accuracy  1 iff the one answer block names the right option; so 0 whenever format is 0
      length    1 iff n_tokens <= length_limit (max_length - cache_length, in tokens with EOS); 1 if no limit is given
      claims    only with a lexicon: claim_reward of the reasoning, 0 when the format is wrong
    """
    options, letter = record["options"], record["answer"]
    right = _index(letter) if isinstance(letter, str) and len(letter) == 1 and letter.isascii() else -1
    if not 0 <= right < len(options):
        raise ValueError(f"record {record.get('id', '?')}: answer {letter!r} is none of its {len(options)} options; "
                         f"give the letter of the right one, A to {chr(ord('A') + max(len(options), 1) - 1)}")
    response = parse_response(text)
    parts = {"format": float(response.format_ok),
             "accuracy": float(choice(response.answer, options) == right),
             "length": float(length_limit is None or n_tokens is None or n_tokens <= length_limit)}
    if lexicon is not None:
        parts["claims"] = claim_reward(claims(response.thinking, lexicon), record["facts"])
    return parts


def combine(parts, reading="grpo_sum", claim_weight=0.0):
    """One reward from the named parts (f format, a accuracy, l length, each 0 or 1).

    grpo_sum    0.1 f + 0.9 a            in {0, .1, 1}; our default for GRPO: with the gate the weights would be pointless
    grpo_gated  1 if f and a else 0      the other reading, of "non-zero only when both are 1"
    dapo_gated  1 if a and l else -1     our default for DAPO, "1 only when both are 1, otherwise -1"
    dapo_sum    0.5 a + 0.5 l            the plain weighted sum

    Source: secondary descriptions of the article; the equations themselves are not public. claim_weight * claims is added
    where asked for: an experiment of this project, in no paper of the Patho-R1 authors.
    """
    f, a, l = parts["format"], parts["accuracy"], parts["length"]
    if reading == "grpo_sum":
        reward = 0.1 * f + 0.9 * a
    elif reading == "grpo_gated":
        reward = 1.0 if f == 1 and a == 1 else 0.0
    elif reading == "dapo_gated":
        reward = 1.0 if a == 1 and l == 1 else -1.0
    elif reading == "dapo_sum":
        reward = 0.5 * a + 0.5 * l
    else:
        raise ValueError(f"reading={reading!r} is unknown: one of {', '.join(READINGS)}")
    return reward + claim_weight * parts.get("claims", 0.0) if claim_weight else reward


# -------------------------------------------------------------------------- claims: is the reasoning true of the image?

class Claim(NamedTuple):
    attribute: str         # "material"
    value: str             # "keratin", or "!keratin" for "no keratin"
    start: int             # offsets into the text: text[start:end] is the phrase
    end: int


def claims(text, lexicon):
    """Statements about the image that a known phrase makes, in order, longest phrase first, without overlaps.

    lexicon {attribute: {value: [phrases]}} of one subfield; a value "!x" says that x is absent, so "no keratin" is one
    negative claim and not the word "keratin" inside it. Whole words, any case, any white space between the words. A
    phrase that stands for two values makes both claims. What no phrase covers is not counted: this measures known
    statements only.

    >>> claims("No keratin, large nuclei.", {"material": {"keratin": ["keratin"], "!keratin": ["no keratin"]}})
    [Claim(attribute='material', value='!keratin', start=0, end=10)]
    """
    entries = tuple((phrase, attribute, value) for attribute, values in lexicon.items()
                    for value, phrases in values.items() for phrase in phrases)
    pattern, meanings = _phrase_pattern(entries)
    return [Claim(attribute, value, m.start(), m.end()) for m in pattern.finditer(text)
            for attribute, value in meanings[m.lastindex - 1]]


@lru_cache(maxsize=64)
def _phrase_pattern(entries):
    """((phrase, attribute, value), …) -> a pattern with one group a phrase, longest first, and what each group means.
    Plain words joined by \\s+ cannot overlap themselves, so matching stays linear in the text."""
    meanings = {}
    for phrase, attribute, value in entries:
        meanings.setdefault(tuple(phrase.lower().split()), []).append((attribute, value))
    ordered = sorted((words for words in meanings if words), key=lambda words: (-len(" ".join(words)), words))
    groups = "|".join("(" + r"\s+".join(map(re.escape, words)) + ")" for words in ordered)
    return re.compile(rf"(?<!\w)(?:{groups or '(?!)'})(?!\w)", re.IGNORECASE), [meanings[words] for words in ordered]


def judge_claims(claims, facts):
    """Claims -> list of bool: is each one true of the image whose facts are given? "!x" is true iff the fact is not x.

    Facts come from the renderer, which drew them; no model and no opinion is asked. An attribute without a fact is an
    error of the data (lexicon of another subfield?) and is told.
    """
    verdicts = []
    for claim in claims:
        attribute, value = claim[0], claim[1]
        if attribute not in facts:
            known = ", ".join(sorted(map(str, facts)))
            raise ValueError(f"claim about {attribute!r}, but the facts know only {known}: "
                             f"use the lexicon of the record's own subfield")
        verdicts.append(facts[attribute] != value[1:] if value.startswith("!") else facts[attribute] == value)
    return verdicts


def claim_reward(claims, facts):
    """In [-1, 1]: mean over the attributes that were spoken of, +1 if all claims on it are true, -1 if one is false.

    An attribute counts once, so neither repeating a true sentence nor naming both possibilities pays. No claims: 0.
    """
    good = {}
    for claim, true in zip(claims, judge_claims(claims, facts)):
        good[claim[0]] = good.get(claim[0], True) and true
    return sum(1 if true else -1 for true in good.values()) / len(good) if good else 0.0


def contradicts(thinking, answer_index, options):
    """Does the reasoning conclude on another option than the one answered? True iff the option named last is not it.

    An option is named by its whole text, in any case; of two that start at the same place the longer counts. Nothing
    named: False. A heuristic: reasoning that ends on "… so it is not X" is read as concluding on X.
    """
    pattern, meanings = _phrase_pattern(tuple((option, i, None) for i, option in enumerate(options)))
    last = None
    for last in pattern.finditer(thinking):
        pass
    return last is not None and answer_index not in [i for i, _ in meanings[last.lastindex - 1]]
