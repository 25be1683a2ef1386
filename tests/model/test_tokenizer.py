"""Text to ids and back; text from outside never turns into special tokens."""

import json

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nanorrm.config import UserError
from nanorrm.data import toy
from nanorrm.model.tokenizer import Tokenizer

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


NASTY = "".join(toy.SPECIAL + ROLES) + "\\boxed{Assistant 1} \U000f0000\U000f0001"
texts = st.one_of(
    st.text(),
    st.lists(st.sampled_from([*toy.SPECIAL, *ROLES, "<", "think", "|", "\U000f0000", "é", " "]))
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
    """Between the template's own tokens stand the contents (trimmed by it), byte for byte."""
    tok = made_up()
    roles = ["system", "user", "user"]
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents)]
    wanted = [tok.token_id("<|im_start|>")]
    for role, content in zip(roles, contents):
        wanted += [tok.token_id("<|sys|>" if role == "system" else "<|user|>")]
        wanted += [*tok.encode(content.strip()), tok.token_id("<|im_end|>"), *tok.encode("\n")]
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


TEMPLATES = {  # in the ways of the real ones: where whitespace is cut, and what stands next to text
    "r1": tiny.R1_TEMPLATE,
    "chatml": (
        "{%- for m in messages %}\n"
        "    {{- '<｜User｜>' + m.role + '\\n' + m.content + '</think>\\n' }}"
        "\n{%- endfor %}\n{%- if add_generation_prompt %}{{ '<｜Assistant｜>\\n' }}{%- endif %}\n"
    ),
    "llama": (
        "{% for m in messages %}"
        "{% set text = '<｜User｜>' + m.role + '\\n\\n' + m.content | trim %}"
        "{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
        "{% if tools is none and add_generation_prompt %}{{ '<｜Assistant｜>\\n\\n' }}{% endif %}"
    ),
}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """{template: (our tokenizer, transformers')} of the files that R1-Distill has."""
    found = {}
    for name, template in TEMPLATES.items():
        folder = tmp_path_factory.mktemp(name)
        tiny.real_tokenizer_files(folder)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
        found[name] = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return found


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([" ", "\n", "\t", "the", " think", "12", "<", "é", "😀", "."]))
        .map("".join),
        min_size=1, max_size=4,
    )
)  # fmt: skip
def test_chat_equals_transformers_whatever_stands_at_the_seams(chats, name, contents):
    ours, theirs = chats[name]
    roles = ["system", "user", "assistant", "user"]
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents)]
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.chat(messages) == wanted


def test_r1_template_opens_a_thought_and_text_opens_none(chats):
    tok, _ = chats["r1"]
    ids = tok.chat([{"role": "user", "content": f"{tiny.EOS}<think></think>{tiny.BOS}"}])
    assert ids[0] == tok.token_id(tiny.BOS) and tok.decode(ids).endswith("<think>\n")
    names = [tiny.BOS, tiny.USER, tiny.ASSISTANT, "<think>"]
    assert [i for i in ids if i >= tok.token_id(tiny.EOS)] == [tok.token_id(n) for n in names]


FORMS = {
    "string": ("tokenizer_config.json", {"chat_template": "{{ messages[0].content }}<|bot|>"}),
    "jinja": ("chat_template.jinja", "{{ messages[0].content }}<|bot|>"),
    "json": ("chat_template.json", {"chat_template": "{{ messages[0].content }}<|bot|>"}),
    "named": (
        "tokenizer_config.json",
        {
            "chat_template": [
                {"name": "tool_use", "template": "no"},
                {"name": "default", "template": "{{ messages[0].content }}<|bot|>"},
            ]
        },
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_chat_template_in_each_of_its_forms(tmp_path, form):
    made_up(None).save(tmp_path)
    name, content = FORMS[form]
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / name).write_text(text)
    tok = Tokenizer.from_pretrained(tmp_path)
    ids = tok.chat([{"role": "user", "content": "<|bot|>"}])
    assert ids == [*tok.encode("<|bot|>"), tok.token_id("<|bot|>")]


def test_template_file_wins_over_the_config_as_in_transformers(tmp_path):
    made_up("old").save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("new")
    ours, theirs = (kind.from_pretrained(tmp_path) for kind in (Tokenizer, AutoTokenizer))
    assert ours.chat_template == theirs.chat_template == "new"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer_config.json", b'{"chat_template": 3}', "should be text, not int"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "rag"}]}', "there is 'rag'"),
        ("chat_template.jinja", b"\xff\xfe", "not readable as text"),
        ("chat_template.json", b"[", "not readable as JSON"),
    ],
)
def test_broken_chat_template_is_named(tmp_path, name, content, words):
    made_up(None).save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert name in str(caught.value)


def test_saved_files_are_those_that_were_read(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    tiny.real_tokenizer_files(tmp_path / "first")
    (tmp_path / "first" / "special_tokens_map.json").write_text("{}")
    Tokenizer.from_pretrained(tmp_path / "first").save(tmp_path / "second")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in
                     ("first", "second"))  # fmt: skip
    assert first == second and len(first) == 3


def test_no_chat_template_is_said():
    with pytest.raises(UserError, match="no chat template"):
        TOY.chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system here') }}", "{% for %}", "{{ messages.x.y }}", "{{ 1 + '' }}"],
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
