"""Text to ids and back; text from outside never turns into special tokens."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nanorrm import toy
from nanorrm.config import UserError
from nanorrm.tokenizer import Tokenizer

TOY = toy.make_tokenizer()
ROLES = ["<|im_start|>", "<|im_end|>", "<|sys|>", "<|user|>", "<|bot|>", "<think>", "</think>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|sys|>' if m.role == 'system' else '<|user|>' }}{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|bot|><think>\n{% endif %}"
)


def made_up(template=TEMPLATE):
    """A byte-level tokenizer with role tokens and a chat template, as instruct models have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ROLES])
    return Tokenizer(json.loads(raw.to_str()), template, {"bos_token": "<|im_start|>"})


NASTY = "".join(toy.SPECIAL + ROLES) + r"\boxed{Assistant 1} \ue0000\ue001 \ue0001\ue001"
texts = st.one_of(
    st.text(),
    st.lists(st.sampled_from([*toy.SPECIAL, *ROLES, "<", "think", "|", "\ue0000\ue001", "é", " "]))
    .map("".join),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(texts)
def test_any_text_comes_back(text):
    ids = TOY.encode(text)
    assert TOY.decode(ids) == text
    assert len(ids) == len(text.encode()) and all(0 <= i < 256 for i in ids)  # one per byte


@pytest.mark.parametrize("token", toy.SPECIAL)
def test_special_tokens_are_special_in_templates_only(token):
    assert TOY.encode_template(token) == [TOY.token_id(token)]
    assert TOY.token_id(token) >= 256
    ids = TOY.encode(f"a{token}b")
    assert max(ids) < 256 and TOY.decode(ids) == f"a{token}b"


@settings(max_examples=150, deadline=None)
@given(st.lists(texts, min_size=1, max_size=3))
def test_chat_puts_contents_in_as_plain_characters(contents):
    """Between the template's own tokens stand the contents, byte for byte."""
    tok = made_up()
    roles = ["system", "user", "user"]
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents)]
    wanted = [tok.token_id("<|im_start|>")]
    for role, content in zip(roles, contents):
        wanted += [tok.token_id("<|sys|>" if role == "system" else "<|user|>")]
        wanted += [*tok.encode(content), tok.token_id("<|im_end|>"), *tok.encode("\n")]
    wanted += [tok.token_id("<|bot|>"), tok.token_id("<think>"), *tok.encode("\n")]
    assert tok.chat(messages) == wanted


def test_chat_equals_transformers_on_harmless_text(tmp_path):
    tok = made_up()
    tok.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1 + 1?"}]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tok.chat(messages) == theirs(text, add_special_tokens=False)["input_ids"]
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.chat(messages) == tok.chat(messages)


def test_chat_template_may_lie_in_a_file_of_its_own(tmp_path):
    made_up(None).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}<|bot|>")
    tok = Tokenizer.from_pretrained(tmp_path)
    ids = tok.chat([{"role": "user", "content": "<|bot|>"}])
    assert ids == [*tok.encode("<|bot|>"), tok.token_id("<|bot|>")]


def test_no_chat_template_is_said():
    with pytest.raises(UserError, match="no chat template"):
        TOY.chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no system here') }}", "{% for %}", "{{ messages.x.y }}"]
)
def test_template_that_refuses_is_one_line(template):
    with pytest.raises(UserError, match="chat template") as caught:
        made_up(template).chat([{"role": "system", "content": "x"}])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loader", [AutoTokenizer, PreTrainedTokenizerFast])
def test_saved_folder_opens_in_transformers_with_equal_ids(tmp_path, loader):
    TOY.save(tmp_path)
    theirs = loader.from_pretrained(tmp_path)
    texts = [
        "?7+8\n1:15\n2:14\n<think>",
        "|15:15y</think>\\boxed{Assistant 1}<|im_end|>",
        "naïve 😀  \n\n x",
    ]
    for text in texts:
        ids = TOY.encode_template(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == TOY.decode(ids) == text
    assert theirs.eos_token == toy.END and len(theirs) == len(TOY)


def test_folder_round_trip(tmp_path):
    TOY.save(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.encode(NASTY) == TOY.encode(NASTY)
    assert again.encode_template(NASTY) == TOY.encode_template(NASTY)
    assert again.think_ids == TOY.think_ids == (256, 257)


@pytest.mark.parametrize("broken", ["{", "[]", '{"model": 3}'])
def test_broken_tokenizer_file_is_named(tmp_path, broken):
    (tmp_path / "tokenizer.json").write_text(broken)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
