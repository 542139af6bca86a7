"""All tests, on two cores: those with policy servers here, the others beside them, their output afterwards.

    python scripts/run_tests.py [any pytest argument]

Never two vLLM servers at a time: the tests that may start one are in `tests/e2e`, marked `e2e` and not `no_policy`,
and run one after another. Those with NeMo Gym servers alone wait more than they compute, so they have a lane of their
own beside the unit tests, and take some rooms of these along: both lanes end at about the same time. In each lane the
slowest tests are listed.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

LOGS = Path(__file__).resolve().parents[1] / ".setup"
NO_TESTS_COLLECTED = 5
SERVERS = "e2e and not no_policy"
BESIDE = {"gym": "e2e and no_policy", "unit": "not e2e"}  # name of the log → marks
# Their unit tests run in the lane of NeMo Gym.
ROOMS = ("tests/commands", "tests/gym", "tests/notebooks", "tests/recipes", "tests/report", "tests/scripts")


def main(arguments: list[str]) -> int:
    started = time.monotonic()
    pytest = [sys.executable, "-m", "pytest", "--durations=25", *arguments]
    places = {} if arguments else places_of()  # with arguments, the marks alone tell the lanes apart
    lanes = [subprocess.Popen([*pytest, "-m", SERVERS, *places.get("servers", [])])]
    for name, marks in BESIDE.items():
        # The lane with policy servers is the longer one: it goes first where all want a core.
        beside = ["nice", "-n", "8", *pytest, "-m", marks, *places.get(name, []), "--color=no"]
        with log_of(name).open("w") as log:
            lanes.append(subprocess.Popen(beside, stdout=log, stderr=subprocess.STDOUT))
    logs = " and ".join(str(log_of(name)) for name in BESIDE)
    print(f"tests without policy servers run beside these; their output: {logs}", flush=True)
    # Ctrl-C reaches all of them; they stop their servers first, and are waited for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    codes = [lane.wait() for lane in lanes]
    for name in BESIDE:
        print(f"\n{name} tests, without policy servers:\n{log_of(name).read_text()}", flush=True)
    print(f"all tests took {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
    ran = [code for code in codes if code != NO_TESTS_COLLECTED]
    return max(map(abs, ran)) if ran else NO_TESTS_COLLECTED


def places_of() -> dict[str, list[str]]:
    """Return what each lane is told when all tests run; a later `-m` counts."""
    return {
        "servers": ["tests/e2e"],
        "gym": ["-m", f"not ({SERVERS})", "tests/e2e", *ROOMS],
        "unit": [f"--ignore={folder}" for folder in ("tests/e2e", *ROOMS)],
    }


def log_of(lane: str) -> Path:
    return LOGS / f"{lane}-tests.log"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
