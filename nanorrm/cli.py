"""The command line: presets over defaults, flags over presets, and errors as one line."""

import os
import sys
import tomllib
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from typing import get_args, get_origin, get_type_hints

import tyro

from nanorrm.config import UserError


def load_preset(config, path):
    """A copy of a config with the overrides of a TOML file; unknown keys and wrong types raise."""
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror.lower()}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not readable as TOML ({error})") from None
    return override(config, values, path)


def override(config, values, where):
    """replace() that checks names and types and descends into nested sections."""
    known = {f.name: f for f in fields(config)}
    changed = {}
    for key, value in values.items():
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{where}: unknown setting {key!r}{hint}")
        old = getattr(config, key)
        if isinstance(value, dict) and is_dataclass(old):
            changed[key] = override(old, value, f"{where} [{key}]")
            continue
        wanted = get_type_hints(type(config))[key]
        kinds = get_args(wanted) or (wanted,)
        if type(value) is int and float in kinds:
            value = float(value)
        fits = type(value) in kinds
        if get_origin(wanted) is list:
            fits = type(value) is list and all(type(item) in kinds for item in value)
        if not fits:
            name = wanted.__name__ if isinstance(wanted, type) else str(wanted)
            raise UserError(f"{where}: {key} = {value!r} should be of type {name}")
        changed[key] = value
    return replace(config, **changed)


def parse_command(stages, about, argv, saved=None):
    """`STAGE [--config FILE] [--setting value ...]` -> (stage, its config).

    stages: {name: (config dataclass, ...)}; about: help text; saved(stage, config) -> (run name,
    settings) of the run to resume. Flags win over the preset, the preset over the defaults.
    """
    if not argv or argv[0] not in stages:
        print(about.strip())
        for name, (kind, *_) in stages.items():
            print(f"\n  {name:11s} {kind.__doc__.strip().splitlines()[0]}")
        if not argv or argv[0] in ("-h", "--help"):
            raise SystemExit(0)
        near = get_close_matches(argv[0], stages, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{argv[0]!r} is not one of {', '.join(stages)}{hint}")
    stage, rest = argv[0], list(argv[1:])
    default = stages[stage][0]()
    for at, word in enumerate(rest):
        name, equals, file = word.partition("=")
        if name == "--config":
            if not equals and at + 1 == len(rest):
                raise UserError("--config needs a file")
            default = load_preset(default, file if equals else rest[at + 1])
            del rest[at : at + (1 if equals else 2)]
            break

    spec = sys.modules["__main__"].__spec__  # of python -m, else None
    program = f"python -m {spec.name.removesuffix('.__main__')}" if spec else sys.argv[0]
    program += f" {stage}" if len(stages) > 1 else ""

    def parse(default):
        return tyro.cli(type(default), args=rest, default=default, prog=program)

    config = parse(default)
    if saved is not None and config.resume:
        if type(default)() != default:
            raise UserError("--resume keeps the run's own settings: no --config beside it")
        name, values = saved(stage, config)
        default = override(default, {**values, "runs": config.runs}, f"{name}/config.json")
        config = replace(parse(default), resume=True, name=name)
    return stage, config


def run_script(main):
    """Run a script: an error of the user is one line and status 2, Ctrl-C a line and status 130."""
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK")
        print(f"rank {rank}: error: {error}" if rank else f"error: {error}", file=sys.stderr)
        if rank:  # not to wait for the others on the way out; torchrun stops them
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(2)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
