"""What config.json says about a model, as a ModelConfig, and back.

Three architectures are built, and they differ in two switches only: Qwen2 has biases on query, key
and value, Qwen3 norms every query and key head, Llama has neither. Whatever else a config asks for
that would change the logits is refused by name: a model that loads computes what its authors meant.
"""

from dataclasses import asdict, dataclass, field
from math import inf

from nanorrm.config import UserError


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's longer context: slow rotations are slowed down (transformer.rope_frequencies)."""

    factor: float  # how much longer the context became
    low_freq_factor: float  # fewer turns than this in the old context: slowed down by the factor
    high_freq_factor: float  # more turns than this: left alone; in between a blend
    original_max_position_embeddings: int  # the old context length, tokens


@dataclass
class ModelConfig:
    """The shape of a transformer, under the names of Hugging Face's config.json."""

    vocab_size: int  # V
    hidden_size: int  # C
    intermediate_size: int  # width of the feed-forward layer
    num_hidden_layers: int
    num_attention_heads: int  # Hq
    num_key_value_heads: int  # Hkv, divides Hq
    head_dim: int  # D
    max_position_embeddings: int  # context length, tokens
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = True  # biases on the query, key and value projections (Qwen2)
    qk_norm: bool = False  # RMSNorm on every query and key head (Qwen3)
    eos_token_id: list[int] = field(default_factory=list)  # any of these ends a completion
    generation: dict = field(default_factory=dict)  # generation_config.json's other fields, kept


CLASSES = {kind: f"{kind.capitalize()}ForCausalLM" for kind in ("llama", "qwen2", "qwen3")}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SIZES += ("num_attention_heads", "max_position_embeddings")
LLAMA3 = tuple(RopeScaling.__annotations__)


def is_number(value):
    """Whether a JSON value is a positive number."""
    return type(value) in (int, float) and 0 < value < inf


COUNTS = (*SIZES, "num_key_value_heads", "head_dim", "sliding_window")
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
FORMS = {  # what the fields must be where they are given
    "a positive integer": (lambda x: type(x) is int and x > 0, COUNTS),
    "a positive number": (is_number, ("rms_norm_eps", "rope_theta")),
    "an integer": (lambda x: type(x) is int, ("max_window_layers",)),
    "true or false": (lambda x: type(x) is bool, SWITCHES),
    "an object": (lambda x: type(x) is dict, ("rope_scaling", "rope_parameters")),
    "a list": (lambda x: type(x) is list, ("layer_types", "architectures")),
}


def listed(problems, most=8):
    """Problems in one line, the first of them in words.

    >>> listed(["a is missing", "b is missing", "c is missing"], most=2)
    'a is missing; b is missing; and 1 more'
    """
    rest = len(problems) - most
    return "; ".join([*problems[:most], *([f"and {rest} more"] if rest > 0 else [])])


def parse_config(raw, where):
    """The parsed config.json -> ModelConfig. Raises UserError listing all that is wrong with it or
    not built; where: what the message calls the file."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CLASSES:
        known = ", ".join(CLASSES)
        raise UserError(f"{where}: model_type {kind!r} is not supported (only {known})")
    problems = malformed(raw)
    if not problems:  # only now can the values be looked at
        rope, problems = read_rope(raw)
        problems += not_built(raw, kind)
    if problems:
        raise UserError(f"{where}: {listed(problems)}")
    heads, scaled = raw["num_attention_heads"], rope.get("rope_type") == "llama3"
    return ModelConfig(  # what may be missing has transformers' defaults
        **{name: raw[name] for name in SIZES},
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or (128 if kind == "qwen3" else raw["hidden_size"] // heads),
        rms_norm_eps=raw.get("rms_norm_eps") or 1e-6,
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=RopeScaling(**{name: rope[name] for name in LLAMA3}) if scaled else None,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
        attention_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        eos_token_id=token_ids(raw, where),
    )


def malformed(raw):
    """Fields that are missing or no such thing as they should be, in words."""
    problems = [f"{name} is missing" for name in SIZES if raw.get(name) is None]
    for words, (fits, names) in FORMS.items():
        given = {name: raw[name] for name in names if raw.get(name) is not None}
        problems += [f"{n} is {v!r}, should be {words}" for n, v in given.items() if not fits(v)]
    return problems


def read_rope(raw):
    """RoPE in both spellings -> ({setting: value}, problems).

    transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters. Both may be
    there, as in our own folders, if they agree.

    >>> read_rope({"rope_theta": 5.0, "rope_scaling": {"type": "yarn"}})[1]
    ["RoPE scaling 'yarn' is not built (only default, llama3)"]
    """
    alone = {name: raw.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    rope, problems = {}, []
    for spelling in (raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}, alone):
        for name, value in spelling.items():
            name = "rope_type" if name == "type" else name
            if value is not None and rope.setdefault(name, value) != value:
                problems.append(f"{name} is both {rope[name]!r} and {value!r}")
    kind = rope.get("rope_type", "default")
    if any(isinstance(value, dict) for value in rope.values()):
        problems.append("RoPE parameters that differ between layers are not built")
    elif kind not in ("default", "llama3"):
        problems.append(f"RoPE scaling {kind!r} is not built (only default, llama3)")
    rope.setdefault("rope_theta", 10000.0)
    for name in ("rope_theta", *(LLAMA3 if kind == "llama3" else ())):
        if not is_number(rope.get(name)):
            problems.append(f"RoPE's {name} is {rope.get(name)!r}, should be a positive number")
    if kind == "llama3" and not problems and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        problems.append("RoPE's low_freq_factor is not below its high_freq_factor")
    if (share := rope.get("partial_rotary_factor", 1)) != 1:
        problems.append(f"partial_rotary_factor {share!r} is not built: all of a head is rotated")
    return rope, problems


def not_built(raw, kind):
    """What a config asks for that does not fit together, or is not built, in words."""
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    groups, derived = raw.get("num_key_value_heads") or heads, not raw.get("head_dim")
    mine, act = CLASSES[kind], raw.get("hidden_act")
    classes = raw.get("architectures") or [mine]
    window = (raw.get("use_sliding_window") and raw.get("sliding_window")) or None
    if types := raw.get("layer_types"):
        slides = any(name != "full_attention" for name in types)
    else:
        slides = window and raw.get("max_window_layers", 28) < raw["num_hidden_layers"]
    slides = slides and (window or 0) < raw["max_position_embeddings"]
    known = ", ".join(map(str, classes))
    asked = {  # words -> whether it is asked for
        f"num_attention_heads {heads} is no multiple of num_key_value_heads": heads % groups,
        f"hidden_size {hidden} is no multiple of num_attention_heads": derived and hidden % heads,
        f"architectures is {known}, only {mine} is built": mine not in classes,
        f"hidden_act {act!r} is not built (only silu)": act not in (None, "silu"),
        "attention_bias is not built (but Qwen2's)": raw.get("attention_bias") and kind != "qwen2",
        "mlp_bias is not built": raw.get("mlp_bias"),
        "quantized weights (quantization_config) are not read": raw.get("quantization_config"),
        f"sliding-window attention (of {window} tokens) is not built": slides,
    }
    return [words for words, is_asked in asked.items() if is_asked]


def token_ids(raw, where):
    """eos_token_id of a configuration (an id, a list of them, or nothing) -> list of ids."""
    value = raw.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if all(type(i) is int for i in ids):
        return list(ids)
    raise UserError(f"{where}: eos_token_id is {value!r}, should be a token id or a list of ids")


def config_json(config, dtype):
    """ModelConfig -> the dictionary of config.json, with RoPE in both spellings; dtype: its name,
    such as "bfloat16"."""
    kind = "qwen3" if config.qk_norm else "qwen2" if config.attention_bias else "llama"
    scaling = config.rope_scaling and {"rope_type": "llama3", **asdict(config.rope_scaling)}
    rope = {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta}
    others = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta")
    others += ("tie_word_embeddings", "attention_bias")
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        **{name: getattr(config, name) for name in (*SIZES, *others)},
        "hidden_act": "silu",
        "rope_scaling": scaling,
        "rope_parameters": rope,
        "eos_token_id": config.eos_token_id or None,
        "torch_dtype": dtype,
    }
