"""The whole idea in one file: by +1 and -1 alone, a tiny judge discovers that thinking helps.

A judge reads a sum and two answers, one of them right, and says which. It may think first, in any
way it likes or not at all; nobody shows it how. Here is one that has learnt to:

    ?7+4+1-8
    1:2
    2:4
    <think>7+4=11,11+1=12,12-8=4|2:4n|4:4y</think>\\boxed{Assistant 2}

It starts from the shipped base, 160 thousand weights which can work out a sum when asked to, can
compare answers with a result, know what a verdict looks like, and judge at chance: nothing they
have read says that the first helps with the last. A step of training (GRPO) is then

    pairs -> prompts -> rollouts, G of each -> +1 or -1 -> advantages -> loss -> AdamW

and `python experiments/one_file.py` makes 60 of them in 3 minutes of one core (2 CPU cores, shared:
6 to 13 by the clock). Seeds 0, 1, 2 judged 54, 56, 55% of 200 held-out pairs right at first, 90%
after 25, 30, 30 steps, 98, 97, 98.5% at the end; the output grew from 12 tokens to 35.

The library is the same idea, grown up; the tests hold this file to it:

    1. the world     nanorrm/data/toy.py: the same pairs; and the documents the base has read
    2. the words     nanorrm/judge/prompts.py, judge/verdict.py: any two texts, trusted or not
    3. the model     nanorrm/model/transformer.py, kernels/: packed sequences, no logits in memory
    4. the rollouts  nanorrm/engine/: a paged cache; what prompts have in common is computed once
    5. the lesson    nanorrm/train/grpo.py, train/trainer.py: DAPO, Dr. GRPO, KL, many GPUs
    6. the loop      train.py: any pairs, checkpoints, logs

Letters: B sequences (R unfinished), T tokens (N drawn), V vocabulary, C hidden, H heads of size D.
"""

import argparse
import json
import random
import re
import signal
import time
import zlib
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

BASE = Path(__file__).resolve().parents[1] / "nanorrm" / "assets" / "toy_base"
P, G = 64, 8  # pairs of a step, rollouts of each: B = P*G sequences
MAX_TOKENS = 96  # of a rollout
LEARNING_RATE, WARMUP = 1.5e-4, 5  # it rises over the first so many steps
CLIP = 0.2  # see policy_loss
TERMS = (2, 3, 4, 5, 6)  # lengths of sums
EXAM = 200  # pairs that training never sees

# -- 1. the world: sums, and a right and a wrong answer to each

Pair = namedtuple("Pair", "query a b label")  # label: 1 if a is right, 2 if b is


def draw_pair(rng, terms, held_out=False):
    """A sum of one-digit terms, its value, and a wrong number near it: a coin decides their order.

    A hash holds an eighth of all sums out of training, for the exam. No sum falls below zero.
    """
    total, query = -1, ""
    while total < 0 or held_out != (zlib.crc32(query.encode()) % 8 == 0):
        total = rng.randint(1, 9)
        query = str(total)
        while total >= 0 and len(query) < 2 * terms - 1:
            sign, digit = rng.choice("+-"), rng.randint(1, 9)
            total += digit if sign == "+" else -digit
            query += f"{sign}{digit}"
    wrong = -1
    while wrong < 0:
        wrong = total + rng.choice((-1, 1)) * rng.choice((1, 2, 3, 10))
    label = rng.choice((1, 2))
    a, b = (total, wrong) if label == 1 else (wrong, total)
    return Pair(query, str(a), str(b), label)


# -- 2. the words: what the judge reads, and how it is understood


def prompt(pair):
    """The judge goes on inside the opened thinking."""
    return f"?{pair.query}\n1:{pair.a}\n2:{pair.b}\n<think>"


def reward(text, label):
    r"""+1 for the right verdict, the last box after the thinking; -1 for a wrong one or none.

    >>> reward(r"7+4=11</think>\boxed{Assistant 2}", 2), reward(r"\boxed{Assistant 2}", 2)
    (1.0, -1.0)
    """
    _, closed, answer = text.rpartition("</think>")
    boxes = re.findall(r"\\boxed\{([^}\\]*)\}", answer)
    return 1.0 if closed and boxes and boxes[-1] == f"Assistant {label}" else -1.0


# -- 3. the model: a transformer of the Qwen2 kind


class Model:
    """A Hugging Face folder: weights by their names, tokenizer, settings."""

    def __init__(self, folder):
        weights = load_file(folder / "model.safetensors")
        self.weights = {name: weight.requires_grad_() for name, weight in weights.items()}
        self.embedding = self.weights["model.embed_tokens.weight"]  # [V, C], of the output too
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        c = json.loads((folder / "config.json").read_text())
        self.layers, self.heads = c["num_hidden_layers"], c["num_attention_heads"]
        self.head_size, self.end = c["head_dim"], c["eos_token_id"][0]
        self.theta, self.eps = c["rope_theta"], c["rms_norm_eps"]

    def linear(self, name, x):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name, x):
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.eps)

    def hidden(self, ids, cache=None, start=0):
        """ids [B, T], at positions start and on (T is 1, or start is 0) -> [B, T, C].

        cache [layers, 2, B, H, T, D]: keys and values of earlier positions; those of ids are added.
        """
        B, T = ids.shape
        x = F.embedding(ids, self.embedding)  # [B, T, C]
        for layer in range(self.layers):
            name = f"model.layers.{layer}"
            y = self.norm(f"{name}.input_layernorm", x)
            q, k, v = (self.linear(f"{name}.self_attn.{part}_proj", y) for part in "qkv")
            # [B, T, C] -> [B, H, T, D]
            q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in (q, k, v))
            q, k = rotate(q, start, self.theta), rotate(k, start, self.theta)
            if cache is not None:
                cache[layer, ..., start : start + T, :] = torch.stack((k, v))
                k, v = cache[layer, ..., : start + T, :]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
            y = y.transpose(1, 2).reshape(B, T, -1)  # [B, H, T, D] -> [B, T, C]
            x = x + self.linear(f"{name}.self_attn.o_proj", y)
            y = self.norm(f"{name}.post_attention_layernorm", x)
            gate, up = (self.linear(f"{name}.mlp.{part}_proj", y) for part in ("gate", "up"))
            x = x + self.linear(f"{name}.mlp.down_proj", F.silu(gate) * up)
        return self.norm("model.norm", x)


def rotate(x, start, theta):
    """RoPE: dimensions i and i + D/2 of x [B, H, T, D] turn, the further the later in the text."""
    T, D = x.shape[-2:]
    speeds = 1 / theta ** (torch.arange(0, D, 2) / D)  # [D/2], radians per position
    angles = torch.arange(start, start + T)[:, None] * speeds  # [T, D/2]
    cos, sin, one, two = angles.cos(), angles.sin(), *x.chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)


# -- 4. the rollouts: all rows write at once, a token each at a time

# ids [B, T]: prompts and completions; drawn [B, T]: which ids were drawn, up to the end token;
# logp [B, T]: their log-probs; texts: B completions; rewards [B]
Rollouts = namedtuple("Rollouts", "ids drawn logp texts rewards")


@torch.no_grad()
def roll_out(model, pairs, greedy=False):
    """A completion for each of B pairs, at temperature 1 (greedy: the likeliest tokens).

    Prompts are read a token at a time too: at time t each row has read what stands before t, and
    what it draws is written at t if its prompt is over. So nothing is padded on the left.
    """
    encoded = model.tokenizer.encode_batch([prompt(pair) for pair in pairs])
    starts = torch.tensor([len(known) for known in encoded])  # [B]
    B, T = len(pairs), int(starts.max()) + MAX_TOKENS
    ids, logp = torch.full((B, T), model.end), torch.zeros(B, T)
    for row, known in zip(ids, encoded):
        row[: len(known)] = torch.tensor(known.ids)
    rows = torch.arange(B)  # [R], those still here
    cache = torch.zeros(model.layers, 2, B, model.heads, T, model.head_size)
    for t in range(1, T):
        hidden = model.hidden(ids[rows, t - 1 : t], cache, t - 1)  # [R, 1, C]
        probs = (hidden[:, 0] @ model.embedding.T).softmax(-1)  # [R, V]
        token = probs.argmax(-1) if greedy else torch.multinomial(probs, 1)[:, 0]  # [R]
        ids[rows, t] = torch.where(starts[rows] <= t, token, ids[rows, t])
        logp[rows, t] = probs.gather(1, token[:, None])[:, 0].log()
        writing = (ids[rows, : t + 1] != model.end).all(1)  # [R]
        if 2 * writing.sum() <= len(rows):  # those who are done leave, but half at a time:
            rows, cache = rows[writing], cache[:, :, writing]  # this copies the others' cache
        if not len(rows):
            break
    since, ends = torch.arange(T) - starts[:, None], (ids == model.end).int()  # [B, T]
    drawn = (since >= 0) & (since < MAX_TOKENS) & (ends.cumsum(1) - ends == 0)
    written = [row[own].tolist() for row, own in zip(ids, drawn)]
    texts = model.tokenizer.decode_batch(written, skip_special_tokens=False)
    rewards = torch.tensor([reward(text, pair.label) for text, pair in zip(texts, pairs)])
    return Rollouts(ids, drawn, logp, texts, rewards)


# -- 5. the lesson: what did better than its group becomes likelier


def advantages(rewards):
    """How much better than its group each rollout was, in standard deviations. [P, G] -> [P, G].

    >>> advantages(torch.tensor([[1.0, -1, -1, -1, 1, 1, 1, -1]]))[0, :2]  # half of 8 right
    tensor([ 0.9354, -0.9354])
    """
    centred = rewards - rewards.mean(1, keepdim=True)  # zero if all are alike: nothing to learn
    return centred / (rewards.std(1, keepdim=True) + 1e-6)  # of a sample: ddof = 1


def policy_loss(logp, old_logp, advantage):
    """The loss of each token. log-probs now and when drawn, advantage of its rollout, [N] -> [N].

    A token may become likelier, or less likely, by a share of CLIP; then it has no gradient left.
    With one update of a batch, as here, the ratio is 1 and its gradient that of advantage * logp.
    """
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def logprobs(model, ids, drawn):
    """Log-probs [N], with gradient, of the drawn ones among ids [B, T]."""
    hidden = model.hidden(ids)[:, :-1][drawn[:, 1:]]  # [N, C]: each from the place before its own
    logp = (hidden @ model.embedding.T).log_softmax(-1)  # [N, V]
    return logp.gather(1, ids[drawn][:, None])[:, 0]


def learn(model, optimizer, rollouts, advantage):
    """One step of AdamW on B rollouts and their advantages [B]. All tokens count the same."""
    lengths = (rollouts.drawn * torch.arange(rollouts.ids.shape[1])).amax(1) + 1  # [B]
    for rows in lengths.argsort().split(64):  # of like lengths: little is padding
        ids, drawn, old_logp = (x[rows, : lengths[rows].max()] for x in rollouts[:3])  # [64, T]
        owners = torch.nonzero(drawn)[:, 0]  # [N], the row of each token
        losses = policy_loss(logprobs(model, ids, drawn), old_logp[drawn], advantage[rows][owners])
        (losses.sum() / rollouts.drawn.sum()).backward()  # the parts' gradients add up
    torch.nn.utils.clip_grad_norm_(model.weights.values(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


# -- 6. the loop


def train(model, exam, steps, seed):
    """Teach the model, and print how it fares on the pairs of the exam every 5 steps."""
    rng, began = random.Random(seed), time.perf_counter()
    torch.manual_seed(rng.getrandbits(63))  # of the draws
    optimizer = torch.optim.AdamW(model.weights.values(), weight_decay=0.0)
    print("step  minutes  tokens  right, of held-out pairs (one sampled verdict each)")
    for step in range(steps + 1):
        if step > 0:
            pairs = [draw_pair(rng, rng.choice(TERMS)) for _ in range(P)]
            rollouts = roll_out(model, [pair for pair in pairs for _ in range(G)])
            advantage = advantages(rollouts.rewards.view(P, G)).flatten()  # [B] -> [P, G] -> [B]
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, step / WARMUP)
            learn(model, optimizer, rollouts, advantage)
        if step % 5 == 0 or step == steps:
            answers = roll_out(model, exam)
            minutes, tokens = (time.perf_counter() - began) / 60, answers.drawn.sum() / len(exam)
            right = (answers.rewards > 0).float().mean().item()
            line = f"{step:4d} {minutes:8.1f} {tokens:7.1f} {right:6.1%}  {'#' * round(40 * right)}"
            print(line, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="of GRPO (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of pairs and draws (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    settings = parser.parse_args()
    if min(settings.steps, settings.threads) < 1:
        parser.error("--steps and --threads should be at least 1")
    if not BASE.exists():
        parser.error(f"no folder {BASE}: run the file inside its repository")
    torch.set_num_threads(settings.threads)
    rng = random.Random("held-out")  # the same pairs for every seed, as many of each length
    exam = [draw_pair(rng, TERMS[i % len(TERMS)], held_out=True) for i in range(EXAM)]
    model, pair = Model(BASE), exam[2]
    (before,) = roll_out(model, [pair], greedy=True).texts
    train(model, exam, settings.steps, settings.seed)
    (after,) = roll_out(model, [pair], greedy=True).texts
    print(f"\n{pair.query}  1: {pair.a}  2: {pair.b}  (right: {pair.label})")
    print(f"  before  {before}\n  after   {after}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    main()
