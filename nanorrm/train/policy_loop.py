"""Policies taught by a judge: GRPO on the matches of a group, and DPO on judged pairs."""

import json
import time

import torch

from nanorrm import files, ranks
from nanorrm.data.sources import Reshuffled, open_queries
from nanorrm.rank.referee import open_referee
from nanorrm.runs import Interrupt, explain, interrupted
from nanorrm.train import curves, grpo, preferences
from nanorrm.train.dpo import preference_update, reference_logprobs
from nanorrm.train.open import open_engine, open_weights
from nanorrm.train.policy import open_policy
from nanorrm.train.rewards import judged_rewards
from nanorrm.train.trainer import Trainer
from nanorrm.train.update import policy_update
from nanorrm.train.watch import HeldOut, comparison_text


def train_policy(cfg, run):
    """GRPO without labels: the responses to a query compete, and a judge decides their matches."""
    trainer, engine, policy, referee = open_policy_run(cfg)
    device = trainer.model.device
    reference = open_weights(cfg.model, cfg, device, train=False) if cfg.loss.kl else None
    source = open_queries(cfg, policy)
    state = trainer.load(run) if cfg.resume else {}
    start, minutes, cursor = (state.get(name, 0) for name in ("step", "minutes", "cursor"))
    engine.sync(trainer.model)
    watch = HeldOut(policy, referee, source, cfg, state.get("watch"))
    run.start(start, cfg.steps)
    if start == 0:
        stats = watch.evaluate()
        run.log(0, stats, curves.policy_line(stats))

    with Interrupt() as interrupt, explain(run, cfg):
        for step in range(start + 1, cfg.steps + 1):
            began = time.perf_counter()
            engine.report(), referee.report()  # forget the work of evaluations

            # 1. queries -> prompts -> G responses of each -> answers, without their thinking
            queries = source.take(cursor, cfg.prompts)
            cursor += cfg.prompts
            seed = cfg.seed * 1_000_003 + step
            questions, groups = policy.respond(queries, cfg.group, seed)  # [P], [P][G]
            answers = policy.answers(questions, groups)
            work = engine.report()
            rolled = time.perf_counter()

            # 2. matches in each group, judged -> ratings -> rewards -> advantages
            graded = judged_rewards(referee, queries, answers, cfg.rating, cfg.opponents, seed)
            rewards = torch.tensor(graded)  # [P, G]
            advantages = grpo.advantages(rewards, cfg.scale)
            work |= referee.report()
            judged = time.perf_counter()

            # 3. loss, gradient, AdamW
            update = policy_update(trainer, step, questions, groups, advantages, cfg, reference)
            engine.sync(trainer.model)
            trained = time.perf_counter()

            # 4. log, evaluate, save
            minutes += (trained - began) / 60
            times = {"rollout": rolled - began, "train": trained - judged}
            stats = {**curves.response_stats(queries, groups, answers, graded), **update}
            stats |= curves.speeds(questions, groups, times) | work
            last = step == cfg.steps or ranks.any_rank(interrupt.asked)
            if step % cfg.eval_every == 0 or last:
                stats |= watch.evaluate()
            if step % cfg.sample_every == 0 or step == 1:
                shown = curves.sample_record(queries[0], groups[0], answers[0], graded[0])
                run.append("samples.jsonl", {"step": step, **shown})
            run.log(step, {**stats, "minutes": minutes}, curves.policy_line(stats))
            if step % cfg.save_every == 0 or last:
                extra = {"minutes": minutes, "cursor": cursor, "watch": watch.start}
                trainer.save(run, step, extra)
            if last:
                break
    if ranks.any_rank(interrupt.asked):
        return interrupted(run, step)
    return finish_policy_run(run, engine, watch)


def train_dpo(cfg, run):
    """DPO on pairs of responses that a judge has labelled, all before the first step."""
    trainer, engine, policy, referee = open_policy_run(cfg)
    source = open_queries(cfg, policy)
    path = run.folder / "preferences.jsonl"
    if cfg.resume:
        labelled, state = preferences.load(path), trainer.load(run)
        start, minutes = state["step"], state["minutes"]
        engine.sync(trainer.model)
        watch = HeldOut(policy, referee, source, cfg, state["watch"])
        run.start(start, cfg.steps)
    else:
        labelled, work = preferences.label_pairs(policy, referee, source, cfg)
        reference_logprobs(trainer, labelled)
        watch = HeldOut(policy, referee, source, cfg)
        start = minutes = 0
        run.start(start, cfg.steps)
        if run.main:
            preferences.save(path, labelled)
        stats = watch.evaluate()
        run.log(0, {**work, **stats}, curves.policy_line(stats))
    rows = Reshuffled(labelled, cfg.seed)

    with Interrupt() as interrupt, explain(run, cfg):
        for step in range(start + 1, cfg.steps + 1):
            began = time.perf_counter()
            batch = rows.take((step - 1) * cfg.batch, cfg.batch)
            stats = preference_update(trainer, step, batch, cfg)
            engine.sync(trainer.model)
            stats["train/seconds"] = seconds = time.perf_counter() - began
            minutes += seconds / 60
            last = step == cfg.steps or ranks.any_rank(interrupt.asked)
            if step % cfg.eval_every == 0 or last:
                stats |= watch.evaluate()
            run.log(step, {**stats, "minutes": minutes}, curves.policy_line(stats))
            if step % cfg.save_every == 0 or last:
                trainer.save(run, step, {"minutes": minutes, "watch": watch.start})
            if last:
                break
    if ranks.any_rank(interrupt.asked):
        return interrupted(run, step)
    return finish_policy_run(run, engine, watch)


def open_policy_run(cfg):
    """(Trainer, its Engine, Policy, Referee) of a PolicyRunConfig."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Trainer(open_weights(cfg.model, cfg, device), cfg)
    engine = open_engine(cfg, trainer.model, device)
    if cfg.release_cache:
        engine.sleep()
    return trainer, engine, open_policy(cfg, engine), open_referee(cfg)


def finish_policy_run(run, engine, watch):
    """Leave the trained policy, its curves and how it compares with its start, also in words."""
    run.save_model(engine.model, engine.tokenizer)
    run.plot(curves.policy_panels)
    lines = watch.compare_with_start()
    if run.main:
        files.write_text(run.folder / "best_of.json", json.dumps(lines, indent=2) + "\n")
    return comparison_text(lines)
