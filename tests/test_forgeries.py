"""Forged records, each caught by the check that is meant. The forger computes all that meta.json and README.md say
anew, so that no headline can do the work of a check."""

import hashlib
import shutil
from pathlib import Path

import forge
import pytest
from forge import at, default_of, in_format_1, in_stages, lower, put, swap

FORGERIES = []


@pytest.fixture
def box(tmp_path_factory, tmp_path):
    return forge.box(tmp_path_factory, tmp_path, "*_Fast", "made", "embedded")


def forgery(make, lacks="*_Fast"):
    """Adds a forger: make(box) spoils a record, and returns the code and the words of the sentence to expect. `lacks`:
    pattern of the records that the checkout lacks."""
    FORGERIES.append(pytest.param(lacks, make, id=make.__name__))
    return make


def on_a_baseline(make):
    """The same with the record that claims to be faster than its baseline."""
    return forgery(make, "no record")


def forgeries(spoil, table, add=forgery):
    """Adds a forger for each row, name=(change, code, words...), of a table, who does spoil(box, change)."""
    for name, (change, *expected) in table.items():
        def make(box, change=change, expected=expected):
            spoil(box, change)
            return expected
        make.__name__ = name
        add(make)


# ---- One edit of the events of one run


def insert(place, kind, **event):
    return lambda rows: rows.insert(place, dict(event=kind, **event))


forgeries(forge.Box.edit, dict(
    loss_of_the_last_validation_alone=(put("val", val_loss=4.0), "headline", "be 4.0"),
    knob_against_changed=(put("start", changed=dict(head_lr=0.5)), "knobs", default_of("head_lr")),
    seed_twice=(put("start", seed=1, knobs=dict(seed=1)), "seeds", "[1]"),
    another_run_than_its_folder=(put("start", run_id="20200101-000000-abcdef"), "path", "holds the run 20200101-"),
    knob_of_one_run=(put("start", knobs=dict(head_lr=0.5), changed=dict(head_lr=0.5)), "knobs", "recipes"),
    seed_against_its_knob=(put("start", seed=9), "knobs", "be 9"),
    tokens_doubled_at_a_step=(put("step 10", tokens=5120), "tokens", "2560"),
    rate_of_tokens=(put("end", tokens_per_s=99999), "tokens", "99999"),
    fewer_tokens_validated=(put("val", val_tokens=300), "tokens", "is 300"),
    loss_that_is_nan=(put("step 10", train_loss="nan"), "nan", "nan"),
    step_missing=(lambda rows: rows.remove(at(rows, "step 7")), "truncated", "6, 7, 8"),
    no_end=(lambda rows: rows.pop(), "truncated", "the end status is None"),
    second_end=(lambda rows: rows.insert(5, rows[-1]), "truncated", "'end' events is [20, 20]"),
    resumed=(insert(1, "resume", step=5, from_run_id="20200101-000000-abcdef"), "track", "resumed"),
    step_out_of_order=(insert(-1, "warning", text="", step=3), "truncated", "the order of steps"),
    checkpoint_that_was_not_due=(insert(5, "checkpoint", step=2, bytes=1, ms=1.0), "truncated", "'checkpoint'", "[2]"),
    norms_that_were_not_due=(put("step 10", norms={}), "truncated", "step 10 has norms"),
    ranks_of_one_run=(put("start", world_size=2), "headline", "world_size"),
    another_day_than_its_name=(put("start", utc="2020-01-01T00:00:00Z"), "path", "2020-01-01"),
    day_that_no_month_has=(put("start", utc="2026-02-30T00:00:00Z"), "schema", "2026-02-30"),
    clock_runs_during_validation=(lambda rows: rows.insert(*swap(rows, "clock", "val")), "clock", "the clock runs"),
    step_on_a_stopped_clock=(lambda rows: rows.insert(*swap(rows, "clock", "step")), "clock", "the clock stands"),
    mark_that_comes_twice=(lambda rows: rows.insert(rows.index(at(rows, "clock")), at(rows, "clock")), "clock",
                           "the mark 'stop' comes twice"),
    wall_that_goes_back=(lambda rows: [row.update(wall_s=row["wall_s"] - 3) for row in rows[-3:]], "clock",
                         "gone back by"),
    time_too_short_to_divide_by=(put("end", train_ms=1e-310), "clock", "grew by"),
    memory_without_a_gpu=(put("end", peak_val_mib=9), "track", "peak_val_mib is 9"),
    argument_unlike_its_knob=(lambda rows: rows[0]["argv"].append("--steps=21"), "knobs", "arguments"),
    format_of_the_future=(put("start", format=3), "schema", "'format': 3"),
    step_without_its_rate=(lambda rows: at(rows, "step 10").pop("lr"), "schema", "lr is missing"),
    no_stage=(lambda rows: rows[0]["stages"].clear(), "tokens", "and length is []"),
    stages_in_the_knobs_alone=(put("start", knobs=dict(batch_stages="2x128 4x128")), "tokens", 10 * 256 + 10 * 512),
    batch_before_its_stage=(lambda rows: [in_stages(rows, batch_stages="2x128 4x128"), at(rows, "step 10").update(
        sequences=4)], "tokens", "sequences is 4"),
    schedule_too_long_to_list=(put("start", knobs=dict(steps=10**12, val_every=1)), "schema", "steps is 10000"),
    stages_without_end=(put("start", knobs=dict(batch_stages="1x128 " * 21)), "schema", "not stages of 20 steps"),
))
forgeries(lambda box, change: [box.edit_all(in_format_1), box.edit(change)], dict(
    ranks_against_accumulation=(put("start", grad_accum=3), "tokens", "is 3")))


# ---- The same in the events of all runs, or one thing in meta.json

GPU = "NVIDIA H100 80GB HBM3"
forgeries(forge.Box.edit_all, dict(
    more_epochs_than_allowed=(lambda rows: [rows[0]["knobs"].update(epochs=3), *(
        shard.update(tokens=1000) for shard in rows[0]["data"]["train"])], "track", "2.560 epochs"),
    more_tokens_than_the_stream_has=(lambda rows: [shard.update(tokens=1000) for shard in rows[0]["data"]["train"]],
                                     "tokens", "2000"),
    other_validation_stream=(put("start", data=dict(val_sha256="a" * 64)), "data", "a" * 64),
    gpus_without_ranks=(put("start", gpu_count=2), "data", "gpu_count is 2"),
    gpus_on_a_track_for_cpus=(put("start", gpu=GPU, gpu_count=1, gpu_memory_mib=81559), "track", GPU),
    other_training_shard=(put("start", data=dict(train=dict(sha256="a" * 64))), "data", "training shards"),
    knob_that_the_script_does_not_have=(put("start", knobs=dict(luck=1)), "knobs", "alone has is ['luck']"),
    torch_unlike_its_package=(put("start", torch="9.9.9"), "schema", "torch, by its package, is 9.9.9"),
    ranks_that_divide_one_stage=(lambda rows: in_stages(rows, batch_stages="2x128 1x128") or rows[0].update(
        world_size=2), "tokens", "batches that 2 ranks do not divide"),
))
forgeries(lambda box, change: box.claims.update(change), dict(
    better_p=(dict(result=dict(p=1e-12)), "headline", "result.p is 1e-12"),
    knob_that_was_not_changed=(dict(changed=dict(steps=10)), "headline", "steps is 10"),
    other_hardware=(dict(hardware=dict(gpu=GPU, count=1, memory_mib=81559, driver="1")), "headline", GPU, "None"),
    private_but_not_said=(dict(data=dict(public=False)), "readme", "Data: private"),
    arm_with_other_knobs=(dict(arms=dict(changed=dict(head_lr=0.5))), "headline", "head_lr is 0.5"),
    another_name=(dict(name="2026-11-26_Another"), "schema", "2026-11-26_Another"),
    unknown_track=(dict(track="nowhere"), "track", "no track nowhere"),
    long_summary=(dict(summary="s" * 121), "schema", ".{0,120}"),
    date_that_no_calendar_has=(dict(date="2026-99-99"), "schema", "2026-99-99"),
))

# ---- Losses and runs


@forgery
def run_left_out(box):
    rows = box.events(box.run())
    box.remove()
    return "left-out", rows[0]["run_id"]


@forgery
def run_left_out_of_a_record_that_is_dated_before_it(box):
    box.remove()
    box.move("2020-01-01_Toy")
    return "schema", "2020-01-01"


@forgery
def run_that_is_left_out_too(box):
    box.claims = dict(left_out=[dict(run_id=box.run().name, reason="it was slow")])
    return "left-out", f"left out is ['{box.run().name}']"


def clone(box, how):
    """Run 1 is run 0 again, with another seed, at another pace, its losses moved by noise."""
    (pace, noise), rows, mine = how, box.events(box.run(0)), box.events(box.run())[0]
    forge.retime(rows, pace)
    for i, row in enumerate(rows):
        forge.shift([row], noise * (i % 3))
    rows[-1]["val_loss"] = at(rows, "val")["val_loss"]
    box.rewrite(box.run(), [mine, *rows[1:]])


forgeries(clone, dict(curve_twice=((1, 0), "duplicate", "curve of training times"),
                      losses_twice_with_noise=((0.9, 1e-6), "duplicate", "curve of losses")))


@forgery
def run_in_two_records(box):
    other = box.victim
    box.victim = Path(shutil.copytree(other, other.with_name(f"{other.name}Two")))
    box.move(box.victim.name)
    return "duplicate", "run id"


@forgery
def arm_that_is_none(box):
    knobs = dict(head_lr=float(default_of("head_lr")))
    box.edit_all(put("start", knobs=knobs, changed=knobs), "arms/cold")
    return "knobs", "having the recipe of runs/"


@forgery
def record_under_a_name_that_is_not_read(box):
    shutil.copytree(box.victim, box.victim.with_name("O" + box.victim.name[1:]))
    return "path", "O" + box.victim.name[1:]


# ---- Times


def shave(rows, ms, place):
    """Take so much from the training time of all events from a place on."""
    for row in (row for row in rows[place:] if "train_ms" in row):
        row["train_ms"] -= ms
    forge.rate(rows)


@forgery
def time_between_the_marks(box):
    box.edit(lambda rows: shave(rows, 5, rows.index(at(rows, "step 5"))))
    return "clock", "training time grew by"


def a_little_time_at_every_step(box):  # as much as the tolerance of 1 ms + 0.1 % hides
    box.edit(lambda rows: [shave(rows, 0.9, i) for i, row in enumerate(rows) if row["event"] == "step"])


@forgery
def clock_stopped_where_nothing_is_validated(box):
    def stop(rows):
        place = rows.index(at(rows, "step 5")) + 1
        stopped = dict(event="clock", mark="stop", **{key: rows[place - 1][key] for key in ("train_ms", "wall_s")})
        shave(rows, 5, place)
        rows[place:place] = stopped, stopped | dict(mark="start", wall_s=stopped["wall_s"] + 5e-3)
    box.edit(stop)
    return "clock", "nothing was validated or saved"


def seconds_in_a_pause(rows, seconds, step=10):
    """The clock stands so long at a step; what the pause takes beyond that is taken from it."""
    place = rows.index(at(rows, f"val {step}"))
    beyond = rows[place + 1]["wall_s"] - rows[place - 1]["wall_s"] - seconds
    for row in (row for row in rows[place:] if "wall_s" in row):
        row["wall_s"] -= beyond


@pytest.mark.parametrize("step", [10, 20])
def test_seconds_moved_into_a_pause(box, step):
    """On one kind of GPU alone. At the last step too, unless the weights are saved then."""
    def found():
        return [*box.runs.check_pauses([box.runs.read_run(box.run(i)) for i in range(3)])]
    def make(rows):
        rows[0].update(gpu=GPU, gpu_count=1, gpu_memory_mib=81559)
        seconds_in_a_pause(rows, 0.5)
        seconds_in_a_pause(rows, 0.5, 20)
    box.edit_all(make)
    box.edit(lambda rows: seconds_in_a_pause(rows, 1.05, step))
    assert not found()
    box.edit(lambda rows: seconds_in_a_pause(rows, 1.2, step))
    assert f"{box.run().name}: the clock stood for 1.200 s at step {step}" in found()[0][1]
    box.edit_all(put("start", knobs=dict(save=True)))
    assert bool(found()) == (step == 10)
    box.edit(lambda rows: insert(rows.index(at(rows, f"val {step}")), "checkpoint", step=step, bytes=1, ms=600.0)(rows))
    assert not found()


# ---- Scripts and claims


CLASS = "\nclass Hyperparameters:\n    steps: int = {}\n    mlp_ratio: int = {}\n"


def script(box, change):
    """Puts a text behind the script that the record keeps, or that these sets ran too."""
    text, *labels = change
    (box.victim / "train_gpt.py").write_bytes(box.extend_script(text, *labels))


forgeries(script, dict(
    script_that_did_not_run=(["print('fast')\n", "arms/cold"], "script", "SHA-256 of train_gpt.py"),
    compile_variable=(["os.environ['TORCHINDUCTOR_MAX_AUTOTUNE'] = '1'\n"], "forbidden", "'max_autotune'"),
    default_unlike_the_runs=([CLASS.format("knob(20)", "knob(6, 'a meaning')"), "runs"], "knobs",
                             "mlp_ratio in changed, since the script's default is 6"),
    script_without_readable_knobs=([CLASS.format("KNOBS.steps", "9**9**9"), "runs"], "knobs", "default can be read")))


@on_a_baseline
def claim_that_two_runs_cannot_carry(box):
    box.remove()
    return "target", "n >= 3"


@on_a_baseline
def loss_above_the_target(box):
    box.edit_all(lambda rows: lower(rows, -1), "runs")
    return "target", "below 5.0"


@on_a_baseline
def baseline_that_was_as_fast(box):
    box.edit_all(lambda rows: forge.retime(rows, 0.82), "baseline")
    return "gain", "interleaved baseline"


@on_a_baseline
def baseline_that_ran_at_the_same_time(box):
    """Each run still ran when the next began, by its own account."""
    box.edit_all(lambda rows: [row.update(wall_s=row["wall_s"] + 13) for row in rows if "wall_s" in row])
    return "gain", "(p is None)"


SLOW = hashlib.sha256(b"slow").hexdigest()
forgeries(lambda box, change: box.edit_all(put("start", **change), "baseline"), dict(
    baseline_with_other_knobs_than_the_parent=(dict(knobs=dict(gate_lr=0.5), changed=dict(gate_lr=0.5)), "knobs",
                                               "gate_lr is 0.5"),
    baseline_of_another_script_than_the_parent=(dict(script_sha256=SLOW), "script", SLOW)), on_a_baseline)
forgeries(lambda box, change: box.claims.update(change), dict(
    parent_that_is_not_there=(dict(parent="2020-01-01_Nowhere"), "script", "2020-01-01_Nowhere"),
    gain_left_open=(dict(result=dict(gain_ms=None)), "headline", "gain_ms is None")), on_a_baseline)


@pytest.mark.parametrize("lacks, make", FORGERIES)
def test_forgery(tmp_path_factory, tmp_path, lacks, make):
    box = forge.box(tmp_path_factory, tmp_path, lacks, "made", "embedded")
    code, *words = make(box)
    box.reseal(box.victim, **box.claims)
    found = box.expect(code, *words)
    assert not {problem[0] for problem in found} & {"headline", "readme"} - {code}, found


def test_a_forger_without_a_forgery_passes(tmp_path_factory, tmp_path):
    """Else what the tests above catch might be the sealing. The runs of Toy have format 2, or here, format 1."""
    box = forge.box(tmp_path_factory, tmp_path, "made", "embedded")
    for name, change in (("Toy", list), ("Fast", list), ("Toy", in_format_1)):
        box.victim = box.record(name)
        box.edit_all(change)
        box.reseal(box.victim)
        assert box.main("verify") == (0, "2 records, 0 failed\n", "")


# ---- What verify cannot show: forgeries without a contradiction, as the record Fast is one from end to end


def another_log(box):
    for i in range(3):
        box.replace(box.run(i) / "log.txt", "val_loss:", "val_loss:1.0 it was ")


def another_name_of_an_arm(box):
    meta = box.meta()
    meta["arms"][0]["name"] = "warm"
    (box.victim / "arms" / "cold").rename(box.victim / "arms" / "warm")
    box.write(box.victim, meta)


def other_rates(rows):
    for row in (row for row in rows if row["event"] == "step"):
        row |= dict(lr=0.5, momentum=0.0, window=10**6)


INVENTED = dict(
    losses=lambda box: box.edit_all(lambda rows: forge.shift(rows, -0.1)),
    times=lambda box: box.edit_all(lambda rows: forge.retime(rows, 0.5)),
    # shards are known by the hashes of the track, not by their lengths
    tokens_to_read=lambda box: box.edit_all(put("start", data=dict(train=dict(tokens=10**9)))),
    mfu=lambda box: box.edit_all(put("end", mfu=0.9)), one_loss=lambda box: box.edit(lower),
    pause_on_a_cpu=lambda box: box.edit(lambda rows: seconds_in_a_pause(rows, 9)), arm_name=another_name_of_an_arm,
    track=lambda box: box.replace(box.root / "records" / "tracks" / f"{forge.TRACK}.json", "5.0", "6.0"),
    rates=lambda box: box.edit_all(other_rates), log=another_log, tolerance=a_little_time_at_every_step,
    script=lambda box: script(box, ["print('another')\n"]))


@pytest.mark.parametrize("make", INVENTED.values(), ids=INVENTED)
def test_forgeries_without_a_contradiction_pass(box, make):
    make(box)
    box.reseal(box.victim, **box.claims)
    assert box.main("list", "--write").code == 0
    assert box.main("verify") == (0, "1 records, 0 failed\n", "")
