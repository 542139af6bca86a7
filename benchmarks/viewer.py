"""What `trl-gym view` costs: seconds to write the page, its size, and how long a browser takes until it can be used.

    .venv/bin/python benchmarks/viewer.py [--rollouts 5000] [--calls 3] [--words 30] [--run DIR] [--browser-runs 5]

Made-up rollouts of three environments, of one to `--calls` model calls, with conversation, token ids,
log-probabilities of both sides and times; or those of a run. Long rollouts: `--rollouts 500 --calls 30 --words 100`.
The page is opened in headless Chromium with an empty profile; *usable* is from navigation until the first rows of the
table of rollouts are in the document, *search* until a text that occurs in most conversations has been looked for in
all of them. Medians. CPU and the peak of memory are of the process that writes the page.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.report.browser import Browser, browser  # noqa: E402
from tests.report.synthetic import Plan, write_repeated, write_run  # noqa: E402
from trl_gym.report import open_run, write_page  # noqa: E402
from trl_gym.rollouts.journal import read_journal  # noqa: E402

_FOUND = "current.hash.includes('text=') && /^[0-9,]+ of/.test(document.querySelector('.count')?.innerText ?? '')"


def make_run(folder: Path, rollouts: int, words: int, calls: int) -> Path:
    """A run of at least so many rollouts: one of a few steps, repeated at later ones."""
    seed = folder / "seed"
    records = write_run(seed, Plan(steps=10, words=words, calls=calls))
    run = folder / "run"
    write_repeated(run, records, times=-(-rollouts // len(records)))
    (seed / "checkpoint-10").rename(run / "checkpoint-10")
    return run


def seconds_until(page: Browser, start: str, ready: str) -> float:
    """In the page's own clock, so that the way to it does not count."""
    script = f"""new Promise((done) => {{
        const begin = performance.now();
        const look = () => ({ready}) ? done(performance.now() - begin) : setTimeout(look, 2);
        {start};
        look();
    }})"""
    return page.run(script) / 1000


def measure_browser(path: Path, repeats: int) -> dict[str, float]:
    usable, search, memory = [], [], []
    for _ in range(repeats):
        with browser() as page:
            page.resize(1280, 860)
            page.open(path, "#rollouts")
            page.wait("document.querySelectorAll('#view .rows .row').length > 5")
            # Of the page's own marks: when it was asked for, and when the first row was drawn.
            usable.append(page.run("performance.getEntriesByName('usable')[0].startTime") / 1000)
            search.append(seconds_until(page, "go('#rollouts?text=calendars')", _FOUND))
            memory.append(page.run("performance.memory.usedJSHeapSize") / 1e6)
    return {
        "usable_s": round(statistics.median(usable), 2),
        "search_s": round(statistics.median(search), 2),
        "heap_MB": round(statistics.median(memory), 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=5000)
    parser.add_argument("--calls", type=int, default=3, help="most model calls of a made-up rollout")
    parser.add_argument("--words", type=int, default=30, help="most words per model call of a made-up rollout")
    parser.add_argument("--run", type=Path, help="a run to view, instead of a made-up one")
    parser.add_argument("--browser-runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or make_run(Path(folder), options.rollouts, options.words, options.calls)
        journal = sum(path.stat().st_size for path in (run / "rollouts").glob("*.jsonl"))
        target = Path(folder) / "view.html"
        started, cpu = time.perf_counter(), time.process_time()
        page = write_page(open_run(run), target)
        written, cpu = time.perf_counter() - started, time.process_time() - cpu
        figures = {
            "rollouts": page.shown,
            "tokens_each": round(
                statistics.fmean(
                    len(r["prompt_ids"]) + len(r["completion_ids"]) for r in read_journal(run / "rollouts")
                )
            ),
            "journal_MB": round(journal / 1e6, 1),
            "page_MB": round(page.size / 1e6, 1),
            "write_s": round(written, 1),
            "write_cpu_ms_each": round(1e3 * cpu / page.shown, 2),
            "peak_MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
            **measure_browser(target, options.browser_runs),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
