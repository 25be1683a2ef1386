"""What the judge reads: templates -> ids.

Two templates. "rrm" is the released models' own (system text and user text in a data file, byte for
byte; arXiv 2505.14674), rendered through the model's chat template. "toy" is the embedded world's:
`?query`, the two responses on a line each, then the opened thinking.
"""

import json
import re
from functools import cache
from importlib import resources

from nanorrm.config import UserError
from nanorrm.judge.verdict import verdict_text
from nanorrm.model.tokenizer import END_THINK, THINK


def toy_solve(query):
    """Ask the toy model to solve."""
    return f"!{query}\n{THINK}"


def toy_judge(query, a, b):
    """Ask the toy model to judge."""
    return f"?{query}\n1:{a}\n2:{b}\n{THINK}"


@cache
def rrm_prompt():
    """The released prompt: {"system": ..., "user": ...} with {question}, {answer1}, {answer2}."""
    return json.loads(resources.files("nanorrm").joinpath("assets/rrm_prompt.json").read_text())


def fill(template, **values):
    r"""Put values in for {name}, all at once: str.format would trip over \boxed{...}, and one
    replacement after another would rewrite a query that contains `{answer1}`."""
    return re.sub(r"\{(\w+)\}", lambda m: values.get(m.group(1), m.group(0)), template)


def rrm_messages(query, a, b):
    """The released prompt of one comparison as chat messages: [system, user]."""
    text = rrm_prompt()
    user = fill(text["user"], question=query, answer1=a, answer2=b)
    return [{"role": "system", "content": text["system"]}, {"role": "user", "content": user}]


def transcript(messages):
    """Messages [{"role", "content"}] of a conversation -> the plain text that stands for a query.

    The authors' code knows queries of one turn only, so the form is ours.

    >>> transcript([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}])
    'User: Hi\\n\\nAssistant: Yes?'
    """
    turns = [(m.get("role") or "user", m["content"]) for m in messages]
    return "\n\n".join(f"{role.capitalize()}: {content}" for role, content in turns)


def opened(tokenizer, prompt):
    """Ids of a toy prompt: its text as plain characters, and the mark that opens the thinking."""
    return tokenizer.encode(prompt.removesuffix(THINK)) + tokenizer.encode_template(THINK)


def query_prompt(tokenizer, query):
    """Prompt ids that ask a model for a response to a query (text or messages): the toy's own form,
    or the chat template's. Raises UserError for a conversation put to the toy."""
    if template_of(tokenizer) != "toy":
        turns = [{"role": "user", "content": query}] if isinstance(query, str) else query
        return tokenizer.chat(turns)
    if not isinstance(query, str):
        raise UserError("the toy policy can't read a conversation of several turns")
    return opened(tokenizer, toy_solve(query))


def opens_thinking(tokenizer, prompt):
    """Whether a prompt (ids) ends inside an opened thought."""
    begin, end = tokenizer.think_ids
    last = next((token for token in reversed(prompt) if token in (begin, end)), None)
    return last is not None and last == begin


def judge_prompt(tokenizer, query, a, b, template="rrm", think=True):
    """Prompt ids of one comparison, ending inside the opened thinking.

    query, a, b: text from outside, encoded as plain characters. think=False closes the thinking at
    once (DirectJudge). Raises UserError for an unknown template.
    """
    if template == "toy":
        ids = opened(tokenizer, toy_judge(query, a, b))
    elif template == "rrm":
        ids = tokenizer.chat(rrm_messages(query, a, b))
    else:
        raise UserError(f"template {template!r} is not one of rrm, toy")
    return ids if think else ids + tokenizer.encode_template(END_THINK)


def template_of(tokenizer):
    """ "toy" for a tokenizer that has the verdicts as tokens, else "rrm"."""
    return "rrm" if tokenizer.token_id(verdict_text(1)) is None else "toy"
