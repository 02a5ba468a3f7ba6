"""Every run of a comparison, written to where people look at runs: TensorBoard, MLflow or Weights & Biases.

All of it stays on this machine: event files, an SQLite database, an offline folder. A comparison gets a folder of its
own, named after what is in it, within the folder asked for. It appears there whole or not at all, and what is there
already is not written again.
"""

import hashlib
import importlib
import json
import logging
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fairtrial.contract import BadInput, Metric
from fairtrial.report.runs import Carried, runs_of
from fairtrial.report.wording import reason
from fairtrial.trial.comparison import Comparison

LIBRARIES = {"tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
BATCH = 100  # metrics and parameters that MLflow takes at once


def check_log(to: str, folder: str | Path) -> None:
    """Refuse what `log` would have to refuse, before anything long is begun."""
    if to not in LIBRARIES:
        raise BadInput(f"cannot log to {to!r}; there is: {', '.join(LIBRARIES)}")
    _library(to)
    _make(Path(folder).expanduser(), folder)


def log(comparison: Comparison, to: str, folder: str | Path) -> Path:
    """Write every run, tuning runs too; gives the folder with the comparison."""
    check_log(to, folder)
    target = Path(folder).expanduser().resolve() / _folder_name(comparison)
    if not target.exists():
        with _whole(target) as unfinished:
            try:
                WRITERS[to](comparison, unfinished, target)
            except OSError:
                raise
            except Exception as error:  # each library has errors of its own
                said = " ".join(str(error).split()) or type(error).__name__
                raise BadInput(f"logging to {to} did not work, and nothing was written: {said}") from error
    return target


def how_to_look(to: str, target: Path) -> str:
    """The command that shows what was written."""
    return {
        "tensorboard": f"tensorboard --logdir '{target}'",
        "mlflow": f"mlflow ui --backend-store-uri 'sqlite:///{target / 'mlflow.db'}'",
        "wandb": f"wandb sync '{target}'/wandb/offline-run-*",
    }[to]


def _library(to: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # what is logged to this machine stays on it
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        return importlib.import_module(LIBRARIES[to])
    except ImportError as error:
        raise BadInput(f"logging to {to} needs an extra: pip install 'fairtrial[{to}]' ({error})") from None


def _make(path: Path, named: str | Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise _refused(named, error) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise BadInput(f"the folder {named} cannot be written to: no permission")


def _refused(named: str | Path, error: Exception) -> BadInput:
    return BadInput(f"the folder {named} cannot be written to: {getattr(error, 'strerror', None) or error}")


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its place in the end."""
    try:
        unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _refused(target.parent, error) from None
    try:
        yield unfinished
        unfinished.chmod(0o777 & ~_umask())
        os.replace(unfinished, target)
    except OSError as error:
        if not target.exists():  # else somebody else has just written the same
            raise _refused(target.parent, error) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _folder_name(comparison: Comparison) -> str:
    content = [comparison.as_json(), [_identity(comparison, run) for run in runs_of(comparison)]]
    return f"{_slug(comparison.task)}-{_digest(content)}"


def _identity(comparison: Comparison, run: Carried) -> list[Any]:
    return [comparison.task, comparison.version, run.recipe.as_json(), run.seed, run.split, asdict(run.outcome)]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:10]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", name).strip("._")[:60] or "task"


# What is written of a run ------------------------------------------------------------------------------------------


def _name(run: Carried) -> str:
    return f"{run.judged.name}, {run.label}"


def _described(comparison: Comparison, run: Carried) -> dict[str, str | int]:
    """What the run was, in words."""
    found: dict[str, str | int] = {
        "task": comparison.task,
        "task_version": comparison.version,
        "recipe": run.judged.name,
        "phase": run.phase,
        "split": run.split,
        "seed": run.seed,
        "ended": run.outcome.ended,
    }
    if run.judged.verdict:
        found["verdict"] = run.judged.verdict
    if run.serves is not None:
        found["evaluation_seed"] = run.serves
    return found


def _hyperparameters(run: Carried) -> dict[str, Any]:
    """{'optimizer': 'AdamW', 'optimizer.lr': 0.001, …}"""
    found: dict[str, Any] = {}
    for slot, choice in run.recipe.choices.items():
        found[slot] = choice.name
        found.update({f"{slot}.{key}": value for key, value in choice.params.items()})
    return found


def _results(run: Carried, metric: Metric) -> dict[str, float]:
    outcome = run.outcome
    costs = {f"cost/{key}": float(value) for key, value in asdict(outcome.costs).items() if value is not None}
    also = {f"also/{name}": float(value) for name, value in outcome.metrics.items()}
    return {f"result/{metric.name}": outcome.value, **also, **costs, "cost/seconds": outcome.seconds}


def _curve_name(metric: Metric) -> str:
    return f"curve/{metric.name}"


# TensorBoard -------------------------------------------------------------------------------------------------------


def _to_tensorboard(comparison: Comparison, folder: Path, target: Path) -> None:
    """A folder of events for each run; hyperparameters and results are for the HPARAMS page."""
    library = _library("tensorboard")
    summary = importlib.import_module("torch.utils.tensorboard.summary")
    metric = comparison.metric
    for run in runs_of(comparison):
        results = _results(run, metric)
        hyperparameters = {
            key: value if isinstance(value, str | int | float) else str(value)
            for key, value in {**_hyperparameters(run), **_described(comparison, run)}.items()
        }
        where = folder / f"{run.place}-{_slug(run.judged.name)}" / _slug(run.label)
        with library.SummaryWriter(str(where)) as writer:
            for part in summary.hparams(hyperparameters, results):
                writer.file_writer.add_summary(part)
            for step, value in run.outcome.curve:
                writer.add_scalar(_curve_name(metric), value, step)
            for name, value in results.items():
                writer.add_scalar(name, value, 0)
            if run.outcome.error:
                writer.add_text("error", reason(run.outcome))


# MLflow ------------------------------------------------------------------------------------------------------------


def _to_mlflow(comparison: Comparison, folder: Path, target: Path) -> None:
    """An experiment in an SQLite database, since MLflow refuses new file stores.

    MLflow keeps the database open, so it writes one in a folder of its own, which is then copied.
    """
    library = _library("mlflow")
    with _quiet("mlflow", "alembic"), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as aside:
        written = Path(aside) / "mlflow.db"
        client = library.MlflowClient(tracking_uri=f"sqlite:///{written}")
        artifacts = (target / "artifacts").as_uri()
        experiment = client.create_experiment(f"fairtrial {_key(comparison.task)}", artifact_location=artifacts)
        for run in runs_of(comparison):
            _one_to_mlflow(client, library.entities, experiment, comparison, run)
        with closing(sqlite3.connect(written)) as source, closing(sqlite3.connect(folder / "mlflow.db")) as copy:
            source.backup(copy)


def _one_to_mlflow(client: Any, entities: Any, experiment: str, comparison: Comparison, run: Carried) -> None:
    metric, outcome = comparison.metric, run.outcome
    tags = {key: str(value)[:5000] for key, value in _described(comparison, run).items()}
    if outcome.error:
        tags["error"] = reason(outcome)[:5000]
    made = client.create_run(experiment, tags=tags, run_name=_name(run)[:250])
    now = made.info.start_time
    points = [(_curve_name(metric), value, step) for step, value in outcome.curve]
    points += [(name, value, 0) for name, value in _results(run, metric).items()]
    written = [entities.Metric(_key(name), value, now, step) for name, value, step in points]
    params = [entities.Param(_key(key), str(value)[:6000]) for key, value in _hyperparameters(run).items()]
    for first in range(0, max(len(written), len(params)), BATCH):
        part = slice(first, first + BATCH)
        client.log_batch(made.info.run_id, metrics=written[part], params=params[part])
    status = "FAILED" if outcome.failed else "KILLED" if outcome.ended == "pruned" else "FINISHED"
    client.set_terminated(made.info.run_id, status, now + round(outcome.seconds * 1000))


def _key(name: str) -> str:
    """A name that MLflow takes."""
    parts = [re.sub(r"[^\w\-. ]", "_", part).strip(" .") or "_" for part in name.split("/")]
    return "/".join(parts)[:250]


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# Weights & Biases --------------------------------------------------------------------------------------------------


def _to_wandb(comparison: Comparison, folder: Path, target: Path) -> None:
    """Offline runs; equal runs have equal ids, so that syncing them twice makes no second copy."""
    library = _library("wandb")
    settings = library.Settings(
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    was_running = library.run is not None
    for run in runs_of(comparison):
        made = library.init(
            mode="offline",
            dir=str(folder),
            project=_wandb_project(comparison.task),
            id=_digest([run.place, run.number, run.serves, _identity(comparison, run)]),
            name=_name(run)[:120],
            group=run.judged.name[:120],
            job_type=run.phase,
            config=_nested(_hyperparameters(run), _described(comparison, run)),
            reinit="create_new",
            settings=settings,
        )
        for step, value in run.outcome.curve:
            made.log({_curve_name(comparison.metric): value}, step=step)
        made.summary.update(_results(run, comparison.metric))
        if run.outcome.error:
            made.summary["error"] = reason(run.outcome)
        made.finish(exit_code=int(run.outcome.failed))
    if not was_running:
        library.teardown()
    for found in [path for path in (folder / "wandb").rglob("*") if path.is_symlink()]:
        found.unlink()  # they lead to the latest run, and into a cache


def _nested(hyperparameters: Mapping[str, Any], described: Mapping[str, Any]) -> dict[str, Any]:
    return {**{f"slot.{key}": value for key, value in hyperparameters.items()}, **described}


def _wandb_project(task: str) -> str:
    return f"fairtrial-{_slug(task)}"


WRITERS: dict[str, Callable[[Comparison, Path, Path], None]] = {
    "tensorboard": _to_tensorboard,
    "mlflow": _to_mlflow,
    "wandb": _to_wandb,
}
