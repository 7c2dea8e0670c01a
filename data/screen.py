"""What the programs of this folder share: what they write to the screen, and how a Ctrl-C ends them."""
import os
import shlex
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def say(text, stream=None):
    """Prints. Where nobody listens (a closed pipe, a full disk) this and what follows goes nowhere: the work does not
    end for its listener. The twin is in train_gpt.py."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def show_any_name():
    """Lets standard output write what its encoding lacks as escapes: a path may hold anything."""
    if hasattr(sys.stdout, "reconfigure"):  # a closed one has not
        sys.stdout.reconfigure(errors="backslashreplace")


def say_next(out):
    """Prints the line that trains on the shards in a folder."""
    name = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    say(f"Next: ./run.sh --data_dir={shlex.quote(str(name))}")


def quit_at_ctrl_c(words):
    """Until `end_by`, while imports take seconds and nothing is made, a Ctrl-C ends the program with these words."""
    def quit_at_once(*_):
        print(words, file=sys.stderr)
        os._exit(130)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # not ignored, as by nohup
        signal.signal(signal.SIGINT, quit_at_once)


def end_by(main):
    """Exits with what main() returns, in which a Ctrl-C is a KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end has come anyway
    sys.exit(code)
