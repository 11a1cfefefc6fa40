"""Trains a Vision Transformer as a configuration says, evaluates it, and continues what it finds in the run's folder.

usage: python main.py --config FILE [--config.SECTION.FIELD=VALUE …] [--workdir DIR] [--eval_only] [--dry_run]

  --config FILE    a file of configs/, with an argument after a colon if it takes one, or a run's config.json
  --workdir DIR    the folder of the run; default runs/<name of the configuration>
  --eval_only      evaluate the newest state in that folder or, if there is none, model.checkpoint
  --dry_run        print shapes, memory and the time to expect; model.checkpoint is not downloaded
  --help           this text and every field; with --config, the values of that file
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below ends the process without a traceback

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax import cli
from vit_jax.errors import ConfigError, reason

if TYPE_CHECKING:  # what is slow to import is imported inside functions, where signals are already answered
    from absl import flags

    from vit_jax.config import Config

MEMORY_ADVICE = (
    "raise training.grad_accum_steps, lower training.batch_size, run.eval_batch_size or run.device_budget_mib, or set "
    "model.dtype=bfloat16; --dry_run prints what a step needs"
)


def draw(workdir: Path) -> None:
    """Writes the page of a finished run; an error here does not change the run's result."""
    from vit_jax.reports import page

    try:
        print(f"Page: {page.write(workdir)}")
    except Exception as error:  # of any kind: the run is complete without its page
        print(f"no page was drawn ({type(error).__name__}: {reason(error)})", file=sys.stderr)


def run(config: Config, values: flags.FlagValues) -> int:
    """Does what the flags ask for; returns the exit status."""
    from vit_jax import runtime
    from vit_jax.training import loop, preview
    from vit_jax.training.command import report, workdir_of

    runtime.prepare()

    flag: Any = values["config"]
    workdir = Path(values.workdir or workdir_of(flag.config_filename))
    try:
        if values.dry_run:
            print(preview.preview(config))
        elif values.eval_only:
            print(report(config, loop.evaluate(config, workdir)))
        else:
            result = loop.train(config, workdir)
            if not result.finished:
                print(f"stopped and saved in {workdir}; run the same command again to continue", file=sys.stderr)
                return 128 + (getattr(result, "signal", 0) or signal.SIGINT)
            print(report(config, result.metrics))
            print(f"Weights: {workdir / 'best.npz'} (best), {workdir / 'final.npz'} (last)")
            draw(workdir)
    except OSError as error:
        if error.filename is None and not isinstance(error, BrokenPipeError) and error.errno is not None:
            raise OSError(error.errno, reason(error), str(workdir)) from error  # say at least for which run
        raise
    return 0


def main(argv: list[str]) -> int:
    """Does what a command line asks for; returns the exit status: 2 for a wrong command line, 1 for other errors."""
    from vit_jax.config import check
    from vit_jax.training.command import describe_fields, parse

    for library in ("absl", "asyncio"):  # Orbax logs the traceback of what it then raises; one line is enough
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        config, values = parse(argv)
        if not values.help:
            check(config)
    except ConfigError as error:
        cli.fail(error)
        return 2
    if values.help:
        print(f"{__doc__}\n{describe_fields(config)}")
        return 0
    return run(config, values)


if __name__ == "__main__":
    cli.run(lambda: cli.call(lambda: main(sys.argv), MEMORY_ADVICE))
