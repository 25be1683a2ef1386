"""What training takes pairs and queries from.

A source is asked for its items start to start + n; the answer depends on the seed and these two
alone, so a resumed run goes on in the middle of an epoch from one saved integer.
"""

import json
import re
import zlib
from collections import Counter
from math import gcd
from random import Random

from nanorrm import ranks
from nanorrm.config import UserError
from nanorrm.data import toy
from nanorrm.data.read import read_pairs, read_queries
from nanorrm.engine.sampling import SamplingParams
from nanorrm.records import Pair, Query, Ranking, shuffled


def toy_pair(rng, terms, held=False):
    """A Pair of the embedded world; terms is its difficulty."""
    chain, a, b, label = toy.draw_pair(rng, terms, held)
    return Pair(chain.query, a, b, label, id=chain.query, source="toy", meta={"terms": terms})


class ToySource:
    """Pairs drawn from the embedded world, without end."""

    def __init__(self, seed):
        self.seed = seed

    def take(self, start, n):
        """The training pairs start to start + n of an endless row."""
        pairs = []
        for index in range(start, start + n):
            rng = toy.stream_rng("train", self.seed, index)
            pairs.append(toy_pair(rng, rng.choice(toy.TERMS)))
        return pairs

    def held_out(self, n, terms=toy.TERMS):
        """n pairs with queries no training sees, the same for every seed; n / len(terms) each."""
        rng = toy.stream_rng("held-out")
        return [toy_pair(rng, terms[i % len(terms)], held=True) for i in range(n)]

    def rankings(self, n, size, terms=toy.TERMS):
        """n rankings of `size` responses each, one of them right; n / len(terms) each."""
        rng = toy.stream_rng("rankings")
        return [toy_ranking(rng, terms[i % len(terms)], size) for i in range(n)]


def toy_ranking(rng, terms, n):
    """A Ranking of the embedded world: n different numbers, one of them right; queries held out."""
    chain = toy.draw_chain(rng, terms, held=True)
    near = [chain.value + sign * off for off in range(1, 10 + n) for sign in (-1, 1)]
    responses = rng.sample([str(value) for value in near if value >= 0][: n + 8], n - 1)
    responses.insert(rng.randrange(n), str(chain.value))
    truth = [response == str(chain.value) for response in responses]
    return Ranking(chain.query, responses, truth, chain.query, "toy", {"terms": terms})


class FileSource:
    """Labelled pairs of a file: shuffled anew each epoch, a share of them held out."""

    def __init__(self, pairs, seed, held_share, held=frozenset(), name="the file"):
        """held: queries to hold out whatever the share (another file's; see `query_key`).

        Raises UserError if too few labelled pairs are left to train on.
        """
        labelled = sorted((pair for pair in pairs if pair.label), key=query_hash)
        held = held_queries(labelled, held_share) | held
        self._held = [shuffled(pair, "held") for pair in labelled if query_key(pair) in held]
        self.pairs = [pair for pair in labelled if query_key(pair) not in held]
        self.seed = seed
        self._order = (None, [])  # the epoch it is for, the permutation
        if not self.pairs:
            raise UserError(f"no labelled pairs to train on in {name}")

    def pair(self, index):
        """The index-th pair of training, counted over all epochs, its responses in random order."""
        epoch, place = divmod(index, len(self.pairs))
        if self._order[0] != epoch:
            order = list(range(len(self.pairs)))
            toy.stream_rng("epoch", self.seed, epoch).shuffle(order)
            self._order = epoch, order
        return shuffled(self.pairs[self._order[1][place]], self.seed, epoch)

    def take(self, start, n):
        """The training pairs start to start + n, counted over all epochs."""
        return [self.pair(start + i) for i in range(n)]

    def held_out(self, n):
        """At most n of the pairs kept out of training."""
        return self._held[:n]


def query_key(pair):
    """What two pairs of the same query share."""
    return str(pair.query)


def query_hash(pair):
    """Where in the order of holding out a pair stands: by its query, whatever the seed."""
    return zlib.crc32(f"split {pair.query}".encode())


def held_queries(pairs, share):
    """The queries of a share of the labelled pairs; none if those are the queries of all."""
    order = sorted((pair for pair in pairs if pair.label), key=query_hash)
    held = frozenset(query_key(pair) for pair in order[: round(len(order) * share)])
    return held if any(query_key(pair) not in held for pair in order) else frozenset()


class Mixture:
    """Sources interleaved by whole-number ratios, evenly: 2:1 is a b a a b a ...

    Any sum(ratios) pairs in a row (ratios without common factor) hold each source exactly as often
    as its ratio says.
    """

    def __init__(self, sources, ratios):
        """sources with take(start, n) and held_out(n); ratios: a whole number above 0 for each."""
        shared = gcd(*ratios)
        self.sources, self.ratios = sources, [ratio // shared for ratio in ratios]
        self.pattern = interleave(self.ratios)  # [(source, its how-manieth of the cycle), ...]

    def take(self, start, n):
        """The training pairs start to start + n."""
        pairs = []
        for index in range(start, start + n):
            cycle, slot = divmod(index, len(self.pattern))
            source, nth = self.pattern[slot]
            pairs += self.sources[source].take(cycle * self.ratios[source] + nth, 1)
        return pairs

    def held_out(self, n):
        """At most n pairs kept out of training, by the ratios as long as every source has some."""
        held = [iter(source.held_out(n)) for source in self.sources]
        pairs, dry = [], set()
        while len(pairs) < n and len(dry) < len(held):
            for source, _ in self.pattern:
                pair = next(held[source], None)
                if pair is None:
                    dry.add(source)
                elif len(pairs) < n:
                    pairs.append(pair)
        return pairs


def interleave(ratios):
    """Spread each i over sum(ratios) slots ratios[i] times -> [(i, how often before), ...].

    >>> interleave([3, 1])
    [(0, 0), (0, 1), (1, 0), (0, 2)]
    """
    slots, counts = [], [0] * len(ratios)
    for slot in range(1, sum(ratios) + 1):
        # the one that is furthest behind its share of the slots so far
        i = max(range(len(ratios)), key=lambda i: ratios[i] * slot - counts[i] * sum(ratios))
        slots.append((i, counts[i]))
        counts[i] += 1
    return slots


def parse_source(text):
    """ "pairs.jsonl:5" -> ("pairs.jsonl", 5); without a ratio it is 1. Raises UserError.

    >>> parse_source("toy"), parse_source("c:/pairs.jsonl:2")
    (('toy', 1), ('c:/pairs.jsonl', 2))
    """
    name, colon, ratio = text.rpartition(":")
    if not colon or not re.fullmatch(r"[-+.\d]*", ratio):
        return text, 1
    if not ratio.isascii() or not ratio.isdigit() or int(ratio) < 1 or not name:
        raise UserError(f"data {text!r}: FILE:RATIO, the ratio a whole number above 0")
    return name, int(ratio)


def mix(parts, seed, held_share):
    """[(name, labelled pairs of a file | None for the toy world, ratio), ...] -> Mixture.

    A query held out of one file is held out of all. Each file is shuffled by a seed of its own.
    """
    files = [pairs for _, pairs, _ in parts if pairs is not None]
    held = frozenset().union(*(held_queries(pairs, held_share) for pairs in files))
    sources = [
        ToySource(seed)
        if pairs is None
        else FileSource(pairs, f"{seed}/{place}", held_share, held, name)
        for place, (name, pairs, _) in enumerate(parts)
    ]
    return Mixture(sources, [ratio for *_, ratio in parts])


class ToyQueries:
    """Chains of the embedded world, without end."""

    def __init__(self, seed):
        self.seed = seed

    def take(self, start, n):
        """The training queries start to start + n of an endless row."""
        rngs = [toy.stream_rng("policy", self.seed, i) for i in range(start, start + n)]
        return [chain_query(rng, rng.choice(toy.TERMS)) for rng in rngs]

    def held_out(self, n):
        """n queries that no training sees, the same for every seed, of all lengths alike."""
        rng = toy.stream_rng("held-out queries")
        return [chain_query(rng, toy.TERMS[i % len(toy.TERMS)], held=True) for i in range(n)]


def chain_query(rng, terms, held=False):
    """A Query of the embedded world; terms is its difficulty."""
    chain = toy.draw_chain(rng, terms, held)
    return Query(chain.query, str(chain.value), {"terms": terms})


class Reshuffled:
    """Items in an endless row, shuffled anew for each pass over them."""

    def __init__(self, items, seed):
        self.items, self.seed = items, seed

    def take(self, start, n):
        """The items start to start + n, counted over all passes."""
        taken = []
        while len(taken) < n:
            epoch, place = divmod(start + len(taken), len(self.items))
            order = list(self.items)
            Random(f"epoch:{self.seed}:{epoch}").shuffle(order)
            taken += order[place : place + n - len(taken)]
        return taken


class FileQueries(Reshuffled):
    """Queries of a file: equal ones count once, and a share of them is held out by a hash."""

    def __init__(self, queries, seed, held_share):
        """Raises UserError if none are left to train on."""
        distinct = list({json.dumps(query.text): query for query in queries}.values())
        distinct.sort(key=lambda q: zlib.crc32(f"split {q.text}".encode()))  # as data.query_hash
        cut = round(len(distinct) * held_share)
        self._held = distinct[:cut]
        super().__init__(distinct[cut:], seed)
        if not self.items:
            raise UserError("no queries to train on")

    def held_out(self, n):
        """At most n of the queries kept out of training."""
        return self._held[:n]


def open_queries(cfg, policy):
    """Where a policy's queries come from. Those it can't read are dropped and counted."""
    if cfg.data == "toy":
        return ToyQueries(cfg.seed)
    if getattr(cfg, "responses", None) == "file":  # of pairs, whatever their columns
        queries = [Query(pair.query) for pair in read_pairs(cfg.data)]
    else:
        queries = read_queries(cfg.data)
    fitting, why = [], Counter()
    for query in queries:
        if refusal := policy.refusal(query.text):
            why[refusal] += 1
        else:
            fitting.append(query)
    if ranks.rank() == 0:
        print(f"{cfg.data}: {len(queries)} queries, {dropped(why)}")
    return FileQueries(fitting, cfg.seed, cfg.eval_share)


def dropped(why):
    """What fell out, in words: {reason: how many} -> "2 dropped: too long"."""
    return "; ".join(f"{n} dropped: {reason}" for reason, n in why.items()) or "none dropped"


def open_source(cfg, judge):
    """Where pairs come from: the files (or the toy world) of cfg.data, mixed by their ratios."""
    parts = []
    for name, ratio in map(parse_source, cfg.data):
        parts.append((name, None if name == "toy" else fitting_pairs(name, cfg, judge), ratio))
    return mix(parts, cfg.seed, cfg.eval_share)


def fitting_pairs(name, cfg, judge):
    """The labelled pairs of a file that fit the model; the others are dropped and counted."""
    pairs, params = read_pairs(name, cfg.columns), SamplingParams(max_tokens=cfg.max_tokens)
    fitting, why = [], Counter()
    for pair in pairs:
        try:
            prompt = judge.prompt(pair)
            long = 0 < cfg.max_prompt_tokens < len(prompt)
            refusal = (long or judge.backend.refusal(prompt, params)) and "too long"
        except UserError as error:
            refusal = str(error)
        if pair.label is None:
            refusal = "no label"
        if refusal:
            why[refusal] += 1
        else:
            fitting.append(pair)
    dropped = "; ".join(f"{n} dropped: {reason}" for reason, n in why.items()) or "none dropped"
    if ranks.rank() == 0:
        print(f"{name}: {len(pairs)} pairs, {dropped}")
    return fitting
