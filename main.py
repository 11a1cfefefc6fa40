"""Trains a Vision Transformer as a configuration says, evaluates it, and goes on with what it finds in the run's folder.

usage: python main.py --config FILE [--config.SECTION.FIELD=VALUE …] [--workdir DIR] [--eval_only] [--dry_run]

  --config FILE    a file of configs/, with an argument after a colon where it takes one, or a run's config.json
  --workdir DIR    where the run lives; default runs/<name of the configuration>
  --eval_only      evaluate the newest state there or, where there is none, model.checkpoint
  --dry_run        print shapes, memory and the time to expect
"""

import difflib
import logging
import re
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from vit_jax import config as configuration
from vit_jax.config import Config
from vit_jax.errors import ConfigError


def _fields(config: Config) -> str:
    lines = ["fields, with their values:"]
    for name, (value, kind) in configuration.fields(config).items():
        allowed = configuration.CHOICES.get(name)
        shown = " | ".join(allowed) if allowed else kind.__name__ if isinstance(kind, type) else str(kind)
        lines.append(f"  --config.{name}={value if value != '' else repr('')}".ljust(48) + f"  {shown}")
    return "\n".join(lines)


def parse(argv: list[str]) -> tuple[Config, flags.FlagValues]:
    """The configuration and the flags that a command line asks for; ConfigError for what it gets wrong."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    for name in ("eval_only", "dry_run", "help"):
        flags.DEFINE_bool(name, False, "", flag_values=values)
    known = configuration.fields(Config())
    for override in filter(None, (re.match(r"--?(?:no)?config\.([^=]*)", argument) for argument in argv[1:])):
        name = override[1]
        if name == "run.expected":
            raise ConfigError("config.run.expected is set in a configuration file")
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=3)) or "none"
            raise ConfigError(f"there is no field config.{name}; the nearest: {near}\n{_fields(Config())}")
    # The file is read by the flag's own parser; what ml_collections adds is the typed overrides.
    config_flags.DEFINE_config_dataclass("config", Config(), "", flag_values=values, sys_argv=argv, parse_fn=configuration.read)
    try:
        rest = values(argv)
    except Exception as error:  # absl's and ml_collections' errors share no base; all are about the command line
        raise ConfigError(str(error.__context__ if isinstance(error.__context__, ConfigError) else error)) from None
    if len(rest) > 1:
        raise ConfigError(f"stray argument {rest[1]!r}; values are given with =, as in --config.augment.flip=False")
    if not (values["config"].present or values.help):
        raise ConfigError("name a configuration, as in python main.py --config configs/demo.py")
    if values.dry_run and values.eval_only:
        raise ConfigError("--dry_run and --eval_only exclude each other")
    config = values.config
    # What the file says to expect holds for what the file says to do.
    if values["config"].present:
        flag: Any = values["config"]
        if set(configuration.difference(config, configuration.read(flag.config_filename))) - {"model.checkpoint"}:
            config.run.expected = {}
    return config, values


def workdir_of(source: str) -> Path:
    """Where a configuration's run lives unless it is told otherwise."""
    path, argument = configuration.split(source)
    if path.endswith(".json"):
        return Path(path).parent
    return Path("runs", "-".join([Path(path).stem, *filter(None, argument.replace("/", "_").split(","))]))


def report(config: Config, metrics: dict[str, float]) -> str:
    """What a run came to, beside what its configuration says to expect."""
    expected = dict(config.run.expected)

    def figure(name: str, value: float) -> str:
        return f"{value:.2%}" if "accuracy" in name else f"{value:.4g}"

    lines = []
    for name in ("test/accuracy", "test/loss"):
        if name in metrics:
            beside = f" (expected {figure(name, expected.pop(name))})" if name in expected else ""
            lines.append(f"{name} {figure(name, metrics[name])}{beside}, step {metrics['step']:.0f}")
    if "best/accuracy" in metrics:
        lines.append(
            f"best evaluation {metrics['best/accuracy']:.2%}, step {metrics['best/step']:.0f}, chosen on the test split"
        )
    lines += [f"expected {name}: {figure(name, value)}" for name, value in expected.items()]
    return "\n".join(lines)


def draw(workdir: Path) -> None:
    """Writes the page about a run that has ended well, which nothing that goes wrong here changes."""
    from vit_jax.reports import page

    try:
        print(f"pictures: {page.write(workdir)}")
    except Exception as error:  # whatever it is, the run itself is whole
        print(f"no page was drawn ({type(error).__name__}: {error})", file=sys.stderr)


def run(config: Config, values: flags.FlagValues) -> int:
    """Does what the flags ask for; returns the exit status. What users can mend ends in a sentence."""
    import jax

    from vit_jax.errors import CheckpointError, DataError, TrainingError
    from vit_jax.training import loop, preview

    flag: Any = values["config"]
    source = flag.config_filename
    workdir = Path(values.workdir or workdir_of(source))
    try:
        if values.dry_run:
            print(preview.preview(config))
        elif values.eval_only:
            print(report(config, loop.evaluate(config, workdir)))
        else:
            result = loop.train(config, workdir)
            if not result.finished:
                print(f"stopped and saved; the same command goes on from {workdir}", file=sys.stderr)
                return 130
            print(report(config, result.metrics))
            print(f"weights: {workdir / 'best.npz'} (best), {workdir / 'final.npz'} (last)")
            draw(workdir)
    except (ConfigError, CheckpointError, DataError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # the machine's, not ours: a full disk, no permission
        print(f"error: {error.filename or workdir}: {error.strerror or error}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            "error: the device has too little memory for this: raise training.accumulation, lower training.batch_size, "
            "run.eval_batch_size or run.device_budget_mib, or take model.dtype=bfloat16; --dry_run tells what a step needs",
            file=sys.stderr,
        )
        return 1
    return 0


def main(argv: list[str]) -> int:
    """Reads the command line and does what it asks for; returns the exit status."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for library in ("absl", "asyncio"):  # Orbax logs the traceback of what it then raises; one sentence is enough
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        config, values = parse(argv)
        if values.help:
            print(f"{__doc__}\n{_fields(config)}")
            return 0
        configuration.check(config)
        return run(config, values)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv))
