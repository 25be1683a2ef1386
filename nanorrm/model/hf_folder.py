"""Hugging Face model folders on disk: read tensor by tensor, written whole or not at all.

A model folder is config.json, model.safetensors (or several with an index), tokenizer.json and
generation_config.json, as transformers and vLLM read them. Weights go from the memory-mapped files
straight into the parameters. A folder is written beside its final name and renamed, so that a
reader never sees a half.
"""

import os
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanorrm.config import UserError
from nanorrm.files import read_json, write_json
from nanorrm.model.architectures import config_json, listed, parse_config, token_ids

ASSETS = Path(__file__).parents[1] / "assets"
NAMES = {"toy": "toy_base", "toy-judge": "toy_judge", "toy-policy": "toy_policy"}
SHIPPED = {name: ASSETS / folder for name, folder in NAMES.items()}
SINGLE, HEAD, EMBEDDING = "model.safetensors", "lm_head.weight", "model.embed_tokens.weight"
DTYPES = ("BF16", "F16", "F32", "F64")  # of the tensors that are read, as safetensors call them
SHARD_BYTES = 5 * 10**9  # weights above this are written in several files


def resolve_model(name):
    """A shipped model's name ("toy", "toy-judge") or a folder -> folder."""
    return SHIPPED.get(str(name), Path(name))


def read_config(folder):
    """config.json (and generation_config.json, which wins for end tokens) -> ModelConfig."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    config = parse_config(read_json(folder / "config.json"), folder / "config.json")
    path = folder / "generation_config.json"
    config.generation = read_json(path) if path.exists() else {}
    config.eos_token_id = token_ids(config.generation, path) or config.eos_token_id
    config.generation.pop("eos_token_id", None)
    return config


# -- weights in


def copy(parameter, tensor):
    """The usual `put` of `fill`: the whole tensor, in the parameter's dtype and on its device."""
    with torch.no_grad():
        parameter.copy_(tensor)


def fill(model, folder, put=copy):
    """Put the tensors of a folder into the parameters of a model, one after another.

    The files are memory-mapped. put(parameter, tensor) gets a whole tensor on the CPU in the file's
    dtype, whose pages are read while it copies, so memory holds the model and one tensor at most.
    The model's parameters may be shards (of the same full shapes), if `put` takes their part.
    Raises UserError that lists all files and tensors that do not fit, before any is put.
    """
    folder, parameters = Path(folder), dict(model.named_parameters())
    paths, index = weight_files(folder)
    with ExitStack() as stack:
        files, problems, stored = {}, [], {}  # stored: tensor name -> the path of its file
        for path in paths:
            try:
                files[path] = stack.enter_context(safe_open(path, framework="pt"))
            except FileNotFoundError:
                problems.append(f"{path}: no such file")
            except (SafetensorError, OSError) as error:
                problems.append(f"{path}: not a readable safetensors file ({error})")
        for path, file in files.items():
            for name in file.keys():  # noqa: SIM118
                if name in stored:
                    problems.append(f"{name} is in {stored[name].name} and {path.name}")
                if not name.endswith("rotary_emb.inv_freq"):  # old writers stored them
                    stored[name] = path
        if model.config.tie_word_embeddings and HEAD in stored:
            # both may be there if they are equal: some readers take the one and some the other
            head, path = files[stored.pop(HEAD)].get_tensor(HEAD), stored.get(EMBEDDING)
            if path and not torch.equal(head, files[path].get_tensor(EMBEDDING)):
                problems.append(f"{HEAD} differs from {EMBEDDING} (tie_word_embeddings is true)")
        lost = set(paths) - files.keys()  # of their tensors nothing is known, nor are they missing
        known = [name for name in parameters if folder / index.get(name, SINGLE) not in lost]
        problems += [f"{name} is missing" for name in known if name not in stored]
        surplus = [name for name in stored if name not in parameters]
        problems += [f"{name} is not part of this model" for name in surplus]
        for name, p in parameters.items():
            if name in stored:
                problems += misfit(name, files[stored[name]].get_slice(name), p)
        if problems:
            raise UserError(f"{folder}: the weights do not fit config.json: {listed(problems)}")
        for name, path in stored.items():
            put(parameters[name], files[path].get_tensor(name))


def misfit(name, stored, parameter):
    """What a stored tensor has (a slice of its file) that its parameter does not take, in words."""
    shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
    if shape != tuple(parameter.shape):
        return [f"{name} has shape {shape}, not {tuple(parameter.shape)}"]
    if dtype not in DTYPES:
        return [f"{name} is stored as {dtype} (only {', '.join(DTYPES)} are read)"]
    return []


def weight_files(folder):
    """The paths of the files that hold a folder's weights, and the index {tensor name: file}."""
    index, single = folder / f"{SINGLE}.index.json", folder / SINGLE
    if not index.exists():
        pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        if pickles and not single.exists():
            words = "is a pickle, which is not read: save it as safetensors"
            raise UserError(f"{folder}: {pickles[0]} {words}")
        return [single], {}
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index}: has no weight_map from tensor names to file names")
    files = sorted(set(names.values()))
    if single.exists() and SINGLE not in files:  # readers differ in which they take
        raise UserError(f"{folder}: has {SINGLE} and an index of other files: remove one of them")
    return [folder / name for name in files], names


# -- folders out


@contextmanager
def replacing(folder):
    """A new folder to fill, which takes the place of `folder` once it is whole, or vanishes."""
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{x}") for x in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # a full disk is any of them
        raise UserError(f"{folder}: could not be written ({error})") from None
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)


def write_model(folder, config, tensors, dtype, tokenizer=None, shard_bytes=SHARD_BYTES):
    """Write a Hugging Face folder: config, weights, generation settings and, if given, the
    tokenizer. Weights of more than shard_bytes in `dtype` are written in several files."""
    with replacing(Path(folder)) as path:
        write_json(path / "config.json", config_json(config, str(dtype).removeprefix("torch.")))
        generation = {**config.generation, "eos_token_id": config.eos_token_id or None}
        write_json(path / "generation_config.json", generation)
        write_weights(path, tensors, dtype, shard_bytes)
        if tokenizer is not None:
            tokenizer.save(path)


def write_weights(folder, tensors, dtype, shard_bytes):
    """Tensors -> one safetensors file or several with their index, one at a time in memory."""
    sizes = {name: t.numel() * dtype.itemsize for name, t in tensors.items()}
    shards, index = split(sizes, shard_bytes), {}
    for i, names in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE
        shard = {key: tensors[key].detach().to("cpu", dtype).contiguous() for key in names}
        save_file(shard, folder / name, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / name)  # not just the owner's
        index |= dict.fromkeys(names, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
        write_json(folder / f"{SINGLE}.index.json", index)


def split(sizes, limit):
    """Names in their order -> lists of names, each of `limit` bytes at most or of a single name.

    >>> split({"a": 3, "b": 3, "c": 9, "d": 1}, limit=6)
    [['a', 'b'], ['c'], ['d']]
    """
    shards, room = [], -1
    for name, size in sizes.items():
        if size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards
