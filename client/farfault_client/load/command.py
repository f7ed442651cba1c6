"""The command ``farfault load``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from farfault_cli.errors import FarfaultError, SloError, UsageError, VerificationError
from farfault_cli.logs import configure_logging
from farfault_cli.sizes import RATE

from farfault_client.load.plan import (
    CONNECTIONS_MAX,
    DURATION_MAX_S,
    PAGES_PER_REQUEST,
    PROCESSES_MAX,
    VCPUS_MAX,
    Arrivals,
    PatternKind,
)
from farfault_client.load.slo import TRIES
from farfault_client.options import FILE, log_options, source_options

SERVE_SEED = 1
"""What `farfault serve --synthetic` takes where it is told no seed."""
PATTERNS = [kind.value for kind in PatternKind if kind is not PatternKind.REPLAY]


@click.command()
@source_options
@click.option("--vcpus", type=click.IntRange(1, VCPUS_MAX), default=8, show_default=True, help="Virtual vCPUs.")
@click.option("--rate", type=click.FloatRange(0.1), metavar="FAULTS/S", help="Open loop: faults due each second.")
@click.option(
    "--arrivals",
    type=click.Choice([Arrivals.CONSTANT.value, Arrivals.POISSON.value]),
    default=Arrivals.CONSTANT.value,
    show_default=True,
    help="When the faults of an open loop are due: evenly, or independently of each other.",
)
@click.option("--closed", is_flag=True, help="Closed loop even with --slo or --replay.")
@click.option("--pattern", type=click.Choice(PATTERNS), default="random", show_default=True, help="Pages touched.")
@click.option("--stride", type=click.IntRange(1), default=16, show_default=True, metavar="PAGES", help="Of `stride`.")
@click.option(
    "--zipf-exponent", type=click.FloatRange(0.01, 10), default=0.99, show_default=True, help="Skew of `zipf`."
)
@click.option("--replay", type=FILE, metavar="TRACE", help="Touch what a trace recorded, when it did.")
@click.option("--speed", type=click.FloatRange(0.001, 1000), default=1.0, show_default=True, help="Of the replay.")
@click.option(
    "--read-write",
    default="100:0",
    show_default=True,
    metavar="R:W",
    help="Mix of accesses. A write needs the rest of its page, so it fetches just as a read does; it is counted apart.",
)
@click.option(
    "--refetch",
    is_flag=True,
    help="Every access is a fault. Without it a page is fetched once, as a guest does, and later accesses hit it.",
)
@click.option("--random-seed", type=int, default=1, show_default=True, help="Of patterns, mix and arrivals.")
@click.option(
    "--seed",
    type=int,
    help=f"Of the server's synthetic memory: every byte is compared with it.  [default: {SERVE_SEED}, as the server's]",
)
@click.option("--duration", type=click.FloatRange(0.1, DURATION_MAX_S), metavar="SECONDS", help="Default: 10.")
@click.option("--warmup", type=click.FloatRange(0, 600), metavar="SECONDS", help="Not counted. Default: 1; replay: 0.")
@click.option("--pages", type=click.IntRange(1), help="End after so many pages (and --duration, then 600 s).")
@click.option("--connections", type=click.IntRange(1, CONNECTIONS_MAX), help="Default: one for each process.")
@click.option("--processes", type=click.IntRange(1, PROCESSES_MAX), default=1, show_default=True, help="Of vCPUs.")
@click.option(
    "--pages-per-request",
    type=click.IntRange(1, 4096),
    default=PAGES_PER_REQUEST,
    show_default=True,
    help="Faults that wait at the same moment travel together, up to so many.",
)
@click.option("--background", is_flag=True, help="Stream memory over the background lane beside, in its own process.")
@click.option("--background-rate", type=RATE, default=0, help="Cap of that stream.")
@click.option(
    "--slo",
    multiple=True,
    metavar="FIGURE=TIME",
    help="For example p99=1ms. Alone: find the highest rate that holds it; with --rate, --closed or --replay: judge.",
)
@click.option("--rate-first", type=click.FloatRange(1), default=500.0, show_default=True, help="First rate of --slo.")
@click.option("--rate-last", type=click.FloatRange(1), default=1e6, show_default=True, help="Highest rate of --slo.")
@click.option("--step", type=click.FloatRange(0.1, 3600), default=3.0, show_default=True, help="Seconds at each rate.")
@click.option(
    "--tries",
    type=click.IntRange(1, 10),
    default=TRIES,
    show_default=True,
    help="A rate of --slo is broken if it breaks so many times in a row; more where the hosts are busy otherwise.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end, nothing else.")
@click.option("--csv", "csv_path", type=FILE, metavar="FILE", help="Write one row for each second.")
@click.option("--html", "html_path", type=FILE, metavar="FILE", help="Write a report with plots; one file.")
@click.option("--compare", "compare_path", type=FILE, metavar="EARLIER.json", help="Ratios to an earlier --json.")
@log_options
def load(log_level: str, json_logs: bool, **options: Any) -> None:
    """Load a page server with faults, and measure how long they wait.

    Virtual vCPUs touch pages and wait for them. In a closed loop (default) each waits for its page before it touches
    the next: N vCPUs, at most N faults at a time. In an open loop (--rate) faults are due at fixed times, whatever the
    server does, and their latency counts from then; so a server that stalls is charged with every fault that it
    delayed. Pages of `farfault serve --synthetic` are compared with their seed byte by byte, others by checksum.

    The load test takes clone leases, which only read: it may run against a server whose VM is on the move.

    \b
    A server that needs no RAM, and eight vCPUs on it:
        farfault serve --synthetic 64GiB --seed 7
        farfault load --source 127.0.0.1:7777 --seed 7
    Does it hold 5,000 faults/s?
        farfault load --source src:7777 --rate 5000 --slo p99=1ms
    Up to which rate do 99 % of the faults take less than 1 ms?
        farfault load --source src:7777 --slo p99=1ms --html report.html
    While memory streams beside, over four connections from two processes:
        farfault load --source src:7777 --vcpus 32 --connections 4 --processes 2 --background
    Was yesterday's build faster?
        farfault load --source src:7777 --json > today.json
        farfault load --source src:7777 --compare yesterday.json
    A recorded trace (lines of `seconds vcpu page [r|w]`), twice as fast:
        farfault load --source src:7777 --replay vm.trace --speed 2

    Exit codes: 0 all is well, 1 faults failed, 2 wrong use, 6 unreachable, 7 wrong pages, 8 an objective is broken.
    Ctrl-C and SIGTERM end the measurement early; what was measured is shown.
    """
    configure_logging(level=log_level, as_json=json_logs)
    from farfault_client.load.compare import compare, read_earlier
    from farfault_client.load.csv_file import write_csv
    from farfault_client.load.director import direct
    from farfault_client.load.text import text_of

    if options["source"] is None:
        raise UsageError("--source HOST:PORT is missing", "name a page server; `farfault serve --synthetic` is one")
    as_json, html_path = options["as_json"], options["html_path"]
    earlier = read_earlier(options["compare_path"]) if options["compare_path"] else None
    figures, steps = direct(described(options), quiet=as_json)
    if earlier is not None:
        figures["compare"] = compare(figures, earlier)
    if options["csv_path"] is not None:
        write_csv(options["csv_path"], steps)
    if html_path is not None:
        from farfault_client.load.html_report import write_html

        write_html(html_path, figures)
    click.echo(json.dumps(figures) if as_json else text_of(figures))
    judge(figures)


def judge(figures: dict[str, Any]) -> None:
    """Raises what the command ends with: wrong pages weigh more than errors, those more than a broken objective."""
    wrong, errors, slo = figures["verification_errors"], figures["errors"], figures["slo"]
    if wrong:
        seed_hint = "check that --seed is the server's" if figures["verified_by"] == "seed" else "check link and memory"
        raise VerificationError(f"{wrong:,} pages or answers were wrong", seed_hint)
    if errors:
        why = ", ".join(figures["refusals"]) or "no answer came"
        raise FarfaultError(f"{errors:,} faults failed: {why}", "see the page server's log")
    if not figures["pages"]:
        raise FarfaultError("no page was measured", "give a longer --duration or a shorter --warmup")
    if slo is not None and not slo["holds"]:
        raise SloError("the objective is broken: " + "; ".join(slo["broken"]))


def described(options: dict[str, Any]) -> Any:
    """The test that the command line describes.

    Raises:
        UsageError: options that do not go together.
    """
    from farfault_client.load.director import LoadTest
    from farfault_client.load.plan import PatternPlan, ServerPlan
    from farfault_client.load.slo import parse_objectives

    replay: Path | None = options["replay"]
    objectives = parse_objectives(options["slo"]) if options["slo"] else ()
    rate, closed, processes = options["rate"], options["closed"], options["processes"]
    if rate is not None and closed:
        raise UsageError("--rate and --closed exclude each other", "an open loop has a rate, a closed one has vCPUs")
    connections = options["connections"] or processes
    if connections < processes:
        raise UsageError(f"--connections {connections} for --processes {processes}", "each process needs a connection")
    if options["vcpus"] < processes and replay is None:
        raise UsageError(f"--vcpus {options['vcpus']} for --processes {processes}", "each process needs a vCPU")
    if options["background_rate"] and not options["background"]:
        raise UsageError("--background-rate needs --background")
    arrivals = Arrivals(options["arrivals"])
    if replay is not None and rate is None and not closed:
        arrivals = Arrivals.RECORDED
    is_search = bool(objectives) and rate is None and not closed and replay is None
    duration_s = options["duration"] or (600.0 if options["pages"] else 10.0)
    warmup_s = options["warmup"] if options["warmup"] is not None else (0.0 if replay else 1.0)
    if replay is not None and options["duration"] is None:
        duration_s = DURATION_MAX_S
    return LoadTest(
        server=ServerPlan(
            target=options["source"],
            tls=str(options["tls"] or ""),
            insecure=options["insecure"],
            admission_token_file=str(options["admission_token_file"] or ""),
            express=not options["no_express"],
        ),
        pattern=PatternPlan(
            kind=PatternKind.REPLAY if replay else PatternKind(options["pattern"]),
            stride_pages=options["stride"],
            zipf_exponent=options["zipf_exponent"],
            write_share=write_share_of(options["read_write"]),
            refetch=options["refetch"],
            random_seed=options["random_seed"],
            trace=str(replay or ""),
            trace_speed=options["speed"],
        ),
        memory_seed=options["seed"] if options["seed"] is not None else SERVE_SEED,
        is_seed_given=options["seed"] is not None,
        vcpus=options["vcpus"],
        connections=connections,
        processes=processes,
        pages_per_request=options["pages_per_request"],
        background=options["background"],
        background_bytes_per_s=options["background_rate"],
        rate_per_s=rate,
        arrivals=arrivals,
        warmup_s=min(warmup_s, options["step"] / 2) if is_search else warmup_s,
        duration_s=options["step"] if is_search else duration_s,
        pages_max=options["pages"] or 0,
        objectives=objectives,
        is_search=is_search,
        rate_first_per_s=options["rate_first"],
        rate_last_per_s=options["rate_last"],
        tries=options["tries"],
    )


def write_share_of(mix: str) -> float:
    """The share of writes in ``READS:WRITES``. Raises UsageError."""
    reads, colon, writes = mix.partition(":")
    try:
        read_weight, write_weight = float(reads), float(writes)
        if colon and read_weight >= 0 and write_weight >= 0:
            return write_weight / (read_weight + write_weight)
    except (ValueError, ZeroDivisionError):
        pass
    raise UsageError(f"--read-write {mix!r} is no mix", "for example 80:20: eight reads for two writes")
