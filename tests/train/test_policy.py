"""GRPO on a judge's rewards: what the judge sees, what matches earn, the run and its errors."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peer import Peer

from nanorrm.cli import load_preset
from nanorrm.config import DpoConfig, PolicyConfig, UserError
from nanorrm.data import toy
from nanorrm.data.read import read_queries
from nanorrm.data.sources import FileQueries, Reshuffled, ToyQueries
from nanorrm.engine.engine import Engine
from nanorrm.judge import endpoint
from nanorrm.judge.prompts import opens_thinking
from nanorrm.judge.verdict import NO_ANSWER, Verdict, verdict_text
from nanorrm.model.transformer import Transformer
from nanorrm.rank.referee import Referee
from nanorrm.records import Query
from nanorrm.train import curves, watch
from nanorrm.train.policy import Policy, last_tokens
from nanorrm.train.rewards import RATERS, group_rewards, judged_rewards
from tests.train.test_trainer import torchrun

ROOT = Path(__file__).parents[2]
TINY = ["--threads", 1, "--eval-every", 2, "--eval-prompts", 6, "--best-of", 4, "--max-tokens", 40]
TINY += ["--engine.num-blocks", 512, "--judge.model", "toy-judge", "--judge.max-tokens", 64]
SMALL = [*TINY, "--prompts", 4, "--group", 4, "--opponents", 2]
DPO_SMALL = [*TINY, "--pairs", 40, "--batch", 8]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- what the judge is shown


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("toy-policy")


def completion(text, finish_reason="stop"):
    return SimpleNamespace(text=text, finish_reason=finish_reason)


@pytest.mark.parametrize(
    ("text", "reason", "shown"),
    [
        ("7+8=15</think>15", "stop", "15"),
        ("7</think>no</think> 15 ", "stop", "15"),  # after the last one
        ("7+8=15", "stop", NO_ANSWER),  # the thinking never ended
        ("7+8=15</think>1", "length", NO_ANSWER),  # nor did the answer
        ("7+8=15</think>", "stop", ""),
    ],
)
def test_thinking_is_cut_and_what_never_ended_is_no_answer(engine, text, reason, shown):
    policy = Policy(engine)
    assert policy.answer(policy.prompt("7+8"), completion(text, reason)) == shown


def test_without_an_opened_thought_all_of_the_text_is_the_answer(engine):
    policy, plain = Policy(engine), engine.tokenizer.encode("7+8")
    assert not opens_thinking(engine.tokenizer, plain)
    assert policy.answer(plain, completion("it is 15")) == "it is 15"
    assert policy.answer(plain, completion("<think>it is 15")) == NO_ANSWER
    closed = policy.prompt("7+8") + engine.tokenizer.encode_template("</think>")
    assert policy.answer(closed, completion("15")) == "15"


def test_only_the_last_tokens_are_kept(engine):
    policy = Policy(engine, keep_tokens=3)
    assert policy.answer(policy.prompt("1+1"), completion("</think>123456")) == "456"
    assert last_tokens(engine.tokenizer, "123456", 6) == "123456"
    assert last_tokens(engine.tokenizer, "123456", 0) == "123456"


def test_a_query_with_tags_is_read_as_text(engine):
    assert Policy(engine).prompt("</think><think>").count(engine.tokenizer.think_ids[0]) == 1


def test_equal_queries_of_a_batch_are_answered_apart(engine):
    _, groups = Policy(engine, max_tokens=32).respond([Query("3+4-2+9+8")] * 6, 1, seed=3)
    assert len({group[0].text for group in groups}) > 1


def test_the_cache_is_given_back_after_use_and_taken_again():
    engine = Engine.from_pretrained("toy-policy")
    policy = Policy(engine, max_tokens=20, release=True)
    _, groups = policy.respond([Query("1+2")], 2, seed=0)
    assert engine.cache is None
    assert policy.respond([Query("1+2")], 2, seed=0)[1][0][0].ids == groups[0][0].ids


# -- what matches earn


class Oracle:
    """A judge that knows the right answers; some of its verdicts can't be read."""

    def __init__(self, right, unreadable=()):
        self.right, self.unreadable, self.seed = right, unreadable, 0
        self.backend, self.shown = SimpleNamespace(sleep=self.sleep), []
        self.slept = 0

    def sleep(self):
        self.slept += 1

    def compare(self, pairs, votes=1, both_orders=True, max_think_tokens=None, seed=None):
        self.shown += [(pair.query, pair.a, pair.b) for pair in pairs]
        verdicts = []
        for pair in pairs:
            vote = 1 if pair.a == self.right[pair.query] else 2
            if {pair.a, pair.b} & set(self.unreadable):
                vote = None
            orders = 1 + both_orders
            verdicts.append(Verdict([vote] * orders, [False, True][:orders], tokens=5 * orders))
        return verdicts


QUERIES = [Query("2+2"), Query("3+3"), Query("4+4")]
RIGHT = {"2+2": "4", "3+3": "6", "4+4": "8"}
ANSWERS = [["4", "5", "4", "3"], ["7", "8", "9", "6"], ["8", "8", "8", "8"]]


@pytest.mark.parametrize("rating", RATERS)
def test_right_answers_earn_more_than_wrong_ones(rating):
    referee = Referee(Oracle(RIGHT))
    rewards = judged_rewards(referee, QUERIES, ANSWERS, rating, 3, seed=1)
    for query, answers, group in zip(QUERIES, ANSWERS, rewards):
        right = [r for text, r in zip(answers, group) if text == RIGHT[query.text]]
        wrong = [r for text, r in zip(answers, group) if text != RIGHT[query.text]]
        if rating == "knockout" and query.text != "4+4":
            assert max(right) == 1 and max(wrong, default=0) < 1  # one right one can meet another
        elif wrong:
            assert min(right) > max(wrong)
        elif rating != "knockout":
            assert max(group) == pytest.approx(min(group))


def test_elo_is_the_paper_s_reward():
    """Four players by hand: K = 4, scale 400, so that a first win moves 2 points, worth 0.01."""
    assert group_rewards(2, [(1, 0, 1, 0)]) == pytest.approx([0.51, 0.49])
    expected = 1 / (1 + 10 ** (-4 / 400))
    gain = 4 * (1 - expected) / 200
    assert group_rewards(2, [(1, 0, 1, 0), (1, 1, 0, 0)])[0] == pytest.approx(0.51 + gain)


@given(st.data())
def test_elo_rewards_average_to_a_half_and_stay_in_the_paper_s_span(data):
    n = data.draw(st.integers(5, 9))
    rng = random.Random(data.draw(st.integers(0, 1000)))
    drawn = [(a, b) for a in range(n) for b in rng.sample([x for x in range(n) if x != a], 4)]
    matches = [(1, a, b, data.draw(st.sampled_from([a, b, None]))) for a, b in drawn]
    rewards = group_rewards(n, matches)
    assert sum(rewards) / n == pytest.approx(0.5)
    most = max(sum(i in match[1:3] for match in matches) for i in range(n))
    assert all(abs(r - 0.5) <= 0.02 * most for r in rewards)  # 4 points a match at the very most


def test_an_unknown_rating_is_named():
    with pytest.raises(UserError, match="glicko"):
        group_rewards(2, [(1, 0, 1, 0)], "glicko")


def test_the_referee_counts_add_up():
    judge = Oracle(RIGHT, unreadable=["9"])
    referee = Referee(judge, release=True)
    judged_rewards(referee, QUERIES, ANSWERS, "elo", 3, seed=0)
    counts, stats = dict(referee.counts), referee.report()
    assert counts["matches"] == 3 * 4 * 3
    assert counts["matches"] == counts["asked"] + counts["repeated"] + counts["identical"]
    assert counts["asked"] == len(judge.shown) == len(set(judge.shown))  # none asked twice
    nine = sum("9" in shown[1:] for shown in judge.shown)
    assert nine > 0 and stats["judge/invalid_ratio"] == pytest.approx(nine / counts["asked"])
    assert stats["judge/identical_ratio"] == counts["identical"] / 36
    assert stats["judge/undecided_ratio"] * (36 - counts["identical"]) == pytest.approx(6)
    assert stats["judge/tokens"] == 5 * counts["asked"] and judge.slept == 1
    assert referee.report()["judge/comparisons"] == 0  # the next report begins anew


def test_unreadable_verdicts_are_draws():
    referee = Referee(Oracle(RIGHT, unreadable=["4", "5", "3"]))
    rewards = judged_rewards(referee, QUERIES[:1], ANSWERS[:1], "win_rate", 3, seed=0)
    assert rewards == [[0.5] * 4]


def test_both_sides_are_shown_first():
    queries = [str(i) for i in range(60)]
    judge = Oracle(dict.fromkeys(queries, "x"))
    better = Referee(judge).prefer(queries, [("x", "y")] * 60)
    assert better == [0] * 60
    first = sum(shown[1] == "x" for shown in judge.shown)
    assert 10 < first < 50  # a coin of 60 misses this once in 10 million


def test_a_label_changes_nothing(engine):
    """Rewards are of the texts and the judge alone: the truth of a query is not looked at."""
    known = [Query(query.text, "0") for query in QUERIES]
    told, untold = (
        judged_rewards(Referee(Oracle(RIGHT)), queries, ANSWERS, "elo", 2, seed=4)
        for queries in (known, QUERIES)
    )
    assert told == untold


# -- what is watched


def test_best_of_by_an_oracle_is_right_whenever_any_is(engine):
    queries = ToyQueries(0).held_out(25)
    judge = Oracle({query.text: query.truth for query in queries})
    ways = watch.best_of_n(Policy(engine, max_tokens=64), Referee(judge), queries, 8)
    assert ways["knockout"] == ways["any"]
    assert 0.3 < sum(ways["one"]) / 25 < 0.7 and sum(ways["any"]) > sum(ways["majority"])
    assert watch.best_of_n(None, None, [Query("?")], 8) == {}  # no truth is known


def test_length_correlation_is_within_groups():
    groups = [[SimpleNamespace(ids=[0] * n, think_tokens=0, finish_reason="stop") for n in lengths]
              for lengths in ([1, 2, 3], [30, 20, 10], [5, 5, 5])]  # fmt: skip
    rewards = [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.1, 0.2, 0.3]]
    stats = curves.response_stats(QUERIES, groups, [["a"] * 3] * 3, rewards)
    assert stats["reward/length_correlation"] == pytest.approx(1)
    assert "accuracy" not in stats  # no truth is known
    asked = [Query("2+2", "4", {"terms": 2}), Query("3+3", "6", {"terms": 2})]
    assert curves.accuracy("eval", asked, [["4", "5"], ["6", "6"]])["eval_2_terms"] == 0.75


# -- queries


def test_toy_queries_held_out_are_never_trained_on():
    source = ToyQueries(0)
    assert not any(toy.held_out(query.text) for query in source.take(0, 300))
    assert all(toy.held_out(query.text) for query in source.held_out(50))
    assert source.take(7, 3) == source.take(0, 10)[7:]
    assert all(eval(query.text) == int(query.truth) for query in source.held_out(50))


@given(st.integers(1, 30), st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_epochs_show_everything_once_each_pass_however_it_is_taken(n, sizes):
    row, start, taken = Reshuffled(list(range(n)), seed=5), 0, []
    for size in sizes:
        taken += row.take(start, size)
        start += size
    for first in range(0, len(taken) - n + 1, n):
        assert sorted(taken[first : first + n]) == list(range(n))


def test_file_queries_hold_some_out_and_count_equal_ones_once():
    queries = [Query(f"q{i % 40}") for i in range(80)]
    source = FileQueries(queries, seed=0, held_share=0.25)
    held, seen = source.held_out(100), source.take(0, 30)
    assert len(held) == 10 and not {q.text for q in held} & {q.text for q in seen}
    assert len({q.text for q in seen}) == 30


def test_queries_are_read_from_several_columns(tmp_path):
    lines = [{"prompt": "a"}, {"query": "b", "label": 1}]
    lines += [{"messages": [{"role": "user", "content": "c"}]}]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert [query.text for query in read_queries(path)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"promt": "b"}', "line 2: columns promt; one of query, prompt"),
        ('{"prompt": "a"}\nnope', "line 2: not JSON"),
        ("[1]", "line 1: should be an object, not list"),
        ('{"prompt": null}', "line 1: prompt should be text"),
        ("", "no queries in it"),
    ],
)
def test_a_bad_file_is_named_with_its_line(cli, tmp_path, content, message):
    (tmp_path / "q.jsonl").write_text(content)
    code, _, err = cli("train.py", "policy", *SMALL, "--data", "q.jsonl")
    assert code == 2 and message in err and "Traceback" not in err
    assert not (tmp_path / "runs").exists()


# -- the run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--group", 4, "--opponents", 4], "a response has 3 in a group of 4"),
        (["--rating", "glicko"], "glicko"),
        (["--group", 1], "group = 1"),
        (["--temperature", 0], "temperature = 0"),
        (["--data", "none.jsonl"], "no such file"),
        (["--model", "nowhere"], "nowhere: no such model folder"),
        (["--judge.model", "nowhere"], "nowhere: no such model folder"),
    ],
)
def test_what_can_not_be_is_refused_in_a_line(cli, tmp_path, flags, message):
    code, _, err = cli("train.py", "policy", *SMALL, *flags)
    assert code == 2 and message in err and err.count("error:") == 1
    assert not (tmp_path / "runs").exists()


KEYS = [
    "judge/comparisons",
    "judge/tokens",
    "rollout/tokens",
    "judge/seconds",
    "judge/invalid_ratio",
    "accuracy",
]
KEYS += ["rollout/seconds", "train/seconds", "reward/length_correlation", "engine/tokens_per_s"]
KEYS += ["completions/mean_length", "completions/no_answer_ratio", "entropy", "grad_norm"]


def test_two_and_two_steps_are_four_and_memory_changes_hands(cli, tmp_path):
    for args in (
        [*SMALL, "--steps", 4, "--name", "whole"],
        [*SMALL, "--steps", 2, "--name", "halves", "--release-cache"],
        ["--resume", "--steps", 4, "--name", "halves"],
    ):
        code, out, err = cli("train.py", "policy", *args)
        assert code == 0, err
    assert "gain of one" in out
    runs = tmp_path / "runs"
    folders = (
        runs / "whole" / "model",
        runs / "halves" / "model",
        ROOT / "nanorrm/assets/toy_policy",
    )
    whole, halves, start = ((f / "model.safetensors").read_bytes() for f in folders)
    assert whole == halves and whole != start
    rows = rows_of(runs / "whole" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(set(KEYS) <= row.keys() for row in rows[1:])
    for row in (rows[0], rows[2], rows[4]):
        assert 0 <= row["eval/accuracy"] <= 1 and 0 <= row["eval/win_rate"] <= 1
    clocks = ("seconds", "tokens_per_s", "minutes", "host_share")
    halves = rows_of(runs / "halves" / "metrics.jsonl")
    for one, other in zip(rows, halves, strict=True):
        differ = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
        assert all(name.endswith(clocks) for name in differ)
    exams = [json.loads((runs / name / "best_of.json").read_text()) for name in ("whole", "halves")]
    assert exams[0] == exams[1] and "before: knockout" in exams[0]
    assert (runs / "whole" / "plot.png").stat().st_size > 1000
    sample = rows_of(runs / "whole" / "samples.jsonl")[0]
    assert len(sample["responses"]) == len(sample["rewards"]) == 4


def test_a_file_of_prompts_without_any_truth(cli, tmp_path):
    queries = [{"prompt": f"{a}+{b}"} for a in range(1, 6) for b in range(1, 6)]
    queries += [{"prompt": "1+1" * 4000}, {"prompt": [{"role": "user", "content": "a"}] * 3}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, queries)))
    args = ["--steps", 2, "--data", "q.jsonl", "--name", "f"]
    code, out, err = cli("train.py", "policy", *SMALL, *args)
    assert code == 0, err
    assert "27 queries, 1 dropped: too long; 1 dropped: the toy policy can't read" in out
    last = rows_of(tmp_path / "runs/f/metrics.jsonl")[-1]
    assert "eval/win_rate" in last and "eval/accuracy" not in last and "accuracy" not in last


@pytest.mark.parametrize(("kind", "both"), [(PolicyConfig, False), (DpoConfig, True)])
def test_presets_name_the_judge_and_keep_its_other_settings(kind, both):
    name = kind.__name__.removesuffix("Config").lower()
    cfg = load_preset(kind(), ROOT / "configs" / f"{name}_toy.toml")
    assert cfg.judge.model == "toy-judge" and cfg.judge.both_orders == both


def test_the_careless_solver_is_right_about_half_of_the_time():
    rng = random.Random(0)
    chains = [toy.draw_chain(rng, rng.choice(toy.TERMS)) for _ in range(4000)]
    left = [toy.careless(rng, chain) for chain in chains]
    right = sum(value == chain.value for (_, value), chain in zip(left, chains)) / 4000
    hasty = sum(work.count("=") < chain.work.count("=") for (work, _), chain in zip(left, chains))
    assert 0.48 < right < 0.58 and 0.37 < hasty / 4000 < 0.47
    assert min(value for _, value in left) >= 0


@pytest.fixture
def server(monkeypatch):
    """An OpenAI-compatible judge who always prefers the first, on a loopback socket."""
    pytest.importorskip("httpx")
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)
    peer = Peer(answer=lambda user, body: {"content": f"so</think>{verdict_text(1)}"})
    yield peer
    peer.stop()


AT = ["--judge.model", None, "--judge.patience", 0.5, "--judge.endpoint"]


def test_a_judge_at_an_endpoint(cli, tmp_path, server):
    args = ["--steps", 1, "--eval-prompts", 0, "--name", "e", *AT, server.url]
    code, _, err = cli("train.py", "policy", *SMALL, *args)
    assert code == 0, err
    row = rows_of(tmp_path / "runs/e/metrics.jsonl")[-1]
    assert row["judge/comparisons"] == server.seen == len(set(server.answered)) > 0
    assert row["judge/tokens"] == 7 * server.seen and row["judge/undecided_ratio"] == 0
    texts = [body["messages"][-1]["content"] for body in server.bodies]
    assert not any("</think>" in text for text in texts)  # it never sees how answers were found


def test_a_judge_that_is_down_stops_the_run_in_a_line(cli, tmp_path, server):
    server.stop()
    code, _, err = cli("train.py", "policy", *SMALL, "--steps", 1, *AT, server.url)
    assert code == 2 and server.url.removesuffix("/v1") in err and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["policy", "dpo"])
def test_two_processes_do_what_one_does(cli, tmp_path, stage):
    args = [stage, *(SMALL if stage == "policy" else DPO_SMALL), "--steps", 2, "--eval-prompts", 4]
    code, _, err = cli("train.py", *args, "--name", "one")
    assert code == 0, err
    done = torchrun(2, ROOT / "train.py", *args, "--name", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step    2") == 1  # rank 0 alone speaks
    one, two = (
        Transformer.from_pretrained(tmp_path / "runs" / name / "model").state_dict()
        for name in ("one", "two")
    )
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
    logs = [rows_of(tmp_path / "runs" / name / "metrics.jsonl") for name in ("one", "two")]
    counted = "judge/comparisons" if stage == "policy" else "loss"
    for a, b in zip(*logs, strict=True):
        assert a.get(counted) == pytest.approx(b.get(counted), abs=1e-5)


@pytest.mark.slow
def test_without_labels_the_policy_learns_to_finish_its_sums(cli, tmp_path):
    """Ten steps take it from 51% to about 85%; 15 points by chance: under 1 in 100,000."""
    args = ["--config", ROOT / "configs/policy_toy.toml", "--steps", 10, "--threads", 1]
    code, _, err = cli("train.py", "policy", *args, "--best-of", 4, "--name", "p")
    assert code == 0, err
    lines = json.loads((tmp_path / "runs/p/best_of.json").read_text())
    assert 0.4 < lines["before: one"][0] < 0.6
    assert lines["gain of one"][0] > 0.15 and lines["before: knockout - majority"][0] > 0.05
