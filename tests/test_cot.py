"""The writer of reasoning: a queue that is killed ten times, a budget that holds, gates on cases made by hand.

The server is ours and scripted to fail; journal, budget and output are held against what it counts."""

import base64
import collections
import http.server
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

import data_prep.__main__ as prep
from data_prep import cot, gates, records, teacher, world as micro
from nanopatho import endpoint
from nanopatho.data import DataError, check_record
from nanopatho.endpoint import Journal, key_of
from nanopatho.log import ConfigError

SECRET = "NANOPATHO_TEACHER_KEY"
CAPTIONS = Path(os.environ.get("NANOPATHO_SHARED", Path(__file__).resolve().parents[2] / "shared")) / (
    "data/text/pathgen_captions_1000.jsonl")
OK, TOKENS = "ok", [100, 10]


class Server:
    """A loopback endpoint. script: what comes next, then `weights` by lot: ok, slow, 429, 500, garbage, short, hang."""

    def __init__(self, answer=lambda prompt: "fine", weights=None, seed=0):
        self.seen, self.times, self.script, self.lock = [], [], [], threading.Condition()
        self.answer, self.weights, self.rng, server = answer, weights or {OK: 1}, random.Random(seed), self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
                    server.times.append(time.monotonic())
                    what = server.script.pop(0) if server.script else server.rng.choices(
                        list(server.weights), list(server.weights.values()))[0]
                    server.lock.notify_all()
                try:
                    server.reply(self, what, body)
                except OSError:                                          # the client was killed, or waits no longer
                    self.close_connection = True

            def do_GET(self):                                            # where a redirection ends
                server.seen.append({"key": self.headers.get("Authorization")})
                self.send_error(404)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def reply(self, handler, what, body):
        time.sleep({"slow": 0.05, "hang": 0.6}.get(what, 0))
        status, after = what if isinstance(what, tuple) else (what if isinstance(what, int) else 200, "0")
        content = body["messages"][0]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        usage = {} if what == "no usage" else {"usage": dict(zip(("prompt_tokens", "completion_tokens"), TOKENS))}
        data = json.dumps({"choices": [{"message": {"content": self.answer(text)}}], **usage}).encode()
        if status != 200:
            data = f"you sent {handler.headers.get('Authorization')}".encode()
        data = {"garbage": b"<html>\xff", "null": b"null", "deep": b"[" * 99999,
                "huge": data.replace(b"100", b"1e999")}.get(what, data)
        handler.send_response(status)
        if status in (302, 429):
            handler.send_header("Location" if status == 302 else "Retry-After", after)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:len(data) // 2] if what == "short" else data)


@pytest.fixture
def serve():
    made = []

    def start(*args, **more):
        made.append(Server(*args, **more))
        return made[-1]
    yield start
    for server in made:
        server.http.shutdown()
        server.http.server_close()


def ask(journal, server, text="?", **more):
    params = {"model": "m", "temperature": 0, "max_tokens": 50}
    return journal.ask(key_of(text, params), text, params, server.url, **{"pause": 0.001, **more})


# --- the endpoint: one request ----------------------------------------------------------------------------------------

def test_what_is_tried_again_and_what_it_costs(serve, tmp_path, monkeypatch):
    """Requests and tokens against a count by hand; the unknown ends keep what was held: 1 + 64 and 50 tokens."""
    server, path = serve(), tmp_path / "j.jsonl"
    monkeypatch.setenv(SECRET, "hush\n")
    server.script += [(429, "0.2"), 500, "garbage", OK, "short", "null", "hang", OK, "no usage", *[503] * 5, 400]
    with Journal(path) as journal:
        assert ask(journal, server, "a", secret=SECRET)["reply"] == "fine"
        assert server.times[1] - server.times[0] >= 0.2 and len(server.seen) == 4      # Retry-After was kept
        assert journal.spent == [4, 65 + 100, 50 + 10]
        assert ask(journal, server, "b", timeout=0.3)["tokens"] == TOKENS and len(server.seen) == 8
        assert journal.spent == [8, 4 * 65 + 200, 4 * 50 + 20]
        assert ask(journal, server, "c")["reply"] == "fine" and journal.spent == [9, 5 * 65 + 200, 5 * 50 + 20]
        assert "HTTP 503" in ask(journal, server, "d")["error"] and len(server.seen) == 14
        assert "HTTP 400" in ask(journal, server, "e")["error"] and len(server.seen) == 15   # not tried again
        spent, again = journal.spent, ask(journal, server, "a")
        assert again["reply"] == "fine" and len(server.seen) == 15                     # known: not sent
        with pytest.raises(ConfigError, match="another process"):
            Journal(path)
    assert [s["key"] for s in server.seen[:5]] == ["Bearer hush"] * 4 + [None] and "hush" not in path.read_text()
    assert {s["path"] for s in server.seen} == {"/v1/chat/completions"}
    with Journal(path) as journal:
        assert journal.spent == spent == [15, 5 * 65 + 200, 5 * 50 + 20]
        server.script.append(401)
        with pytest.raises(ConfigError, match=f"HTTP 401: you sent Bearer \\*\\*\\*; mend the address.*{SECRET}"):
            ask(journal, server, "f", secret=SECRET)
    server.weights = {500: 1}
    with Journal(path) as journal, pytest.raises(ConfigError, match=f"{endpoint.IN_A_ROW} requests failed in a row"):
        for i in range(100):
            ask(journal, server, f"g{i}", tries=1)


def as_dates(t):
    """Seconds since 1970 -> the three forms of a date in HTTP, in the order of RFC 9110, 5.6.7."""
    year, month, day, *clock, weekday, _, _ = time.gmtime(t)
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"][weekday]
    name, clock = "JanFebMarAprMayJunJulAugSepOctNovDec"[3 * month - 3:3 * month], "{:02}:{:02}:{:02}".format(*clock)
    return (f"{days[:3]}, {day:02} {name} {year} {clock} GMT", f"{days}, {day:02}-{name}-{year % 100:02} {clock} GMT",
            f"{days[:3]} {name} {day:2} {clock} {year}")


def test_retry_after(monkeypatch):
    """Seconds and dates against the clock, in a zone far from Greenwich; nonsense and what is over tell nothing."""
    monkeypatch.setenv("TZ", "XXX-9")
    time.tzset()
    try:
        assert as_dates(784111777) == ("Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT",
                                       "Sun Nov  6 08:49:37 1994")           # the examples of the RFC
        for after in (5, 60, 700):
            now = time.time()
            for text in as_dates(int(now) + after):
                assert endpoint.retry_after(text) == pytest.approx(int(now) + after - now, abs=0.5), text
        assert [endpoint.retry_after(t) for t in as_dates(time.time() + 5e5)] == [900] * 3
        assert [endpoint.retry_after(t) for t in (*as_dates(784111777), *as_dates(time.time() - 2))] == [None] * 6
    finally:
        monkeypatch.undo()
        time.tzset()
    assert [endpoint.retry_after(t) for t in ("0", "7", "0.2", "899", "901", "9" * 400)] == [0, 7, 0.2, 899, 900, 900]
    pieces = ["Sun", ",", " ", "06", "31", "Feb", "Nov", "-", "99", "2099", "08:49:37", ":", "GMT", "+9999", "-0000"]
    rng = random.Random(0)
    noise = ["".join(rng.choices(pieces, k=rng.randint(1, 9))) for _ in range(5000)]
    assert all(w is None or 0 <= w <= 900 for w in map(endpoint.retry_after, noise))
    for text in ("", " ", "soon", "-5", "+5", "nan", "inf", "1e3", "1_0", "12 s", ".", "\xb2", "٣", "0x10", "5, 6",
                 "Sun, 31 Feb 2099 08:49:37 GMT", "Sun, 06 Nov 2099 25:49:37 GMT",
                 f"Sun, 06 Nov {'9' * 20} 08:49:37 GMT", "Sun, 06 Nov 2099 08:49:37 +999999"):
        assert endpoint.retry_after(text) is None, text


def test_a_date_to_come_back_at_holds_for_all_requests(serve, tmp_path):
    """Nothing is sent before the date, by the same request or by the next one; a date that is over stops nobody."""
    server, shift, date = serve(), time.time() - time.monotonic(), int(time.time()) + 2
    server.script += [(429, as_dates(date)[0]), OK, (429, "0.3"), OK, (429, as_dates(0)[0])]
    with Journal(tmp_path / "j.jsonl") as journal:
        assert ask(journal, server, "a")["reply"] == "fine" and date - 0.01 <= server.times[1] + shift < date + 2
        assert "HTTP 429" in ask(journal, server, "b", tries=1)["error"]
        assert ask(journal, server, "c")["reply"] == "fine"
        assert server.times[3] - server.times[2] >= 0.3
        assert ask(journal, server, "d")["reply"] == "fine" and server.times[5] - server.times[4] < 2


def test_the_key_stays_with_its_address_and_odd_replies_are_errors(serve, monkeypatch):
    server, other = serve(), serve()
    monkeypatch.setenv(SECRET, "hush")
    server.script += [(302, other.url), 400, "deep", "huge"]
    got = [endpoint.post(server.url, {"messages": [{"content": "?"}]}, SECRET) for _ in range(4)]
    assert [s["key"] for s in server.seen] == ["Bearer hush"] * 4 and other.seen == [{"key": None}]
    assert [status for _, status, _ in got] == [404, 400, 0, 0] and "hush" not in str(got)
    assert "RecursionError" in got[2][0]["error"] and "OverflowError" in got[3][0]["error"]


def test_a_journal_cut_at_any_byte(serve, tmp_path):
    """kill -9 can cut the last line anywhere: what stood before is kept, counted and continued, nothing else is."""
    server, path = serve(), tmp_path / "j.jsonl"
    with Journal(path) as journal:
        ask(journal, server, "a"), ask(journal, server, "b")
    whole = path.read_bytes()
    ends = [0, *itertools.accumulate(len(line) for line in whole.splitlines(True))]
    assert len(ends) == 5
    near = {e + d for e in ends for d in (-1, 0, 1)}
    for cut in sorted(near & set(range(len(whole) + 1)) | set(range(0, len(whole), 5))):
        path.write_bytes(whole[:cut])
        lines = [json.loads(line) for line in whole[:max(e for e in ends if e <= cut)].splitlines()]
        with Journal(path) as journal:
            assert journal.spent == [sum(n) for n in zip([0, 0, 0], *(r["used"] for r in lines))]
            assert len(journal.rows) == sum("reply" in r for r in lines) and path.stat().st_size == journal.end
            assert all(journal.get(r["key"]) == r for r in lines if "reply" in r)
    path.write_bytes(whole[:ends[1]])                                    # a was in flight: it counts in full
    with Journal(path, requests=2) as journal:
        assert journal.spent == [1, 65, 50]
        assert ask(journal, server, "a")["reply"] == "fine" and ask(journal, server, "b") is None
    path.write_bytes(b"not mine\n" + whole)
    with pytest.raises(ConfigError, match=r"j.jsonl:1: no line of a journal") as caught:
        Journal(path)
    path.write_bytes(whole)
    with Journal(path) as journal:                                       # the one that failed gave its lock back
        assert journal.spent == [2, 200, 20] and caught


@pytest.mark.parametrize("limit", [{"requests": 30}, {"tokens": 4000}, {"cost": 0.01, "prices": (2.0, 10.0)}])
def test_the_budget_holds_in_parallel_and_over_restarts(serve, tmp_path, limit):
    server = serve(weights={OK: 6, 429: 1, 500: 1, "garbage": 1, "slow": 2}, seed=3)
    for _ in range(3):
        with Journal(tmp_path / "j.jsonl", **limit) as journal:
            got = list(endpoint.windowed(lambda i: ask(journal, server, f"{i:03d}"), range(200), 8))
            n, read, written = journal.spent
    assert None in got and any(row and "reply" in row for row in got)
    assert len(server.seen) <= n <= limit.get("requests", 1e9) and read + written <= limit.get("tokens", 1e9)
    assert (2 * read + 10 * written) / 1e6 <= limit.get("cost", 1e9)
    true = sum("reply" in row for row in got if row) * sum(TOKENS)       # what the server told never exceeds the ledger
    assert true <= read + written
    used = {"requests": n, "tokens": read + written, "cost": (2 * read + 10 * written) / 1e6}[next(iter(limit))]
    assert used > 0.9 * next(iter(limit.values()))                       # and it is used up, but for one hold


def test_what_does_not_fit_waits_for_what_comes_back(serve, tmp_path):
    """A hold is 66 + 500 tokens, a reply takes 110: 13 x 110 + 566 <= 2,000 < 14 x 110 + 566, so 14 are sent."""
    server = serve(weights={"slow": 1})
    params = {"model": "m", "max_tokens": 500}
    with Journal(tmp_path / "j.jsonl", tokens=2000) as journal:
        send = lambda i: journal.ask(key_of(i), f"{i:02d}", params, server.url)
        assert [bool(row) for row in endpoint.windowed(send, range(20), 4)].count(True) == len(server.seen) == 14
        assert journal.spent == [14, 1400, 140]


def test_the_window_is_bounded_and_twins_are_sent_once(serve, tmp_path):
    server, taken = serve(weights={"slow": 1}), itertools.count()
    results = endpoint.windowed(lambda i: i, (next(taken) for _ in itertools.count()), 3)
    assert list(itertools.islice(results, 100)) == list(range(100)) and next(taken) <= 100 + 8 * 3
    results.close()
    with Journal(tmp_path / "j.jsonl") as journal:
        assert len(list(endpoint.windowed(lambda _: ask(journal, server), range(8), 8))) == 8
    assert len(server.seen) == 1


# --- the whole command, killed ----------------------------------------------------------------------------------------

def captions(count, subfields=micro.SUBFIELDS):
    """Caption records of the micro-world, without pictures."""
    rng = random.Random(1)
    return [{"id": f"c{i:04d}", "split": "train", "group": f"g{i}", "image": f"{i}.jpg", "license": "CC0-1.0",
             "facts": prep.writer.full_facts(facts), "subfield": facts["subfield"], "topic": micro.TOPICS[i % 6],
             "caption": f"Case {i}: {'; '.join(prep.writer.say(facts, micro.ATTRIBUTES[facts['subfield']]))}."}
            for i in range(count) for facts in [micro.sample(rng, subfields[i % len(subfields)])]]


def folder(path, rows, size=None):
    path.mkdir(exist_ok=True)
    for r in rows if size else ():
        Image.new("RGB", size, (int(r["id"][1:]), 9, 9)).save(path / r["image"])
    records.write(path / "captions.jsonl", rows)
    (path / "lexicon.json").write_text(json.dumps(micro.PHRASES))
    return path / "captions.jsonl"


def good_answers(rows, tasks=("mcq", "description", "reasoning", "conversation")):
    """{prompt: what the rules would write}: a model that is asked for these records and is always right."""
    out = {}
    for r, level, task in itertools.product(rows, ("easy", "medium", "hard"), tasks):
        try:
            text = teacher.writing_prompt(r, r["caption"].rstrip("."), level, task, gates.BANDS[level])
            out[text] = teacher.rules("", record=r, level=level, task=task)
        except teacher.NoReply:
            out[text] = "{}"
    return out


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def outcome(out):
    """-> (record ids kept, (record, cell) dropped, failed, number left)"""
    where = lambda row: re.search(r"id=(\S+) (\w+) (\w+)$", row["where"]).expand(r"\1/\2-\3")
    return ([r["id"] for r in lines(out / "sft.jsonl")], [where(r) for r in lines(out / "dropped.jsonl")],
            [where(r) for r in lines(out / "failed.jsonl")], json.loads((out / "card.json").read_text())["left"])


@pytest.fixture(scope="module")
def spawner():
    """Processes that start in a moment: one server process has imported torch, each child is a fork of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "nanopatho.faithful", "data_prep.cot"])
    return context


def kill_and_resume(context, server, argv, kills, rng, most=14):
    """Start the command, SIGKILL it at a random moment, `kills` times -> how many kills met a running process."""
    met = 0
    for _ in range(kills):
        target, child = len(server.seen) + rng.randint(2, most), context.Process(target=cot.main, args=(argv,))
        child.start()
        while len(server.seen) < target and child.is_alive():
            with server.lock:
                server.lock.wait(0.1)
        time.sleep(rng.uniform(0, 0.03))
        met += child.is_alive()
        child.kill()
        child.join()
    return met


def test_ten_kills_lose_and_repeat_nothing(serve, tmp_path, spawner):
    rows, rng = captions(120), random.Random(7)
    answers, out = good_answers(rows), tmp_path / "out"
    server = serve(lambda prompt: answers[prompt], seed=5, weights={
        OK: 60, "slow": 20, 429: 6, 500: 6, "garbage": 3, "short": 2, "hang": 1})
    argv = [str(folder(tmp_path / "in", rows)), "--out", str(out), "--teacher", server.url, "--name", "m", "--parallel",
            "4", "--pause", "0.01", "--timeout", "0.4", "--max_requests", "400", "--total", "150"]
    assert kill_and_resume(spawner, server, argv, 10, rng) == 10 and not (out / "card.json").is_file()
    while cot.main(argv) or outcome(out)[2]:                             # what failed five times is asked again
        pass
    kept, dropped, failed, left = outcome(out)
    expected = [f"{j.record['id']}/{'-'.join(j.cell)}" for j in cot.jobs_of(cot.settings(argv), print, cot.even_shares(
        {s: 24 * 12 for s in micro.SUBFIELDS}, 150))]
    assert sorted(kept + dropped) == sorted(expected) and len(set(expected)) == len(expected) > 120
    asked = json.loads((out / "card.json").read_text())["spent"]["requests"]
    assert len(server.seen) <= asked <= 400 and (failed, left) == ([], 0) and len(kept) > 100
    replies = [r["key"] for r in lines(out / "journal.jsonl") if "reply" in r]
    assert len(replies) == len(set(replies)) == len(expected)
    assert set(dropped) == {e for e in expected if e not in kept} and all(      # "{}": cells the rules cannot write
        r["why"].startswith("format") for r in lines(out / "dropped.jsonl"))

    before, again = len(server.seen), tmp_path / "again"                 # replay: the same files, nobody is asked
    cot.main([*argv[:2], str(again), *argv[3:4], str(out / "journal.jsonl"), *argv[5:]])
    for name in ("sft.jsonl", "dropped.jsonl", "failed.jsonl"):
        mine, theirs = (p.joinpath(name).read_text() for p in (again, out))
        assert mine == theirs, name
    assert len(server.seen) == before
    with pytest.raises(DataError, match="holds other files"):
        cot.main([*argv[:2], str(tmp_path / "in"), *argv[3:]])


def test_killed_with_a_tight_budget(serve, tmp_path, spawner):
    rows = captions(60)
    answers, out, rng = good_answers(rows, ("mcq",)), tmp_path / "out", random.Random(11)
    server = serve(lambda prompt: answers[prompt], weights={OK: 4, "slow": 4, 500: 1}, seed=1)
    argv = [str(folder(tmp_path / "in", rows)), "--out", str(out), "--teacher", server.url, "--name", "m", "--parallel",
            "6", "--pause", "0.01", "--max_requests", "40", "--tasks", "mcq"]
    assert kill_and_resume(spawner, server, argv, 2, rng, most=8) == 2
    for _ in range(2):
        cot.main(argv)
        kept, dropped, failed, left = outcome(out)
        assert len(server.seen) <= 40 and left > 0 and len(kept + dropped + failed) + left == 60
        assert len({*kept, *dropped, *failed}) == 60 - left
    cot.main([*argv, "--max_requests", "1000"])                          # a larger budget, the same journal
    assert sum(map(len, outcome(out)[:3])) == 60 and outcome(out)[3] == 0


def test_shards_share_the_work_and_the_budget(serve, tmp_path, capsys):
    rows = captions(40)
    answers = good_answers(rows, ("reasoning",))
    server = serve(lambda prompt: answers[prompt])
    argv = [str(folder(tmp_path / "in", rows)), "--out", str(tmp_path / "out"), "--teacher", server.url, "--name", "m",
            "--tasks", "reasoning", "--max_requests", "36"]
    found = []
    for i in range(3):
        cot.main([*argv, "--shard", f"{i}/3"])
        kept, dropped, _, left = outcome(tmp_path / f"out/shard-{i}-of-3")
        found += kept + dropped + ["left"] * left
        spent = json.loads((tmp_path / f"out/shard-{i}-of-3/card.json").read_text())["spent"]
        assert spent["requests"] <= 12
    ids = [f.split("/")[0] for f in found if f != "left"]
    assert len(found) == 40 and len(set(ids)) == len(ids) == len(server.seen) <= 36
    with pytest.raises(DataError, match="--shard 3/3"):
        cot.main([*argv, "--shard", "3/3"])
    with pytest.raises(DataError, match="--max_cost 5 stops nothing without --price_in"):
        cot.main([*argv, "--max_cost", "5"])
    for name in ("--parallel", "--tries", "--attempts", "--max_tokens"):
        with pytest.raises(SystemExit):
            cot.main([*argv, name, "0"])
        assert f"{name}: 0: give a whole number from 1 on" in capsys.readouterr().err


# --- teachers and prompts ---------------------------------------------------------------------------------------------

def test_prompts_hold_all_and_a_text_stays_text():
    record = {"id": "x", "subfield": "H&E", "caption": "unused", "question": "Why {task}?", "answer": "{low}"}
    seen = set()
    for level, task, subfield in itertools.product(gates.BANDS, cot.CHOICES["task"], micro.SUBFIELDS):
        text = teacher.writing_prompt({**record, "subfield": subfield}, "{given} {source}", level, task, (3, 9))
        assert "{given} {source}" in text and "Why {task}?" in text and '"{low}"' in text
        assert not re.findall(r"\{[a-z_]+\}", re.sub(r"\{(given|source|task|low)\}", "", text))
        assert "3 to 9 words" in text and ("options" in text.split("shape")[1].split("-----")[0]) == (task == "mcq")
        seen.add(text)
    assert len(seen) == 60                                               # the paper's grid: no two prompts are equal
    example = re.search(r'^\{"turns.*$', text, re.M)[0].replace(", …]}", "]}")
    assert set(json.loads(example)["turns"][0]) == {"question", "think", "answer"}
    assert len(teacher.parts("systems")) == 14 and all(map(re.compile, teacher.parts("systems").values()))


def test_pictures_are_sent_and_belong_to_the_key(serve, tmp_path):
    server, pictures = serve(lambda prompt: "{}"), folder(tmp_path / "in", captions(2), (1200, 600)).parent
    argv = [str(pictures / "captions.jsonl"), "--out", str(tmp_path / "out"), "--teacher", server.url, "--name", "m",
            "--images"]
    cot.main(argv)
    picture, text = server.seen[0]["messages"][0]["content"]
    sent = Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))))
    assert sent.size == (teacher.SIDE, teacher.SIDE // 2) and "Look at the image" in text["text"]
    cot.main(argv)
    assert len(server.seen) == 2                                         # known
    (pictures / "0.jpg").write_bytes((pictures / "1.jpg").read_bytes())
    (pictures / "1.jpg").write_bytes(b"no picture")
    cot.main(argv)
    assert len(server.seen) == 3 and "1.jpg" in lines(tmp_path / "out/failed.jsonl")[0]["why"]


def test_the_rules_pass_every_gate_in_all_sixty_cells():
    done, c = collections.Counter(), cot.settings(["f", "--out", "o", "--teacher", "rules"])
    for r in captions(120):
        job = gates.Job("w", Path("."), r, r["caption"], micro.PHRASES[r["subfield"]])
        for cell in cot.cells_of(r, cot.CHOICES["task"]):
            job, state, turns, _ = cot.work(job._replace(cell=cell), teacher.rules, c)
            assert state == "kept" or (state, turns) == ("failed", "the rules know no question of this level for these "
                                                         "facts")
            if state == "kept":
                done[(r["subfield"], *cell)] += 1
                record = cot.finished(job, turns, c, ".")
                assert check_record(record, "sft") == [] and ("options" in record) == (cell[1] == "mcq")
    assert len(done) == 60 and min(done.values()) > 2


def test_the_command_makes_files_that_validate(tmp_path, capsys):
    source = folder(tmp_path / "in", captions(30), (60, 60))
    rows = [{"id": f"q{i}", "image": "0.jpg", **prep.writer.question_record(
        random.Random(i), micro.SUBFIELDS[i % 5], "hard")} for i in range(30)]
    records.write(tmp_path / "in/rl.jsonl", rows)
    records.write(tmp_path / "in/test.jsonl", [{**r, "split": "test"} for r in rows])
    for pool, name, kind in (("sft", "captions", "sft"), ("sft", "rl", "sft"), ("rl", "captions", "question"),
                             ("rl", "rl", "question")):
        out = tmp_path / f"{pool}-{name}"
        assert prep.main(["write", str(source.parent / f"{name}.jsonl"), "--out", str(out), "--pool", pool, "--teacher",
                          "rules"]) == 0
        assert prep.main(["validate", str(out / f"{pool}.jsonl")]) == 0, capsys.readouterr().out
        made, card = lines(out / f"{pool}.jsonl"), json.loads((out / "card.json").read_text())
        assert len(made) + card["failed"] == 30 and card["dropped"] == {} and card["records"] == len(made) > 15
        assert all(check_record(r, kind) == [] and ("messages" in r) == (pool == "sft") for r in made)
        assert (out / "lexicon.json").is_file() and not (out / ".part").exists()
        if name == "rl":                                                 # a question that is there is kept as it is
            assert all(rows[int(r["id"].split("/")[0][1:])].items() >= {k: r[k] for k in (
                "question", "options", "answer", "level", "task")}.items() for r in made)
        elif pool == "rl":
            letters = collections.Counter(r["answer"] for r in made)
            assert max(letters.values()) < len(made) / 2                 # shuffled
    prep.main(["write", str(tmp_path / "in/test.jsonl"), "--out", str(tmp_path / "none"), "--teacher", "rules"])
    assert {r["why"] for r in lines(tmp_path / "none/dropped.jsonl")} == {"is held out (test)"}
    assert lines(tmp_path / "none/sft.jsonl") == []


# --- sampling ---------------------------------------------------------------------------------------------------------

def test_shares_are_even_as_far_as_there_are_records():
    assert cot.even_shares({"a": 10, "b": 1000, "c": 500}, 300) == {"a": 1.0, "b": 0.145, "c": 0.29}
    assert cot.even_shares({"a": 10, "b": 20}, 99) == {"a": 1.0, "b": 1.0}
    rng = random.Random(0)
    for _ in range(50):                                                  # against a search for the common level
        counts = {i: rng.randint(1, 900) for i in range(rng.randint(1, 8))}
        total = rng.randint(1, sum(counts.values()))
        low, high = 0.0, 900.0
        for _ in range(60):
            level = (low + high) / 2
            low, high = (level, high) if sum(min(level, n) for n in counts.values()) < total else (low, level)
        assert cot.even_shares(counts, total) == pytest.approx({k: min(low, n) / n for k, n in counts.items()},
                                                               abs=1e-6)


def test_rl_questions_are_drawn_evenly_by_tissue_system(tmp_path):
    """9 skin records for each of breast: after sampling both have equally many, within four deviations."""
    rows = captions(1000, ("H&E",))
    for i, r in enumerate(rows):
        r["topic"] = "breast" if i % 10 == 0 else "skin"
    argv = [str(folder(tmp_path / "in", rows)), "--out", str(tmp_path / "o"), "--pool", "rl", "--teacher", "rules",
            "--total", "200"]
    jobs = list(cot.jobs_of(cot.settings(argv), print, cot.even_shares({"breast": 300, "skin": 2700}, 200)))
    counts = collections.Counter(j.record["topic"] for j in jobs)
    assert all(abs(counts[t] - 100) < 4 * 10 for t in ("breast", "skin")) and {j.cell[1] for j in jobs} == {"mcq"}
    levels = collections.Counter(j.cell[0] for j in jobs)
    assert all(abs(levels[x] - 200 / 3) < 4 * 6.7 for x in gates.BANDS)


@pytest.mark.parametrize("caption, system", [
    ("Invasive ductal carcinoma of the breast", "breast"), ("肺腺癌", "lung and chest"),
    ("Early changes in the renal cortex with glomeruli", "kidney and bladder"),
    ("Hepatocellular carcinoma, liver", "digestive"), ("Glioblastoma, palisading necrosis", "nerves and brain"),
    ("Round cells without further detail", "other"), ("Ovarian carcinoma, metastatic to colon, ovary", "female")])
def test_tissue_systems(caption, system):
    assert cot.system_of({"caption": caption}) == system
    assert cot.system_of({"caption": caption, "topic": "thyroid"}) == "endocrine"


# --- gates: each with what it must let through and what it must stop --------------------------------------------------

def reply(**turn):
    return json.dumps({"turns": [{"question": "What?", "think": "I see glands.", "answer": "It is fat.", **turn}]})


@pytest.mark.parametrize("text, task, problem", [
    (reply(), "reasoning", None), (f"<think>Hm {{}}</think> Here: ```json\n{reply()}\n```", "reasoning", None),
    (reply(options=["a", "b"], answer="a"), "mcq", None),
    (reply(answer="a b").replace("a b", "a\nb"), "reasoning", None),
    ("I cannot do that.", "reasoning", "no JSON"), ("{}", "reasoning", "no JSON"),
    ('{"turns": [3]}', "reasoning", "no JSON"), ('{"turns": []}', "reasoning", "0 turns"),
    (reply()[:-3], "reasoning", "no JSON"), ('{"turns":' + "[" * 99999 + "}", "reasoning", "no JSON"),
    (reply(), "conversation", "1 turns"), (reply(), "mcq", "field"), (reply(options=["a", 3]), "mcq", "field"),
    (reply(think=""), "reasoning", "field"), (reply(think=["x"]), "reasoning", "field"),
    (reply(answer="  "), "reasoning", "field"),
    (reply(think="... !"), "reasoning", "no reasoning"), (reply(think="a<answer>b"), "reasoning", "tags"),
    (reply(think="a</think>b"), "reasoning", "no JSON"),
    (reply(question="<image> What?"), "reasoning", "marks"), (reply(answer="x<|im_end|>"), "reasoning", "marks")])
def test_format(text, task, problem):
    turns, why = gates.read_reply(text, task, {})
    assert why is None and turns[0]["think"] == "I see glands." if problem is None else turns is None and problem in why


@pytest.mark.parametrize("question, options, right, problem", [
    ("Which tumour?", ["lymphoma", "melanoma", "adenoma", "sarcoma"], 1, None),
    ("Is it HER2?", ["HER2 1+", "HER2 2+", "ER+", "ER-"], 0, None),
    ("Which?", ["Fat.", "bone", "fat"], 0, "same one"), ("Which?", ["fat"], 0, "2 to 10"),
    ("Which?", ["fat", "bone", "all of the above"], 0, "joins"), ("Which?", ["fat", "none of these"], 0, "joins"),
    ("Which?", ["fat", "Both A and B"], 0, "joins"), ("Which?", ["A. fat", "B. bone"], 0, "letter"),
    ("Which?", ["invasive carcinoma with keratin pearls", "lymphoma", "adenoma"], 0, "longest"),
    ("Which?", ["invasive carcinoma with keratin pearls", "lymphoma", "adenoma"], 1, None),
    ("Which lymphoma is seen?", ["lymphoma", "adenoma"], 0, "names the right one"),
    ("Is it lymphoma or adenoma?", ["lymphoma", "adenoma"], 0, None),
    ("Which lymphoma?", ["lymphoma", "adenoma"], 1, None)])
def test_options(question, options, right, problem):
    why = gates.option_problem(question, options, right)
    assert why is None if problem is None else problem in why


@pytest.mark.parametrize("answer, options, gold, problem", [
    ("bone", ["fat", "bone"], "B", None), ("B", ["fat", "bone"], "B", None), ("b. bone", ["fat", "bone"], None, None),
    ("fat", ["fat", "bone"], "B", "'fat' is not 'B'"), ("fat or bone", ["fat", "bone"], None, "no option"),
    ("C", ["fat", "bone"], None, "no option"), ("Yes, it is.", None, "yes", None), ("No.", None, "yes", "is not"),
    ("It is ductal carcinoma.", None, "ductal carcinoma", None), ("Anything", None, None, None),
    ("It is lymphoma.", None, "ductal carcinoma", "is not")])
def test_gold_answer(answer, options, gold, problem):
    why = gates.gold_problem(answer, options, gold)
    assert why is None if problem is None else problem in why


@pytest.mark.parametrize("counts, level, fits", [
    ([1], "easy", True), ([30], "easy", True), ([31], "easy", False), ([40], "medium", True), ([39], "medium", False),
    ([5, 80], "medium", True), ([90, 161], "hard", False), ([160], "hard", True), ([5, 5], "hard", False)])
def test_length_band(counts, level, fits):
    assert (gates.length_problem([" ".join(["w"] * n) for n in counts], level) is None) == fits
    assert (gates.length_problem(["核" * n for n in counts], level) is None) == fits


@pytest.mark.parametrize("text, leaks", [
    ("I see fused glands and mitoses, so it is an adenocarcinoma.", False), ("Options are open.", False),
    ("The stroma is plain; this fits an adenoma.", False), ("As the caption says, glands are fused.", True),
    ("Given the answer, glands must be fused.", True), ("Given that the correct answer is fat, …", True),
    ("According to the report it is fat.", True), ("As described, glands are fused.", True),
    ("The text states it.", True), ("See Figure 3.", True), ("So option B fits.", True), ("I answer it.", False),
    ("图注说明有坏死。", True), ("The authors found fat.", True)])
def test_leakage(text, leaks):
    assert ((gates.wording_problem(text, "核") or "").startswith("leakage")) == leaks


def test_language_and_repetition():
    assert gates.wording_problem("I see 坏死.", "necrosis").startswith("language") and not gates.wording_problem("见坏死", "坏死")
    assert gates.wording_problem("Я вижу", "necrosis").startswith("language")
    words = [f"w{i}" for i in range(40)]
    assert gates.repetition_problem(" ".join(words)) is None
    assert gates.repetition_problem("I see it. I see it. I see it.") is None
    assert gates.repetition_problem(" ".join(words[:10] * 4)).startswith("repetition (73 %")      # 10 of 37 are new


SOURCE = ("H&E: fused glands with keratin pearls and many mitoses. No necrosis, fibrosis or granulomas. There may be a "
          "lymphoma in the vicinity, but amyloid is absent")


@pytest.mark.parametrize("text, problem", [
    ("I see keratin and mitoses. No necrosis.", None), ("There is no necrosis, granuloma or fibrosis.", None),
    ("Keratin is there, unlike in lymphoma.", None), ("A mucinous tumour would show mucin pools.", None),
    ("It could be an abscess if neutrophils were seen.", None), ("Without amyloid, necrosis or fibrosis.", None),
    ("I see mucin.", "'mucin' is not in the source"), ("Keratin with necrosis.", "'necrosis' is denied"),
    ("Amyloid is seen.", "'Amyloid' is denied"), ("No keratin is seen.", "'keratin' is denied, and the source states"),
    ("Mitoses are absent.", "'Mitoses' is denied, and"), ("I see no mucin.", "'mucin' is denied, and the source is si"),
    ("There is no amyloid, but necrosis.", "'necrosis' is denied by"),
    ("It would show fat. Fat is seen.", "'Fat' is not in"), ("Is there mucin? Keratin is.", None),
    ("No necrosis, marked inflammation.", "'inflammation' is not in")])
def test_grounding_by_words(text, problem):
    why = gates.grounding_problem(text, SOURCE, "lymphoma", {}, None)
    assert why is None if problem is None else problem in why


FACTS = {"architecture": "fused_glands", "nuclear_size": "large", "pleomorphism": "pleomorphic", "mitoses": "absent",
         "inflammation": "none", "material": "mucin"}


@pytest.mark.parametrize("text, true", [
    ("I see fused glands, large nuclei, no mitoses and mucin pools.", True), ("No keratin pearls, mucin pools.", True),
    ("I see round glands.", False), ("There are frequent mitoses.", False), ("No mucin pools.", False),
    ("This is without mucin pools.", False), ("There are no round glands.", True), ("I see keratin pearls.", False),
    ("Squamous carcinoma would show keratin pearls.", True), ("I see no fused glands.", False)])
def test_grounding_by_facts(text, true):
    assert (gates.grounding_problem(text, "", "", micro.PHRASES["H&E"], FACTS) is None) == true


@pytest.mark.skipif(not CAPTIONS.is_file(), reason=f"no captions at {CAPTIONS}: set NANOPATHO_SHARED to their root")
def test_grounding_on_real_captions():
    """A caption grounds itself and its parts; another slide's caption does not: 300 real ones."""
    found = [json.loads(line)["caption"] for line in CAPTIONS.read_text(encoding="utf-8").splitlines()][:300]
    assert not any(gates.grounding_problem(text, text, "", {}, None) for text in found)
    part = [gates.grounding_problem(re.split(r"(?<=\.) ", text)[0], text, "", {}, None) for text in found]
    assert sum(map(bool, part)) <= 2
    other = [gates.grounding_problem(a, b, "", {}, None) for a, b in zip(found, found[137:] + found[:137])]
    assert sum(map(bool, other)) > 0.95 * len(found)


@pytest.mark.parametrize("think, answer, options, right, level, problem", [
    ("I see keratin. This fits lymphoma.", "lymphoma", ["lymphoma", "adenoma"], 0, "hard", None),
    ("Lymphoma is ruled out by glands. So it is adenoma.", "adenoma", ["lymphoma", "adenoma"], 1, "medium", None),
    ("I see fused glands.", "fused glands", ["fused glands", "sheets"], 0, "easy", None),
    ("I see keratin. This fits lymphoma.", "adenoma", ["lymphoma", "adenoma"], 1, "hard", "does not end"),
    ("I see keratin.", "adenoma", ["lymphoma", "adenoma"], 1, "hard", "does not end"),
    ("It is clearly an adenoma.", "adenoma", ["lymphoma", "adenoma"], 1, "hard", "no finding but"),
    ("Fused glands and keratin are seen.", "It shows keratin and fused glands.", None, None, "hard", None),
    ("Glands are seen.", "Squamous carcinoma of the skin.", None, None, "hard", "not in the reasoning"),
    ("The total is 5.", "It is 5.", None, None, "hard", None),
    ("The total is 5.", "It is 6.", None, None, "hard", "not in")])
def test_answer_follows_from_the_reasoning(think, answer, options, right, level, problem):
    why = gates.derivable_problem(think, answer, options, right, level, {})
    assert why is None if problem is None else problem in why


def test_blind_guesses_drop_only_what_is_guessed_every_time():
    options, asked = ["fat", "bone", "skin", "lung"], []

    def knows(text, n):
        asked.append(text)
        return f"<think>B?</think> {next(line for line in text.splitlines() if line.endswith('. skin'))[0]}"
    assert gates.guess_problem("Which?", options, 2, knows, 3).startswith("guessed") and len(set(asked)) == 3
    assert gates.guess_problem("Which?", options, 1, knows, 3) is None and len(asked) == 4      # one miss is enough
    assert gates.guess_problem("Which?", options, 2, lambda text, n: "A", 3) is None            # a letter is no knowledge
    assert gates.guess_problem("Which?", options, 2, teacher.rules, 3) is None
    assert gates.guess_problem("Which?", options, 2, None, 0) is None                           # off


def test_dropped_and_failed_are_told(serve, tmp_path):
    """A blind guesser that knows, a teacher that lies, one that is silent: three reasons, each record once."""
    rows = captions(6, ("H&E",))
    answers, blind = good_answers(rows, ("mcq",)), []

    def answer(prompt):
        if prompt in answers:
            return answers[prompt]
        blind.append(prompt)
        right = {o for r in rows for o in [json.loads(a)["turns"][0]["answer"] for a in answers.values() if a != "{}"]}
        return next((x[0] for x in prompt.splitlines() if x[3:] in right), "A")
    server = serve(answer)
    server.script += [400]
    argv = [str(folder(tmp_path / "in", rows)), "--out", str(tmp_path / "out"), "--teacher", server.url, "--name", "m",
            "--tasks", "mcq", "--parallel", "1", "--guesses", "1"]
    cot.main(argv)
    kept, dropped, failed, left = outcome(tmp_path / "out")
    assert len(failed) == 1 and "HTTP 400" in lines(tmp_path / "out/failed.jsonl")[0]["why"] and left == 0
    assert len({*kept, *dropped, *failed}) == 6 and len(blind) == len(kept) + sum(
        r["why"].startswith("guessed") for r in lines(tmp_path / "out/dropped.jsonl"))
    assert sum(json.loads((tmp_path / "out/card.json").read_text())["dropped"].values()) == len(dropped)
