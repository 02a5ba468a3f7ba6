import json
import os
import signal
from dataclasses import replace
from typing import get_args

import children
import pytest
import toy
from jobs import WRONG, apart_from_times, job, outcomes, sound

from fairtrial.contract import BadInput, Costs, Ended, Outcome
from fairtrial.trial.execute import ATTEMPTS, Inline, Local, carry_out


@pytest.fixture(scope="module")
def local():
    with Local(toy.load, 2) as executor:
        yield executor


def test_worker_processes_and_this_process_come_to_the_same_outcomes(local):
    jobs = [sound(seed) for seed in range(6)] + [job(how, seed=3) for how in [*WRONG, "negative step", "threads"]]
    with Inline(toy.load) as inline:
        here = [apart_from_times(outcome) for outcome in outcomes(inline, jobs)]
    there = [apart_from_times(outcome) for outcome in outcomes(local, jobs)]
    assert here == there
    assert local.running == 0


def test_a_run_that_ends_well_has_its_value_its_curve_and_its_costs():
    outcome = carry_out(toy.load("toy"), sound(0))
    assert (outcome.ended, outcome.error, outcome.failed) == ("finished", None, False)
    assert [step for step, _ in outcome.curve] == [1, 2, 3, 4, 5]
    assert outcome.curve[-1][1] == outcome.value
    assert outcome.costs == Costs(0.002, 1002, 8, 2)
    assert outcome.seconds > 0
    assert carry_out(toy.load("toy"), sound(0)).value == outcome.value
    assert carry_out(toy.load("toy"), sound(1)).value != outcome.value


@pytest.mark.parametrize(
    ("how", "ended", "said"),
    [
        ("diverge", "diverged", "the loss is infinite"),
        ("nan", "diverged", "the task measured nan"),
        ("said to diverge", "diverged", "as the task says"),
        ("raise", "died", "RuntimeError: a task's own mistake"),
        ("exit", "died", "SystemExit: 3"),
        ("number", "died", "the task's run must return an Outcome, got float"),
        ("text", "died", "ValueError: could not convert string to float"),
        ("negative step", "died", "step must be at least 0, got -1"),
    ],
)
@pytest.mark.parametrize(("reference", "worst"), [("toy", 0.0), ("toy minimize", 2.0)])
def test_a_run_that_goes_wrong_counts_with_the_worst_value_and_says_why(how, ended, said, reference, worst):
    outcome = carry_out(toy.load(reference), job(how))
    assert (outcome.value, outcome.ended, outcome.failed) == (worst, ended, True)
    assert said in outcome.error
    assert [step for step, _ in outcome.curve][:2] == [1, 2]


def test_a_mistake_is_recorded_with_its_traceback():
    error = carry_out(toy.load("toy"), job("raise")).error
    assert error.startswith("Traceback (most recent call last)")
    assert "in go_wrong" in error


def test_any_number_type_of_a_task_becomes_pythons_own():
    outcome = carry_out(toy.load("toy"), job("numpy"))
    assert outcome.value == 0.5
    assert json.loads(json.dumps([outcome.value, outcome.metrics, vars(outcome.costs)])) == [
        0.5,
        {"n": 3.0},
        {"step_time": 0.1, "peak_memory": 7, "optimizer_state_bytes": None, "trainable_parameters": None},
    ]


def test_what_is_not_finite_on_the_way_stands_in_the_curve_as_the_worst_value():
    outcome = carry_out(toy.load("toy minimize"), job("nan on the way"))
    assert outcome.ended == "finished"
    assert (3, 2.0) in outcome.curve


class Impatient:
    """Finds every run hopeless after some steps."""

    def __init__(self, after):
        self.after = after

    def hopeless(self, curve):
        return len(curve) >= self.after


def test_a_hopeless_run_is_stopped_with_the_last_value_of_its_curve():
    outcome = carry_out(toy.load("toy"), replace(sound(0), pruner=Impatient(3)))
    assert (outcome.ended, outcome.failed, outcome.error) == ("pruned", False, None)
    assert len(outcome.curve) == 3
    assert outcome.value == outcome.curve[-1][1]


def test_a_run_stopped_at_a_value_that_is_not_finite_has_the_worst():
    outcome = carry_out(toy.load("toy minimize"), replace(job("nan on the way"), pruner=Impatient(3)))
    assert (outcome.ended, outcome.value) == ("pruned", 2.0)


def test_a_task_that_stops_itself_before_it_has_reported_anything_does_not_break_the_bench():
    class Hasty(toy.Toy):
        def run(self, choices, seed, *, split, progress):
            raise toy.Pruned

    outcome = carry_out(Hasty(), sound(0))
    assert (outcome.ended, outcome.value, outcome.curve) == ("pruned", 0.0, [])


def test_a_run_has_one_thread_and_this_process_has_its_own_back_afterwards():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert carry_out(toy.load("toy"), job("threads")).value == 1.0
        assert torch.get_num_threads() == 3
        carry_out(toy.load("toy"), job("raise"))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_a_task_prints_does_not_reach_stdout(capfd):
    with Inline(toy.load) as inline:
        outcomes(inline, [job("print")])
    told = capfd.readouterr()
    assert told.out == ""
    assert "a task prints" in told.err


def test_an_inline_executor_forgets_what_is_waiting_when_it_is_left():
    with Inline(toy.load) as inline:
        inline.submit(sound(0))
        assert inline.running == 1
    assert inline.running == 0


def test_a_worker_that_is_killed_once_has_its_run_tried_again(local, tmp_path):
    marker = tmp_path / "marker"
    found = outcomes(local, [job("kill once", where=str(marker)), sound(0), sound(1)])
    assert marker.exists()
    assert [outcome.ended for outcome in found] == ["finished"] * 3


def test_a_run_that_always_takes_its_worker_along_is_lost_and_its_neighbours_are_not(capfd):
    printing = job("print", where="worker")
    with Local(toy.load, 1) as executor:
        lost, printed = outcomes(executor, [job("kill"), printing])
        assert executor.attempts.cost == {}
    assert (lost.ended, lost.value) == ("lost", 0.0)
    assert lost.error == f"its worker process ended by signal 9, {ATTEMPTS} times"
    assert printed.ended == "finished"
    told = capfd.readouterr()  # nothing that a worker prints reaches stdout either
    assert told.out == ""
    assert "a task prints" in told.err
    assert "past Python too" in told.err


def test_outcomes_come_back_while_more_jobs_than_workers_wait(local):
    jobs = [sound(seed) for seed in range(9)]
    for each in jobs:
        local.submit(each)
    assert local.running == 2
    assert {local.next()[0] for _ in jobs} == set(jobs)


def test_without_workers_nothing_can_be_carried_out():
    with pytest.raises(BadInput, match="workers must be at least 1, got 0"):
        Local(toy.load, 0)


def test_two_equal_jobs_are_two_jobs():
    with Inline(toy.load) as inline:
        first, second = outcomes(inline, [sound(0), sound(0)])
    assert apart_from_times(first) == apart_from_times(second)


@pytest.mark.parametrize(
    ("sent", "code", "workers", "started"),
    [(signal.SIGINT, 130, 2, True), (signal.SIGKILL, -9, 1, True), (signal.SIGKILL, -9, 2, False)],
    ids=["interrupted", "killed", "killed early"],
)
def test_no_worker_stays_behind_when_its_parent_ends(sent, code, workers, started, tmp_path):
    told = tmp_path / "workers"
    parent = children.start(children.keep_workers_busy, str(told), workers, started)
    answer = tmp_path / "workers.json"
    children.wait_for(answer.exists)
    workers = json.loads(answer.read_text())
    assert all(children.lives(worker) for worker in workers)
    os.kill(parent.pid, sent)
    parent.join(children.PATIENCE)
    assert parent.exitcode == code
    children.wait_for(lambda: not any(children.lives(worker) for worker in workers))


def test_an_outcome_is_a_failure_only_if_it_diverged_died_or_was_lost():
    assert [Outcome(0.0, ended).failed for ended in get_args(Ended)] == [0, 0, 1, 1, 1]
