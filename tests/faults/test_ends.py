"""Ends of a run in this process: the checkpoint of another set of parameters, no memory, no room, handlers of before;
and in a process of its own, whose shard is cut short while it trains."""

import contextlib
import copy
import errno
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
from tiny import command, cut_off, edited, environment, events, make_corpus, run_folders

import train_gpt as t

HANDLED = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    make_corpus(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def main(folder, *knobs):
    t.main([*command(folder)[2:], "--steps=2", *knobs])


def ended(capsys, folder, *knobs, code):
    """What a run that ends with `code` said, in one sentence."""
    with pytest.raises(SystemExit) as caught:
        main(folder, *knobs)
    said = capsys.readouterr().err
    assert caught.value.code == code and said.count("\n") == 1, said
    return said


def with_one_more(name, make):
    """An MLP with one more parameter."""
    def __init__(self, *arguments):
        t_mlp.__init__(self, *arguments)
        setattr(self, name, torch.nn.Parameter(make()))

    t_mlp = t.MLP
    return type("MLP", (t_mlp,), dict(__init__=__init__))


def state(optimizer):
    """The first state of what a checkpoint holds of an optimizer."""
    return next(iter(optimizer["state"].values()))


def test_a_checkpoint_of_another_set_of_parameters(here, capsys, monkeypatch):
    main(here, "--checkpoint_every=1")
    saved = next(here.glob("logs/*/checkpoints/step_000001.pt"))
    for name, make in (("more", lambda: torch.zeros(64, 64)), ("gain", lambda: torch.ones(64))):
        monkeypatch.setattr(t, "MLP", with_one_more(name, make))
        assert "weights of another script" in ended(capsys, here, f"--resume={saved}", code=5)
        monkeypatch.undo()
        monkeypatch.chdir(here)
    whole = torch.load(saved)
    alone = max(i for group in whole["optimizers"][0][0]["param_groups"] for i in group["params"])
    assert alone not in whole["optimizers"][0][0]["state"], "in a bucket of several, whose state is the first's"
    for change in (lambda model, muon, adam, *_: model.pop("embed.weight"),
                   lambda model, muon, adam, *_: adam["param_groups"].pop(),
                   lambda model, muon, adam, *_: adam["param_groups"][0]["params"].append(99),
                   lambda model, muon, adam, *_: muon["param_groups"].append(muon["param_groups"][0]),
                   lambda model, muon, adam, *_: state(adam).update(exp_avg=state(adam)["exp_avg"][4096:]),
                   lambda model, muon, adam, *_: state(muon).update(second_moment=state(muon)["second_moment"][:, :1]),
                   lambda model, muon, adam, *_: state(adam).update(step=torch.zeros(2)),
                   lambda model, muon, adam, *_: state(adam).update(exp_avg=0.5),
                   lambda model, muon, adam, *_: state(muon).pop("momentum_buffer"),
                   lambda model, muon, adam, *_: adam["state"].clear(),
                   lambda model, muon, adam, *_: state(muon).update(average=torch.zeros(3)),
                   lambda model, muon, adam, *_: state(muon).update(average="an average"),
                   lambda model, muon, adam, *_: muon["state"].update({alone: dict(average=torch.zeros(3))})):
        other = copy.deepcopy(whole)
        change(other["model"], *other["optimizers"][0])
        torch.save(other, here / "other.pt")
        assert "weights of another script" in ended(capsys, here, "--resume=other.pt", code=5)
        assert events(run_folders(here)[-1], "end")[0]["code"] == 5
    torch.save(whole | dict(optimizers=[whole["optimizers"][0][:2]]), here / "other.pt")
    assert "--resume=other.pt holds weights of another" in ended(capsys, here, "--resume=other.pt", code=5)
    main(here, f"--resume={saved}")


def test_a_checkpoint_with_other_facts_than_a_run_writes(here, capsys):
    main(here, "--checkpoint_every=1", "--save=False", "--steps=1")
    saved = torch.load(next(here.glob("logs/*/checkpoints/*.pt")))
    for change in (dict(data={}), dict(knobs=None), dict(optimizers=None), dict(script_sha256=None), dict(step="1")):
        torch.save(saved | change, here / "other.pt")
        assert "other.pt is not usable" in ended(capsys, here, "--resume=other.pt", code=5)
    if hasattr(os, "mkfifo"):
        os.mkfifo(here / "pipe.pt")
        assert "pipe.pt is not usable" in ended(capsys, here, "--resume=pipe.pt", code=5)
    for change in (dict(step=99), dict(step=-1), dict(step=math.nan), dict(step=True, tokens=7), dict(tokens=None)):
        torch.save(saved | change, here / "other.pt")
        assert "tokens read by step" in ended(capsys, here, "--resume=other.pt", code=2)
    for change in (dict(train_ms="soon"), dict(train_ms=None), dict(run_id=torch.zeros(2))):
        torch.save(saved | change, here / "other.pt")
        assert "--resume=other.pt holds weights of another" in ended(
            capsys, here, "--resume=other.pt", "--val_every=1", code=5)


def test_want_of_memory_is_no_damage_to_a_checkpoint(here, capsys, monkeypatch):
    """Else `latest` would go on from an older one."""
    main(here, "--checkpoint_every=1", "--save=False")
    cut_off(run_folders(here)[0])

    for owner, name, error in ((t.Muon, "load_state_dict", MemoryError()),
                               (torch, "load", RuntimeError("DefaultCPUAllocator: can't allocate memory"))):
        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(owner, name, fail)
        assert "out of memory" in ended(capsys, here, "--resume=latest", code=6)


@pytest.mark.parametrize("error, code, words", [
    (MemoryError(), 6, "out of memory"), (torch.OutOfMemoryError("CUDA out of memory"), 6, "out of memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"), 6,
     "out of memory"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), 6, "out of memory"),
    (KeyboardInterrupt(), 130, "stopped before")])
def test_handlers_are_those_of_before_however_a_run_ends(here, capsys, monkeypatch, error, code, words):
    before = [signal.signal(number, lambda *_: None) for number in HANDLED]
    mine = [signal.getsignal(number) for number in HANDLED]

    def fail(*_):
        assert signal.getsignal(signal.SIGINT) not in mine
        raise error

    monkeypatch.setattr(t.Trainer, "train_step", fail)
    try:
        assert words in ended(capsys, here, code=code)
        assert [signal.getsignal(number) for number in HANDLED] == mine
    finally:
        for number, handler in zip(HANDLED, before):
            signal.signal(number, handler)


def full_disk(*_):
    """What torch.save makes of a full disk."""
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")  # noqa: B904


@pytest.mark.parametrize("place", ["torch.save", "os.fsync"])
def test_a_full_disk_is_called_that(here, capsys, monkeypatch, place):
    module, name = place.split(".")
    monkeypatch.setattr(getattr(t, module), name, full_disk)
    said = ended(capsys, here, code=6)
    assert re.search(r"weights.pt cannot be written \(.*No space left on device.*\): make room", said)
    assert not list(here.glob("logs/*/*.p*t"))


def test_little_room_is_told_before_the_first_step(here, capsys, monkeypatch):
    free = {}

    def usage(path):
        assert path == run_folders(here)[-1].relative_to(here)
        return types.SimpleNamespace(free=free["bytes"])

    monkeypatch.setattr(shutil, "disk_usage", usage)
    model = t.GPT(t.parse_overrides(command(here)[2:]), t.VOCAB["bytes"])
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    for knobs, most in ((["--checkpoint_every=50"], 10), ([], 1), (["--save=False"], 0)):
        for free["bytes"] in (max(most * size - 1, 0), most * size):
            main(here, *knobs)
            before = capsys.readouterr().out.partition("step:0/")[0]
            assert ("GB go to logs/" in before) == (free["bytes"] < most * size), (knobs, before)


def test_the_reason_of_a_failed_write_is_its_own():
    """And not that of an exception which was being handled when it came."""
    for outer, inner, reason in ((None, OSError(errno.ENOSPC, "full"), "full"), (OSError(errno.ENOENT, "none"), OSError(
            errno.EACCES, "denied"), "denied")):
        with pytest.raises(t.Refused, match=f"it cannot be written .{reason}.: make room") as caught:
            try:
                raise outer or KeyError
            except (OSError, KeyError):
                with t.no_space("it"):
                    raise inner  # noqa: B904
        assert caught.value.code == 6


def test_the_last_lines_name_the_folder_and_what_to_do_with_it(here, capsys):
    main(here)
    folder = f"logs/{run_folders(here)[0].name}"
    out = capsys.readouterr().out
    assert out.splitlines()[-4:] == [
        f"kept in {folder}; once complete:", f"  ./run.sh plot {folder} --out curve.png",
        f"  ./run.sh compare {folder} ANOTHER",
        f"  ./run.sh sample --weights={folder}/weights.pt --data_dir={str(here / 'data')!a}"]
    assert out.count("validating on 1200 tokens\n") == 2 and "training on 2,048 tokens by the CPU" in out


def test_a_rank_that_is_lost_while_a_checkpoint_loads_is_no_damage_to_it():
    for error, kind in ((RuntimeError("[gloo/transport] Connection closed by peer"), RuntimeError), (
            KeyError("exp_avg"), t.Refused)):
        with pytest.raises(kind), t.unusable("it"):
            raise error


def test_want_of_memory_in_the_loaders_thread(here, capsys, monkeypatch):
    real = t.TokenStream.pair

    def fail(*place):
        if threading.current_thread() is threading.main_thread():  # which validates
            return real(*place)
        raise MemoryError

    monkeypatch.setattr(t.TokenStream, "pair", fail)
    assert "out of memory" in ended(capsys, here, code=6)


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def test_a_checkpoint_of_other_ranks_and_one_with_code_in_it(here, capsys):
    main(here, "--checkpoint_every=1", "--save=False")
    saved = next(here.glob("logs/*/checkpoints/step_000001.pt"))
    whole = torch.load(saved)
    torch.save(whole | dict(optimizers=whole["optimizers"] * 2), here / "two.pt")
    assert "was written with 2 ranks: give the same" in ended(capsys, here, "--resume=two.pt", code=2)
    torch.save(whole | dict(more=Bomb()), here / "bomb.pt")
    assert "bomb.pt is not usable" in ended(capsys, here, "--resume=bomb.pt", code=5)
    assert not (here / "exploded").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals there")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_within_a_save_waits_for_it(here, capsys, monkeypatch, request, name):
    real, number = t.os.fsync, getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
    request.addfinalizer(lambda: signal.signal(number, before))
    monkeypatch.setattr(t.os, "fsync", lambda file: (t.os.kill(t.os.getpid(), number), real(file)))
    with pytest.raises(SystemExit) as caught:
        main(here, "--steps=6", "--checkpoint_every=2", "--save=False")
    said = capsys.readouterr().err.splitlines()
    assert caught.value.code == 75 and said[0].startswith("stopping after this step") and "all saved" in said[1]
    folder = run_folders(here)[0]
    steps = [row["step"] for row in events(folder, "checkpoint")]
    assert steps[0] == 2 and len(steps) == len([*folder.glob("checkpoints/*.pt")]) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to send there")
@pytest.mark.parametrize("names, at_once", [
    (["SIGTERM", "SIGINT"], False), (["SIGHUP", "SIGTERM", "SIGINT"], False), (["SIGTERM", "SIGINT", "SIGINT"], True),
    (["SIGINT", "SIGTERM", "SIGTERM"], False)])
def test_only_a_second_ctrl_c_saves_nothing(monkeypatch, names, at_once):
    now, left = [0.0], []
    monkeypatch.setattr(t.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(t.os, "_exit", left.append)
    with contextlib.ExitStack() as stack:
        caught = t.catch_signals(stack)
        for name in names:
            signal.raise_signal(getattr(signal, name))
            now[0] += 1.5
    assert caught and left == [130] * at_once


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to send there")
def test_a_second_ctrl_c_ends_at_once(here):
    script = edited(here, "        self.set_schedules(step)\n        batch",
                    "        time.sleep(30 * (step == 2))\n        self.set_schedules(step)\n        batch")
    process = subprocess.Popen(command(here, script=script), env=environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert any(line.startswith("step:2/") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    assert "stopping after this step" in process.stderr.readline(), "at once, within the step"
    time.sleep(1.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130 and process.stderr.read() == ""


@pytest.mark.parametrize("launcher", [
    dict(RANK="1"), dict(RANK="-1", WORLD_SIZE="1"), dict(WORLD_SIZE="0"), dict(WORLD_SIZE=""), dict(RANK="x"),
    dict(LOCAL_RANK="first"), dict(RANK="2", WORLD_SIZE="2"), dict(WORLD_SIZE="2.0")])
def test_a_launchers_variables_that_cannot_be(here, capsys, monkeypatch, launcher):
    """A lone RANK=1 would train, print nothing, keep nothing and end with 0."""
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    said = ended(capsys, here, code=2)
    assert "RANK, LOCAL_RANK, WORLD_SIZE are " in said and "unset them" in said and not list(here.glob("logs/*"))


@pytest.mark.parametrize("launcher", [dict(), dict(RANK="0"), dict(RANK="0", MASTER_ADDR="127.0.0.1")])
def test_a_meeting_place_that_cannot_be(here, launcher):
    done = subprocess.run(command(here), env=environment() | dict(WORLD_SIZE="2", **launcher),
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 4 and "RANK, MASTER_ADDR or MASTER_PORT is missing" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("knob", ["--preset=MemoryError", "--data_dir=bad_alloc"])
def test_the_users_words_are_no_want_of_memory(here, capsys, knob):
    assert knob.partition("=")[2] in ended(capsys, here, knob, code=2)


def test_a_port_in_use_is_named(here):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(taken.getsockname()[1]), WORLD_SIZE="2", RANK="0")
        done = subprocess.run(command(here), env=environment() | place, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4 and "train_gpt: rank 0: a collective failed" in done.stderr, done.stderr
    assert "MASTER_PORT is missing, wrong or in use" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep a file from being cut short, or its pages")
def test_a_shard_that_is_cut_short_in_training_leaves_a_line_that_says_where(here):
    launch = command(here, "--steps=3000", "--epochs=2000")
    process = subprocess.Popen(launch, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step:1/"):
            for path in here.glob("data/train*"):
                with open(path, "r+b") as file:
                    file.truncate(1024)
            break
    said = process.communicate(timeout=60)[1]
    assert process.returncode and "Bus error" in said and 'train_gpt.py", line ' in said and " in read" in said


def before_step_1(monkeypatch, act):
    real = t.Trainer.train_step

    def train_step(self, step, pairs):
        if step == 1:
            act()
        return real(self, step, pairs)

    monkeypatch.setattr(t.Trainer, "train_step", train_step)


@pytest.mark.parametrize("name", ["train_000001.bin", "val_000000.bin"])
def test_a_shard_that_loses_its_end_in_training_is_named_once_all_is_saved(here, capsys, monkeypatch, name):
    """What lies in the page that is left would be read as zeros."""
    shard = here / "data" / name
    before_step_1(monkeypatch, lambda: os.truncate(shard, shard.stat().st_size - 2))
    assert f"train_gpt: {name} was cut short while the run read it: all is saved" in ended(capsys, here, code=2)
    run = run_folders(here)[0]
    assert (run / "weights.pt").exists() and events(run, "end")[0]["code"] == 2
    assert str(here) not in (run / "metrics.jsonl").read_text() + (run / "log.txt").read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="a file that is mapped stays there")
def test_a_shard_that_is_replaced_in_training_is_read_to_its_end(here, monkeypatch):
    """The map keeps the old one."""
    def replace():
        for path in sorted(here.glob("data/*.bin")):
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content[:-2]) if "train" in path.name else None

    before_step_1(monkeypatch, replace)
    main(here)
    assert events(run_folders(here)[0], "end")[0]["status"] == "complete"
