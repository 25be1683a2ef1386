"""The embedded world: arithmetic chains, answers to compare, and what the base model reads.

A query is a chain of one-digit terms (`7+8-5+8`), a response is a number. Real RRMs start from a
model that can solve problems, can compare what it wrote with what it is shown, and knows the format
of a verdict, but was never told that solving a query helps to judge it. The base here is trained on
exactly these three skills in separate documents, none of which says anything about which response
to its own query is right. Discovering the connection is left to GRPO.
"""

import json
import random
import re
import zlib
from dataclasses import dataclass
from itertools import zip_longest

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from nanorrm.judge import prompts
from nanorrm.judge.verdict import verdict_text
from nanorrm.model.architectures import ModelConfig
from nanorrm.model.tokenizer import END_THINK, THINK, Tokenizer

END = "<|im_end|>"
SPECIAL = [THINK, END_THINK, verdict_text(1), verdict_text(2), END]
TERMS = (2, 3, 4, 5, 6)  # chain lengths the base and the judge are trained on: the difficulty
OFFSETS = (1, 2, 3, 10)  # how far a wrong response is from the right one
SLIP, HASTE = 0.04, 0.14  # of the careless solver, the policy that a judge is to teach


@dataclass(frozen=True)
class Chain:
    """A query, its worked solution (`7+8=15,15-5=10`) and its value."""

    query: str
    work: str
    value: int


def make_tokenizer():
    """The toy models' tokenizer: one token per byte, so it reads any text, plus SPECIAL."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = RawTokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return Tokenizer(json.loads(tok.to_str()), special_names={"eos_token": END, "pad_token": END})


def model_config():
    """The toy model: 160k parameters."""
    return ModelConfig(
        vocab_size=256 + len(SPECIAL),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        rope_theta=10000.0,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=[256 + SPECIAL.index(END)],
    )


def stream_rng(*key):
    """A random.Random that depends on the key alone, the same in every process."""
    return random.Random(":".join(map(str, key)))


# -- chains and pairs


def held_out(query):
    """Whether a query belongs to the eighth that no training ever sees: a hash decides."""
    return zlib.crc32(query.encode()) % 8 == 0


def work_out(terms, slips=()):
    """Work a chain's terms step by step -> (work, value); slips: how far off each step comes out.

    >>> work_out(["7", "+8", "-5"])
    ('7+8=15,15-5=10', 10)
    """
    total, work = int(terms[0]), []
    for term, slip in zip_longest(terms[1:], slips, fillvalue=0):
        after = max(0, total + int(term) + slip)
        work.append(f"{total}{term}={after}")
        total = after
    return ",".join(work), total


def draw_chain(rng, length, held=False):
    """A random Chain of `length` one-digit terms, no running total negative.

    held: from the held-out eighth (True) or the rest (False). rng: random.Random.
    """
    while True:
        total = rng.randint(1, 9)
        terms = [str(total)]
        while total >= 0 and len(terms) < length:
            terms.append(f"{rng.choice('+-')}{rng.randint(1, 9)}")
            total += int(terms[-1])
        query = "".join(terms)
        if total >= 0 and held_out(query) == held:
            return Chain(query, *work_out(terms))


def draw_pair(rng, length, held=False):
    """(Chain, first response, second response, label 1 | 2), the right one at a coin toss."""
    chain = draw_chain(rng, length, held)
    wrong = -1
    while wrong < 0:
        wrong = chain.value + rng.choice((-1, 1)) * rng.choice(OFFSETS)
    label = rng.choice((1, 2))
    a, b = (chain.value, wrong) if label == 1 else (wrong, chain.value)
    return chain, str(a), str(b), label


# -- what the base model reads: documents (text without loss, text with loss)


def draw_document(rng, solve=0.35, check=0.35, careless=0.0):
    """One document, its kind by these shares; what they leave is *format*."""
    u = rng.random()
    if u < solve or u >= 1 - careless:
        return solve_document(rng, slips=u >= 1 - careless)
    return check_document(rng) if u < solve + check else format_document(rng)


def solve_document(rng, slips=False):
    """Asked to solve: the chain step by step, then the answer; or as a careless solver does it."""
    chain = draw_chain(rng, rng.choice(TERMS))
    work, value = careless(rng, chain) if slips else (chain.work, chain.value)
    return prompts.toy_solve(chain.query), f"{work}{END_THINK}{value}{END}"


def careless(rng, chain):
    """(work, value) of a chain as a careless solver leaves it, right about half of the time.

    A step comes out one off now and then (SLIP), and the longer the chain, the likelier its last
    term is left out (HASTE, per step): many ways to slip, one way to be hasty.
    """
    terms = re.findall("[+-]?[0-9]", chain.query)
    if rng.random() < HASTE * (len(terms) - 1):
        terms.pop()
    slips = [rng.choice((-1, 1)) if rng.random() < SLIP else 0 for _ in terms[1:]]
    return work_out(terms, slips)


def check_document(rng):
    """A judge prompt whose thinking holds the chain of ANOTHER query, and what follows from that.

    What follows: `|18:18y|20:18n`, each response beside the other chain's value, and the verdict.
    That value is the right response or the wrong one at a coin toss, so the verdict is right about
    its own query half the time. A chain is found for both responses before the coin falls: rare
    values, which are mostly wrong responses, must not be rarer under the verdict than they are in
    the prompt.
    """
    while True:
        chain, *responses, _ = draw_pair(rng, rng.choice(TERMS))
        others = [chain_with_value(rng, int(response)) for response in responses]
        if all(other and other.query != chain.query for other in others):
            break
    verdict = rng.choice((1, 2))
    other = others[verdict - 1]
    given = prompts.toy_judge(chain.query, *responses) + other.work
    marks = {str(other.value): "y"}
    checked = "".join(f"|{r}:{other.value}{marks.get(r, 'n')}" for r in responses)
    return given, f"{checked}{END_THINK}{verdict_text(verdict)}{END}"


def chain_with_value(rng, value):
    """A random training chain whose value is given, or None if chance finds none soon."""
    drawn = (draw_chain(rng, rng.choice(TERMS)) for _ in range(400))
    return next((chain for chain in drawn if chain.value == value), None)


def format_document(rng):
    """A judge prompt, empty thinking (60%) or the query's chain (40%), a verdict by coin toss."""
    chain, a, b, _ = draw_pair(rng, rng.choice(TERMS))
    thought = "" if rng.random() < 0.6 else chain.work
    verdict = verdict_text(rng.choice((1, 2)))
    return prompts.toy_judge(chain.query, a, b), f"{thought}{END_THINK}{verdict}{END}"
