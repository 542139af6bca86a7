"""Sampling from a model that is trained in the same process: nothing old is used, nothing is left behind, and nobody
waits for a thread that has died."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from tests.conftest import until
from tests.policy_server.transformers_engine.conftest import MAX_MODEL_LEN, gap
from trl_gym.errors import ConfigError, PolicyServerError
from trl_gym.policy_server.transformers_engine import session as session_module
from trl_gym.policy_server.transformers_engine.app import _called_aside
from trl_gym.policy_server.transformers_engine.engine import (
    Completion,
    Engine,
    EngineLostError,
    ModelBusyError,
    SamplingRequest,
    UnknownTokenError,
)

EXACT = 1e-4  # nats, in float32
Make = Callable[..., Engine]


def free(max_tokens: int, **sampling: float) -> SamplingRequest:
    """Sample exactly so many tokens."""
    return SamplingRequest(max_tokens=max_tokens, ignore_eos=True, **sampling)  # type: ignore[arg-type]


async def sample(engine: Engine, prompts: list[list[int]], request: SamplingRequest) -> list[Completion]:
    return list(await asyncio.gather(*(engine.generate(prompt, request) for prompt in prompts)))


def prompts(number: int, *, length: int = 9) -> list[list[int]]:
    """Prompts of different lengths; every third has the same 40 tokens at its beginning, more than a block."""
    shared = list(range(100, 140))
    return [
        (shared if i % 3 == 0 else []) + [5 + (i * 7 + k) % 400 for k in range(length + i % 5)] for i in range(number)
    ]


async def test_64_at_once_are_sampled_from_the_models_own_distribution(model: PreTrainedModel, engine: Engine) -> None:
    asked = prompts(64)
    sampled = await sample(engine, asked, free(24))
    engine.park()
    assert [len(one.ids) for one in sampled] == [24] * 64
    assert {one.finish_reason for one in sampled} == {"length"}
    assert max(gap(model, *pair) for pair in zip(asked, sampled, strict=True)) < EXACT
    assert all(one.first_token_s > 0 and one.decode_s > 0 for one in sampled)
    assert engine.counters.generation_tokens == 64 * 24 and engine.counters.running == 0


async def test_each_request_has_its_own_temperature_and_filters(model: PreTrainedModel, engine: Engine) -> None:
    temperatures = [0.5, 1.0, 1.7]
    sampled = await asyncio.gather(*(engine.generate([5, 6, 7], free(20, temperature=t)) for t in temperatures))
    greedy, again = await sample(engine, [[5, 6, 7]] * 2, free(20, temperature=0.0))
    filtered, one_of_one = await asyncio.gather(
        engine.generate([5, 6, 7], free(20, top_p=0.3)), engine.generate([5, 6, 7], free(20, top_k=1))
    )
    engine.park()
    for temperature, one in zip(temperatures, sampled, strict=True):
        assert gap(model, [5, 6, 7], one, temperature=temperature) < EXACT
    logits = model(input_ids=torch.tensor([[5, 6, 7, *greedy.ids]])).logits[0, 2:-1]
    assert greedy.ids == again.ids == logits.argmax(-1).tolist() == one_of_one.ids
    assert one_of_one.logprobs == [0.0] * 20
    assert sum(filtered.logprobs) > sum(sampled[1].logprobs)  # of the distribution that is left, which sums to 1


async def test_a_change_of_weights_leaves_nothing_of_the_old_ones(model: PreTrainedModel, engine: Engine) -> None:
    asked = [list(range(5, 100))] * 4  # three whole blocks that a prefix cache would have
    before = await sample(engine, asked, free(8))
    engine.park()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    assert gap(model, asked[0], before[0]) > 0.1, "the weights have changed"
    engine.unpark()
    after = await sample(engine, asked, free(8))
    engine.park()
    assert max(gap(model, *pair) for pair in zip(asked, after, strict=True)) < EXACT


_SMALL = {
    "vocab_size": 450,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.08,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


@pytest.mark.parametrize("kind", ["every layer has a window", "one layer has a window"])
async def test_attention_within_a_window(engine_of: Make, kind: str) -> None:
    if kind == "every layer has a window":
        model: PreTrainedModel = MistralForCausalLM(MistralConfig(**_SMALL, sliding_window=16))
    else:
        layers = ["sliding_attention", "full_attention"]
        model = Gemma3ForCausalLM(Gemma3TextConfig(**_SMALL, sliding_window=16, layer_types=layers))
    asked = [list(range(5, 5 + length)) for length in (3, 16, 17, 90)]
    engine = engine_of(model.eval())
    sampled = await sample(engine, asked, free(24))
    engine.park()
    assert max(gap(model, *pair) for pair in zip(asked, sampled, strict=True)) < EXACT


@pytest.mark.parametrize("with_adapters", [False, True])
async def test_autocast_over_float32_weights_samples_as_the_trainer_computes(
    model: PreTrainedModel, engine_of: Make, with_adapters: bool
) -> None:
    trained = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])) if with_adapters else model
    asked = prompts(6)
    engine = engine_of(trained, autocast=torch.bfloat16)
    sampled = await sample(engine, asked, free(24))
    engine.park()
    assert {one.dtype for one in trained.parameters()} == {torch.float32}, "weights are not cast"
    gaps = [gap(trained, *pair, dtype=torch.bfloat16) for pair in zip(asked, sampled, strict=True)]
    full = [gap(trained, *pair) for pair in zip(asked, sampled, strict=True)]
    assert max(gaps) < 0.05 and sum(gaps) < sum(full), (gaps, full)


async def test_weights_in_bfloat16(model: PreTrainedModel, engine_of: Make) -> None:
    asked = prompts(6)
    engine = engine_of(model.to(torch.bfloat16))
    sampled = await sample(engine, asked, free(24))
    engine.park()
    assert max(gap(model, *pair) for pair in zip(asked, sampled, strict=True)) < 0.05


async def test_adapters_are_sampled_from_active_and_unmerged(model: PreTrainedModel, engine_of: Make) -> None:
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_()
    engine = engine_of(adapted.train())
    (sampled,) = await sample(engine, [[5, 6, 7]], free(24))
    engine.park()
    assert adapted.training and all(m.training for m in adapted.modules() if "Dropout" in type(m).__name__)
    adapted.eval()
    assert gap(adapted, [5, 6, 7], sampled) < EXACT
    with adapted.disable_adapter():
        assert gap(adapted, [5, 6, 7], sampled) > 0.01


async def test_the_model_is_given_back_as_it_was(model: PreTrainedModel, engine: Engine) -> None:
    gc.unfreeze()  # what the tests did: the engine does so itself where nobody has
    frozen = model.get_submodule("model.layers.0").eval()  # a user keeps it in eval mode
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.config.use_cache = False
    before = model.config._attn_implementation
    (sampled,) = await sample(engine, [[5, 6, 7]], free(8))
    with pytest.raises(ValueError, match="park it before any other forward pass"):
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert engine._session is not None
    keys_and_values = weakref.ref(engine._session._manager.batch_processor.cache)
    engine.park()
    assert keys_and_values() is None and gc.get_freeze_count() == 0
    assert model.training and not frozen.training and not any(m.training for m in frozen.modules())
    assert model.config._attn_implementation == before and not model._forward_hooks and not model._forward_pre_hooks
    assert not hasattr(model, "_cached_continuous_batching_manager")
    model(
        input_ids=torch.tensor([[5, 6, 7, *sampled.ids]]), labels=torch.tensor([[5, 6, 7, *sampled.ids]])
    ).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


async def test_requests_that_run_at_a_park_go_on_with_the_weights_of_later(
    model: PreTrainedModel, engine: Engine
) -> None:
    running = [asyncio.ensure_future(engine.generate(prompt, free(120))) for prompt in prompts(8)]
    await until(lambda: engine._session is not None and engine.counters.running == 8)
    await asyncio.to_thread(engine.park)
    assert model.training and not any(task.done() for task in running)
    held = asyncio.ensure_future(engine.generate([5, 6, 7], free(4)))
    await until(lambda: engine.counters.held == 9)
    engine.resume()  # of a pause that there is not: the trainer has the model
    assert model.training and engine.counters.held == 9
    engine.unpark()
    sampled = await asyncio.gather(*running)
    engine.park()
    assert [len(one.ids) for one in sampled] == [len(one.logprobs) for one in sampled] == [120] * 8
    assert max(gap(model.eval(), *pair) for pair in zip(prompts(8), sampled, strict=True)) < EXACT
    assert len((await held).ids) == 4


@pytest.mark.parametrize("mode", ["wait", "abort", "keep"])
async def test_pauses(engine: Engine, mode: str) -> None:
    running = [asyncio.ensure_future(engine.generate(prompt, free(100))) for prompt in prompts(4)]
    await until(lambda: engine.counters.running == 4)
    pause = asyncio.ensure_future(engine.pause(mode))  # type: ignore[arg-type]
    await until(lambda: engine.is_paused)
    late = asyncio.ensure_future(engine.generate([5, 6, 7], free(4)))
    await pause
    assert engine.counters.running == 0 and engine._session is None
    if mode == "keep":
        assert not any(task.done() for task in running)
    else:
        ended = await asyncio.gather(*running)
        assert {one.finish_reason for one in ended} == {"length" if mode == "wait" else "abort"}
        assert all(len(one.ids) == len(one.logprobs) for one in ended)
    assert not late.done()
    engine.resume()
    assert len((await late).ids) == 4
    assert {len(one.ids) for one in await asyncio.gather(*running)} <= ({100} if mode != "abort" else set(range(100)))


async def test_a_dead_thread_is_told_to_all_at_once(model: PreTrainedModel, engine: Engine) -> None:
    running = [asyncio.ensure_future(engine.generate(prompt, free(200))) for prompt in prompts(4)]
    await until(lambda: engine.counters.running == 4)

    def fail(*_: object) -> None:
        raise RuntimeError("no memory left")

    with model.register_forward_pre_hook(fail):
        errors = await asyncio.gather(*running, return_exceptions=True)
    assert {type(error) for error in errors} == {EngineLostError}
    assert all("no memory left" in str(error) for error in errors)
    with pytest.raises(EngineLostError, match="no memory left"):
        await engine.generate([5, 6, 7], free(4))
    with pytest.raises(EngineLostError, match="no memory left"):
        engine.check()
    engine.park()
    assert model.training
    with pytest.raises(EngineLostError):  # held by nothing: a trainer that waits would wait forever
        await engine.generate([5, 6, 7], free(4))
    engine.take(model)
    engine.unpark()
    assert len((await engine.generate([5, 6, 7], free(4))).ids) == 4


async def test_a_thread_that_ends_without_a_word_is_noticed(
    model: PreTrainedModel, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("threading.excepthook", lambda _: None)  # pytest would warn of it
    running = asyncio.ensure_future(engine.generate([5, 6, 7], free(200)))
    await until(lambda: engine.counters.running == 1)

    def leave(*_: object) -> None:
        raise SystemExit  # transformers catches exceptions, not this

    with model.register_forward_pre_hook(leave), pytest.raises(EngineLostError, match="without an error"):
        await running


async def test_a_thread_that_hangs_is_told_and_left_behind(model: PreTrainedModel, engine_of: Make) -> None:
    """In a forward pass that never ends, as one on a device that hangs."""
    engine, never = engine_of(model, hang_timeout_s=0.2), threading.Event()
    asked = [asyncio.ensure_future(engine.generate(prompt, free(200))) for prompt in prompts(4)]
    await until(lambda: engine.counters.running == 4)
    session = engine._session
    assert session is not None
    with model.register_forward_pre_hook(lambda *_: never.wait()):
        errors = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(error) for error in errors} == {EngineLostError}
    with pytest.raises(EngineLostError, match=r"no forward pass for 0.2 s \(`gym_server_hang_timeout`\)"):
        engine.check()
    engine.park()
    assert model.training, "the trainer has its model"
    engine.options = dataclasses.replace(engine.options, hang_timeout_s=60.0)
    engine.take(model)
    engine.unpark()
    assert len((await engine.generate([5, 6, 7], free(4))).ids) == 4
    never.set()
    await until(lambda: not session._manager.is_running())
    assert len((await engine.generate([5, 6, 7], free(4))).ids) == 4


async def test_time_in_which_the_process_was_frozen_is_no_hang(
    model: PreTrainedModel, engine_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, begun, goes_on = engine_of(model), threading.Event(), threading.Event()
    clock = SimpleNamespace(now=time.monotonic())
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(session_module, "time", clock)

    def hang(*_: Any) -> None:
        begun.set()
        assert goes_on.wait(60)

    with model.register_forward_pre_hook(hang):
        asked = asyncio.ensure_future(engine.generate([5, 6, 7], free(4)))
        await until(begun.is_set)
        session = engine._session
        assert session is not None
        clock.now += 400  # stopped, and continued
        engine.check()
        with pytest.raises(EngineLostError, match="no forward pass for 300 s"):
            for _ in range(16):
                clock.now += 20
                engine.check()
        with pytest.raises(EngineLostError):
            await asked
        engine.park()
        goes_on.set()
        await until(lambda: not session._manager.is_running())


async def test_a_cancelled_request_frees_its_memory(engine: Engine) -> None:
    kept = asyncio.ensure_future(engine.generate([5, 6, 7], free(240)))
    gone = [asyncio.ensure_future(engine.generate(prompt, free(200))) for prompt in prompts(8)]
    await until(lambda: engine.counters.running == 9)
    session = engine._session
    assert session is not None
    await until(lambda: session._manager.batch_processor is not None)
    scheduler = session._manager.batch_processor.scheduler
    await until(lambda: len(scheduler.active_requests) == 9)
    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)
    await until(lambda: len(scheduler.active_requests) == 1 or kept.done())
    assert not kept.done()
    cache = scheduler.cache  # until 5.17, and later
    managers = (
        cache.group_cache_managers if hasattr(cache, "group_cache_managers") else cache.cache_allocators.values()
    )
    tables = [manager.block_table for manager in managers]
    assert all(len(table) <= 1 for table in tables)
    assert engine.counters.aborted == 8 and len((await kept).ids) == 240


async def test_more_than_there_is_memory_for_waits_for_its_turn(
    model: PreTrainedModel, engine_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl_gym.policy_server.transformers_engine.session.num_blocks", lambda *_: 12)
    asked = [prompt * 3 for prompt in prompts(12)]  # of the blocks of one request of the greatest length
    engine = engine_of(model)
    sampled = await sample(engine, asked, free(60))
    engine.park()
    assert [len(one.ids) for one in sampled] == [len(one.logprobs) for one in sampled] == [60] * 12
    assert max(gap(model, *pair) for pair in zip(asked, sampled, strict=True)) < EXACT


async def test_stops_at_tokens_of_model_and_request(engine: Engine) -> None:
    whole = await engine.generate([5, 6, 7], free(60, temperature=0.0))
    stop = whole.ids[4]
    stopped = await engine.generate(
        [5, 6, 7], SamplingRequest(max_tokens=60, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    )
    assert stopped.ids == whole.ids[: whole.ids.index(stop) + 1]
    assert (stopped.finish_reason, stopped.stop_id) == ("stop", stop)
    engine._eos = frozenset({stop})
    assert (await engine.generate([5, 6, 7], SamplingRequest(max_tokens=60, temperature=0.0))).ids == stopped.ids
    assert (await engine.generate([5, 6, 7], free(60, temperature=0.0))).ids == whole.ids


async def test_prompt_logprobs_in_between_and_while_lent(model: PreTrainedModel, engine: Engine) -> None:
    ids = list(range(20, 60))
    running = asyncio.ensure_future(engine.generate([5, 6, 7], free(100)))
    await until(lambda: engine.counters.running == 1)
    between = await asyncio.to_thread(engine.prompt_logprobs, [ids, ids[:7]])
    sampled = await running
    engine.park()
    with engine.lent():
        parked = engine.prompt_logprobs([ids])
    assert model.training
    expected = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, :-1], -1)
    torch.testing.assert_close(torch.tensor(between[0]), expected.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1))
    assert parked[0] == pytest.approx(between[0], abs=1e-6) and between[1] == pytest.approx(between[0][:6], abs=1e-5)
    assert gap(model, [5, 6, 7], sampled) < EXACT


def test_a_model_that_is_trained_is_not_touched(model: PreTrainedModel, engine: Engine) -> None:
    engine.park()
    forward = threading.Event()
    model.register_forward_pre_hook(lambda *_: forward.set())
    with engine.lent():
        pass
    for _ in range(2):
        with pytest.raises(ModelBusyError, match="the trainer computes with its model"):
            engine.prompt_logprobs([[5, 6]])
        assert model.training and not forward.is_set()
        with pytest.raises(ZeroDivisionError), engine.lent():
            raise ZeroDivisionError


def test_what_is_computed_with_a_lent_model_ends_before_it_is_taken_back(
    model: PreTrainedModel, engine: Engine
) -> None:
    engine.park()
    begun, waits, lock = threading.Event(), threading.Event(), engine._changing

    @contextmanager
    def changing() -> Iterator[None]:
        waits.set()
        with lock:
            yield

    def compute(*_: Any) -> None:
        begun.set()
        assert waits.wait(60)

    model.register_forward_pre_hook(compute)
    asking = threading.Thread(target=engine.prompt_logprobs, args=([[5, 6]],))
    try:
        with engine.lent():
            asking.start()
            assert begun.wait(60) and not model.training
            engine._change = changing  # type: ignore[method-assign]
        assert model.training
    finally:
        waits.set()
        asking.join(60)
        del engine._change


async def test_prompt_logprobs_that_hang_keep_nobody_waiting(model: PreTrainedModel, engine_of: Make) -> None:
    engine, begun, passes = engine_of(model, hang_timeout_s=0.2), threading.Event(), threading.Semaphore(0)

    def hang(*_: Any) -> None:
        begun.set()
        assert passes.acquire(timeout=60)

    with model.register_forward_pre_hook(hang):
        asking = asyncio.create_task(_called_aside(partial(engine.prompt_logprobs, [[5, 6], [7, 8]])))
        await until(begun.is_set)
        with pytest.raises(PolicyServerError, match=r"`prompt_logprobs` hangs.* 0.2 s \(`gym_server_hang_timeout`\)"):
            await asyncio.to_thread(engine.park)
        passes.release(2)
        assert len(await asking) == 2
    engine.park()
    assert model.training


async def test_tokens_out_of_the_vocabulary_are_refused_before_they_end_the_thread(engine: Engine) -> None:
    for prompt in ([5, 10**6], [5, -1]):
        with pytest.raises(UnknownTokenError, match="out of vocabulary"):
            await engine.generate(prompt, free(4))
    with pytest.raises(UnknownTokenError):
        engine.prompt_logprobs([[10**6, 5]])
    assert len((await engine.generate([5, 6, 7], free(4))).ids) == 4


async def test_nothing_is_sampled_before_there_is_a_model(model: PreTrainedModel, engine_of: Make) -> None:
    from trl_gym.policy_server.transformers_engine.session import EngineOptions

    engine = Engine(EngineOptions(max_model_len=MAX_MODEL_LEN, max_concurrency=4))
    early = asyncio.ensure_future(engine.generate([5, 6, 7], free(4)))
    engine.unpark()
    await until(lambda: engine.counters.held == 1)
    with pytest.raises(EngineLostError, match="no model yet"):
        engine.prompt_logprobs([[5, 6]])
    engine.take(torch.nn.parallel.DataParallel(model))
    assert len((await early).ids) == 4
    engine.park()


def test_a_context_that_does_not_fit_is_refused(model: PreTrainedModel, engine_of: Make) -> None:
    with pytest.raises(ConfigError, match="keys and values of a rollout of 1000000000 tokens need"):
        engine_of(model, max_model_len=10**9)
    assert model.training and "paged" not in model.config._attn_implementation
