"""`python main.py --config FILE …`: trains as a configuration says, like `vit_jax train`; --help lists the options."""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below ends the process without a traceback

from vit_jax import cli
from vit_jax.__main__ import train

if __name__ == "__main__":
    cli.run(lambda: train(sys.argv[1:], "python main.py"))
