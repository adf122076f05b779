"""The judge against a server on this machine that is scripted to fail: retries, journal, cost, rates by hand."""

import http.server
import json
import threading

import pytest

from nanopatho import evaluate, judge
from nanopatho.log import ConfigError

GOOD = dict.fromkeys(judge.CRITERIA, 4)
ITEMS = [{"id": f"q{i}", "kind": "open", "question": f"What is seen in {i}?", "options": None, "answer": "fat",
          "text": f"<think>cells {i}</think><answer>fat {i}</answer>"} for i in range(4)]


@pytest.fixture
def run(tmp_path):
    rows = [*ITEMS, {**ITEMS[0], "id": "choice", "kind": "choice", "options": ["fat", "bone"], "answer": "A"}]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


@pytest.fixture
def server():
    """-> (address, requests seen, script): script answers in order, then every request gets the good reply."""
    seen, script, lock = [], [], threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
                status, reply = script.pop(0) if script else (200, json.dumps(GOOD))
            text = reply if status != 200 or reply == "no json" else json.dumps(
                {"choices": [{"message": {"content": reply}}],
                 "usage": {"prompt_tokens": 100, "completion_tokens": 10}})
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}/v1", seen, script
    made.shutdown()


def ask(run, address, **more):
    fields = dict(endpoint=address, name="tester", pause=0.001, parallel=1, price_in=2.0, price_out=10.0) | more
    evaluate.main(["judge", str(run), *[x for k, v in fields.items() for x in (f"--{k}", str(v))]])
    return json.loads((run / "judge.json").read_text())


def test_ten_criteria_and_what_counts_as_a_verdict():
    assert len(judge.CRITERIA) == 10 and all(f"- {name}: " in judge.PROMPT for name in judge.CRITERIA)
    assert judge.read_scores(json.dumps(GOOD)) == judge.read_scores(f"Here:\n```json\n{json.dumps(GOOD)}\n```") == GOOD
    for bad in ("", "four", "{", "[4]", '{"a":' + "[" * 99999 + "}",
                json.dumps({**GOOD, "coherence": 6}), json.dumps({**GOOD, "coherence": True}),
                json.dumps({**GOOD, "coherence": 3.5}), json.dumps({**GOOD, "bonus": 5}),
                json.dumps({k: v for k, v in GOOD.items() if k != "relevance"})):
        assert judge.read_scores(bad) is None


def test_an_answer_cannot_speak_for_the_prompt():
    prompt = judge.prompt_of({**ITEMS[0], "text": "{reference} {question}", "answer": "keratin", "options": ["a", "b"]})
    assert prompt.count("keratin") == 1 and "{reference} {question}" in prompt and "A. a\nB. b" in prompt


def test_retries_rates_cost_and_journal(run, server, monkeypatch):
    address, seen, script = server
    monkeypatch.setenv("NANOPATHO_JUDGE_KEY", "secret")
    script += [(429, "slow down"), (500, "oh"), (200, "no json"), (200, json.dumps({**GOOD, "coherence": 1})),     # q0
               (200, "hm"), (200, json.dumps(GOOD)),                                            # q1: at the second try
               (200, "hm"), (200, "hm"),                                                        # q2: not readable
               *[(503, "gone")] * 5]                                                            # q3: failed
    got = ask(run, address)
    assert len(seen) == 13 and {r["key"] for r in seen} == {"Bearer secret"}
    assert {(r["path"], r["model"], r["temperature"]) for r in seen} == {("/v1/chat/completions", "tester", 0)}
    assert (got["n"], got["scored"], got["failed"], got["unreadable"]) == (4, 2, 0.25, 0.25)
    assert got["criteria"]["coherence"]["value"] == 2.5 and got["mean"]["value"] == pytest.approx((3.7 + 4) / 2)
    assert got["tokens"] == [500, 50] and got["cost"] == pytest.approx((500 * 2 + 50 * 10) / 1e6)
    assert got["version"] == judge.VERSION and "secret" not in (run / "judge.jsonl").read_text()
    again = ask(run, address)                                         # only the failure is asked again
    assert len(seen) == 14 and again["failed"] == 0 and again["scored"] == 3
    whole = (run / "judge.jsonl").read_bytes()
    (run / "judge.jsonl").write_bytes(whole[:-40])                    # killed in the middle of a line
    assert ask(run, address) == again and len(seen) == 15
    assert ask(run, address, name="another")["scored"] == 4 and len(seen) == 19      # another judge: nothing is shared
    monkeypatch.setattr(judge, "VERSION", "rubric-next")
    assert ask(run, address)["scored"] == 4 and len(seen) == 23


def test_every_answer_on_demand_and_in_parallel(run, server):
    address, seen, _ = server
    evaluate.main(["judge", str(run), "--endpoint", address, "--name", "t", "--all", "--parallel", "4"])
    assert json.loads((run / "judge.json").read_text())["n"] == 5 and len(seen) == 5
    rows = [json.loads(line) for line in (run / "judge.jsonl").read_text().splitlines()]
    assert len({r["key"] for r in rows}) == 5


def test_off_by_default_and_stopped_by_cost(run, server, capsys):
    address, seen, script = server
    with pytest.raises(SystemExit):
        evaluate.main(["judge", str(run)])                            # no endpoint, no request
    with pytest.raises(ConfigError, match="over --max_cost"):
        ask(run, address, price_in=1e6)
    assert not seen and "4 requests" in capsys.readouterr().out
    prompt = len(judge.prompt_of(ITEMS[0]).encode()) + 64             # held until the reply tells 100 tokens
    ask(run, address, price_in=5000.0, price_out=0, max_cost=prompt * 5e-3 + 1.01)   # each reply costs 0.5
    assert len(seen) == 3 and "1 answers are not judged" in capsys.readouterr().out
    ask(run, address, price_in=5000.0, price_out=0, max_cost=prompt * 5e-3 + 1.51)
    assert len(seen) == 4
    script.append((401, "no such key"))
    with pytest.raises(ConfigError, match="HTTP 401: no such key.*NANOPATHO_JUDGE_KEY"):
        ask(run, address, name="other")
    (run / "items.jsonl").write_text(json.dumps({**ITEMS[0], "kind": "choice"}) + "\n")
    with pytest.raises(ConfigError, match="no open question"):
        ask(run, address)
