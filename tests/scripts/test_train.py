"""The training loop: its update, its run folders, resuming, and presets, mostly through the CLI."""

import copy
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

from nanorrm.cli import load_preset
from nanorrm.config import BaseConfig, DpoConfig, JudgeConfig, LossConfig, PolicyConfig, UserError
from nanorrm.data import toy
from nanorrm.engine.engine import Completion
from nanorrm.engine.sampling import SamplingParams
from nanorrm.model.tokenizer import Tokenizer
from nanorrm.model.transformer import Transformer
from nanorrm.train import grpo, packing
from nanorrm.train.trainer import Trainer, policy_update

SMALL = ["--threads", 1, "--prompts", 4, "--group", 4, "--eval-pairs", 5, "--eval-every", 1]
SMALL += ["--max-tokens", 64, "--engine.num-blocks", 1024]
ROOT = Path(__file__).parents[2]


def rows_of(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def timeless(rows):
    """Metrics without what a clock says."""
    clocks = ("seconds", "tokens_per_s", "minutes", "host_share")
    return [{k: v for k, v in row.items() if not k.endswith(clocks)} for row in rows]


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


# -- the update


@pytest.fixture(scope="module")
def rollouts(tokenizer):
    """Questions, groups and advantages of a random model, forced tokens among them."""
    model = tiny.model(tie_word_embeddings=False)
    questions = [[*prompt, 256] for prompt in tiny.prompts(6)]
    params = SamplingParams(n=4, max_tokens=20, max_think_tokens=8)
    groups = tiny.engine(tokenizer, model).generate(questions, params)
    assert any(any(c.forced) for g in groups for c in g)
    rewards = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    return model, questions, groups, grpo.advantages(rewards)


def sgd(model, **settings):
    """A trainer with plain SGD in the place of AdamW."""
    trainer = Trainer(model, JudgeConfig(learning_rate=0.1, warmup_steps=0, **settings))
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return trainer


def update(rollouts, **settings):
    """One step of plain SGD (its result is linear in the gradient) -> metrics, new parameters."""
    model, questions, groups, advantages = rollouts
    trainer = sgd(copy.deepcopy(model), **settings)
    reference = tiny.model(seed=1, tie_word_embeddings=False) if trainer.cfg.loss.kl else None
    stats = policy_update(trainer, 1, questions, groups, advantages, trainer.cfg, reference)
    return stats, trainer.model


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_update_is_the_same_whatever_the_micro_batch(rollouts, kl):
    loss = LossConfig(kl=kl)
    stats, whole = update(rollouts, micro_tokens=10**6, loss=loss)
    before = rollouts[0].parameters()
    moved = max((p - q).abs().max() for p, q in zip(whole.parameters(), before))
    assert moved > 1e-3
    for micro_tokens in (1, 64, 200):
        some, parts = update(rollouts, micro_tokens=micro_tokens, loss=loss)
        for p, q in zip(whole.parameters(), parts.parameters()):
            assert (p - q).abs().max() < 1e-6
        assert some == pytest.approx(stats, rel=1e-4, abs=1e-6)


def test_update_follows_the_formula(rollouts):
    """Against autograd of the loss on unpacked sequences, gradient clipping included."""
    model, questions, groups, advantages = rollouts
    stats, updated = update(rollouts, max_grad_norm=0.05)
    plain = copy.deepcopy(model)
    loss, total = 0.0, sum(not f for g in groups for c in g for f in c.forced)
    for question, group, row in zip(questions, groups, advantages):
        for completion, advantage in zip(group, row):
            ids = torch.tensor(question + completion.ids)
            hidden = plain(ids, torch.tensor([0, len(ids)]))
            logp = (hidden @ plain.head.T).log_softmax(-1)
            for i, (token, forced) in enumerate(zip(completion.ids, completion.forced)):
                if not forced:
                    loss = loss - advantage * logp[len(question) + i - 1, token] / total
    loss.backward()
    norm = sum(p.grad.square().sum() for p in plain.parameters()).sqrt()
    assert stats["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 0.05
    for before, after, p in zip(model.parameters(), updated.parameters(), plain.parameters()):
        wanted = before - 0.1 * p.grad * 0.05 / norm
        torch.testing.assert_close(after, wanted, atol=1e-6, rtol=1e-4)


def test_metrics_of_the_update(rollouts):
    stats, _ = update(rollouts)
    assert stats["sampler/logp_diff_max"] < 1e-4 and stats["sampler/logp_diff_rms"] < 1e-5
    assert stats["clip_ratio"] == 0 and stats["kl"] == 0  # one update per batch: ratio one
    assert 3 < stats["entropy"] < torch.tensor(261.0).log()  # nats, of a wide distribution


def test_temperature_of_the_rollouts_is_that_of_the_update(tokenizer, rollouts):
    """Sampler log-probs with a temperature agree only with a trainer that knows it."""
    model, questions, *_ = rollouts
    params = SamplingParams(n=4, max_tokens=20, temperature=0.6)
    groups = tiny.engine(tokenizer, model).generate(questions, params)
    cooled = (model, questions, groups, rollouts[3])
    assert update(cooled, temperature=0.6)[0]["sampler/logp_diff_max"] < 1e-4
    assert update(cooled, temperature=1.0)[0]["sampler/logp_diff_max"] > 0.1


def captured(monkeypatch, model, questions, groups):
    """The samples that policy_update packs."""
    seen, usual = [], packing.deal
    monkeypatch.setattr(packing, "deal", lambda s, *more: seen.extend(s) or usual(s, *more))
    advantages = torch.tensor([[1.0, -1.0]] * len(groups))
    trainer = sgd(model)
    policy_update(trainer, 1, questions, groups, advantages, trainer.cfg)
    return seen


def test_end_token_is_trained_on_even_where_it_is_the_pad_token(tokenizer, monkeypatch):
    """And even where the question holds it: the mask comes from the engine, not from values."""
    eos = 260
    model = tiny.model(eos_token_id=[eos], tie_word_embeddings=False)
    questions = [[eos, 5, eos, 6], [eos, eos, 7]]
    groups = [
        [Completion(ids, "", [-1.0] * len(ids), [], [False] * len(ids), "stop", 0)
         for ids in ([8, 9, eos], [eos])] for _ in questions
    ]  # fmt: skip
    for sample in captured(monkeypatch, model, questions, groups):
        assert sample.target[-1] == eos and all(sample.values["weight"])


def test_forced_tokens_are_masked_in_training(tokenizer, monkeypatch, rollouts):
    """The update does not depend on their advantage: no gradient at all."""
    model, questions, groups, _ = rollouts
    pairs = [group[:2] for group in groups]
    samples = captured(monkeypatch, copy.deepcopy(model), questions, pairs)
    flat = [c for group in pairs for c in group]
    trained = [[weight > 0 for weight in s.values["weight"]] for s in samples]
    assert trained == [[not f for f in c.forced] for c in flat]
    trainer = sgd(copy.deepcopy(model))
    forced = Completion([257], "", [0.0], [], [True], "length", 0)
    spoken = Completion([65], "", [-1.0], [], [False], "length", 0)
    stats = policy_update(
        trainer, 1, [[1, 2]], [[forced, spoken]], torch.tensor([[5.0, 0.0]]), trainer.cfg
    )
    assert stats["grad_norm"] == 0
    after = trainer.model.parameters()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), after))


def test_rewarded_completions_become_likelier(rollouts):
    model, questions, groups, advantages = rollouts
    _, after = update(rollouts)
    change = 0.0
    for question, group, row in zip(questions, groups, advantages):
        for completion, advantage in zip(group, row):
            ids = torch.tensor(question + completion.ids)
            logps = []
            for m in (model, after):
                with torch.no_grad():
                    logits = m(ids, torch.tensor([0, len(ids)])) @ m.head.T
                at = torch.arange(len(question) - 1, len(ids) - 1)
                logps.append(logits.log_softmax(-1)[at, ids[at + 1]].sum())
            change += float(advantage * (logps[1] - logps[0]))
    assert change > 0


# -- a run through the real command line


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shell):
    """runs/whole: four steps at once; runs/halves: two, then --resume to four."""
    folder = tmp_path_factory.mktemp("cli")
    done = [
        shell(folder, "train.py", "judge", *SMALL, "--steps", 4, "--name", "whole"),
        shell(folder, "train.py", "judge", *SMALL, "--steps", 2, "--name", "halves"),
        shell(folder, "train.py", "judge", "--resume", "--steps", 4, "--name", "halves"),
    ]
    for process in done:
        assert process.returncode == 0, process.stderr
    return folder / "runs", done


KEYS = [
    "reward",
    "accuracy",
    "frac_reward_zero_std",
    "entropy",
    "loss",
    "clip_ratio",
    "kl",
    "grad_norm",
    "learning_rate",
    "completions/mean_length",
    "completions/mean_think_length",
    "completions/clipped_ratio",
    "completions/unreadable_ratio",
    "completions/first_slot_ratio",
    "sampler/logp_diff_rms",
    "sampler/logp_diff_max",
    "sampler/logp_diff_k3",
    "rollout/tokens_per_s",
    "train/tokens_per_s",
    "eval/accuracy",
    "eval/patterns_reflection",
    "eval/accuracy_2_terms",
    "eval/accuracy_6_terms",
    "minutes",
]


def test_run_leaves_metrics_samples_plot_and_model(runs):
    folder, (process, *_) = runs
    whole = folder / "whole"
    rows = rows_of(whole)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert 0 <= rows[0]["eval/accuracy"] <= 1
    for row in rows[1:]:
        assert set(KEYS) <= row.keys()
        assert -1 <= row["reward"] <= 1 and row["accuracy"] == (row["reward"] + 1) / 2
        assert row["sampler/logp_diff_max"] < 1e-4 and row["rollout/tokens_per_s"] > 0
    assert (whole / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for sample in rows_of(whole, "samples.jsonl"):
        assert len(sample["rollouts"]) == 4
        for rollout in sample["rollouts"]:
            right = rollout["verdict"] == sample["label"]
            assert rollout["reward"] == (1 if right else -1) and rollout["text"]
    about = json.loads((whole / "config.json").read_text())
    assert about["config"]["prompts"] == 4 and about["config"]["seed"] == 0 and about["torch"]
    assert process.stdout.count("step ") >= 5  # a line each, and nothing unreadable
    assert process.stdout.count("before thinks") == process.stdout.count("after  thinks") == 3


def test_trained_model_opens(runs):
    folder = runs[0] / "whole" / "model"
    model = Transformer.from_pretrained(folder)
    base = Transformer.from_pretrained(ROOT / "nanorrm" / "assets" / "toy_base")
    assert not torch.equal(model.head, base.head)
    assert Tokenizer.from_pretrained(folder).think_ids == (256, 257)
    assert model.config == toy.model_config()


def test_two_and_two_steps_give_the_weights_of_four(runs):
    folder, _ = runs
    assert weights(folder / "whole") == weights(folder / "halves")


def test_two_and_two_steps_give_the_metrics_of_four(runs):
    folder, _ = runs
    whole, halves = (timeless(rows_of(folder / name)) for name in ("whole", "halves"))
    assert halves == whole


def test_resume_keeps_the_settings_of_the_run(runs):
    folder, _ = runs
    about = json.loads((folder / "halves" / "config.json").read_text())["config"]
    assert about["prompts"] == 4 and about["max_tokens"] == 64 and about["steps"] == 4


def wait_for_lines(path, n, process, seconds=120):
    """Until a log holds n lines."""
    end = time.time() + seconds
    while time.time() < end and process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= n:
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} never had {n} lines: {process.communicate()}")


def interrupted(folder, log, *args):
    """Start train.py, press Ctrl-C when `log` has a few lines; returns what it printed."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for_lines(folder / log, 4, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in err, err
    assert "--resume" in out
    return out


def test_ctrl_c_saves_and_resume_ends_where_an_unbroken_run_does(tmp_path, cli):
    """The base: its learning rate depends on the length of the run, so this is the exact case."""
    sizes = ["base", "--threads", 1, "--documents", 8, "--steps", 60, "--warmup-steps", 5]
    runs = tmp_path / "runs"
    interrupted(tmp_path, "runs/broken/metrics.jsonl", *sizes, "--name", "broken")
    reached = rows_of(runs / "broken")[-1]["step"]
    assert 3 <= reached < 60 and not (runs / "broken" / "model").exists()
    code, _, err = cli("train.py", "base", "--resume", "--name", "broken")
    assert code == 0, err
    code, _, err = cli("train.py", *sizes, "--name", "unbroken")
    assert code == 0, err
    assert weights(runs / "broken") == weights(runs / "unbroken")


def test_ctrl_c_in_the_judge_s_training(tmp_path, cli):
    small = [*SMALL, "--steps", 500, "--name", "j", "--sample-every", 1]
    interrupted(tmp_path, "runs/j/metrics.jsonl", "judge", *small)
    reached = rows_of(tmp_path / "runs" / "j")[-1]["step"]
    code, out, err = cli("train.py", "judge", "--resume", "--steps", reached + 1)  # the last run
    assert code == 0, err
    assert rows_of(tmp_path / "runs" / "j")[-1]["step"] == reached + 1
    assert (tmp_path / "runs" / "j" / "model").is_dir() and "runs/j" in out


def test_base_two_and_two_equal_four(tmp_path, cli):
    """Warm-up is on throughout, so that the length of the run does not matter."""
    sizes = ["base", "--threads", 1, "--documents", 4]
    for args in (
        [*sizes, "--steps", 4, "--name", "whole"],
        [*sizes, "--steps", 2, "--name", "halves"],
        ["base", "--resume", "--steps", 4, "--name", "halves"],
    ):
        code, _, err = cli("train.py", *args)
        assert code == 0, err
    assert weights(tmp_path / "runs" / "whole") == weights(tmp_path / "runs" / "halves")


def own_file(path, n=12):
    records = [
        {"prompt": f"{i}+1", "chosen": str(i + 1), "rejected": str(i + 2)} for i in range(1, n + 1)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_training_on_a_file_of_one_s_own(tmp_path, cli):
    path = own_file(tmp_path / "mine.jsonl")
    args = [*SMALL, "--steps", 2, "--name", "mine", "--data", path, "--eval-share", 0.25]
    code, out, err = cli("train.py", "judge", *args, "--sample-every", 1)
    assert code == 0, err
    assert "12 pairs, none dropped" in out
    rows = rows_of(tmp_path / "runs" / "mine")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["eval/accuracy"] in (0, 1 / 3, 2 / 3, 1)  # 3 of 12 held out
    for sample in rows_of(tmp_path / "runs" / "mine", "samples.jsonl"):
        right = int(sample["query"].split("+")[0]) + 1
        assert (sample["a"], sample["b"])[sample["label"] - 1] == str(right)


def test_pairs_that_do_not_fit_are_dropped_and_counted(tmp_path, cli):
    path = own_file(tmp_path / "mine.jsonl")
    with open(path, "a") as file:
        file.write(json.dumps({"prompt": "9" * 9000, "chosen": "1", "rejected": "2"}) + "\n")
        file.write(json.dumps({"query": "1+1", "a": "1", "b": "2"}) + "\n")
    args = [*SMALL, "--steps", 1, "--name", "mine", "--data", path]
    code, out, err = cli("train.py", "judge", *args)
    assert code == 0, err
    assert "14 pairs" in out and "1 dropped: too long" in out and "1 dropped: no label" in out


def test_direct_judge_runs(tmp_path, cli):
    args = [*SMALL, "--steps", 1, "--name", "d", "--no-think", "--max-tokens", 8]
    code, _, err = cli("train.py", "judge", *args)
    assert code == 0, err
    row = rows_of(tmp_path / "runs" / "d")[-1]
    assert row["completions/mean_think_length"] == 0
    assert row["completions/mean_length"] < 8 and row["completions/unreadable_ratio"] < 0.7


def test_kl_and_think_budget_run(tmp_path, cli):
    args = [*SMALL, "--steps", 2, "--name", "k", "--loss.kl", 0.1, "--max-think-tokens", 5]
    code, _, err = cli("train.py", "judge", *args, "--scale", "none", "--eval-pairs", 0)
    assert code == 0, err
    rows = rows_of(tmp_path / "runs" / "k")
    assert rows[-1]["completions/mean_think_length"] <= 5
    assert rows[1]["kl"] == pytest.approx(0, abs=1e-6) and rows[2]["kl"] > 0


def test_max_minutes_ends_the_run(tmp_path, cli):
    args = [*SMALL, "--steps", 500, "--max-minutes", 1e-6, "--name", "m"]
    code, _, err = cli("train.py", "judge", *args)
    assert code == 0, err
    assert rows_of(tmp_path / "runs" / "m")[-1]["step"] == 1
    assert (tmp_path / "runs" / "m" / "model").is_dir()


def test_seeds_differ_and_repeat(tmp_path, cli):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        args = [*SMALL, "--steps", 1, "--name", name, "--seed", seed]
        assert cli("train.py", "judge", *args)[0] == 0
    a, b, c = (weights(tmp_path / "runs" / name) for name in "abc")
    assert a == b != c


def test_log_of_unfinished_steps_is_dropped_on_resume(tmp_path, cli):
    """A crash after the checkpoint leaves lines of steps that will be done again."""
    args = [*SMALL, "--steps", 1, "--name", "r"]
    assert cli("train.py", "judge", *args)[0] == 0
    log = tmp_path / "runs" / "r" / "metrics.jsonl"
    with open(log, "a") as file:
        file.write('{"step": 2, "reward": 99}\n{"step": 3, "rew')
    assert cli("train.py", "judge", "--resume", "--name", "r", "--steps", 2)[0] == 0
    rows = rows_of(log.parent)
    assert rows[-1]["step"] == 2 and rows[-1]["reward"] != 99
    assert len({row["step"] for row in rows}) == len(rows)


# -- settings


def test_help_explains_every_setting(cli):
    code, out, _ = cli("train.py", "judge", "--help")
    assert code == 0
    flat = " ".join(out.replace("│", " ").split())
    assert (
        "--learning-rate" in out and "rollouts per prompt" in flat and "--engine.block-size" in out
    )
    code, out, _ = cli("train.py", "--help")
    assert code == 0 and "base" in out and "judge" in out


PRESETS = sorted((ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_presets_load_and_override_something(path):
    kinds = {"base": BaseConfig, "policy": PolicyConfig, "dpo": DpoConfig}
    kind = kinds.get(path.stem.partition("_")[0], JudgeConfig)
    assert load_preset(kind(), path) != kind()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learnin_rate = 1.0", ["learnin_rate", "learning_rate"]),
        ('steps = "many"', ["steps", "int"]),
        ("think = 1", ["think", "bool"]),
        ("group = 2.5", ["group", "int"]),
        ("[engine]\nblok_size = 4", ["blok_size", "block_size", "engine"]),
        ("steps = ", ["TOML"]),
    ],
)
def test_preset_that_does_not_fit_is_named(tmp_path, text, words):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_preset(JudgeConfig(), path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_flags_win_over_the_preset_and_the_preset_over_defaults(tmp_path, cli):
    preset = tmp_path / "mine.toml"
    preset.write_text("steps = 1\nprompts = 3\n[loss]\nkl = 1\n[engine]\nblock_size = 4\n")
    args = [*SMALL[4:], "--group", 2, "--config", preset, "--prompts", 2, "--name", "p"]
    code, _, err = cli("train.py", "judge", *args)
    assert code == 0, err
    config = json.loads((tmp_path / "runs" / "p" / "config.json").read_text())["config"]
    assert (config["steps"], config["prompts"], config["loss"]["kl"]) == (1, 2, 1.0)
    assert config["engine"]["block_size"] == 4 and config["temperature"] == 1.0
