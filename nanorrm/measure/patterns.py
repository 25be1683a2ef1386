"""How a judge thinks, counted by its words: the shares of thoughts that change course, check
themselves, compare, or break a problem down.

The four groups are those of the paper's analysis of reasoning patterns (arXiv 2505.14674), and so
is the measure: a thought counts once for each group of which it has a phrase. The phrases are ours.
`first` is not among them: to a judge it is the name of a response. The toy judge writes no words,
so all its shares are zero.
"""

import re

# a phrase matches whole words in any case; * is any ending, a space is any white space or hyphen
PHRASES = {
    "transition": "wait, alternatively, hold on, hmm, on second thought, on the other hand, "
    "another way, another approach, another perspective, think differently, let me try",
    "reflection": "verif*, check*, recheck*, re check*, recalculat*, reconsider*, re examin*, "
    "re read*, make sure, go back, going back, look again, looking again",
    "comparison": "more, less, better, worse, than, compar*, both, whereas, similar*, in contrast",
    "breakdown": "decompos*, break* down, break* it down, break* this down, step, steps, firstly, "
    "first of all, sub problem*, subproblem*, one by one",
}


def matcher(phrases):
    """A compiled pattern that finds any of the phrases (a text, with commas between them)."""
    words = re.escape(phrases).replace(r",\ ", "|").replace(r"\*", r"\w*").replace(r"\ ", r"[\s-]+")
    return re.compile(rf"\b(?:{words})\b", re.IGNORECASE)


MATCHERS = {group: matcher(phrases) for group, phrases in PHRASES.items()}


def patterns(thoughts):
    """Shares of the thoughts (texts) with at least one phrase of each group: {group: share}.

    None for every group if there is no thought.

    >>> patterns(["Wait, let me double-check.", "B is better than A.", "7+8=15"])
    {'transition': 0.3333333333333333, 'reflection': 0.3333333333333333, \
'comparison': 0.3333333333333333, 'breakdown': 0.0}
    """
    thoughts = list(thoughts)
    found = {k: sum(1 for t in thoughts if m.search(t)) for k, m in MATCHERS.items()}
    return {group: n / len(thoughts) if thoughts else None for group, n in found.items()}


def by(records, key):
    """The table of patterns over values of a field: {value: {"thoughts": n, group: share}}.

    records: comparisons as in records.jsonl, [{"votes": [{"thought": text, ...}], ...}]; key: one
    of their fields, such as "outcome" or "section" (a record without it counts under ""). Values
    come in the order of their first appearance, those without any thought are left out.

    >>> votes = [{"thought": "Let me verify each step."}, {"thought": ""}]
    >>> by([{"outcome": "right", "votes": votes}], "outcome")["right"]
    {'thoughts': 2, 'transition': 0.0, 'reflection': 0.5, 'comparison': 0.0, 'breakdown': 0.5}
    """
    thoughts = {}
    for record in records:
        said = [vote.get("thought") or "" for vote in record.get("votes") or ()]
        thoughts.setdefault(str(record.get(key) or ""), []).extend(said)
    return {
        value: {"thoughts": len(said), **patterns(said)} for value, said in thoughts.items() if said
    }
