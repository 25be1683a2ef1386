"""Columns of a benchmark that go by other names: `--columns wanted=given`, a mapping to try."""

from difflib import get_close_matches

from nanorrm.config import UserError

ALIASES = {  # wanted column -> other names it goes by
    "prompt": ("query", "question", "instruction", "input"),
    "question": ("prompt", "query", "instruction", "input"),
    "instruction": ("prompt", "query", "question"),
    "chosen": ("chosen_response", "preferred", "winner", "good", "response_a"),
    "rejected": ("rejected_response", "dispreferred", "loser", "bad", "response_b"),
    "subset": ("source", "category", "domain", "section"),
    "source": ("subset", "category", "domain", "section"),
    "domain": ("subset", "category", "source", "section"),
    "label": ("winner", "preference", "gold", "answer"),
}


def mapping(text):
    """`--columns prompt=question,chosen=good` -> {"prompt": "question", ...}.

    >>> mapping("a=x, b=y")
    {'a': 'x', 'b': 'y'}
    """
    parts = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    if not all(name and given for name, _, given in parts):
        raise UserError(f"columns = {text!r}: write wanted=given,wanted=given")
    return {name: given for name, _, given in parts}


def propose(missing, given):
    """A mapping to try: for each missing column the likeliest of the given ones.

    >>> propose(["prompt", "chosen"], ["question", "chosen_text"])
    'prompt=question,chosen=chosen_text'
    """
    free, pairs = list(given), []
    for name in missing:
        near = [alias for alias in ALIASES.get(name, ()) if alias in free]
        near = near or get_close_matches(name, free, 1, 0.5)
        near = near or free[:1]
        if near:
            free.remove(near[0])
        pairs.append(f"{name}={near[0] if near else '...'}")
    return ",".join(pairs)
