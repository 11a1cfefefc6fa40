"""The command line of training: from arguments to a configuration, the help of its fields, and the words of a result."""

from __future__ import annotations

import ast
import difflib
import inspect
import io
import re
import textwrap
import tokenize
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from vit_jax import config as configuration
from vit_jax import config_files
from vit_jax.config import Config
from vit_jax.config_rules import CHOICES
from vit_jax.errors import ConfigError, printable
from vit_jax.training.cards import CARDS, card

if TYPE_CHECKING:
    from absl import flags

HELP = """Trains a Vision Transformer as a configuration says, evaluates it, and continues a run that was interrupted.

usage: {program} --config FILE [--config.SECTION.FIELD=VALUE …] [--workdir DIR] [--eval_only] [--dry_run] [--hosts N]
       {program} --config FILE --dry_run --target CARD [--devices N] [--hlo FILE]

  --config FILE    a Python file, the name of one in configs/ such as demo, or the config.json of a run; what follows a
                   colon is the configuration's argument
  --workdir DIR    the folder of the run; default runs/<name of the configuration>
  --eval_only      evaluate the newest state in that folder or, if there is none, model.checkpoint
  --dry_run        print shapes, memory and the time to expect; model.checkpoint is not downloaded
  --target CARD    with --dry_run: compile for a graphics card ({cards}) on any machine,
                   without data, and print memory, kernels and a bound of the speed; needs the extra `aot`
  --devices N      the number of these cards; default 1
  --hlo FILE       write the optimised program of the training step there
  --hosts N        start N processes on this machine, each as a host of the run, to try that without GPUs; of these, one
                   process uses all
  --coordinator HOST:PORT, --num_processes N, --process_id I
                   this is host I of N, and host 0 listens at that address; "--coordinator auto" on Kubernetes
                   (with jax[k8s]); on Slurm and Open MPI nothing is needed. Only host 0 needs the folder of the run
  --help           this text and every field; with --config, the values of that file
"""
MEMORY_ADVICE = (
    "raise training.grad_accum_steps, lower training.batch_size, run.eval_batch_size or run.device_budget_mib, or set "
    "model.dtype=bfloat16; --dry_run prints what a step needs"
)
_NOT_OVERRIDABLE = "run.expected"
# What may differ from the file of a configuration without a change of its final numbers, `run` aside.
_HARMLESS = {"training.eval_every", "training.save_every"}


def _comments() -> dict[str, dict[str, str]]:
    """Section's class → field → the comment behind its definition in vit_jax/config.py."""
    source = inspect.getsource(configuration)
    lines = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return {
        node.name: {
            field.target.id: " ".join(lines[n] for n in range(field.lineno, field.end_lineno + 1) if n in lines)
            for field in node.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.end_lineno
        }
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }


def _option(name: str, value: Any) -> str:
    return f"--config.{name}={value if value != '' else repr('')}"


def describe_fields(config: Config) -> str:
    """Every field that a command line can set: its value in `config`, what it means, and what is allowed."""
    comments, lines = _comments(), ["Fields of a configuration, with their values:"]
    section: Any = None
    for name, (value, kind) in configuration.fields(config).items():
        if name == _NOT_OVERRIDABLE:
            continue
        *prefix, field = name.split(".")
        if prefix != section:
            section, node = prefix, getattr(config, prefix[0]) if prefix else config
            lines.append(f"\n{prefix[0]}: {node.__doc__}" if prefix else "")
        kind_name = kind.__name__ if kind in (str, int, float, bool) else str(kind)
        allowed = " | ".join(CHOICES.get(name, ())) or kind_name
        text = f"{comments[type(node).__name__].get(field, '')} ({allowed})".strip()
        lines.append(f"  {_option(name, value)}")
        lines += textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _file_values(argv: list[str]) -> Config:
    """The configuration of the file that a command line names, without its overrides; the defaults if it names none."""
    for place, argument in enumerate(argv[1:], 1):
        if found := re.fullmatch(r"--?config(?:=(.*))?", argument, re.DOTALL):
            source = found[1] if found[1] is not None else next(iter(argv[place + 1 :]), "")
            return config_files.read(source)
    return Config()


def _check_names(argv: list[str]) -> None:
    """Raises ConfigError for an override of a field that does not exist or cannot be overridden."""
    known = configuration.fields(Config())
    for override in filter(None, (re.match(r"--?(?:no)?config\.([^=]*)", argument) for argument in argv[1:])):
        name = override[1]
        if name == _NOT_OVERRIDABLE:
            raise ConfigError(f"config.{name} cannot be set on the command line; it is set in a configuration file")
        if name in config_files.RENAMED:
            raise ConfigError(f"config.{name} is called config.{config_files.RENAMED[name]} now")
        if name not in known:
            values = {name: value for name, (value, _) in configuration.fields(_file_values(argv)).items() if name in known}
            near = difflib.get_close_matches(name, values, n=3, cutoff=0.75) or [
                match for match in values if match.rpartition(".")[2] == name.rpartition(".")[2]
            ]
            hint = f"the nearest: {', '.join(_option(name, values[name]) for name in near)}" if near else "--help lists all"
            raise ConfigError(f"there is no field config.{name}; {hint}")


def _same_weights(a: str, b: str) -> bool:
    """Whether two values of model.checkpoint name the same weights, as "ViT-B_16" and "/data/ViT-B_16.npz" do."""

    def name(value: str) -> str:
        return PurePath(value).stem if value.endswith(".npz") else value

    return name(a) == name(b)


def _keeps_expected(config: Config, file: Config) -> bool:
    """Whether what the file expects still holds after the overrides."""
    changed = set(configuration.difference(config, file)) - _HARMLESS
    return not changed or (changed == {"model.checkpoint"} and _same_weights(config.model.checkpoint, file.model.checkpoint))


def parse(argv: list[str]) -> tuple[Config, flags.FlagValues]:
    """The configuration and the flags of a command line.

    Raises:
      ConfigError: for anything that is wrong with the command line or the file; the values are not checked.
    """
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    for name in ("target", "hlo", "coordinator"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    flags.DEFINE_integer("devices", 1, "", flag_values=values)
    for name, default in (("hosts", 1), ("num_processes", 1), ("process_id", 0)):
        flags.DEFINE_integer(name, default, "", lower_bound=default, flag_values=values)
    for name in ("eval_only", "dry_run", "help"):
        flags.DEFINE_bool(name, False, "", flag_values=values)
    _check_names(argv)
    # The flag's own parser reads the file; ml_collections adds the typed overrides.
    config_flags.DEFINE_config_dataclass("config", Config(), "", flag_values=values, sys_argv=argv, parse_fn=config_files.read)
    try:
        rest = values(argv)
    except Exception as error:  # absl's and ml_collections' errors share no base; all are about the command line
        cause = error.__context__ if isinstance(error.__context__, ConfigError) else error
        raise ConfigError(" ".join(str(cause).split())) from None
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}; values are given with =, as in --config.augment.flip=False")
    if not (values["config"].present or values.help):
        raise ConfigError(f"name a configuration, as in {argv[0]} --config demo")
    given = [name for name in ("steps", "epochs") if any(re.match(rf"--?config\.training\.{name}\b", text) for text in argv)]
    if len(given) == 2:
        raise ConfigError("give training.steps or training.epochs, not both")
    if given == ["steps"]:
        values.config.training.epochs = 0.0  # of the file
    if values.dry_run and values.eval_only:
        raise ConfigError("--dry_run and --eval_only exclude each other")
    _check_target(values)
    _check_hosts(values)
    for name in ("workdir", "hlo"):
        if "\0" in (values[name].value or ""):
            raise ConfigError(f"--{name} must not contain a NUL character")
    config = values.config
    if values["config"].present:
        flag: Any = values["config"]
        if not _keeps_expected(config, config_files.read(flag.config_filename)):
            config.run.expected = {}
    return config, values


def _check_target(values: flags.FlagValues) -> None:
    """Raises ConfigError for options of --target that do not go together."""
    if values.target is None:
        for name in ("devices", "hlo"):
            if values[name].present:
                raise ConfigError(f"--{name} needs --target, one of {', '.join(CARDS)}")
        return
    card(values.target)
    if not values.dry_run:
        raise ConfigError("--target needs --dry_run: a run trains on the devices that this machine has")


def _check_hosts(values: flags.FlagValues) -> None:
    """Raises ConfigError for options of several hosts that do not go together."""
    given = [name for name in ("num_processes", "process_id") if values[name].present]
    address, several = values.coordinator or "", values.hosts > 1
    if several and (address or given):
        raise ConfigError("--hosts starts all processes itself: leave out --coordinator, --num_processes and --process_id")
    if (address not in ("", "auto")) != (len(given) == 2) or len(given) == 1:
        raise ConfigError("--coordinator HOST:PORT, --num_processes and --process_id need each other")
    if address not in ("", "auto") and not re.fullmatch(r"\S+:\d{1,5}", address):
        raise ConfigError(f"--coordinator must be HOST:PORT of host 0, or auto, got {printable(address, 80)!r}")
    if given and values.process_id >= values.num_processes:
        raise ConfigError(f"--process_id must be less than --num_processes = {values.num_processes}, got {values.process_id}")
    if (several or address) and (values.dry_run or values.eval_only):
        raise ConfigError(f"--{'dry_run' if values.dry_run else 'eval_only'} runs on one host")


def workdir_of(source: str) -> Path:
    """The working directory of a configuration's run, unless the user names another."""
    path, argument = config_files.split(source)
    if path.endswith(".json"):
        return Path(path).parent
    words = []
    for word in argument.split(","):
        kind, _, location = word.partition(":")
        if location and kind in ("folder", "csv"):  # only the last name of the path
            word = Path(location).expanduser().absolute().resolve().name.removesuffix(".csv")
        words.append(word.replace("/", "_").replace(":", "_"))
    return Path("runs", "-".join([Path(path).stem, *filter(None, words)]))


def report(config: Config, metrics: dict[str, float]) -> str:
    """The metrics of a run for people, with the split that was evaluated, next to what its configuration expects."""
    from vit_jax.data.splits import names
    from vit_jax.data.tasks import task

    expected, (_, split, validation) = dict(config.run.expected), names(task(config.data.task), config.data)

    def figure(name: str, value: float) -> str:
        return f"{100 * value:.2f} %" if "accuracy" in name else f"{value:.4g}"

    def on_split(name: str) -> str:
        return f"test {name}" if split == "test" else f"{name} on {split}"

    def title(text: str) -> str:
        return text[0].upper() + text[1:]

    lines = []
    for name in ("accuracy", "loss"):
        if (key := f"test/{name}") in metrics:
            hint = f" (expected {figure(key, expected.pop(key))})" if key in expected else ""
            lines.append(f"{title(on_split(name))} {figure(key, metrics[key])} after {metrics['step']:.0f} steps{hint}")
    if "validation/accuracy" in metrics:
        lines.append(f"Validation accuracy {figure('accuracy', metrics['validation/accuracy'])} on {validation}")
    if "best/accuracy" in metrics:
        best = f"{figure('accuracy', metrics['best/accuracy'])} after {metrics['best/step']:.0f} steps"
        chosen = validation or ("the test split" if split == "test" else split)
        tested = ""
        if "best/test_accuracy" in metrics:
            tested = f"; {on_split('accuracy')} of that state {figure('accuracy', metrics['best/test_accuracy'])}"
        measured = "validation accuracy" if validation else on_split("accuracy")
        lines.append(f"Best {measured} {best}, chosen on {chosen}{tested}")
        patience = config.training.patience
        early = config.training.epochs or metrics["step"] < config.training.steps
        if early and patience and metrics["step"] - metrics["best/step"] >= patience * config.training.eval_every:
            lines.append(f"Training ended, as training.patience asks: no better validation accuracy in {patience} evaluations")
    lines += [f"Expected {name.replace('test/', 'test ')}: {figure(name, value)}" for name, value in expected.items()]
    return "\n".join(lines)
