"""All checks of the doctor, and how they are run.

Each check says everything that it finds, and none is left out because another one failed, unless it needs what that
one could not find.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

from trl_gym.doctor import inputs, live, options, static
from trl_gym.doctor.context import Context, Finding, Status, failed, from_error, skipped, warning
from trl_gym.doctor.outcome import Entry
from trl_gym.errors import TrlGymError


@dataclass(frozen=True, slots=True)
class Check:
    """One check."""

    name: str  # unique
    # Finds things; an error of ours that it raises is a finding too. Nothing where there is nothing to check.
    run: Callable[[Context], Iterable[Finding]]
    needs: tuple[str, ...] = ()  # checks whose failure makes this one impossible
    when: Callable[[Context], bool] = lambda context: True  # whether a run has what is checked
    is_essential: bool = True  # whether a run is not ready until this was checked


_serves, _starts_policy, _starts_gym = map(attrgetter, ("serves", "starts_policy", "starts_gym"))
_attaches_policy, _attaches_gym = map(attrgetter, ("attaches_policy", "attaches_gym"))
_FILE = "options file"


def _starts(engine: str) -> Callable[[Context], bool]:
    return lambda context: context.engine == engine


CHECKS = (
    Check("python", static.python),
    Check("versions", static.versions),
    Check(_FILE, options.options_file),
    Check("options", options.options, (_FILE,)),
    Check("engine", static.engine, (_FILE,), _starts_policy),
    Check("processes", options.processes, (_FILE,)),
    Check("open files", options.open_files, (_FILE,), _serves),
    Check("devices", static.devices),
    Check("ports", static.ports, (_FILE,)),
    Check("sockets", static.sockets, (_FILE,), _serves),
    Check("gym interpreter", live.interpreter, (_FILE,), _starts_gym),
    Check("gym configs", live.configs, (_FILE, "gym interpreter"), _starts_gym),
    Check("gym head server", live.head_server, (_FILE,), _attaches_gym),
    Check("data script", inputs.data_script, (_FILE,)),
    Check("dataset rows", inputs.rows, (_FILE,)),
    Check("dataset size", inputs.dataset_size, (_FILE, "options", "dataset rows")),
    Check("agents", inputs.agents, (_FILE,), _serves),
    Check("model", inputs.model, (_FILE,)),
    Check("tokenizer", inputs.tokenizer, (_FILE, "model")),
    Check("chat template", inputs.chat_template, (_FILE, "tokenizer")),
    Check("served model", inputs.served_model, (_FILE, "engine", "model"), _starts("transformers")),
    Check("tool parser", inputs.tool_parser, (_FILE, "model"), _starts_policy),
    Check("context", inputs.context_length, (_FILE, "tokenizer")),
    Check("gpu", static.gpu, (_FILE, "model")),
    Check("memory", static.memory_plan, (_FILE, "model"), _starts_policy),
    Check("shared memory", static.shared_memory, (_FILE, "model"), _serves, False),
    Check("vllm flags", live.flags, (_FILE, "model"), _starts("vllm")),
    Check("remote server", live.remote, (_FILE,), _attaches_policy),
    Check("folders", static.folders, (_FILE,)),
    Check("space", static.space, (_FILE, "model"), is_essential=False),
    Check("reporting", static.reporting, (_FILE,), is_essential=False),
    Check("reward plot", static.reward_plot, is_essential=False),
    Check("leftovers", static.leftovers, (_FILE,), is_essential=False),
    Check(
        "policy server",
        live.policy_server,
        ("options", "engine", "model", "served model", "tokenizer", "vllm flags", "remote server"),
        _serves,
    ),
    Check("gym servers", live.gym_servers, ("options", "gym configs", "gym head server"), _serves),
    Check("token continuation", live.continuation, ("policy server", "gym servers"), _serves),
    Check("weight sync", live.weight_sync, ("token continuation",), _serves),
    Check("rollouts", live.rollouts, ("token continuation", "agents"), _serves),
)


def run_checks(
    checks: Sequence[Check], context: Context, begin: Callable[[str], None] = lambda name: None
) -> Iterator[Entry]:
    """Run all checks, in order; yield what each found as soon as it has ended.

    Args:
        checks: A check comes after those that it needs.
        context: The run that is examined.
    """
    reasons: dict[str, tuple[str, ...]] = {}  # of checks that did not pass: why those that need them are not made
    for check in checks:
        missing = [name for name in check.needs if name in reasons]
        if not missing and not check.when(context):
            continue
        begin(check.name)
        started = time.monotonic()
        findings = [_blocked(missing)] if missing else _find(check, context)
        seconds = round(time.monotonic() - started, 3)
        causes = [cause for finding in findings for name in finding.because for cause in reasons.get(name, (name,))]
        because = tuple(dict.fromkeys(causes))
        if any(finding.status in (Status.FAILED, Status.SKIPPED) for finding in findings):
            reasons[check.name] = because or (check.name,)
        for finding in findings:
            why = because if finding.status is Status.SKIPPED else ()
            yield Entry(check.name, finding.status, finding.text, finding.remedy, seconds, check.is_essential, why)


def _blocked(missing: Sequence[str]) -> Finding:
    return skipped(f"needs {', '.join(missing)}", because=tuple(missing))


def _find(check: Check, context: Context) -> list[Finding]:
    """Run one check. An exception ends that check only and is one of its findings, and so is what trl-gym logs as a
    warning."""
    findings: list[Finding] = []
    context.logged = []
    handler = _Listener(context.logged)
    logging.getLogger("trl_gym").addHandler(handler)
    try:
        findings.extend(check.run(context))
    except TrlGymError as error:
        findings += from_error(error)
    except Exception as error:  # from libraries, about files and machines of every kind
        findings.append(
            failed(f"{type(error).__name__}: {error}", "The message is a library's, which a training run calls too.")
        )
    finally:
        logging.getLogger("trl_gym").removeHandler(handler)
    return [*findings, *map(warning, context.logged)]


class _Listener(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())
