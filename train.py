"""Train a judge (`python train.py judge`) or the toy base it starts from (`... base`); or a policy
with a judge in the place of labels, by GRPO (`... policy`) or DPO (`... dpo`).

The judge's loop is GRPO in full, to be read from `train_judge` down:

    pairs -> prompts -> engine (G rollouts each) -> rewards -> advantages -> loss -> AdamW -> log

`python train.py judge --help` lists every setting; `--config configs/direct.toml` takes a preset.
"""

import sys
import time
from itertools import compress

import torch

from nanorrm import config, ranks
from nanorrm.cli import parse_command, run_script
from nanorrm.config import UserError
from nanorrm.data.sources import open_source
from nanorrm.engine.sampling import SamplingParams, seeds_apart
from nanorrm.files import read_json
from nanorrm.judge import prompts
from nanorrm.judge.judge import Judge
from nanorrm.runs import Run, run_folder
from nanorrm.train import curves, grpo
from nanorrm.train.base_loop import train_base
from nanorrm.train.open import open_trainer, open_weights
from nanorrm.train.policy_loop import train_dpo, train_policy
from nanorrm.train.rewards import verdict_reward
from nanorrm.train.trainer import update_metrics, update_plan
from nanorrm.train.watch import evaluate, examples, show


def graded(pairs, groups, closed=False):
    """Rewards of the rollouts: groups [P][G] on P pairs -> [P][G] of (reward, verdict)."""
    return [
        [verdict_reward(rollout.text, pair.label, closed) for rollout in group]
        for pair, group in zip(pairs, groups)
    ]


def train_judge(
    cfg, run, open_source=open_source, grade=graded, advantages=grpo.advantages, evaluate=evaluate
):
    """GRPO on +1 for the right verdict and -1 otherwise: nothing shows the model how to think.

    The functions are there to be replaced by an experiment's own (see experiments/).
    """
    trainer, engine = open_trainer(cfg)  # a Trainer has the model and AdamW
    device = trainer.model.device
    reference = open_weights(cfg.model, cfg, device, train=False) if cfg.loss.kl else None
    template = prompts.template_of(engine.tokenizer) if cfg.template == "auto" else cfg.template
    backend = ranks.RankSharedEngine(engine)
    judge = Judge(backend, template, cfg.temperature, cfg.max_tokens, cfg.think)
    judge.check_fits()
    source = open_source(cfg, judge)
    held_out, budget = source.held_out(cfg.eval_pairs), cfg.max_think_tokens
    state = trainer.load(run)
    engine.sync(trainer.model)
    start, minutes, cursor = (state.get(name, 0) for name in ("step", "minutes", "cursor"))
    run.start(start)
    before = state.get("before") or show(judge, held_out[:3], budget)
    if start == 0:
        stats = evaluate(judge, held_out, budget)
        run.log(0, stats, curves.judge_line(stats))

    for step in run.steps(start):
        began = time.perf_counter()
        engine.report()  # forget the work of evaluations

        # 1. rollouts: about each of P pairs, G thoughts that end in a verdict
        pairs = source.take(cursor, cfg.prompts)
        cursor += len(pairs)
        questions, groups = roll_out(judge, pairs, step, cfg)  # prompt ids [P], Completions [P][G]

        # 2. rewards: +1 for the right verdict, -1 for a wrong one or none that can be read
        grades = grade(pairs, groups, not cfg.think)  # [P][G] of (reward, verdict)
        if cfg.refills:
            batch = zip(pairs, questions, groups, grades)
            batch, cursor = refilled(list(batch), cursor, judge, source, grade, step, cfg)
            pairs, questions, groups, grades = zip(*batch)
        rewards = rewards_of(grades)  # [P, G]
        work = engine.report()
        rolled = time.perf_counter()

        # 3. advantages: how much better than its own group
        adv = advantages(rewards, cfg.scale)  # [P, G]

        # 4. loss, gradient, AdamW: one step on all rollouts, unless cfg.mini_prompts makes it more
        if cfg.release_cache:
            engine.sleep()
        updates = []
        for batches in update_plan(trainer, questions, groups, adv, cfg, reference):
            for batch in batches:  # micro-batches of N tokens: their losses and gradients add up
                logp, entropy = trainer.logprobs(batch, cfg.temperature)  # [N] each
                loss, sums = grpo.batch_loss(logp, entropy, batch.values, cfg.loss)
                trainer.backward(loss, sums)
            updates.append(trainer.step(step))
        engine.sync(trainer.model)  # the weights changed: no cached prefix may survive
        trained = time.perf_counter()

        # 5. log, evaluate, save
        minutes += (trained - began) / 60
        times = {"rollout": rolled - began, "train": trained - rolled}
        stats = {**curves.rollout_stats(grades, groups), **update_metrics(updates)}
        stats |= curves.speeds(questions, groups, times) | work
        last = run.is_last(enough=cfg.max_minutes and minutes >= cfg.max_minutes)
        if step % cfg.eval_every == 0 or last:
            stats |= evaluate(judge, held_out, budget)
        if step % cfg.sample_every == 0 or step == 1:
            run.append("samples.jsonl", curves.judge_sample(step, pairs[0], groups[0], grades[0]))
        run.log(step, {**stats, "minutes": minutes}, curves.judge_line(stats))
        if step % cfg.save_every == 0 or last:
            trainer.save(run, step, {"minutes": minutes, "cursor": cursor, "before": before})

    if said := run.interrupted():
        return said
    run.finish(engine.model, engine.tokenizer, curves.JUDGE_PANELS)
    return "\n".join(examples(held_out[:3], before, show(judge, held_out[:3], budget)))


def roll_out(judge, pairs, step, cfg, refill=0):
    """G rollouts about each of P pairs -> (prompt ids [P], Completions [P][G])."""
    questions = [judge.prompt(pair) for pair in pairs]
    sampling = SamplingParams(
        n=cfg.group,
        temperature=cfg.temperature,
        max_tokens=cfg.max_tokens,
        max_think_tokens=cfg.max_think_tokens,
        seed=cfg.seed * 1_000_003 + step + refill * 2**40,
    )
    return questions, judge.backend.generate(questions, seeds_apart(sampling, questions))


def rewards_of(grades):
    """[P][G] of (reward, verdict) -> the rewards, a tensor [P, G]."""
    return torch.tensor([[reward for reward, _ in group] for group in grades])


def refilled(batch, cursor, judge, source, grade, step, cfg):
    """DAPO's dynamic sampling: groups in which all rewards are equal teach nothing, and are
    replaced by those of further pairs, at most cfg.refills times; what is then missing is filled
    with such groups. batch: [(pair, prompt ids, group, grades), ...], P of them.

    Returns such a batch, and the source's new cursor.
    """
    kept, idle = [], []
    for refill in range(cfg.refills + 1):
        if refill:
            pairs = source.take(cursor, cfg.prompts - len(kept))
            cursor += len(pairs)
            questions, groups = roll_out(judge, pairs, step, cfg, refill)
            batch = list(zip(pairs, questions, groups, grade(pairs, groups, not cfg.think)))
        teach = grpo.informative(rewards_of([grades for *_, grades in batch])).tolist()
        kept += compress(batch, teach)
        idle += compress(batch, [not teaches for teaches in teach])
        if len(kept) == cfg.prompts:
            break
    return (kept + idle)[: cfg.prompts], cursor


STAGES = {
    "base": (config.BaseConfig, train_base),
    "judge": (config.JudgeConfig, train_judge),
    "policy": (config.PolicyConfig, train_policy),
    "dpo": (config.DpoConfig, train_dpo),
}


def saved_config(stage, cfg):
    """The settings a run was started with, which a resumed one keeps unless told otherwise."""
    folder = run_folder(stage, cfg)
    return folder.name, read_json(folder / "config.json")["config"]


def check_unchanged(cfg, saved):
    """Raise UserError for a setting that a resumed run can't change: it would be another run."""
    for name in ("model", "data", "seed", "template", "think"):
        if name in saved and saved[name] != getattr(cfg, name):
            was, now = saved[name], getattr(cfg, name)
            raise UserError(f"{name} = {now!r}: the run has {was!r}, which --resume keeps")


def main():
    stage, cfg = parse_command(STAGES, __doc__, sys.argv[1:], saved_config)
    if cfg.resume:
        check_unchanged(cfg, saved_config(stage, cfg)[1])
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    ranks.init()
    with Run(stage, cfg) as run:
        closing = STAGES[stage][1](cfg, run)
    if ranks.rank() == 0:
        print(f"{closing}\nrun folder: {run.folder}")
    ranks.finish()


if __name__ == "__main__":
    run_script(main)
