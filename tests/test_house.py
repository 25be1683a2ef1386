"""The house: layers, lint, doctests, imports without triton and beside transformers."""

import ast
import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import nanorrm

ROOT = Path(__file__).parents[1]
SCRIPTS = {"train", "sample", "eval"}


def imported(path):
    """Dotted names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def tops(path):
    return {name.split(".")[0] for name in imported(path)}


PACKAGE = sorted((ROOT / "nanorrm").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: p.stem)
def test_the_package_imports_no_script(path):
    assert not tops(path) & SCRIPTS


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_kernels_stand_below_all(path):
    allowed = {"torch", "triton", "kernels"} | set(sys.stdlib_module_names)
    if path.parent.name == "bench":  # it plots, and compares with peers where those are there
        allowed |= {"matplotlib", "flash_attn", "liger_kernel", "flashinfer", "cut_cross_entropy"}
    if path.stem == "flash_attention":  # impl="flash"
        allowed |= {"flash_attn"}
    assert tops(path) <= allowed


PLAIN = [
    "cache",
    "grpo",
    "dpo",
    "rewards",
    "metrics",
    "rating",
    "tournament",
    "stopping",
    "answers",
    "formats",
]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_number_modules_know_no_model_and_no_engine(name):
    path = ROOT / "nanorrm" / f"{name}.py"
    known, todo = set(), [path]  # what it imports, and what that imports
    while todo:
        for module in imported(todo.pop()):
            file = ROOT / Path(*module.split(".")).with_suffix(".py")
            if module not in known and file.exists():
                known.add(module)
                todo.append(file)
    assert not known & {"nanorrm.model", "nanorrm.engine"}


def test_only_the_data_reader_and_the_benchmark_know_the_toy_world():
    importers = {path.stem for path in PACKAGE if "nanorrm.toy" in imported(path)}
    assert importers <= {"data", "queries", "bench_engine", "bench_train"}


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--quiet", "."],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


MODULES = [
    f"nanorrm.{module.name}"
    for module in pkgutil.iter_modules(nanorrm.__path__)
    if not module.ispkg
]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


EXAMPLES = [
    "grpo",
    "dpo",
    "cache",
    "metrics",
    "prompts",
    "rewards",
    "tournament",
    "rating",
    "stopping",
    "answers",
    "formats",
    "data",
    "benchmarks",
    "columns",
    "bestof",
    "scaling",
    "contest",
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples_are_there(name):
    assert doctest.testmod(importlib.import_module(f"nanorrm.{name}")).attempted > 0


def test_public_names():
    for name in nanorrm.__all__:
        assert getattr(nanorrm, name) is not None
    wanted = "Transformer Engine EngineConfig SamplingParams Completion Pair Judge Verdict"
    assert set(wanted.split()) <= set(nanorrm.__all__)


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_imports_and_runs_without_triton():
    print(
        python("""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("no triton here")
sys.meta_path.insert(0, Blocked())
import importlib, pkgutil, torch, nanorrm, kernels
for package in (nanorrm, kernels):
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(package.__name__ + "." + module.name)
import train
from nanorrm import Engine, SamplingParams, EngineConfig
engine = Engine.from_pretrained("toy", EngineConfig(num_blocks=64))
prompt = engine.tokenizer.encode_template("!7+8-5\\n<think>")
print(engine.generate([prompt], SamplingParams(temperature=0, max_tokens=32))[0][0].text)
assert "triton" not in sys.modules
""")
    )


def test_transformers_behaves_beside_our_kernels_package():
    """`kernels` is also a Hugging Face package, which transformers looks for."""
    python("""
import kernels
assert kernels.__file__.startswith(__import__("os").getcwd())
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
config = Qwen2Config(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=1)
model = Qwen2ForCausalLM(config).eval()
ids = torch.tensor([[1, 2, 3]])
assert model(ids).logits.shape == (1, 3, 50)
assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 5)
assert kernels.logprob and kernels.rms_norm
""")


def test_files_import_only_what_stands_above_them():
    """The order is the one that docs/ARCHITECTURE.md shows."""
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    block = text[text.index("    kernels | config") :].partition("\n\n")[0]
    order = block.split("|")[1].split()
    files = {path.stem: path for path in (ROOT / "nanorrm").glob("*.py")}
    benches = {name for name in files if name.startswith("bench_") and name not in order}
    assert sorted(order) == sorted(set(files) - {"__init__"} - benches)
    place = {f"nanorrm.{name}": i for i, name in enumerate(order)}
    for name in order:
        above = [place[module] for module in imported(files[name]) if module in place]
        assert all(i < place[f"nanorrm.{name}"] for i in above), name
