"""Commands, under `python -m`."""

import signal
import sys

# While a command imports what it needs, Ctrl-C ends it silently: no traceback, and the status that a shell expects.
# `errors.run_main` hears it from then on. (argv[0] is -m until the command's own module is found.)
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
