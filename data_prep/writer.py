"""From facts to text: captions, chains of thought, and the records of every pool.

The SFT teacher is imperfect on purpose, as Patho-R1's is: a text-only language model that writes from captions. Ours
sees lossy notes of the case: each finding is missing with probability `p_missing` and filled in from its prior
(uniform over what is possible, so it may be right by luck). It reasons consistently from what it believes, so a wrong
belief can give a wrong answer; an answer that is not offered becomes the nearest one that is ("Closest is …"). With
probability `p_hasty`, where more than one finding is needed, it names one of them and jumps to some answer consistent
with it. What went wrong is kept in the record, for audits only: "teacher": {"wrong": [attributes of false statements],
"hasty": bool, "answer": what it answered}; the field "answer" is the true one. RL, validation and test records hold no
assistant turn.

Levels (Patho-R1's easy/short, medium, hard/long; the rules are ours): easy = one finding or one pair, medium = the
deciding findings and one exclusion, hard = a sum of three parts, or four findings or more and two exclusions.
verbosity "short" keeps <think> at <= 12 / 12-25 / 20-40 words (tiny models), "long" at <= 30 / 40-80 / 90-160.
Every finding inside <think> is a phrase of world.PHRASES, so nanopatho.rewards.claims can read it back and judge it.

May be copied together with world.py, questions.py and nanopatho/rewards.py; standard library only.
"""

from data_prep.questions import draw_question
from data_prep.world import ATTRIBUTES, PHRASES, TOPICS, allowed, diagnose, phrase, score, tissue
from nanopatho.rewards import claims, judge_claims

LETTERS = "ABCD"
BANDS = {"short": {"easy": (1, 12), "medium": (12, 25), "hard": (20, 40)},      # words of an unhurried <think>
         "long": {"easy": (1, 30), "medium": (40, 80), "hard": (90, 160)}}

# What an attribute is about, for descriptions and the long style.
ASPECT = {"architecture": "architecture", "nuclear_size": "nuclear size", "pleomorphism": "nuclear shape",
          "mitoses": "mitotic activity", "inflammation": "inflammatory cells", "material": "background material",
          "proportion": "share of positive cells", "intensity": "strength of the stain",
          "location": "place of the stain", "stain": "kind of stain", "arrangement": "arrangement",
          "nc_ratio": "amount of cytoplasm", "contour": "nuclear contour", "nucleoli": "nucleoli",
          "background": "background", "red": "red probe", "green": "green probe", "surface": "cut surface",
          "mass": "mass", "border": "border", "necrosis": "dead tissue", "cyst": "cavities"}


def say(facts, attributes):
    """Findings as phrases: say(facts, ["architecture", "mitoses"]) -> ["fused glands", "no mitoses"]."""
    return [phrase(facts["subfield"], a, facts[a]) for a in attributes]


# ---------------------------------------------------------------- the teacher

def believe(rng, facts, p_missing):
    """Lossy notes of the case: each finding is kept, or with p_missing guessed uniformly among its values. What is
    impossible beside an earlier finding of the table (a negative stain with a strength) is guessed anew."""
    subfield, beliefs = facts["subfield"], {"subfield": facts["subfield"]}
    for attribute in ATTRIBUTES[subfield]:
        values = allowed(subfield, attribute, beliefs)
        value = rng.choice(values) if rng.random() < p_missing else facts[attribute]
        beliefs[attribute] = value if value in values else rng.choice(values)
    return beliefs


def false_claims(text, facts):
    """Attributes of the findings that the text states and the image does not show, in order."""
    said = claims(text, PHRASES[facts["subfield"]])
    return list(dict.fromkeys(c.attribute for c, true in zip(said, judge_claims(said, facts)) if not true))


def exclusions(kind, beliefs, options, pick):
    """-> [(option, phrases that rule it out)] for the other options that the beliefs rule out. Where
    an option needs a thing that is not there, its absence is the phrase ("no keratin pearls")."""
    subfield, out = kind.subfield, []
    findings = tuple((a, beliefs[a]) for a in ATTRIBUTES[subfield])
    for i in range(len(options)):
        names = kind.why_not(findings, options[i]) if i != pick else ()
        if not names:
            continue
        said, first = say(beliefs, names), names[0]
        wanted = {"!" + f[first] for f, _ in kind.cases[options[i]]}
        if len(names) == len(wanted) == 1 and wanted <= set(PHRASES[subfield][first]):
            said = [phrase(subfield, first, wanted.pop())]
        out.append((options[i], said))
    return out


def think_short(kind, beliefs, options, pick):
    level, said = kind.level, say(beliefs, kind.needed(beliefs))
    agrees = kind.label(beliefs) == options[pick]
    end = f"This fits {options[pick]}." if agrees else f"Closest is {options[pick]}."
    if kind.name == "score":
        total, parts = score(beliefs)
        steps = "; ".join(f"{', '.join(say(beliefs, names))}, score {points}" for names, points in parts)
        return f"I see {steps}. {' + '.join(str(p) for _, p in parts)} = {total}." + ("" if agrees else f" {end}")
    if level == "easy":
        if kind.name == "mitoses+material" and beliefs["material"] != "necrosis":
            said[1] = phrase("H&E", "material", "!necrosis")
        text = f"I see {', '.join(said)}."
        return text if agrees or len(f"{text} {end}".split()) > BANDS["short"]["easy"][1] else f"{text} {end}"
    text = f"I see {', '.join(said)}."
    ruled_out = sorted(exclusions(kind, beliefs, options, pick), key=lambda x: len(x[1]))     # plain reasons first
    for option, why in ruled_out[:1 if level == "medium" else 2]:
        news = level == "medium" and why[0].startswith("no ") and why[0] not in said
        more = f" N{why[0][1:]}." if news else f" Not {option}, given {' and '.join(why)}."
        if len(f"{text}{more} {end}".split()) <= BANDS["short"][level][1]:
            text += more
    return f"{text} {end}"


def think_long(kind, beliefs, options, pick, topic):
    """Sentences in order of weight, added until the band of the level is reached."""
    subfield, needed, (low, high) = kind.subfield, kind.needed(beliefs), BANDS["long"][kind.level]
    plural = lambda n: f"{n} point{'' if n == 1 else 's'}"
    look = lambda a: f"I look at the {ASPECT[a]} and see {phrase(subfield, a, beliefs[a])}."
    end = f"This fits {options[pick]}." if kind.label(beliefs) == options[pick] else f"Closest is {options[pick]}."
    words = lambda parts: len(" ".join([*parts, end]).split())
    if kind.level == "easy":
        return f"I look at this {subfield} image of the {topic} and see {' and '.join(say(beliefs, needed))}. {end}"
    parts = [f"This is an image of the {topic}, subfield {subfield}."]
    if kind.name == "score":
        total, points = score(beliefs)
        parts += [f"For the {' and the '.join(ASPECT[a] for a in names)} I see {' and '.join(say(beliefs, names))}, "
                  f"which scores {plural(n)}." for names, n in points]
        parts.append(f"The total is {' + '.join(str(n) for _, n in points)} = {total}.")
        against = [f"A total of {o} would need {plural(abs(int(o) - total))} {'more' if int(o) > total else 'less'} "
                   f"than these findings give." for o in options if int(o) != total]
    else:
        parts += [look(a) for a in (needed if kind.level == "medium" else ATTRIBUTES[subfield])]
        against = [f"I can rule out {o}, because I see {' and '.join(why)}."
                   for o, why in exclusions(kind, beliefs, options, pick)]
    rest = [look(a) for a in ATTRIBUTES[subfield] if not any(phrase(subfield, a, beliefs[a]) in p for p in parts)]
    close = [f"Taken together, the image shows {', '.join(say(beliefs, needed))}.",
             "I check each of these findings once more in the image, and none of them changes this reading.",
             "The other findings of the image do not speak against it, so I keep this conclusion and give the answer.",
             "A single finding would not be enough here; only the combination of all of them decides."]
    for i, part in enumerate([*against, *rest, *close]):
        asked = i < min(len(against), 1 if kind.level == "medium" else 2)        # these exclusions belong to the level
        if (asked or words(parts) < low) and words([*parts, part]) <= high:
            parts.append(part)
    return " ".join([*parts, end])


def teach(rng, kind, options, facts, topic, *, p_missing=0.15, p_hasty=0.15, verbosity="short"):
    """One answer of the teacher -> (thinking, index of its option, hasty)."""
    beliefs = believe(rng, facts, p_missing)
    while kind.label(beliefs) is None:                       # the question itself says that there is a stain, or a mass
        beliefs = believe(rng, facts, p_missing)
    needed, label = kind.needed(beliefs), kind.label(beliefs)
    if len(needed) > 1 and rng.random() < p_hasty:
        seen = rng.choice(needed)
        fits = [i for i, o in enumerate(options) if any(f[seen] == beliefs[seen] for f, _ in kind.cases[o])]
        pick = rng.choice(fits or range(len(options)))
        jump = {"easy": ""}.get(kind.level, f" The total is {options[pick]}." if kind.name == "score"
                                else f" This fits {options[pick]}.")
        return f"I see {phrase(kind.subfield, seen, beliefs[seen])}.{jump}", pick, True
    pick = options.index(label) if label in options else kind.nearest(beliefs, options, rng)
    if verbosity == "long":
        return think_long(kind, beliefs, options, pick, topic), pick, False
    return think_short(kind, beliefs, options, pick), pick, False


# ---------------------------------------------------------------- records (__main__.py adds id, image, split)

def lettered(question, options):
    """The user's text of a multiple-choice question: the question and its options, one a line."""
    return "\n".join([question] + [f"{LETTERS[i]}. {o}" for i, o in enumerate(options)])


def full_facts(facts):
    """What a record keeps: the facts, and what the rules make of them."""
    return {**facts, "tissue": tissue(facts), "diagnosis": diagnose(facts)[0], "score": score(facts)[0]}


def caption_record(rng, facts, topic):
    """"morphology": the findings alone (step 1 of Patho-CLIP); "caption": with the subfield, half of them with the diagnosis.

    True of the image, in the table's order, and silent on what a picture cannot show (the organ): that is noise to whoever
    learns from it (docs/LOG.md has the trial).
    """
    subfield = facts["subfield"]
    morphology = ", ".join(say(facts, ATTRIBUTES[subfield]))
    tail = f". This fits {diagnose(facts)[0]}." if rng.random() < 0.5 else "."
    return {"caption": f"{subfield} with {morphology}{tail}", "morphology": morphology, "subfield": subfield, "topic": topic,
            "facts": full_facts(facts)}


def question_record(rng, subfield, level, combos=False):
    """A multiple-choice record without an assistant turn, for the pools rl, val and test."""
    kind, question, options, right, facts = draw_question(rng, subfield, level, combos)
    topic = rng.choice(TOPICS)
    return {"question": f"{subfield}, {topic}. {question}", "options": options, "answer": LETTERS[right],
            "subfield": subfield, "topic": topic, "level": level, "task": "mcq", "kind": kind.name,
            "facts": full_facts(facts)}


def describe(kind, facts, beliefs):
    """-> (request, thinking, answer, true answer) of the task "description"."""
    shown = kind.needed(facts) if kind.level == "easy" else tuple(ATTRIBUTES[kind.subfield])
    if kind.level == "hard":
        conclude = lambda f: f"{diagnose(f)[0]}, with {', '.join(say(f, diagnose(f)[1]))}"
        return ("Describe the findings and conclude.", f"I see {', '.join(say(beliefs, shown))}.",
                f"It is {conclude(beliefs)}.", f"It is {conclude(facts)}.")
    what = "findings" if kind.level == "medium" else " and the ".join(ASPECT[a] for a in shown)
    return (f"Describe the {what}.", f"I look at the {what}.", f"It shows {', '.join(say(beliefs, shown))}.",
            f"It shows {', '.join(say(facts, shown))}.")


def sft_record(rng, subfield, level, task, *, p_missing=0.15, p_hasty=0.15, verbosity="short",
               answers="letter"):
    """A record with the teacher's answer. task: mcq, description, reasoning (open), conversation (two turns).

    answers: what stands in <answer> of a choice, the option's "letter" (as in the paper) or its "text". Finding the letter of
    a text is a reading skill that a published base model brings along and a small one from random weights does not.
    """
    kind, question, options, right, facts = draw_question(rng, subfield, level)
    topic = rng.choice(TOPICS)
    thinking, pick, hasty = teach(rng, kind, options, facts, topic, p_missing=p_missing, p_hasty=p_hasty,
                                  verbosity=verbosity)
    beliefs, first = believe(rng, facts, p_missing), rng.choice(list(ATTRIBUTES[subfield]))
    given = LETTERS[pick] if answers == "letter" else options[pick]
    head, turns, extra = f"{subfield}, {topic}.", [], {"options": options}
    if task == "mcq":
        text, answer = f"{head} {question}", LETTERS[right]
        asked = lettered(text, options)
    elif task == "conversation":                             # one finding first, then a question that builds on it
        text, answer = f"With this in mind: {question}", LETTERS[right]
        turns = [(f"{head} Describe the {ASPECT[first]}.", f"I look at the {ASPECT[first]}.",
                  f"It shows {phrase(subfield, first, beliefs[first])}.")]
        asked = lettered(text, options)
    elif task == "reasoning":
        asked = text = f"{head} {question} Why?"
        given, answer, extra = f"It is {options[pick]}.", f"It is {options[right]}.", {}
    else:
        (request, thinking, given, answer), hasty, extra = describe(kind, facts, beliefs), False, {}
        asked = text = f"{head} {request}"
    turns.append((asked, thinking, given))
    messages = [m for user, thought, reply in turns for m in (
        {"role": "user", "content": user},
        {"role": "assistant", "content": f"<think>{thought}</think><answer>{reply}</answer>"})]
    messages[0]["content"] = "<image>" + messages[0]["content"]
    said = " ".join(m["content"] for m in messages if m["role"] == "assistant")
    return {"messages": messages, "question": text, **extra, "answer": answer, "subfield": subfield, "topic": topic,
            "level": level, "task": task, "kind": kind.name, "facts": full_facts(facts),
            "teacher": {"wrong": false_claims(said, facts), "hasty": hasty, "answer": given}}
