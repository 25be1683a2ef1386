"""Train a judge (`python train.py judge`) or the toy base it starts from (`... base`); or a policy
with a judge in the place of labels, by GRPO (`... policy`) or DPO (`... dpo`).

The judge's loop is GRPO in full, to be read from `train_judge` down:

    pairs -> prompts -> engine (G rollouts each) -> rewards -> advantages -> loss -> AdamW -> log

`python train.py judge --help` lists every setting; `--config configs/direct.toml` takes a preset.
"""

import sys
import textwrap
import time

import torch

from nanorrm import config, ranks
from nanorrm.cli import parse_command, run_script
from nanorrm.config import UserError
from nanorrm.data.sources import open_source
from nanorrm.engine.sampling import SamplingParams, seeds_apart
from nanorrm.files import read_json
from nanorrm.judge import prompts
from nanorrm.judge.judge import Judge
from nanorrm.measure import metrics
from nanorrm.measure.patterns import patterns
from nanorrm.runs import Interrupt, Run, explain, interrupted, run_folder
from nanorrm.train import curves, grpo
from nanorrm.train.base_loop import train_base
from nanorrm.train.open import open_engine, open_weights
from nanorrm.train.policy_loop import train_dpo, train_policy
from nanorrm.train.rewards import verdict_reward
from nanorrm.train.trainer import Trainer
from nanorrm.train.update import policy_update


def train_judge(cfg, run):
    """GRPO on +1 for the right verdict and -1 otherwise: nothing shows the model how to think."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Trainer(open_weights(cfg.model, cfg, device), cfg)
    reference = open_weights(cfg.model, cfg, device, train=False) if cfg.loss.kl else None
    engine = open_engine(cfg, trainer.model, device)
    template = prompts.template_of(engine.tokenizer) if cfg.template == "auto" else cfg.template
    judge = Judge(
        ranks.RankSharedEngine(engine), template, cfg.temperature, cfg.max_tokens, cfg.think
    )
    judge.check_fits()
    source = open_source(cfg, judge)
    held_out = source.held_out(cfg.eval_pairs)
    state = trainer.load(run) if cfg.resume else {}
    engine.sync(trainer.model)
    start, minutes, cursor = (state.get(name, 0) for name in ("step", "minutes", "cursor"))
    run.start(start, cfg.steps)
    before = state.get("before") or show(judge, held_out[:3], cfg.max_think_tokens)
    if start == 0:
        stats = evaluate(judge, held_out, cfg.max_think_tokens)
        run.log(0, stats, curves.judge_line(stats))

    with Interrupt() as interrupt, explain(run, cfg):
        for step in range(start + 1, cfg.steps + 1):
            began = time.perf_counter()
            engine.report()  # forget the work of evaluations

            # 1. to 3. pairs -> prompts -> G rollouts of each -> rewards
            batch, cursor = collect(judge, source, cursor, step, cfg)
            pairs, questions, groups, graded = zip(*batch)  # P of each
            rewards = torch.tensor([[reward for reward, _ in group] for group in graded])  # [P, G]
            work = engine.report()
            rolled = time.perf_counter()

            # 4. advantages: how much better than its own group
            advantages = grpo.advantages(rewards, cfg.scale)  # [P, G]

            # 5. loss, gradient, AdamW
            if cfg.release_cache:
                engine.sleep()
            update = policy_update(trainer, step, questions, groups, advantages, cfg, reference)
            engine.sync(trainer.model)  # the weights changed: no cached prefix may survive
            trained = time.perf_counter()

            # 6. log, evaluate, save
            minutes += (trained - began) / 60
            times = {"rollout": rolled - began, "train": trained - rolled}
            stats = {**curves.rollout_stats(graded, groups), **update}
            stats |= curves.speeds(questions, groups, times) | work
            out_of_time = cfg.max_minutes and minutes >= cfg.max_minutes
            last = step == cfg.steps or ranks.any_rank(out_of_time or interrupt.asked)
            if step % cfg.eval_every == 0 or last:
                stats |= evaluate(judge, held_out, cfg.max_think_tokens)
            if step % cfg.sample_every == 0 or step == 1:
                log_samples(run, step, pairs[0], groups[0], graded[0])
            run.log(step, {**stats, "minutes": minutes}, curves.judge_line(stats))
            if step % cfg.save_every == 0 or last:
                trainer.save(run, step, {"minutes": minutes, "cursor": cursor, "before": before})
            if last:
                break
    if ranks.any_rank(interrupt.asked):
        return interrupted(run, step)
    run.save_model(engine.model, engine.tokenizer)
    run.plot(curves.judge_panels)
    after = show(judge, held_out[:3], cfg.max_think_tokens)
    return "\n".join(examples(held_out[:3], before, after))


def collect(judge, source, cursor, step, cfg):
    """P x (pair, question ids, G Completions, G (reward, verdict)), and the source's new cursor.

    With cfg.refills, groups in which all rewards are equal teach nothing and are replaced by those
    of further pairs, at most so many times; what is then missing is filled with such groups.
    """
    batch, idle = [], []
    for refill in range(cfg.refills + 1):
        pairs = source.take(cursor, cfg.prompts - len(batch))
        cursor += len(pairs)
        questions = [judge.prompt(pair) for pair in pairs]  # lists of ids
        sampling = SamplingParams(
            n=cfg.group,
            temperature=cfg.temperature,
            max_tokens=cfg.max_tokens,
            max_think_tokens=cfg.max_think_tokens,
            seed=cfg.seed * 1_000_003 + step + refill * 2**40,
        )
        groups = judge.backend.generate(questions, seeds_apart(sampling, questions))
        graded = [
            [verdict_reward(rollout.text, pair.label, not cfg.think) for rollout in group]
            for pair, group in zip(pairs, groups)
        ]
        rewards = torch.tensor([[reward for reward, _ in group] for group in graded])  # [P, G]
        rolls = zip(pairs, questions, groups, graded)
        for rolled, teaches in zip(rolls, grpo.informative(rewards).tolist()):
            (batch if teaches or not cfg.refills else idle).append(rolled)
        if len(batch) == cfg.prompts:
            break
    return (batch + idle)[: cfg.prompts], cursor


# -- what the loop measures


def evaluate(judge, pairs, budget=None):
    """Accuracy on held-out pairs, in all and by difficulty, and the patterns of their thinking."""
    if not pairs:
        return {}
    verdicts = judge.compare(pairs, both_orders=False, max_think_tokens=budget)
    stats = {"eval/accuracy": metrics.summarize(pairs, verdicts)["accuracy"]}
    for terms in sorted({pair.meta["terms"] for pair in pairs if "terms" in pair.meta}):
        chosen = [(p, v) for p, v in zip(pairs, verdicts) if p.meta.get("terms") == terms]
        stats[f"eval/accuracy_{terms}_terms"] = metrics.summarize(*zip(*chosen))["accuracy"]
    shares = patterns([thought for verdict in verdicts for thought in verdict.thoughts])
    return stats | {f"eval/patterns_{group}": share for group, share in shares.items()}


def log_samples(run, step, pair, group, graded):
    """One pair's rollouts with their rewards, to samples.jsonl."""
    rollouts = [
        {"text": rollout.text, "reward": reward, "verdict": verdict}
        for rollout, (reward, verdict) in zip(group, graded)
    ]
    shown = {"query": pair.query, "a": pair.a, "b": pair.b, "label": pair.label}
    run.append("samples.jsonl", {"step": step, **shown, "rollouts": rollouts})


def show(judge, pairs, budget=None):
    """[(thought, verdict), ...] of pairs, by one vote each in the given order: the examples."""
    verdicts = judge.compare(pairs, both_orders=False, max_think_tokens=budget)
    return [(v.thoughts[0] if v.thoughts else "", v.winner) for v in verdicts]


def examples(pairs, before, after):
    """Held-out pairs with the thinking before and after training, as lines of text."""
    for pair, *answers in zip(pairs, before, after):
        query, a, b = (textwrap.shorten(str(text), 200) for text in (pair.query, pair.a, pair.b))
        yield f"\n{query!r}  1: {a!r}  2: {b!r}  (right: {pair.label})"
        for when, (thought, winner) in zip(("before", "after"), answers):
            mark = "right" if winner == pair.label else "wrong"
            yield f"  {when:6s} thinks {textwrap.shorten(thought, 400)!r}, says {winner} ({mark})"


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
