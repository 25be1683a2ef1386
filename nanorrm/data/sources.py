"""What training takes pairs and queries from: the embedded world, files, mixtures of both.

A source is asked for its items start to start + n; the answer depends on the seed and these two
alone, so a resumed run goes on in the middle of an epoch from one saved integer.
"""

import json
import re
import zlib
from collections import Counter

from nanorrm import ranks
from nanorrm.config import UserError
from nanorrm.data import toy
from nanorrm.data.read import read_pairs, read_queries
from nanorrm.engine.sampling import SamplingParams
from nanorrm.records import Pair, Query, Ranking, shuffled

# -- the embedded world


def toy_pair(rng, terms, held=False):
    """A Pair of the embedded world; terms is its difficulty."""
    chain, a, b, label = toy.draw_pair(rng, terms, held)
    return Pair(chain.query, a, b, label, id=chain.query, source="toy", meta={"terms": terms})


def toy_ranking(rng, terms, n):
    """A Ranking of the embedded world: n different numbers, one of them right; queries held out."""
    chain = toy.draw_chain(rng, terms, held=True)
    near = [chain.value + sign * off for off in range(1, 10 + n) for sign in (-1, 1)]
    responses = rng.sample([value for value in near if value >= 0][: n + 8], n - 1)
    responses.insert(rng.randrange(n), chain.value)
    truth = [value == chain.value for value in responses]
    about = chain.query, "toy", {"terms": terms}
    return Ranking(chain.query, [str(value) for value in responses], truth, *about)


class ToySource:
    """Pairs drawn from the embedded world, without end."""

    draw = staticmethod(toy_pair)
    streams = "train", "held-out"  # of random numbers

    def __init__(self, seed):
        self.seed = seed

    def take(self, start, n):
        """The training items start to start + n of an endless row."""
        rngs = (toy.stream_rng(self.streams[0], self.seed, i) for i in range(start, start + n))
        return [self.draw(rng, rng.choice(toy.TERMS)) for rng in rngs]

    def held_out(self, n, terms=toy.TERMS):
        """n items with queries no training sees, the same for every seed; n / len(terms) each."""
        rng = toy.stream_rng(self.streams[1])
        return [self.draw(rng, terms[i % len(terms)], held=True) for i in range(n)]

    def rankings(self, n, size, terms=toy.TERMS):
        """n rankings of `size` responses each, one of them right; n / len(terms) each."""
        rng = toy.stream_rng("rankings")
        return [toy_ranking(rng, terms[i % len(terms)], size) for i in range(n)]


class ToyQueries(ToySource):
    """Queries drawn from the embedded world, without end."""

    streams = "policy", "held-out queries"

    @staticmethod
    def draw(rng, terms, held=False):
        chain = toy.draw_chain(rng, terms, held)
        return Query(chain.query, str(chain.value), {"terms": terms})


# -- files


class Reshuffled:
    """Items in an endless row, shuffled anew for each epoch; what is held out is not among them."""

    def __init__(self, items, seed, held=()):
        self.items, self.seed, self.held = items, seed, held
        self.order = (None, [])  # the epoch it is for, the permutation

    def item(self, index):
        """The index-th item, counted over all epochs."""
        epoch, place = divmod(index, len(self.items))
        if self.order[0] != epoch:
            order = list(range(len(self.items)))
            toy.stream_rng("epoch", self.seed, epoch).shuffle(order)
            self.order = epoch, order
        return self.items[self.order[1][place]]

    def take(self, start, n):
        """The items start to start + n, counted over all epochs."""
        return [self.item(start + i) for i in range(n)]

    def held_out(self, n):
        """At most n of the items kept out of training."""
        return self.held[:n]


class FileSource(Reshuffled):
    """Labelled pairs of a file, their responses in random order; a share of them is held out."""

    def __init__(self, pairs, seed, held_share, held=frozenset(), name="the file"):
        """held: queries to hold out whatever the share (another file's; see `held_queries`).

        Raises UserError if too few labelled pairs are left to train on.
        """
        labelled = sorted((p for p in pairs if p.label), key=lambda pair: query_hash(pair.query))
        held = held_queries(labelled, held_share) | held
        kept = [shuffled(pair, "held") for pair in labelled if str(pair.query) in held]
        super().__init__([p for p in labelled if str(p.query) not in held], seed, kept)
        if not self.items:
            raise UserError(f"no labelled pairs to train on in {name}")

    def item(self, index):
        """The index-th pair of training, counted over all epochs."""
        return shuffled(super().item(index), self.seed, index // len(self.items))


class FileQueries(Reshuffled):
    """Queries of a file: equal ones count once, and a share of them is held out."""

    def __init__(self, queries, seed, held_share):
        """Raises UserError if none are left to train on."""
        distinct = {json.dumps(query.text): query for query in queries}
        items = sorted(distinct.values(), key=lambda query: query_hash(query.text))
        cut = round(len(items) * held_share)
        super().__init__(items[cut:], seed, items[:cut])
        if not self.items:
            raise UserError("no queries to train on")


def query_hash(text):
    """Where in the order of holding out a query (as text) stands, whatever the seed."""
    return zlib.crc32(f"split {text}".encode())


def held_queries(pairs, share):
    """The queries (as text) of a share of the labelled pairs; none if those are all there are."""
    queries = sorted((str(pair.query) for pair in pairs if pair.label), key=query_hash)
    held = frozenset(queries[: round(len(queries) * share)])
    return held if set(queries) - held else frozenset()


# -- mixtures


class Mixture:
    """Sources interleaved by whole-number ratios, evenly: 2:1 is a b a a b a ...

    Any sum(ratios) pairs in a row hold each source exactly as often as its ratio says.
    """

    def __init__(self, sources, ratios):
        """sources with take(start, n) and held_out(n); ratios: a whole number above 0 for each."""
        self.sources, self.ratios = sources, ratios
        self.pattern = interleave(ratios)  # [(source, its how-manieth of the cycle), ...]

    def places(self, start, stop):
        """(source, which of its items) of the pairs start to stop."""
        for index in range(start, stop):
            cycle, slot = divmod(index, len(self.pattern))
            source, nth = self.pattern[slot]
            yield source, cycle * self.ratios[source] + nth

    def take(self, start, n):
        """The training pairs start to start + n."""
        return [self.sources[k].take(i, 1)[0] for k, i in self.places(start, start + n)]

    def held_out(self, n):
        """At most n pairs kept out of training, by the ratios as long as every source has some."""
        held = [source.held_out(n) for source in self.sources]
        places = self.places(0, n * len(self.pattern))
        return [held[k][i] for k, i in places if i < len(held[k])][:n]


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
    if not name or not re.fullmatch("0*[1-9][0-9]*", ratio):
        raise UserError(f"data {text!r}: FILE:RATIO, the ratio a whole number above 0")
    return name, int(ratio)


def mix(parts, seed, held_share):
    """[(name, labelled pairs of a file | None for the toy world, ratio), ...] -> Mixture.

    A query held out of one file is held out of all. Each file is shuffled by a seed of its own.
    """
    names, files, ratios = zip(*parts)
    held = frozenset().union(*(held_queries(pairs or (), held_share) for pairs in files))
    sources = [
        ToySource(seed)
        if pairs is None
        else FileSource(pairs, f"{seed}/{place}", held_share, held, names[place])
        for place, pairs in enumerate(files)
    ]
    return Mixture(sources, ratios)


# -- the sources of a run


def open_source(cfg, judge):
    """Where pairs come from: the files (or the toy world) of cfg.data, mixed by their ratios.

    Pairs that have no label or don't fit the judge are dropped and counted.
    """
    params = SamplingParams(max_tokens=cfg.max_tokens)

    def refusal(pair):
        if pair.label is None:
            return "no label"
        try:
            prompt = judge.prompt(pair)
        except UserError as error:
            return str(error)
        long = 0 < cfg.max_prompt_tokens < len(prompt)
        return (long or judge.backend.refusal(prompt, params)) and "too long"

    parts = []
    for name, ratio in map(parse_source, cfg.data):
        pairs = None
        if name != "toy":
            pairs = fitting(name, "pairs", read_pairs(name, cfg.columns), refusal)
        parts.append((name, pairs, ratio))
    return mix(parts, cfg.seed, cfg.eval_share)


def open_queries(cfg, policy):
    """Where a policy's queries come from. Those it can't read are dropped and counted."""
    if cfg.data == "toy":
        return ToyQueries(cfg.seed)
    of_pairs = getattr(cfg, "responses", None) == "file"  # whatever their columns
    rows = read_pairs(cfg.data) if of_pairs else read_queries(cfg.data)
    queries = [Query(row.query) for row in rows] if of_pairs else rows
    queries = fitting(cfg.data, "queries", queries, lambda query: policy.refusal(query.text))
    return FileQueries(queries, cfg.seed, cfg.eval_share)


def fitting(name, what, items, refusal):
    """The items of a file that refusal(item) says nothing against, after a line that counts all."""
    reasons = list(map(refusal, items))
    if ranks.rank() == 0:
        print(f"{name}: {len(items)} {what}, {dropped(Counter(filter(None, reasons)))}")
    return [item for item, reason in zip(items, reasons) if not reason]


def dropped(why):
    """What fell out, in words: {reason: how many} -> "2 dropped: too long"."""
    return "; ".join(f"{n} dropped: {reason}" for reason, n in why.items()) or "none dropped"
