"""Prompts hold the user's text as characters, and verdicts are read by the released rule."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorrm.config import UserError
from nanorrm.judge import prompts
from nanorrm.judge.prompts import fill, judge_prompt, rrm_prompt
from nanorrm.judge.verdict import last_boxed, parse_verdict, thought_of
from tests.model.test_tokenizer import NASTY, TOY, made_up, texts


@settings(max_examples=100, deadline=None)
@given(texts, texts, texts, st.booleans())
def test_toy_prompt_holds_text_as_characters(query, a, b, think):
    ids = judge_prompt(TOY, query, a, b, "toy", think)
    own = [256] if think else [256, 257]
    assert ids[-len(own) :] == own
    assert max(ids[: -len(own)]) < 256
    assert TOY.decode(ids[: -len(own)]) == f"?{query}\n1:{a}\n2:{b}\n"


CHAT = made_up()
FIRST_SPECIAL = len(CHAT) - 7  # the special tokens come last


@settings(max_examples=60, deadline=None)
@given(texts, texts, texts)
def test_rrm_prompt_holds_text_as_characters(query, a, b):
    """Its special ids are those of a harmless prompt, in their order, and the rest is the text."""
    ids = judge_prompt(CHAT, query, a, b, "rrm")
    harmless = judge_prompt(CHAT, "q", "x", "y", "rrm")
    special, wanted = ([i for i in x if i >= FIRST_SPECIAL] for x in (ids, harmless))
    assert special == wanted
    values = {"{question}": query, "{answer1}": a, "{answer2}": b}
    pieces = re.split("({question}|{answer1}|{answer2})", rrm_prompt()["user"])
    assert len(pieces) == 7
    user = CHAT.decode(ids[ids.index(CHAT.token_id("<|user|>")) + 1 : -5])
    assert user == "".join(values.get(piece, piece) for piece in pieces)


def test_nasty_text_in_every_place():
    ids = judge_prompt(CHAT, NASTY, NASTY, NASTY, "rrm", think=False)
    special = [CHAT.decode([i]) for i in ids if i >= FIRST_SPECIAL]
    system, user = ["<|sys|>", "<|im_end|>"], ["<|user|>", "<|im_end|>"]
    assert special == ["<|im_start|>", *system, *user, "<|bot|>", "<think>", "</think>"]
    assert CHAT.decode(ids).count(NASTY) == 3


def test_fill_is_simultaneous():
    assert fill(r"{q}|{a}|\boxed{A}{x}", q="{a}{q}", a="{q}") == r"{a}{q}|{q}|\boxed{A}{x}"


def test_query_that_names_a_placeholder_is_not_rewritten():
    ids = judge_prompt(CHAT, "what is {answer1}?", r"{question}\1", r"\g<0>{answer2}", "rrm")
    text = CHAT.decode(ids)
    for words in ("what is {answer1}?", r"{question}\1", r"\g<0>{answer2}"):
        assert text.count(words) == 1


def test_rrm_prompt_is_the_released_one_byte_for_byte(data, root):
    asset = root / "nanorrm" / "assets" / "rrm_prompt.json"
    assert asset.read_bytes() == (data / "rrm_prompt.json").read_bytes()
    assert rrm_prompt() == json.loads(asset.read_bytes())


def test_unknown_template_is_refused():
    with pytest.raises(UserError, match="rrm, toy"):
        judge_prompt(TOY, "q", "a", "b", "rmm")


def test_template_follows_the_tokenizer():
    assert prompts.template_of(TOY) == "toy" and prompts.template_of(CHAT) == "rrm"


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (r"so 18</think>\boxed{Assistant 2}", 2),
        (r"</think>\boxed{Assistant 1}", 1),
        (r"<think>x</think> I prefer \boxed{Assistant 1}, by far.", 1),  # trailing text
        (r"\boxed{Assistant 1}", None),  # thinking never closed
        (r"\boxed{Assistant 1}</think>", None),  # the box is in the thinking only
        (r"\boxed{Assistant 1}</think>\boxed{Assistant 2}", 2),
        (r"</think>\boxed{Assistant 1} no, \boxed{Assistant 2}", 2),  # the last counts
        (r"</think>\boxed{Assistant 1} or \boxed{both}", None),
        (r"</think>\boxed{Assistant 1 is better}", None),  # extra words
        (r"</think>\boxed{the Assistant 2}", None),
        (r"</think>\boxed{Assistant 3}", None),
        (r"</think>\boxed{assistant 1}", None),
        (r"</think>\boxed{1}", None),
        (r"</think>\boxed{\text{Assistant 1}}", None),  # nested braces belong to the content
        (r"</think>\boxed{Assistant 1}}", 1),
        (r"</think>\boxed{Assistant 2} \boxed{Assistant 1", 2),  # an unclosed box is none
        (r"</think>\boxed{Assistant 1", None),
        (r"</think>\boxed {Assistant 1}", None),
        (r"</think>Assistant 1", None),
        (r"</think>\boxed{Assistant 1}</think>", None),  # closed again: nothing after the last
        (r"</think>a</think>\boxed{Assistant 1}", 1),
        ("</think>\n\n\\boxed{Assistant 1}\n", 1),
        ("</think>", None),
        ("", None),
    ],
)
def test_verdicts(text, verdict):
    assert parse_verdict(text) == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [(r"\boxed{Assistant 1}", 1), (r"hm</think>\boxed{Assistant 2}", 2), ("", None)],
)
def test_verdicts_where_the_prompt_closed_the_thinking(text, verdict):
    assert parse_verdict(text, closed=True) == verdict


def test_last_boxed_matches_braces():
    assert last_boxed(r"\boxed{a{b{c}}d} x") == "a{b{c}}d"
    assert last_boxed(r"\boxed{}") == ""
    assert last_boxed("none") is None


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="\\boxed{}Asitn 12</think>"))
def test_any_text_has_a_verdict_or_none(text):
    assert parse_verdict(text) in (1, 2, None)
    assert parse_verdict(text + r"</think>\boxed{Assistant 2}") == 2


def test_thought_is_what_stands_before_the_close():
    assert thought_of("<think> 7+8=15 </think>rest") == "7+8=15"
    assert thought_of("never closed") == "never closed"
    assert thought_of(r"\boxed{Assistant 1}", closed=True) == ""
