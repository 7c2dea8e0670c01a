"""Two ranks of which one fails, dies, stops or is slow: each says its own end, once, with its number, and in time."""

import signal
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist
from tiny import command, edited, environment, events, make_corpus, run_folders

import train_gpt as tg

STEP = "        self.set_schedules(step)\n        batch = "  # within a step, before the first collective
SYNC = "os.fsync(file.fileno())"  # within a save, on rank 0
LONG = ("--steps=3000", "--epochs=2000", "--save=False")
FAILED = "a collective failed: another rank died, hung or never came"


class Ranks:
    """Two ranks without a launcher, which would end the one that is to speak. `changes`: as for `edited`."""

    def __init__(self, folder, *knobs, changes=()):
        make_corpus(folder / "data")
        script = edited(folder, "\nRANK_TIMEOUT = 130\n", "\nRANK_TIMEOUT = 4\n", *changes)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
        self.ranks = []
        for rank in "01":
            surroundings = environment() | place | dict(RANK=rank, LOCAL_RANK=rank)
            self.ranks.append(subprocess.Popen(command(folder, *knobs, script=script), cwd=folder,
                                               env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                               encoding="utf-8"))

    def wait_for(self, start):
        assert any(line.startswith(start) for line in self.ranks[0].stdout)

    def ends(self, *living, seconds=60):
        """(exit codes, what each of the ranks `living` said to standard error); the others are killed after them."""
        try:
            said = {rank: self.ranks[rank].communicate(timeout=seconds)[1] for rank in living}
        finally:
            for process in self.ranks:
                process.kill()
                process.wait()
        return [self.ranks[rank].returncode for rank in living], *said.values()


def one_sentence(said, rank, words):
    assert said.count("train_gpt: ") == 1 and f"train_gpt: rank {rank}: {words}" in said, said
    assert "Traceback" not in said


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGSTOP there")
@pytest.mark.parametrize("number, lost", [("SIGSTOP", 1), ("SIGKILL", 0)])
def test_a_rank_that_stops_or_dies_ends_the_other(tmp_path, number, lost):
    ranks = Ranks(tmp_path, *LONG)
    ranks.wait_for("step:2/")
    ranks.ranks[lost].send_signal(getattr(signal, number))
    codes, said = ranks.ends(1 - lost, seconds=30)
    one_sentence(said, 1 - lost, FAILED)
    assert codes == [4]
    if lost == 1:
        assert events(run_folders(tmp_path)[0], "end")[0]["code"] == 4


@pytest.mark.parametrize("failure, code, words", [
    ("raise torch.OutOfMemoryError('CUDA out of memory')", 6, "out of memory: "), ("time.sleep(60)", None, None),
    ("os._exit(0)", None, None)])
def test_a_rank_that_fails_hangs_or_leaves_within_a_step(tmp_path, failure, code, words):
    at = f"        if step == 2 and self.rank:\n            {failure}\n{STEP}"
    ranks = Ranks(tmp_path, *LONG, changes=[STEP, at])
    if code:
        codes, *said = ranks.ends(1, 0)
        one_sentence(said[0], 1, words)
    else:
        codes, *said = ranks.ends(0)
    assert codes == [code, 4][-len(codes):]
    one_sentence(said[-1], 0, FAILED)


def test_a_slow_first_validation_is_no_dead_rank(tmp_path):
    """Where one rank has more of it to score than a collective may take."""
    summed = "        if self.world_size > 1:\n            for values in (sums, *each):"
    slow = "        if step == self.rank == 0:\n            import time; time.sleep(6)\n"
    codes, *said = Ranks(tmp_path, "--steps=3", "--save=False", changes=[summed, slow + summed]).ends(0, 1)
    assert codes == [0, 0], said


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGSTOP there")
def test_a_slow_save_is_no_dead_rank_and_a_stop_within_one_is(tmp_path):
    """A save takes longer than a collective may. Rank 0 stops within the second one."""
    more = f"{SYNC}; time.sleep(6); self.step == 4 and os.kill(os.getpid(), signal.SIGSTOP)"
    ranks = Ranks(tmp_path, "--checkpoint_every=2", changes=[SYNC, more])
    codes, said = ranks.ends(1)
    assert codes == [4] and [row["step"] for row in events(run_folders(tmp_path)[0], "checkpoint")] == [2]
    one_sentence(said, 1, FAILED)


@pytest.mark.parametrize("error, code", [
    (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp, unhandled cuda error"), 4),
    (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp, operation not permitted when stream is capturing"), 1),
    (dist.DistBackendError("rank 1 left"), 4),
])
def test_what_a_graph_cannot_capture_is_no_lost_rank(error, code):
    with pytest.raises(type(error)) as caught:
        exec(compile("raise error", tg.__file__, "exec"), dict(error=error))
    assert tg.verdict(caught.value)[0] == code
