"""All tests, on two cores: those with policy servers here, the others beside them, their output afterwards.

    python scripts/run_tests.py [any pytest argument]

Never two vLLM servers at a time: the tests that may start one are in `tests/e2e`, marked `e2e` and not `no_policy`,
and run one after another. In both lanes what takes seconds comes first, and the slowest tests are listed.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

LOG = Path(__file__).resolve().parents[1] / ".setup" / "unit-tests.log"
NO_TESTS_COLLECTED = 5
BESIDE = "not e2e or no_policy"


def main(arguments: list[str]) -> int:
    started = time.monotonic()
    pytest = [sys.executable, "-m", "pytest", "--durations=25", *arguments]
    folder = [] if arguments else ["tests/e2e"]  # with arguments, the marks find the tests that start policy servers
    servers = subprocess.Popen([*pytest, *folder, "-m", f"not ({BESIDE})"])
    with LOG.open("w") as log:
        # The lane with servers is the longer one: it goes first where both want a core.
        beside = ["nice", "-n", "5", *pytest, "-m", BESIDE, "--color=no"]
        unit = subprocess.Popen(beside, stdout=log, stderr=subprocess.STDOUT)
    print(f"tests without policy servers run beside these; their output: {LOG}", flush=True)
    # Ctrl-C reaches both as well; they stop their servers first, and are waited for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    codes = [process.wait() for process in (servers, unit)]
    print(f"\ntests without policy servers:\n{LOG.read_text()}", flush=True)
    print(f"all tests took {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
    ran = [code for code in codes if code != NO_TESTS_COLLECTED]
    return max(map(abs, ran)) if ran else NO_TESTS_COLLECTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
