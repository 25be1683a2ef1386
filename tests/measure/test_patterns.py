"""Patterns of reasoning: whole words, any case, one count per thought."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorrm.measure.patterns import MATCHERS, PHRASES, by, patterns

SAYS = {  # sentences with the groups that a reader finds in them
    "Wait, that is wrong.": {"transition"},
    "ALTERNATIVELY, take the root.": {"transition"},
    "I should verify the sum.": {"reflection"},
    "Having verified it, I am done.": {"reflection"},
    "Let me double-check the units.": {"reflection"},
    "Let me re-examine\nthe claim.": {"reflection"},
    "Compared to A, B is longer.": {"comparison"},
    "Response 2 is clearer and more honest.": {"comparison"},
    "Let me break this down.": {"breakdown"},
    "Breaking it  down: a, then b.": {"breakdown"},
    "Going step by step.": {"breakdown"},
    "Hold on. Is A better? Let me check.": {"transition", "comparison", "reflection"},
    "The waiter paid; moreover, the first response is fine.": set(),  # parts of words, an ordinal
    "The stepmother awaits Checkov's firstborn.": {"reflection"},  # check*: the price of endings
    "7+8=15,15-5=10|12:12y|10:10n": set(),
    "": set(),
}


@pytest.mark.parametrize("text", SAYS)
def test_groups_of_a_sentence(text):
    assert {group for group, share in patterns([text]).items() if share} == SAYS[text]


def test_every_phrase_is_found_in_its_own_group_whatever_the_case():
    for group, phrases in PHRASES.items():
        for phrase in phrases.split(", "):
            words = phrase.replace("*", "ing")
            for text in (words, f"so, {words.upper()}.", words.replace(" ", "-")):
                assert patterns([text])[group] == 1, (phrase, text)
            assert patterns([f"x{words}x"])[group] == 0 or " " in words


@given(st.lists(st.text(alphabet="waitcheckmorestep .-\n", max_size=30), max_size=8))
def test_shares_are_means_of_single_thoughts(thoughts):
    together = patterns(thoughts)
    for group in MATCHERS:
        alone = [patterns([thought])[group] for thought in thoughts]
        assert together[group] == (pytest.approx(sum(alone) / len(alone)) if alone else None)


def test_long_thoughts_take_linear_time():
    """No phrase may make the search go back and forth: `break* down` on a text full of breaks."""
    text = "break breaking " * 200_000 + "   -" * 100_000
    assert patterns([text]) == dict.fromkeys(PHRASES, 0)


def test_table_by_a_field():
    def record(outcome, *thoughts):
        return {"outcome": outcome, "votes": [{"thought": t} for t in thoughts]}

    table = by([record("right", "wait", "so"), record("wrong", "step"), record("right")], "outcome")
    assert list(table) == ["right", "wrong"]
    assert table["right"]["thoughts"] == 2 and table["right"]["transition"] == 0.5
    assert table["wrong"] == {
        "thoughts": 1, "transition": 0, "reflection": 0, "comparison": 0, "breakdown": 1
    }  # fmt: skip
    # rankings have no votes of their own; a record may lack the field, a vote its thought
    assert by([{"kind": "ranking"}, record("skipped")], "outcome") == {}
    assert by([{"votes": [{"thought": None}]}], "section")[""]["thoughts"] == 1


def test_real_text_has_the_patterns_a_plain_search_finds(data):
    """GSM8K's worked answers: the group of the plainest words, against a set of words."""
    text = (data / "gsm8k_test.jsonl").read_text().splitlines()[:300]
    words = [set(re.split(r"[^a-z]+", line.lower())) for line in text]
    plain = sum(any(w in {"step", "steps", "firstly"} for w in line) for line in words)
    assert patterns(text)["breakdown"] == pytest.approx(plain / len(text), abs=0.02)
