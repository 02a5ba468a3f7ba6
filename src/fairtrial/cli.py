"""The command line. Heavy imports stay inside the commands that need them: looking something up starts at once."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fairtrial import __version__
from fairtrial.contract import BadInput

if TYPE_CHECKING:
    from rich.console import Console

    from fairtrial.catalog import Catalogue, Claim, Finding, Paper
    from fairtrial.trial.comparison import Comparison
    from fairtrial.trial.execute import Executor
    from fairtrial.trial.store import Store

app = typer.Typer(
    help="Give every method a fair trial: look papers up, use their methods, compare them honestly on your own task.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

UsageError: Any = typer.BadParameter.__base__  # of whichever Click this Typer is built on

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", metavar="PATH", help="Where runs are kept: an SQLite file, or postgresql://…"),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fairtrial {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the command."""


@app.command()
def papers(
    query: Annotated[list[str] | None, typer.Argument(help="Words to search for; none lists everything.")] = None,
    family: Annotated[str | None, typer.Option(help="Only this family, e.g. losses.")] = None,
    year: Annotated[int | None, typer.Option(help="Only papers of this year.")] = None,
    status: Annotated[str | None, typer.Option(help="Only listed, available or checked ones.")] = None,
    as_json: Json = False,
) -> None:
    """List the catalogue's papers, or search them."""
    catalogue = _catalogue()
    found = catalogue.search(" ".join(query or ()), family=family, year=year, status=status)
    if as_json:
        _print_json([_paper_json(catalogue, paper) for paper in found])
        return
    from rich.text import Text

    from fairtrial.report.tables import paper_lines

    if not found:
        typer.echo("No paper fits.")
        return
    _console().print(Text("\n").join(paper_lines(catalogue, found)), no_wrap=True, overflow="ellipsis")
    _console().print(f"\n{len(found)} papers", style="dim")


@app.command()
def show(
    slug: Annotated[str, typer.Argument(help="The paper, by its slug.")],
    as_json: Json = False,
) -> None:
    """Show a paper: what it does, what it claims, and what was measured here."""
    catalogue = _catalogue()
    paper = catalogue[slug]
    if as_json:
        _print_json(_paper_json(catalogue, paper))
        return
    from rich.padding import Padding
    from rich.text import Text

    from fairtrial.report.tables import coloured

    console = _console()
    console.print(Text(paper.title, style="bold"))
    facts = [paper.family, paper.date.isoformat(), f"{paper.authors} authors"]
    facts += [f"arXiv:{paper.arxiv}"] if paper.arxiv else []
    facts += [paper.code] if paper.code else []
    console.print(Text(" · ".join(facts), style="dim"))
    console.print(Text("status: ") + coloured(catalogue.status(paper.slug)))
    console.print(Text("\n" + paper.summary))
    if catalogue.methods(paper.slug):
        console.print()
    for address in catalogue.methods(paper.slug):
        module, _, name = address.rpartition(".")
        console.print(Text(f"from {module} import {name}", style="cyan"))
    for status in catalogue.claims(paper.slug):
        claim = status.claim
        console.print(Text(f"\n{claim.id}: ", style="bold") + coloured(status.verdict))
        console.print(Padding(Text(claim.statement), (0, 0, 0, 2)))
        console.print(Padding(Text(f"paper ({claim.figure_source}): {claim.figure}"), (0, 0, 0, 2)))
        console.print(Padding(Text(_how(claim), style="dim"), (0, 0, 0, 2)))
        if status.finding is not None:
            _print_finding(console, status.finding)
    evidence = catalogue.evidence(paper.slug)
    if evidence is not None:
        console.print(Text(f"\nMeasured on {evidence.date} in {evidence.seconds:.0f} s.", style="dim"))
        if catalogue.stale(paper.slug):
            console.print(
                Text(f"The code has changed since: fairtrial check {paper.slug} --record measures again.", "yellow")
            )


def _how(claim: "Claim") -> str:
    return f"not testable here: {claim.untestable}" if claim.untestable else f"test: {claim.protocol}"


@app.command()
def tasks(
    name: Annotated[str | None, typer.Argument(help="A task, or a file with one: lists its slots' methods.")] = None,
    as_json: Json = False,
) -> None:
    """List the tasks that ship with fairtrial, or the slots of one."""
    from fairtrial import tasks as shipped

    with redirect_stdout(sys.stderr):
        loaded = [shipped.load(reference) for reference in ([name] if name else shipped.names())]
    if as_json:
        listing = [
            {
                "name": task.name,
                "version": task.version,
                "metric": {key: getattr(task.metric, key) for key in ("name", "direction", "unit", "margin")},
                "slots": {
                    slot.name: {"default": str(slot.default), "methods": list(slot.options.names())}
                    for slot in task.slots.values()
                },
            }
            for task in loaded
        ]
        _print_json(listing)
        return
    from fairtrial.report.tables import slot_table, task_table

    _console().print(slot_table(loaded[0].slots.values()) if name else task_table(loaded))


TaskArgument = Annotated[
    str, typer.Argument(help="A shipped task, or a Python file with one of yours (FILE or FILE:NAME).")
]
ChoicesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="SLOT=METHOD,METHOD…", help="optimizer=AdamW,FRUGAL(density=0.25); the first is the baseline."
    ),
]
Trials = Annotated[int, typer.Option(help="Tuning runs of each recipe, for each evaluation seed.")]
Seeds = Annotated[int, typer.Option(help="Evaluation seeds; with --until-decided as many at most.")]
UntilDecided = Annotated[
    bool, typer.Option("--until-decided", help="Add seeds in steps and stop when every verdict is in.")
]
TuneOnce = Annotated[
    bool, typer.Option("--tune-once", help="Tune once for all seeds: cheap, but judges configurations, not methods.")
]
ExecutorOption = Annotated[
    str, typer.Option("--executor", help="inline: in this process; local: worker processes; ray: a Ray cluster.")
]
Workers = Annotated[int | None, typer.Option(help="Most runs at once; unless given, one for each CPU.")]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT", help="Ray cluster to join, or auto; else RAY_ADDRESS, or a cluster started for this."
    ),
]
CpusPerRun = Annotated[float | None, typer.Option(help="CPUs that Ray keeps for each run; 1 unless given.")]
GpusPerRun = Annotated[float | None, typer.Option(help="GPUs that Ray keeps for each run; 0 unless given.")]


@app.command()
def models(
    names: Annotated[list[str] | None, typer.Argument(help="Models to get or make, unless they are there.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Get and make all of them.")] = False,
    as_json: Json = False,
) -> None:
    """List the models that tasks start from, or get and make them; they are kept in the user's cache."""
    from fairtrial.tasks import models as known

    for name in names or ():
        known.require_known(name)
    for name in known.SOURCES if everything else names or ():
        with redirect_stdout(sys.stderr), _status(name) as report:
            known.make(name, report)
    if as_json:
        _print_json(
            [
                {
                    "name": name,
                    "about": source.about,
                    "there": known.is_there(name),
                    "folder": str(known.folder_of(name)),
                }
                for name, source in known.SOURCES.items()
            ]
        )
        return
    from rich.text import Text

    from fairtrial.report.tables import table

    made = table("model", "what it is", "where")
    for name, source in known.SOURCES.items():
        where = str(known.folder_of(name)) if known.is_there(name) else f"missing: fairtrial models {name}"
        made.add_row(name, Text(source.about), Text(where, overflow="fold"))
    _console().print(made)


@app.command()
def compare(
    task: TaskArgument,
    choices: ChoicesArgument,
    trials: Trials = 8,
    seeds: Seeds = 10,
    until_decided: UntilDecided = False,
    tune_once: TuneOnce = False,
    executor: ExecutorOption = "local",
    workers: Workers = None,
    ray_address: RayAddress = None,
    cpus_per_run: CpusPerRun = None,
    gpus_per_run: GpusPerRun = None,
    store: StoreOption = None,
    log: Annotated[str | None, typer.Option(help="Also write every run for tensorboard, mlflow or wandb.")] = None,
    log_folder: Annotated[str, typer.Option(help="Where --log writes to.")] = "fairtrial-logs",
    as_json: Json = False,
) -> None:
    """Compare methods fairly: tuned with equal budgets, run on the same fresh seeds, judged with honest statistics."""
    if log is not None:
        from fairtrial.report.logs import check_log

        check_log(log, log_folder)
    carrying = _executor(executor, workers, ray_address, cpus_per_run, gpus_per_run)
    comparison = _compared(task, choices, trials, seeds, until_decided, tune_once, carrying, store)
    if log is not None:
        from fairtrial.report import logs

        with redirect_stdout(sys.stderr):
            print(f"look at the runs with: {logs.how_to_look(log, logs.log(comparison, log, log_folder))}")
    if as_json:
        _print_json(comparison.as_json())
        return
    from fairtrial.report.tables import verdict_table

    _console().print(verdict_table(comparison))


@app.command()
def report(
    task: TaskArgument,
    choices: ChoicesArgument,
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="FILE", help="Where to; else stdout.")] = None,
    form: Annotated[str, typer.Option("--format", help="html, md, csv or json.")] = "html",
    trials: Trials = 8,
    seeds: Seeds = 10,
    until_decided: UntilDecided = False,
    tune_once: TuneOnce = False,
    executor: ExecutorOption = "local",
    workers: Workers = None,
    ray_address: RayAddress = None,
    cpus_per_run: CpusPerRun = None,
    gpus_per_run: GpusPerRun = None,
    store: StoreOption = None,
) -> None:
    """Explain a comparison in one file; what has been run already is taken from the store."""
    from fairtrial import tasks as shipped
    from fairtrial.report.formats import FORMATS, as_text
    from fairtrial.report.origin import origin
    from fairtrial.report.output import check_output, write_output

    if form not in FORMATS:
        raise BadInput(f"no format {form!r}; there is: {', '.join(FORMATS)}")
    if output is not None:
        check_output(output)
    carrying = _executor(executor, workers, ray_address, cpus_per_run, gpus_per_run)
    comparison = _compared(task, choices, trials, seeds, until_decided, tune_once, carrying, store)
    text = as_text(comparison, origin(comparison, shipped.load), form)
    if output is None:
        sys.stdout.write(text)
    else:
        write_output(output, text)
        typer.echo(f"{output} is written.")


def _check_literals(methods: str) -> None:
    """Refuse `key=false`: it would be read as a text, which is true."""
    from fairtrial.trial.recipe import parse_choices

    for choice in parse_choices(methods):
        for key, value in choice.params.items():
            meant = {"true": "True", "false": "False", "none": "None", "null": "None"}.get(str(value))
            if meant is not None:
                raise BadInput(f"{choice.name}: write {key}={meant}, as in Python; got {value}")


def _compared(
    task: str,
    choices: Sequence[str],
    trials: int,
    seeds: int,
    until_decided: bool,
    tune_once: bool,
    executor: "Executor",
    store: str | None,
) -> "Comparison":
    from fairtrial import tasks as shipped
    from fairtrial.trial.comparison import compare as compare_recipes
    from fairtrial.trial.store import Store, default_store

    wanted: dict[str, str] = {}
    for text in choices:
        slot, equals, methods = text.partition("=")
        if not equals:
            raise BadInput(f"cannot read {text!r}: write SLOT=METHOD,METHOD")
        if slot.strip() in wanted:
            raise BadInput(f"the slot {slot.strip()!r} is named twice; write its methods in one list")
        _check_literals(methods)
        wanted[slot.strip()] = methods
    with (
        redirect_stdout(sys.stderr),  # a person's task may print; the result stands alone on stdout
        executor,
        Store(store or default_store()) as kept,
        _progress() as progress,
    ):
        try:
            return compare_recipes(
                shipped.load,
                task,
                wanted,
                executor=executor,
                store=kept,
                trials=trials,
                seeds=seeds,
                until_decided=until_decided,
                tune_once=tune_once,
                progress=progress,
            )
        except KeyboardInterrupt:
            raise _interrupted(kept) from None


def _interrupted(store: "Store") -> "Interrupted":
    return Interrupted(
        f"interrupted; the runs that had ended are kept in {store.location}: the same command goes on from there"
    )


@app.command()
def calibrate(
    task: TaskArgument = "digits",
    runs: Annotated[int, typer.Option(help="Runs of the baseline from which comparisons are drawn.")] = 400,
    comparisons: Annotated[int, typer.Option(help="How many are drawn for each figure.")] = 10_000,
    trials: Annotated[int, typer.Option(help="Tuning runs before each run; without, it has the defaults.")] = 0,
    executor: ExecutorOption = "local",
    workers: Workers = None,
    ray_address: RayAddress = None,
    cpus_per_run: CpusPerRun = None,
    gpus_per_run: GpusPerRun = None,
    store: StoreOption = None,
    record: Annotated[bool, typer.Option("--record", help="Keep the figures with fairtrial.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the bench on itself: false verdicts, power and coverage, on a task's baseline against itself."""
    from fairtrial import tasks as shipped
    from fairtrial.report import recorded
    from fairtrial.report.output import check_output
    from fairtrial.trial.calibration import calibrate as calibrate_bench
    from fairtrial.trial.store import Store, default_store

    if record and task not in shipped.names():
        raise BadInput(f"--record is for the tasks that ship with fairtrial, not for {task}; --json prints the same")
    if record:
        check_output(recorded.place(task, trials))
    with (
        redirect_stdout(sys.stderr),
        _executor(executor, workers, ray_address, cpus_per_run, gpus_per_run) as carrying,
        Store(store or default_store()) as kept,
        _progress() as progress,
    ):
        try:
            calibration = calibrate_bench(
                shipped.load,
                task,
                executor=carrying,
                store=kept,
                runs=runs,
                comparisons=comparisons,
                trials=trials,
                progress=progress,
                drawing=lambda pool: print(f"drawing comparisons from the pool {pool}", flush=True),
            )
        except KeyboardInterrupt:
            raise _interrupted(kept) from None
    found = recorded.recorded(calibration, shipped.load(task), task)
    if record:
        recorded.write(found)
    if as_json:
        _print_json(found.as_json())
        return
    from fairtrial.report.calibration import calibration_tables

    _console().print(calibration_tables(calibration))


def _executor(
    name: str, workers: int | None, ray_address: str | None, cpus_per_run: float | None, gpus_per_run: float | None
) -> "Executor":
    from fairtrial import tasks as shipped
    from fairtrial.trial.execute import Inline, Local

    if workers is not None and workers < 1:
        raise BadInput(f"--workers must be at least 1, got {workers}")
    if name == "ray":
        return _on_ray(workers, ray_address, cpus_per_run, gpus_per_run)
    if (ray_address, cpus_per_run, gpus_per_run) != (None, None, None):
        raise BadInput("--ray-address, --cpus-per-run and --gpus-per-run need --executor ray")
    if name == "local":
        return Local(shipped.load, workers or os.cpu_count() or 1)
    if name != "inline":
        raise BadInput(f"no executor {name!r}; there is: inline, local, ray")
    if workers not in (None, 1):
        raise BadInput(f"--workers {workers} needs --executor local; inline has one")
    return Inline(shipped.load)


def _on_ray(workers: int | None, address: str | None, cpus: float | None, gpus: float | None) -> "Executor":
    from fairtrial import tasks as shipped

    try:
        from fairtrial.trial.ray_executor import Ray
    except ImportError as error:
        raise BadInput(f"--executor ray needs an extra: pip install 'fairtrial[ray]' ({error})") from None
    address = address or os.environ.get("RAY_ADDRESS") or None
    return Ray(
        shipped.load,
        address=address,
        workers=workers,
        cpus=1 if cpus is None else cpus,
        gpus=0 if gpus is None else gpus,
    )


@app.command()
def check(
    slugs: Annotated[list[str] | None, typer.Argument(metavar="SLUG…", help="Papers to check.")] = None,
    family: Annotated[str | None, typer.Option(help="All papers of a family.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All papers that can be checked.")] = False,
    record: Annotated[bool, typer.Option("--record", help="Write the evidence into the catalogue.")] = False,
    workers: Annotated[int | None, typer.Option(help="Worker processes; one for each CPU unless given.")] = None,
    as_json: Json = False,
) -> None:
    """Measure papers' claims again, beside the papers' own figures."""
    from fairtrial.catalog import EVIDENCE, as_table, write
    from fairtrial.claims.check import check as measure_claims
    from fairtrial.claims.measure import Measure

    if workers is not None and workers < 1:
        raise BadInput(f"--workers must be at least 1, got {workers}")
    catalogue = _catalogue()
    documents = []
    for paper in _to_check(catalogue, slugs or [], family, everything):
        with _status(paper.slug) as say:
            evidence = measure_claims(paper, Measure(workers, say))
        if record:
            write(evidence, EVIDENCE / f"{paper.slug}.json")
        documents.append({**as_table(evidence), "recorded": record})
        if not as_json:
            _print_findings(paper, evidence.findings)
    if as_json:
        _print_json(documents)


def _to_check(catalogue: "Catalogue", slugs: Sequence[str], family: str | None, everything: bool) -> "list[Paper]":
    from fairtrial.claims.code import checkable

    if bool(slugs) + (family is not None) + everything != 1:
        raise BadInput("say what to check: slugs, --family or --all, one of the three")
    if slugs:
        return [catalogue[slug] for slug in slugs]
    papers = [p for p in catalogue.search("", family=family) if checkable(p.slug)]
    if not papers:
        raise BadInput(f"no paper of the family {family!r} can be checked yet")
    return papers


def _print_findings(paper: "Paper", findings: "Sequence[Finding]") -> None:
    from rich.padding import Padding
    from rich.text import Text

    from fairtrial.report.tables import coloured

    console = _console()
    console.print(Text(f"{paper.slug}: {paper.title}", style="bold"))
    for finding in findings:
        claim = next(claim for claim in paper.claims if claim.id == finding.claim)
        console.print(Text(f"\n{claim.id}: ", style="bold") + coloured(finding.verdict))
        console.print(Padding(Text(claim.statement), (0, 0, 0, 2)))
        console.print(Padding(Text(f"paper ({claim.figure_source}): {claim.figure}"), (0, 0, 0, 2)))
        console.print(Padding(Text(f"criterion: {finding.criterion}", style="dim"), (0, 0, 0, 2)))
        _print_finding(console, finding)
    console.print()


def _print_finding(console: "Console", finding: "Finding") -> None:
    from rich.padding import Padding
    from rich.text import Text

    from fairtrial.report.tables import measurement_table

    if finding.measurements:
        console.print(Padding(measurement_table(finding.measurements), (1, 0, 0, 2)))
    if finding.note:
        console.print(Padding(Text(finding.note), (1, 0, 0, 2)))


@app.command()
def runs(
    task: Annotated[str | None, typer.Option(help="Only runs of this task.")] = None,
    ended: Annotated[str | None, typer.Option(help="Only runs that finished, pruned, diverged or died.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = 20,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """List recorded runs."""
    from dataclasses import asdict

    from fairtrial.trial.store import Store, default_store

    if ended not in (None, "finished", "pruned", "diverged", "died"):
        raise BadInput(f"--ended must be finished, pruned, diverged or died, got {ended!r}")
    location = store or default_store()
    if "://" not in location and not Path(location).expanduser().exists():
        raise BadInput(f"no store at {location}: nothing has been run yet")
    with Store(location) as kept:
        found = kept.list(task=task, ended=ended, limit=limit)
    if as_json:
        _print_json([asdict(run) for run in found])
        return
    from fairtrial.report.tables import run_lines

    typer.echo("\n".join(run_lines(found)) if found else "No run fits.")
    for run in found:
        if run.outcome.error and ended is not None:
            typer.echo(f"\n{run.recorded} {run.task}, seed {run.seed}:\n{run.outcome.error}")


@app.command("upgrade-store")
def upgrade_store(store: StoreOption = None, as_json: Json = False) -> None:
    """Bring a store that an older fairtrial made up to date; all its runs stay."""
    from fairtrial.trial.migrations import upgrade
    from fairtrial.trial.schema import SCHEMA_VERSION
    from fairtrial.trial.store import default_store

    location, had = upgrade(store or default_store())
    if as_json:
        _print_json({"store": location, "had": had, "has": SCHEMA_VERSION})
    elif had == SCHEMA_VERSION:
        typer.echo(f"The store {location} has schema version {had} already: there is nothing to do.")
    else:
        typer.echo(f"The store {location} had schema version {had} and has version {SCHEMA_VERSION} now.")


@app.command("new-task")
def new_task(
    file: Annotated[Path, typer.Argument(help="The file to write.")],
    as_json: Json = False,
) -> None:
    """Write a commented, working task of your own to start from."""
    from fairtrial import tasks as shipped

    shipped.new_task(file)
    if as_json:
        _print_json({"file": str(file)})
        return
    typer.echo(f"{file} is written. Try it: fairtrial compare {file} optimizer=AdamW,SGD")


@app.command()
def doctor(store: StoreOption = None, as_json: Json = False) -> None:
    """Say what fairtrial finds on this machine, and whether it can work here."""
    from fairtrial.report.doctor import examine

    found = examine(store)
    if as_json:
        _print_json([{"what": item.what, "ok": item.ok, "found": item.found} for item in found])
    else:
        from rich.text import Text

        from fairtrial.report.tables import table

        made = table("", "what", "found")
        for item in found:
            made.add_row(Text("ok", "green") if item.ok else Text("no", "red"), item.what, Text(item.found))
        _console().print(made)
    if not all(item.ok for item in found):
        raise typer.Exit(1)


class Interrupted(Exception):
    """Ctrl-C, with what to tell the person."""


def _catalogue() -> "Catalogue":
    from fairtrial.catalog import Catalogue
    from fairtrial.claims.code import code_of
    from fairtrial.methods.registry import addresses

    return Catalogue.load(addresses(), code_of)


def _paper_json(catalogue: "Catalogue", paper: "Paper") -> dict[str, Any]:
    return {
        "slug": paper.slug,
        "family": paper.family,
        "title": paper.title,
        "arxiv": paper.arxiv,
        "date": paper.date.isoformat(),
        "authors": paper.authors,
        "code": paper.code,
        "summary": paper.summary,
        "status": catalogue.status(paper.slug),
        "stale": catalogue.stale(paper.slug),
        "methods": list(catalogue.methods(paper.slug)),
        "claims": [
            {
                "id": status.claim.id,
                "statement": status.claim.statement,
                "figure": status.claim.figure,
                "figure_source": status.claim.figure_source,
                "protocol": status.claim.protocol,
                "untestable": status.claim.untestable,
                "verdict": status.verdict,
            }
            for status in catalogue.claims(paper.slug)
        ],
    }


def _print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _console(*, stderr: bool = False) -> "Console":
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 160, soft_wrap=False, highlight=False)


@contextmanager
def _progress() -> Iterator[Callable[..., None]]:
    """Live progress on a terminal, a plain line now and then elsewhere; both on stderr."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if not sys.stderr.isatty():
        yield _plain_lines()
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs · {task.fields[running]} running · {task.fields[failed]} failed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console(stderr=True), transient=True) as bar:
        shown = bar.add_task("", total=None, running=0, failed=0)

        def told(*, done: int, total: int, running: int, failed: int, stored: int) -> None:
            bar.update(shown, completed=done, total=total, running=running, failed=failed)

        yield told


def _plain_lines() -> Callable[..., None]:
    import time

    started = last = time.monotonic()

    def told(*, done: int, total: int, running: int, failed: int, stored: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < 10 and done < total:
            return
        last = now
        fresh = done - stored
        left = f", about {(now - started) / fresh * (total - done):.0f} s left" if fresh and done < total else ""
        print(
            f"{done} of {total} runs done ({stored} from the store), {running} running, {failed} failed{left}",
            file=sys.stderr,
            flush=True,
        )

    return told


@contextmanager
def _status(slug: str) -> Iterator[Callable[[str], None]]:
    console = _console(stderr=True)
    if not sys.stderr.isatty():
        yield lambda line: None
        return
    with console.status(slug) as status:
        yield lambda line: status.update(f"{slug}: {line}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: one line on stderr and exit 2 for bad input, 130 for Ctrl-C; `--debug` shows the traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--debug" in given and given[0] != "--debug":  # accepted anywhere
        given.remove("--debug")
        given.insert(0, "--debug")
    try:
        sys.exit(app(given, prog_name="fairtrial", standalone_mode=False) or 0)
    except (Interrupted, KeyboardInterrupt) as stop:
        _complain(str(stop) or "interrupted", given)
        sys.exit(130)
    except typer.Abort:
        sys.exit(130)
    except UsageError as error:
        _complain(error.format_message().replace("\n", " "), given)
        sys.exit(2)
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except ValueError as error:
        from fairtrial.catalog import CatalogError

        if not isinstance(error, BadInput | CatalogError):
            raise
        _complain(str(error), given)
        sys.exit(2)


def _complain(message: str, given: Sequence[str]) -> None:
    if "--debug" in given:
        import traceback

        traceback.print_exc()
    print(f"fairtrial: {message}", file=sys.stderr)
