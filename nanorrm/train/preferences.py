"""Pairs of responses that a judge has labelled, ready for DPO, and the file they are kept in.

Nothing is dropped in silence: every pair becomes a preference or is counted under its reason.
"""

import json
from collections import Counter
from random import Random

from nanorrm import ranks
from nanorrm.config import UserError
from nanorrm.data.read import read_pairs
from nanorrm.data.sources import dropped
from nanorrm.engine.sampling import SamplingParams
from nanorrm.files import read_lines, write_rows
from nanorrm.judge.prompts import opens_thinking
from nanorrm.judge.verdict import NO_ANSWER
from nanorrm.model.tokenizer import END_THINK
from nanorrm.records import Pair
from nanorrm.train.packing import Preference, Sample


def sampled(policy, queries, seed):
    """Two responses of the policy to each query -> [(Pair of answers, Preference of a over b)]."""
    questions, groups = policy.respond(queries, 2, seed, logprobs=False)
    drawn = []
    for query, question, group in zip(queries, questions, groups):
        answers = [policy.answer(question, response) for response in group]
        trained = [[float(not forced) for forced in response.forced] for response in group]
        both = [Sample(question, r.ids, {"trained": own}) for r, own in zip(group, trained)]
        drawn.append((Pair(query.text, *answers), Preference(*both)))
    return drawn


def written(policy, pairs):
    """Pairs of a file -> ([(Pair of answers, Preference of a over b)], {reason: count}).

    A response may think first (text up to </think>), and must do so where the policy does.
    """
    drawn, why = [], Counter()
    for pair in pairs:
        try:
            question = policy.prompt(pair.query)
            both = [written_sample(policy, question, text) for text in (pair.a, pair.b)]
        except UserError as error:
            why[str(error)] += 1
            continue
        (a, one), (b, other) = both
        drawn.append((Pair(pair.query, a, b), Preference(one, other)))
    return drawn, why


def written_sample(policy, question, text):
    """A response given as text -> (the answer in it, its Sample with the end token).

    Raises UserError if it can't be.
    """
    tokenizer, config = policy.backend.tokenizer, policy.backend.model.config
    thought, closed, answer = text.rpartition(END_THINK)
    if opens_thinking(tokenizer, question) and not closed:
        raise UserError(f"no {END_THINK} in a response, while the prompt opens the thinking")
    ids = tokenizer.encode(thought) + tokenizer.encode_template(closed) + tokenizer.encode(answer)
    ids += config.eos_token_id[:1]
    if policy.backend.refusal(question + ids[:-1], SamplingParams(max_tokens=1)):
        raise UserError("too long")
    return answer.strip(), Sample(question, ids, {"trained": [1.0] * len(ids)})


def label(referee, drawn, seed=0):
    """Let the judge say which of each pair is better -> (Preferences, {reason: how many fell out}).

    drawn: [(Pair, Preference of a over b)]. Equal answers and draws (tied, unreadable or refused
    verdicts) fall out.
    """
    pairs = [pair for pair, _ in drawn]
    better = referee.prefer([pair.query for pair in pairs], [(p.a, p.b) for p in pairs], seed)
    preferences, why = [], Counter()
    for (pair, preference), best in zip(drawn, better):
        if pair.a == pair.b:
            why["no answer" if pair.a == NO_ANSWER else "equal answers"] += 1
        elif best is None:
            why["no winner"] += 1
        else:
            both = preference.samples()
            preferences.append(Preference(both[best], both[1 - best]))
    return preferences, why


def label_pairs(policy, referee, source, cfg):
    """The labelled pairs of a DpoConfig -> (Preferences, metrics), with a line that counts them.

    Pairs of a file are left out whose query is held out. Raises UserError if none are left.
    """
    why = Counter()
    if cfg.responses == "file":
        held = {json.dumps(query.text) for query in source.held_out(None)}
        pairs = [pair for pair in read_pairs(cfg.data) if json.dumps(pair.query) not in held]
        Random(f"pairs:{cfg.seed}").shuffle(pairs)
        drawn, why = written(policy, pairs[: cfg.pairs])
    else:
        drawn = sampled(policy, source.take(0, cfg.pairs), cfg.seed)
    total = len(drawn) + sum(why.values())
    labelled, unused = label(referee, drawn, cfg.seed)
    why += unused
    if ranks.rank() == 0:
        print(f"{total} pairs: {len(labelled)} labelled, {dropped(why)}")
    if not labelled:
        raise UserError(f"{cfg.data}: of {total} pairs not one got a label: {dropped(why)}")
    counts = {f"dropped/{reason.replace(' ', '_')}": n for reason, n in unused.items()}
    return labelled, {"pairs": total, "labelled": len(labelled), **counts, **referee.report()}


def save(path, preferences):
    """Write Preferences as jsonl, whole or not at all."""
    rows = []
    for item in preferences:
        sides = [{"ids": side.target, **side.values} for side in item.samples()]
        rows.append({"context": item.chosen.context, "chosen": sides[0], "rejected": sides[1]})
    write_rows(path, rows)


def load(path):
    """The inverse of `save`. Raises UserError for a file that is not there, empty or damaged."""
    if not path.exists():
        raise UserError(f"{path}: the labelled pairs of the run are gone")
    preferences = []
    try:
        for row in read_lines(path):
            context, sides = row["context"], (row["chosen"], row["rejected"])
            samples = (Sample(context, side.pop("ids"), side) for side in sides)
            preferences.append(Preference(*samples))
    except (KeyError, TypeError, AttributeError):
        line = len(preferences) + 1
        raise UserError(f"{path}, line {line}: not a labelled pair; the run can't go on") from None
    if not preferences:
        raise UserError(f"{path}: no labelled pairs in it; the run can't go on")
    return preferences
