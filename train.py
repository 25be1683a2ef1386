"""Train a judge (`python train.py judge`) or the toy base model it starts from (`... base`).

The judge's loop is GRPO in full, to be read from `train_judge` down:

    pairs -> prompts -> engine (G rollouts each) -> rewards -> advantages -> loss -> AdamW -> log

`python train.py judge --help` lists every setting; `--config configs/direct.toml` takes a preset.
"""

import copy
import math
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace

import torch

import kernels
from nanorrm import grpo, metrics, packing, prompts, toy
from nanorrm.checkpoint import load_state, read_json, save_state
from nanorrm.config import BaseConfig, JudgeConfig, UserError, parse_command, run_script
from nanorrm.data import FileSource, ToySource, read_pairs
from nanorrm.engine import Engine
from nanorrm.judge import Judge
from nanorrm.log import Interrupt, Run, judge_line, judge_panels, plot, run_folder
from nanorrm.model import Transformer
from nanorrm.rewards import verdict_reward
from nanorrm.sampling import SamplingParams


def train_judge(cfg, run):
    """GRPO on +1 for the right verdict and -1 otherwise: nothing shows the model how to think."""
    engine = Engine.from_pretrained(cfg.model, cfg.engine)
    model, tokenizer = engine.model, engine.tokenizer
    reference = copy.deepcopy(model) if cfg.kl > 0 else None
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay
    )
    template = prompts.template_of(tokenizer) if cfg.template == "auto" else cfg.template
    judge = Judge(engine, template, cfg.temperature, cfg.max_tokens, cfg.think)
    judge.check_fits()
    source = open_source(cfg, judge)
    held_out = source.held_out(cfg.eval_pairs)
    state = load_state(run.folder, model, optimizer) if cfg.resume else {}
    start, minutes = state.get("step", 0), state.get("minutes", 0.0)
    run.start(start, cfg.steps)
    before = state.get("before") or show(judge, held_out[:3])
    if start == 0:
        stats = evaluate(judge, held_out, cfg.max_think_tokens)
        run.log(0, stats, judge_line(stats))

    with Interrupt() as interrupt:
        for step in range(start + 1, cfg.steps + 1):
            began = time.perf_counter()

            # 1. pairs -> prompts
            pairs = source.batch(step, cfg.prompts)
            questions = [judge.prompt(pair) for pair in pairs]  # P lists of ids

            # 2. engine: G rollouts of each
            sampling = SamplingParams(
                n=cfg.group,
                temperature=cfg.temperature,
                max_tokens=cfg.max_tokens,
                max_think_tokens=cfg.max_think_tokens,
                seed=cfg.seed * 1_000_003 + step,
            )
            engine.report()  # forget the work of evaluations
            each = seeds_apart(sampling, questions)
            groups = engine.generate(questions, each)  # [P][G] completions
            work = engine.report()
            rolled = time.perf_counter()

            # 3. rewards: read each verdict, compare it with the label
            graded = [
                [verdict_reward(rollout.text, pair.label, not cfg.think) for rollout in group]
                for pair, group in zip(pairs, groups)
            ]
            rewards = torch.tensor([[reward for reward, _ in group] for group in graded])  # [P, G]

            # 4. advantages: how much better than its own group
            advantages = grpo.advantages(rewards, cfg.scale)  # [P, G]

            # 5. loss, gradient, AdamW
            warm = min(1.0, step / max(1, cfg.warmup_steps))
            set_learning_rate(optimizer, cfg.learning_rate * warm)
            update = policy_update(model, optimizer, questions, groups, advantages, cfg, reference)
            engine.sync()  # the weights changed: no cached prefix may survive
            trained = time.perf_counter()

            # 6. log, evaluate, save
            minutes += (trained - began) / 60
            times = {"rollout": rolled - began, "train": trained - rolled}
            stats = {**metrics.rollout_stats(graded, groups), **update}
            stats |= metrics.speeds(questions, groups, times) | work
            out_of_time = cfg.max_minutes and minutes >= cfg.max_minutes
            last = step == cfg.steps or out_of_time or interrupt.asked
            if step % cfg.eval_every == 0 or last:
                stats |= evaluate(judge, held_out, cfg.max_think_tokens)
            if step % cfg.sample_every == 0 or step == 1:
                log_samples(run, step, pairs[0], groups[0], graded[0])
            run.log(step, {**stats, "minutes": minutes}, judge_line(stats))
            if step % cfg.save_every == 0 or last:
                extra = {"minutes": minutes, "before": before}
                save_state(run.folder, step, model, optimizer, extra)
            if last:
                break
    if interrupt.asked:
        return f"interrupted: saved at step {step}; --resume --name {run.folder.name} continues"

    model.save_pretrained(run.folder / "model", tokenizer)
    plot(run.folder / "plot.png", judge_panels(run.metrics()), f"{run.folder.name}: GRPO")
    return "\n".join(examples(held_out[:3], before, show(judge, held_out[:3])))


def policy_update(model, optimizer, questions, groups, advantages, cfg, reference=None):
    """One optimizer step on all rollouts of a batch. Returns metrics of the update."""
    samples = [
        packing.Sample(
            question,
            rollout.ids,
            {
                "advantage": [advantage] * len(rollout.ids),
                "rollout_logp": rollout.logprobs,
                "mask": [float(not forced) for forced in rollout.forced],
            },
        )
        for question, group, row in zip(questions, groups, advantages.tolist())
        for rollout, advantage in zip(group, row)
    ]
    total = max(1.0, sum(sum(sample.values["mask"]) for sample in samples))
    loss_config = grpo.LossConfig(kl=cfg.kl)
    sums, largest = Counter(), 0.0
    for batch in packing.pack(samples, cfg.micro_tokens, model.device):
        logp, entropy = token_logprobs(model, batch, cfg.temperature)
        with torch.no_grad():
            ref_logp = None
            if reference is not None:
                ref_logp, _ = token_logprobs(reference, batch, cfg.temperature)
        values = batch.values
        loss, parts = grpo.policy_loss(
            logp,
            logp.detach(),  # one update per batch: the old policy is the current one
            values["rollout_logp"],
            values["advantage"],
            values["mask"],
            loss_config,
            total,
            ref_logp,
        )
        loss.backward()
        largest = max(largest, parts.pop("sampler/logp_diff_max").item())
        sums.update({name: part.item() for name, part in parts.items()})
        sums["loss"] += loss.item() * total
        sums["entropy"] += (entropy.detach() * values["mask"]).sum().item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm).item()
    check_finite(norm, optimizer)
    optimizer.step()
    optimizer.zero_grad()
    means = {name: value / total for name, value in sums.items()}
    means["sampler/logp_diff_rms"] = means.pop("sampler/logp_diff_squared") ** 0.5
    return {
        **means,
        "sampler/logp_diff_max": largest,
        "grad_norm": norm,
        "learning_rate": optimizer.param_groups[0]["lr"],
    }


def token_logprobs(model, batch, temperature=1.0):
    """Packed batch -> log-prob and entropy of its target tokens, each [N]."""
    hidden = model(batch.ids, batch.cu_seqlens)[batch.rows]  # [T, C] -> [N, C]
    return kernels.logprob(hidden, model.head, batch.targets, temperature)


# -- what the loop measures


def evaluate(judge, pairs, budget=None):
    """Accuracy on held-out pairs, in all and by difficulty where the pairs have one."""
    if not pairs:
        return {}
    verdicts = judge.compare(pairs, both_orders=False, max_think_tokens=budget)
    stats = {"eval/accuracy": metrics.summarize(pairs, verdicts)["accuracy"]}
    for terms in sorted({pair.meta["terms"] for pair in pairs if "terms" in pair.meta}):
        chosen = [(p, v) for p, v in zip(pairs, verdicts) if p.meta["terms"] == terms]
        stats[f"eval/accuracy_{terms}_terms"] = metrics.summarize(*zip(*chosen))["accuracy"]
    return stats


def log_samples(run, step, pair, group, graded):
    """One pair's rollouts with their rewards, to samples.jsonl."""
    rollouts = [
        {"text": rollout.text, "reward": reward, "verdict": verdict}
        for rollout, (reward, verdict) in zip(group, graded)
    ]
    shown = {"query": pair.query, "a": pair.a, "b": pair.b, "label": pair.label}
    run.append("samples.jsonl", {"step": step, **shown, "rollouts": rollouts})


def show(judge, pairs):
    """[(thought, verdict), ...] of pairs, by one vote each in the given order: the examples."""
    verdicts = judge.compare(pairs, both_orders=False)
    return [(v.thoughts[0] if v.thoughts else "", v.winner) for v in verdicts]


def examples(pairs, before, after):
    """Held-out pairs with the thinking before and after training, as lines of text."""
    for pair, *answers in zip(pairs, before, after):
        query, a, b = (textwrap.shorten(str(text), 200) for text in (pair.query, pair.a, pair.b))
        yield f"\n{query!r}  1: {a!r}  2: {b!r}  (right: {pair.label})"
        for when, (thought, winner) in zip(("before", "after"), answers):
            mark = "right" if winner == pair.label else "wrong"
            yield f"  {when:6s} thinks {textwrap.shorten(thought, 400)!r}, says {winner} ({mark})"


# -- the base model of the embedded world


def train_base(cfg, run):
    """Pre-train the toy base on documents of the embedded world, loss on the completions only."""
    tokenizer = toy.make_tokenizer()
    model = Transformer(toy.model_config()).init_weights(cfg.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay
    )
    state = load_state(run.folder, model, optimizer) if cfg.resume else {}
    start = state.get("step", 0)
    run.start(start, cfg.steps)
    with Interrupt() as interrupt:
        for step in range(start + 1, cfg.steps + 1):
            began = time.perf_counter()
            rng = toy.stream_rng("base", cfg.seed, step)
            drawn = [toy.draw_document(rng, cfg.solve, cfg.check) for _ in range(cfg.documents)]
            encode = tokenizer.encode_template
            samples = [packing.Sample(encode(given), encode(rest), {}) for given, rest in drawn]
            batch = packing.join(samples, model.device)
            loss = -token_logprobs(model, batch)[0].mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm).item()
            left = (cfg.steps - step + 1) / max(1, cfg.steps - cfg.warmup_steps)
            warm = min(1.0, step / max(1, cfg.warmup_steps))
            set_learning_rate(optimizer, cfg.learning_rate * min(warm, left))
            optimizer.step()
            optimizer.zero_grad()
            last = step == cfg.steps or interrupt.asked
            seconds = time.perf_counter() - began
            stats = {"loss": loss.item(), "grad_norm": norm, "step/seconds": seconds}
            stats["train/tokens_per_s"] = len(batch.ids) / seconds
            line = f"loss {stats['loss']:.4f}  grad {norm:.2f}  {seconds:.2f} s"
            run.log(step, stats, line, quiet=step % 50 and not last)
            if step % cfg.save_every == 0 or last:
                save_state(run.folder, step, model, optimizer, {})
            if last:
                break
    if interrupt.asked:
        return f"interrupted: saved at step {step}; --resume --name {run.folder.name} continues"
    model.save_pretrained(run.folder / "model", tokenizer)
    return "try it: python eval.py toy --model " + str(run.folder / "model")


# -- shared


def open_source(cfg, judge):
    """Where pairs come from. Pairs of a file that do not fit the model are dropped and counted."""
    if cfg.data == "toy":
        return ToySource(cfg.seed)
    pairs, params = read_pairs(cfg.data), SamplingParams(max_tokens=cfg.max_tokens)
    fitting, why = [], Counter()
    for pair in pairs:
        try:
            refusal = judge.backend.refusal(judge.prompt(pair), params) and "too long"
        except UserError as error:
            refusal = str(error)
        if pair.label is None:
            refusal = "no label"
        if refusal:
            why[refusal] += 1
        else:
            fitting.append(pair)
    dropped = "; ".join(f"{n} dropped: {reason}" for reason, n in why.items()) or "none dropped"
    print(f"{cfg.data}: {len(pairs)} pairs, {dropped}")
    return FileSource(fitting, cfg.seed, cfg.eval_share)


def seeds_apart(params, questions):
    """One SamplingParams per prompt: equal prompts of a batch get seeds of their own, or they would
    be answered alike."""
    seen = Counter()
    each = []
    for question in map(tuple, questions):
        each.append(replace(params, seed=params.seed + seen[question] * 2**48))
        seen[question] += 1
    return each


def check_finite(norm, optimizer):
    """Stop before a step that would ruin the weights; the last checkpoint stays."""
    if not math.isfinite(norm):
        rate = optimizer.param_groups[0]["lr"]
        raise UserError(
            f"the gradient is {norm} at learning rate {rate:g}: nothing was saved since the last "
            "checkpoint; --resume with a lower --learning-rate"
        )


def set_learning_rate(optimizer, rate):
    """The same rate for every parameter."""
    for group in optimizer.param_groups:
        group["lr"] = rate


STAGES = {"base": (BaseConfig, train_base), "judge": (JudgeConfig, train_judge)}


def saved_config(stage, cfg):
    """The settings a run was started with, which a resumed one keeps unless told otherwise."""
    folder = run_folder(stage, cfg)
    return folder.name, read_json(folder / "config.json")["config"]


def main():
    stage, cfg = parse_command(STAGES, __doc__, sys.argv[1:], saved_config)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    with Run(stage, cfg) as run:
        closing = STAGES[stage][1](cfg, run)
    print(f"{closing}\nrun folder: {run.folder}")


if __name__ == "__main__":
    run_script(main)
