"""Configurations in files: Python files whose get_config() returns one, and the config.json of a run."""

import dataclasses
import difflib
import json
import runpy
from pathlib import Path
from typing import Any

from vit_jax.config import Config, shown
from vit_jax.errors import ConfigError, UserError, reason

RENAMED = {"training.accumulation": "training.grad_accum_steps"}  # fields of earlier versions, in config.json of their runs


def to_json(config: Config) -> str:
    """The configuration as JSON text, which `from_json` reads back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, source: str) -> Config:
    """The configuration that `to_json` wrote; the ConfigError for any other text names `source`."""

    def build(kind: Any, values: Any, prefix: str) -> Any:
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: {prefix.rstrip('.') or 'the whole file'} must be an object, got {shown(values)}")
        known = {field.name: field for field in dataclasses.fields(kind)}
        for old, new in RENAMED.items():
            if prefix and old.startswith(prefix) and old.removeprefix(prefix) in values:
                value = values.pop(old.removeprefix(prefix))
                if values.setdefault(new.removeprefix(prefix), value) != value:
                    raise ConfigError(f"{source}: {old} and {new} are the same field and have different values")
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(f"{source}: there is no field {prefix}{unknown[0]}; there are {', '.join(known)}")
        made = {}
        for name, value in values.items():
            field = known[name]
            if dataclasses.is_dataclass(field.type):
                value = build(field.type, value, f"{prefix}{name}.")
            elif isinstance(value, list):
                value = tuple(value)
            made[name] = value
        return kind(**made)

    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 4,300 digits and 100,000 brackets are JSON too
        raise ConfigError(f"{source} is not JSON that can be read: {reason(error)}") from None
    return build(Config, values, "")


def split(source: str) -> tuple[str, str]:
    """The file and the argument of "configs/augreg.py:R+Ti/16,pets"; the argument is "" if there is none."""
    if Path(source).is_file():
        return source, ""
    path, _, argument = source.partition(":")
    return path, argument


def _find(path: str) -> str:
    """The file that a user means: `path` itself, or for a bare name such as "demo" configs/demo.py, here or of the package."""
    package = Path(__file__).parent  # a wheel holds the folder of configurations here, a clone one level higher
    packaged = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    folders = [Path("configs"), packaged]
    bare = path == Path(path).stem
    for candidate in [Path(path), *(folder / f"{path}.py" for folder in folders if bare)]:
        if candidate.is_file():
            return str(candidate)
    names = sorted({file.stem for folder in folders for file in folder.glob("[!_]*.py")})
    near = difflib.get_close_matches(Path(path).stem, names, n=1)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise ConfigError(f"configuration {shown(path)}: there is no such file or name; names are {', '.join(names)}{hint}")


def read(source: str) -> Config:
    """The configuration of a file: a run's config.json, or a Python file whose get_config() returns a Config.

    A bare name, such as "demo", means configs/demo.py in the current folder, else the file of that name that comes with the
    package. What follows a colon is handed to get_config: "configs/augreg.py:R+Ti/16,pets".
    """
    path, argument = split(source)
    path = _find(path)
    if path.endswith(".json"):
        return from_json(Path(path).read_text(errors="replace"), path)
    try:
        get_config = runpy.run_path(path)["get_config"]
        config = get_config(argument) if argument else get_config()
    except UserError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from None
    except Exception as error:
        renamed = [f"; {old} is called {new} now" for old, new in RENAMED.items() if f"'{old.split('.')[-1]}'" in str(error)]
        raise ConfigError(
            f"{path} gives no configuration: {type(error).__name__}: {reason(error)}{''.join(renamed)}"
        ) from error
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: get_config() returned a {type(config).__name__}, not a vit_jax.Config")
    return config
