r"""Is a response's final answer the known one? By rule alone: numbers, choice letters, boxed text.

A rule that guesses poisons the pairs built on it, on either side: a right response marked wrong is
as bad as the reverse. So there are three outcomes, right, wrong and "can't be said", and what is
not plainly one of the first two is the third: an answer that nothing marks as the final one, a unit
that differs, a decimal that may be rounded, an expression that is another text.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import inf

from nanorrm.judge.verdict import last_boxed
from nanorrm.model.tokenizer import END_THINK

NUMBER = re.compile(
    r"""([-+]?) \s* ([$€£]?) \s* (-?) \s*
    (?: (?:(\d+)\s+)? \(?(-?\d+)\)? \s*/\s* \(?(\d+)\)?                      # 3/4, 1 3/4
      | (\d{1,3}(?:,\d{3})+(?:\.\d+)? | \d+(?:\.\d+)? | \.\d+)               # 1,234.5  1234  .5
        (?: (?:[eE] | \s*\*\s*10\s*\^\s*) \(?([-+]?\d{1,3})\)? )? )          # 1.2e3, 1.2*10^3
    (\s*%)? (\s*)((?:[A-Za-z][A-Za-z.]*(?:\^?[23])?(?:\ |/|$)){0,4})""",
    re.VERBOSE,
)
LETTER = re.compile(r"\(?([A-J])\)?(?![A-Za-z0-9])(?![ ]\w)(.*)", re.DOTALL)
ANSWER_IS = re.compile(r"\banswer(?:\s+is|\s*:|\s*=)[\s:]*", re.IGNORECASE)
CLAUSE_END = re.compile(r"[,;.!?](?:\s|$)|\n|\s(?:because|since|as|so|which)\b")
CURRENCY = {"": "", "$": "dollar", "€": "euro", "£": "pound"}
# these stand right after their number without a blank; what else does may be a product (5x, 2ab)
TIGHT_UNIT = re.compile("(cm|mm|km|kg|mg|ml|oz|ft|lbs?|min|hrs?|mph|kph|cents|dollars)[^a-z]*")
# words that change the value, or make the number a part of something else
NO_UNIT = re.compile(
    r"\b(hundred|thousand|[mbtz]r?illion|dozen|half|halves|thirds?|quarters|pi|sqrt|and|or|to|over"
    r"|times|plus|minus|of|am|pm|[xyznkei])\b"
)


@dataclass(frozen=True)
class Number:
    """An exact value and how it was written."""

    value: Fraction  # of a percentage: as written, 50 of 50%
    decimals: float  # digits after the point; inf for what is exact: a fraction, a power of ten
    percent: bool
    unit: tuple[str, ...]  # words, lower case, without plural; () for none


def plain(text):
    r"""LaTeX and Markdown of a short answer -> plain text.

    >>> plain(r"$\frac{3}{4}$"), plain(r"**1{,}250\,\text{cm}^2**"), plain(r"x = \$18.")
    ('(3)/(4)', '1,250 cm^2', '$18')
    """
    text = text.strip().replace("−", "-").replace("×", "*").replace("**", "")
    for pattern, into in (
        (r"\\\(|\\\)|\\\[|\\\]|\\left|\\right|\\[!,;:]", ""),
        (r"\{,\}", ","),
        (r"\\([$%])", r"\1"),
        (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" (\1)/(\2)"),
        (r"\\[dt]?frac\s*(\d)\s*(\d)", r" (\1)/(\2)"),
        (r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1"),
        (r"\\times|\\cdot", "*"),
        (r"\^\{?\\circ\}?|°", " degrees"),
        (r"\^\{([^{}]*)\}", r"^\1"),
        (r"^\$(.*)\$$", r"\1"),
        (r"\\ |~|\s+", " "),
        (r"^\s*[A-Za-z]\s*=\s*", ""),
        (r"\.?\s*$", ""),
    ):
        text = re.sub(pattern, into, text)
    return text.strip()


@lru_cache(4096)
def number(text):
    r"""A short answer -> Number, or None if it is not one number with at most a unit behind it.

    >>> number("$1,250.50").value, number("-3/4").value, number("1 1/2 cups").value
    (Fraction(2501, 2), Fraction(-3, 4), Fraction(3, 2))
    >>> [number(text) for text in ("1,23", "3:30", "5x", "2 and 3", "5 million", "1/0", "")]
    [None, None, None, None, None, None, None]
    """
    match = NUMBER.fullmatch(plain(text)) if len(text) <= 200 else None
    if match is None:
        return None
    sign, currency, inner, whole, top, bottom, decimal, power, percent, gap, unit = match.groups()
    unit = unit.lower().replace(".", "").strip()
    if unit in ("percent", "per cent"):
        percent, unit = "%", ""
    tight = unit and not gap and not TIGHT_UNIT.fullmatch(unit)
    if tight or NO_UNIT.search(unit) or (sign and inner) or (bottom and not int(bottom)):
        return None
    if decimal is None:
        value, decimals = Fraction(int(top), int(bottom)) + int(whole or 0), inf
    else:
        value = Fraction(decimal.replace(",", "")) * Fraction(10) ** int(power or 0)
        decimals = inf if power else len(decimal.partition(".")[2])
    if "-" in (sign, inner):
        value = -value
    words = [word.removesuffix("s") for word in re.split("[ /]", unit or CURRENCY[currency])]
    return Number(value, decimals, bool(percent), tuple(filter(None, words)))


def same(a, b):
    r"""Whether two short answers are the same: True, False, or None where this can't be said.

    >>> same("1,000", "1000.0"), same(r"\frac{1}{2}", "0.5"), same("$18", "18 dollars")
    (True, True, True)
    >>> same("18", "19"), same("B", "(C)"), same("50%", "50"), same("50%", "1/2")
    (False, False, True, True)
    >>> [same(*pair) for pair in [("0.5%", "0.5"), ("0.33", "1/3"), ("5 km", "5 miles")]]
    [None, None, None]
    >>> same("x+1", "x + 1"), same("x+1", "1+x")
    (True, None)
    """
    x, y = number(a), number(b)
    if x and y:
        return same_number(x, y)
    if x or y:
        return None
    a, b = (re.sub(r"\s", "", plain(text)).lower() for text in (a, b))
    letters = [re.fullmatch(r"\(?([a-j])\)?", text) for text in (a, b)]
    if all(letters):
        return letters[0][1] == letters[1][1]
    if {a, b} in ({"yes", "no"}, {"true", "false"}):
        return False
    return True if a == b and a else None


def same_number(x, y):
    """`same` of two Numbers.

    A unit may be missing on one side, not differ. A percentage equals its share, and also the bare
    number of percents, unless that could be a share itself (0.5% beside 0.5).
    """
    if x.unit and y.unit and x.unit != y.unit:
        return None
    if x.percent != y.percent:
        share, other = (x, y) if x.percent else (y, x)
        if share.value == other.value and share.value:
            return True if abs(share.value) > 1 else None
        x, y = Number(share.value / 100, share.decimals + 2, False, ()), other
    if x.value == y.value:
        return True
    places = min(x.decimals, y.decimals) if x.decimals != y.decimals else 0
    rounded = places and abs(x.value - y.value) * 10**places <= Fraction(1, 2)
    return None if rounded else False


def marked(text):
    r"""What a text marks as its answer, by the last \boxed{} or GSM8K's `####`; None if neither."""
    boxed = last_boxed(text)
    if boxed is None and "####" in text:
        boxed = text.rpartition("####")[2].strip().partition("\n")[0]
    return boxed.strip() if boxed and boxed.strip() else None


def extract(text, kind="number"):
    r"""The final answer of a response as it is written there, or None; thinking does not count.

    The last \boxed{}, else behind the last `####`, else behind the last "answer is" up to the end
    of the clause, else the last line. kind: "number", "choice" (a letter, A to J) or "text".

    >>> extract(r"so 3+4=7</think>It is \boxed{7}."), extract("The answer is 7, as 3+4=7.")
    ('7', '7')
    >>> extract(r"Answer: (B) 3 km", "choice"), extract("A good question.", "choice") is None
    ('B', True)
    """
    text = text.rpartition(END_THINK)[2].strip()
    answer = marked(text)
    if answer is None:
        *_, said = ANSWER_IS.split(text)
        answer = CLAUSE_END.split(said)[0] if said != text else text.rpartition("\n")[2]
    if kind != "choice":
        return answer.strip() or None
    letter = LETTER.fullmatch(plain(answer))
    return letter and letter[1]


def kind_of(answer):
    """What kind of answer a known one is: number, choice or text.

    >>> kind_of("2,125"), kind_of("(B)"), kind_of("x+1")
    ('number', 'choice', 'text')
    """
    if number(answer):
        return "number"
    return "choice" if re.fullmatch(r"\(?[A-J]\)?\.?", answer.strip()) else "text"
