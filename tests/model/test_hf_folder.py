"""Folders in and out: against transformers both ways, in every form they come in, and damaged."""

import json
import subprocess
import sys
import textwrap

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nanorrm.config import UserError
from nanorrm.engine.engine import Engine
from nanorrm.engine.sampling import SamplingParams
from nanorrm.model import hf_folder
from nanorrm.model.architectures import CLASSES, RopeScaling
from nanorrm.model.transformer import Transformer, rope_tables

SCALING = RopeScaling(8.0, 1.0, 4.0, 64)  # as tiny.real_folder has it
OURS = {  # what tiny.config must be told for each architecture
    "qwen2": {},
    "qwen3": {"attention_bias": False, "qk_norm": True, "head_dim": 16},
    "llama": {"attention_bias": False, "rope_scaling": SCALING, "max_position_embeddings": 512},
}
LENGTHS = (1, 30, 300)  # the last: far beyond the 64 positions that llama's scaling starts from
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(architecture, ...): a folder that transformers wrote, made once."""
    made = {}

    def make(architecture="qwen2", **changes):
        key = architecture, *sorted(changes.items())
        if key not in made:
            path = tmp_path_factory.mktemp(architecture)
            made[key] = tiny.real_folder(path / "hf", architecture, **changes)
        return made[key]

    return make


@pytest.fixture
def folder(tmp_path):
    tiny.model().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def shards(tmp_path):
    tiny.model().save_pretrained(tmp_path / "m", shard_bytes=10_000)
    return tmp_path / "m"


def theirs_of(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def drawn(vocab, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def our_logits(model, sequences):
    ids, bounds = tiny.pack(sequences)
    return (model(ids, bounds) @ model.head.T).double()


@torch.no_grad()
def their_logits(model, sequences):
    return torch.cat([model(torch.tensor([s])).logits[0].double() for s in sequences])


def assert_same_logits(ours, theirs, lengths=LENGTHS):
    sequences = drawn(ours.config.vocab_size, lengths)
    wanted = their_logits(theirs, sequences)
    assert wanted.std() > 0.5  # not a comparison of zeros
    assert (our_logits(ours, sequences) - wanted).abs().max() < 1e-5


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refusal(folder):
    with pytest.raises(UserError) as caught:
        Transformer.from_pretrained(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


# -- with transformers, both ways


@pytest.mark.parametrize("size", ["5GB", "40KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", CLASSES)
def test_logits_equal_transformers_from_their_folder(folders, architecture, tied, size):
    folder = folders(architecture, tie_word_embeddings=tied, max_shard_size=size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (size == "40KB")
    assert_same_logits(Transformer.from_pretrained(folder), theirs_of(folder))


@pytest.mark.parametrize("limit", [10**9, 10**4], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", CLASSES)
def test_transformers_opens_our_folder_with_equal_logits(tmp_path, architecture, tied, limit):
    ours = tiny.model(tie_word_embeddings=tied, **OURS[architecture])
    ours.save_pretrained(tmp_path / "m", shard_bytes=limit)
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) == (limit == 10**4)
    theirs = theirs_of(tmp_path / "m")
    assert type(theirs).__name__ == CLASSES[architecture]
    lengths = LENGTHS if architecture == "llama" else (1, 30, 120)
    assert_same_logits(ours, theirs, lengths)


@pytest.mark.parametrize("architecture", CLASSES)
def test_bf16_error_is_at_most_twice_that_of_transformers(folders, architecture):
    folder = folders(architecture)  # weights are bf16: the same numbers for all three
    sequences = drawn(512)
    truth = their_logits(theirs_of(folder, torch.float64), sequences)
    theirs = their_logits(theirs_of(folder, torch.bfloat16), sequences)
    ours = our_logits(Transformer.from_pretrained(folder, torch.bfloat16), sequences)
    assert 0 < (ours - truth).square().mean() < 4 * (theirs - truth).square().mean()
    assert (ours - truth).abs().max() < 2 * (theirs - truth).abs().max()


@pytest.mark.parametrize("architecture", CLASSES)
def test_rope_is_that_of_transformers_to_the_bit(folders, architecture):
    """Not to a tolerance: at position 8,000 one unit in the last place is 5e-4 radians."""
    folder = folders(architecture)
    tables = rope_tables(hf_folder.read_config(folder))
    rotary = theirs_of(folder).model.rotary_emb
    theirs = rotary(torch.zeros(1), torch.arange(8192)[None])  # each [1, P, D]: halves repeated
    for ours, wanted in zip(tables, theirs):
        assert torch.equal(ours, wanted[0, :, : ours.shape[1]])


@pytest.mark.parametrize("architecture", CLASSES)
def test_greedy_text_equals_transformers_generate(folders, architecture, tmp_path):
    """From their folder, and again from the one that the engine's model and tokenizer make."""
    source = folders(architecture, max_shard_size="40KB")
    engine = Engine.from_pretrained(source)
    engine.model.save_pretrained(tmp_path / "ours", engine.tokenizer, dtype=torch.bfloat16)
    messages = [[{"role": "user", "content": c}] for c in ("What is 12 + 7?", "Judge them.")]
    prompts = [engine.tokenizer.chat(m) for m in messages]
    params = SamplingParams(temperature=0, max_tokens=40)
    got = [group[0] for group in engine.generate(prompts, params)]
    for folder in (source, tmp_path / "ours"):
        theirs, tokenizer = theirs_of(folder), AutoTokenizer.from_pretrained(folder)
        for message, prompt, completion in zip(messages, prompts, got):
            ids = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_tensors="pt", return_dict=False
            )
            assert ids[0].tolist() == prompt
            wanted = theirs.generate(ids, max_new_tokens=40, do_sample=False)[0, len(prompt) :]
            assert completion.ids == wanted.tolist()
            assert tokenizer.decode(wanted).removesuffix(tiny.EOS) == completion.text


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_any_stored_dtype_is_read_as_any_other(tmp_path, stored, wanted):
    model = tiny.model()
    model.save_pretrained(tmp_path / "m", dtype=stored)
    assert AutoConfig.from_pretrained(tmp_path / "m").dtype == stored
    read = dict(Transformer.from_pretrained(tmp_path / "m", wanted).named_parameters())
    for name, p in model.named_parameters():
        assert read[name].dtype == wanted
        assert torch.equal(read[name], p.to(stored).to(wanted))


def test_half_precision_keeps_rope_tables_in_fp32(folder):
    half = Transformer.from_pretrained(folder, torch.bfloat16)
    assert half.cos.dtype == half.sin.dtype == torch.float32
    assert torch.equal(half.cos, tiny.model().cos)


# -- tensor by tensor


def test_put_gets_each_tensor_once_as_it_is_stored(shards):
    model = Transformer.skeleton(shards, torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.materialise("cpu")
    names = {id(p): name for name, p in model.named_parameters()}
    seen = {}

    def put(parameter, tensor):
        assert names[id(parameter)] not in seen
        seen[names[id(parameter)]] = tensor.clone()

    hf_folder.fill(model, shards, put)
    wanted = dict(tiny.model().named_parameters())
    assert seen.keys() == wanted.keys()
    assert all(torch.equal(seen[name], wanted[name]) for name in wanted)  # fp32, as in the files


def test_nothing_is_put_when_one_tensor_does_not_fit(shards):
    last = sorted(shards.glob("*.safetensors"))[-1]
    rewrite(last, lambda t: t.update(surplus=torch.ones(1)))
    model = Transformer.skeleton(shards).materialise("cpu")
    with pytest.raises(UserError, match="surplus"):
        hf_folder.fill(model, shards, put=lambda *_: pytest.fail("put before all was checked"))


def test_loading_takes_the_memory_of_the_model_alone(tmp_path):
    """A model of 200 MB as fp32, stored as bf16: what the process holds of its own at the worst
    moment is within 1.1 times that, so there is no second copy of the whole, nor of the file."""
    shape = {
        "vocab_size": 25_000,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    }
    with torch.device("meta"):
        blank = Transformer(tiny.config(**shape))
    model = blank.materialise("cpu")
    for p in model.parameters():
        p.data.fill_(0.5)
    model.save_pretrained(tmp_path / "m", dtype=torch.bfloat16, shard_bytes=30 * 10**6)
    size = sum(p.numel() * 4 for p in model.parameters())
    assert size > 190e6
    code = """
        import sys, threading, time
        import torch
        from nanorrm.model.transformer import Transformer

        def anonymous():
            lines = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
            return int(lines["RssAnon"].split()[0]) * 1024

        most, done = 0, False
        def watch():
            global most
            while not done:
                most = max(most, anonymous())
                time.sleep(0.001)

        Transformer.from_pretrained("nanorrm/assets/toy_base")  # what torch needs to start
        before = anonymous()
        thread = threading.Thread(target=watch)
        thread.start()
        model = Transformer.from_pretrained(sys.argv[1], torch.float32)
        done = True
        thread.join()
        assert all((p == 0.5).all() for p in model.parameters())
        print(most - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "m")]
    done = subprocess.run(
        command, cwd=hf_folder.ASSETS.parents[1], capture_output=True, text=True, check=True
    )
    assert 0.9 * size < int(done.stdout) < 1.1 * size


def test_folder_round_trip_is_exact(tmp_path):
    generation = {"temperature": 0.6, "top_p": 0.95, "do_sample": True}
    ours = tiny.model(tie_word_embeddings=False, generation=generation)
    ours.save_pretrained(tmp_path / "m")
    again = Transformer.from_pretrained(tmp_path / "m")
    assert again.config == ours.config
    for (name, p), (other, q) in zip(ours.named_parameters(), again.named_parameters()):
        assert name == other and torch.equal(p, q)


def test_generation_settings_pass_through_a_folder(folders, tmp_path):
    model = Transformer.from_pretrained(folders("qwen2"))
    model.save_pretrained(tmp_path / "m")
    first, second = (json.loads((f / "generation_config.json").read_text()) for f in
                     (folders("qwen2"), tmp_path / "m"))  # fmt: skip
    assert second == {**first, "eos_token_id": [first["eos_token_id"]]}


# -- weights that do not fit


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NAME), f"{NAME} is missing"),
        (lambda t: t.update(surplus=torch.ones(2)), "surplus is not part of this model"),
        (lambda t: t.update({NAME: torch.ones(3, 5)}), f"{NAME} has shape (3, 5), not (48, 32)"),
        (lambda t: t.update({NAME: t[NAME].to(torch.int8)}), f"{NAME} is stored as I8"),
    ],
    ids=["missing", "extra", "misshaped", "quantized"],
)
def test_tensor_that_does_not_fit_is_named(folder, change, words):
    rewrite(folder / "model.safetensors", change)
    assert words in refusal(folder)


def test_tensor_that_is_in_no_shard_is_missing(shards):
    """Neither in the files nor in the index: it must not stay what the memory held."""
    index = shards / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    rewrite(shards / raw["weight_map"].pop(NAME), lambda t: t.pop(NAME))
    index.write_text(json.dumps(raw))
    assert f"{NAME} is missing" in refusal(shards)


def test_all_problems_are_listed_and_the_rest_counted(shards):
    first, second, third, *_ = sorted(shards.glob("*.safetensors"))
    lost = list(load_file(first))
    first.unlink()
    rewrite(second, lambda t: t.update({name: torch.ones(3) for name in t}))
    rewrite(third, lambda t: t.update(surplus=torch.ones(1)))
    words = refusal(shards)
    assert f"{first}: no such file" in words and "has shape (3,)" in words and "surplus" in words
    assert not any(name in words for name in lost)  # they are not missing, their file is
    for i in range(20):
        rewrite(third, lambda t, i=i: t.update({f"surplus{i}": torch.ones(1)}))
    count = 1 + len(load_file(second)) + 21
    assert refusal(shards).endswith(f"; and {count - 8} more")


def test_frequencies_of_old_writers_are_no_surplus(folder):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    rewrite(folder / "model.safetensors", change)
    Transformer.from_pretrained(folder)


@pytest.mark.parametrize("surplus", [0, 1])
def test_tied_matrix_stored_twice_must_be_the_same(folder, surplus):
    """transformers 5 takes another one if there is, other readers take the embedding."""

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + surplus

    rewrite(folder / "model.safetensors", change)
    if surplus:
        assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(folder)
    else:
        assert torch.equal(Transformer.from_pretrained(folder).head, tiny.model().head)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
@pytest.mark.parametrize("form", ["single", "sharded"])
def test_truncated_file_is_named(request, form, keep):
    folder = request.getfixturevalue({"single": "folder", "sharded": "shards"}[form])
    path = sorted(folder.glob("*.safetensors"))[-1]
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    words = refusal(folder)
    assert f"{path}: not a readable safetensors file" in words and "missing" not in words


def test_damaged_header_is_named(folder):
    path = folder / "model.safetensors"
    whole = bytearray(path.read_bytes())
    whole[20:24] = b'"{]}'
    path.write_bytes(whole)
    assert f"{path}: not a readable safetensors file" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "not readable as JSON"), ("{}", "no weight_map"), ('{"weight_map": {"a": 1}}', "names")],
)
def test_broken_index_is_named(shards, content, words):
    path = shards / "model.safetensors.index.json"
    path.write_text(content)
    assert str(path) in refusal(shards) and words in refusal(shards)


def test_tensor_in_two_files_is_named(shards):
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    name = next(iter(load_file(first)))
    rewrite(second, lambda t: t.update(load_file(first)))
    assert f"{name} is in {first.name} and {second.name}" in refusal(shards)


def test_single_file_beside_shards_is_refused(shards):
    (shards / "model.safetensors").write_bytes(b"")
    assert "remove one of them" in refusal(shards)


def test_folder_without_weights_says_what_is_there(folder):
    (folder / "model.safetensors").unlink()
    assert "model.safetensors: no such file" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is a pickle" in refusal(folder)


# -- writing


def test_shards_are_within_the_limit_and_indexed(shards):
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    files = sorted(shards.glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    held = {path.name: load_file(path) for path in files}
    assert index["weight_map"] == {key: name for name, tensors in held.items() for key in tensors}
    sizes = {name: [t.nbytes for t in tensors.values()] for name, tensors in held.items()}
    assert all(sum(each) <= 10_000 or len(each) == 1 for each in sizes.values())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))


@pytest.mark.parametrize("at", [1, 3])
def test_failed_save_leaves_the_old_folder(folder, monkeypatch, at):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls = []

    def full_disk(tensors, path, **_):
        path.write_bytes(b"half")
        calls.append(path)
        if len(calls) == at:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_folder, "save_file", full_disk)
    with pytest.raises(UserError, match="No space left"):
        tiny.model(seed=1).save_pretrained(folder, shard_bytes=10_000)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]  # nothing half-written beside it


def test_save_replaces_the_old_folder_whole(folder):
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"of the old model")
    other = tiny.model(seed=1)
    other.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip
    assert torch.equal(Transformer.from_pretrained(folder).head, other.head)
    assert list(folder.parent.iterdir()) == [folder]
