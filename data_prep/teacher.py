"""Who writes the reasoning: one interface, three backends.

    teacher(text, images=[paths], n=0, record=record, level="hard", task="mcq") -> reply, or NoReply(why)

"rules"            knows the micro-world's facts and writes without a model; it reads the record, not the prompt
an address         any OpenAI-compatible endpoint, with a journal and a budget (nanopatho/endpoint.py); key in SECRET
a file             replays the answers of a journal and asks nobody
n: which try it is; another n is another answer. The prompts are ours, in prompts/*.md (the paper published none).
"""
import contextlib
import functools
import hashlib
import json
import os
import random
from pathlib import Path

from data_prep import questions, writer
from data_prep.world import ATTRIBUTES, diagnose, phrase
from nanopatho.data import LETTERS, question_text
from nanopatho.endpoint import Journal, data_url, fill, key_of
from nanopatho.image import ImageError, open_image
from nanopatho.log import ConfigError

SECRET, SIDE = "NANOPATHO_TEACHER_KEY", 1024       # SIDE: pixels of the longer side of a picture that is sent
BUDGET = "the budget is out"
SHAPE = '{"turns": [{"question": "…", %s"think": "…", "answer": "…"}%s]}'
SIGHT = {False: "You do not see the image.", True: "Look at the image first; what the material says of it is true."}


class NoReply(Exception):
    """The teacher did not answer; the message says why. BUDGET: it was not asked."""


@functools.cache
def prompt_file(name):
    return Path(__file__).with_name("prompts").joinpath(f"{name}.md").read_text(encoding="utf-8")


@functools.cache
def parts(name):
    """prompts/NAME.md -> {heading: text}"""
    return {head: text.strip() for head, _, text in (
        part.partition("\n") for part in prompt_file(name).split("\n# ")[1:])}


def writing_prompt(record, source, level, task, band, *, sight=False, rl=False):
    """The prompt of one record and cell. source: what is known about the image; band: words of reasoning (low, high).
    A question that the record brings along is kept as it is."""
    given, text = "", parts("cells")
    if "question" in record:
        right = record["options"][LETTERS.index(record["answer"])] if "options" in record else record["answer"]
        asked = question_text({**record, "image": []}) if "options" in record else record["question"]
        given = f'Ask this question in these words; "{right}" is its right answer.\n{asked}\n'
    return fill(prompt_file("write"), subfield=record["subfield"], look=text[record["subfield"]], depth=text[level],
                task=text["rl" if rl else task], low=str(band[0]), high=str(band[1]), source=source, given=given,
                sight=SIGHT[sight], shape=SHAPE % ('"options": ["…", "…", "…", "…"], ' if task == "mcq" else "",
                                                   ", …" if task == "conversation" else ""))


# --- the three backends -----------------------------------------------------------------------------------------------

def rules(text, *, images=(), n=0, record=None, level="", task=""):
    """A record with the micro-world's facts -> a true reply. Without a record, to guess, it does not."""
    if record is None:
        return "unsure"
    rng, facts, subfield = random.Random(f"{record['id']}/{level}/{task}/{n}"), record.get("facts"), record["subfield"]
    if not facts or not set(ATTRIBUTES[subfield]) <= set(facts):
        raise NoReply("the rules need the facts of the micro-world; give an endpoint")
    open_task = task in ("description", "conversation")
    kinds = [k for k in questions.kinds(subfield, level) if k.name == record.get("kind", k.name) and (
        any(k.label(facts) in s for s in k.sets)) and not (open_task and k.name == "score")]
    if not kinds:
        raise NoReply("the rules know no question of this level for these facts")
    kind = rng.choice(kinds)
    options = list(record.get("options") or rng.choice([s for s in kind.sets if kind.label(facts) in s]))
    topic = record.get("topic") or "tissue"
    think, pick, _ = writer.teach(rng, kind, options, facts, topic, p_missing=0, p_hasty=0, verbosity="long")
    head, asked = f"{subfield}, {topic}. ", rng.choice(kind.questions)
    turn = {"question": head + asked, "think": think, "answer": f"It is {options[pick]}."}
    if task == "mcq":
        turn |= {"options": options, "answer": options[pick]}
    elif task == "description":
        shown = [p for p in writer.say(facts, ATTRIBUTES[subfield]) if p in think]
        conclusion = f"It is {diagnose(facts)[0]}, with " if level == "hard" else "It shows "
        turn |= {"question": head + "Describe the findings.", "answer": f"{conclusion}{', '.join(shown)}."}
    elif task == "reasoning":
        turn["question"] += " Why?"
    turns, first = [turn], rng.choice(list(ATTRIBUTES[subfield]))
    if task == "conversation":
        aspect, seen = writer.ASPECT[first], phrase(subfield, first, facts[first])
        turns = [{"question": f"{head}Describe the {aspect}.", "think": f"I look at the {aspect} and see {seen}.",
                  "answer": f"It shows {seen}."}, {**turn, "question": f"With this in mind: {asked}"}]
    return json.dumps({"turns": turns}, ensure_ascii=False)


def sent(path):
    """A picture -> data URL, JPEG of at most SIDE pixels."""
    picture = open_image(path)
    picture.thumbnail((SIDE, SIDE))
    return data_url(picture)


def over_endpoint(c, journal, replay, text, *, images=(), n=0, **_):
    """The same from the journal or, where it is not there and this is no replay, over the endpoint c.teacher."""
    params = {"model": c.name, "temperature": c.temperature, "max_tokens": c.max_tokens, **({"seed": n} if n else {})}
    try:
        hashes = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in images]
        key = key_of(text, params, hashes, SIDE if images else 0)
        row = journal.get(key)
        if not row and replay:
            raise NoReply(f"{journal.path} holds no answer to this prompt, model and parameters")
        pictures = [] if row else [sent(path) for path in images]
    except (OSError, ImageError) as error:
        raise NoReply(f"a picture that cannot be used: {error}") from error
    row = row or journal.ask(key, text, params, c.teacher, SECRET, images=pictures, timeout=c.timeout, tries=c.attempts,
                             pause=c.pause)
    if not row or "error" in row:
        raise NoReply(row["error"] if row else BUDGET)
    return row["reply"]


@contextlib.contextmanager
def open_teacher(c, folder, share=1.0):
    """c.teacher -> (teacher, its journal or None). share: the part of the budget that is this process's."""
    if c.teacher == "rules":
        yield rules, None
        return
    replay = not c.teacher.startswith(("http://", "https://"))
    if replay and not os.path.isfile(c.teacher):
        raise ConfigError(f"--teacher {c.teacher}: is neither rules, nor an address, nor a journal of recorded answers")
    path, prices = c.teacher if replay else folder / "journal.jsonl", (c.price_in, c.price_out)
    with Journal(path, requests=c.max_requests * share, tokens=c.max_total_tokens * share, cost=c.max_cost * share,
                 prices=prices) as journal:
        yield functools.partial(over_endpoint, c, journal, replay), journal
