"""Tiny random models, model folders and prompts for the tests."""

import json
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from nanorrm.config import EngineConfig
from nanorrm.engine.engine import Engine
from nanorrm.model.architectures import ModelConfig
from nanorrm.model.transformer import Transformer

END_IDS = [260, 11, 33, 55, 77, 99, 121, 143]  # many, so that random models stop now and then


def config(**changes):
    """A grouped-head model of two layers that the toy tokenizer fits."""
    shape = {
        "vocab_size": 261,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": END_IDS,
    }
    return ModelConfig(**{**shape, **changes})


def randomise(model, seed=0):
    """Random numbers in every parameter, norms and biases too, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "norm" in name:
            p.data = 1 + 0.3 * noise
        elif p.dim() == 1 or "embed" in name:
            p.data = 0.5 * noise
        else:
            p.data = noise * p.shape[1] ** -0.5
    return model


def model(seed=0, **changes):
    return randomise(Transformer(config(**changes)), seed).eval()


def engine(tokenizer, model, **changes):
    changes = {"num_blocks": 1024, **changes}
    return Engine(model, tokenizer, EngineConfig(**changes))


def prompts(n, low=1, high=40, seed=0):
    """n random prompts of bytes, of mixed lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, size):
        return torch.randint(low, high, (size,), generator=generator).tolist()

    return [draw(0, 256, draw(low, high + 1, 1)[0]) for _ in range(n)]


def pack(sequences):
    """Lists of ids -> ids [T], cu_seqlens [B+1]."""
    bounds = torch.tensor([0] + [len(s) for s in sequences]).cumsum(0)
    return torch.tensor([token for s in sequences for token in s]), bounds


# -- folders as the real models have them

ARCHITECTURES = {
    "qwen2": ("Qwen2", {"rope_type": "default", "rope_theta": 10000.0}),
    "qwen3": ("Qwen3", {"rope_type": "default", "rope_theta": 1000000.0}),
    "llama": (
        "Llama",
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
}
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
# R1's behaviour in our words: it puts bos itself, system texts come first and bare, an answer
# loses its thinking, and the generation prompt opens a thought.
R1_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
CORPUS = """You are a careful judge who reads the question and the two responses of the assistants.
First solve the problem yourself, step by step, and then compare what you found with what each of
the assistants has written. The better response is the one that is correct, helpful and honest; the
length of a response and the order in which the two were shown should not matter to your decision.
Think before you decide, and write your verdict in the box: Assistant 1 or Assistant 2.
What is 12 + 7? Let me see: 12 + 7 = 19, so the answer is 19. What is 35 - 8? It is 27, not 28."""


def real_tokenizer_files(path):
    """tokenizer.json (a byte-level BPE trained here) and tokenizer_config.json, as R1-Distill's."""
    raw = tokenizers.Tokenizer(models.BPE())
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    pattern += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        CORPUS.splitlines(),
        trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False),
    )
    # as there: only the sentence marks are "special", the others are added tokens all the same
    raw.add_tokens([AddedToken(t, special=t in (BOS, EOS), normalized=False) for t in
                    (EOS, USER, ASSISTANT, BOS, "<think>", "</think>")])  # fmt: skip
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, raw.token_to_id(BOS))]
    )
    raw.save(str(path / "tokenizer.json"))

    def added(content):
        flags = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
        return {"__type": "AddedToken", "content": content, "normalized": True, **flags}

    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": added(BOS),
        "eos_token": added(EOS),
        "pad_token": added(EOS),
        "unk_token": None,
        "model_max_length": 16384,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": R1_TEMPLATE,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (path / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return raw


def real_folder(
    path, architecture="qwen2", seed=0, dtype=torch.bfloat16, max_shard_size="5GB", **changes
):
    """A tiny random model in a folder with the files of R1-Distill; returns the folder.

    transformers writes it: config.json, generation_config.json and the weights (one file, or
    shards of max_shard_size such as "40KB" with their index). The vocabulary is a little longer
    than the tokenizer's, as there. architecture: qwen2, qwen3 or llama (with llama3 scaling of 64
    positions); changes: of the fields of its config. Weights are bf16 as there, so transformers
    opens it in bf16 unless it is told dtype=torch.float32, which is exact.
    """
    import transformers  # here: most users of this file need none of it

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    raw = real_tokenizer_files(path)
    name, rope = ARCHITECTURES[architecture]
    bos, eos = raw.token_to_id(BOS), raw.token_to_id(EOS)
    shape = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    if architecture == "qwen2":
        del shape["head_dim"]  # it has none: hidden size by heads
    config = getattr(transformers, f"{name}Config")(**{**shape, **changes})
    network = getattr(transformers, f"{name}ForCausalLM")(config)
    randomise(network, seed).to(dtype)
    network.generation_config = transformers.GenerationConfig(
        bos_token_id=bos, eos_token_id=eos, do_sample=True, temperature=0.6, top_p=0.95
    )
    network.save_pretrained(path, max_shard_size=max_shard_size)
    return path
