"""The judge as a reward in other trainers: groups put together, judged, and put back in order."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorrm.config import UserError
from nanorrm.integrations import verl
from nanorrm.integrations.group_reward import GroupReward
from nanorrm.integrations.trl import group_reward
from nanorrm.judge.verdict import Verdict
from nanorrm.model.hf_folder import resolve_model

ROOT = Path(__file__).parents[2]


class Larger:
    """A judge that prefers the larger number, and can't read what is none."""

    def __init__(self):
        self.asked = []

    seed = 0

    def compare(self, pairs, **how):
        self.asked += pairs
        return [self.verdict(pair) for pair in pairs]

    def verdict(self, pair):
        if not (pair.a.isdigit() and pair.b.isdigit()):
            return Verdict(votes=[None], swapped=[False], thoughts=[""])
        return Verdict(
            votes=[1 if int(pair.a) > int(pair.b) else 2], swapped=[False], thoughts=[""]
        )


class Down:
    def compare(self, pairs, **how):
        raise UserError("the endpoint does not answer")


@given(st.integers(1, 5), st.integers(2, 6), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_rewards_go_back_to_the_responses_they_are_of(groups, size, rng):
    """Whatever the order in which a trainer hands responses over, better ones earn more."""
    flat = [(f"query {g}", str(100 * g + i)) for g in range(groups) for i in range(size)]
    rng.shuffle(flat)
    judge = Larger()
    rewards, _ = GroupReward(judge, "win_rate", opponents=size - 1).rewards(*zip(*flat))
    for (_, answer), reward in zip(flat, rewards):
        assert reward == pytest.approx((int(answer) % 100) / (size - 1))
    assert all(pair.query == f"query {int(pair.a) // 100}" for pair in judge.asked)


def test_trl_s_contract():
    """Text and messages, thinking cut, unfinished ones as no answer, costs logged."""
    logged = {}
    reward = group_reward(Larger(), rating="win_rate", opponents=3, thinks=True)
    completions = ["so</think>4", "</think> 9", "I will never stop", "1</think>2"]
    prompts = ["What?"] * 4
    columns = {"trainer_state": None, "log_metric": logged.__setitem__, "log_extra": None}
    plain = reward(prompts, completions, completion_ids=[[0]] * 4, **columns)
    assert plain[1] > plain[0] > plain[3] and plain[2] == 0.5  # a draw with everybody
    assert 6 <= logged["judge/comparisons"] <= 12 and 0.3 < logged["judge/invalid_ratio"] < 0.7
    chats = [[{"role": "user", "content": "What?"}]] * 4
    answers = [[{"role": "assistant", "content": text}] for text in completions]
    assert reward(chats, answers) == plain
    later = group_reward(Larger(), rating="win_rate", opponents=3, thinks=True, background=True)
    assert asyncio.iscoroutinefunction(later)
    assert asyncio.run(later(prompts, completions)) == plain
    shown = group_reward(judge := Larger(), rating="win_rate")
    shown(["<|user|>What?", "<|user|>What?"], ["1", "2"], query=["What?", "What?"])
    assert {pair.query for pair in judge.asked} == {"What?"}


class Words:
    """A tokenizer of four words; 0 is the end."""

    eos_token_id = 0

    def decode(self, ids):
        return "".join(["", "7+8=15", "</think>", "15", "16"][i] for i in ids)


def test_with_the_tokenizer_the_end_of_thinking_and_answer_are_seen():
    """TRL's text leaves special tokens out; and whether a completion ended only its ids tell."""
    judge = Larger()
    reward = group_reward(judge, rating="win_rate", tokenizer=Words(), opponents=2)
    ids = [[1, 2, 3, 0], [1, 2, 4, 0], [1, 2, 4]]
    assert reward(["?"] * 3, ["15", "16", "16"], completion_ids=ids) == [0.25, 0.75, 0.5]
    assert {pair.a for pair in judge.asked} <= {"15", "16", "[NO ANSWER]"}


def test_a_group_of_one_is_refused():
    with pytest.raises(UserError, match="at least 2"):
        group_reward(Larger())(["a", "a", "b"], ["1", "2", "3"])


@pytest.mark.filterwarnings("ignore:no rewards")
def test_a_judge_that_is_down_stops_the_training_or_teaches_nothing():
    with pytest.raises(UserError, match="does not answer"):
        group_reward(Down())(["a", "a"], ["1", "2"])
    logged = {}
    neutral = group_reward(Down(), on_failure="neutral")
    assert neutral(["a", "a"], ["1", "2"], log_metric=logged.__setitem__) == [0.5, 0.5]
    assert logged["judge/failures"] == 1
    with pytest.raises(UserError, match="on_failure"):
        group_reward(Down(), on_failure="ignore")


class Refuses:
    """A judge that skips every pair, as one does that reads no conversations."""

    seed = 0

    def compare(self, pairs, **how):
        return [Verdict(skipped="a conversation of several turns") for _ in pairs]


@pytest.mark.filterwarnings("ignore:no rewards")
def test_a_judge_that_can_judge_nothing_does_not_train_in_silence():
    with pytest.raises(UserError, match=r"none of 2 pairs: a conversation"):
        group_reward(Refuses(), opponents=1)(["a", "a"], ["1", "2"])
    logged = {}
    neutral = group_reward(Refuses(), on_failure="neutral")
    for _ in range(2):
        neutral(["a", "a", "b", "b"], ["1", "2", "1", "2"], log_metric=logged.__setitem__)
    assert logged["judge/failures"] == 2  # groups of this call


def test_verl_settings_are_checked():
    with pytest.raises(UserError, match=r"'vote'.*votes"):
        verl.compute_score(["m"] * 2, ["1", "2"], [None] * 2, [{"query": "?"}] * 2, vote=3)


SPLIT = """
import json, sys
sys.path[:0] = [{root!r}, {tests!r}]
from nanorrm import ranks
from tests.integrations.test_integrations import Larger
from nanorrm.integrations.trl import group_reward
ranks.init()
flat = [("q" + str(i // 4), str(i * 7 % 11)) for i in range(12)]  # three groups of four: 6 + 6
mine = flat[6 * ranks.rank() : 6 * ranks.rank() + 6]
judge = Larger()
rewards = group_reward(judge, rating="win_rate", opponents=3)(*map(list, zip(*mine)))
told = ranks.gathered((rewards, len(judge.asked)))
if ranks.rank() == 0:
    print(json.dumps(told))
ranks.finish()
"""


def test_groups_split_across_processes_are_gathered(tmp_path):
    import json

    script = tmp_path / "split.py"
    script.write_text(SPLIT.format(root=str(ROOT), tests=str(ROOT / "tests")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, script], capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    (first, asked), (second, other) = json.loads(done.stdout.splitlines()[-1])
    flat = [("q" + str(i // 4), str(i * 7 % 11)) for i in range(12)]
    alone = group_reward(Larger(), rating="win_rate", opponents=3)(*map(list, zip(*flat)))
    assert first + second == alone
    assert asked > other >= 6  # two groups' matches here, one group's there


# -- verl's batch reward manager


def test_verl_s_contract(monkeypatch):
    opened = []

    def open_judge(cfg):
        opened.append(cfg)
        return Larger()

    monkeypatch.setattr(verl, "open_judge", open_judge)
    verl.reward_of.cache_clear()
    batch = {
        "data_sources": ["math"] * 4,
        "solution_strs": ["</think>3", "</think>5", "</think>4", "</think>9"],
        "ground_truths": [None] * 4,
        "extra_infos": [{"index": 0, "question": q} for q in ("a", "b", "a", "b")],
    }
    how = {"model": "some-judge", "rating": "win_rate", "votes": 3}
    for _ in range(2):
        scores = verl.compute_score(**batch, **how)
        assert scores == [{"score": 0.0}, {"score": 0.0}, {"score": 1.0}, {"score": 1.0}]
    assert len(opened) == 1 and opened[0].votes == 3 and opened[0].model == "some-judge"
    verl.reward_of.cache_clear()


def test_verl_s_mistakes_are_explained():
    with pytest.raises(UserError, match="reward_manager=batch"):
        verl.compute_score("math", "one", "1", {"question": "?"})
    with pytest.raises(UserError, match=r"index.*question"):
        verl.compute_score(["m"], ["one"], ["1"], [{"index": 3}])


# -- a real run of TRL


def test_trl_trains_the_toy_policy_on_the_toy_judge(tmp_path):
    """5 steps of GRPOTrainer: rewards are the judge's, weights move, costs are logged."""
    pytest.importorskip("trl", reason="trl is not installed")
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from nanorrm import Engine, Judge
    from nanorrm.data.sources import ToyQueries

    folder = resolve_model("toy-policy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    judge = Judge(Engine.from_pretrained("toy-judge"), "toy", max_tokens=64)
    queries = ToyQueries(0).take(0, 8)
    rows = [{"prompt": f"!{q.text}\n<think>", "query": q.text, "truth": q.truth} for q in queries]
    seen = []
    plain = group_reward(judge, tokenizer=tokenizer, thinks=True)

    def watched(prompts, completions, truth, **columns):
        rewards = plain(prompts, completions, **columns)
        texts = [
            tokenizer.decode(ids).replace("<|im_end|>", "") for ids in columns["completion_ids"]
        ]
        seen.append(
            [
                (t.rpartition("</think>")[2] == right, r)
                for t, right, r in zip(texts, truth, rewards)
            ]
        )
        return rewards

    torch.manual_seed(0)
    trainer = GRPOTrainer(
        str(folder),
        reward_funcs=watched,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        args=GRPOConfig(
            output_dir=str(tmp_path), max_steps=5, num_generations=4, per_device_train_batch_size=8,
            max_completion_length=48, report_to="none", use_cpu=True, bf16=False, logging_steps=1,
            gradient_checkpointing=False, learning_rate=1e-4, save_strategy="no", disable_tqdm=True,
        ),
    )  # fmt: skip
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "reward" in row]
    assert len(logs) == 5 and len(seen) == 5
    assert all(0.4 < row["reward"] < 0.6 for row in logs)  # Elo's rewards
    assert any("judge/tokens" in key for row in logs for key in row)
    right = [r for step in seen for is_right, r in step if is_right]
    wrong = [r for step in seen for is_right, r in step if not is_right]
    assert sum(right) / len(right) > sum(wrong) / len(wrong)
    after = dict(trainer.model.named_parameters())
    moved = [not torch.equal(p, after[name].cpu()) for name, p in before.named_parameters()]
    assert any(moved)
