"""Text to ids and back, with one rule: text from outside never becomes a special token.

Wraps a Hugging Face tokenizer.json. Two encoders are made from the same file: one knows the special
tokens and is used for our own templates; the other has them removed, so that a response containing
`</think>` or `<|im_end|>` arrives as plain characters.
"""

import json
import re
from functools import cache
from pathlib import Path

import jinja2
import jinja2.sandbox
import tokenizers

from nanorrm.config import UserError
from nanorrm.files import read_json, write_json

THINK, END_THINK = "<think>", "</think>"
# what a tokenizer may consist of
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")
FILES += ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")


class Tokenizer:
    """`encode` for text from outside, `encode_template` for our own, `decode` for both."""

    def __init__(self, spec, chat_template=None, special_names=None, files=None):
        """spec: parsed tokenizer.json; chat_template: jinja2 source or None; special_names: what
        chat templates may ask for, such as {"bos_token": "<s>"}; files: {name: bytes} to save it
        as, None: made from the others."""
        self.chat_template = chat_template
        self.special_names = special_names or {}
        self.files = files
        self.full = tokenizers.Tokenizer.from_str(json.dumps(spec))
        plain = {**spec, "added_tokens": [], "post_processor": None}
        self.plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        names = sorted((token["content"] for token in spec.get("added_tokens", [])), key=len)
        self.added = "|".join(map(re.escape, reversed(names))) or "(?!)"  # a pattern, longest first

    @classmethod
    def from_pretrained(cls, folder):
        """Read tokenizer.json and the chat template, in any of the forms it is stored in."""
        folder = Path(folder)
        spec = read_json(folder / "tokenizer.json")
        config = read_if_there(folder / "tokenizer_config.json")
        template = read_chat_template(folder, config)
        special = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            if value := config.get(name):
                special[name] = value["content"] if isinstance(value, dict) else value
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}
        try:
            return cls(spec, template, special, files)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{folder}/tokenizer.json: not a tokenizer ({error})") from None

    def save(self, folder):
        """Write into an existing folder what was read, byte for byte, or tokenizer.json and its
        tokenizer_config.json."""
        folder = Path(folder)
        for name, content in (self.files or {}).items():
            (folder / name).write_bytes(content)
        if self.files is None:
            config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_names}
            config |= {"chat_template": self.chat_template} if self.chat_template else {}
            write_json(folder / "tokenizer_config.json", config)
            self.full.save(str(folder / "tokenizer.json"))

    def encode(self, text):
        """Text from outside -> ids; special tokens in it are spelled out as characters."""
        return self.plain.encode(text, add_special_tokens=False).ids

    def encode_template(self, text):
        """Our own text -> ids; special tokens in it are special."""
        return self.full.encode(text, add_special_tokens=False).ids

    def chat(self, messages):
        """Render messages [{"role", "content"}] through the chat template -> ids.

        Ends with the generation prompt, and begins with a bos token if the template puts one. The
        ids are those of transformers' apply_chat_template, but for special tokens that stand in a
        content: these are text from outside. A character that occurs nowhere else is put into them
        before rendering, and taken out when the template's own tokens have been found.
        """
        if self.chat_template is None:
            raise UserError("this tokenizer has no chat template, which the rrm prompt needs")
        contents = "".join(m["content"] for m in messages)
        # Unicode gives these characters no meaning
        guard = next(c for c in map(chr, range(0xF0000, 0x110000)) if c not in contents)
        starts = re.compile(f"(?={self.added})(.)", re.DOTALL)
        guarded = [{**m, "content": starts.sub(rf"\1{guard}", m["content"])} for m in messages]
        ids = []
        for i, piece in enumerate(re.split(f"({self.added})", self.render(guarded))):
            text = piece.replace(guard, "")
            ids += [self.token_id(text)] if i % 2 else self.encode(text)
        return ids

    def render(self, messages):
        """The chat template's text for messages, with the variables that transformers gives it, but
        strftime_now: a prompt should not depend on the day (Llama 3 then takes a fixed one)."""
        given = {"messages": messages, "tools": None, "documents": None, **self.special_names}
        try:
            return compiled(self.chat_template).render(**given, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(f"the chat template can't render this prompt: {error}") from None

    def decode(self, ids):
        """ids -> text, special tokens shown."""
        return self.full.decode(list(ids), skip_special_tokens=False)

    def token_id(self, token):
        """The id of a token by name, or None."""
        return self.full.token_to_id(token)

    @property
    def think_ids(self):
        """(id of <think>, id of </think>), None where the model has no such token."""
        return self.token_id(THINK), self.token_id(END_THINK)

    def __len__(self):
        return self.full.get_vocab_size()


def read_if_there(path):
    """The object in a JSON file, {} if there is no such file."""
    return read_json(path) if path.exists() else {}


def read_chat_template(folder, config):
    """The jinja2 source of a folder's chat template, or None.

    It lies in chat_template.jinja, in config (of tokenizer_config.json: a string, or a list of
    named ones, of which "default" is ours) or in chat_template.json.
    """
    path = folder / "chat_template.jinja"
    try:
        if path.exists():
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as text ({error})") from None
    path, template = folder / "tokenizer_config.json", config.get("chat_template")
    if template is None:
        path = folder / "chat_template.json"
        template = read_if_there(path).get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        if "default" not in named:
            names = ", ".join(map(repr, named)) or "none"
            raise UserError(f"{path}: no chat template is named 'default' (there is {names})")
        template = named["default"]
    if not isinstance(template, str | None):
        raise UserError(f"{path}: chat_template should be text, not {type(template).__name__}")
    return template


@cache
def compiled(template):
    """A chat template's source -> the template, in a sandbox: it comes with the weights."""
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message):  # called by templates that refuse a conversation
        raise jinja2.TemplateError(message)

    sandbox.globals["raise_exception"] = raise_exception
    return sandbox.from_string(template)


def after_thinking(text, opened=False):
    """What a completion says once it has thought; None if a thought was opened and never closed.

    opened: the prompt has opened the thinking.

    >>> after_thinking("7+8=15</think> 15", opened=True), after_thinking("15")
    (' 15', '15')
    >>> after_thinking("7+8=15", opened=True), after_thinking("<think>7+8")
    (None, None)
    """
    _, closed, after = text.rpartition(END_THINK)
    return None if not closed and (opened or THINK in text) else after
