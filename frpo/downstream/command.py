"""Implement `frpo retention`: run the missing stages of a matrix, then report all results in terminal and page."""
from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from frpo.downstream.archive import write_archive
from frpo.downstream.checks import check_plan, forget_heldout
from frpo.downstream.choice import is_lacking
from frpo.downstream.jobs import run_in_jobs
from frpo.downstream.plan import Plan
from frpo.downstream.reading import collect
from frpo.downstream.report import RESULTS, page_title, section_of, sentences, write_results
from frpo.downstream.results import Results
from frpo.downstream.stages import run_plan
from frpo.downstream.tables import all_tables
from frpo.held import held_folder
from frpo.report.page import TableText, write_page

REPORT = "report.html"
FEW_PROBES = 4
"""Entries of `measure.at` below which a dry run warns."""
WIDTH, LONG = 120, 40
"""Least width of tables in characters, and the cell length above which a column is aligned left as text."""


def run_retention(plan: Plan, jobs: int = 1) -> int:
    """Run the missing stages and print all results. Returns 0 if no stage failed. Returns 1 if a stage failed, or if no
    policy has a measure that `choose` needs.
    """
    found = run_matrix(plan, jobs)
    return 1 if found.failures or is_lacking(found) else 0


def run_matrix(plan: Plan, jobs: int = 1) -> Results:
    """Run the missing stages of a matrix, print its tables, write its page.

    jobs: number of processes over which the seeds are spread.
    """
    started = time.perf_counter()
    plan.check_done()
    with held_folder(Path(plan.recipe.run.dir)):
        forget_heldout(Path(plan.recipe.run.dir))
        archive = write_archive(plan.recipe)
        if jobs > 1:
            run_in_jobs(plan, archive, jobs)
        else:
            run_plan(plan)
        found = collect(plan)
        show(all_tables(found))
        for line in (*sentences(found), *(f"! {warning}" for warning in found.warnings)):
            print(line)
        print(f"{(time.perf_counter() - started) / 60:.1f} minutes. Report: {write_report(found)}")
    return found


def run_part(plan: Plan) -> int:
    """Run the stages of some seeds; another process reports the results. Returns 0 if all stages are done, else 1."""
    run_plan(plan)
    return 0 if all(stage.done for stage in plan.stages) else 1


def write_report(found: Results) -> Path:
    """Write results, pictures and page into the matrix's folder; return the page's path."""
    folder = Path(found.plan.recipe.run.dir)
    write_results(found, folder / RESULTS)
    return write_page(page_title(found), [section_of(found, folder)], folder / REPORT)


def show(tables: Sequence[TableText]) -> None:
    """Print the tables."""
    console = Console()
    console.width = max(console.width, WIDTH)
    for table in tables:
        console.print(_table(table.narrow))


def check_and_show(plan: Plan) -> int:
    """Check everything that needs no engine, then print the stages of a plan. Do not run any stage."""
    unmade = check_plan(plan)
    for stage in plan.stages:
        state = "done" if stage.done else f"failed: {stage.failure}" if stage.failure else "to be run"
        print(f"{stage.name}: {state}  ({stage.run_dir})")
    print("# checked: recipes, models, data, rewards, held-out prompts; not checked: files that stages will make")
    if unmade:
        print(f"# not checked, because the setup has not made their files yet: {'; '.join(unmade)}")
    at = plan.recipe.measure.at
    if at is not None and len(at) < FEW_PROBES and plan.recipe.regimes:
        print(f"# note: measure.at lists only {len(at)} updates. The KL may jump between probes, and means over KL may "
              "be left blank; leave measure.at out, so that probes follow the KL")
    return 0


def _table(table: TableText) -> Table:
    first, *rows = [[escape(cell) for cell in row] for row in (table.columns, *table.rows)]
    shown = Table(*first, title=escape(f"{table.title}\n{table.note}"))
    for column in shown.columns:
        column.overflow = "fold"
    for column, *cells in zip(shown.columns[1:], *(row[1:] for row in rows)):
        column.justify = "left" if any(len(cell) > LONG for cell in cells) else "right"
    for row in rows:
        shown.add_row(*row)
    return shown
