"""Collect rollouts without training: `trl-gym rollout`, `trl-gym eval` and notebooks.

datasets ─► jobs ─ less what the journal has ─► requests ─► NeMo Gym, started for it ─► a line of the journal each
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from trl_gym.commands.rollout_flags import CollectOptions, NamedFile
from trl_gym.dataset import gym_row, load_gym_dataset
from trl_gym.errors import ConfigError, RolloutError, RolloutFailure, ServerError
from trl_gym.folder_owner import FolderOwner
from trl_gym.gym.config import POLICY_MODEL, resolve_configs
from trl_gym.gym.install import find_installation
from trl_gym.gym.servers import GymServers
from trl_gym.policy_server.client import PolicyClient, PolicyResponseError, server_urls
from trl_gym.policy_server.command import KEY_VARIABLE
from trl_gym.policy_server.middleware.identity import gym_key
from trl_gym.progress import bar_columns, draws, print_line, rollouts_text
from trl_gym.redaction import secrets_in
from trl_gym.rollouts.admission import budgets_from_options
from trl_gym.rollouts.attempts import CollectionStatus
from trl_gym.rollouts.attempts import Progress as CollectionProgress
from trl_gym.rollouts.collector import RolloutCollector, RolloutResult
from trl_gym.rollouts.journal import Attempt, Journal, LineState, journal_files, line_states, read_journal
from trl_gym.rollouts.ledger import Ledger
from trl_gym.rollouts.request import PolicyAccess, RolloutRequest, stamp, task_hash
from trl_gym.rollouts.source import Finisher, OwnSampling
from trl_gym.rollouts.trajectory import from_calls
from trl_gym.storage import writing

MANIFEST = "collection.json"
_COMMIT_EVERY_S = 1.0
_CHUNK = 4096  # requests that are held in memory at a time
_NUM_LINES = 10  # of progress, where output is piped
Key = tuple[str, str, int]  # dataset, task hash, member: what a rollout is recognized by

T = TypeVar("T")


# -- jobs: the rollouts of the datasets, less those that the journal has already --------------------------------------


@dataclass(frozen=True, slots=True)
class Task:
    """One dataset row."""

    dataset: str  # name of its file
    index: int  # the row's number over all files
    hash: str  # see `request.task_hash`
    row: dict[str, Any]  # the row


@dataclass(frozen=True, slots=True)
class Job:
    """One rollout to run: the `member`-th of a task."""

    task: Task
    member: int

    @property
    def key(self) -> Key:
        return self.task.dataset, self.task.hash, self.member


def load_tasks(files: Sequence[NamedFile], *, agent: str | None, limit: int | None) -> list[Task]:
    """Load all rows of all files, in order. Raises `DatasetError`: a file has lines that are not Gym rows."""
    rows = [
        (file.name, gym_row(example))
        for file in files
        for example in load_gym_dataset(file.path, agent=agent, limit=limit)
    ]
    return [Task(name, index, task_hash(row), row) for index, (name, row) in enumerate(rows)]


def all_jobs(tasks: Sequence[Task], num_generations: int) -> list[Job]:
    """List every rollout, task by task."""
    return [Job(task, member) for task in tasks for member in range(num_generations)]


def key_of(record: Mapping[str, Any]) -> Key:
    """Return the key of a journal's line. The number of a row is not in it: files may be put in another order, cut or
    continued."""
    return record.get("dataset", ""), record.get("task_hash", ""), record.get("member", 0)


def done(records: Iterable[Mapping[str, Any]]) -> Counter[Key]:
    """Count the rollouts of a journal that have a reward, by key. A row that a dataset has twice counts twice."""
    return Counter(key_of(record) for record in records if Attempt.of(record).has_reward)


def counted(
    records: Iterable[Mapping[str, Any]], jobs: Sequence[Job], kept: Callable[[Mapping[str, Any]], T]
) -> list[T]:
    """Return the lines that count for the rollouts that were asked for, job by job; see `journal.line_states`.

    Args:
        records: Lines of the journal, in order. Those of other rollouts (a dataset that was cut since) do not count.
        jobs: The rollouts that were asked for.
        kept: Takes from a line what is to be returned of it. A whole journal may be too large to hold.
    """
    expected = Counter(job.key for job in jobs)
    lines = [(Attempt.of(record, key_of(record)), kept(record)) for record in records if key_of(record) in expected]
    states = line_states((attempt for attempt, _ in lines), expected.__getitem__)
    by_key: defaultdict[Hashable, list[T]] = defaultdict(list)
    for (attempt, value), state in zip(lines, states, strict=True):
        if state is LineState.COUNTED:
            by_key[attempt.rollout].append(value)
    return [value for key in expected for value in by_key[key]]


def missing(jobs: Sequence[Job], finished: Mapping[Key, int]) -> list[Job]:
    """Return the jobs that are not finished, in order."""
    left = Counter(finished)
    found = []
    for job in jobs:
        if left[job.key] > 0:
            left[job.key] -= 1
        else:
            found.append(job)
    return found


def claim(options: CollectOptions) -> None:
    """Mark an output folder as that of these options, or check that it is. Raises `ConfigError`: another model, or
    other sampling, was rolled out into it: the two would be mixed."""
    manifest = {
        "mode": options.mode,
        "model": options.model,
        "temperature": options.rollouts.sampling.temperature,
        "top_p": options.rollouts.sampling.top_p,
        "max_tokens": options.rollouts.max_completion_length,  # named as in folders of version 0.1
    }
    path = options.output_dir / MANIFEST
    if not path.exists():
        if journal_files(options.journal_dir):
            raise ConfigError(
                f"{options.output_dir} holds the journal of something else, perhaps of a training run.",
                "Choose another `--output-dir`.",
            )
        write_json(path, manifest)
        return
    before = _read(path)
    changed = [f"{name} {before.get(name)!r} → {now!r}" for name, now in manifest.items() if before.get(name) != now]
    if changed:
        raise ConfigError(
            f"{options.output_dir} holds rollouts with other options ({', '.join(changed)}).",
            "Choose another `--output-dir`, or remove this one.",
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}).", "Choose another `--output-dir`, or remove this one."
        ) from error


# -- the endpoint -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An OpenAI endpoint that has answered."""

    # `trl-gym serve`, `trl-gym gateway`: exact prompts, a ledger of model calls, cancellation. Any other has text
    # only: the token ids that NeMo Gym would make of it are not known to be those that were sampled.
    is_ours: bool
    weight_version: str = ""  # version of the policy's weights; empty when the endpoint does not say

    @property
    def note(self) -> str | None:
        """Tell what a user should know about the tokens that will be recorded."""
        if self.is_ours:
            return None
        return (
            "rollouts are recorded without token ids: the endpoint does not say which tokens it sampled. "
            "`trl-gym gateway --upstream URL` in front of a vLLM server does."
        )


def look_at(base_url: str, model: str, api_key: str | None) -> Endpoint:
    """Find out what answers.

    Args:
        base_url: OpenAI base URL, with or without `/v1`.

    Raises:
        PolicyServerError: Nothing answers.
        ConfigError: The endpoint wants another key, or does not serve the model.
    """
    client = PolicyClient(base_url, api_key=api_key, timeout_s=30.0)
    try:
        _check_model(client, model)
        try:
            client.rollout_records([])
        except PolicyResponseError:
            return Endpoint(is_ours=False)
        return Endpoint(is_ours=True, weight_version=str(client.info().get("weight_version") or ""))
    finally:
        client.close()


def _check_model(client: PolicyClient, model: str) -> None:
    try:
        served = [entry["id"] for entry in client.models()]
    except PolicyResponseError as error:
        if error.status in (401, 403):
            raise ConfigError(
                f"{client.base_url} wants another key ({error.problem}).", f"Set `--api-key`, or {KEY_VARIABLE}."
            ) from error
        if error.status == 404:  # an endpoint need not list its models
            return
        raise
    if model not in served:
        raise ConfigError(
            f"`--model` is {model!r} and {client.base_url} serves {', '.join(map(repr, served)) or 'nothing'}.",
            "Set `--model` to a name that is served.",
        )


# -- collecting -------------------------------------------------------------------------------------------------------


class InterruptedCollectionError(Exception):
    """Ctrl-C ended a collection. The text counts the rollouts with a reward, which are on disk: "3 of 8 rollouts"."""


@dataclass(frozen=True, slots=True)
class Collected:
    """The output folder after a collection."""

    jobs: list[Job]  # the rollouts that were asked for
    num_found: int  # number of them that an earlier run had finished


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The part of a rollout that is kept in memory; the rest is in the journal."""

    failure: RolloutFailure | None


def collect(options: CollectOptions, *, say: Callable[[str], None], progress: CollectionProgress) -> Collected:
    """Run every rollout that is not in the journal yet.

    Args:
        say: Gets sentences that a user should read.
        progress: Gets the state of the collection, in the collector's thread.

    Raises:
        ConfigError: Options or files are wrong.
        ServerError: The endpoint or NeMo Gym does not answer, or died.
        RolloutError: The journal cannot be written.
        InterruptedCollectionError: Ctrl-C.
    """
    tasks = load_tasks(options.datasets, agent=options.agent, limit=options.limit)
    jobs = all_jobs(tasks, options.num_generations)
    with FolderOwner(options.output_dir, option="--output-dir", what=f"`trl-gym {options.mode}`"):
        claim(options)
        todo = missing(jobs, done(read_journal(options.journal_dir)))
        num_found = len(jobs) - len(todo)
        if num_found:
            say(f"{num_found} of {len(jobs)} rollouts are in {options.journal_dir} already")
        if todo:
            _run(options, jobs, todo, say, progress)
    return Collected(jobs, num_found)


def _run(
    options: CollectOptions,
    jobs: Sequence[Job],
    todo: Sequence[Job],
    say: Callable[[str], None],
    progress: CollectionProgress,
) -> None:
    endpoint = look_at(options.base_url, options.model, options.api_key)
    if endpoint.note is not None:
        say(endpoint.note)
    secrets = (*filter(None, [options.api_key]), *secrets_in(options.overrides))
    try:
        with (
            _gym(options, endpoint, min(len(todo), options.rollouts.max_inflight)) as gym,
            contextlib.closing(Journal(options.journal_dir, secrets=(*secrets, *gym.secrets))) as journal,
            contextlib.closing(_collector(options, endpoint, gym)) as collector,
            _untagged_calls_told(options, endpoint, say),
        ):
            if gym.num_processes > 1:
                say(f"NeMo Gym runs in {gym.num_processes} processes")
            session = uuid.uuid4().hex[:8]
            own_sampling = OwnSampling(say, options.rollouts.agent_sampling_of)
            for start in range(0, len(todo), _CHUNK):
                chunk = todo[start : start + _CHUNK]
                requests = [_request(job, options, endpoint, gym, session) for job in chunk]
                finish = _finisher(chunk, journal, endpoint, options, own_sampling)
                _wait(collector.submit(requests, finish, progress).future, journal)
    except KeyboardInterrupt:
        done_now = len(jobs) - len(missing(jobs, done(read_journal(options.journal_dir))))
        raise InterruptedCollectionError(f"{done_now} of {len(jobs)} rollouts") from None


@contextlib.contextmanager
def _untagged_calls_told(options: CollectOptions, endpoint: Endpoint, say: Callable[[str], None]) -> Iterator[None]:
    """Say afterwards how many of Gym's model calls belonged to no rollout: nobody pinned their sampling."""
    if not endpoint.is_ours:
        yield
        return
    with contextlib.closing(PolicyClient(options.base_url, api_key=options.api_key)) as client:
        before = client.untagged_calls()
        yield
        found = client.untagged_calls().since(before)
    if found.gym:
        say(
            f"{found.gym.total()} model calls belong to no rollout ({found.names()}): they had sampling parameters of "
            "their own and no budget, and are in no record. Training refuses them (`gym_untagged_calls`)."
        )


def _finisher(
    jobs: Sequence[Job], journal: Journal, endpoint: Endpoint, options: CollectOptions, own_sampling: OwnSampling
) -> Callable[[RolloutResult], _Outcome]:
    job_of = {(job.task.index, job.member): job for job in jobs}

    def finish(result: RolloutResult) -> _Outcome:
        job = job_of[result.request.task_index, result.request.member]
        finisher = Finisher(
            build=lambda answer, request, calls: from_calls(calls) if endpoint.is_ours else [],
            has_ledger=endpoint.is_ours,
            decode=lambda ids: str(list(ids)),  # there is no tokenizer here; drift is shown in ids
            journal=journal,
            tags={"dataset": job.task.dataset, "task_hash": job.task.hash, "model": options.model},
            drift_policy="truncate",
            mode=options.mode,
            weight_version=endpoint.weight_version,
            own_sampling=own_sampling,
        )
        return _Outcome(finisher(result).failure)

    return finish


def _wait(future: Future[Any], journal: Journal) -> None:
    """Wait until a chunk has ended; what ends meanwhile is committed to disk."""
    try:
        while not future.done():
            with contextlib.suppress(TimeoutError):
                future.exception(timeout=_COMMIT_EVERY_S)
            journal.commit()
        future.result()
    except BaseException:
        future.cancel()
        raise


def _request(job: Job, options: CollectOptions, endpoint: Endpoint, gym: GymServers, session: str) -> RolloutRequest:
    task = job.task
    agent = (task.row.get("agent_ref") or {}).get("name") or gym.sole_agent
    if agent is None:
        raise ConfigError(
            f"A row names no agent and the NeMo Gym has several: {', '.join(sorted(gym.agents))}.",
            "Choose one with `--agent`.",
        )
    identity: dict[str, Any] = {
        "rollout_id": f"{session}-{options.mode}-t{task.index}-m{job.member}-a0",
        "task_index": task.index,
        "member": job.member,
    }
    row = stamp(
        task.row,
        **identity,
        sampling=options.rollouts.sampling,
        completion_budget=options.rollouts.max_completion_length,
        agent_sampling=options.rollouts.agent_sampling_of(agent),
    )
    if not endpoint.is_ours:
        row = without_tag(row)
    return RolloutRequest(**identity, group=task.index, attempt=0, agent=agent, row=row)


def without_tag(row: dict[str, Any]) -> dict[str, Any]:
    """Return a stamped row without the tag that only our middleware reads: other servers refuse unknown fields."""
    parameters = row["responses_create_params"]
    metadata = dict(parameters["metadata"])
    extra_body = json.loads(metadata.pop("extra_body"))
    extra_body.pop("trl_gym")
    if extra_body:
        metadata["extra_body"] = json.dumps(extra_body)
    kept = {name: value for name, value in parameters.items() if name != "metadata"}
    return {**row, "responses_create_params": {**kept, "metadata": metadata} if metadata else kept}


def _gym(options: CollectOptions, endpoint: Endpoint, rollouts_in_flight: int) -> GymServers:
    base_url = server_urls(options.base_url)
    if options.head_url is not None:
        gym = GymServers.attach(options.head_url)
        gym.connect_policy(base_url, options.model, options.api_key or "EMPTY")
        return gym
    return GymServers(
        options.config_paths,
        policy_base_url=base_url,
        policy_model_name=options.model,
        policy_api_key=_gym_key(options, endpoint),
        python=options.gym_python,
        overrides=_overrides(options, endpoint),
        log_dir=options.output_dir / "logs",
        processes=options.processes,
        rollouts_in_flight=rollouts_in_flight,
    )


def _gym_key(options: CollectOptions, endpoint: Endpoint) -> str:
    """Return the key for NeMo Gym: one by which our server knows its calls, and serves also those of no rollout."""
    return gym_key(options.api_key, "warn") if endpoint.is_ours else options.api_key or "EMPTY"


def _overrides(options: CollectOptions, endpoint: Endpoint) -> dict[str, Any]:
    """Return the user's overrides; where the endpoint has no tokens, NeMo Gym is told not to ask for them."""
    if endpoint.is_ours or POLICY_MODEL in options.overrides:
        return options.overrides
    configs = resolve_configs(options.config_paths, find_installation(options.gym_python).root)
    if not configs.adds_model_server:  # the user's own model server knows better
        return options.overrides
    settings = {"return_token_id_information": False}
    return {**options.overrides, POLICY_MODEL: {"responses_api_models": {"vllm_model": settings}}}


def _collector(options: CollectOptions, endpoint: Endpoint, gym: GymServers) -> RolloutCollector[_Outcome]:
    return RolloutCollector(
        gym.agent,
        budgets=budgets_from_options(options.rollouts),
        check=gym.check,
        agents_down=gym.agents_down,
        gym=gym,
        gym_log=gym.log_end,
        ledger=Ledger(options.base_url, options.api_key) if endpoint.is_ours else None,
        access=PolicyAccess(server_urls(options.base_url), options.api_key),
    )


# -- what a person sees -----------------------------------------------------------------------------------------------


def run_collection(options: CollectOptions, errors: Console) -> Collected | None:
    """Collect and show progress. Returns None when Ctrl-C ended it; the user has then been told how to go on."""
    say = speaker(errors)
    try:
        with shown_progress(errors) as progress:
            return collect(options, say=say, progress=progress)
    except InterruptedCollectionError as stopped:
        say(f"interrupted: {stopped} are in {options.journal_dir}. The same command again runs the rest.")
        return None
    except (ServerError, RolloutError):
        if options.journal_dir.exists():
            say(f"what has ended is in {options.journal_dir}; the same command again runs the rest")
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f"{path.name}.tmp")
    with writing("What the command found", path, safe="Rollouts that have ended are in the journal."):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        os.replace(beside, path)


def speaker(console: Console) -> Callable[[str], None]:
    """Return a function that prints sentences as they are."""
    return lambda text: print_line(console, text)


@contextlib.contextmanager
def shown_progress(console: Console) -> Iterator[CollectionProgress]:
    """Show the progress of a collection: as a bar in a terminal, else as some lines (so in a notebook)."""
    if not draws(console):
        yield _line_progress(speaker(console))
        return
    with Progress(*bar_columns("rollouts"), console=console, expand=True) as bar:
        task = bar.add_task("", total=None, phase="starting NeMo Gym")
        yield lambda status: bar.update(
            task, completed=status.num_done, total=status.num_total, phase=rollouts_text(status).partition(", ")[2]
        )


def _line_progress(say: Callable[[str], None]) -> CollectionProgress:
    """Print a line whenever another tenth has ended."""
    shown = 0

    def progress(status: CollectionStatus) -> None:
        nonlocal shown
        tenth = _NUM_LINES * status.num_done // max(status.num_total, 1)
        if tenth > shown:
            shown = tenth
            say(rollouts_text(status))

    return progress
