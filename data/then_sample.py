"""Runs a training and then prints a sample of the weights that it wrote; ./run.sh starts this.

    python data/then_sample.py python train_gpt.py --knob=value ...

To whom it may concern this process is the training: signals go on to it, and its exit code comes back, whatever becomes
of the sample. (A shell cannot stand here: bash loses the exit code of a child that ends while a signal comes.) Without
new weights (a failed or stopped run, --save=False) there is no sample.

A script that ends with 0 and left no run in logs/ trained nothing: that is said, and the exit code is 1.
"""
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

HANDED_ON = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")  # Windows has not all of them
SAMPLE = Path(__file__).with_name("sample.py")


def reaches_all():
    """Whether a Ctrl-C was given to every process at once: in a terminal, whose work in the foreground this is."""
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return os.name == "nt"


class Child:
    """Runs commands, one after the other. `process`: the latest; `signalled`: the signals that came so far."""

    def __init__(self):
        self.process, self.signalled = None, []
        for name in HANDED_ON:
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup's SIGHUP stays ignored, by the child too
                signal.signal(number, self.hand_on)

    def hand_on(self, number, frame):
        self.signalled.append(number)
        # A second SIGINT would mean: end at once, save nothing.
        if self.process and not (number == signal.SIGINT and reaches_all()):
            self.process.send_signal(number)

    def run(self, command):
        """The exit code of a command; of one that a signal killed, that signal's negative number."""
        self.process = subprocess.Popen(command)
        for number in self.signalled[:1]:  # it came before there was a process
            self.process.send_signal(number)
        return self.process.wait()


def saved_weights():
    return set(Path("logs").glob("*/weights.pt"))


def runs():
    return set(Path("logs").glob("*"))


def may_leave_no_run(command):
    """Whether to leave no run here is a good end: of a complete run's --resume=latest, of a trial that asks no more, of
    a rank that keeps nothing, as all but the first do."""
    return "--resume=latest" in command or "TRIAL_SCRIPT" in os.environ or os.environ.get("RANK", "0") != "0"


def ranks_of(command):
    """The argument that leads to the ranks beside the shards, as weights know no more than the folder's name."""
    folders = [word.partition("=")[2] for word in command if word.startswith("--data_dir=")]
    return [f"--data_dir={folders[-1]}"] if folders and Path(folders[-1], "gpt2.tiktoken").exists() else []


def main(command):
    before, runs_before, child = saved_weights(), runs(), Child()
    code = child.run(command)
    new = sorted(saved_weights() - before, key=lambda path: path.stat().st_mtime)
    if code == 0 and new and not child.signalled:
        # The last, since another run may have ended meanwhile. Why there is no sample, it says itself in one sentence.
        child.run([command[0], str(SAMPLE), f"--weights={new[-1]}", *ranks_of(command)])
    if code == 0 and not (child.signalled or runs() - runs_before or may_leave_no_run(command)):
        code = 1
        with suppress(OSError):  # nobody listens
            os.write(2, b"run.sh: the script ended with 0, but left no run in logs/: nothing was trained; look whether "
                        b"it still calls main().\n")
    if code < 0:  # die of the same signal
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # an ordinary end takes a while, in which a signal would change the exit code
