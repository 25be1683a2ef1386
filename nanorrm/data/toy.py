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


def held_out(query):
    """Whether a query belongs to the eighth that no training ever sees: a hash decides."""
    return zlib.crc32(query.encode()) % 8 == 0


def draw_chain(rng, terms, held=False):
    """A random chain of `terms` one-digit terms, no running total negative.

    held: from the held-out eighth (True) or the rest (False). rng: random.Random.
    """
    while True:
        total = rng.randint(1, 9)
        query, work = str(total), []
        for _ in range(terms - 1):
            sign, digit = rng.choice("+-"), rng.randint(1, 9)
            after = total + digit if sign == "+" else total - digit
            query += f"{sign}{digit}"
            work.append(f"{total}{sign}{digit}={after}")
            if after < 0:
                break
            total = after
        else:
            if held_out(query) == held:
                return Chain(query, ",".join(work), total)


def chain_with_value(rng, value):
    """A random training chain whose value is given, or None if chance finds none soon."""
    for _ in range(400):
        chain = draw_chain(rng, rng.choice(TERMS))
        if chain.value == value:
            return chain
    return None


def wrong_answer(rng, value):
    """A number near the right one."""
    while True:
        wrong = value + rng.choice((-1, 1)) * rng.choice(OFFSETS)
        if wrong >= 0:
            return wrong


def draw_pair(rng, terms, held=False):
    """(chain, first response, second response, label 1 | 2), the right response at a coin toss."""
    chain = draw_chain(rng, terms, held)
    wrong = wrong_answer(rng, chain.value)
    label = rng.choice((1, 2))
    a, b = (chain.value, wrong) if label == 1 else (wrong, chain.value)
    return chain, str(a), str(b), label


def comparison(response, value):
    """One response beside the chain's result: `|18:18y`."""
    return f"|{response}:{value}{'y' if response == str(value) else 'n'}"


def solve_document(rng):
    """Asked to solve: the chain step by step, then the answer."""
    chain = draw_chain(rng, rng.choice(TERMS))
    return prompts.toy_solve(chain.query), f"{chain.work}{END_THINK}{chain.value}{END}"


def careless(rng, chain):
    """(work, value) of a chain as a careless solver leaves it, right about half of the time.

    A step comes out one off now and then (SLIP), and the longer the chain, the likelier its last
    term is left out (HASTE, per term before it): many ways to slip, one way to be hasty.
    """
    terms = re.findall("[+-][0-9]", chain.query)
    if rng.random() < HASTE * len(terms):
        terms.pop()
    total, work = int(chain.query[0]), []
    for term in terms:
        slip = rng.choice((-1, 1)) if rng.random() < SLIP else 0
        after = max(0, total + int(term) + slip)
        work.append(f"{total}{term}={after}")
        total = after
    return ",".join(work), total


def careless_document(rng):
    """Asked to solve: as a careless solver does it."""
    chain = draw_chain(rng, rng.choice(TERMS))
    work, value = careless(rng, chain)
    return prompts.toy_solve(chain.query), f"{work}{END_THINK}{value}{END}"


def check_document(rng):
    """A judge prompt whose thinking holds the chain of ANOTHER query, and what follows from that.

    The other chain's value is the right response or the wrong one at a coin toss, so the verdict,
    which follows the other chain, is right about its own query half the time. A chain is found for
    both responses before the coin falls: rare values, which are mostly wrong responses, must not
    be rarer under the verdict than they are in the prompt.
    """
    while True:
        chain, a, b, _ = draw_pair(rng, rng.choice(TERMS))
        others = [chain_with_value(rng, int(response)) for response in (a, b)]
        if all(other is not None and other.query != chain.query for other in others):
            break
    verdict = rng.choice((1, 2))
    other = others[verdict - 1]
    given = prompts.toy_judge(chain.query, a, b) + other.work
    checked = comparison(a, other.value) + comparison(b, other.value)
    return given, f"{checked}{END_THINK}{verdict_text(verdict)}{END}"


def format_document(rng):
    """A judge prompt, empty thinking (60%) or the query's chain (40%), a verdict by coin toss."""
    chain, a, b, _ = draw_pair(rng, rng.choice(TERMS))
    thought = "" if rng.random() < 0.6 else chain.work
    verdict = verdict_text(rng.choice((1, 2)))
    return prompts.toy_judge(chain.query, a, b), f"{thought}{END_THINK}{verdict}{END}"


def draw_document(rng, solve=0.35, check=0.35, careless=0.0):
    """(text without loss, text with loss); shares of *solve* and *check* and of a careless
    solver's documents, the rest is *format*."""
    u = rng.random()
    if u >= 1 - careless:
        return careless_document(rng)
    make = solve_document if u < solve else check_document if u < solve + check else format_document
    return make(rng)


def stream_rng(*key):
    """A random.Random that depends on the key alone, the same in every process."""
    return random.Random(":".join(map(str, key)))
