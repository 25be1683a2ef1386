"""Judging over a real socket, against a server that fails in every way that servers do."""

import asyncio
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from email.utils import formatdate
from itertools import pairwise

import pytest
from peer import Peer, oracle

from nanorrm.config import JudgeSettings, UserError
from nanorrm.judge import endpoint
from nanorrm.judge.endpoint import EndpointBackend, read_answer
from nanorrm.judge.judge import Judge
from nanorrm.judge.open import open_judge
from nanorrm.judge.prompts import rrm_messages
from nanorrm.records import Pair

pytest.importorskip("httpx")


@pytest.fixture
def peer(monkeypatch):
    """peer(fault) starts a server; all are stopped in the end. Retries come fast."""
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)
    started = []

    def start(*args, **changes):
        started.append(Peer(*args, **changes))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def pairs(n):
    return [
        Pair(f"q{i}", "GOOD", "BAD", 1, id=f"p{i}")
        if i % 3
        else Pair(f"q{i}", "BAD", "GOOD", 2, id=f"p{i}")
        for i in range(n)
    ]


def judge(peer, journal=None, **settings):
    how = {"model": "small", "timeout": 1.5, "patience": 20.0, "concurrency": 8, **settings}
    return Judge(EndpointBackend(peer.url, **how), journal=journal, max_tokens=50)


def test_votes_over_a_socket(peer):
    server = peer(lambda n, body: time.sleep(0.02))
    some = pairs(12)
    verdicts = judge(server).compare(some, votes=3)
    assert [v.winner for v in verdicts] == [p.label for p in some]
    for pair, v in zip(some, verdicts):
        assert v.votes == [pair.label] * 6 and v.swapped == [False] * 3 + [True] * 3
        assert v.thoughts == ["because"] * 6 and v.finish_reasons == ["stop"] * 6
        assert v.tokens == 42 and v.vote_tokens == [7] * 6 and v.prompt_tokens == 66
        assert 0 < v.think_tokens < v.tokens and v.seconds > 0 and not v.errors
    assert len(set(server.answered)) == len(server.answered) == server.seen == 72
    assert 1 < server.most <= 8  # many at once, never more than asked for
    body = server.bodies[0]
    shown = [rrm_messages(p.query, *ab) for p in some for ab in ((p.a, p.b), (p.b, p.a))]
    assert all(b["messages"] in shown for b in server.bodies)
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("small", 50, 0.6)


FAULTS = {
    500: "http 500",
    502: "http 502",
    503: "http 503",
    504: "http 504",
    (429, (("retry-after", "0.05"),), "slow down"): "http 429",
    "malformed": "malformed",
    "missing": "fields missing",
    "drop": "dropped",
    "late": "timeout",
}


def test_every_fault_is_tried_again_and_counted(peer):
    planned = {3 * i + 1: fault for i, fault in enumerate(FAULTS)}  # by number of the request
    server = peer(lambda n, body: planned.get(n))
    one = judge(server)
    some = pairs(30)
    verdicts = one.compare(some)
    assert [v.winner for v in verdicts] == [p.label for p in some]
    assert one.backend.errors == Counter(FAULTS.values())
    assert sum((v.errors for v in verdicts), Counter()) == Counter(FAULTS.values())
    assert len(set(server.answered)) == len(server.answered) == 60
    assert server.seen == 60 + len(FAULTS)  # each fault cost one request, nothing else did


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_makes_everybody_wait(peer, date):
    """Four requests are under way when one is told to wait: what comes after keeps the pause."""
    told, arrivals = [], []

    def fault(n, body):
        if n == 0:
            told.append(time.time())
            wait = formatdate(time.time() + 2, usegmt=True) if date else "1"
            return 429, {"retry-after": wait}, "too many"
        if n < 4:
            time.sleep(0.2)
        else:
            arrivals.append(time.time())

    verdicts = judge(peer(fault), concurrency=4).compare(pairs(5))
    assert len(arrivals) == 7 and all(v.winner for v in verdicts)
    assert min(arrivals) - told[0] > 0.95  # the date's seconds are whole: between 1 and 2 are left


def test_tries_come_later_and_later(peer, monkeypatch):
    monkeypatch.setattr(endpoint, "BACKOFF", 0.2)
    came = []

    def fault(n, body):
        came.append(time.time())
        return 503 if n < 3 else None

    judge(peer(fault), concurrency=1).compare(pairs(1), both_orders=False)
    gaps = [b - a for a, b in pairwise(came)]
    assert len(gaps) == 3 and all(gap > 0.1 * 2**i for i, gap in enumerate(gaps))


def test_a_wait_beyond_the_patience_ends_it(peer):
    server = peer(lambda n, body: (429, {"retry-after": "3600"}, "quota"))
    with pytest.raises(UserError, match="asks to wait 3600 s, longer than --patience 20"):
        judge(server).compare(pairs(2))


@pytest.mark.parametrize(
    ("status", "message", "said"),
    [
        (400, "no such parameter", "HTTP 400: no such parameter"),
        (401, "bad key", "HTTP 401: bad key; the key is read from NANORRM_API_KEY"),
        (404, "no model 'x'", "HTTP 404: no model 'x'; the address usually ends in /v1"),
        (307, "", "HTTP 307: .*redirects to http://elsewhere"),
    ],
)
def test_what_can_not_succeed_stops_at_once(peer, status, message, said):
    server = peer(lambda n, body: (status, {"location": "http://elsewhere"}, message))
    with pytest.raises(UserError, match=said):
        judge(server).compare(pairs(50))
    assert server.seen <= 16  # those under way, and a look whether the server takes anything


def test_key_is_sent_and_not_kept(peer, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.setenv("NANORRM_API_KEY", "sesame-42")
    server = peer()
    judge(server, tmp_path / "j").compare(pairs(1))
    assert {h["Authorization"] for h in server.headers} == {"Bearer sesame-42"}
    assert "sesame" not in (tmp_path / "j").read_text()
    monkeypatch.delenv("NANORRM_API_KEY")
    judge(server).compare(pairs(1))
    assert server.headers[-1]["Authorization"] == "Bearer other"
    monkeypatch.delenv("OPENAI_API_KEY")
    judge(server).compare(pairs(1))
    assert "Authorization" not in server.headers[-1]


def test_key_is_not_in_messages(peer, monkeypatch):
    monkeypatch.setenv("NANORRM_API_KEY", "sesame-42\n")  # as `cat` of a file gives it
    server = peer(lambda n, body: (401, {}, "wrong key: sesame-42"))
    with pytest.raises(UserError, match=r"wrong key: \*\*\*; the key is read from"):
        judge(server).compare(pairs(1))
    monkeypatch.setenv("NANORRM_API_KEY", "sesame\n42")
    with pytest.raises(UserError, match="characters that no key has") as error:
        judge(server).compare(pairs(1))
    assert "sesame" not in str(error.value)


def length(body):
    return len(body["messages"][-1]["content"])


TOO_LONG = "This model's maximum context length is 4096 tokens. However, you requested 5000"


def test_too_long_for_the_server_is_skipped_with_its_words(peer):
    def fault(n, body):
        return 500 if n == 2 else (400, {}, TOO_LONG) if length(body) > 9000 else None

    server = peer(fault)
    some = [*pairs(2), Pair("long", "GOOD" + "x" * 9000, "BAD", 1), *pairs(2)]
    verdicts = judge(server, concurrency=1).compare(some, both_orders=False)
    assert [bool(v.skipped) for v in verdicts] == [False, False, True, False, False]
    assert verdicts[2].errors == {"http 500": 1}  # the try before it said so is counted
    assert "maximum context length is 4096" in verdicts[2].skipped
    assert not verdicts[2].votes and verdicts[3].votes == [2]


def test_too_long_for_the_server_is_cut_evenly_at_the_start(peer):
    limit = length({"messages": rrm_messages("long", "", "")}) + 3000
    server = peer(lambda n, body: (400, {}, TOO_LONG) if length(body) > limit else None)
    one = judge(server)
    one.overlong = "cut"
    a, b = "y" * 9000 + "GOOD", "z" * 2000 + "BAD"
    long, longer, fine = one.compare(
        [Pair("long", a, b, 1), Pair("long", a, "z" * 9000 + "BAD", 1), *pairs(1)]
    )
    assert long.votes == longer.votes == [1, 1] and not fine.cut
    kept = len(a) - long.cut["a"], len(b) - long.cut.get("b", 0)
    assert 0.8 * 3000 < sum(kept) <= 3000 and kept[1] >= 0.45 * sum(kept)
    assert abs(longer.cut["a"] - longer.cut["b"]) <= 2  # of equal lengths, to one character
    users = [user for user, _ in server.answered if "yyy" in user]
    assert all("yGOOD" in user and "zBAD" in user for user in users)  # their ends were kept


def test_query_alone_too_long_is_skipped_even_when_cutting(peer):
    server = peer(lambda n, body: (400, {}, TOO_LONG) if length(body) > 9000 else None)
    one = judge(server)
    one.overlong = "cut"
    verdict = one.compare([Pair("q" * 10_000, "GOOD", "BAD", 1)])[0]
    assert "too long" in verdict.skipped and not verdict.votes and not verdict.cut


def test_a_request_the_server_always_fails_on_is_given_up_alone(peer):
    server = peer(lambda n, body: 500 if "poison" in body["messages"][-1]["content"] else None)
    verdicts = judge(server).compare([Pair("poison", "GOOD", "BAD", 1), *pairs(5)])
    assert "failed 5 times (last: http 500)" in verdicts[0].skipped and not verdicts[0].votes
    assert all(v.votes and not v.skipped for v in verdicts[1:])
    assert verdicts[0].errors["http 500"] == 10  # five tries in each order


def test_a_prompt_the_server_does_not_take_is_skipped_alone(peer):
    def fault(n, body):
        poison = "poison" in body["messages"][-1]["content"]
        return (400, {}, "content policy") if poison else None

    verdicts = judge(peer(fault)).compare([Pair("poison", "GOOD", "BAD", 1), *pairs(5)])
    assert "refused this one" in verdicts[0].skipped and "content policy" in verdicts[0].skipped
    assert all(v.votes and not v.skipped for v in verdicts[1:])


def test_when_nothing_works_for_long_it_ends_and_says_what_is_saved(peer, tmp_path):
    server = peer(lambda n, body: 500 if n >= 20 else None)
    path, some = tmp_path / "journal.jsonl", pairs(30)
    first = judge(server, path, patience=0.5)
    with pytest.raises(UserError, match=r"nothing but failures for 0 s \(http 500 \d+\); 20 ans"):
        first.compare(some)
    first.journal.close()
    server.fault = lambda n, body: None  # mended
    verdicts = judge(server, path).compare(some)
    assert [v.winner for v in verdicts] == [p.label for p in some]
    assert len(set(server.answered)) == len(server.answered) == 60


def test_nobody_there_ends_after_the_patience(peer):
    server = peer()
    server.stop()
    with pytest.raises(UserError, match=r"nothing but failures .*no connection"):
        judge(server, patience=0.3).compare(pairs(2))


def test_server_killed_and_restarted_in_the_middle(peer, tmp_path):
    """No pair lost; none asked again after its answer had come."""
    server = peer(lambda n, body: time.sleep(0.005))

    def disturb():
        for _ in range(2):
            at = len(server.answered)
            while len(server.answered) < at + 60:
                time.sleep(0.005)
            server.stop()
            time.sleep(0.2)
            server.start()

    trouble = threading.Thread(target=disturb)
    trouble.start()
    some = pairs(150)
    one = judge(server, tmp_path / "j.jsonl")
    verdicts = one.compare(some)
    trouble.join()
    assert [v.winner for v in verdicts] == [p.label for p in some]
    lines = (tmp_path / "j.jsonl").read_text().splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    assert len(keys) == len(set(keys)) == 300
    assert one.backend.errors["no connection"]
    # an answer may be lost on the wire when the server dies: at most those in flight, twice
    assert 300 <= len(server.answered) <= 300 + 2 * 8
    assert sum((v.errors for v in verdicts), Counter()) == one.backend.errors


def test_many_faults_at_random_lose_nothing(peer, tmp_path):
    rng, kinds = random.Random(5), [fault for fault in FAULTS if fault != "late"]
    server = peer(lambda n, body: rng.choice(kinds) if rng.random() < 0.2 else None)
    some = pairs(80)
    one = judge(server, tmp_path / "j.jsonl", concurrency=16)
    verdicts = one.compare(some)
    skipped = sum(bool(v.skipped) for v in verdicts)
    assert skipped <= 2  # five failures of one request in a row: 160 * 0.2**5 = 0.05 expected
    assert [v.winner for v in verdicts if not v.skipped] == [
        p.label for p, v in zip(some, verdicts) if not v.skipped
    ]
    answered = [one for one in server.answered if one[0] != "Hi"]  # a look whether it is alive
    assert len(set(answered)) == len(answered)


def test_an_open_event_loop_is_no_obstacle(peer):
    server = peer()

    async def notebook():
        return judge(server).compare(pairs(4))

    assert [v.winner for v in asyncio.run(notebook())] == [2, 1, 1, 2]


@pytest.mark.parametrize("open_loop", [False, True])
def test_ctrl_c_keeps_what_came(peer, tmp_path, open_loop):
    server = peer(lambda n, body: "late" if n >= 10 else None)
    one = judge(server, tmp_path / "j", timeout=30.0)

    def interrupt():
        while len(one.journal.answers) < 10:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    async def notebook():
        one.compare(pairs(30))

    threading.Thread(target=interrupt).start()
    loop = asyncio.new_event_loop()
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(notebook()) if open_loop else one.compare(pairs(30))
    loop.close()
    one.journal.close()
    server.fault = lambda n, body: None
    verdicts = judge(server, tmp_path / "j").compare(pairs(30))
    assert all(v.winner for v in verdicts) and len(set(server.answered)) == 60


def test_thinking_in_a_field_of_its_own(peer):
    answers = iter(
        [
            {"reasoning_content": "hm", "content": r"\boxed{Assistant 1}"},  # vLLM, SGLang
            {"reasoning": "hm", "content": r"\boxed{Assistant 1}"},  # newer vLLM
            {"content": "hm</think>\\boxed{Assistant 1}"},  # opened by the prompt
            {"content": "<think>hm</think>\\boxed{Assistant 1}"},
            {"reasoning_content": "hm", "content": None, "finish_reason": "length"},  # never closed
            {"content": r"\boxed{Assistant 1}"},  # no thinking: unreadable for a thinking judge
        ]
    )
    server = peer(answer=lambda user, body: next(answers))
    one = judge(server, concurrency=1)
    verdicts = one.compare(pairs(6), both_orders=False)
    assert [v.votes for v in verdicts] == [[1], [1], [1], [1], [None], [None]]
    assert [v.thoughts for v in verdicts[:5]] == [["hm"]] * 5
    assert [v.truncated for v in verdicts] == [0, 0, 0, 0, 1, 0]


def test_a_model_without_tags_is_read_with_think_off(peer):
    server = peer(answer=lambda user, body: {"content": oracle(user).partition("</think>")[2]})
    one = judge(server)
    one.think = False
    assert [v.winner for v in one.compare(pairs(3))] == [2, 1, 1]


def test_thinking_tokens_are_the_servers_or_estimated():
    def reply(usage, **message):
        return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}

    counted = {"completion_tokens": 10, "completion_tokens_details": {"reasoning_tokens": 4}}
    assert read_answer(reply(counted, content="x" * 8)).think_tokens == 4
    text = {"content": "x" * 42, "reasoning_content": "y" * 50}
    assert read_answer(reply({"completion_tokens": 10}, **text)).think_tokens == 5
    assert read_answer(reply(None, content="x")).tokens == 0


def test_the_only_model_is_found(peer):
    assert EndpointBackend(peer().url).name == "small"
    with pytest.raises(UserError, match="serves a, b: choose by --api-model"):
        EndpointBackend(peer(models=("a", "b")).url)
    with pytest.raises(UserError, match="names no models"):
        EndpointBackend(peer(models=()).url)


def test_seeds_differ_by_vote_and_by_seed(peer):
    server = peer()
    one = judge(server)
    one.compare(pairs(1), votes=4)
    one.compare(pairs(1), votes=4, seed=1)
    assert len({body["seed"] for body in server.bodies}) == 8


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://x/v1", "http://me:pw@x/v1", "http://x:99999999/"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(UserError, match="should look like"):
        EndpointBackend(url, "small")


def settings(peer, **changes):
    return JudgeSettings(endpoint=peer.url, **changes)


def test_settings_open_an_endpoint(peer, tmp_path):
    server = peer()
    one = open_judge(settings(server, journal=str(tmp_path / "j"), concurrency=3, overlong="cut"))
    assert [v.winner for v in one.compare(pairs(5))] == [2, 1, 1, 2, 1]
    assert one.max_tokens == 8192 and server.most <= 3 and one.overlong == "cut"
    assert (tmp_path / "j").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_think_tokens": 5}, "an endpoint can't close thinking"),
        ({"model": "toy-judge"}, "--model and --endpoint"),
        ({"template": "toy"}, "asked by the rrm prompt"),
    ],
)
def test_settings_that_contradict_an_endpoint(peer, changes, said):
    with pytest.raises(UserError, match=said):
        open_judge(settings(peer(), **changes))


def test_settings_that_need_an_endpoint():
    with pytest.raises(UserError, match="--endpoint, which is missing"):
        open_judge(JudgeSettings(api_model="x"))
    with pytest.raises(UserError, match="concurrency"):
        JudgeSettings(concurrency=0)
    with pytest.raises(UserError, match="timeout"):
        JudgeSettings(timeout=0.0)


def test_thinking_budget_is_refused_by_compare_too(peer):
    with pytest.raises(UserError, match="can't close the thinking"):
        judge(peer()).compare(pairs(1), max_think_tokens=3)


def test_missing_httpx_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "httpx", None)
    with pytest.raises(UserError, match="pip install httpx"):
        EndpointBackend("http://x/v1", "small")


def test_from_the_command_line(peer, cli):
    server = peer()
    ask = ["sample.py", "judge", "--query", "q", "--a", "GOOD", "--b", "BAD"]
    code, out, _ = cli(*ask, "--endpoint", server.url, "--journal", "j.jsonl")
    assert code == 0 and "a is better" in out
    code, _, err = cli(*ask, "--endpoint", server.url, "--model", "toy")
    assert code == 2 and err.count("\n") == 1 and "--api-model" in err
