"""What strangers write: logs of the public speedrun, made here with all their quirks, and bytes that make no record."""

import hashlib
import math
import os
import re
import shutil

import pytest
from reference import PUBLISHED

LEFT_OUT = "*_Fast",
RULE = "=" * 100
# Its lines look like rules and steps without being any.
SOURCE = f'''import os
"""
step:1770/1770 val_loss:1.0000 train_time:1ms step_avg:1.00ms
{"=" * 99}
{"=" * 101}
"""
print0("=" * 100)
print0(f"step:{{step}}/{{train_steps}} val_loss:{{val_loss:.4f}} train_time:{{ms:.0f}}ms step_avg:{{ms / step:.2f}}ms")
# triton_kernels.py, glued behind the script
peak memory allocated: 1 MiB
'''
SMI = """+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 550.127.05             Driver Version: 550.127.05     CUDA Version: 12.6     |
|-----------------------------------------+------------------------+----------------------+
""" + "".join(f"|   {i}  NVIDIA H100 80GB HBM3          On  |   00000000:{i}9:00.0 Off |                    0 |\n"
              for i in range(8))
PEAK = "peak memory allocated: 39491 MiB"


def steps_of(loss, steps=1770, ms=142000):
    time = lambda step: f"train_time:{ms * step // steps}ms step_avg:80.23ms"
    lines = [f"step:0/{steps} val_loss:10.8258 train_time:0ms step_avg:nanms"]
    lines += [f"step:{i}/{steps} {time(i)}" for i in range(1, 11)]
    lines += [f"step:11/{steps} train_loss:7.5 {time(11)} lr:0.05 window:3"]
    lines += [f"step:{i}/{steps} val_loss:{x:.4f} {time(i)}" for i, x in ((steps // 2, 3.6), (steps, loss))]
    return "\n".join(lines) + "\n"


def write_log(path, body, source=SOURCE, end=f"{PEAK} reserved: 50528 MiB\n", newline="\n",
              above="", machine=SMI):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f"{above}{source}\n{RULE}\nRunning Python 3.12.7\nRunning PyTorch 2.6.0\n{machine}\n{RULE}\n{body}{end}"
    path.write_text(text, encoding="utf-8", newline=newline)
    return path


def write_set(folder, values, **body):
    for i, loss in enumerate(values):
        write_log(folder / f"{i:02d}.txt", steps_of(loss, **body), end=f"{PEAK} reserved: {50528 + i} MiB\n")
    return folder


# ---- Logs of the public speedrun


OLD = """step:0/3000 val_loss:10.9886 train_time:251ms step_avg:nanms
step:10/3000 train_loss:6.9014 train_time:9730ms step_avg:nanms
step:11/3000 train_loss:6.8127 train_time:77ms step_avg:nanms
step:3000/3000 train_loss:3.2011 train_time:401250ms step_avg:134.20ms
step:3000/3000 val_loss:3.2791 train_time:401300ms step_avg:134.21ms
"""  # the clock starts at step 10
NEW = """step:1288/1325 train_time:61102ms step_avg:47.44ms
a note between the steps: 1 of 2
step:1325/1325 val_loss:3.2781 train_time:63301ms step_avg:47.77ms final_eval
"""
TRACK_3 = """step:125/3300 val_loss:4.61093 train_time:21.402s step_avg:171.22ms mfu:40.1%
step:3275/3300 train_time:488.031s step_avg:149.02ms
step:3275/3300 val_loss:3.27992 ema_loss:3.28104 lr:0.00x train_time:488.035s step_avg:149.02ms
"""
H200 = "Running on device_name=NVIDIA H200 with world_size=8\nUsing seed=3\n"


@pytest.mark.parametrize("body, how, complete, found", [
    (steps_of(3.2791), dict(newline="\r\n"), True, (1770, 1770, 3.2791, 142000)),
    (OLD, dict(above=f"\n{RULE}\n", end=""), True, (3000, 3000, 3.2791, 401300)),
    (NEW, {}, True, (1325, 1325, 3.2781, 63301)),
    (TRACK_3, dict(machine=H200, end=""), True, (3275, 3300, 3.27992, 488035)),
    (steps_of(3.28).replace("step:1770/", "step:1769/"), {}, True, (1769, 1770, 3.28, 142000)),
    (steps_of(3.28) + "step:1770/1770 train_time:9ms step_avg:nanms\n", {}, True, (1770, 1770, 3.28, 142000)),
    (steps_of(3.28).replace("1770 val_loss:3.28", "1770 loss:3.28"), {}, False, (1770, 1770, 3.6, 71000)),
    (steps_of(math.inf), {}, False, (1770, 1770, math.inf, 142000))])
def test_logs_of_all_eras(toy, tmp_path, body, how, complete, found):
    """2024, with a rule above the source; 2026, with a word behind the fields; track 3, in fractions of seconds, with
    fields before the time, and stopped before its schedule ended. A run is complete if it ends with a validation."""
    run = toy.runs.read_speedrun(write_log(tmp_path / "a log.txt", body, **how))
    assert run.complete == complete and (run.total, run.planned, run.val_loss, run.train_ms) == found
    losses = [float(loss) for loss in re.findall(r"(?:val|train)_loss:(\S+)", body)]
    assert sorted(point[2] for point in run.vals + run.steps) == sorted(losses)
    assert run.script.strip() == SOURCE.strip().encode() and run.name == "a log"
    assert run.gpu == ("NVIDIA H200" if "machine" in how else "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize("body, source, word", [
    (steps_of(3.28).replace("val_loss", "train_loss"), SOURCE, "no validation"),
    (steps_of(3.28) + steps_of(3.28, steps=1390), SOURCE, "step:0/1390 comes after step:1770/1770"),
    (steps_of(3.28) + steps_of(3.28), SOURCE, "several runs"), (steps_of(3.28), f"{RULE}\n \n", "no source"),
    (steps_of(3.28).replace("val_loss:1", "val_loss:\u0661").replace("val_loss:3", "val_loss:\u0663"), SOURCE, "no ")])
def test_what_is_no_log_of_a_run_is_refused(toy, tmp_path, body, source, word):
    with pytest.raises(toy.runs.Bad, match=f"log.txt .*{word}"):
        toy.runs.read_speedrun(write_log(tmp_path / "log.txt", body, source))


def test_links_and_large_or_other_files_are_refused_before_reading(toy, tmp_path):
    log = write_log(tmp_path / "large.txt", steps_of(3.28))
    (tmp_path / "link.txt").symlink_to(log)
    os.truncate(log, 9 << 20)
    os.mkfifo(tmp_path / "pipe.txt")
    for name, word in dict(link="link", large="9437184", pipe="plain").items():
        with pytest.raises(toy.runs.Bad, match=word):
            toy.runs.read_speedrun(tmp_path / f"{name}.txt")


@pytest.mark.parametrize("old, new", [
    ("/1770 ", f"/{'9' * 5000} "), ("train_time:142000ms", f"train_time:{'9' * 400}ms"), ("/1770 ", "/0 "),
    ("train_time:142000ms", "train_time:0ms"), ("10.8258", "nan")],
    ids=["count_without_end", "time_without_end", "no_steps", "no_time", "first_loss_nan"])
def test_absurd_numbers_in_a_log_are_refused_or_borne(box, old, new):
    body = steps_of(3.28).replace(" train_loss:7.5", "").replace(old, new).replace("step:1770/0", "step:0/0")
    logs = [write_log(box.root / f"{loss}.txt", body.replace("3.2800", loss))
            for loss in ("3.2810", "3.2790")]
    for command in ("import", "compare", "plot"):
        done = box.main(command, *logs)
        assert done.code in (0, 2, 3) and "Traceback" not in done.err


def test_import_groups_logs_by_the_hash_of_their_source(box):
    logs, changed = box.root / "logs of others", SOURCE + "# other\n"
    write_set(logs / "a", PUBLISHED[:3])
    write_log(logs / "a" / "b" / "crlf.txt", steps_of(3.28), newline="\r\n")
    write_log(logs / "c" / "again.txt", steps_of(3.28))  # that log without the carriage returns
    write_log(logs / "c" / "died.txt", steps_of(3.28) + "step:1771/1770 train_time:9ms step_avg:nanms\n")
    write_log(logs / "c" / "other.log", steps_of(3.27), changed)
    write_log(logs / "c" / "early.txt", steps_of(3.28).replace("step:1770/", "step:1760/"))
    (logs / "c" / "not\x1b[31m.txt").write_text("hello")
    done = box.main("import", logs)
    assert done.code == 0 and done.out.count("skipped: ") == 1 and "\x1b" not in done.out
    assert "n = 4); 1770 steps" in done.out and "stopped at step 1760 of 1770 planned, in 142.00 (" in done.out
    assert box.main("import", logs / "a").code == 0  # which are there
    for source, count, whole in ((SOURCE, 6, 5), (changed, 1, 1)):
        name = hashlib.sha256(source.encode()).hexdigest()[:12]
        folder = box.root / "peers" / name
        assert f"peers/{name}: {count} logs, {whole} complete\n" in done.out
        rows = [row.split("\t") for row in (folder / "origins.tsv").read_text().splitlines()]
        assert sorted(copy for copy, _ in rows) == sorted(path.name for path in folder.glob("*.txt"))
        assert len(rows) == count and all(str(logs) in origin for _, origin in rows)
        assert (box.main("compare", name, name).code == 2) == (count == 6)  # which are of two lengths


def test_a_folder_is_read_with_its_folders_and_without_what_is_no_log(toy, tmp_path, monkeypatch):
    write_set(tmp_path / "s=t", PUBLISHED[:4])
    write_set(tmp_path / "s=t" / "more", PUBLISHED[4:])
    (tmp_path / "s=t" / "notes.txt").write_text("a note")
    shutil.copy(tmp_path / "s=t" / "00.txt", tmp_path / "00.txt")
    done = toy.main("compare", f"{tmp_path / 's=t'},{tmp_path / '00.txt'}", tmp_path / "s=t" / "more", "--target=3.28")
    assert done.code == 0 and "skipped: notes.txt has no line of" in done.out
    monkeypatch.chdir(tmp_path)
    assert toy.sets.load_all(["s=t"])[0].label == "s=t"  # and not a set t called s
    assert "s=t and 1 more: loss 3.2784 (sd 0.0014, n = 13) (p of a mean below 3.28: 0.00067); 1770" in done.out


def test_sets_of_two_scripts_are_joined_by_a_name(toy, tmp_path):
    """A run id or a comment keeps them apart; two lengths stay two recipes."""
    for i, loss in enumerate(PUBLISHED):
        write_log(tmp_path / "set" / f"{i}.txt", steps_of(loss), SOURCE + f"# run {i % 2}\n", f"{PEAK} {i}")
    write_log(tmp_path / "long.txt", steps_of(3.27, steps=1800))
    other = write_set(tmp_path / "other", [3.2801, 3.2799])
    refused = toy.main("compare", tmp_path / "set", other)
    assert refused.code == 2 and "of 2 scripts" in refused.err and "NAME=A,B" in refused.err
    done = toy.main("compare", f"mine={tmp_path / 'set'}", other)
    assert done.code in (0, 3) and "note: mine joins runs of 2 scripts" in done.out and "mine: loss 3.27" in done.out
    assert toy.main("compare", f"mine={tmp_path / 'set'},{tmp_path / 'long.txt'}", other).code == 2
    many = ",".join(str(tmp_path / "set" / f"{i}.txt") for i in range(13))  # longer than a path may be
    assert f"mine: loss {3.2784}" in toy.main("compare", f"mine={many}", other).out


def test_compare_of_two_public_sets(toy, tmp_path):
    write_set(tmp_path / "old", PUBLISHED)
    write_set(tmp_path / "new", [loss - 0.01 for loss in PUBLISHED], steps=1600, ms=120000)
    done = toy.main("compare", tmp_path / "old", tmp_path / "new")
    assert done.code == 0 and "steps=1600 helped: its loss is -0.0100 (95 % " in done.out
    assert "losses compare only" in done.out
    assert "no verdict on time (x 0.845)" in done.out and "not one kind" not in done.out
    assert "steps=1770: loss 3.2784 (sd 0.0014, n = 13); 1770 steps in 142.00 (" in done.out
    assert "; NVIDIA H100 80GB HBM3\n" in done.out


def test_a_public_set_against_ours(toy, tmp_path):
    sets = write_set(tmp_path / "public", PUBLISHED), toy.record("Toy").name
    done = toy.main("compare", *sets)
    assert done.code == 0 and "note: not one kind of machine" in done.out and "--- public\n" in done.out
    assert toy.main("plot", *sets, "--out", tmp_path / "picture.png").code == 0
    refused = toy.main("plot", *sets, "--x=tokens")
    assert refused.code == 2 and "nothing of tokens" in refused.err


# ---- Bytes that are no JSON of the format, no file of a record, or no table of its numbers


def write(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def linked(box, path):
    """The same content behind a link."""
    path.symlink_to(path.rename(box.root / "aside"))


def in_file(name, old, new):
    return lambda box: box.replace(next(box.victim.glob(name)), old, new)


LOSS = '"train_loss": '  # of step 1
METRICS = "runs/*/metrics.jsonl"
SPOILED = dict(
    nan_as_a_number=(in_file(METRICS, LOSS, LOSS + "NaN, \"x\": "), "schema", "is nan"),
    unknown_key_in_an_event=(in_file(METRICS, LOSS, '"note": 1, ' + LOSS), "schema", "note is unknown"),
    key_twice_in_an_event=(in_file(METRICS, LOSS, LOSS + "4.0, \"train_loss\": "), "schema", "key twice"),
    switch_for_a_step=(in_file(METRICS, '"step": 1,', '"step": true,'), "schema", "step is True", "int"),
    event_of_no_kind=(in_file(METRICS, '"event": "val"', '"event": "vale"'), "schema", "vale"),
    deep_json=(in_file("meta.json", '"a toy"', "[" * 50000 + "]" * 50000), "schema", "not JSON"),
    table_in_its_readme=(in_file("README.md", "n = 3)", "n = 30)"), "readme", "n = 3)"),
    table_twice=(in_file("README.md", "```", "<!-- end of tables -->"), "readme", "generated table"),
    log_that_is_a_link=(lambda box: linked(box, box.run() / "log.txt"), "path", "log.txt is a link"),
    record_that_is_a_link=(lambda box: linked(box, box.victim), "path", "YYYY-MM-DD"),
    log_too_large=(lambda box: os.truncate(box.run() / "log.txt", 1100000), "size", "bytes, and "),
    pictures_too_large=(lambda box: [write(box.victim / f"{i}.png", b"x" * 60000) for i in "ab"], "size", "120000"),
    file_of_no_kind=(lambda box: write(box.victim / "notes.txt"), "path", "notes.txt"),
    run_that_meta_does_not_list=(lambda box: write(box.victim / "runs/20200101-000000-abcdef/log.txt"), "path",
                                 "20200101-000000-abcdef"),
    run_that_is_not_there=(lambda box: shutil.rmtree(box.run()), "path", "['runs/"),
    arm_twice=(lambda box: box.write(
        dict(box.meta(), arms=2 * box.meta()["arms"])), "path", "cold', 'arms/cold"),
    metrics_cut_within_a_line=(lambda box: os.truncate(box.run() / "metrics.jsonl", 999), "truncated", "within a line"),
)


@pytest.mark.parametrize("row", SPOILED.values(), ids=SPOILED)
def test_what_makes_no_record(box, row):
    spoil, *expected = row
    spoil(box)
    box.expect(*expected)


def test_control_characters_are_printed_escaped(box):
    """An author who would colour the terminal, turn the direction of writing, or break the line of a table."""
    box.write(box.meta() | dict(author="\x1b[31m \u202e\ud800\n| x |", summary="\x1b[2J"))
    box.replace(box.victim / "README.md", "by \\x1b[31m \\u202e\\ud800\\n| x |.", "by me \x1b")
    for argv in (["verify"], ["list"], ["compare", box.victim.name, box.run()]):
        code, out, err = box.main(*argv)
        assert code in (0, 1, 3) and (out + err).replace("\n", "").isprintable()
