"""config.json: understood as transformers understands it, or refused in words."""

import json

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from nanorrm.config import UserError
from nanorrm.model import hf_folder
from nanorrm.model.architectures import CLASSES, config_json, parse_config
from nanorrm.model.transformer import Transformer
from tests.model.test_hf_folder import OURS, SCALING, assert_same_logits, refusal, theirs_of


@pytest.fixture
def folder(tmp_path):
    tiny.model().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def change_json(path, **changes):
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


@pytest.mark.parametrize("architecture", CLASSES)
def test_both_spellings_of_rope_mean_the_same(tmp_path, architecture):
    """transformers 5 writes rope_parameters; 4 wrote rope_theta and rope_scaling (here by hand)."""
    new = json.loads((tiny.real_folder(tmp_path, architecture) / "config.json").read_text())
    rope = dict(new["rope_parameters"])
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = rope if architecture == "llama" else None
    config = parse_config(new, "new")
    assert config == parse_config(old, "old")
    assert config.rope_scaling == (SCALING if architecture == "llama" else None)
    (tmp_path / "config.json").write_text(json.dumps(old))
    theirs = AutoConfig.from_pretrained(tmp_path)  # reads the old spelling as we do
    assert theirs.rope_parameters == new["rope_parameters"]


@pytest.mark.parametrize("architecture", CLASSES)
def test_config_comes_back_in_each_spelling(architecture):
    config = tiny.config(**OURS[architecture])
    written = config_json(config, "float32")
    for missing in ({"rope_parameters"}, {"rope_theta", "rope_scaling"}):
        raw = {k: v for k, v in written.items() if k not in missing}
        assert parse_config(raw, "config.json") == config


@pytest.mark.parametrize(("value", "ids"), [(42, [42]), ([7, 8], [7, 8]), (None, tiny.END_IDS)])
def test_generation_config_wins_for_end_tokens(folder, value, ids):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert hf_folder.read_config(folder).eos_token_id == ids


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
REFUSED = [
    ({"model_type": "bert"}, "'bert' is not supported (only llama, qwen2, qwen3)"),
    ({"model_type": "qwen3_moe"}, "'qwen3_moe'"),
    ({"architectures": ["Qwen2ForSequenceClassification"]}, "only Qwen2ForCausalLM is built"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": "32"}, "hidden_size is '32', should be a positive integer"),
    ({"hidden_size": 33, "head_dim": None}, "33 is no multiple of num_attention_heads"),
    ({"num_key_value_heads": 3}, "4 is no multiple of num_key_value_heads"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"model_type": "qwen3", "architectures": None, "attention_bias": True}, "attention_bias"),
    ({"model_type": "llama", "architectures": None, "mlp_bias": True}, "mlp_bias"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "of 8 tokens"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not built"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 3.0}}}, "differ between layers"),
    ({"rope_parameters": LLAMA3}, "original_max_position_embeddings is None"),
    ({"rope_theta": 5.0}, "rope_theta is both 10000.0 and 5.0"),
    ({"rope_theta": 0}, "rope_theta is 0"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=lambda x: x if type(x) is str else "")
def test_config_that_can_not_be_run_is_named(folder, change, words):
    change_json(folder / "config.json", **change)
    assert words in refusal(folder)


def test_all_that_is_wrong_with_a_config_is_named_at_once(folder):
    change_json(folder / "config.json", hidden_act="gelu", mlp_bias=True, rope_theta=5.0)
    words = refusal(folder)
    assert all(word in words for word in ("hidden_act", "mlp_bias", "rope_theta"))


@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 0},
        {"layer_types": ["full_attention", "full_attention"]},
        {"partial_rotary_factor": 1.0},
        {"rope_scaling": {"type": "default"}},
    ],
)
def test_settings_that_change_nothing_are_accepted(folder, change):
    """As the Qwen2.5 and R1-Distill configs have them; transformers gives the same logits."""
    change_json(folder / "config.json", **change)
    assert_same_logits(Transformer.from_pretrained(folder), theirs_of(folder), (30, 120))


FIELDS = [*config_json(tiny.config(), "float32"), "sliding_window", "use_sliding_window",
          "max_window_layers", "layer_types", "partial_rotary_factor", "mlp_bias"]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from([*LLAMA3, "rope_theta", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_any_config_is_understood_or_refused_in_words(changes):
    raw = {**config_json(tiny.config(), "float32"), "rope_theta": None, **changes}
    try:
        config = parse_config(raw, "config.json")
    except UserError as error:
        assert str(error).startswith("config.json: ")
    else:
        assert parse_config(config_json(config, "float32"), "again") == config
