"""Agents that do not return what was sampled, and agents that do, in one batch of the real trainer: real agents and
ledger over HTTP, the middleware in front of a fake engine. Only the weight sync is left out.

What the policy server did not sample in this rollout is in no row; the others are trained as if nobody had lied.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import torch
import uvicorn
from aiohttp import web

from tests.gradient import Case, gym_config, lean, save_model, tasks
from tests.rollouts.call_trees import Engine, Json, Reply, Sampled, items_of, without_handle
from trl_gym import GymGRPOTrainer
from trl_gym.errors import FailureKind
from trl_gym.gym.discovery import AgentInfo
from trl_gym.policy_server.client import PolicyClient
from trl_gym.policy_server.middleware.app import OnPolicyMiddleware
from trl_gym.rollouts.journal import Journal, read_journal
from trl_gym.rollouts.rollout import Rollout
from trl_gym.rollouts.rows import Row
from trl_gym.run.live import LiveSource

AGENT = "arithmetic"
RESULT: Json = {"type": "function_call_output", "call_id": "c", "output": "3"}


# -- agents -----------------------------------------------------------------------------------------------------------


class Policy:
    """The policy, as the agent of one rollout calls it."""

    def __init__(self, world: World, rollout: str, tag: Json) -> None:
        self.world, self._rollout, self._tag = world, rollout, tag
        self.messages: list[Json] = [{"role": "user", "content": "go"}]
        self.names: list[str] = []

    async def ask(self, *, with_handle: bool = True, keep: bool = True, tools: str = "") -> Json:
        """Let the policy answer with a text and calls of tools; the message of the answer."""
        engine = self.world.engine
        name = f"{self._rollout}/{len(self.names)}"
        letters = "".join(chr(ord("b") + int(digit)) for digit in f"{len(engine.replies):02d}")
        engine.replies[name], engine.gates[name] = Reply(letters, tools), asyncio.Event()
        engine.gates[name].set()
        body = {"model": "policy", "user": name, "trl_gym": self._tag, "messages": self.messages}
        async with self.world.session.post(f"{self.world.url}/chat/completions", json=body) as response:
            message = (await response.json())["choices"][0]["message"]
        self.names.append(name)
        if keep:
            self.messages += [message if with_handle else without_handle(message), {"role": "user", "content": "3"}]
        return message

    def sampled(self) -> Json:
        """The tokens of the newest call, as its item would have them."""
        return _ids(next(one for one in self.world.engine.log if one.name == self.names[-1]))


def _ids(one: Sampled) -> Json:
    logprobs = [one.logprob] * len(one.ids)
    return {"prompt_token_ids": one.prompt, "generation_token_ids": one.ids, "generation_log_probs": logprobs}


def said(message: Json, *, with_handle: bool = True, **changes: Any) -> Json:
    (item,) = items_of(message, with_handle=with_handle)
    return item | changes


def invented(**changes: Any) -> Json:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "never"}], **changes}


async def one_turn(policy: Policy) -> list[Json]:
    return [said(await policy.ask())]


async def two_turns(policy: Policy) -> list[Json]:
    return [said(await policy.ask()), RESULT, said(await policy.ask())]


async def without_ids(policy: Policy) -> list[Json]:
    turns = [await policy.ask(with_handle=False) for _ in range(2)]
    return [said(turns[0], with_handle=False), RESULT, said(turns[1], with_handle=False)]


async def without_ids_in_the_answer(policy: Policy) -> list[Json]:
    return [said(await policy.ask(), with_handle=False), RESULT, said(await policy.ask(), with_handle=False)]


async def own_ids(policy: Policy) -> list[Json]:
    message = await policy.ask()
    return [said(message, **policy.sampled())]


async def discarded_sample(policy: Policy) -> list[Json]:
    await policy.ask(keep=False)
    return [said(await policy.ask()), RESULT, said(await policy.ask())]


async def results_between(policy: Policy) -> list[Json]:
    message = await policy.ask(tools="yz")
    return [*items_of(message, with_handle=True, with_results=True), said(await policy.ask())]


async def results_between_without_ids(policy: Policy) -> list[Json]:
    message = await policy.ask(with_handle=False, tools="yz")
    return [*items_of(message, with_handle=False, with_results=True), said(await policy.ask(), with_handle=False)]


async def handle_in_front(policy: Policy) -> list[Json]:
    turns = [await policy.ask(tools="yz") for _ in range(2)]
    return [item for turn in turns for item in (*items_of(turn, with_handle=True, in_front=True), RESULT)]


async def placeholder(policy: Policy) -> list[Json]:
    nothing = {"prompt_token_ids": [0], "generation_token_ids": [0], "generation_log_probs": [0.0]}
    return [said(await policy.ask(), with_handle=False), invented(content=[], **nothing)]


HONEST: dict[str, Callable[[Policy], Awaitable[list[Json]]]] = {
    "one turn": one_turn,
    "two turns": two_turns,
    "without ids": without_ids,
    "without ids in the answer": without_ids_in_the_answer,
    "its own full ids": own_ids,
    "a discarded sample": discarded_sample,
    "results between tool calls": results_between,
    "results between tool calls, without ids": results_between_without_ids,
    "the handle in front of tool calls": handle_in_front,
    "a placeholder": placeholder,
}


async def others_handle(policy: Policy) -> list[Json]:
    message, other = await policy.ask(), (await policy.world.honest)[0]
    return [said(message, **{key: other[key] for key in policy.sampled()})]


async def others_turn(policy: Policy) -> list[Json]:
    await policy.ask()
    return [said((await policy.world.honest)[0])]


async def others_ids(policy: Policy) -> list[Json]:
    message, other = await policy.ask(), (await policy.world.honest)[1]
    return [said(message, **_ids(other))]


async def truncated_ids(policy: Policy) -> list[Json]:
    message = await policy.ask()
    own = policy.sampled()
    cut = {name: own[name][:-1] for name in ("generation_token_ids", "generation_log_probs")}
    return [said(message, **own | cut)]


async def truncated_text(policy: Policy) -> list[Json]:
    message = await policy.ask()
    return [said({**message, "content": message["content"][:-1]})]


async def edited_ids(policy: Policy) -> list[Json]:
    message = await policy.ask()
    own = policy.sampled()
    return [said(message, **own | {"generation_token_ids": [7, *own["generation_token_ids"][1:]]})]


async def edited_logprobs(policy: Policy) -> list[Json]:
    message = await policy.ask()
    own = policy.sampled()
    return [said(message, **own | {"generation_log_probs": [-0.5] * len(own["generation_log_probs"])})]


async def edited_logprobs_of_a_handle(policy: Policy) -> list[Json]:
    return [said(await policy.ask(), generation_log_probs=[-0.5])]


async def invented_turn(policy: Policy) -> list[Json]:
    return [said(await policy.ask()), RESULT, invented()]


async def invented_turn_with_ids(policy: Policy) -> list[Json]:
    message = await policy.ask()
    whole = [*policy.sampled()["prompt_token_ids"], *policy.sampled()["generation_token_ids"], 5]
    ids = {"prompt_token_ids": whole, "generation_token_ids": [6], "generation_log_probs": [-0.5]}
    return [said(message), RESULT, invented(**ids)]


async def dropped_turn(policy: Policy) -> list[Json]:
    await policy.ask()
    return [said(await policy.ask())]


async def a_turn_twice(policy: Policy) -> list[Json]:
    message = await policy.ask()
    return [said(message), RESULT, said(message)]


async def another_order(policy: Policy) -> list[Json]:
    first = await policy.ask()
    return [said(await policy.ask()), RESULT, said(first)]


async def padded_with_an_error(policy: Policy) -> list[Json]:
    message = await policy.ask()
    return [said(message), RESULT, said({**message, "content": "timeout"})]


async def turn_between_tool_calls(policy: Policy) -> list[Json]:
    first = items_of(await policy.ask(tools="yz"), with_handle=True, with_results=True)
    return [*first[:3], said(await policy.ask()), *first[3:]]


async def result_of_nothing(policy: Policy) -> list[Json]:
    message = await policy.ask(tools="yz")
    return [*items_of(message, with_handle=True)[:-1], RESULT, items_of(message, with_handle=True)[-1]]


async def nothing_said(policy: Policy) -> list[Json]:
    await policy.ask()
    return []


async def no_call(policy: Policy) -> list[Json]:
    return [invented()]


async def no_call_and_no_words(policy: Policy) -> list[Json]:
    return []


# What the agent does → words of the failure.
DISHONEST: dict[str, tuple[Callable[[Policy], Awaitable[list[Json]]], str]] = {
    "another rollout's handle": (others_handle, "has the handle of another rollout's call"),
    "another rollout's turn": (others_turn, "has the handle of another rollout's call"),
    "another rollout's ids": (others_ids, "that no model call of the rollout sampled"),
    "truncated ids": (truncated_ids, "has 2 token ids that no model call of the rollout sampled"),
    "truncated text": (truncated_text, "says something else than model call 0 sampled"),
    "edited ids": (edited_ids, "has 3 token ids that no model call of the rollout sampled"),
    "edited log-probabilities": (edited_logprobs, "with this prompt and these log-probabilities"),
    "edited log-probabilities of a handle": (edited_logprobs_of_a_handle, "log-probabilities were edited"),
    "an invented turn": (invented_turn, "output item 2 ('never') is a turn that nobody sampled"),
    "an invented turn with ids": (
        invented_turn_with_ids,
        "output item 2 ('never') has 1 token ids that no model call",
    ),
    "a dropped turn": (dropped_turn, "leaves out model call 0, which model call 1 continues"),
    "a turn twice": (a_turn_twice, "is model call 0 once more"),
    "another order": (another_order, "model call 0 comes behind model call 1"),
    "padded with an error": (padded_with_an_error, "an agent that broke off may have put an error there"),
    "a turn between tool calls": (turn_between_tool_calls, "says something else than model call 0 sampled"),
    "a result of nothing": (result_of_nothing, "says something else than model call 0 sampled"),
    "none of its calls": (nothing_said, "it contains none of the rollout's 1 model calls"),
    "no call": (no_call, "is a turn that nobody sampled"),
    "no call and no words": (no_call_and_no_words, "no model call of this rollout has reached it"),
}
AGENTS = [*HONEST.values(), *(agent for agent, _ in DISHONEST.values())]
NAMES = [*HONEST, *DISHONEST]


# -- servers ----------------------------------------------------------------------------------------------------------


class World:
    """A policy server and an agent server, in a thread of their own."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.engine.weight_version = "0"
        self.url = self.agent_url = ""
        self.session: aiohttp.ClientSession
        self.honest: asyncio.Future[tuple[Json, Sampled]]  # first message of the first rollout, and its tokens

    @contextlib.contextmanager
    def running(self) -> Iterator[World]:
        loop, is_up, is_over = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

        async def serve() -> None:
            async with self._serving():
                is_up.set()
                await is_over.wait()

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
        thread.start()
        assert is_up.wait(120)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(is_over.set)
            thread.join(30)
            loop.close()

    @contextlib.asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        config = uvicorn.Config(OnPolicyMiddleware(self.engine), port=0, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        self.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
        self.honest = asyncio.get_running_loop().create_future()
        app = web.Application()
        app.router.add_post("/run", self._run)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.agent_url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with aiohttp.ClientSession() as self.session:
            yield
        await runner.cleanup()
        server.should_exit = True
        await serving

    async def _run(self, request: web.Request) -> web.Response:
        row = await request.json()
        metadata = row["responses_create_params"]["metadata"]
        member = row["_ng_rollout_index"]
        policy = Policy(self, row["_ng_rollout_id"], json.loads(metadata["extra_body"])["trl_gym"])
        output = await AGENTS[member](policy)
        if member == 0:
            own = next(one for one in self.engine.log if one.name == policy.names[0])
            self.honest.set_result((policy.messages[1], own))
        return web.json_response({"reward": float(member % 3), "response": {"output": output}})


# -- the trainer ------------------------------------------------------------------------------------------------------


class Source(LiveSource):
    """The live source without its weight sync: collector, ledger, finisher and journal are real."""

    def start(self) -> None: ...

    def connect(self, accelerator: Any, model: Any, hooks: Any) -> None:
        self._accelerator, self._hooks, self._version = accelerator, hooks, 0
        self._weights = SimpleNamespace(
            sampling=lambda *_, **__: contextlib.nullcontext(), take_optimizer=lambda _: None
        )
        self._journal = Journal(self.folder)
        self._collector = self._new_collector()
        self._queue = self._new_queue(self._collector)

    def push_weights(self, model: Any, step: int) -> dict[str, float]:
        return {}

    def server_config(self) -> Json:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}


class Trainer(GymGRPOTrainer):
    """Keeps what it makes of the first batch."""

    world: World
    batch: dict[str, Any]
    rewards: torch.Tensor

    def _new_source(self, args: Any, *_: Any) -> Source:
        agent = AgentInfo(AGENT, self.world.agent_url, None, "test_agent")
        nothing = {"check": lambda: None, "check_before_rollouts": lambda: None, "require_same_policy": lambda: None}
        policy = SimpleNamespace(base_urls=(self.world.url,), client=PolicyClient(self.world.url), stop=lambda: None)
        gym = SimpleNamespace(
            sole_agent=AGENT,
            agents={AGENT: agent},
            agent=lambda name: agent,
            agents_down=lambda refused: {},
            log_end=lambda: "",
            hang_timeout_s=60.0,
            pulse_urls=(),
            note_hung=lambda urls: None,
        )
        return Source(
            args, SimpleNamespace(policy=policy, gym=gym, num_restarts=0, owns_gym=True, stop=lambda: None, **nothing)
        )

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        self.rewards = super()._calculate_rewards(*args)
        return self.rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self.batch = super()._generate_and_score_completions(inputs)
        return self.batch


@dataclass(frozen=True)
class Trained:
    """A step on all of them."""

    rollouts: dict[str, Rollout]
    rows: list[Row]
    batch: dict[str, Any]
    rewards: torch.Tensor
    log: list[Sampled]
    lines: dict[str, Json]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    model, folder = save_model(tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("run")
    options = {"num_generations": len(AGENTS), "per_device_train_batch_size": len(AGENTS), "gym_max_inflight": 64}
    case = Case(name="all", failed=(), num_tasks=1, options=options | {"max_completion_length": 64})
    with World().running() as world, lean():
        args = gym_config(folder, case, 1)
        new = type("New", (Trainer,), {"world": world})
        with new(model=str(model), args=args, train_dataset=tasks(range(1))) as trainer:
            trainer.train()
        rollouts = dict(zip(NAMES, trainer._accounting.rollouts, strict=True))
        lines = {line["rollout_id"]: line for line in read_journal(folder / "rollouts")}
        yield Trained(rollouts, trainer._accounting.rows, trainer.batch, trainer.rewards, world.engine.log, lines)


def rows_of(trained: Trained, name: str) -> list[int]:
    return [place for place, row in enumerate(trained.rows) if row.rollout == NAMES.index(name)]


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_agent_is_trained_on_what_the_engine_saw(trained: Trained, name: str) -> None:
    rollout, batch = trained.rollouts[name], trained.batch
    assert rollout.failure is None and rollout.drift is None
    own = [one for one in trained.log if one.name.startswith(f"{rollout.request.rollout_id}/")]
    own = own[1:] if name == "a discarded sample" else own
    (place,) = rows_of(trained, name)
    is_prompt, is_completion = batch["prompt_mask"][place].bool(), batch["completion_mask"][place].bool()
    prompt, completion = batch["prompt_ids"][place][is_prompt], batch["completion_ids"][place][is_completion]
    assert prompt.tolist() == own[0].prompt
    assert prompt.tolist() + completion.tolist() == own[-1].whole
    mask = batch["tool_mask"][place][is_completion].bool()
    assert completion[mask].tolist() == [token for one in own for token in one.ids]
    logprobs = batch["sampling_per_token_logps"][place][is_completion][mask]
    assert logprobs.tolist() == [one.logprob for one in own for _ in one.ids]
    honest = torch.tensor([float(index % 3) for index in range(len(HONEST))])
    advantage = (honest[NAMES.index(name)] - honest.mean()) / (honest.std() + 1e-4)
    assert batch["advantages"][place].item() == pytest.approx(advantage.item(), rel=1e-5)


@pytest.mark.parametrize("name", DISHONEST)
def test_a_dishonest_answer_is_never_trained(trained: Trained, name: str) -> None:
    rollout, words = trained.rollouts[name], DISHONEST[name][1]
    failure, request = rollout.failure, rollout.request
    assert failure is not None and failure.kind is FailureKind.ENVIRONMENT and words in failure.text
    assert (failure.agent, failure.rollout_id, failure.where) == (AGENT, request.rollout_id, AGENT)
    assert trained.lines[request.rollout_id]["failure"]["text"] == failure.text
    assert rollout.reward is None and rollout.trajectories == []
    assert rows_of(trained, name) == [] and trained.rewards[NAMES.index(name)].isnan().all()


def test_every_other_row_has_no_weight(trained: Trained) -> None:
    batch = trained.batch
    fillers = [place for place, row in enumerate(trained.rows) if row.rollout is None]
    assert len(fillers) == len(DISHONEST) and len(trained.rows) == len(AGENTS)
    assert (batch["completion_mask"] * batch["tool_mask"])[fillers].sum() == 0
    assert batch["advantages"][fillers].abs().sum() == 0
    assert not math.isnan(batch["advantages"].sum().item())
