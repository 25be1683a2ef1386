"""Answers checked by rule, on GSM8K's worked answers and against sympy's reading of numbers."""

import json
import re
from fractions import Fraction

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from nanorrm.data.answers import extract, kind_of, marked, number, same


@pytest.fixture(scope="module")
def gsm8k(data):
    """[(worked answer, the integer behind its ####)] of all 1,319 problems."""
    lines = (data / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()
    worked = [json.loads(line)["answer"] for line in lines]
    values = [int(re.search(r"#### (-?[\d,]+)$", text)[1].replace(",", "")) for text in worked]
    assert len(worked) == 1319
    return list(zip(worked, values))


WAYS = {
    "as it is": "#### {}",
    "boxed": r"So it is \boxed{{{}}}.",
    "boxed with dollars and a point": r"It is $\boxed{{\${}.00}}$",
    "in words": "The final answer is {}.",
    "in words with a unit": "The answer is: {} eggs.",
    "bold": "**Answer: {}**",
    "alone on the last line": "{}",
}


@pytest.mark.parametrize("way", WAYS)
def test_gsm8k_worked_answers_are_right_and_perturbed_ones_wrong(gsm8k, way):
    """All 1,319 of them, however the answer is marked, behind a thought that says otherwise."""
    for worked, value in gsm8k:
        for shown, wanted in ((value, True), (value + 1, False), (-value or 7, False)):
            number = f"{shown:,}" if value % 2 else str(shown)
            text = worked.rpartition("####")[0] + WAYS[way].format(number)
            text = rf"<think>\boxed{{12345}} or #### 12345{'</think>'}{text}"
            assert same(extract(text), str(value)) is wanted, text


def test_gsm8k_answers_are_the_same_where_they_are_equal_and_nowhere_else(gsm8k):
    texts = {worked.rpartition("#### ")[2]: value for worked, value in gsm8k}
    assert len(texts) > 300
    for a, x in texts.items():
        for b, y in texts.items():
            assert same(a, b) is (x == y), (a, b)


def test_gsm8k_known_answers_are_numbers(gsm8k):
    for worked, value in gsm8k:
        assert kind_of(marked(worked)) == "number" and number(marked(worked)).value == value


plain = st.one_of(
    st.integers(-(10**9), 10**9).map(str),
    st.decimals(-(10**6), 10**6, allow_nan=False, places=3).map(lambda d: f"{d:f}"),
    st.tuples(st.integers(-99, 99), st.integers(1, 99)).map(lambda f: f"{f[0]}/{f[1]}"),
)


@given(plain)
def test_value_is_what_sympy_reads(text):
    value = sympy.sympify(text, rational=True)
    assert number(text).value == Fraction(int(value.p), int(value.q))


@given(
    st.fractions(-1000, 1000, max_denominator=50), st.sampled_from(["{}/{}", r"\frac{{{}}}{{{}}}"])
)
def test_fractions_however_they_are_written(value, form):
    assert same(form.format(value.numerator, value.denominator), str(value)) is True


@given(st.integers(0, 10**12))
def test_thousands_may_be_grouped(n):
    grouped = f"{n:,}"
    for text in (grouped, grouped.replace(",", "{,}"), f"${grouped}$", rf"\${grouped}", f"{n}.00"):
        assert same(text, str(n)) is True
    assert same(grouped, str(n + 1)) is False


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_is_judged_and_the_order_does_not_matter(a, b):
    assert same(a, b) is same(b, a)
    assert same(a, b) in (True, False, None)
    extract(a + b), extract(a + b, "choice")


SAME = [
    ("$18", "18 dollars"), ("18 egg", "18 eggs"), ("18 eggs per day", "18"), ("-$5", "-5"),
    ("1 1/2", "1.5"), (r"1\frac12", "3/2"), (r"-\dfrac{3}{4}", "-0.75"), ("1.5e3", "1500"),
    (r"1.5 \times 10^{3}", "1500"), ("25%", "0.25"), (r"25\%", "25"), ("25 percent", "1/4"),
    (r"\text{12 apples}", "12"), (r"x = 7", "7"), (r"90^\circ", "90"), ("5cm", "5 cm"), ("0", "-0"),
    ("(B)", "b"), ("Yes", "yes."), (r"\frac{\pi}{2}", r"\frac{\pi} {2}"), ("100%", "1"),
]  # fmt: skip
DIFFER = [
    ("18", "-18"), ("18.4", "18"), ("1/3", "0.25"), ("25%", "26"), ("25%", "2.5"), ("A", "C"),
    ("yes", "no"), ("1,000", "1"), ("1e3", "1e4"), ("0%", "1"),
]  # fmt: skip
UNSAID = [
    ("0.33", "1/3"), ("3.14", "3.14159"), ("33.3%", "1/3"), ("0.5%", "0.5"), ("5 km", "5 miles"),
    ("$5", "5 cents"), ("5 million", "5"), ("2 dozen", "2"), ("5x", "5"), ("2ab", "2"),
    ("6 pm", "6"), ("1,23", "123"), ("3:30", "330"), ("(1,2)", "(2,1)"), ("1/0", "0"),
    ("x+1", "1+x"), ("", ""),
    ("2 and 3", "2"), ("--3", "3"), ("9" * 5000, "9"), ("yes", "true"), ("B", "5"),
    ("1 000", "1000"), ("1 2", "12"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("pairs", "verdict"),
    [(SAME, True), (DIFFER, False), (UNSAID, None)],
    ids=["same", "differ", "unsaid"],
)
def test_what_is_said_of(pairs, verdict):
    for a, b in pairs:
        assert same(a, b) is same(b, a) is verdict, (a, b)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("#### 1\nno:\n#### 2,125", "2,125"),
        ("The answer is 3. Wait, the answer is 4, I think!", "4"),
        ("the answer is 18 because there are 3 boxes", "18"),
        (r"\boxed{9}</think>The answer is 3.5.", "3.5"),
        ("", None),
        ("thinking</think>", None),
    ],
)
def test_last_marked_answer_counts(text, answer):
    assert extract(text) == answer


@pytest.mark.parametrize(
    "text", ["There are 18 eggs and 3 boxes.", "3*5=15", "the answer is not 5"]
)
def test_number_that_nothing_marks_is_not_an_answer(text):
    assert same(extract(text), "15") is same(extract(text), "5") is same(extract(text), "3") is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: B", "B"),
        ("The answer is (C).", "C"),
        ("the answer is **D**", "D"),
        (r"\boxed{\text{(B)}}", "B"),
        (r"\boxed{B. 42 km}", "B"),
        ("So I choose:\nC", "C"),
        ("The answer is A good one", None),
        ("I think so", None),
        ("Because", None),
        (r"\boxed{42}", None),
    ],
)
def test_choice(text, letter):
    assert extract(text, "choice") == letter
