"""Forged records, each caught by the check that is meant. The forger computes all that meta.json and README.md say
anew, so that no headline can do the work of a check."""

import shutil

import forge
import pytest
from forge import DEFAULTS, Box, at, extend, give, in_format_1, in_stages, put, shift
from tiny import events

LEFT_OUT = "*_Fast",
FORGERIES, GPU = [], "NVIDIA H100 80GB HBM3"


def forgeries(spoil, lacks="*_Fast", **table):
    """Adds a forger for each row, name=(change, code, words...), who does spoil(box, change) in a checkout without the
    records of the pattern `lacks`, so that verify prints this code, and a sentence with these words."""
    for name, (change, code, *words) in table.items():
        FORGERIES.append(pytest.param(lacks, spoil, change, code, words, id=name))


# ---- One edit of the events of one run


def insert(place, kind, **event):
    return lambda rows: rows.insert(place, dict(event=kind, **event))


def swap(behind):
    """An edit of three neighbours, step 10, a stop mark and the validation: swaps that so far behind the step, and the
    next."""
    def change(rows):
        place = rows.index(at(rows, "step 10")) + behind
        rows[place : place + 2] = rows[place + 1], rows[place]
    return change


forgeries(
    Box.edit,
    loss_of_the_last_validation_alone=(put("val", val_loss=4.0), "headline", "be 4.0"),
    knob_against_changed=(put("start", changed=dict(head_lr=0.5)), "knobs", DEFAULTS["head_lr"]),
    seed_twice=(put("start", seed=1, knobs=dict(seed=1)), "seeds", "[1]"),
    another_run_than_its_folder=(put("start", run_id="20200101-000000-abcdef"), "path", "holds the run 20200101-"),
    knob_of_one_run=(give(head_lr=0.5), "knobs", "recipes"),
    seed_against_its_knob=(put("start", seed=9), "knobs", "be 9"),
    tokens_doubled_at_a_step=(put("step 10", tokens=5120), "tokens", "2560"),
    rate_of_tokens=(put("end", tokens_per_s=99999), "tokens", "99999"),
    fewer_tokens_validated=(put("val", val_tokens=300), "tokens", "is 300"),
    loss_that_is_nan=(put("step 10", train_loss="nan"), "nan", "nan"),
    step_missing=(lambda rows: rows.remove(at(rows, "step 7")), "truncated", "6, 7, 8"),
    no_end=(list.pop, "truncated", "the end status is None"),
    second_end=(lambda rows: rows.insert(5, rows[-1]), "truncated", "'end' events is [20, 20]"),
    resumed=(insert(1, "resume", step=5, from_run_id="20200101-000000-abcdef"), "track", "resumed"),
    step_out_of_order=(insert(-1, "warning", text="", step=3), "truncated", "the order of steps"),
    checkpoint_that_was_not_due=(insert(5, "checkpoint", step=2, bytes=1, ms=1.0), "truncated", "'checkpoint'", "[2]"),
    norms_that_were_not_due=(put("step 10", norms={}), "truncated", "step 10 has norms"),
    ranks_of_one_run=(put("start", world_size=2), "headline", "world_size"),
    another_day_than_its_name=(put("start", utc="2020-01-01T00:00:00Z"), "path", "2020-01-01"),
    day_that_no_month_has=(put("start", utc="2026-02-30T00:00:00Z"), "schema", "2026-02-30"),
    clock_runs_during_validation=(swap(1), "clock", "the clock runs"),
    step_on_a_stopped_clock=(swap(0), "clock", "the clock stands"),
    mark_that_comes_twice=(lambda rows: rows.insert(rows.index(at(rows, "clock")), at(rows, "clock")),
                           "clock", "the mark 'stop' comes twice"),
    wall_that_goes_back=(lambda rows: shift(rows, -3, "wall_s", first=-3), "clock", "gone back by"),
    time_too_short_to_divide_by=(put("end", train_ms=1e-310), "clock", "grew by"),
    memory_without_a_gpu=(put("end", peak_val_mib=9), "track", "peak_val_mib is 9"),
    argument_unlike_its_knob=(lambda rows: rows[0]["argv"].append("--steps=21"), "knobs", "arguments"),
    format_of_the_future=(put("start", format=3), "schema", "'format': 3"),
    step_without_its_rate=(lambda rows: at(rows, "step 10").pop("lr"), "schema", "lr is missing"),
    stages_in_the_knobs_alone=(put("start", knobs=dict(batch_stages="2x128 4x128")), "tokens", "length is [(0, 2"),
    batch_before_its_stage=(lambda rows: [in_stages(rows, batch_stages="2x128 4x128"), at(rows, "step 10").update(
        sequences=4)], "tokens", "sequences is 4"),
    schedule_too_long_to_list=(put("start", knobs=dict(steps=10**12, val_every=1)), "schema", "steps is 10000"),
    stages_without_end=(put("start", knobs=dict(batch_stages="1x128 " * 21)), "schema", "not stages of 20 steps"),
)
forgeries(
    lambda box, change: [box.edit_all(in_format_1), box.edit(change)],
    ranks_against_accumulation=(put("start", grad_accum=3), "tokens", "is 3"))


# ---- The same in the events of all runs, or one thing in meta.json

ON_GPU = put("start", gpu=GPU, gpu_count=1, gpu_memory_mib=81559)


def short_shards(rows, epochs=1):
    """As if all were read so often, with all else as it was."""
    put("start", knobs=dict(epochs=epochs))(rows)
    for shard in rows[0]["data"]["train"]:
        shard["tokens"] = 1000


forgeries(
    Box.edit_all,
    more_epochs_than_allowed=(lambda rows: short_shards(rows, 3), "track", "2.560 epochs"),
    more_tokens_than_the_stream_has=(short_shards, "tokens", "2000"),
    other_validation_stream=(put("start", data=dict(val_sha256="a" * 64)), "data", "a" * 64),
    gpus_without_ranks=(put("start", gpu_count=2), "data", "gpu_count is 2"),
    gpus_on_a_track_for_cpus=(ON_GPU, "track", GPU),
    other_training_shard=(put("start", data=dict(train=dict(sha256="a" * 64))), "data", "training shards"),
    knob_that_the_script_does_not_have=(put("start", knobs=dict(luck=1)), "knobs", "alone has is ['luck']"),
    torch_unlike_its_package=(put("start", torch="9.9.9"), "schema", "torch, by its package, is 9.9.9"),
    build_unlike_cuda=(put("start", torch="2.11.0+cu118"), "schema", "cuda, is cu118"),
    ranks_that_divide_one_stage=(lambda rows: [in_stages(rows, batch_stages="2x128 1x128"), rows[0].update(
        world_size=2)], "tokens", "batches that 2 ranks do not divide"),
)
forgeries(
    lambda box, change: box.claims.update(change),
    better_p=(dict(result=dict(p=1e-12)), "headline", "result.p is 1e-12"),
    knob_that_was_not_changed=(dict(changed=dict(steps=10)), "headline", "steps is 10"),
    other_hardware=(dict(hardware=dict(gpu=GPU, count=1, memory_mib=81559, driver="1")), "headline", GPU, "None"),
    private_but_not_said=(dict(data=dict(public=False)), "readme", "Data: private"),
    arm_with_other_knobs=(dict(arms=dict(changed=dict(head_lr=0.5))), "headline", "head_lr is 0.5"),
    another_name=(dict(name="2026-11-26_Another"), "schema", "2026-11-26_Another"),
    unknown_track=(dict(track="nowhere"), "track", "no track nowhere"),
    long_summary=(dict(summary="s" * 121), "schema", ".{0,120}"),
    date_that_no_calendar_has=(dict(date="2026-99-99"), "schema", "2026-99-99"),
)

# ---- Losses and runs


def clone(box, how):
    """Run 1 is run 0 again, with another seed, at another pace, its later losses a little higher, one of them more."""
    (pace, noise), rows = how, events(box.run(0))
    forge.retime(rows, pace)
    shift(rows, noise, first=9)
    shift(rows[9:10], 1e4 * noise)
    forge.rewrite(box.run(), [events(box.run())[0], *rows[1:]])


forgeries(
    clone,
    curve_twice=((1, 0), "duplicate", "curve of training times"),
    losses_twice_with_noise=((0.9, 1e-6), "duplicate", "curve of losses"))


def left_out_too(box):
    box.claims = dict(left_out=[dict(run_id=box.run().name, reason="it was slow")])


def in_two_records(box):
    box.victim = shutil.copytree(box.victim, box.victim.with_name(f"{box.victim.name}Two"))
    box.move(box.victim.name)


def do(box, change):
    change(box)


RECIPE = give(head_lr=DEFAULTS["head_lr"])
forgeries(
    do,
    run_left_out=(Box.remove, "left-out", "that it lacks, with no reason given, is ['"),
    run_left_out_of_a_record_that_is_dated_before_it=(
        lambda box: [box.remove(), box.move("2020-01-01_Toy")], "schema", "2020-01-01"),
    run_that_is_left_out_too=(left_out_too, "left-out", "in it and left out is ['"),
    run_in_two_records=(in_two_records, "duplicate", "run id"),
    arm_that_is_none=(lambda box: box.edit_all(RECIPE, "arms/cold"), "knobs", "having the recipe of runs/"),
    record_under_a_name_that_is_not_read=(lambda box: shutil.copytree(
        box.victim, box.victim.with_name("Other")), "path", "Other is no folder"))


# ---- Times


def shave(rows, ms, place):
    """Take so much from the training time of all events from a place on."""
    shift(rows, -ms, "train_ms", first=place)
    forge.rate(rows)


def stop_after_step_5(rows):
    """For 5 ms, in which nothing is validated."""
    place = rows.index(at(rows, "step 5")) + 1
    before = rows[place - 1]
    stopped = dict(event="clock", mark="stop", train_ms=before["train_ms"], wall_s=before["wall_s"])
    shave(rows, 5, place)
    rows[place:place] = stopped, stopped | dict(mark="start", wall_s=stopped["wall_s"] + 5e-3)


forgeries(
    Box.edit,
    time_between_the_marks=(lambda rows: shave(rows, 5, rows.index(at(rows, "step 5"))), "clock",
                            "training time grew by"),
    clock_stopped_where_nothing_is_validated=(stop_after_step_5, "clock", "nothing was validated or saved"))


def pause(seconds, step=10):
    """An edit: the clock stands so long at a step; what the pause takes beyond that is taken from it."""
    def change(rows):
        place = rows.index(at(rows, f"val {step}"))
        beyond = rows[place + 1]["wall_s"] - rows[place - 1]["wall_s"] - seconds
        shift(rows, -beyond, "wall_s", first=place)
    return change


@pytest.mark.parametrize("step", [10, 20])
def test_seconds_moved_into_a_pause(box, step):
    """On one kind of GPU alone. At the last step too, unless the weights are saved then."""
    found = lambda: [*box.runs.check_pauses(box.runs.read_record(box.victim).runs)]
    for change in ON_GPU, pause(0.5), pause(0.5, 20):
        box.edit_all(change)
    box.edit(pause(1.05, step))
    assert not found()
    box.edit(pause(1.2, step))
    assert f"{box.run().name}: the clock stood for 1.200 s at step {step}" in found()[0][1]
    box.edit_all(put("start", knobs=dict(save=True)))
    assert bool(found()) == (step == 10)
    saved = dict(event="checkpoint", step=step, bytes=1, ms=600.0)
    box.edit(lambda rows: rows.insert(rows.index(at(rows, f"val {step}")), saved))
    assert not found()


# ---- Scripts and claims


CLASS = "\nclass Hyperparameters:\n    steps: int = {}\n    mlp_ratio: int = {}\n"


def script(box, change):
    """Puts a text behind the script that the record keeps, and has all runs, or those of a set, made by that."""
    text, *label = change
    box.edit_all(extend(box.victim / "train_gpt.py", text), *label)


forgeries(
    script,
    script_that_did_not_run=(["print('fast')\n", "arms/cold"], "script", "SHA-256 of train_gpt.py"),
    compile_variable=(["os.environ['TORCHINDUCTOR_MAX_AUTOTUNE'] = '1'\n"], "forbidden", "'max_autotune'"),
    default_unlike_the_runs=([CLASS.format("knob(20)", "knob(6, 'a meaning')"), "runs"], "knobs",
                             "mlp_ratio in changed, since the script's default is 6"),
    script_without_readable_knobs=([CLASS.format("KNOBS.steps", "9**9**9"), "runs"], "knobs", "default can be read"))

# The record that claims to be faster than its baseline. With walls 13 s longer, each run begins before another's end.
BESIDE_FAST, SLOW = "no record", "0" * 64
forgeries(
    lambda box, change: box.edit_all(change, "baseline"), BESIDE_FAST,
    baseline_that_was_as_fast=(lambda rows: forge.retime(rows, 0.82), "gain", "interleaved baseline"),
    baseline_that_ran_at_the_same_time=(lambda rows: shift(rows, 13, "wall_s"), "gain", "(p is None)"),
    baseline_with_other_knobs_than_the_parent=(give(skip_lr=0.5), "knobs", "skip_lr is 0.5"),
    baseline_of_another_script_than_the_parent=(put("start", script_sha256=SLOW), "script", SLOW))
forgeries(
    do, BESIDE_FAST,
    claim_that_two_runs_cannot_carry=(Box.remove, "target", "n >= 3"),
    loss_above_the_target=(lambda box: box.edit_all(lambda rows: shift(rows, 1), "runs"), "target", "below 5.0"))
forgeries(
    lambda box, change: box.claims.update(change), BESIDE_FAST,
    parent_that_is_not_there=(dict(parent="2020-01-01_Nowhere"), "script", "2020-01-01_Nowhere"))


@pytest.mark.parametrize("lacks, spoil, change, code, words", FORGERIES)
def test_forgery(toy, tmp_path, lacks, spoil, change, code, words):
    box = toy.copy(tmp_path, lacks)
    spoil(box, change)
    box.reseal()
    found = box.expect(code, *words)
    assert not {problem[0] for problem in found} & {"headline", "readme"} - {code}, found


def test_a_forger_without_a_forgery_passes(toy, tmp_path):
    """Else what the tests above catch might be the sealing. The runs of Toy have format 2, or here, format 1."""
    box = toy.copy(tmp_path)
    for name, change in (("Toy", list), ("Fast", list), ("Toy", in_format_1)):
        box.victim = box.record(name)
        box.edit_all(change)
        box.reseal()
        assert box.main("verify") == (0, "2 records, 0 failed\n", "")


# ---- What verify cannot show: forgeries without a contradiction, as the record Fast is one from end to end


def another_log(box):
    for path in box.victim.glob("runs/*/log.txt"):
        box.replace(path, "val_loss:", "val_loss:1.0 it was ")


def another_name_of_an_arm(box):
    (box.victim / "arms/cold").rename(box.victim / "arms/warm")
    box.write(forge.overlay(box.meta(), dict(arms=dict(name="warm"))))


def a_little_time_at_every_step(rows):  # as much as the tolerance of 1 ms + 0.1 % hides
    for i, row in enumerate(rows):
        if row["event"] == "step":
            shave(rows, 0.9, i)


def other_rates(rows):
    for row in (row for row in rows if row["event"] == "step"):
        row |= dict(lr=0.5, momentum=0.0, window=10**6)


INVENTED = dict(
    losses=lambda box: box.edit_all(lambda rows: shift(rows, -0.1)),
    times=lambda box: box.edit_all(lambda rows: forge.retime(rows, 0.5)),
    # shards are known by the hashes of the track, not by their lengths
    tokens_to_read=lambda box: box.edit_all(put("start", data=dict(train=dict(tokens=10**9)))),
    mfu=lambda box: box.edit_all(put("end", mfu=0.9)),
    one_loss=lambda box: box.edit(lambda rows: shift(rows, -0.125, first=-2)),
    pause_on_a_cpu=lambda box: box.edit(pause(9)), arm_name=another_name_of_an_arm,
    track=lambda box: box.replace(box.root / "records" / "tracks" / f"{forge.TRACK}.json", "5.0", "6.0"),
    rates=lambda box: box.edit_all(other_rates), log=another_log,
    tolerance=lambda box: box.edit(a_little_time_at_every_step),
    script=lambda box: script(box, ["print('another')\n"]))


@pytest.mark.parametrize("make", INVENTED.values(), ids=INVENTED)
def test_forgeries_without_a_contradiction_pass(box, make):
    make(box)
    box.reseal()
    assert box.main("list", "--write").code == 0
    assert box.main("verify") == (0, "1 records, 0 failed\n", "")
