"""Runs written with the real libraries, and read back."""

import importlib.util
import json
import os
import sqlite3
import struct
from contextlib import closing

import made
import pytest

from fairtrial.contract import BadInput, Outcome
from fairtrial.report import logs
from fairtrial.report.logs import check_log, how_to_look, log
from fairtrial.report.runs import runs_of


def needs(library):
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"the extra is not installed: {library}")


@pytest.fixture(scope="module")
def found():
    """Ten runs of two recipes: finished, pruned and failed ones."""
    return made.comparison(
        {
            "A": [made.finished(0.5, metrics={"cross entropy": 0.25}), made.finished(0.625)],
            "B <odd>/name=%": [made.failed(ended="died", error=made.TRACEBACK), made.finished(0.75)],
        },
        tuned=lambda recipe, seeds: [
            made.tuning(
                recipe,
                ({"optimizer.lr": 0.01, "optimizer.kind": "soft"}, made.finished(0.5)),
                ({"optimizer.lr": 0.5, "optimizer.kind": "hard"}, made.pruned(0.25)),
            ),
            made.tuning(recipe, ({"optimizer.lr": 0.02, "optimizer.kind": "soft"}, made.finished(0.5))),
        ],
    )


@needs("tensorboard")
def test_tensorboard_has_a_folder_for_each_run(found, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    target = log(found, "tensorboard", tmp_path / "runs")
    folders = sorted(str(path.parent.relative_to(target)) for path in target.rglob("events.out.*"))
    odd = "1-B_odd_name="
    assert folders == sorted(
        f"{recipe}/{run}"
        for recipe in ("0-A", odd)
        for run in (
            "seed_0",
            "seed_1",
            "tuning_run_1_for_seed_0",
            "tuning_run_1_for_seed_1",
            "tuning_run_2_for_seed_0",
        )
    )
    run = EventAccumulator(str(target / "0-A" / "seed_0"))
    run.Reload()
    curve = [(event.step, event.value) for event in run.Scalars("curve/accuracy")]
    assert curve == list(found.recipes[0].outcomes[0].curve)
    assert [event.value for event in run.Scalars("result/accuracy")] == [0.5]
    assert [event.value for event in run.Scalars("also/cross entropy")] == [0.25]
    assert [event.value for event in run.Scalars("cost/peak_memory")] == [5_000_000]
    content = run.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hyperparameters = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert hyperparameters["optimizer.lr"].number_value == 0.01
    assert hyperparameters["optimizer"].string_value == "A"
    assert hyperparameters["phase"].string_value == "evaluation"
    assert hyperparameters["seed"].number_value == 0
    broken = EventAccumulator(str(target / odd / "seed_0"))
    broken.Reload()
    assert b"RuntimeError: it broke" in broken.Tensors("error/text_summary")[0].tensor_proto.string_val[0]
    assert how_to_look("tensorboard", target) == f"tensorboard --logdir '{target}'"


@needs("mlflow")
def test_mlflow_has_a_database_with_the_runs(found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = log(found, "mlflow", "logs")
    assert [path.name for path in target.iterdir()] == ["mlflow.db"]
    assert os.listdir(tmp_path) == ["logs"]  # nothing of MLflow's own beside it

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{target / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fairtrial digits")
    assert experiment.artifact_location == (target / "artifacts").as_uri()
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == sorted(f"{run.judged.name}, {run.label}" for run in runs_of(found))
    run = runs["A, seed 0"]
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optimizer": "A", "optimizer.lr": "0.01", "optimizer.kind": "soft"}
    assert run.data.metrics["result/accuracy"] == 0.5
    assert run.data.metrics["also/cross entropy"] == 0.25
    assert run.data.tags["phase"] == "evaluation"
    assert run.data.tags["seed"] == "0"
    curve = client.get_metric_history(run.info.run_id, "curve/accuracy")
    assert [(point.step, point.value) for point in curve] == list(found.recipes[0].outcomes[0].curve)
    stopped, broken = runs["A, tuning run 2 for seed 0"], runs["B <odd>/name=%, seed 0"]
    assert (stopped.info.status, broken.info.status) == ("KILLED", "FAILED")
    assert stopped.data.params["optimizer.lr"] == "0.5"
    assert broken.data.tags["error"] == "RuntimeError: it broke"


@needs("mlflow")
def test_mlflow_takes_names_it_does_not_like(tmp_path):
    outcomes = [Outcome(0.5, metrics={"top-5 %": 0.75, "//": 0.1, "学习": 0.2, "m" * 400: 0.3})]
    odd = made.comparison({"A": outcomes, "B" * 400: outcomes}, task="../<odd>", tuned=lambda recipe, seeds: [])
    target = log(odd, "mlflow", tmp_path)
    assert target.parent == tmp_path
    with closing(sqlite3.connect(target / "mlflow.db")) as stored:
        keys = {key for (key,) in stored.execute("SELECT key FROM metrics")}
    assert {"also/top-5 _", "also/学习"} <= keys
    assert max(map(len, keys)) <= 250


@needs("wandb")
def test_wandb_has_an_offline_run_for_each_run(found, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    target = log(found, "wandb", tmp_path / "logs")
    assert not (tmp_path / "elsewhere").exists()
    assert not [path for path in target.rglob("*") if path.is_symlink()]
    runs = [read_wandb(path) for path in sorted(target.glob("wandb/offline-run-*/*.wandb"))]
    by_name = {run["name"]: run for run in runs}
    assert sorted(by_name) == sorted(f"{run.judged.name}, {run.label}" for run in runs_of(found))
    assert len({run["id"] for run in runs}) == 10
    run = by_name["A, seed 0"]
    assert (run["project"], run["group"], run["job"], run["exit"]) == ("fairtrial-digits", "A", "evaluation", 0)
    assert run["config"]["slot.optimizer.lr"] == 0.01
    assert run["config"]["seed"] == 0
    assert run["summary"]["result/accuracy"] == 0.5
    assert [(step["_step"], step["curve/accuracy"]) for step in run["history"]] == list(
        found.recipes[0].outcomes[0].curve
    )
    broken = by_name["B <odd>/name=%, seed 0"]
    assert broken["exit"] == 1
    assert broken["summary"]["error"] == "RuntimeError: it broke"

    again = log(found, "wandb", tmp_path / "again")
    ids = {read_wandb(path)["id"] for path in again.glob("wandb/offline-run-*/*.wandb")}
    assert ids == {run["id"] for run in runs}


def read_wandb(path):
    """An offline run's records: LevelDB's log format after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, block = path.read_bytes(), 7, b"", 32768
    told = {"config": {}, "summary": {}, "history": []}
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):  # the record goes on in the next block
            continue
        record, whole = Record.FromString(whole), b""
        match record.WhichOneof("record_type"):
            case "run":
                run = record.run
                told |= {"id": run.run_id, "name": run.display_name, "project": run.project}
                told |= {"group": run.run_group, "job": run.job_type}
                told["config"] |= {item.key: json.loads(item.value_json) for item in run.config.update}
            case "summary":
                items = record.summary.update
                told["summary"] |= {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items
                }
            case "history":
                items = record.history.item
                told["history"].append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                )
            case "exit":
                told["exit"] = record.exit.exit_code
    return told


@needs("tensorboard")
def test_equal_comparisons_are_written_once_and_others_beside_them(found, tmp_path):
    target = log(found, "tensorboard", tmp_path)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    assert log(found, "tensorboard", tmp_path) == target
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    other = log(made.comparison({"A": [made.finished(0.5)], "B": [made.finished(0.6)]}), "tensorboard", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([target.name, other.name])


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    for to in logs.LIBRARIES:
        monkeypatch.setitem(logs.LIBRARIES, to, "fairtrial_has_no_such_module")
        with pytest.raises(
            BadInput, match=rf"logging to {to} needs an extra: pip install 'fairtrial\[{to}\]'"
        ) as refused:
            check_log(to, tmp_path / "folder")
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "folder").exists()


def test_an_unknown_place_is_refused(tmp_path):
    with pytest.raises(BadInput, match="cannot log to 'paper'; there is: tensorboard, mlflow, wandb"):
        check_log("paper", tmp_path)


def test_a_folder_that_cannot_be_written_to_is_refused(found, tmp_path, monkeypatch):
    monkeypatch.setitem(logs.LIBRARIES, "mlflow", "json")  # whatever is there
    file = tmp_path / "file"
    file.write_text("kept")
    for folder, reason in ((file, "File exists"), (file / "in", "Not a directory"), ("a\0b", "null byte")):
        with pytest.raises(BadInput, match=f"cannot be written to: .*{reason}") as refused:
            log(found, "mlflow", folder)
        assert "\n" not in str(refused.value)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(BadInput, match="cannot be written to: no permission"):
        log(found, "mlflow", tmp_path)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("the library\ngave up")])
def test_nothing_is_left_of_a_log_that_broke_off(found, tmp_path, monkeypatch, error):
    def breaks_off(comparison, folder, target):
        (folder / "half").write_text("written")
        raise error

    monkeypatch.setitem(logs.LIBRARIES, "mlflow", "json")
    monkeypatch.setitem(logs.WRITERS, "mlflow", breaks_off)
    with pytest.raises(BadInput, match="No space left on device|nothing was written: the library gave up") as refused:
        log(found, "mlflow", tmp_path)
    assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == []
