"""What a person gives wrong gets one clear line, a non-zero exit, and nothing half-written."""

import json

import pytest

from nanorrm.cli import load_preset
from nanorrm.config import JudgeConfig
from nanorrm.model.hf_folder import SHIPPED

GOOD = {"query": "2+2", "a": "4", "b": "5", "label": 1}
SMALL = ["--steps", 1, "--prompts", 2, "--group", 2, "--eval-pairs", 0, "--max-tokens", 8]
SMALL += ["--engine.num-blocks", 600, "--threads", 1]


def tree(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def inputs(tmp_path):
    """Files that the cases name."""
    lines = [json.dumps(GOOD), json.dumps(GOOD), '{"query": "2+', json.dumps(GOOD)]
    (tmp_path / "broken.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "good.jsonl").write_text(json.dumps(GOOD) + "\n")
    (tmp_path / "open.jsonl").write_text(json.dumps({**GOOD, "label": None}) + "\n")
    (tmp_path / "columns.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "typo.toml").write_text("learnin_rate = 1.0\n")
    corrupt = tmp_path / "corrupt"
    corrupt.mkdir()
    for path in SHIPPED["toy"].iterdir():
        (corrupt / path.name).write_bytes(path.read_bytes())
    weights = corrupt / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return tmp_path


def one_clear_line(result, words):
    code, out, err = result
    assert code != 0
    assert "Traceback" not in out + err
    lines = [line for line in err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0] == lines[-1], err
    for word in words:
        assert word in errors[0]


CASES = {
    "missing file": (["eval.py", "pairs", "--data", "none.jsonl"], ["none.jsonl", "no such file"]),
    "missing file to sample": (["sample.py", "judge", "--data", "none.jsonl"], ["none.jsonl"]),
    "malformed line": (["eval.py", "pairs", "--data", "broken.jsonl"], ["broken.jsonl, line 3"]),
    "malformed line to sample": (
        ["sample.py", "judge", "--data", "broken.jsonl"],
        ["broken.jsonl, line 3"],
    ),
    "wrong columns": (
        ["eval.py", "pairs", "--data", "columns.jsonl"],
        ["line 1", "text", "chosen"],
    ),
    "no labels": (["eval.py", "pairs", "--data", "open.jsonl"], ["open.jsonl", "1 of 1", "label"]),
    "no data": (["eval.py", "pairs"], ["--data"]),
    "no query": (["sample.py", "judge", "--a", "1"], ["--query"]),
    "missing model": (["eval.py", "toy", "--model", "nowhere"], ["nowhere", "no such model"]),
    "corrupt safetensors": (
        ["eval.py", "toy", "--model", "corrupt"],
        ["corrupt/model.safetensors", "safetensors"],
    ),
    "corrupt safetensors to sample": (
        ["sample.py", "judge", "--query", "1", "--a", "1", "--b", "2", "--model", "corrupt"],
        ["corrupt/model.safetensors"],
    ),
    "beyond the context": (
        ["sample.py", "judge", "--query", "9" * 9000, "--a", "1", "--b", "2", "--model", "toy"],
        ["9011", "8192"],
    ),
    "setting out of range": (
        ["sample.py", "judge", "--query", "1", "--a", "1", "--b", "2", "--votes", 0],
        ["votes = 0"],
    ),
    "thinking out of range": (["eval.py", "toy", "--max-think-tokens", -4], ["max_think_tokens"]),
    "unwritable results": (
        ["eval.py", "pairs", "--data", "good.jsonl", "--model", "toy", "--out", "x" * 300],
        ["can't write there"],
    ),
    "unknown stage": (["train.py", "jugde"], ["jugde", "judge"]),
    "unknown command": (["eval.py", "pears"], ["pears", "pairs"]),
    "preset without a file": (["train.py", "judge", "--config"], ["--config"]),
    "missing preset": (["train.py", "judge", "--config", "none.toml"], ["none.toml"]),
    "typo in the preset": (
        ["train.py", "judge", "--config", "typo.toml"],
        ["typo.toml", "learning_rate"],
    ),
    "unwritable run folder": (
        ["train.py", "judge", "--runs", "file", "--name", "x", *SMALL],
        ["file/x", "can't write"],
    ),
    "unwritable base folder": (
        ["train.py", "base", "--runs", "file", "--name", "x", "--steps", 1],
        ["file/x", "can't write"],
    ),
    "nothing to resume": (["train.py", "judge", "--resume"], ["runs", "resume"]),
    "nothing of that name to resume": (
        ["train.py", "judge", "--resume", "--name", "x"],
        ["runs/x", "nothing to resume"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_error_is_one_clear_line_and_writes_nothing(inputs, cli, case):
    args, words = CASES[case]
    before = tree(inputs)
    one_clear_line(cli(*args), words)
    assert tree(inputs) == before


TRAINING = {
    "missing model": (["--model", "nowhere"], ["nowhere"]),
    "corrupt safetensors": (["--model", "corrupt"], ["corrupt/model.safetensors"]),
    "missing data": (["--data", "none.jsonl"], ["none.jsonl"]),
    "malformed line": (["--data", "broken.jsonl"], ["broken.jsonl, line 3"]),
    "no labels": (["--data", "open.jsonl"], ["no labelled pairs"]),
    "unknown template": (["--template", "rmm"], ["rmm", "rrm, toy"]),
    "beyond the context": (["--max-tokens", 9000], ["9000", "8192"]),
}


@pytest.mark.parametrize("case", TRAINING)
def test_training_that_can_not_start_is_one_clear_line(inputs, cli, case):
    args, words = TRAINING[case]
    one_clear_line(cli("train.py", "judge", *SMALL, "--name", "x", *args), words)
    assert not list(inputs.rglob("*.safetensors"))[1:]  # no model but the corrupt one
    assert not list(inputs.rglob("checkpoint-*"))


@pytest.mark.parametrize("case", TRAINING)
def test_training_that_can_not_start_leaves_no_run_folder(inputs, cli, case):
    """Else the corrected command is refused, because the run exists already."""
    before = tree(inputs)
    assert cli("train.py", "judge", *SMALL, "--name", "x", *TRAINING[case][0])[0] != 0
    assert tree(inputs) == before and not (inputs / "runs" / "x").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train.py", "judge", "--stepps", 3], ["--stepps", "--steps"]),
        (["train.py", "judge", "--steps", "many"], ["many", "--steps"]),
        (["train.py", "judge", "--learning-rate", "fast"], ["fast"]),
        (["eval.py", "toy", "--pears", 3], ["--pears"]),
        (["eval.py", "toy", "--pairs", 2.5], ["2.5"]),
        (["sample.py", "judge", "--temperature", "hot"], ["hot"]),
    ],
)
def test_flag_that_does_not_exist_or_fit_is_named(inputs, cli, args, words):
    before = tree(inputs)
    code, out, err = cli(*args)
    assert code != 0 and "Traceback" not in out + err
    for word in words:
        assert word in out + err
    assert tree(inputs) == before


def test_run_folder_that_exists_is_not_touched(inputs, cli):
    args = ["train.py", "judge", *SMALL, "--name", "x"]
    assert cli(*args)[0] == 0
    before = tree(inputs)
    one_clear_line(cli(*args), ["runs/x", "exists", "--resume"])
    assert tree(inputs) == before


def test_damaged_checkpoint_is_named(inputs, cli):
    args = ["train.py", "judge", *SMALL, "--name", "x"]
    assert cli(*args)[0] == 0
    path = next(inputs.glob("runs/x/checkpoint-*/*.distcp"))
    path.write_bytes(path.read_bytes()[:9999])
    resumed = cli("train.py", "judge", "--resume", "--name", "x", "--steps", 2)
    one_clear_line(resumed, ["checkpoint-000001"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--group", 1], ["group = 1"]),
        (["--scale", "std"], ["scale", "group, batch, none"]),
        (["--temperature", 0], ["temperature = 0"]),
        (["--eval-every", 0], ["eval_every = 0"]),
        (["--save-every", 0], ["save_every = 0"]),
        (["--prompts", 0], ["prompts = 0"]),
        (["--steps", 0], ["steps = 0"]),
        (["--engine.block-size", 0], ["block_size = 0"]),
        (["--max-think-tokens", -4], ["max_think_tokens = -4"]),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_before_the_run(inputs, cli, args, words):
    before = tree(inputs)
    one_clear_line(cli("train.py", "judge", *SMALL, "--name", "x", *args), words)
    assert tree(inputs) == before


def test_a_whole_number_is_fine_where_a_float_or_nothing_is(tmp_path):
    (tmp_path / "p.toml").write_text("[engine]\ncache_gib = 1\n")
    gib = load_preset(JudgeConfig(), tmp_path / "p.toml").engine.cache_gib
    assert gib == 1.0 and type(gib) is float


def test_no_warm_up_is_fine(inputs, cli):
    assert cli("train.py", "judge", *SMALL, "--name", "x", "--warmup-steps", 0)[0] == 0


def test_unwritable_json_is_one_clear_line(inputs, cli):
    args = ["eval.py", "pairs", "--data", "good.jsonl", "--model", "toy", "--json", "no/where.json"]
    one_clear_line(cli(*args), ["no/where.json"])
