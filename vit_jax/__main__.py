"""The command `vit_jax`, also `python -m vit_jax`: a subcommand for each command line of the package.

Functions import what they need: `--help` stays quick, and Ctrl-C during an import ends the process without a traceback.
"""

import signal
import sys
from typing import Any, NoReturn

COMMANDS = {
    "train": "fine-tune a model as a configuration says, evaluate it and write its report",
    "predict": "classify images with a run, a file or a published model",
    "report": "write the page of a run, or a page that compares several runs",
    "data": "list, prepare and show data sets",
    "checkpoints": "list, download, inspect, check and convert weights",
    "sweep": "fill the table of the AugReg paper: models by tasks",
    "ablate": "train a base and changes of it with the same seeds, and compare them",
    "probe": "classify with the features of a checkpoint: nearest neighbours and linear heads",
}
MODULES = {  # the others have the command's name
    "report": "vit_jax.reports.__main__",
    "sweep": "vit_jax.studies.vtab",
    "ablate": "vit_jax.studies.ablate",
    "probe": "vit_jax.studies.probe",
}


def console() -> NoReturn:
    """Runs `vit_jax` with the arguments of this process, and ends the process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until cli.run answers it
    from vit_jax import cli

    program = "python -m vit_jax" if sys.argv[0].endswith("__main__.py") else "vit_jax"
    cli.run(lambda: cli.call(lambda: main(sys.argv[1:], program)))


def main(argv: list[str], program: str = "vit_jax") -> int:
    """Runs a subcommand; returns the exit status: 2 for a wrong command line, 1 for other errors.

    Args:
      argv: the arguments, without the program.
      program: how the user calls the program, for usage texts.
    """
    import difflib
    import importlib

    from vit_jax import __version__, cli

    command, *arguments = argv or [""]
    if command in ("-h", "--help"):
        rows = "\n".join(f"  {name:13}{text}" for name, text in COMMANDS.items())
        print(f"usage: {program} {{{','.join(COMMANDS)}}} …\n\n{rows}\n\n{program} COMMAND --help describes a command.")
        return 0
    if command == "--version":
        print(f"vit_jax {__version__}")
        return 0
    if command == "train":
        return train(arguments, f"{program} train")
    if command in COMMANDS:
        module = importlib.import_module(MODULES.get(command, f"vit_jax.{command}.__main__"))
        return module.main(arguments, f"{program} {command}")
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f"the nearest is {near[0]}" if near else f"commands are {', '.join(COMMANDS)}"
    cli.fail(f"{program}: {f'unknown command {command!r}' if argv else 'no command'}; {hint}; see {program} --help")
    return 2


def train(argv: list[str], program: str) -> int:
    """Trains, evaluates or previews what a command line names; arguments and result are those of `main`."""
    from vit_jax import cli
    from vit_jax.training.command import MEMORY_ADVICE

    return cli.call(lambda: _train(argv, program), MEMORY_ADVICE)


def _train(argv: list[str], program: str) -> int:
    import logging

    from vit_jax import cli
    from vit_jax.config_rules import check
    from vit_jax.errors import ConfigError
    from vit_jax.training import command

    for library in ("absl", "asyncio"):  # Orbax logs the traceback of what it then raises; one line is enough
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        parsed, values = command.parse([program, *argv])
        if values.help:
            print(f"{command.HELP.format(program=program, cards=', '.join(command.CARDS))}\n{command.describe_fields(parsed)}")
            return 0
        check(parsed)
    except ConfigError as error:
        cli.fail(error)
        return 2
    if values.hosts > 1:
        from vit_jax.training.launch import launch

        return launch(argv, values.hosts)
    return _run(parsed, values)


def _run(config: Any, values: Any) -> int:
    """Does what the flags ask for; returns the exit status."""
    from pathlib import Path

    if values.target:
        from vit_jax.training import forecast

        print(forecast.describe(config, values.target, values.devices, values.hlo or ""))
        return 0
    import jax

    from vit_jax import cli, runtime
    from vit_jax.errors import ConfigError, reason
    from vit_jax.files import BEST_WEIGHTS, FINAL_WEIGHTS
    from vit_jax.training import command, hosts, loop, preview

    hosts.initialize(values.coordinator or "", values.num_processes, values.process_id)
    runtime.prepare()
    if (values.dry_run or values.eval_only) and jax.process_count() > 1:  # started by a launcher, without flags
        raise ConfigError(f"--{'dry_run' if values.dry_run else 'eval_only'} runs on one host, and a launcher started several")
    workdir = Path(values.workdir or command.workdir_of(values["config"].config_filename))
    try:
        if values.dry_run:
            print(preview.preview(config))
        elif values.eval_only:
            print(command.report(config, loop.evaluate(config, workdir)))
        else:
            with hosts.leaving_on_errors(command.MEMORY_ADVICE), cli.leaving_at_second_signal():
                result = loop.train(config, workdir)
            if not result.finished:
                print(f"stopped and saved in {workdir}; run the same command again to continue", file=sys.stderr)
                return 128 + (getattr(result, "signal", 0) or signal.SIGINT)
            if hosts.is_first():
                print(command.report(config, result.metrics))
                print(f"Weights: {workdir / BEST_WEIGHTS} (best), {workdir / FINAL_WEIGHTS} (last)")
                write_page(workdir)
    except OSError as error:
        if error.filename is None and not isinstance(error, BrokenPipeError) and error.errno is not None:
            raise OSError(error.errno, reason(error), str(workdir)) from error  # names at least the run
        raise
    return 0


def write_page(workdir: Any) -> None:
    """Writes the page of a finished run; if that fails, the run is still complete."""
    from vit_jax.errors import reason
    from vit_jax.reports import page

    try:
        print(f"Page: {page.write(workdir)}")
    except Exception as error:  # of any kind: the weights are already written
        print(f"no page was drawn ({type(error).__name__}: {reason(error)})", file=sys.stderr)


if __name__ == "__main__":
    console()
