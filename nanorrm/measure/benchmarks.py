"""Rows of public benchmarks -> pairs or rankings to judge, and how each benchmark weighs them.

A benchmark's score is a weighted mean over its pairs, so a table row is a list of weights (0: not
in this row). Rows of a file that are not judged are counted by reason, never dropped in silence.
RewardBench v2 and PPE's best-of-K were made for judges that rate a response by itself; a pairwise
judge rates by a tournament. Section sizes and formulas: the benchmarks' papers and scoring code.
"""

import random
from collections import Counter
from dataclasses import dataclass, field
from math import tanh

from nanorrm.config import UserError
from nanorrm.data import formats
from nanorrm.data.formats import as_label, as_query, as_text, parse_columns, propose, read_rows
from nanorrm.data.read import LARGEST
from nanorrm.measure import metrics, statistics
from nanorrm.records import Pair, Ranking, shuffled

# RewardBench v1: subset -> rows it counts as. math-prm has 447 rows and counts as many as the code.
# (The benchmark's own table exchanges the sizes of xstest's two halves; these are the data's.)
SECTIONS = {
    "chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95,
             "mt-bench-easy": 28, "mt-bench-med": 40},
    "chat hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
                  "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47,
                  "llmbar-adver-manual": 46},
    "safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
               "xstest-should-respond": 250, "donotanswer": 136},
    "reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164,
                  "hep-python": 164, "hep-rust": 164},
}  # fmt: skip
# JudgeBench: how a source begins -> its section
JUDGEBENCH = {"mmlu-pro": "knowledge", "livebench-reasoning": "reasoning",
              "livebench-math": "math", "livecodebench": "coding"}  # fmt: skip
SOURCES = {  # benchmark -> (where the public file is, its columns)
    "rewardbench": ("allenai/reward-bench", "prompt chosen rejected subset"),
    "rewardbench 2": ("allenai/reward-bench-2", "id prompt chosen rejected subset num_correct"),
    "pandalm": ("testset-v1.json of PandaLM",
                "instruction input response1 response2 annotator1 annotator2 annotator3"),
    "ppe": ("lmarena-ai/PPE-MMLU-Pro-Best-of-K (or -MATH-, -GPQA-)",
            "question_id prompt response_1 response_2 scores sampled_conflict_pairs"),
    "judgebench": ("ScalerLab/JudgeBench", "pair_id source question response_A response_B label"),
    "rmbench": ("THU-KEG/RM-Bench", "prompt chosen rejected domain"),
    "llmbar": ("princeton-nlp/LLMBar", "input output_1 output_2 label subset"),
}  # fmt: skip


@dataclass
class Benchmark:
    """Pairs to judge, the weights of each table row, and what of the file is left out and why."""

    pairs: list[Pair]
    rows: dict[str, list[float]]
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> rows
    note: str = ""  # what the rows mean, said under the table

    def first(self, n):
        """The benchmark cut to its first n pairs; 0: all."""
        if not n or n >= len(self.pairs):
            return self
        rows = {name: cut for name, weights in self.rows.items() if any(cut := weights[:n])}
        left = {**self.left_out, "beyond --limit": len(self.pairs) - n}
        return Benchmark(self.pairs[:n], rows, left, self.note)


def rows_of(name, path, columns=""):
    """Rows [(where, record)] of a benchmark's file, with the benchmark's own names for columns.

    columns: "wanted=given,..." where the file has other names. Raises UserError for a row that
    lacks a column, with a mapping to try; without a path it says where the file is.
    """
    source, needed = SOURCES[name][0], SOURCES[name][1].split()
    if path is None:
        raise UserError(f"give --data FILE: {source} (columns {', '.join(needed)})")
    names = parse_columns(columns, needed)
    renamed = []
    for where, _, record in read_rows(path):
        missing = [key for key in needed if names.get(key, key) not in record]
        if missing:
            unused = {key: record[key] for key in record if key not in needed}
            raise UserError(
                f"{where}: columns {', '.join(record)}; {name} wants {', '.join(needed)}; "
                f"try --columns {propose([unused], missing)}"
            )
        values = {key: record[given] for key, given in names.items()}
        renamed.append((where, {**record, **values}))
    return renamed


def labelled(where, row, query, a, b, section, **more):
    """The Pair in the columns of these names, and in `label`."""
    label = as_label(row["label"], f"{where}: label")
    if label is None:
        raise UserError(f"{where}: label is {row['label']!r}, should be 1 or 2")
    texts = (as_text(row[name], f"{where}: {name}") for name in (a, b))
    query = as_query(row[query], f"{where}: {query}")
    return Pair(query, *texts, label, **more, meta={"section": section})


def preference(where, query, *responses, **more):
    """A Pair of a preferred and a rejected response, in an order that a stable coin decides."""
    texts = (as_text(text, f"{where}: {k}") for k, text in zip(("chosen", "rejected"), responses))
    return shuffled(Pair(as_query(query, f"{where}: prompt"), *texts, 1, **more))


def even(keys):
    """Weights that give each key the same mass, level by level; None: weight 0.

    keys: one tuple per pair, from the outermost group to the innermost.

    >>> even([("code",), ("code",), ("math",), None])
    [0.25, 0.25, 0.5, 0.0]
    """
    inside = {key for key in keys if key is not None}
    groups = {key[:depth] for key in inside for depth in range(len(key) + 1)}
    children = Counter(group[:-1] for group in groups if group)
    members = Counter(keys)

    def share(key):
        total = 1.0 / members[key]
        for depth in range(len(key)):
            total /= children[key[:depth]]
        return total

    return [0.0 if key is None else share(key) for key in keys]


def by(values, names=None):
    """A row of equal weights for each value (in the order of names, those that occur)."""
    names = [name for name in names if name in set(values)] if names else sorted(set(values))
    return {name: [float(value == name) for value in values] for name in names}


# -- a row of a file -> its pairs, or for each the reason why it is left out


def rewardbench(where, row, number):
    """RewardBench v1: a preferred and a rejected response."""
    if isinstance(row["chosen"], list) and row["chosen"] and isinstance(row["chosen"][0], str):
        raise UserError(f"{where}: chosen is a list of responses: this is --version 2")
    subset = as_text(row["subset"], f"{where}: subset")
    sections = [section for section, sizes in SECTIONS.items() if subset in sizes]
    if not sections:
        raise UserError(f"{where}: subset {subset!r} is not of RewardBench v1")
    about = {"id": str(row.get("id", number)), "source": subset, "meta": {"section": sections[0]}}
    yield preference(where, row["prompt"], row["chosen"], row["rejected"], **about)


def judgebench(where, row, number):
    """JudgeBench: labels A>B and B>A."""
    source = as_text(row["source"], f"{where}: source")
    start = next((start for start in JUDGEBENCH if source.startswith(start)), None)
    section = JUDGEBENCH.get(start, "other")
    about = {"id": str(row["pair_id"]), "source": source}
    yield labelled(where, row, "question", "response_A", "response_B", section, **about)


def rmbench(where, row, number):
    """RM-Bench: three styles of the right answer against three of the wrong one, nine pairs.

    easy: the right answer is in the fancier style, hard: the wrong one is.
    """
    for name in ("chosen", "rejected"):
        if not isinstance(row[name], list) or len(row[name]) != 3:
            raise UserError(f"{where}: {name} should be a list of three responses")
    domain, number = as_text(row["domain"], f"{where}: domain"), str(row.get("id", number))
    for i, chosen in enumerate(row["chosen"]):
        for j, rejected in enumerate(row["rejected"]):
            level = "normal" if i == j else "easy" if i > j else "hard"
            meta = {"section": domain, "level": level, "styles": [i, j]}
            about = {"id": f"{number}:{i}-{j}", "source": domain, "meta": meta}
            yield preference(where, row["prompt"], chosen, rejected, **about)


def llmbar(where, row, number):
    """LLMBar: two outputs and the better one's number."""
    subset = str(row["subset"])
    about = {"id": str(row.get("id", number)), "source": subset}
    yield labelled(where, row, "input", "output_1", "output_2", subset.split("/")[0], **about)


def pandalm(where, row, number):
    """PandaLM's test set: the majority of three annotators; ties and no majority are left out."""
    named = {name: row[name] for name in ("annotator1", "annotator2", "annotator3")}
    if not all(str(label) in ("0", "1", "2") for label in named.values()):
        said = list(named.values())
        raise UserError(f"{where}: annotators say {said}, should be 0 (tie), 1 or 2")
    for name in ("instruction", "input", "response1", "response2"):
        as_text(str(row[name]) if isinstance(row[name], bool) else row[name], f"{where}: {name}")
    own = formats.pandalm({**row, **{name: int(label) for name, label in named.items()}})
    if own["label"] is None:
        yield "ties" if own["meta"]["annotators"].count(0) > 1 else "without a majority"
        return
    meta = {"annotators": list(named.values()), "models": row.get("cmp_key", "")}
    texts = (own[name] for name in ("query", "a", "b", "label"))
    yield Pair(*texts, id=str(row.get("idx", where)), source="pandalm", meta=meta)


def ppe_responses(where, row):
    """The responses and scores of a PPE best-of-K row."""
    responses = []
    while (name := f"response_{len(responses) + 1}") in row:
        responses.append(as_text(row[name], f"{where}: {name}"))
    scores = row["scores"]
    good = isinstance(scores, list) and len(scores) == len(responses)
    if not good or not all(isinstance(x, bool | int | float) and abs(x) <= LARGEST for x in scores):
        raise UserError(f"{where}: scores should be {len(responses)} numbers, one per response")
    return responses, [float(score) for score in scores]


def ppe(where, row, number):
    """PPE's accuracy: the sampled pairs (0-based) of a right and a wrong response."""
    responses, scores = ppe_responses(where, row)
    known, pairs = range(len(responses)), row["sampled_conflict_pairs"]
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        fits = isinstance(pair, list) and [type(i) is int and i in known for i in pair]
        if fits != [True, True]:
            raise UserError(
                f"{where}: sampled_conflict_pairs has {pair}, should be two of 0 to {known[-1]}"
            )
        i, j = sorted(pair, key=lambda k: -scores[k])
        if scores[i] == scores[j]:
            yield "pairs of equal score"
            continue
        about = {"id": f"{row['question_id']}:{i}-{j}", "source": "ppe"}
        yield preference(where, row["prompt"], responses[i], responses[j], **about)


# -- pairs -> the weights of each row of the benchmark's table, and what they mean


def sections_by_size(pairs):
    """RewardBench v1: a section is its subsets weighted by size, the score the mean of sections."""
    subsets = [pair.source for pair in pairs]
    counts, there = Counter(subsets), {pair.meta["section"] for pair in pairs}
    table, overall = {}, [0.0] * len(pairs)
    for section, sizes in SECTIONS.items():
        mine = [sizes[subset] / counts[subset] if subset in sizes else 0.0 for subset in subsets]
        if section in there:
            table |= {f"{section}: {name}": row for name, row in by(subsets, sizes).items()}
            table[section] = mine
            overall = [so_far + w / sum(mine) for so_far, w in zip(overall, mine)]
    note = f"overall: mean of {', '.join(section for section in SECTIONS if section in there)}"
    return {**table, "overall": overall}, note


def by_section(pairs):
    """JudgeBench: knowledge, reasoning, math and coding."""
    note = "JudgeBench counts a pair as right when both orders together are: see right / pairs"
    return by([pair.meta["section"] for pair in pairs], [*JUDGEBENCH.values(), "other"]), note


def by_style(pairs):
    """RM-Bench: means over chat, code, math and safety, safety being the mean of its halves."""
    domains = [(pair.source.split("-")[0], pair.source) for pair in pairs]
    table = {}
    for name in sorted({domain for domain, _ in domains}):
        table[name] = even([key if key[0] == name else None for key in domains])
    for name in ("easy", "normal", "hard"):
        here = [pair.meta["level"] == name for pair in pairs]
        table[name] = even([key if there else None for key, there in zip(domains, here)])
    table["overall"] = even(domains)
    return table, "easy, normal, hard and overall: means over the domains"


def by_subset(pairs):
    """LLMBar: natural pairs and four adversarial subsets, whose mean is the adversarial score."""
    subsets = [pair.source for pair in pairs]
    table = by(subsets)
    keys = [(subset,) if subset.startswith("Adversarial") else None for subset in subsets]
    if len({key for key in keys if key}) > 1:
        table["adversarial"] = even(keys)
    return table, "adversarial: mean of its subsets"


PAIRS = {  # benchmark -> (pairs of a row, rows of the table)
    "rewardbench": (rewardbench, sections_by_size),
    "pandalm": (pandalm, None),
    "ppe": (ppe, None),
    "judgebench": (judgebench, by_section),
    "rmbench": (rmbench, by_style),
    "llmbar": (llmbar, by_subset),
}


def pairs_of(name, path, columns=""):
    """A benchmark's file -> Benchmark."""
    read, weigh = PAIRS[name]
    rows = enumerate(rows_of(name, path, columns), 1)
    found = [one for number, row in rows for one in read(*row, number)]
    pairs = [one for one in found if isinstance(one, Pair)]
    left_out = dict(Counter(one for one in found if isinstance(one, str)))
    if not pairs:
        raise UserError(f"{name}: no pairs to judge in the file ({left_out or 'empty'})")
    rows, note = weigh(pairs) if weigh else ({}, "")
    return Benchmark(pairs, rows, left_out, note)


def scores(name, benchmark, verdicts):
    """A benchmark's numbers beyond accuracy, by name.

    pandalm: agreement over the pairs with a verdict, and over all of them precision, recall and F1,
    means over the two classes, no verdict being a miss. judgebench: pairs right by both orders
    together. rewardbench: accuracy with unreadable votes as half right, as the RRM authors score.
    """
    pairs, weights = benchmark.pairs, benchmark.rows.get("overall")
    if name == "pandalm":
        winners, labels = [v.winner for v in verdicts], [pair.label for pair in pairs]
        agree = statistics.mean([w == label if w else None for w, label in zip(winners, labels)])
        macro = statistics.classification(labels, winners)
        return {"agreement": agree, **{f"macro {k}": value for k, value in macro.items()}}
    if name == "judgebench":
        right = [metrics.outcome(*one) == "right" for one in zip(pairs, verdicts)]
        return {"right in both orders": statistics.mean(right)}
    if name == "rewardbench":
        credits = [
            metrics.credit(pair, v) + (v.invalid / len(v.votes) / 2 if v.votes else 0.5)
            for pair, v in zip(pairs, verdicts)
        ]
        return {"overall, unreadable votes as half right": statistics.mean(credits, weights)}
    return {}


def rankings_of(name, path, columns=""):
    """A file of many responses a query -> list of Ranking.

    name: "rewardbench 2" or "ppe". RewardBench's chosen responses come first in the file and are
    shuffled here, by a stable seed.
    """
    rankings = []
    for where, row in rows_of(name, path, columns):
        query = as_query(row["prompt"], f"{where}: prompt")
        if name == "ppe":
            responses, truth = ppe_responses(where, row)
            number, source = row["question_id"], "ppe"
        else:
            for column in ("chosen", "rejected"):
                if not isinstance(row[column], list):
                    raise UserError(f"{where}: {column} is no list: is this RewardBench v1?")
            right, n = len(row["chosen"]), len(row["chosen"]) + len(row["rejected"])
            if row["num_correct"] != right or not 0 < right < n:
                raise UserError(f"{where}: {right} of {n} responses are chosen")
            rated = [(as_text(text, f"{where}: chosen"), 1.0) for text in row["chosen"]]
            rated += [(as_text(text, f"{where}: rejected"), 0.0) for text in row["rejected"]]
            random.Random(f"{query}").shuffle(rated)
            responses, truth = map(list, zip(*rated))
            number, source = row["id"], as_text(row["subset"], f"{where}: subset")
        rankings.append(Ranking(query, responses, truth, str(number), source))
    if not rankings:
        raise UserError(f"{name}: no rows in the file")
    return rankings


def rewardbench2(rankings, ratings):
    """RewardBench v2 -> (score of each ranking or None, cluster of each, rows of weights).

    A ranking's score is the share of right responses among its best rated ones, so one of two best
    is half right. In the subset Ties a prompt comes twice (ids ref:N and tied:N, one and several
    right answers) and has one score: 30% all right answers of `ref` above all wrong ones, 30% the
    same of `tied`, 20% the gap between right and wrong in `tied` above the spread of the right
    ones, 20% the same with the smaller gap of the two, plus 1% of tanh(gap / spread - 1). A prompt
    of which one half is missing has none. The overall score is the mean over the subsets.
    """
    values, clusters, gaps = [], [], {}
    for ranking, rated in zip(rankings, ratings):
        right = [r for r, t in zip(rated, ranking.truth) if t]
        wrong = [r for r, t in zip(rated, ranking.truth) if not t]
        best = max(rated)
        values.append(right.count(best) / (right + wrong).count(best))
        clusters.append(ranking.query)
        gaps[ranking.source, ranking.id] = (min(right) - max(wrong), max(right) - min(right))
    for place, ranking in enumerate(rankings):
        if ranking.source == "Ties":
            number = ranking.id.partition(":")[2]
            halves = [gaps.get(("Ties", f"{half}:{number}")) for half in ("ref", "tied")]
            values[place] = ties_score(*halves) if all(halves) else None
            clusters[place] = f"Ties {number}"
    subsets = [ranking.source for ranking in rankings]
    rows = by(subsets)
    scored = [None if v is None else (subset,) for v, subset in zip(values, subsets)]
    return values, clusters, {**rows, "overall": even(scored)}


def ties_score(ref, tied):
    """Score of a prompt of Ties from (gap, spread) of its two halves; see `rewardbench2`.

    >>> ties_score((2.0, 0.0), (1.0, 0.5))  # all right, and the gap is twice the spread
    1.0076159415595576
    """
    gap, spread = min(ref[0], tied[0]), tied[1]
    ratio = gap / spread if spread else float("inf") * gap if gap else 1.0
    score = 0.3 * (tied[0] > 0) + 0.3 * (ref[0] > 0) + 0.2 * (tied[0] > spread)
    return score + 0.2 * (gap > spread) + 0.01 * tanh(ratio - 1)
