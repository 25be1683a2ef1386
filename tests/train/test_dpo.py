"""DPO on a judge's labels: the update against plain autograd, the labels, the run, its errors."""

import copy
import itertools
import json
import random

import pytest
import tiny
import torch
import torch.nn.functional as F

from nanorrm.config import DpoConfig, UserError
from nanorrm.engine.engine import Engine
from nanorrm.rank import referee
from nanorrm.records import Pair, Query
from nanorrm.train import packing, preferences
from nanorrm.train.dpo import preference_update, reference_logprobs
from nanorrm.train.packing import Preference, Sample
from nanorrm.train.policy import Policy
from nanorrm.train.trainer import Trainer
from tests.train.test_policy import DPO_SMALL, Oracle, rows_of


def drawn(n, seed=0):
    """n Preferences of random tokens, some of them written by the engine."""
    rng = random.Random(seed)

    def sample(context):
        ids = [rng.randrange(256) for _ in range(rng.randint(1, 20))]
        trained = [float(rng.random() < 0.8) for _ in ids]
        return Sample(context, ids, {"trained": trained})

    contexts = [[rng.randrange(256) for _ in range(rng.randint(1, 30))] for _ in range(n)]
    return [Preference(sample(context), sample(context)) for context in contexts]


def sequence_logprob(model, sample):
    """The log-prob of the trained tokens of one sample, from the model's logits, in plain torch."""
    ids = torch.tensor(sample.context + sample.target[:-1])
    hidden = model(ids, torch.tensor([0, len(ids)]))
    logits = F.linear(hidden, model.head)[len(sample.context) - 1 :]
    logp = logits.log_softmax(-1).gather(1, torch.tensor(sample.target)[:, None])[:, 0]
    return (logp * torch.tensor(sample.values["trained"])).sum()


def updated(items, **settings):
    """One step of plain SGD by preference_update, from tiny.model() -> (metrics, model)."""
    trainer = Trainer(tiny.model(), DpoConfig(warmup_steps=0, learning_rate=0.1, **settings))
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    items = copy.deepcopy(items)
    reference = Trainer(tiny.model(seed=1), trainer.cfg)
    reference_logprobs(reference, items)
    return preference_update(trainer, 1, items, trainer.cfg), trainer.model


def test_the_update_is_the_gradient_of_the_paper_s_loss():
    """Equation 7 of arXiv 2305.18290 by autograd over whole sequences, one pair at a time."""
    items, beta = drawn(5), 0.3
    model, reference = tiny.model(), tiny.model(seed=1)
    losses, won = [], []
    for item in items:
        with torch.no_grad():
            before = [sequence_logprob(reference, sample) for sample in item.samples()]
        now = [sequence_logprob(model, sample) for sample in item.samples()]
        margin = beta * ((now[0] - before[0]) - (now[1] - before[1]))
        losses.append(-F.logsigmoid(margin))
        won.append(float(margin > 0))
    loss = sum(losses) / len(losses)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    stats, trained = updated(items, beta=beta)
    assert stats["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert stats["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert stats["rewards/accuracies"] == pytest.approx(sum(won) / 5)
    for p, q in zip(model.parameters(), trained.parameters()):
        torch.testing.assert_close(p.detach() - 0.1 * p.grad, q.detach(), atol=1e-5, rtol=1e-4)


def test_the_update_is_the_same_whatever_the_micro_batch():
    items = drawn(9)
    (whole, one), (parts, two) = updated(items), updated(items, micro_tokens=40)
    for p, q in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
    assert whole == pytest.approx(
        parts, abs=1e-5, rel=1e-6
    )  # log-probs of -100: 1e-7 is one rounding


def test_at_the_reference_the_loss_is_log_two():
    items = drawn(4)
    trainer = Trainer(tiny.model(), DpoConfig())
    reference_logprobs(trainer, items)
    alone = packing.join([items[2].rejected])
    logp, _ = trainer.logprobs(alone)
    assert items[2].rejected.values["ref_logp"] == pytest.approx(logp.tolist(), abs=1e-5)
    assert preference_update(trainer, 1, items, trainer.cfg)["loss"] == pytest.approx(0.693147)


def test_both_sides_stay_in_one_micro_batch_and_idle_ones_count_nothing():
    items = drawn(2)
    dealt = packing.deal(items, 10, ranks=4)
    kept = [item for rank in dealt for group in rank for item in group]
    assert all(isinstance(item, Preference) for item in kept) and len(kept) == 4
    assert [any(x.values["trained"]) for item in kept for x in item.samples()].count(True) <= 4
    batch = packing.join(items)
    lengths = [len(sample.target) for item in items for sample in item.samples()]
    assert batch.sequences().bincount().tolist() == lengths


# -- labels


@pytest.fixture(scope="module")
def policy():
    return Policy(Engine.from_pretrained("toy-policy"), max_tokens=40)


def test_every_pair_is_labelled_or_counted(policy):
    queries = [Query("3+4-2+9+8"), Query("9-8+7")] * 20
    pairs = preferences.sampled(policy, queries, seed=0)
    assert all(item.chosen.context == policy.prompt(pair.query) for pair, item in pairs)
    judge = Oracle({"3+4-2+9+8": "22", "9-8+7": "8"}, unreadable=["1"])
    labelled, why = preferences.label(referee.Referee(judge), pairs)
    assert len(labelled) + sum(why.values()) == 40 and labelled
    assert why["equal answers"] == sum(pair.a == pair.b for pair, _ in pairs)
    assert why["no winner"] == sum("1" in (p.a, p.b) and p.a != p.b for p, _ in pairs) > 0
    decided = 0
    for item in labelled:
        texts = [policy.backend.tokenizer.decode(s.target) for s in item.samples()]
        answers = [text.rpartition("</think>")[2].removesuffix("<|im_end|>") for text in texts]
        assert answers[0] != answers[1] and item.chosen.target[-1] == 260  # the end token is learnt
        if {"22", "8"} & set(answers):
            decided += 1
            assert answers[0] in ("22", "8")  # the judge's choice was chosen
    assert decided > 5


def test_written_responses_need_thinking_where_the_policy_thinks(policy):
    rows = [("1+2", "1+2=3</think>3", "1+2=4</think>4"), ("1+2", "3", "4")]
    rows += [("1+2", "</think>" + "9" * 9000, "</think>4"), ([{"content": "x"}] * 2, "3", "4")]
    pairs, why = preferences.written(policy, [Pair(*row) for row in rows])
    assert len(pairs) == 1 and sum(why.values()) == 3 and why["too long"] == 1
    pair, item = pairs[0]
    assert (pair.a, pair.b) == ("3", "4")
    assert policy.backend.tokenizer.decode(item.chosen.target) == "1+2=3</think>3<|im_end|>"
    assert item.chosen.target.count(257) == 1 and item.chosen.target[-1] == 260


def test_preferences_survive_the_file(tmp_path):
    items = drawn(3)
    preferences.save(tmp_path / "p.jsonl", items)
    assert preferences.load(tmp_path / "p.jsonl") == items


# -- the run


def test_two_and_two_steps_are_four(cli, tmp_path):
    for args in (
        [*DPO_SMALL, "--steps", 4, "--name", "whole"],
        [*DPO_SMALL, "--steps", 2, "--name", "halves", "--release-cache"],
        ["--resume", "--steps", 4, "--name", "halves"],
    ):
        code, out, err = cli("train.py", "dpo", *args)
        assert code == 0, err
        if "--resume" in args:
            assert "labelled" not in out  # nobody is asked again
    runs = tmp_path / "runs"
    models = [runs / name / "model" / "model.safetensors" for name in ("whole", "halves")]
    assert models[0].read_bytes() == models[1].read_bytes()
    rows = rows_of(runs / "whole" / "metrics.jsonl")
    assert (
        rows[0]["pairs"]
        == 40
        == rows[0]["labelled"]
        + sum(n for name, n in rows[0].items() if name.startswith("dropped/"))
    )
    assert rows[0]["judge/tokens"] > 0 and rows[1]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert rows[4]["loss"] < 0.69 and "eval/win_rate" in rows[4]
    assert (runs / "whole" / "plot.png").exists() and (runs / "whole" / "best_of.json").exists()


def test_pairs_of_a_file_are_labelled_by_the_judge(cli, tmp_path):
    rows = []  # the file's own labels are all wrong
    for a, b in itertools.product(range(1, 7), repeat=2):
        texts = {"chosen": f"</think>{a + b + 1}", "rejected": f"</think>{a + b}"}
        rows.append({"prompt": f"{a}+{b}", **texts})
    rows.append({"prompt": "1+1", "chosen": "2", "rejected": "3"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = ["--data", "pairs.jsonl", "--responses", "file", "--eval-share", 0, "--name", "f"]
    code, out, err = cli("train.py", "dpo", *DPO_SMALL, *args, "--steps", 2)
    assert code == 0, err
    assert "37 pairs" in out and "1 dropped: no </think> in a response" in out
    right = 0
    labelled = rows_of(tmp_path / "runs/f/preferences.jsonl")
    decode = Engine.from_pretrained("toy-policy").tokenizer.decode
    for row in labelled:
        query = decode(row["context"]).removeprefix("!").removesuffix("\n<think>")
        right += decode(row["chosen"]["ids"]) == f"</think>{eval(query)}<|im_end|>"
    assert len(labelled) > 20 and right / len(labelled) > 0.9  # the judge knows better


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--responses", "file"], "needs a file of pairs"),
        (["--beta", 0], "beta = 0"),
        (["--label-smoothing", 0.5], "label_smoothing = 0.5"),
        (["--responses", "mine"], "responses = 'mine'"),
        (["--data", "same.jsonl", "--responses", "file"], "of 1 pairs not one got a label"),
    ],
)
def test_what_can_not_be_is_refused_in_a_line(cli, tmp_path, flags, message):
    same = {"prompt": "1+1", "chosen": "</think>2", "rejected": "</think>2"}
    (tmp_path / "same.jsonl").write_text(json.dumps(same))
    code, _, err = cli("train.py", "dpo", *DPO_SMALL, *flags)
    assert code == 2 and message in err and err.count("error:") == 1
    assert not (tmp_path / "runs").exists()


def test_resume_without_the_labels_says_so(cli, tmp_path):
    code, _, err = cli("train.py", "dpo", *DPO_SMALL, "--steps", 1, "--name", "d")
    assert code == 0, err
    (tmp_path / "runs/d/preferences.jsonl").unlink()
    code, _, err = cli("train.py", "dpo", "--resume", "--steps", 2, "--name", "d")
    assert code == 2 and "labelled pairs of the run are gone" in err


@pytest.mark.slow
def test_the_judge_s_labels_teach(cli, tmp_path, root):
    """Ten steps take it from 51% to about 80%; a gain of 8 points by chance: under 1 in 1,000."""
    args = ["--config", root / "configs/dpo_toy.toml", "--steps", 10, "--threads", 1]
    code, _, err = cli("train.py", "dpo", *args, "--pairs", 1500, "--name", "d")
    assert code == 0, err
    lines = json.loads((tmp_path / "runs/d/best_of.json").read_text())
    assert lines["gain of one"][0] > 0.08


@pytest.mark.parametrize("text", ["", '{"context": [1]}\n'], ids=["empty", "damaged"])
def test_labelled_pairs_that_can_not_be_read_are_named(tmp_path, text):
    path = tmp_path / "preferences.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=r"preferences\.jsonl.*can't go on"):
        preferences.load(path)
