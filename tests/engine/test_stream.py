"""Generations shown as they come: nothing of them is lost, torn or able to steer a terminal."""

import io

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from nanorrm.config import EngineConfig
from nanorrm.engine.engine import Engine
from nanorrm.engine.sampling import SamplingParams
from nanorrm.engine.stream import Watcher, printable, stream


@given(st.text(st.characters(max_codepoint=0x2FFF)))
def test_printable_keeps_what_can_be_printed(text):
    said = printable(text)
    assert len(said) == len(text)
    assert all(a == b or (b == "\ufffd" and not a.isprintable()) for a, b in zip(text, said))
    assert all(c in "\t\n" or ord(c) >= 32 for c in said)


class Pieces(io.StringIO):
    """A stream that remembers what it got in one piece."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, text):
        self.pieces.append(text)
        return super().write(text)


@pytest.mark.parametrize("blocks", [1024, 12])  # many, and so few that sequences are preempted
def test_the_first_generation_comes_piece_by_piece_and_whole(toy_base, blocks):
    config = EngineConfig(num_blocks=blocks, block_size=8)
    engine, out = Engine(toy_base.model, toy_base.tokenizer, config), Pieces()
    prompt = engine.tokenizer.encode_template("!4+7-3+5-2+6\n<think>")
    params = SamplingParams(n=5, max_tokens=60)
    calm = engine.generate([prompt], params)[0]
    engine.report()
    with stream(engine, out):
        completions = engine.generate([prompt], params)[0]
    assert (engine.report()["engine/preemptions"] > 0) == (blocks == 12)
    assert [c.ids for c in completions] == [c.ids for c in calm]  # looking changes nothing
    assert out.getvalue() == completions[0].text + "\n"
    assert len(out.pieces) > 10 and engine.on_step is None


def test_every_batch_has_its_turn_even_if_it_takes_one_step(tokenizer):
    engine = tiny.engine(tokenizer, tiny.model())
    out = Pieces()
    with stream(engine, out):
        short = [
            engine.generate([prompt], SamplingParams(max_tokens=1))[0][0]
            for prompt in tiny.prompts(3)
        ]
    assert out.getvalue() == "".join(printable(c.text) + "\n" for c in short)


def test_a_letter_of_several_tokens_comes_whole(toy_base):
    """The toy tokenizer spells é and 猫 in bytes, one token each."""
    engine, out = toy_base, Pieces()
    ids = engine.tokenizer.encode("é猫x")
    assert len(ids) == 6
    watcher = Watcher(engine, out)
    for end in range(1, 7):
        watcher.print(ids[:end])
    assert out.pieces == ["é", "猫", "x"]
    watcher.print(ids + ids[:1], last=True)
    assert out.pieces[3:] == ["\ufffd\n"]
