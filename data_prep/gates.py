"""The gates of `python -m data_prep write`: a teacher's reply -> the reason why it is dropped, or None.

They read words, not meaning: they stop what is seen without a physician, who still has to look at samples.
"""
import bisect
import json
import re
from pathlib import Path
from typing import NamedTuple

from data_prep import writer
from data_prep.filters import LEXICON, words_of
from data_prep.teacher import prompt_file
from nanopatho.chat import IMAGE
from nanopatho.data import LETTERS, question_text
from nanopatho.endpoint import fill
from nanopatho.metrics import token_scores
from nanopatho.rewards import choice, claims, contradicts, judge_claims, parse_response

BANDS = writer.BANDS["long"]                                             # words of reasoning a level


class Job(NamedTuple):
    where: str             # file, line, id
    root: Path             # folder of the file
    record: dict
    source: str            # what is known about the image
    lexicon: dict          # phrases of findings, where the facts can judge them; else {}
    cell: tuple = ()       # (level, task)


LEAKS = re.compile(r"\b(?:captions?|legend|figure \d|fig\. ?\d|according to|ground truth|authors?|as an ai|"
                   r"i (?:was|am) told|(?:as|is|was) (?:described|stated|reported|mentioned|provided|given)|"
                   r"(?:the|provided|given) (?:material|text|passage|report|description|article|reference)|"
                   r"given (?:that )?the (?:correct |right )?answer|(?:option|answer|choice) \(?(?-i:[A-J]))\b"
                   r"|图注|题注|图例|正文|原文|参考答案", re.I)
JOINS = re.compile(r"\b(?:all|none|both|any|neither) of (?:the|these)\b|\bboth [a-d] and [a-d]\b|"
                   r"cannot be (?:told|determined)|以上", re.I)
SCRIPTS = ("[\u4e00-\u9fff]", "[\u3040-\u30ff]", "[\uac00-\ud7af]", "[\u0400-\u04ff]", "[\u0600-\u06ff]")


def read_reply(text, task, given):
    """A teacher's reply -> (turns, None), or (None, what is wrong with its form). given: what the record fixes."""
    text = text.rpartition("</think>")[2]                                # what it thought before it wrote
    try:
        found = json.loads(text[text.index("{"):text.rindex("}") + 1], strict=False)     # models break lines in strings
        turns = [{**t, **given} for t in found["turns"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None, "format (no JSON object with turns)"
    if len(turns) not in ((2, 3, 4) if task == "conversation" else (1,)):
        return None, f"format ({len(turns)} turns)"
    for t in turns:
        texts = [t.get(name) for name in ("question", "think", "answer")]
        texts += t.get("options") or [None] if task == "mcq" else []
        if not all(isinstance(x, str) and x.strip() and "<|" not in x and IMAGE not in x for x in texts):
            return None, "format (a field is missing, no text, or holds marks of the chat)"
        if not parse_response(f"<think>{t['think']}</think><answer>{t['answer']}</answer>").format_ok:
            return None, "format (tags, or no reasoning)"
    return turns, None


def option_problem(question, options, right):
    plain = [" ".join(o.lower().split()).rstrip(".") for o in options]
    others = max((len(o) for i, o in enumerate(options) if i != right), default=0)
    if not 2 <= len(options) <= len(LETTERS) or len(set(plain)) < len(plain):
        return "options (the same one twice, or not 2 to 10)"
    if any(JOINS.search(o) or re.match(r"\(?[A-Ja-j][.):]\s", o) for o in options):
        return "options (one joins others, or begins with a letter)"
    if len(options[right]) > 1.25 * others + 12:
        return "options (the right one is the longest by far)"
    if [p in question.lower() for p in plain] == [i == right for i in range(len(plain))]:
        return "options (the question names the right one)"


def gold_problem(answer, options, gold):
    """gold: the record's own answer, a letter where there are options; None where it has none."""
    choices = options or (["yes", "no"] if (gold or "").lower() in ("yes", "no") else None)
    said = choice(answer, choices) if choices else None
    if choices and said is None:
        return "gold answer (no option is named, or several)"
    same = (gold == LETTERS[said] if options else gold.lower() == choices[said] if choices else
            token_scores(answer, gold)["recall"] >= 0.5) if gold else True
    return None if same else f"gold answer ({answer[:40]!r} is not {gold[:40]!r})"


def length_problem(thinks, level):
    """The longest piece of reasoning must lie in the band; a Chinese character is a word."""
    low, high = BANDS[level]
    words = max(len(re.sub(SCRIPTS[0], " x ", t).split()) for t in thinks)
    return None if low <= words <= high else f"length ({words} words, {level} has {low} to {high})"


def wording_problem(text, source):
    if leak := LEAKS.search(text):
        return f"leakage ({leak[0]!r})"
    if any(re.search(script, text) and not re.search(script, source) for script in SCRIPTS):
        return "language (a script that the source does not have)"


def repetition_problem(text, most=0.3):
    """The share of 4-word sequences that stood before: 0.27 in the wordiest text of the rules, over 0.5 in loops."""
    words = words_of(text)
    grams = [tuple(words[i:i + 4]) for i in range(len(words) - 3)]
    again = 1 - len(set(grams)) / max(1, len(grams))
    return f"repetition ({100 * again:.0f} % of the 4-word sequences)" if len(grams) > 12 and again > most else None


STOP = re.compile(r"[.;:!?。；！？]|\b(?:but|however|although|though|while|whereas|because|since|given|so|therefore|"
                  r"which|except)\b|, (?:and )?(?:the|this|these|there|it|they|i|we)\b|但", re.I)
DENIED = re.compile(r"\b(?:no|not|non|never|without|neither|nor|absence|lacks?|lacking|negative for|free of|"
                    r"rul(?:e|es|ed|ing) out|excludes?|rather than|unlike)\b|无|未见|没有|缺乏", re.I)
DENIED_AFTER = re.compile(r"\b(?:absent|lacking|excluded|ruled out|"
                          r"not (?:seen|present|found|observed|evident|identified))\b|阴性|缺如", re.I)
OPEN = re.compile(r"\b(?:would|could|might|may|if|expect\w*|typical\w*|usual\w*)\b|可能|如果", re.I)
NO_FINDING = set("cell tissue slide section stain biops nucle patholog hist cytoplas lesion tumor grade 组织 染色 核 "
                 "切片 病变 肿瘤 瘤".split())
DISEASE = set("aden carcin sarcom lymph melan gli neoplas squam".split())   # in many names: "no squamous carcinoma"


def stances(text, spans):
    """(start, end) of findings, in order -> "+" where the clause states it, "-" where it denies it, "?" where it leaves
    it open. "No a, b or c" denies all three, "no a, b" only the first."""
    cuts = [*STOP.finditer(text)]
    begins, ends = [0, *(m.end() for m in cuts)], [*(m.start() for m in cuts), len(text)]
    for start, end in spans:
        i = bisect.bisect_right(begins, start) - 1
        left, right = text[begins[i]:start], text[end:ends[i]]
        if OPEN.search(left) or OPEN.search(right) or i < len(cuts) and cuts[i][0] in "?？":
            yield "?"
        else:
            near = left if re.search(r"\b(?:or|nor)\b|或", left + right) else left.rpartition(",")[2]
            denied = DENIED.search(near[-60:]) or DENIED_AFTER.search(right.partition(",")[0][:40])
            yield "-" if denied else "+"


def stems(text):
    """-> [(stem of the histology lexicon, the word, stance)]"""
    found = [(m, re.compile(r"\w*").match(text, m.end()).end()) for m in LEXICON.finditer(text)]
    return [(m[0].lower().replace("mour", "mor").replace("haem", "hem"), text[m.start():end], said)
            for (m, end), said in zip(found, stances(text, [(m.start(), end) for m, end in found]))]


def grounding_problem(text, source, licence, lexicon, facts):
    """Stated: what the source denies or does not hold. Denied: what it states or is silent about. A lexicon and facts
    judge each phrase; without them stems of the histology lexicon are looked up in the source. licence: free words."""
    if lexicon:
        found, masked = claims(text, lexicon), text
        for claim in found:                                              # the "no" of "no mitoses" denies nothing else
            masked = masked[:claim.start] + "_" * (claim.end - claim.start) + masked[claim.end:]
        for claim, said in zip(found, stances(masked, [(claim.start, claim.end) for claim in found])):
            if said == "-":
                said, claim = "?" if claim.value[0] == "!" else "+", claim._replace(value=f"!{claim.value}")
            if said == "+" and not judge_claims([claim], facts)[0]:
                return f"grounding ({text[claim.start:claim.end]!r} is not true of the image)"
        return None
    held = {(stem, said) for stem, _, said in stems(source)}
    free = NO_FINDING | {stem for stem, _, _ in stems(licence)}
    for stem, word, said in stems(text):
        stated, denied = not {(stem, "+"), (stem, "?")}.isdisjoint(held), (stem, "-") in held
        if stem not in free and said == "+" and not stated:
            return f"grounding ({word!r} is {'denied by' if denied else 'not in'} the source)"
        if stem not in free | DISEASE and said == "-" and not denied:
            return f"grounding ({word!r} is denied, and the source {'states it' if stated else 'is silent'})"


def derivable_problem(think, answer, options, right, level, lexicon):
    """The answer must follow from the reasoning: its option is the one named last; of an open answer half the words
    occur. Beyond easy, a finding must be left when the option's words are taken out."""
    if not options:
        words = {w for w in words_of(answer) if len(w) > 2 or not w.isalpha() or not w.isascii()}
        known = len(words & set(words_of(think)))
        return None if 2 * known >= len(words) else "derivable (the answer is not in the reasoning)"
    name = options[right].lower()
    if contradicts(think, right, options) or name not in think.lower():
        return "derivable (the reasoning does not end on the answer)"
    rest = think.lower().replace(name, "")
    if level != "easy" and not (claims(rest, lexicon) if lexicon else {s for s, _, _ in stems(rest)} - NO_FINDING):
        return "derivable (no finding but the answer)"


def guess_problem(question, options, right, ask, times):
    """Is the right option guessed without the picture, every time of `times`, the options turned each time? One lucky
    guess must not drop a question: what a guesser has right would then be missing, and be a cue itself."""
    for n in range(times):
        k = n % len(options)
        turned = options[k:] + options[:k]
        text = question_text({"question": question, "options": turned, "image": []})
        picked = choice(ask(fill(prompt_file("guess"), question=text), n=n).rpartition("</think>")[2], turned)
        if picked is None or turned[picked] != options[right]:
            return None
    return f"guessed (without the picture, {times} of {times} times)" if times else None


def reply_problem(turns, job):
    """-> the first gate that the turns of a reply do not pass, or None."""
    r, (level, task), last, thinks = job.record, job.cell, turns[-1], [t["think"] for t in turns]
    options, right, answers = last["options"] if task == "mcq" else None, None, [t["answer"] for t in turns]
    if why := gold_problem(last["answer"], options, r.get("answer")):
        return why
    if options:
        right = choice(last["answer"], options)
        answers = [options[right]]
    said, wrong = ". ".join([*thinks, *answers]), [o for o in options or () if o not in answers]
    licence = "; ".join([*wrong, r.get("topic") or "", r["subfield"].replace("H&E", "H&E, hematoxylin, eosin")])
    return (options and option_problem(last["question"], options, right) or length_problem(thinks, level)
            or wording_problem("\n".join([said, *(t["question"] for t in turns)]), job.source)
            or repetition_problem(" ".join(thinks))
            or grounding_problem(said, job.source, licence, job.lexicon, r.get("facts"))
            or next(filter(None, (derivable_problem(t["think"], a, options, right, level, job.lexicon)
                                  for t, a in zip(turns, answers))), None))
