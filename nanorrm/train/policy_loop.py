"""Policies taught by a judge: GRPO on the matches of a group, and DPO on judged pairs."""

import time

import torch

from nanorrm.data.sources import Reshuffled, open_queries
from nanorrm.files import write_json
from nanorrm.rank.referee import open_referee
from nanorrm.train import curves, grpo, preferences
from nanorrm.train.dpo import preference_update, reference_logprobs
from nanorrm.train.open import open_trainer, open_weights
from nanorrm.train.policy import open_policy
from nanorrm.train.rewards import judged_rewards
from nanorrm.train.trainer import policy_update
from nanorrm.train.watch import HeldOut, comparison_text


def train_policy(cfg, run, open_policy=open_policy, open_referee=open_referee):
    """GRPO without labels: the responses to a query compete, and a judge decides their matches.

    The functions are there to be replaced by an experiment's own (see experiments/).
    """
    trainer, engine = open_trainer(cfg)
    policy, referee = open_policy(cfg, engine), open_referee(cfg)
    device = trainer.model.device
    reference = open_weights(cfg.model, cfg, device, train=False) if cfg.loss.kl else None
    source = open_queries(cfg, policy)
    state = trainer.load(run)
    engine.sync(trainer.model)
    start, minutes, cursor = (state.get(name, 0) for name in ("step", "minutes", "cursor"))
    watch = HeldOut(policy, referee, source, cfg, state.get("watch"))
    run.start(start)
    if start == 0:
        stats = watch.evaluate()
        run.log(0, stats, curves.policy_line(stats))

    for step in run.steps(start):
        began = time.perf_counter()
        engine.report(), referee.report()  # forget the work of evaluations

        # 1. rollouts: queries -> prompts -> G responses of each -> answers, without their thinking
        queries = source.take(cursor, cfg.prompts)
        cursor += cfg.prompts
        seed = cfg.seed * 1_000_003 + step
        questions, groups = policy.respond(queries, cfg.group, seed)  # [P], [P][G]
        answers = policy.answers(questions, groups)
        work = engine.report()
        rolled = time.perf_counter()

        # 2. matches in each group, judged -> ratings -> rewards -> advantages
        rewards = judged_rewards(referee, queries, answers, cfg.rating, cfg.opponents, seed)
        advantages = grpo.advantages(torch.tensor(rewards), cfg.scale)  # [P, G]
        work |= referee.report()
        judged = time.perf_counter()

        # 3. loss, gradient, AdamW
        update = policy_update(trainer, step, questions, groups, advantages, cfg, reference)
        engine.sync(trainer.model)
        trained = time.perf_counter()

        # 4. log, evaluate, save
        minutes += (trained - began) / 60
        times = {"rollout": rolled - began, "train": trained - judged}
        stats = {**curves.response_stats(queries, groups, answers, rewards), **update}
        stats |= curves.speeds(questions, groups, times) | work | {"minutes": minutes}
        if step % cfg.sample_every == 0 or step == 1:
            shown = curves.policy_sample(step, queries[0], groups[0], answers[0], rewards[0])
            run.append("samples.jsonl", shown)
        close_step(run, trainer, watch, step, stats, cursor=cursor)
    return run.interrupted() or finish(run, engine, watch)


def train_dpo(cfg, run):
    """DPO on pairs of responses that a judge has labelled, all before the first step."""
    trainer, engine = open_trainer(cfg)
    policy, referee = open_policy(cfg, engine), open_referee(cfg)
    source, path = open_queries(cfg, policy), run.folder / "preferences.jsonl"
    state = trainer.load(run)
    engine.sync(trainer.model)
    if state:
        labelled = preferences.load(path)
    else:
        labelled, work = preferences.label_pairs(policy, referee, source, cfg)
        reference_logprobs(trainer, labelled)
    start, minutes = state.get("step", 0), state.get("minutes", 0)
    watch = HeldOut(policy, referee, source, cfg, state.get("watch"))
    run.start(start)
    if start == 0:
        if run.main:
            preferences.save(path, labelled)
        stats = watch.evaluate()
        run.log(0, {**work, **stats}, curves.policy_line(stats))
    pairs = Reshuffled(labelled, cfg.seed)

    for step in run.steps(start):
        began = time.perf_counter()
        batch = pairs.take((step - 1) * cfg.batch, cfg.batch)
        stats = preference_update(trainer, step, batch, cfg)
        engine.sync(trainer.model)
        seconds = time.perf_counter() - began
        minutes += seconds / 60
        stats |= {"train/seconds": seconds, "minutes": minutes}
        close_step(run, trainer, watch, step, stats)
    return run.interrupted() or finish(run, engine, watch)


def close_step(run, trainer, watch, step, stats, **saved):
    """Evaluate, log and save where it is due. saved: what a resumed run needs beside the watch."""
    last = run.is_last()
    if step % run.config.eval_every == 0 or last:
        stats |= watch.evaluate()
    run.log(step, stats, curves.policy_line(stats))
    if step % run.config.save_every == 0 or last:
        saved |= {"minutes": stats["minutes"], "watch": watch.start}
        trainer.save(run, step, saved)


def finish(run, engine, watch):
    """Leave the trained policy, its curves and how it compares with its start, also in words."""
    run.finish(engine.model, engine.tokenizer, curves.POLICY_PANELS)
    lines = watch.compare_with_start()
    if run.main:
        write_json(run.folder / "best_of.json", lines)
    return comparison_text(lines)
