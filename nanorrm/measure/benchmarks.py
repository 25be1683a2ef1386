"""Rows of public benchmarks -> pairs or rankings to judge, and how each benchmark weighs them.

A benchmark's score is a weighted mean over its pairs, so a table row is a list of weights (0: not
in this row). Rows of a file that are not judged are counted by reason, never dropped in silence.
Section sizes and formulas: the papers and scoring code of the benchmarks, as noted at each.
"""

from collections import Counter
from dataclasses import dataclass, field
from math import isfinite

from nanorrm.config import UserError
from nanorrm.data.formats import as_query, as_text, parse_columns, propose, read_rows
from nanorrm.measure import metrics, statistics
from nanorrm.records import Pair, shuffled

# RewardBench v1: subset -> rows it counts as. math-prm has 447 rows and counts as many as the code.
# (The benchmark's own table exchanges the sizes of xstest's two halves; these are the data's.)
SECTIONS = {
    "chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "chat hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "reasoning": {
        "math-prm": 984,
        **{f"hep-{language}": 164 for language in ("cpp", "go", "java", "js", "python", "rust")},
    },
}
JUDGEBENCH = {  # section -> how its sources begin
    "knowledge": "mmlu-pro",
    "reasoning": "livebench-reasoning",
    "math": "livebench-math",
    "coding": "livecodebench",
}
SOURCES = {  # benchmark -> (where the public file is, its columns)
    "rewardbench": ("allenai/reward-bench", "prompt chosen rejected subset"),
    "rewardbench 2": ("allenai/reward-bench-2", "id prompt chosen rejected subset num_correct"),
    "pandalm": (
        "testset-v1.json of PandaLM",
        "instruction input response1 response2 annotator1 annotator2 annotator3",
    ),
    "ppe": (
        "lmarena-ai/PPE-MMLU-Pro-Best-of-K (or -MATH-, -GPQA-)",
        "question_id prompt response_1 response_2 scores sampled_conflict_pairs",
    ),
    "judgebench": (
        "ScalerLab/JudgeBench",
        "pair_id source question response_A response_B label",
    ),
    "rmbench": ("THU-KEG/RM-Bench", "prompt chosen rejected domain"),
    "llmbar": ("princeton-nlp/LLMBar", "input output_1 output_2 label subset"),
}


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
        rows = {name: weights[:n] for name, weights in self.rows.items()}
        rows = {name: weights for name, weights in rows.items() if any(weights)}
        left = {**self.left_out, "beyond --limit": len(self.pairs) - n}
        return Benchmark(self.pairs[:n], rows, left, self.note)


def wanted(name):
    """What a benchmark's file is and where: for a command that was given none."""
    source, columns = SOURCES[name]
    return f"{source} (columns {', '.join(columns.split())})"


def rows_of(name, path, columns=""):
    """Rows [(where, record)] of a benchmark's file, with the benchmark's own names for columns.

    columns: "wanted=given,..." where the file has other names. Raises UserError for a row that
    lacks a column, with a mapping to try.
    """
    needed = SOURCES[name][1].split()
    names = parse_columns(columns, needed)
    renamed = []
    for where, _, record in read_rows(path):
        if not isinstance(record, dict):
            raise UserError(f"{where}: should be an object, not {type(record).__name__}")
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


def ones(flags):
    """Equal weights where a flag is set."""
    return [float(flag) for flag in flags]


def by(values, names=None):
    """A row of equal weights for each value (in the order of names, those that occur)."""
    names = [name for name in names if name in set(values)] if names else sorted(set(values))
    return {name: ones(value == name for value in values) for name in names}


def rewardbench(rows):
    """RewardBench v1: a section is its subsets weighted by size, the score the mean of sections."""
    sizes = {subset: (section, n) for section, of in SECTIONS.items() for subset, n in of.items()}
    pairs = []
    for where, row in rows:
        if isinstance(row["chosen"], list) and row["chosen"] and isinstance(row["chosen"][0], str):
            raise UserError(f"{where}: chosen is a list of responses: this is --version 2")
        subset = as_text(row["subset"], f"{where}: subset")
        if subset not in sizes:
            raise UserError(f"{where}: subset {subset!r} is not of RewardBench v1")
        pairs.append(
            preference(
                where, row["prompt"], row["chosen"], row["rejected"],
                id=str(row.get("id", len(pairs) + 1)), source=subset,
                meta={"section": sizes[subset][0]},
            )
        )  # fmt: skip
    subsets = [pair.source for pair in pairs]
    counts = Counter(subsets)
    weights = [sizes[subset][1] / counts[subset] for subset in subsets]
    table, overall = {}, [0.0] * len(pairs)
    for section, of in SECTIONS.items():
        mine = [w * (subset in of) for w, subset in zip(weights, subsets)]
        if any(mine):
            table |= {f"{section}: {name}": row for name, row in by(subsets, of).items()}
            table[section] = mine
            overall = [so_far + w / sum(mine) for so_far, w in zip(overall, mine)]
    table["overall"] = overall
    there = [section for section in SECTIONS if section in table]
    return Benchmark(pairs, table, note=f"overall: mean of {', '.join(there)}")


def judgebench(rows):
    """JudgeBench: labels A>B and B>A; knowledge, reasoning, math and coding by source."""
    pairs, sections = [], []
    for where, row in rows:
        label = {"A>B": 1, "B>A": 2}.get(str(row["label"]))
        if label is None:
            raise UserError(f"{where}: label is {row['label']!r}, should be A>B or B>A")
        source = as_text(row["source"], f"{where}: source")
        found = [section for section, start in JUDGEBENCH.items() if source.startswith(start)]
        sections += found or ["other"]
        pairs.append(
            Pair(
                as_query(row["question"], f"{where}: question"),
                as_text(row["response_A"], f"{where}: response_A"),
                as_text(row["response_B"], f"{where}: response_B"),
                label, id=str(row["pair_id"]), source=source, meta={"section": sections[-1]},
            )
        )  # fmt: skip
    note = "JudgeBench counts a pair as right when both orders together are: see right / pairs"
    return Benchmark(pairs, by(sections, [*JUDGEBENCH, "other"]), note=note)


def rmbench(rows):
    """RM-Bench: three styles of the right answer against three of the wrong one, nine pairs a row.

    easy: the right answer is in the fancier style, hard: the wrong one is; rows are means over the
    domains (chat, code, math, safety), safety being the mean of its two halves.
    """
    pairs, domains, levels = [], [], []
    for where, row in rows:
        for name in ("chosen", "rejected"):
            if not isinstance(row[name], list) or len(row[name]) != 3:
                raise UserError(f"{where}: {name} should be a list of three responses")
        domain = as_text(row["domain"], f"{where}: domain")
        number = str(row.get("id", len(pairs) // 9 + 1))
        for i, chosen in enumerate(row["chosen"]):
            for j, rejected in enumerate(row["rejected"]):
                level = "normal" if i == j else "easy" if i > j else "hard"
                meta = {"section": domain, "level": level, "styles": [i, j]}
                more = {"id": f"{number}:{i}-{j}", "source": domain, "meta": meta}
                pairs.append(preference(where, row["prompt"], chosen, rejected, **more))
                domains.append((domain.split("-")[0], domain))
                levels.append(level)
    table = {}
    for name in sorted({domain for domain, _ in domains}):
        table[name] = even([key if key[0] == name else None for key in domains])
    for name in ("easy", "normal", "hard"):
        table[name] = even([k if level == name else None for k, level in zip(domains, levels)])
    table["overall"] = even(domains)
    return Benchmark(pairs, table, note="easy, normal, hard and overall: means over the domains")


def llmbar(rows):
    """LLMBar: natural pairs and four adversarial subsets, whose mean is the adversarial score."""
    pairs = []
    for where, row in rows:
        label = {"1": 1, "2": 2}.get(str(row["label"]))
        if label is None:
            raise UserError(f"{where}: label is {row['label']!r}, should be 1 or 2")
        pairs.append(
            Pair(
                as_query(row["input"], f"{where}: input"),
                as_text(row["output_1"], f"{where}: output_1"),
                as_text(row["output_2"], f"{where}: output_2"),
                label, id=str(row.get("id", len(pairs) + 1)), source=str(row["subset"]),
                meta={"section": str(row["subset"]).split("/")[0]},
            )
        )  # fmt: skip
    subsets = [pair.source for pair in pairs]
    table = by(subsets)
    keys = [(subset,) if subset.startswith("Adversarial") else None for subset in subsets]
    if len({key for key in keys if key}) > 1:
        table["adversarial"] = even(keys)
    return Benchmark(pairs, table, note="adversarial: mean of its subsets")


def pandalm(rows):
    """PandaLM's test set: the majority of three annotators; ties and no majority are left out."""
    pairs, left_out = [], Counter()
    for where, row in rows:
        named = [row[f"annotator{i}"] for i in (1, 2, 3)]
        if not all(str(label) in ("0", "1", "2") for label in named):
            raise UserError(f"{where}: annotators say {named}, should be 0 (tie), 1 or 2")
        label, count = Counter(int(label) for label in named).most_common(1)[0]
        if count == 1 or label == 0:
            left_out["ties" if count > 1 else "without a majority"] += 1
            continue
        task, given, a, b = (  # four answers of the public file have become true and false
            as_text(str(row[k]) if isinstance(row[k], bool) else row[k], f"{where}: {k}")
            for k in ("instruction", "input", "response1", "response2")
        )
        pairs.append(
            Pair(
                f"{task}\n\n{given}" if given.strip() else task,
                a, b, label, id=str(row.get("idx", where)), source="pandalm",
                meta={"annotators": named, "models": row.get("cmp_key", "")},
            )
        )  # fmt: skip
    return Benchmark(pairs, {}, dict(left_out))


def ppe_responses(where, row):
    """The responses and scores of a PPE best-of-K row."""
    columns = []
    while f"response_{len(columns) + 1}" in row:
        columns.append(f"response_{len(columns) + 1}")
    responses = [as_text(row[name], f"{where}: {name}") for name in columns]
    scores = row["scores"]
    good = isinstance(scores, list) and len(scores) == len(responses)
    if not good or not all(isinstance(x, bool | int | float) and isfinite(x) for x in scores):
        raise UserError(f"{where}: scores should be {len(responses)} numbers, one per response")
    return responses, [float(score) for score in scores]


def ppe_pairs(rows):
    """PPE's accuracy: the sampled pairs (0-based) of a right and a wrong response."""
    pairs, left_out = [], Counter()
    for where, row in rows:
        responses, scores = ppe_responses(where, row)
        known, sampled_pairs = range(len(responses)), row["sampled_conflict_pairs"]
        if not isinstance(sampled_pairs, list):
            raise UserError(f"{where}: sampled_conflict_pairs should be a list of pairs")
        for sampled in sampled_pairs:
            fits = isinstance(sampled, list) and [type(i) is int and i in known for i in sampled]
            if fits != [True, True]:
                raise UserError(
                    f"{where}: sampled_conflict_pairs has {sampled}, should be two of 0 to "
                    f"{len(responses) - 1}"
                )
            i, j = sorted(sampled, key=lambda k: -scores[k])
            if scores[i] == scores[j]:
                left_out["pairs of equal score"] += 1
                continue
            pairs.append(
                preference(
                    where, row["prompt"], responses[i], responses[j],
                    id=f"{row['question_id']}:{i}-{j}", source="ppe",
                )
            )  # fmt: skip
    return Benchmark(pairs, {}, dict(left_out))


PAIRS = {
    "rewardbench": rewardbench,
    "pandalm": pandalm,
    "ppe": ppe_pairs,
    "judgebench": judgebench,
    "rmbench": rmbench,
    "llmbar": llmbar,
}


def pairs_of(name, path, columns=""):
    """A benchmark's file -> Benchmark."""
    benchmark = PAIRS[name](rows_of(name, path, columns))
    if not benchmark.pairs:
        raise UserError(f"{name}: no pairs to judge in the file ({benchmark.left_out or 'empty'})")
    return benchmark


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
