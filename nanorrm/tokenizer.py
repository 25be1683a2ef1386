"""Text to ids and back, with one rule: text from outside never becomes a special token.

Wraps a Hugging Face tokenizer.json. Two encoders are made from the same file: one knows the special
tokens and is used for our own templates; the other has them removed, so that a response containing
`</think>` or `<|im_end|>` arrives as plain characters.
"""

import json
import re
from pathlib import Path

import jinja2
import jinja2.sandbox
import tokenizers

from nanorrm.checkpoint import read_json
from nanorrm.config import UserError

THINK, END_THINK = "<think>", "</think>"


class Tokenizer:
    """`encode` for text from outside, `encode_template` for our own, `decode` for both."""

    def __init__(self, spec, chat_template=None, special_names=None):
        """spec: parsed tokenizer.json; chat_template: jinja2 source or None; special_names: what
        chat templates may ask for, such as {"bos_token": "<s>"}."""
        self.chat_template = chat_template
        self.special_names = special_names or {}
        self.full = tokenizers.Tokenizer.from_str(json.dumps(spec))
        plain = {**spec, "added_tokens": [], "post_processor": None}
        self.plain = tokenizers.Tokenizer.from_str(json.dumps(plain))

    @classmethod
    def from_pretrained(cls, folder):
        """Read tokenizer.json and the chat template (tokenizer_config.json or its own file)."""
        folder = Path(folder)
        spec = read_json(folder / "tokenizer.json")
        config = {}
        if (folder / "tokenizer_config.json").exists():
            config = read_json(folder / "tokenizer_config.json")
        template = config.get("chat_template")
        if (folder / "chat_template.jinja").exists():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        names = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = config.get(name)
            if value:
                names[name] = value["content"] if isinstance(value, dict) else value
        try:
            return cls(spec, template, names)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{folder}/tokenizer.json: not a tokenizer ({error})") from None

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json into an existing folder."""
        folder = Path(folder)
        self.full.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_names}
        if self.chat_template:
            config["chat_template"] = self.chat_template
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    def encode(self, text):
        """Text from outside -> ids; special tokens in it are spelled out as characters."""
        return self.plain.encode(text, add_special_tokens=False).ids

    def encode_template(self, text):
        """Our own text -> ids; special tokens in it are special."""
        return self.full.encode(text, add_special_tokens=False).ids

    def chat(self, messages):
        """Render messages [{"role", "content"}] through the chat template -> ids.

        Ends with the generation prompt. Contents are text from outside: the template is rendered
        with a marker in the place of each, and the text goes in between as plain characters.
        """
        if self.chat_template is None:
            raise UserError("this tokenizer has no chat template, which the rrm prompt needs")
        markers = [f"\ue000{i}\ue001" for i in range(len(messages))]  # private-use characters
        shells = [{**m, "content": marker} for m, marker in zip(messages, markers)]
        try:
            text = jinja2.sandbox.ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
            )
            text.globals["raise_exception"] = raise_exception
            text = text.from_string(self.chat_template).render(
                messages=shells, add_generation_prompt=True, **self.special_names
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template can't render this prompt: {error}") from None
        ids = []
        for piece in re.split("(\ue000\\d+\ue001)", text):
            if piece in markers:
                ids += self.encode(messages[markers.index(piece)]["content"])
            elif piece:
                ids += self.encode_template(piece)
        return ids

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


def raise_exception(message):
    """What chat templates call when they refuse a conversation."""
    raise jinja2.TemplateError(message)
