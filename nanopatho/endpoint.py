"""One client for OpenAI-compatible endpoints: back-off, a journal that outlives a kill, a budget that is never passed.

    with Journal("answers.jsonl", requests=1000, cost=5.0, prices=(0.5, 2.0)) as journal:
        row = journal.ask(key_of(text, params), text, params, "http://localhost:8000/v1", "MY_KEY")

The journal is append-only JSONL and its own ledger: "used" of all lines adds up to [requests, tokens read, written].
The most that an attempt can use is written before it is sent; what it did not use after it, with its reply or error. So
an attempt that kill -9 caught in flight counts in full, as does one whose end is not known (a timeout, garbage); an
HTTP error costs a request and no tokens. What does not fit into what is left is not sent, what is answered is never
sent again. In memory are keys and places of lines. A power cut may lose the last seconds. May be copied with log.py.
"""
import argparse
import base64
import collections
import concurrent.futures
import datetime
import email.utils
import fcntl
import hashlib
import http.client
import io
import json
import math
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request

from .log import ConfigError

IMAGE_TOKENS = 3072                  # held for an image of at most 1536 x 1536 pixels; Qwen2.5-VL makes 55 x 55 of it
BROKEN = (401, 402, 403, 404, 405)   # key, balance, address or name are wrong: no request will be answered
IN_A_ROW = 30                        # requests that failed, none answered between: stop, rather than fail 500,000 times


def add_options(parser, *, max_tokens, max_cost, parallel):
    """What every command with many requests can be told; the defaults are the command's."""
    add = parser.add_argument
    add("--max_tokens", type=count, default=max_tokens, help="longest reply")
    add("--max_cost", type=float, default=max_cost, help="stop before it costs more, in the currency of the prices")
    add("--price_in", type=float, default=0.0, help="price of a million tokens read")
    add("--price_out", type=float, default=0.0, help="price of a million tokens written")
    add("--parallel", type=count, default=parallel, help="requests at a time")
    add("--pause", type=float, default=1.0, help="first pause after a failure in seconds; doubles")


def count(text):
    """An option that is a whole number from 1 on."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 on")
    return int(text)


def fill(template, **fields):
    """"{question}" -> fields["question"], all at once: a text that spells a placeholder stays text."""
    return re.sub(r"\{([a-z_]+)\}", lambda m: fields[m[1]], template)


def key_of(*parts):
    """All that decides an answer (prompt, model, parameters, hashes of images) -> its key, equal in every process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def data_url(picture):
    """A PIL image -> an image for Journal.ask: a data URL with a JPEG."""
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def retry_after(text):
    """The header Retry-After, seconds or a date (RFC 9110, 10.2.3) -> seconds to wait, at most 900, or None where it
    tells nothing: nonsense, or a date that is over, as happens where two clocks differ."""
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
        return min(float(text), 900.0)
    try:
        date = email.utils.parsedate_to_datetime(text)
        date = date if date.tzinfo else date.replace(tzinfo=datetime.UTC)                # one of its forms has no zone
        seconds = (date - datetime.datetime.now(datetime.UTC)).total_seconds()
    except (ValueError, OverflowError):
        return None
    return min(seconds, 900.0) if seconds > 0 else None


def post(url, body, secret="", timeout=120):
    """One attempt -> (row, HTTP status or 0, Retry-After). row: "reply" or "error"; "tokens" if they are told."""
    key = "".join(os.environ.get(secret, "").split())                    # files end in a line break, keys do not
    try:
        made = urllib.request.Request(url.rstrip("/") + "/chat/completions", json.dumps(body).encode(),
                                      {"Content-Type": "application/json"})
        if key:
            made.add_unredirected_header("Authorization", f"Bearer {key}")               # for this address only
        try:
            answer = urllib.request.urlopen(made, timeout=timeout)
        except urllib.error.HTTPError as error:
            answer = error                                               # an answer too, with a status and a text
        with answer:
            status, later, data = answer.status, answer.headers.get("Retry-After", ""), answer.read(1 << 22)
        if status >= 400:
            text = data.decode(errors="replace")
            text = text.replace(key, "***") if key else text             # some servers repeat what they were sent
            return {"error": f"HTTP {status}: {text[:300]}", "tokens": [0, 0]}, status, later
        got = json.loads(data)
        row, told = {"reply": str(got["choices"][0]["message"]["content"] or "")}, got.get("usage") or {}
        if "prompt_tokens" in told:
            row["tokens"] = [max(0, int(told.get(name) or 0)) for name in ("prompt_tokens", "completion_tokens")]
        return row, status, ""
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError, OverflowError,
            RecursionError) as error:
        return {"error": f"{type(error).__name__}: {error}"}, 0, ""      # no connection, a timeout, no such JSON


class Journal:
    """The journal at `path` and its budget. ConfigError if another process has it, or a line is none of a journal."""

    def __init__(self, path, *, requests=math.inf, tokens=math.inf, cost=math.inf, prices=(0.0, 0.0)):
        self.path, self.limits, self.prices = path, (requests, tokens, cost), prices
        self.rows, self.spent, self.end = {}, [0, 0, 0], 0               # rows: key -> place << 32 | length
        self.change, self.busy, self.flying, self.until, self.failed = threading.Condition(), set(), 0, 0.0, 0
        self.stop = threading.Event()                                    # nothing more is sent
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self.fd)
            raise ConfigError(f"{path}: another process writes it; wait for it, or choose another folder") from error
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):                             # a kill cut it off
                    os.ftruncate(self.fd, self.end)
                    break
                try:
                    self._count(json.loads(line), len(line))
                except (ValueError, KeyError, TypeError) as error:
                    os.close(self.fd)
                    raise ConfigError(f"{path}:{number}: no line of a journal ({error}); remove it") from error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop.set()
        with self.change:
            self.change.notify_all()
            self.change.wait_for(lambda: not self.busy)                  # what is in flight is written first
        os.close(self.fd)

    def get(self, key):
        """The row of an answered key, or None."""
        place = self.rows.get(bytes.fromhex(key)[:16])
        return place and json.loads(os.pread(self.fd, place & 0xFFFFFFFF, place >> 32))

    def _count(self, row, size):
        if "reply" in row:
            self.rows[bytes.fromhex(row["key"])[:16]] = self.end << 32 | size
        self.spent = [a + b for a, b in zip(self.spent, row["used"], strict=True)]
        self.end += size

    def _write(self, row):
        line = json.dumps(row).encode() + b"\n"
        if os.write(self.fd, line) < len(line):
            raise OSError(f"{self.path}: a line was written in part only; is the disk full?")
        self._count(row, len(line))

    def _reserve(self, key, hold):
        """Enter the hold, or False. Waits as long as attempts in flight may give some of theirs back."""
        with self.change:
            while not self.stop.is_set():
                n, read, written = (a + b for a, b in zip(self.spent, hold))
                cost = (read * self.prices[0] + written * self.prices[1]) / 1e6
                if all(x <= most for x, most in zip((n, read + written, cost), self.limits)):
                    self._write({"key": key, "used": hold})
                    self.flying += 1
                    return True
                if self.flying:
                    self.change.wait()
                else:
                    self.stop.set()
            return False

    def ask(self, key, text, params, url, secret="", *, images=(), timeout=120, tries=5, pause=1.0):
        """One prompt -> its row with "reply" or "error", from the journal if it is there; None: the budget is out.

        images: data URLs; secret: the environment variable with the key. What may pass is tried again, after
        Retry-After (all requests wait then) or a pause that doubles. ConfigError: none will be answered.
        """
        shown = [{"type": "image_url", "image_url": {"url": image}} for image in images]
        content = [*shown, {"type": "text", "text": text}] if shown else text
        body, size = {**params, "messages": [{"role": "user", "content": content}]}, len(text.encode(errors="replace"))
        hold = [1, size + 64 + IMAGE_TOKENS * len(shown), params["max_tokens"]]          # a token is a byte or more
        with self.change:
            self.change.wait_for(lambda: key not in self.busy)           # the same prompt twice is sent once
            if known := self.get(key):
                return known
            self.busy.add(key)
        try:
            for attempt in range(tries):
                self.stop.wait(max(0.0, self.until - time.monotonic()))
                if not self._reserve(key, hold):
                    return None
                row, status, later = post(url, body, secret, timeout)
                wait = retry_after(later)
                final = "reply" in row or attempt + 1 == tries or 400 <= status < 500 and status not in (408, 429)
                rest = [a - b for a, b in zip(row.get("tokens", hold[1:]), hold[1:])]
                with self.change:
                    self._write({"key": key, "used": [0, *rest], **row})
                    self.flying -= 1
                    self.failed = 0 if "reply" in row else self.failed + final
                    self.until = max(self.until, time.monotonic() + (wait or 0.0))
                    self.change.notify_all()
                if status in BROKEN or self.failed >= IN_A_ROW:
                    raise ConfigError(f"{url}: {row['error']}; mend the address, the model's name or {secret}"
                                      + f" ({self.failed} requests failed in a row)" * (status not in BROKEN))
                if final:
                    return row
                if wait is None:
                    self.stop.wait(pause * 2 ** attempt * random.uniform(0.5, 1.5))
        except BaseException:
            self.stop.set()
            raise
        finally:
            with self.change:
                self.busy.discard(key)
                self.change.notify_all()


def windowed(function, jobs, parallel):
    """function(job) of each job, `parallel` at a time -> results in the order of the jobs; 8 a thread are held."""
    crew, waiting = concurrent.futures.ThreadPoolExecutor(parallel), collections.deque()
    try:
        for job in jobs:
            waiting.append(crew.submit(function, job))
            if len(waiting) >= 8 * parallel:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        crew.shutdown(wait=False, cancel_futures=True)
