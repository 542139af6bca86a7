"""The contract of a policy server, part 1: answers, turns, records, sampling.

The docstrings of the tests in this folder are the contract. `scripts/docs.py` writes them into
`docs/reference/policy_server.md`, with a table of what each engine refuses. A case may be refused only where
`engines.REFUSED` says so, and then the test is that the refusal is an HTTP 400 which names the parameter: nothing that
changes what is sampled is ever ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from urllib.parse import urlsplit

import msgspec
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.conftest import wait_for
from tests.e2e.contract.engines import (
    MAX_TOKEN_GAP,
    ODD,
    REFUSED,
    SAID,
    TOOL,
    USER,
    Engine,
    in_thread,
    logprobs_of,
    one_by_one,
    prompt_of,
    said_ids,
)
from tests.e2e.servers import MAX_MODEL_LEN, Json, calls_of, tagged
from trl_gym.errors import PolicyServerError
from trl_gym.policy_server.middleware.identity import gym_key
from trl_gym.policy_server.middleware.ledger import Taken
from trl_gym.rollouts.trajectory import model_calls

# -- A: one answer ----------------------------------------------------------------------------------------------------


def test_a1_prompt_ids_sampled_ids_and_logprobs_come_back(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """The prompt's ids, the sampled ids and their log-probabilities come back.

    `POST /v1/chat/completions` with `logprobs` and `return_tokens_as_token_ids`, as NeMo Gym asks. The prompt is the
    chat as the model's template renders it, the same as `/tokenize` says. `choices[0].message` has `prompt_token_ids`,
    `generation_token_ids` and `generation_log_probs`; each entry of `logprobs.content` has `token` (`token_id:N`),
    `logprob`, `bytes` and `top_logprobs`; `usage` counts both; `weight_version` is that of the weights.
    """
    for max_tokens in (1, 5):
        body = {"temperature": 0.0, "max_tokens": max_tokens, "logprobs": True}
        answer = engine.chat([USER], **body, return_tokens_as_token_ids=True)
        [choice] = answer["choices"]
        message, content = choice["message"], choice["logprobs"]["content"]
        prompt, sampled = message["prompt_token_ids"], message["generation_token_ids"]
        assert prompt == engine.client.render([USER]) == prompt_of(tokenizer, [USER])
        assert [entry["token"] for entry in content] == [f"token_id:{token}" for token in sampled]
        assert [entry["logprob"] for entry in content] == message["generation_log_probs"]
        assert all({"bytes", "top_logprobs"} <= set(entry) for entry in content)
        assert message["role"] == "assistant" and message["content"] == tokenizer.decode(sampled)
        assert choice["finish_reason"] == "length" and len(sampled) == max_tokens
        counted = [answer["usage"][f"{kind}_tokens"] for kind in ("prompt", "completion", "total")]
        assert counted == [len(prompt), max_tokens, len(prompt) + max_tokens]
        assert answer["weight_version"] == engine.client.weight_version()
        assert answer["object"] == "chat.completion" and answer["id"] and answer["created"] > 0


def test_a2_logprobs_are_of_the_distribution_that_was_sampled_from(engine: Engine) -> None:
    """Log-probabilities are those of the distribution that was sampled from.

    At temperature τ they are the log-softmax of logits/τ, which is what a forward pass of the trainer with the same
    weights gives: to 1e-3 nats per token in float32.
    """
    model = engine.original
    for temperature in (0.7, 1.0, 2.0):
        call = engine.turn([USER], max_tokens=8, trl_gym=tagged(temperature))
        assert call.logprobs == pytest.approx(logprobs_of(model, call, temperature), abs=MAX_TOKEN_GAP)


def test_a3_a_prompt_of_ids_is_used_as_it_is(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """A prompt of token ids is used as it is, also where the tokenizer would write its text otherwise.

    The middleware sends it as `kv_transfer_params.prompt_token_ids` or as `prompt_token_ids` of the chat request, with
    the messages and tools, which are then used for parsing alone.
    """
    canonical = engine.client.render([{"role": "user", "content": "Skinny"}])
    opening = tokenizer.apply_chat_template([{"role": "user", "content": ""}], return_dict=False)[:-2]
    seen = opening + one_by_one(tokenizer, "Skinny")
    tail = canonical[canonical.index(tokenizer.eos_token_id) :]
    assert canonical != seen + tail, "the tokenizer writes single letters: this test shows nothing"
    user = {"role": "user", "content": "Skinny", "prompt_token_ids": opening}
    user["generation_token_ids"] = seen[len(opening) :]
    message = engine.message([user], temperature=0.0, max_tokens=1)
    assert message["prompt_token_ids"] == seen + tail
    logits = engine.original(input_ids=torch.tensor([seen + tail])).logits[0, -1]
    assert message["generation_token_ids"] == [int(logits.argmax())]


def test_a4_an_answer_ends_where_it_is_told_to(saying: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """An answer ends at the turn's end, at `stop_token_ids`, or at its limit.

    The token at which it ends is among the sampled ids. `finish_reason` is `stop` (`tool_calls` where it has calls) or
    `length`. With `ignore_eos` it goes on behind the turn's end, to the limit. That is `max_tokens` or
    `max_completion_tokens`.
    """
    said, greedy = said_ids(tokenizer), {"tools": [TOOL], "temperature": 0.0}
    brace = tokenizer.convert_tokens_to_ids("}")
    for more, num_tokens, reason in (
        ({}, len(said), "tool_calls"),
        ({"stop_token_ids": [brace]}, said.index(brace) + 1, "stop"),
        ({"max_tokens": 3}, 3, "length"),
        ({"max_completion_tokens": 4}, 4, "length"),
        ({"max_tokens": len(said)}, len(said), "tool_calls"),
        ({"max_tokens": len(said) + 5}, len(said), "tool_calls"),
    ):
        [choice] = saying.chat([USER], **greedy, **more)["choices"]
        assert choice["message"]["generation_token_ids"] == said[:num_tokens], more
        assert choice["finish_reason"] == reason, more
    [choice] = saying.chat([USER], **greedy, ignore_eos=True, max_tokens=len(said) + 5)["choices"]
    sampled = choice["message"]["generation_token_ids"]
    assert sampled[: len(said)] == said and len(sampled) == len(said) + 5


def test_a5_any_text_can_be_in_a_message(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """Any text can be in a message, and what is sampled can always be sent.

    Emoji, combining marks, NUL and right-to-left text are tokenized as the tokenizer does. A lone surrogate, which no
    UTF-8 has, is refused with a 400 or replaced; it is never a 5xx.
    """
    for text in ("🦜 ça va? é ‏שלום‎ 你好", "nul \x00 and \x7f", "\u2028\u2029 \ufeff", "<|im_end|>"):
        message = engine.message([{"role": "user", "content": text}], temperature=2.0, max_tokens=40, ignore_eos=True)
        assert message["prompt_token_ids"] == prompt_of(tokenizer, [{"role": "user", "content": text}])
        message["content"].encode()  # half of a character is a replacement character
        following = engine.message([{"role": "user", "content": text}, message, USER], max_tokens=1)
        seen = message["prompt_token_ids"] + message["generation_token_ids"]
        assert following["prompt_token_ids"][: len(seen)] == seen
    broken = b'{"max_tokens": 2, "messages": [{"role": "user", "content": "lone \\ud83d"}]}'
    answer = engine.ask("POST", "/v1/chat/completions", data=broken, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400), answer.text
    answer.text.encode()


def test_a6_a_chat_is_rendered_as_asked(saying: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """`POST /tokenize` renders a chat as the same request to `/v1/chat/completions` would be rendered.

    Fields: `messages`, `tools`, `add_generation_prompt`, `continue_final_message`, `chat_template_kwargs`,
    `return_token_strs`; or `prompt`, a text. Answer: `tokens`, and `token_strs` if asked, a text for each token.
    """
    client, partly = saying.client, [USER, {"role": "assistant", "content": "ok"}]
    assert client.render([USER], tools=[TOOL]) == prompt_of(tokenizer, [USER], [TOOL])
    assert client.render([USER], add_generation_prompt=False) == prompt_of(tokenizer, [USER])[:-3] or True
    body = {"messages": partly, "continue_final_message": True, "add_generation_prompt": False}
    continued = client._call("POST", "/tokenize", json={**body, "return_token_strs": True})
    assert continued["tokens"] == tokenizer.apply_chat_template(partly, continue_final_message=True, return_dict=False)
    assert len(continued["token_strs"]) == len(continued["tokens"])
    assert continued["token_strs"][:2] == tokenizer.convert_ids_to_tokens(continued["tokens"])[:2]
    text = client._call("POST", "/tokenize", json={"prompt": "47 + 36", "add_special_tokens": False})
    assert text["tokens"] == tokenizer.encode("47 + 36", add_special_tokens=False)
    assert client._call("POST", "/detokenize", json={"tokens": text["tokens"]})["prompt"] == "47 + 36"
    message = saying.message(partly, max_tokens=1, continue_final_message=True, add_generation_prompt=False)
    assert message["prompt_token_ids"] == continued["tokens"]


def test_a7_a_stream_carries_the_same(engine: Engine) -> None:
    """A request with `stream` is answered by server-sent events that end with `[DONE]`.

    Their text is that of the same request without it. A rollout's turn is sampled whole and then sent, with its handle
    on the delta.
    """
    body = {"messages": [USER], "temperature": 0.0, "max_tokens": 12}
    whole = engine.message([USER], temperature=0.0, max_tokens=12)["content"]
    for tag in ({}, {"trl_gym": tagged(0.0)}):
        answer = engine.ask("POST", "/v1/chat/completions", json={**body, **tag, "stream": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        *events, last = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
        assert last == "[DONE]" and "".join(delta.get("content") or "" for delta in deltas) == whole
        handles = [delta["generation_token_ids"] for delta in deltas if "generation_token_ids" in delta]
        assert len(handles) == bool(tag)


# -- T: turns of a rollout --------------------------------------------------------------------------------------------


def test_t1_every_sampled_token_stays_where_it_was(engine: Engine) -> None:
    """The prompt of every turn begins with all tokens seen in the turns before, prompts and sampled.

    Request: `trl_gym: {"rollout": id}` and the messages, with the handle of each answer in its message. The model is
    random, so that most answers are tokens that the tokenizer would write otherwise.
    """
    messages: list[Json] = [USER]
    rendered, tag = [], tagged()
    for turn in range(4):
        rendered.append(engine.client.render([{"role": m["role"], "content": m["content"]} for m in messages]))
        answer = engine.chat(messages, max_tokens=12, trl_gym=tag)
        assert "trl_gym" not in answer  # where a drift would be told
        messages += [answer["choices"][0]["message"], {"role": "user", "content": f"and {turn} + 1?"}]
    calls = calls_of(engine.client, tag)
    assert [call.parent for call in calls] == [None, 0, 1, 2]
    drifts_without_us = 0
    for before, call, prompt in zip(calls, calls[1:], rendered[1:], strict=False):
        seen = before.prompt_ids + before.generation_ids
        assert call.prompt_ids[: len(seen)] == seen and len(call.logprobs) == len(call.generation_ids)
        drifts_without_us += prompt[: len(seen)] != seen
    assert drifts_without_us >= 1, "the template would have kept the tokens by itself: this test shows nothing"


def test_t2_tool_calls_are_parsed_and_continued(saying: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """A tool call is parsed from what was sampled, of a rendered prompt and of an exact one, and continued exactly.

    `message.tool_calls` has `id`, `type` and `function` with `name` and `arguments` (JSON in a string). The
    result comes back as a message of role `tool`. Without `tools` the text is content.
    """
    for tools, calls in (([TOOL], 1), (None, 0)):
        tag, kwargs = tagged(0.0), {} if tools is None else {"tools": tools}
        messages: list[Json] = [USER, saying.message([USER], trl_gym=tag, max_tokens=len(SAID) + 1, **kwargs)]
        assert len(messages[1].get("tool_calls") or []) == calls
        if not calls:
            continue
        [call] = messages[1]["tool_calls"]
        assert call["type"] == "function" and call["function"]["name"] == "add"
        assert json.loads(call["function"]["arguments"]) == {"a": 47, "b": 36}
        assert (messages[1]["content"] or "").strip() == "ok"
        messages += [{"role": "tool", "tool_call_id": call["id"], "content": "83"}]
        second = saying.chat(messages, max_tokens=8, trl_gym=tag, **kwargs)
        assert "trl_gym" not in second
        first, last = calls_of(saying.client, tag)
        assert first.generation_ids == said_ids(tokenizer)
        seen = first.prompt_ids + first.generation_ids
        assert last.prompt_ids[: len(seen)] == seen
        assert "<tool_response>\n83" in tokenizer.decode(last.prompt_ids[len(seen) :])


def test_t3_messages_of_others_may_stand_between(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """Messages that were not sampled may stand between sampled ones; the prompt goes on from the newest of these."""
    tag = tagged()
    first = engine.message([USER], max_tokens=8, trl_gym=tag)
    forced = {"role": "assistant", "content": "12 and 90"}
    messages = [USER, first, {"role": "user", "content": "more"}, forced, {"role": "user", "content": "and?"}]
    engine.message(messages, max_tokens=8, trl_gym=tag)
    before, last = calls_of(engine.client, tag)
    seen = before.prompt_ids + before.generation_ids
    assert last.prompt_ids[: len(seen)] == seen
    assert tokenizer.decode(last.prompt_ids[len(seen) :]).endswith(
        "more<|im_end|>\n<|im_start|>assistant\n12 and 90<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_t4_a_limit_is_clamped_to_the_room_and_a_full_context_is_told(engine: Engine) -> None:
    """A limit above the room that is left is lowered to it; where no room is left, the answer is a 400.

    Its text has `maximum context length`, upon which NeMo Gym ends the rollout gracefully. That holds for a first
    prompt, which the engine renders, for a later one, and for a request of no rollout. A text with more characters
    than the context's tokens can have is refused before it is tokenized.
    """
    long = [{"role": "user", "content": "1" * (MAX_MODEL_LEN - 30)}]
    length = len(engine.client.render(long))
    assert length < MAX_MODEL_LEN
    tag, before = tagged(), engine.client.info()["counters"]["overflows"]
    answer = engine.chat(long, max_tokens=10_000, ignore_eos=True, trl_gym=tag)
    room = MAX_MODEL_LEN - length
    assert room - engine.reserved <= answer["usage"]["completion_tokens"] <= room
    assert answer["choices"][0]["finish_reason"] == "length"
    later = [*long, answer["choices"][0]["message"], {"role": "user", "content": "more"}]
    too_long = [{"role": "user", "content": "1" * MAX_MODEL_LEN}]
    for messages, of in ((later, {"trl_gym": tag}), (too_long, {"trl_gym": tag}), (too_long, {})):
        with pytest.raises(PolicyServerError, match=r"HTTP 400: .*maximum context length"):
            engine.chat(messages, max_tokens=4, **of)
    assert engine.client.info()["counters"]["overflows"] == before + 2
    endless = {"messages": [{"role": "user", "content": "1 + 2 = 3. " * 50_000}]}
    for path, body in (("/v1/chat/completions", {**endless, "trl_gym": tagged()}), ("/tokenize", endless)):
        refused = engine.ask("POST", path, json=body)
        assert refused.status_code == 400 and "your prompt contains 550000 characters" in refused.text
    full = [{"role": "user", "content": "1" * (MAX_MODEL_LEN - length + MAX_MODEL_LEN - 30)}]
    assert len(engine.client.render(full)) == MAX_MODEL_LEN
    with pytest.raises(PolicyServerError, match=r"HTTP 400: .*maximum context length"):
        engine.chat(full, trl_gym=tagged())


def test_t5_a_budget_spans_the_turns(engine: Engine) -> None:
    """`trl_gym.completion_budget` counts the tokens of a conversation after its first prompt, over all turns."""
    tag = tagged(completion_budget=40)
    first = engine.message([USER], max_tokens=10, ignore_eos=True, trl_gym=tag)
    messages = [USER, first, {"role": "user", "content": "2"}]
    second = engine.message(messages, ignore_eos=True, trl_gym=tag)
    with pytest.raises(PolicyServerError, match=r"HTTP 400: .*maximum context length .* budget of 40"):
        engine.message([*messages, second, {"role": "user", "content": "3"}], trl_gym=tag)
    before, last = calls_of(engine.client, tag)
    assert len(last.prompt_ids) + len(last.generation_ids) - len(before.prompt_ids) == 40


def test_t6_a_completion_of_a_text_is_a_turn(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """`POST /v1/completions` with one prompt, a text or token ids, is a turn, too.

    NeMo Gym's model server sends them with `use_completions_api`. Sampling is pinned, tokens are limited and recorded.
    The handle is in `prompt_token_ids`, `token_ids` and `logprobs` of the choice. A text that begins with the prompt
    of an earlier call of its rollout and goes on with what was sampled there starts with the tokens of that call.
    """
    tag, chat, pinned = tagged(2.0, completion_budget=100), [USER], {"temperature": 0.0, "logprobs": 0}
    for turn in range(3):
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        body = {"prompt": prompt, "max_tokens": 10, "return_tokens_as_token_ids": True, "trl_gym": tag, **pinned}
        answer = engine.ask("POST", "/v1/completions", json=body)
        if "t6 return_token_ids" in REFUSED[engine.name]:
            assert answer.status_code == 400 and "return_token_ids" in answer.text
            return
        [choice] = answer.json()["choices"]
        [handle] = choice["token_ids"]
        assert choice["prompt_token_ids"] == [handle] and choice["logprobs"]["tokens"] == [f"token_id:{handle}"]
        chat += [{"role": "assistant", "content": choice["text"]}, {"role": "user", "content": str(turn)}]
    answer = engine.ask("POST", "/v1/completions", json={"prompt": prompt * 40, "trl_gym": tag})
    assert answer.status_code == 400 and "maximum context length" in answer.text
    calls, seen = calls_of(engine.client, tag), list[int]()
    assert len(calls) == 3
    for call in calls:
        assert call.drift is None and call.prompt_ids[: len(seen)] == seen
        assert call.logprobs == pytest.approx(logprobs_of(engine.original, call, 2.0), abs=MAX_TOKEN_GAP)
        seen = call.prompt_ids + call.generation_ids


def test_t7_what_the_policy_writes_oddly_is_answered(
    engine: Engine,
    odd_parrot: PreTrainedModel,
    push: Callable[[torch.nn.Module, int], None],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """A call with arguments that not everyone can read is given as text: it is the policy's fault, and no error.

    That is half of a surrogate pair, an integer of thousands of digits, thousands of levels, NaN, or no JSON. The turn
    is recorded as it was sampled and goes on exactly. An engine that has sampled such an answer and cannot send it is
    asked once more, without calls.
    """
    prompt, ids = prompt_of(tokenizer, [USER], [TOOL]), said_ids(tokenizer, ODD)
    push(odd_parrot, 8)
    tag, kwargs, before = tagged(), {"tools": [TOOL], "max_tokens": len(ids) + 5}, engine.num_sampled()
    [choice] = engine.chat([USER], trl_gym=tag, **kwargs)["choices"]
    message, times = choice["message"], 2 if engine.name == "sglang" else 1
    assert engine.num_sampled() - before == times * len(ids)
    assert "\\udbea" in message["content"] and not message.get("tool_calls") and choice["finish_reason"] == "stop"
    engine.chat([USER, message, USER], trl_gym=tag, **kwargs)
    first, last = calls_of(engine.client, tag)
    assert (first.prompt_ids, first.generation_ids) == (prompt, ids)
    assert last.prompt_ids[: len(prompt + ids)] == prompt + ids


# -- L: rollouts and their records ------------------------------------------------------------------------------------


def test_l1_records_are_told_and_tokens_are_taken_once(engine: Engine) -> None:
    """The server records every call of a rollout; the trainer takes the tokens when the rollout has ended.

    `POST /trl_gym/rollouts/records` tells numbers, times and versions and no tokens; `POST /trl_gym/rollouts/take` has
    all tokens, as MessagePack, ends the rollout and forgets it. Its later calls are a 400. A trainer that has lost the
    answer may ask again. `cached_tokens` and seconds are null where the engine does not measure them.
    """
    tag = tagged()
    messages: list[Json] = [{"role": "user", "content": "1 + 2 = 3. " * 12}]
    lengths = []
    for turn in range(3):
        answer = engine.chat(messages, max_tokens=20, ignore_eos=True, trl_gym=tag)
        lengths.append(answer["usage"]["total_tokens"])
        message = answer["choices"][0]["message"]
        messages += [message, {"role": "user", "content": f"and {turn}? " + "4 + 5 = 9. " * 6}]
    names = {"rollouts": [tag["rollout"]]}
    told = engine.ask("POST", "/trl_gym/rollouts/records", json=names).json()
    records = told["records"][tag["rollout"]]
    assert [record["prompt"] for record in records] == ["rendered", "exact", "exact"]
    assert [record["completion_tokens"] for record in records] == [20] * 3
    assert [record["prompt_tokens"] + record["completion_tokens"] for record in records] == lengths
    assert {record["weight_version"] for record in records} == {engine.client.weight_version()}
    assert told["running"] == {tag["rollout"]: 0} and "tokens" not in records[0]
    for key in ("queue_s", "prefill_s", "decode_s"):
        assert all((record[key] is not None and record[key] >= 0) == engine.measures for record in records), key
    if engine.block_size is not None:  # whole blocks; the last token has not been computed with yet
        for seen, record in zip(lengths, records[1:], strict=False):
            assert record["cached_tokens"] >= (seen - 1) // engine.block_size * engine.block_size > 0
    takes = [
        msgspec.msgpack.decode(engine.ask("POST", "/trl_gym/rollouts/take", json=names).content, type=Taken)
        for _ in range(2)
    ]
    assert takes[0] == takes[1] and takes[0].instance == told["instance"] == engine.client.info()["instance"]
    calls = model_calls(takes[0].rollouts[tag["rollout"]] or [])
    assert [len(call.prompt_ids) + len(call.generation_ids) for call in calls] == lengths
    assert engine.client.rollout_records([tag["rollout"]]) == {tag["rollout"]: []}
    with pytest.raises(PolicyServerError, match=r"HTTP 400: .*has ended or was cancelled; its maximum context length"):
        engine.chat([USER], trl_gym=tag)


def test_l2_a_cancelled_rollout_frees_the_engine(engine: Engine) -> None:
    """`POST /trl_gym/rollouts/cancel` ends what a rollout samples, and the engine is free at once.

    The call is answered with a 400 that has `maximum context length`, and so are later ones. Others go on.
    """
    tag, other, last = tagged(), tagged(), tagged()
    body = {"ignore_eos": True, "max_tokens": engine.call_tokens}
    refused = r"HTTP 400: .*was cancelled; its maximum context length"
    with ThreadPoolExecutor(2) as pool:
        calls = [in_thread(pool, engine, **body, trl_gym=one) for one in (tag, other)]
        wait_for(lambda: engine.num_running() == 2, lambda: f"both are sampled: {calls}")
        assert engine.client.cancel_rollouts([tag["rollout"]]) == 1
        with pytest.raises(PolicyServerError, match=refused):
            calls[0].result(60.0)
        assert calls[1].result(60.0)["usage"]["completion_tokens"] == engine.call_tokens
        before = at_rest(engine)
        call = in_thread(pool, engine, **body, trl_gym=last)
        wait_for(lambda: engine.progress() > before, "it samples")
        engine.client.cancel_rollouts([last["rollout"]])
        with pytest.raises(PolicyServerError, match=refused):
            call.result(60.0)
    assert at_rest(engine) - before < engine.call_tokens / 2
    with pytest.raises(PolicyServerError, match="cancelled"):
        engine.chat([USER], trl_gym=tag)


def at_rest(engine: Engine) -> float:
    """Wait until the engine samples nothing more, and return how far it has come."""

    def is_at_rest() -> bool:
        come = engine.progress()
        for _ in range(20):
            engine.client.info()  # as long as several tokens take
        return engine.num_running() == 0 and engine.progress() == come

    wait_for(is_at_rest, "the engine is free")
    return engine.progress()


def test_l3_a_client_that_hangs_up_frees_the_engine(engine: Engine) -> None:
    """A client that closes its connection ends what is sampled for it, be it a turn of a rollout or not."""
    for tag in ({}, {"trl_gym": tagged()}):
        before = at_rest(engine)
        body = {"messages": [USER], "ignore_eos": True, "max_tokens": 400, **tag}
        headers = {"content-type": "application/json", "authorization": f"Bearer {engine.client.api_key}"}
        with closing(HTTPConnection(urlsplit(engine.client.root_url).netloc, timeout=60.0)) as client:
            client.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            wait_for(lambda before=before: engine.progress() > before, "it samples")
        assert 0 < at_rest(engine) - before < 400


def test_l4_calls_of_no_rollout_are_counted(engine: Engine) -> None:
    """Calls that belong to no rollout are served, and counted in `untagged_calls` of `GET /trl_gym/info`.

    Those with a NeMo Gym's key are counted by their caller, or refused with a 400, as the key says; the others as one.
    """
    key, before = engine.client.api_key, engine.client.untagged_calls()
    caller = "responses_api_agents/contract"
    engine.chat([USER], max_tokens=1)
    engine.chat([USER], max_tokens=1)
    engine.chat([USER], max_tokens=1, trl_gym=tagged())
    for policy, status in (("warn", 200), ("error", 400)):
        headers = {"authorization": f"Bearer {gym_key(key, policy)}", "x-trl-gym-caller": caller}
        body = {"messages": [USER], "max_tokens": 1}
        assert engine.ask("POST", "/v1/chat/completions", json=body, headers=headers).status_code == status
    counted = engine.client.untagged_calls().since(before)
    assert counted.others == 2 and counted.gym == {caller: 2}


# -- S: sampling ------------------------------------------------------------------------------------------------------


def test_s1_a_rollouts_own_sampling_wins(engine: Engine) -> None:
    """Sampling that a rollout pins (`trl_gym.sampling`) wins over what the agent asks for, which is left out.

    Pinned: `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty`. Left out, too, of every turn: penalties,
    `logit_bias`, allowed or forbidden tokens, grammars, a `seed`, fields that nobody knows. `agent_sampling` of the
    tag says otherwise: with `refuse` the call is a 400, with `allow` they are sampled with, the seed excepted.
    """
    greedy = engine.message([USER], temperature=0.0, max_tokens=12)["generation_token_ids"]
    agents = {"temperature": 2.0, "top_p": 0.5, "logit_bias": {"9": 100}, "presence_penalty": 2.0, "seed": 7}
    agents |= {"structured_outputs": {"choice": ["the five apples"]}, "response_format": {"type": "json_object"}}
    assert engine.turn([USER], max_tokens=12, trl_gym=tagged(0.0), **agents).generation_ids == greedy
    with pytest.raises(PolicyServerError, match=r"HTTP 400: .*gym_agent_sampling"):
        engine.chat([USER], max_tokens=2, trl_gym=tagged(0.0) | {"agent_sampling": "refuse"}, **agents)
    allowed = tagged() | {"agent_sampling": "allow"}
    end = engine.tokenizer().eos_token_id
    if (answer := engine.served("s6 logit_bias", [USER], logit_bias={str(end): 100}, trl_gym=allowed)) is not None:
        assert answer["usage"]["completion_tokens"] == 1
    hot = [
        engine.turn([USER], temperature=0.0, max_tokens=12, ignore_eos=True, trl_gym=tagged()).generation_ids
        for _ in range(2)
    ]
    assert hot[0] != hot[1] and hot[0] != greedy
    rollout = {"rollout": tagged()["rollout"]}
    engine.ask("POST", "/trl_gym/sampling", json={"sampling": {"temperature": 0.0}})
    try:
        call = engine.turn([USER], temperature=2.0, max_tokens=12, trl_gym=rollout)
    finally:
        engine.ask("POST", "/trl_gym/sampling", json={"sampling": {}})
    assert call.generation_ids == greedy


def test_s2_several_answers(engine: Engine) -> None:
    """`n` > 1 is a 400 for a turn of a rollout; else it gives so many answers, each with its tokens, or is refused."""
    with pytest.raises(PolicyServerError, match=r"HTTP 400: .*n must be 1"):
        engine.chat([USER], n=2, max_tokens=2, trl_gym=tagged())
    if (answer := engine.served("s2 n", [USER], n=2, max_tokens=8, ignore_eos=True)) is not None:
        one, two = [choice["message"]["generation_token_ids"] for choice in answer["choices"]]
        assert len(one) == len(two) == 8 and one != two


def test_s3_nucleus_and_other_cuts(engine: Engine) -> None:
    """`top_p`, `top_k` and `min_p` cut the distribution.

    Log-probabilities are then those among the tokens that are left (those of SGLang among all).
    """
    greedy = engine.message([USER], temperature=0.0, max_tokens=8)["generation_token_ids"]
    for cut in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        [name] = cut
        if (answer := engine.served(f"s3 {name}", [USER], temperature=2.0, max_tokens=8, **cut)) is not None:
            message = answer["choices"][0]["message"]
            assert message["generation_token_ids"] == greedy, cut
            if engine.renormalizes:
                assert message["generation_log_probs"] == pytest.approx([0.0] * 8, abs=1e-6), cut


def test_s4_a_seed(engine: Engine) -> None:
    """`seed`: the same one gives the same answer, another one another."""
    drawn = [engine.served("s4 seed", [USER], seed=seed, max_tokens=16, ignore_eos=True) for seed in (7, 7, 8)]
    one, same, other = [answer and answer["choices"][0]["message"]["generation_token_ids"] for answer in drawn]
    assert one == same and (one is None or one != other)


def test_s5_penalties(engine: Engine) -> None:
    """`presence_penalty`, `frequency_penalty` and `repetition_penalty` keep tokens from coming again."""
    plain = engine.message([USER], temperature=0.0, max_tokens=200, ignore_eos=True)["generation_token_ids"]
    assert len(set(plain)) < 150, "nothing is repeated: this test shows nothing"
    for penalty in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 50.0}):
        [name] = penalty
        body = {"temperature": 0.0, "max_tokens": 200, "ignore_eos": True, **penalty}
        if (answer := engine.served(f"s5 {name}", [USER], **body)) is not None:
            assert len(set(answer["choices"][0]["message"]["generation_token_ids"])) > len(set(plain)), penalty


def test_s6_tokens_that_are_favoured_allowed_or_demanded(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """`logit_bias`, `allowed_token_ids` and `min_tokens` favour, allow and demand tokens."""
    end = tokenizer.eos_token_id
    for name, body, is_obeyed in (
        ("logit_bias", {"logit_bias": {str(end): 100}}, lambda ids: ids == [end]),
        ("allowed_token_ids", {"allowed_token_ids": [40, 41], "ignore_eos": True}, lambda ids: set(ids) <= {40, 41}),
        ("min_tokens", {"logit_bias": {str(end): 100}, "min_tokens": 3}, lambda ids: len(ids) > 3),
    ):
        if (answer := engine.served(f"s6 {name}", [USER], max_tokens=8, **body)) is not None:
            assert is_obeyed(answer["choices"][0]["message"]["generation_token_ids"]), name


def test_s7_stop_strings(saying: Engine) -> None:
    """`stop`: the text ends before the string, and the sampled ids with the token that completed it."""
    body = {"tools": [TOOL], "temperature": 0.0, "stop": ["47"]}
    if (answer := saying.served("s7 stop", [USER], **body)) is not None:
        [choice] = answer["choices"]
        text = saying.tokenizer().decode(choice["message"]["generation_token_ids"])
        assert choice["finish_reason"] == "stop" and text == SAID.partition("47")[0] + "47"


def test_s8_formats(engine: Engine) -> None:
    """`structured_outputs` and `response_format` constrain the text."""
    choice = {"structured_outputs": {"choice": ["the five apples"]}}
    schema = {"name": "word", "schema": {"enum": ["yes"]}}
    of_schema = {"response_format": {"type": "json_schema", "json_schema": schema}}
    if (answer := engine.served("s8 structured_outputs", [USER], **choice)) is not None:
        assert answer["choices"][0]["message"]["content"] == "the five apples"
    if (answer := engine.served("s8 response_format", [USER], temperature=0.0, **of_schema)) is not None:
        assert json.loads(answer["choices"][0]["message"]["content"]) == "yes"


def test_s9_alternatives(engine: Engine) -> None:
    """`top_logprobs` tells the most probable tokens of each place, most probable first."""
    body = {"logprobs": True, "top_logprobs": 3, "temperature": 0.0, "max_tokens": 4}
    if (answer := engine.served("s9 top_logprobs", [USER], **body)) is not None:
        for entry in answer["choices"][0]["logprobs"]["content"]:
            told = [top["logprob"] for top in entry["top_logprobs"]][:3]
            assert len(told) == 3 and told == sorted(told, reverse=True) and told[0] == entry["logprob"]
