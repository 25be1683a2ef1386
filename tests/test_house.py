"""The house: one list of wings, lint, doctests, imports without triton and beside transformers."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nanorrm

ROOT = Path(__file__).parents[1]

# Each wing imports itself and what stands above it; the two of one line do not know each other.
WINGS = (
    ("kernels",),
    ("ground",),  # the modules that lie directly in nanorrm/
    ("model",),
    ("engine",),
    ("judge",),
    ("rank", "data"),
    ("measure",),
    ("train",),
    ("synth", "bench", "integrations"),
    ("scripts",),  # train.py, sample.py, eval.py
    ("experiments",),
)
FLOOR = {wing: floor for floor, wings in enumerate(WINGS) for wing in wings}
FOLDERS = ("nanorrm", "kernels", "experiments")
FILES = sorted(
    [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    + [ROOT / f"{name}.py" for name in ("train", "sample", "eval")]
)
PUBLIC = ROOT / "nanorrm" / "__init__.py"  # what users import: it gathers names of many wings


def module_of(path):
    """nanorrm/judge/verdict.py -> nanorrm.judge.verdict; a package by its own name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def wing_of(module):
    """The wing of a module of ours."""
    top, *rest = module.split(".")
    if top != "nanorrm":
        return top if top in FLOOR else "scripts"
    is_wing = len(rest) > 1 or rest[:1] == ["synth"] or MODULES[module].name == "__init__.py"
    return rest[0] if rest and is_wing else "ground"


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


def ours(path):
    """The modules of ours that a file imports; of a package's names, the module alone."""
    found = imported(path) & set(MODULES)
    packages = {name for name in found if MODULES[name].name == "__init__.py"}
    return found - {p for p in packages if any(f.startswith(f"{p}.") for f in found)}


@pytest.mark.parametrize("path", [p for p in FILES if p != PUBLIC], ids=module_of)
def test_imports_go_one_way(path):
    own = wing_of(module_of(path))
    for name in ours(path) - {"nanorrm"}:
        wing = wing_of(name)
        assert wing == own or FLOOR[wing] < FLOOR[own], f"{own} imports {name} of {wing}"


def test_no_import_runs_in_a_circle():
    above = {name: ours(path) - {name, "nanorrm"} for name, path in MODULES.items()}
    while above:
        free = {name for name, needs in above.items() if not needs & set(above)}
        assert free, f"a circle among {sorted(above)}"
        above = {name: needs for name, needs in above.items() if name not in free}


def test_few_modules_lie_in_the_hall():
    assert len(list((ROOT / "nanorrm").glob("*.py"))) <= 12


SPINE = """
    nanorrm/records.py nanorrm/judge/verdict.py nanorrm/judge/prompts.py nanorrm/judge/judge.py
    nanorrm/model/transformer.py nanorrm/engine/cache.py nanorrm/engine/sequence.py
    nanorrm/engine/scheduler.py nanorrm/engine/batch.py nanorrm/engine/sampling.py
    nanorrm/engine/engine.py nanorrm/train/rewards.py nanorrm/train/grpo.py
    nanorrm/train/packing.py nanorrm/train/trainer.py train.py
"""


def test_the_spine_is_what_the_readme_says():
    """Which files, how long each is, their sum; and a day's reading in all."""
    text = (ROOT / "README.md").read_text("utf-8")
    said = dict(re.findall(r"^    (\S+\.py) +(\d+)  ", text, re.MULTILINE))
    lines = {name: (ROOT / name).read_text("utf-8").count("\n") for name in SPINE.split()}
    assert said == {name: str(count) for name, count in lines.items()}
    (promised,) = re.findall(r"([\d,]+) lines of\s+plain PyTorch", text)
    assert int(promised.replace(",", "")) == sum(lines.values()) <= 2900


def test_every_wing_is_packaged():
    """What setuptools finds by pyproject.toml is every folder that holds a module."""
    find_packages = pytest.importorskip("setuptools").find_packages
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = {path.parent for path in FILES if path.parts[-2] != ROOT.name}
    wanted = {".".join(folder.relative_to(ROOT).parts) for folder in folders} - {"experiments"}
    assert set(find_packages(str(ROOT), **settings["packages"]["find"])) == wanted


def test_packages_import_nothing():
    """Only nanorrm's own names are gathered; a wing's __init__ that imports makes circles."""
    for path in (ROOT / "nanorrm").rglob("__init__.py"):
        assert path == PUBLIC or not imported(path), path


@pytest.mark.parametrize("path", [p for p in FILES if "kernels" in p.parts], ids=module_of)
def test_kernels_stand_below_all(path):
    allowed = {"torch", "triton", "kernels"} | set(sys.stdlib_module_names)
    if "bench" in module_of(path):  # it plots, and compares with peers where those are there
        allowed |= {"matplotlib", "flash_attn", "liger_kernel", "flashinfer", "cut_cross_entropy"}
    if path.stem == "flash_attention":  # impl="flash"
        allowed |= {"flash_attn"}
    assert {name.split(".")[0] for name in imported(path)} <= allowed


PLAIN = ["engine.cache", "train.grpo", "measure.statistics", "measure.metrics", "rank.rating"]
PLAIN += ["rank.tournament", "rank.stopping", "data.answers", "data.formats"]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_number_modules_know_no_model_and_no_engine(name):
    known, todo = set(), [f"nanorrm.{name}"]  # what it imports, and what that imports
    while todo:
        for module in ours(MODULES[todo.pop()]) - known:
            known.add(module)
            todo.append(module)
    assert not known & {"nanorrm.model.transformer", "nanorrm.engine.engine"}


def test_only_the_sources_and_the_benches_know_the_toy_world():
    knows = {name for name, path in MODULES.items() if "nanorrm.data.toy" in imported(path)}
    knows = {name for name in knows if wing_of(name) not in ("bench", "scripts", "experiments")}
    assert knows <= {"nanorrm.data.sources", "nanorrm.train.base_loop"}


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--quiet", "."],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# -- worked examples

WITH_EXAMPLES = sorted(name for name, path in MODULES.items() if ">>> " in path.read_text("utf-8"))


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_doctests(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert failed == 0 and tried > 0


def test_worked_examples_are_not_lost():
    texts = [MODULES[name].read_text("utf-8") for name in WITH_EXAMPLES]
    assert sum(len(re.findall(r"^ *>>> ", text, re.MULTILINE)) for text in texts) >= 106


def test_public_names():
    for name in nanorrm.__all__:
        assert getattr(nanorrm, name) is not None
    wanted = "Transformer Engine EngineConfig SamplingParams Completion Pair Judge Verdict"
    assert set(wanted.split()) <= set(nanorrm.__all__)


# -- imports


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_imports_and_runs_without_triton():
    modules = [name for name in MODULES if not name.startswith("experiments")]
    print(
        python(f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("no triton here")
sys.meta_path.insert(0, Blocked())
import importlib, torch
for name in {modules}:
    importlib.import_module(name)
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
