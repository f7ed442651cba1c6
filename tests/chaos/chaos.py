"""The chaos suite: many migrations, each with faults at moments drawn from a seed.

::

    make chaos                                       200 migrations
    .venv/bin/python tests/chaos/chaos.py --seed 17 --runs 1 --logs    one of them again
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS / "chaos"), str(TESTS / "helpers")]
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # before gRPC is loaded: children are forked while it runs

import click  # noqa: E402
from chaos_plan import Plan, make_plan  # noqa: E402
from chaos_run import Result, play  # noqa: E402

OUTCOMES = ("moved", "rolled back", "refused", "lost with its VMM", "FAILED")


def table(results: Sequence[Result]) -> str:
    """Faults injected against outcomes. A migration with two faults stands in two lines."""
    counts: Counter[tuple[str, str]] = Counter()
    for result in results:
        for title in {f"{fault.title}, {fault.place}" for fault in result.injected} or {"(none came to its moment)"}:
            counts[title, result.outcome] += 1
    titles = sorted({title for title, _ in counts})
    width = max([5, *map(len, titles)])
    lines = [f"{'fault':<{width}}" + "".join(f"  {name:>17}" for name in OUTCOMES)]
    for title in titles:
        lines.append(f"{title:<{width}}" + "".join(f"  {counts[title, name] or '':>17}" for name in OUTCOMES))
    totals = Counter(result.outcome for result in results)
    lines.append(f"{'migrations':<{width}}" + "".join(f"  {totals[name]:>17}" for name in OUTCOMES))
    return "\n".join(lines)


def tell(plan: Plan, result: Result) -> str:
    """One line of progress."""
    problem = f": {result.problem}" if result.problem else ""
    return f"seed {plan.seed:>6}  {result.took_s:5.1f} s  {result.outcome}{problem}  [{plan}]"


@click.command()
@click.option("--runs", type=click.IntRange(1, 100_000), default=200, show_default=True, help="Migrations.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the first one; each has the next.")
@click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="At the same time.")
@click.option("--logs", is_flag=True, help="Print the logs of each failure.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end, nothing else.")
def main(runs: int, seed: int, jobs: int, logs: bool, as_json: bool) -> None:
    """Migrates again and again while things break, and tells what became of each."""
    plans = [make_plan(number) for number in range(seed, seed + runs)]
    results = []
    with ProcessPoolExecutor(jobs) as pool:
        for plan, result in zip(plans, pool.map(play, plans), strict=True):
            results.append(result)
            if not as_json:
                click.echo(f"{len(results):>4}/{runs}  {tell(plan, result)}")
                if logs and result.logs:
                    click.echo(result.logs)
    failed = [result for result in results if result.outcome == "FAILED"]
    if as_json:
        rows = [
            {
                "seed": plan.seed,
                "vmm": plan.config.kind.value,
                "outcome": result.outcome,
                "problem": result.problem,
                "faults": [str(fault) for fault in result.injected],
                "receivers": result.receivers,
                "took_s": round(result.took_s, 2),
            }
            for plan, result in zip(plans, results, strict=True)
        ]
        click.echo(json.dumps({"runs": runs, "failed": len(failed), "migrations": rows}))
    else:
        click.echo(table(results))
        for result in failed:
            click.echo(f"again: {sys.executable} {Path(__file__)} --seed {result.seed} --runs 1 --logs", err=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
