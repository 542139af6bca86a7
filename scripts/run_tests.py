"""All tests, on two cores: those with servers here, the others beside them, their output afterwards.

    python scripts/run_tests.py [any pytest argument]

Never two vLLM servers at a time: all tests that start one are marked `e2e` and run one after another.
"""

import signal
import subprocess
import sys
from pathlib import Path

LOG = Path(__file__).resolve().parents[1] / ".setup" / "unit-tests.log"
NO_TESTS_COLLECTED = 5


def main(arguments: list[str]) -> int:
    pytest = [sys.executable, "-m", "pytest", *arguments]
    with LOG.open("w") as log:
        unit = subprocess.Popen([*pytest, "-m", "not e2e", "--color=no"], stdout=log, stderr=subprocess.STDOUT)
    print(f"tests without servers run beside these; their output: {LOG}", flush=True)
    servers = subprocess.Popen([*pytest, "-m", "e2e"])
    # Ctrl-C reaches both as well; they stop their servers first, and are waited for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    codes = [process.wait() for process in (servers, unit)]
    print(f"\ntests without servers:\n{LOG.read_text()}", flush=True)
    ran = [code for code in codes if code != NO_TESTS_COLLECTED]
    return max(map(abs, ran)) if ran else NO_TESTS_COLLECTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
