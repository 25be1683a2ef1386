"""Backends without a network: the engine, its journal, replays; pairs that do not fit."""

import copy
import json
import resource
import subprocess
import sys
import time

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorrm import ranks
from nanorrm.config import JudgeSettings, UserError
from nanorrm.engine.engine import Engine
from nanorrm.engine.sampling import SamplingParams
from nanorrm.judge.backends import EngineBackend, ReplayBackend
from nanorrm.judge.journal import Journal, key_of
from nanorrm.judge.judge import Judge, cut
from nanorrm.judge.open import open_judge
from nanorrm.records import Pair
from tests.judge.test_judge import PAIRS, TOY, Scripted, box, oracle
from tests.model.test_tokenizer import NASTY


@pytest.fixture
def engine():
    return tiny.engine(TOY, tiny.model())


def judge(engine, journal=None, **changes):
    return Judge(engine, "toy", max_tokens=8, journal=journal, **changes)


def judged(verdicts):
    """All of them but the seconds."""
    return [{**vars(v), "seconds": None} for v in verdicts]


# -- the engine


def test_whatever_generates_gives_the_same_answers(engine):
    """What shares an engine among ranks is heard as the engine itself."""
    direct = judge(engine).compare(PAIRS[:6], votes=2)
    assert judged(judge(ranks.RankSharedEngine(engine)).compare(PAIRS[:6], votes=2)) == judged(
        direct
    )


def test_engine_backend_passes_on_what_training_uses(engine):
    backend = judge(engine).backend
    assert backend.tokenizer is TOY and backend.engine.model is engine.model
    assert backend.refusal([1], SamplingParams(max_tokens=4)) is None
    assert len(backend.generate([[1, 2]], SamplingParams(max_tokens=4))[0]) == 1
    backend.sleep()
    assert engine.cache is None


def test_a_copied_backend_is_a_backend(engine):
    """`__getattr__` that forwards ends here in a RecursionError."""
    backend = judge(engine).backend
    again = copy.copy(backend)
    assert again.engine is engine and again.name == backend.name
    assert not hasattr(again, "pool")  # what it passes on is named, nothing else is
    twice = copy.copy(judge(ranks.RankSharedEngine(engine)).backend)
    assert twice.generate([[1, 2]], SamplingParams(max_tokens=4)) is not None


def test_a_judge_is_opened_on_an_engine_that_ranks_share():
    alone, shared = (open_judge(JudgeSettings("toy-judge"), shared=s) for s in (False, True))
    assert isinstance(alone.backend.engine, Engine)
    assert isinstance(shared.backend.engine, ranks.RankSharedEngine)
    pair = Pair("7+8-5+8", "12", "18", 2)
    assert judged(shared.compare([pair])) == judged(alone.compare([pair]))


def test_seconds_of_a_batch_add_up(engine):
    one, began = judge(engine), time.perf_counter()
    verdicts = one.compare(PAIRS[:6], votes=2)
    assert 0 < sum(v.seconds for v in verdicts) <= time.perf_counter() - began
    verdicts = judge(ranks.RankSharedEngine(engine)).compare(PAIRS[:6], votes=2)
    assert all(v.seconds > 0 for v in verdicts)


def test_costs_of_an_engine(engine):
    one = judge(engine)
    verdict = one.compare(PAIRS[:1], votes=3)[0]
    assert verdict.tokens == sum(verdict.vote_tokens) and len(verdict.vote_tokens) == 6
    assert set(verdict.finish_reasons) <= {"stop", "length"}
    assert verdict.prompt_tokens == len(one.prompt(PAIRS[0])) + len(one.prompt(PAIRS[0], True))
    assert 0 < verdict.think_tokens <= verdict.tokens


def test_another_seed_gives_other_votes(engine):
    one = judge(engine)
    assert judged(one.compare(PAIRS[:4])) == judged(one.compare(PAIRS[:4], seed=0))
    assert judged(one.compare(PAIRS[:4])) != judged(one.compare(PAIRS[:4], seed=1))


# -- the journal


class Stops:
    """Hears a few answers, then the machine is switched off."""

    def __init__(self, journal, after):
        self.add_line, self.left = journal.add, after
        journal.add = self.add

    def add(self, record):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.add_line(record)


@pytest.mark.parametrize("after", [0, 1, 7, 23])
def test_interrupted_evaluation_continues(engine, tmp_path, after):
    whole = judge(engine).compare(PAIRS[:6], votes=2)
    first = judge(engine, tmp_path / "j")
    Stops(first.journal, after)
    with pytest.raises(KeyboardInterrupt):
        first.compare(PAIRS[:6], votes=2)
    first.journal.close()
    second = judge(engine, tmp_path / "j")
    assert len(second.journal.answers) == after
    asked = []
    ask = second.backend.ask
    second.backend.ask = lambda requests, *rest: (asked.extend(requests), ask(requests, *rest))
    assert judged(second.compare(PAIRS[:6], votes=2)) == judged(whole)
    assert len(asked) == 24 - after
    asked.clear()
    assert judged(second.compare(PAIRS[:6], votes=2)) == judged(whole) and not asked


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400))
def test_torn_last_line_is_repaired(tmp_path_factory, lost):
    """However many bytes the last write lacks: whole lines stay, and the next one is readable."""
    path = tmp_path_factory.mktemp("torn") / "j"
    journal = Journal(path)
    for i in range(5):
        journal.add({"key": str(i), "text": "é\n" * 20})
    journal.close()
    data = path.read_bytes()
    path.write_bytes(data[:-lost])
    journal = Journal(path)
    whole = data[:-lost].count(b"\n")
    assert list(journal.answers) == [str(i) for i in range(whole)]
    journal.add({"key": "new", "text": ""})
    journal.close()
    assert [json.loads(line)["key"] for line in path.read_bytes().splitlines()][-1] == "new"
    assert len(Journal(path).answers) == whole + 1


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b'{"key": 1, "text": ""}', b'{"query": "q", "a": "x"}', b"\xff"]
)
def test_a_file_that_is_no_journal_is_refused_and_untouched(tmp_path, line):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"key": "k", "text": "t"}\n' + line + b"\nrest")
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"pairs.jsonl, line 2: not a line of a journal"):
        Journal(path)
    assert path.read_bytes() == before


def test_journal_in_a_place_that_is_none(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Journal(tmp_path / "nowhere" / "j")
    with pytest.raises(UserError, match="is a directory"):
        Journal(tmp_path)


def test_two_writers_are_refused(tmp_path):
    journal = Journal(tmp_path / "j")
    with pytest.raises(UserError, match="another process or judge is writing"):
        Journal(tmp_path / "j")
    code = f"import fcntl; fcntl.flock(open({str(tmp_path / 'j')!r}, 'ab'), fcntl.LOCK_EX | 4)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "BlockingIOError" in other.stderr
    journal.close()
    Journal(tmp_path / "j").close()


def test_full_disk_keeps_whole_lines_and_says_how_to_go_on(engine, tmp_path):
    one = judge(engine, tmp_path / "j")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, usual[1]))
        with pytest.raises(UserError, match=r"j: .*; \d answers are saved in .*goes on from there"):
            one.compare(PAIRS[:6])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    data = (tmp_path / "j").read_bytes()
    assert data.endswith(b"\n") and data.count(b"\n") == len(one.journal.answers) >= 1
    assert judged(one.compare(PAIRS[:6])) == judged(judge(engine).compare(PAIRS[:6]))


def test_keys_hold_all_that_an_answer_depends_on():
    base = {"temperature": 0.6, "max_tokens": 9, "max_think_tokens": None, "seed": 0}
    asked = [("m", [1, 2], base, 0), ("n", [1, 2], base, 0), ("m", [1, 3], base, 0)]
    asked += [("m", [1, 2], base, 1), ("m", [{"role": "user", "content": "x"}], base, 0)]
    for name, value in {
        "temperature": 0.7, "max_tokens": 8, "max_think_tokens": 3, "seed": 1, "top_p": 0.9
    }.items():  # fmt: skip
        asked.append(("m", [1, 2], {**base, name: value}, 0))
    keys = [key_of(m, prompt, SamplingParams(**how), j) for m, prompt, how, j in asked]
    assert len(set(keys)) == len(keys)
    assert keys[0] == key_of(
        "m", [1, 2], SamplingParams(n=7, **base), 0
    )  # more votes: old ones stay


def test_other_weights_are_another_model(engine, tmp_path):
    one = judge(engine, tmp_path / "j")
    one.compare(PAIRS[:2])
    name = one.backend.name
    assert name == EngineBackend(tiny.engine(TOY, tiny.model())).name
    next(engine.model.parameters()).data[0, 3] += 0.01
    assert one.backend.name != name
    one.compare(PAIRS[:2])
    assert len(one.journal.answers) == 8


def test_equal_pairs_are_asked_once_under_a_journal(tmp_path):
    backend = Scripted(oracle)
    backend.model = tiny.model()
    mirrored = Pair(PAIRS[1].query, "bad", "good", 2)
    some = [PAIRS[1], PAIRS[1], mirrored]
    verdicts = Judge(backend, "toy", journal=tmp_path / "j").compare(some)
    assert [v.winner for v in verdicts] == [1, 1, 2]
    assert backend.calls[0][0] == 2 and (tmp_path / "j").read_text().count("\n") == 2


# -- replays


def test_a_journal_replays_without_a_model(engine, tmp_path):
    one = judge(engine, tmp_path / "j")
    verdicts = one.compare(PAIRS[:6], votes=2)
    one.journal.close()
    replay = Judge(ReplayBackend.from_journal(tmp_path / "j"))
    renamed = [Pair(p.query, p.a, p.b, p.label, id="other") for p in PAIRS[:6]]
    assert judged(replay.compare(renamed, votes=2)) == judged(verdicts)
    assert judged(replay.compare(renamed))[0]["votes"] == verdicts[0].votes[::2]
    with pytest.raises(UserError, match=r"no vote 3 of pair 'other' shown as a, b"):
        replay.compare(renamed, votes=3)
    again = judge(engine, tmp_path / "j", temperature=1.0)
    again.compare(PAIRS[:1])
    again.journal.close()
    with pytest.raises(UserError, match="answered more than once"):
        ReplayBackend.from_journal(tmp_path / "j")


def test_a_table_replays_votes_for_responses():
    pairs = [Pair("q", "x", "y", 1, id="p"), Pair("q", "y", "z", 2, id="7")]
    table = {"p": [1, None], 7: {"given": [2], "swapped": [1]}}
    judge = Judge(ReplayBackend(table))
    assert judge.compare(pairs[:1], votes=2, both_orders=False)[0].votes == [1, None]
    verdict = judge.compare(pairs[1:])[0]
    assert verdict.votes == [2, 1] and verdict.slots == [2, 2] and verdict.winner is None
    with pytest.raises(UserError, match=r"the table holds no vote 1 of pair 'p' shown as b, a"):
        judge.compare(pairs[:1])


# -- pairs that do not fit, conversations


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.integers(0, 400), st.integers(60, 500))
def test_cut_keeps_the_ends_evenly_and_as_much_as_fits(a, b, context):
    pair = Pair("q", "x" * a + "A", "y" * b + "B", 1)
    backend = Scripted(lambda *_: box(1), context=context)
    verdict = Judge(backend, "toy", overlong="cut").compare([pair])[0]
    one = Judge(backend, "toy")
    if len(one.prompt(pair)) <= context:
        assert verdict.cut == {} and verdict.votes
        return
    kept = len(pair.a) - verdict.cut.get("a", 0), len(pair.b) - verdict.cut.get("b", 0)
    shown = cut(pair, sum(kept))
    assert pair.a.endswith(shown.a) and pair.b.endswith(shown.b)
    assert (len(shown.a), len(shown.b)) == kept
    length = len(one.prompt(shown))
    assert context - 16 <= length <= context  # one token a character here
    assert min(kept) == min(len(pair.a), len(pair.b)) or abs(kept[0] - kept[1]) <= 1


def test_skip_is_the_default_and_says_why():
    pair = Pair("q", "x" * 500, "y", 1)
    verdict = Judge(Scripted(oracle, context=100), "toy").compare([pair])[0]
    assert "too long" in verdict.skipped and not verdict.cut and not verdict.votes


def test_a_query_too_long_is_skipped_even_when_cutting():
    backend = Scripted(oracle, context=100)
    verdict = Judge(backend, "toy", overlong="cut").compare([Pair("q" * 200, "good", "bad")])[0]
    assert "too long" in verdict.skipped and not verdict.cut


def test_cut_on_a_real_engine():
    engine = tiny.engine(TOY, tiny.model())  # context 128
    one = Judge(engine, "toy", max_tokens=8, overlong="cut")
    verdict = one.compare([Pair("q", "é<think>" * 40, "ok", 1)])[0]
    assert 200 < verdict.cut["a"] < 320 and len(verdict.votes) == 2


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": NASTY},
    {"content": "more"},
]


def test_conversations_are_rendered_by_choice():
    pair = Pair(CONVERSATION, "x", "y", 1)
    with pytest.raises(UserError, match="several turns"):
        Judge(Scripted(oracle), "toy").prompt(pair)
    ids = Judge(Scripted(oracle), "toy", multi_turn="render").prompt(pair)
    text = f"System: Be brief.\n\nUser: Hi\n\nAssistant: {NASTY}\n\nUser: more"
    assert ids == [*TOY.encode(f"?{text}\n1:x\n2:y\n"), 256]  # its tags are characters


def test_half_a_character_skips_its_pair_alone():
    pairs = [Pair("q", "good", "\ud800"), PAIRS[0]]
    verdicts = Judge(Scripted(oracle), "toy").compare(pairs)
    assert "lone surrogate" in verdicts[0].skipped and verdicts[1].votes


@pytest.mark.parametrize("settings", [{"overlong": "crop"}, {"multi_turn": "no"}])
def test_unknown_choices_are_refused(settings):
    with pytest.raises(UserError, match="is not one of"):
        Judge(Scripted(oracle), "toy", **settings)
