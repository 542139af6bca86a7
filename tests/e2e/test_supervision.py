"""Policy servers and trainers that are killed or stopped, each in every phase: the run goes on with the right weights,
and only what was lost runs again. Then who may talk to a managed server."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.conftest import children, server_below
from tests.e2e.training import CALCULATOR, MAX_MEAN_GAP, RecordingTrainer, config, gap
from tests.fork_ranks import forked
from trl_gym import GymServers, PolicyServer, load_gym_dataset
from trl_gym.errors import PolicyServerError
from trl_gym.policy_server.client import PolicyClient
from trl_gym.policy_server.command import KEY_VARIABLE
from trl_gym.rollouts.engine_metrics import engine_metrics, parse_counters
from trl_gym.rollouts.journal import read_journal
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.run import recovery

pytestmark = pytest.mark.e2e

NUM_STEPS = 4
NUM_KILLS = 4  # in rollouts, transfer (its engine is stopped), probe, and end of a sync (its server is stopped)
KILLED_AFTER = 3  # rollouts of the batch
SERVER_FLAGS = {"tool-call-parser": "hermes", "max-num-seqs": 32}
KEY = "the key of a server that runs elsewhere"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, calculator_data: Any) -> Path:
    return calculator_data.generate(tmp_path_factory.mktemp("data"), num_train=64, num_validation=8, seed=0)[0]


def settings(output_dir: Path, **changes: Any) -> Any:
    return config(
        output_dir,
        **{
            "num_generations": 4,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 8,
            "max_steps": NUM_STEPS,
            "eval_strategy": "no",
            "gym_max_inflight": 4,
            "gym_verify_sync_steps": 1,
        }
        | changes,
    )


# -- a server that the trainer started --------------------------------------------------------------------------------


def note_scratch(trainer: Any) -> None:
    """What the server keeps in its folder, sockets without their random names."""
    folder = trainer.policy_server._process.scratch
    trainer.scratch[folder] = {"socket" if path.is_socket() else path.name[:10] for path in folder.iterdir()}


def kill_server(trainer: Any) -> None:
    """The API server, without a word; its supervisor notices."""
    note_scratch(trainer)
    server = server_below(trainer.policy_server._process)
    server.kill()
    server.wait(60)


def stop_process(trainer: Any, *, engine: bool) -> None:
    """For good: nobody continues it. Their guard, which is stopped as well, its owner does."""
    note_scratch(trainer)
    server = server_below(trainer.policy_server._process)
    psutil.Process(trainer.policy_server._process.pid).suspend()
    (server.children()[0] if engine else server).suspend()


def once(kill: Callable[[], None], call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, which finds the server dead the first time."""
    armed = [True]

    def dying(*args: Any, **kwargs: Any) -> Any:
        if armed and armed.pop():
            kill()
        return call(*args, **kwargs)

    return dying


class Killing(RecordingTrainer):
    """Kills its policy server in the rollouts of step 1 and of the evaluation, and in the sync of step 2. Stops the
    engine in the sync of step 1, the server in that of step 3."""

    num_ended = 0
    told: list[str]
    scratch: dict[Path, set[str]]

    def build_trajectories(self, answer: dict[str, Any], request: RolloutRequest, calls: Any) -> Any:
        if self.state.global_step in (0, NUM_STEPS):
            self.num_ended += 1
            if self.num_ended in (KILLED_AFTER, 16 + KILLED_AFTER):
                kill_server(self)
        return super().build_trajectories(answer, request, calls)

    def _push_weights(self) -> None:
        step = self.state.global_step
        fault = partial(kill_server, self) if step == 2 else partial(stop_process, self, engine=step == 1)
        with pytest.MonkeyPatch.context() as patch:
            if (
                method := {1: "update_weights", 2: "prompt_logprobs", 3: "finish_weight_update"}.get(step)
            ) is not None:
                patch.setattr(PolicyClient, method, once(fault, getattr(PolicyClient, method)))
            super()._push_weights()


@pytest.fixture(scope="module")
def killed(
    alone: None, warm: None, small_policy: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Killing]:
    """One run in which the server dies or hangs in every phase."""
    Killing.told, Killing.scratch = [], {}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(KEY_VARIABLE)  # its server gets a random one
        patch.setattr(recovery.logger, "warning", lambda text, *args: Killing.told.append(text % args))
        with make_killed(small_policy, data, tmp_path_factory.mktemp("managed")) as trainer:
            trainer.train()
            yield trainer


def make_killed(small_policy: Path, data: Path, output_dir: Path) -> Killing:
    return Killing(
        model=str(small_policy),
        args=settings(
            output_dir,
            gym_config_paths=[str(CALCULATOR / "calculator.yaml")],
            vllm_max_model_length=512,
            gym_vllm_args=SERVER_FLAGS,
            gym_server_restarts=NUM_KILLS,
            gym_retries=0,
            gym_server_hang_timeout=6,
            gym_sync_timeout=10,
        ),
        train_dataset=load_gym_dataset(data),
        eval_dataset=load_gym_dataset(data).select(range(8)),
    )


def test_what_hangs_is_named_with_the_process_that_was_stopped(killed: Killing) -> None:
    [died, engine, probed, server] = [line for line in killed.told if line.startswith("restarting the policy server")]
    assert all("signal SIGKILL" in line for line in (died, probed))
    assert (
        "its HTTP process answers, and its engine does not" in engine and "Someone has stopped VLLM::Engine" in engine
    )
    assert "/trl_gym/info: no answer within" in server and "Someone has stopped policy server (pid " in server
    assert "The weight sync of version 3 was lost in its end (transport `file`)" in server


def test_nothing_is_left_of_a_server_that_was_killed(killed: Killing) -> None:
    assert len(killed.scratch) == NUM_KILLS
    assert all({"socket", "vllm_dist_"} <= names for names in killed.scratch.values()), killed.scratch
    assert not any(folder.exists() for folder in killed.scratch)


def test_the_run_goes_on_to_its_end_with_the_weights_of_the_trainer(killed: Killing) -> None:
    assert [batch["step"] for batch in killed.seen] == list(range(NUM_STEPS))
    assert max(gap(batch) for batch in killed.seen) < MAX_MEAN_GAP
    assert all(rollout.failure is None for batch in killed.seen for rollout in batch["rollouts"])
    logged = [entry for entry in killed.state.log_history if "policy_server/restarts" in entry]
    assert [entry["policy_server/restarts"] for entry in logged] == [1, 2, 3, 4]
    assert all(entry["weight_sync/probe_gap"] < MAX_MEAN_GAP for entry in logged)
    assert killed.policy_server.client.weight_version() == str(NUM_STEPS)
    logs = sorted(path.name for path in Path(killed.args.gym_log_dir).glob("policy_server-*.log"))
    assert len(logs) == 1 + NUM_KILLS, logs


def test_only_lost_rollouts_ran_again(killed: Killing) -> None:
    lines = [line for line in read_journal(Path(killed.args.output_dir) / "rollouts") if line["mode"] == "train"]
    assert len({line["rollout_id"] for line in lines}) == len(lines)
    attempts = defaultdict(list)
    for line in lines:
        attempts[line["step"], line["group"], line["member"]].append(line)
    assert len(attempts) == 16 * NUM_STEPS
    counted = [[line for line in own if line["failure"] is None and not line["retried"]] for own in attempts.values()]
    assert all(len(own) == 1 and own[0]["weight_versions"] == [str(own[0]["version"])] for own in counted)
    trained = {rollout.request.rollout_id for batch in killed.seen for rollout in batch["rollouts"]}
    assert trained == {line["rollout_id"] for own in counted for line in own}
    rerun = [line for [line] in counted if line["attempt"] > 0]
    assert {line["step"] for line in rerun} == {1}
    num_kept = sum(line["step"] == 1 and line["attempt"] == 0 for [line] in counted)
    assert num_kept >= KILLED_AFTER - 1, "the one in whose wake the server was killed may be lost"
    assert len(rerun) == 16 - num_kept >= 16 - KILLED_AFTER - 4
    given_up = [line for line in lines if line["failure"] is not None or line["retried"]]
    assert {line["step"] for line in given_up} == {1} and len(given_up) <= 2 * 4
    assert Counter(line["attempt"] for line in rerun) == {1: len(rerun)}


def walk(root: Path) -> Iterator[Path]:
    return (path for path in root.rglob("*") if path.is_file())


def test_the_key_is_nowhere_but_in_the_environment(killed: Killing) -> None:
    key = killed.policy_server.client.api_key
    assert key is not None and len(key) >= 32
    family = children()
    assert len(family) >= 6, "policy server and NeMo Gym, each with its guard and its supervisor"
    assert key not in str(family)
    holding = [path for path in walk(Path(killed.args.output_dir)) if key.encode() in path.read_bytes()]
    assert holding == []
    head = killed.gym_servers.head_url
    assert key not in requests.get(f"{head}/global_config_dict_yaml", timeout=60).text


def test_no_route_but_health_answers_without_the_key(killed: Killing) -> None:
    client = killed.policy_server.client
    routes = client._call("GET", "/openapi.json")["paths"]
    needed = ("/collective_rpc", "/update_weights", "/sleep", "/server_info", "/v1/chat/completions", "/metrics")
    assert set(needed) <= set(routes)
    ours = [("get", "/trl_gym/info")] + [("post", f"/trl_gym/rollouts/{name}") for name in ("records", "cancel")]
    hidden = [("post", "/v1/load_lora_adapter"), ("get", "/docs"), ("get", "/openapi.json")]
    listed = [(method, path) for path, methods in routes.items() for method in methods if path != "/health"]
    for method, path in [*listed, *ours, *hidden]:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {client.api_key}"}):
            url = client.root_url + path.replace("{", "").replace("}", "")
            assert requests.request(method, url, headers=headers, timeout=60).status_code == 401, (method, path)
    assert requests.get(f"{client.root_url}/health", timeout=60).status_code == 200


def test_when_the_restarts_are_used_up_it_says_so(killed: Killing) -> None:
    """The last one on this server."""
    with pytest.raises(PolicyServerError) as caught:
        killed.evaluate()
    text = str(caught.value)
    for words in ("`gym_server_restarts` allows no more", f"{NUM_KILLS} times", "signal SIGKILL", ".log"):
        assert words in text, text
    assert isinstance(caught.value.__cause__, PolicyServerError)


# -- a server that runs elsewhere, with two replicas ------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(
    alone: None, warm: None, small_policy: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PolicyServer]:
    """Its two engines are no forks of it: vLLM spawns them."""
    flags = {"dtype": "float32", "max-model-len": 512, "enforce-eager": True, "data-parallel-size": 2}
    logs = tmp_path_factory.mktemp("elsewhere")
    with PolicyServer(small_policy, vllm_args=SERVER_FLAGS | flags, api_key=KEY, log_dir=logs) as server:
        yield server


@pytest.fixture(scope="module")
def gym(elsewhere: PolicyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GymServers]:
    with GymServers(
        [CALCULATOR / "calculator.yaml"],
        policy_base_url=elsewhere.base_url,
        policy_api_key=KEY,
        log_dir=tmp_path_factory.mktemp("gym"),
    ) as servers:
        yield servers


def attached(trainer: type[RecordingTrainer], output_dir: Path, *where: Any, **changes: Any) -> RecordingTrainer:
    url, head, data, model = where
    return trainer(
        model=str(model),
        args=settings(output_dir, vllm_mode="server", vllm_server_base_url=url, gym_head_url=head, **changes),
        train_dataset=load_gym_dataset(data),
    )


class DiesInTransfer(RecordingTrainer):
    def _push_weights(self) -> None:
        client = self.policy_server.client
        update = client.update_weights

        def dying(*args: Any, **kwargs: Any) -> None:
            update(*args, **kwargs)  # and nobody finishes it
            os.kill(os.getpid(), signal.SIGKILL)

        client.update_weights = dying
        super()._push_weights()


def train_until_it_dies(*where: Any) -> None:
    os.environ["VLLM_API_KEY"] = KEY
    attached(DiesInTransfer, *where).train()


def test_a_trainer_killed_in_a_transfer_leaves_a_server_that_the_next_one_can_use(
    elsewhere: PolicyServer,
    gym: GymServers,
    data: Path,
    small_policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    where = (elsewhere.base_url, gym.head_url, data, small_policy)
    first = forked(train_until_it_dies, tmp_path / "first", *where)
    first.join(300)
    assert first.exitcode == -signal.SIGKILL
    assert elsewhere.client.is_paused()
    with attached(RecordingTrainer, tmp_path / "second", *where, max_steps=2) as second:
        second.train()
    assert max(gap(batch) for batch in second.seen) < MAX_MEAN_GAP
    assert all(rollout.failure is None for batch in second.seen for rollout in batch["rollouts"])
    assert elsewhere.client.weight_version() == "2"
    batch = [[5, 9, 30, 17, 44, 120, 8]]
    replicas = [elsewhere.client.prompt_logprobs(batch)[0] for _ in range(6)]  # they are asked by turns
    for one, other in itertools.pairwise(replicas):
        assert one == pytest.approx(other, abs=1e-4)


def test_the_turns_of_a_rollout_find_their_prefix_on_their_replica(elsewhere: PolicyServer) -> None:
    client, rollouts = elsewhere.client, [f"sticky-{number}" for number in range(6)]
    before = parse_counters(client.prometheus(), at=0.0)
    for number, rollout in enumerate(rollouts):  # no two prompts begin alike
        messages = [{"role": "user", "content": f"{number} " + "1 + 2 = ? " * 30}]
        for _ in range(2):
            answer = client.chat(messages=messages, max_tokens=8, trl_gym={"rollout": rollout})
            messages += [answer["choices"][0]["message"], {"role": "user", "content": "2"}]
    records = client.rollout_records(rollouts)
    assert [[call["cached_tokens"] > 0 for call in records[rollout]] for rollout in rollouts] == [[False, True]] * 6
    metrics = engine_metrics(before, parse_counters(client.prometheus(), at=1.0))
    calls = [call for rollout in rollouts for call in records[rollout]]
    assert metrics["engine/generation_tokens_per_second"] == sum(call["completion_tokens"] for call in calls)
    assert metrics["engine/prompt_tokens_per_second"] == sum(call["prompt_tokens"] for call in calls)
    assert 0 < metrics["engine/prefix_cache_hit_rate"] < 0.5  # of two turns, the second one's prefix
    assert metrics["engine/preemptions"] == 0 < metrics["engine/running"]


def test_engines_do_not_outlive_a_server_that_is_killed_with_its_supervisor(elsewhere: PolicyServer) -> None:
    """The last one on this server."""
    guard = psutil.Process(elsewhere._process.pid)
    family = guard.children(recursive=True)
    [supervisor], server = guard.children(), server_below(elsewhere._process)
    assert len(family) >= 4, "API server, coordinator, two engines"
    engines = [process for process in family if "EngineCore" in process.name()]
    for process in (guard, supervisor):  # they must not clean up
        process.suspend()
    for process in (server, supervisor, guard):
        process.kill()
    _, alive = psutil.wait_procs(engines, timeout=60)
    for process in set(family) - {
        *engines,
        server,
        supervisor,
    }:  # the coordinator, which has no device, is not reached
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert len(engines) == 2 and not alive
