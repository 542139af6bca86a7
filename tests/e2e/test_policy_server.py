"""`trl-gym serve` with a real vLLM and a tiny random model. The last test ends the server."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.servers import MAX_MODEL_LEN, START_TIMEOUT_S, Served, calls_of, push_file, serve_argv, tagged
from tests.policy_server.tiny_model import build_model, build_random_policy, build_tokenizer
from trl_gym.errors import PolicyServerError
from trl_gym.policy_server.client import PolicyClient
from trl_gym.processes import bind_socket
from trl_gym.rollouts.trajectory import ModelCall

pytestmark = [pytest.mark.e2e, pytest.mark.shares("random, ended at the end")]

USER = {"role": "user", "content": "What is 47 + 36?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "the sum",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
SEQUENCES = [[5, 9, 300, 17, 44, 120, 8], [7, 8], [401, 33, 2, 3, 90]]

Json = dict[str, Any]


def sampled(served: Served, messages: list[Json], **body: Any) -> ModelCall:
    """The only model call of a rollout, with its tokens."""
    served.chat(messages, **body)
    [call] = calls_of(served.client, body["trl_gym"])
    return call


def hf_logprobs(seed: int) -> list[list[float]]:
    """What the trainer's own forward pass computes, in float32."""
    import torch

    model = build_model(build_tokenizer(), tie=True, seed=seed).eval()
    result = []
    for ids in SEQUENCES:
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        result.append(logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
    return result


def largest_difference(a: list[list[float]], b: list[list[float]]) -> float:
    return max(abs(x - y) for row, other in zip(a, b, strict=True) for x, y in zip(row, other, strict=True))


# -- mistakes, for which nothing is served ----------------------------------------------------------------------------


def failed_serve(argv: list[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=START_TIMEOUT_S)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr.partition("Last lines of its log")[0]
    return done.stderr


def test_a_folder_without_tokenizer_is_one_readable_error(random_policy: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(random_policy / "config.json", bare)
    assert "has no tokenizer: none of tokenizer.json" in failed_serve(serve_argv(bare, tmp_path / "logs"))


def test_a_busy_port_is_one_readable_error(random_policy: Path, tmp_path: Path) -> None:
    with bind_socket() as taken:
        port = taken.getsockname()[1]
        error = failed_serve(serve_argv(random_policy, tmp_path / "logs", "--port", str(port)))
    assert f"Port {port} on 127.0.0.1 is in use" in error


def test_an_unknown_flag_is_one_readable_error(random_policy: Path, tmp_path: Path) -> None:
    error = failed_serve(serve_argv(random_policy, tmp_path / "logs", "--port", "0", "--no-such-flag", "3"))
    assert "unrecognized arguments: --no-such-flag 3" in error
    assert "Leave out the flag that this engine does not know" in error
    assert "exit code 2" in error and "policy_server-" in error


# -- `trl-gym serve` --------------------------------------------------------------------------------------------------


def test_what_it_is(served: Served) -> None:
    info = served.client.info()
    assert (info["max_model_len"], info["model_names"]) == (MAX_MODEL_LEN, ["policy"])
    assert info["turn_end_token_id"] == build_tokenizer().eos_token_id
    assert info["nonce"] and info["vllm_version"] and info["package_version"]
    assert served.client.health() and served.client.models()[0]["id"] == "policy"


def test_the_bundle(served: Served) -> None:
    answer = served.chat([USER], temperature=0.0, max_tokens=5, logprobs=True, return_tokens_as_token_ids=True)
    choice = answer["choices"][0]
    message = choice["message"]
    assert message["prompt_token_ids"] == served.client.render([USER])
    assert message["prompt_token_ids"] == build_tokenizer().apply_chat_template(
        [USER], add_generation_prompt=True, return_dict=False
    )
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [f"token_id:{t}" for t in message["generation_token_ids"]]
    assert message["generation_log_probs"] == [entry["logprob"] for entry in content]
    assert answer["usage"]["prompt_tokens"] == len(message["prompt_token_ids"])
    assert answer["usage"]["completion_tokens"] == len(message["generation_token_ids"])
    assert answer["weight_version"] == served.client.weight_version()


def test_four_turns_keep_every_sampled_token(served: Served) -> None:
    messages: list[Json] = [USER]
    rendered, tag = [], tagged()
    for turn in range(4):
        plain = [{"role": m["role"], "content": m["content"]} for m in messages]
        rendered.append(served.client.render(plain))
        answer = served.chat(messages, max_tokens=12, trl_gym=tag)
        assert "trl_gym" not in answer
        messages += [answer["choices"][0]["message"], {"role": "user", "content": f"and {turn} + 1?"}]
    calls = calls_of(served.client, tag)
    assert [call.parent for call in calls] == [None, 0, 1, 2]
    drifts_without_us = 0
    for before, call, prompt in zip(calls, calls[1:], rendered[1:], strict=False):
        seen = before.prompt_ids + before.generation_ids
        assert call.prompt_ids[: len(seen)] == seen
        drifts_without_us += prompt[: len(seen)] != seen
    assert drifts_without_us >= 2, "the template would have kept the tokens by itself: this test shows nothing"


def test_a_tool_call_is_parsed_from_a_forced_prompt(served: Served) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 47, "b": 36}}\n</tool_call>'
    tag = tagged()
    messages = [USER, served.message([USER], max_tokens=8, trl_gym=tag, tools=[TOOL])]
    messages += [{"role": "user", "content": "Use the tool."}]
    before = served.client.info()["counters"]["spliced"]
    first = served.message(
        messages, tools=[TOOL], tool_choice="auto", trl_gym=tag, structured_outputs={"choice": [call]}
    )
    assert served.client.info()["counters"]["spliced"] == before + 1
    assert first["tool_calls"][0]["function"]["name"] == "add"
    messages += [first, {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "83"}]
    served.message(messages, tools=[TOOL], max_tokens=8, trl_gym=tag)
    _, before, last = calls_of(served.client, tag)
    seen = before.prompt_ids + before.generation_ids
    assert last.prompt_ids[: len(seen)] == seen
    assert "<tool_response>\n83" in build_tokenizer().decode(last.prompt_ids[len(seen) :])


def test_the_rollouts_sampling_wins(served: Served) -> None:
    pinned = sampled(served, [USER], temperature=2.0, max_tokens=12, trl_gym=tagged(temperature=0.0)).generation_ids
    assert pinned == served.message([USER], temperature=0.0, max_tokens=12)["generation_token_ids"]
    hot = [sampled(served, [USER], temperature=0.0, max_tokens=12, trl_gym=tagged()).generation_ids for _ in range(2)]
    assert hot[0] != hot[1]


def test_logprobs_are_those_of_the_sampling_temperature(served: Served) -> None:
    call = sampled(served, [USER], max_tokens=6, trl_gym=tagged(temperature=2.0))
    ids = call.prompt_ids + call.generation_ids

    import torch

    with torch.no_grad():
        logits = build_model(build_tokenizer(), tie=True, seed=0).eval()(torch.tensor([ids])).logits[0, :-1] / 2.0
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert call.logprobs == pytest.approx(expected[-len(call.generation_ids) :], abs=1e-3)


def test_the_room_is_clamped_and_an_overflow_ends_a_rollout_gracefully(served: Served) -> None:
    long = [{"role": "user", "content": "1" * (MAX_MODEL_LEN - 30)}]
    length = len(served.client.render(long))
    assert length < MAX_MODEL_LEN
    tag = tagged()
    answer = served.chat(long, max_tokens=10_000, ignore_eos=True, trl_gym=tag)
    assert answer["usage"]["completion_tokens"] == MAX_MODEL_LEN - length
    messages = [*long, answer["choices"][0]["message"], {"role": "user", "content": "more"}]
    for too_long in (messages, [{"role": "user", "content": "1" * MAX_MODEL_LEN}]):
        with pytest.raises(PolicyServerError, match=r"HTTP 400: .*maximum context length"):
            served.chat(too_long, trl_gym=tag)
    assert served.client.info()["counters"]["overflows"] >= 2


def test_a_completion_budget_spans_the_rollout(served: Served) -> None:
    tag = tagged(completion_budget=40)
    first = served.message([USER], max_tokens=10, ignore_eos=True, trl_gym=tag)
    messages = [USER, first, {"role": "user", "content": "2"}]
    served.message(messages, ignore_eos=True, trl_gym=tag)
    before, last = calls_of(served.client, tag)
    assert len(last.prompt_ids) + len(last.generation_ids) - len(before.prompt_ids) == 40


def test_t1_counting_to_five(served: Served) -> None:
    count = [{"role": "user", "content": "count to 5"}]
    body = {"temperature": 0.0, "top_p": 1.0, "logprobs": True, "max_tokens": 1}
    answer = served.chat(count, **body, return_tokens_as_token_ids=True)
    choice, message = answer["choices"][0], answer["choices"][0]["message"]
    prompt = build_tokenizer().apply_chat_template(count, add_generation_prompt=True, return_dict=False)
    assert message["prompt_token_ids"] == prompt
    [entry], [token] = choice["logprobs"]["content"], message["generation_token_ids"]
    assert entry["token"] == f"token_id:{token}"
    assert message["generation_log_probs"] == [entry["logprob"]]
    assert choice["finish_reason"] == "length"
    assert [answer["usage"][f"{kind}_tokens"] for kind in ("prompt", "completion", "total")] == [
        len(prompt),
        1,
        len(prompt) + 1,
    ]
    assert served.chat(count, **body, top_logprobs=None)["choices"][0]["logprobs"] is None  # as stock: asked for none
    assert served.client.render(count) == prompt


def test_t5_ids_that_no_tokenizer_would_write_reach_the_engine(served: Served) -> None:
    tokenizer = build_tokenizer()
    canonical = served.client.render([{"role": "user", "content": "Skinny"}])
    opening = tokenizer.apply_chat_template([{"role": "user", "content": ""}], return_dict=False)[:-2]
    letters = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "Skinny"]
    seen = opening + letters
    tail = canonical[canonical.index(tokenizer.eos_token_id) :]
    assert canonical != seen + tail, "the tokenizer writes single letters: this test shows nothing"
    user = {"role": "user", "content": "Skinny", "prompt_token_ids": opening, "generation_token_ids": letters}
    message = served.message([user], temperature=0.0, max_tokens=1)
    assert message["prompt_token_ids"] == seen + tail
    baseline = served.client._call(
        "POST",
        "/v1/completions",
        json={"prompt": [seen + tail], "temperature": 0.0, "max_tokens": 1, "return_token_ids": True},
    )
    assert message["generation_token_ids"] == baseline["choices"][0]["token_ids"]


def test_all_tokens_seen_come_from_the_prefix_cache(served: Served) -> None:
    tag = tagged()
    messages: list[Json] = [{"role": "user", "content": "1 + 2 = 3. " * 12}]
    lengths = []
    for turn in range(3):
        answer = served.chat(messages, max_tokens=20, ignore_eos=True, trl_gym=tag)
        lengths.append(answer["usage"]["total_tokens"])
        message = answer["choices"][0]["message"]
        messages += [message, {"role": "user", "content": f"and {turn}? " + "4 + 5 = 9. " * 6}]
    records = served.client.rollout_records([tag["rollout"]])[tag["rollout"]]
    block = served.client.server_config()["cache_config"]["block_size"]
    for seen, record in zip(lengths, records[1:], strict=False):
        assert record["prompt"] == "exact"
        # The engine caches whole blocks, and its last sampled token has not been computed with yet.
        assert record["cached_tokens"] >= (seen - 1) // block * block > 0
    assert all(record["decode_s"] > 0 and record["queue_s"] is not None for record in records)
    assert {record["weight_version"] for record in records} == {served.client.weight_version()}


def test_cancelling_a_rollout_ends_what_it_samples(served: Served) -> None:
    tag = tagged(rollout="abandoned")
    second = PolicyClient(served.client.base_url)  # a client belongs to one thread
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(second.chat, messages=[USER], ignore_eos=True, trl_gym=tag)
        while served.metric("num_requests_running") == 0:
            assert not running.done(), running.result()
        served.client.cancel_rollouts(["abandoned"])
        with pytest.raises(
            PolicyServerError, match=r"HTTP 400: .*abandoned has ended or was cancelled; its maximum context length"
        ):
            running.result(20.0)
    with pytest.raises(PolicyServerError, match="cancelled"):
        served.chat([USER], trl_gym=tag)


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([{**USER, "prompt_token_ids": [5], "generation_token_ids": [10**6]}], "HTTP 400: .*vocab"),
        ([{**USER, "prompt_token_ids": [5] * 600, "generation_token_ids": [6]}], "HTTP 400: .*maximum context length"),
        ([{**USER, "generation_token_ids": [6]}], "HTTP 400: .*needs prompt_token_ids"),
        ([{**USER, "prompt_token_ids": [5], "generation_token_ids": ["6"]}], "HTTP 400: .*needs generation_token_ids"),
        ([], "HTTP 400: .*`messages`"),
        ([{"role": "assistant", "content": {"no": "text"}}], "HTTP 4"),
    ],
)
def test_a_broken_turn_is_a_clear_4xx_and_the_server_lives(served: Served, messages: list[Json], why: str) -> None:
    with pytest.raises(PolicyServerError, match=why):
        served.chat(messages, max_tokens=2, trl_gym=tagged())
    assert sampled(served, [USER], max_tokens=2, trl_gym=tagged()).generation_ids


def test_a_bundle_on_only_some_messages_is_continued_from_the_newest(served: Served) -> None:
    tag = tagged()
    first = served.message([USER], max_tokens=8, trl_gym=tag)
    forced = {"role": "assistant", "content": "12 and 90"}
    messages = [USER, first, {"role": "user", "content": "more"}, forced, {"role": "user", "content": "and?"}]
    served.message(messages, max_tokens=8, trl_gym=tag)
    before, last = calls_of(served.client, tag)
    seen = before.prompt_ids + before.generation_ids
    assert last.prompt_ids[: len(seen)] == seen
    text = build_tokenizer().decode(last.prompt_ids[len(seen) :])
    assert text.endswith(
        "more<|im_end|>\n<|im_start|>assistant\n12 and 90<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_an_untagged_request_is_the_stock_answer_and_the_bundle(served: Served) -> None:
    body = {"messages": [USER], "temperature": 0.0, "max_tokens": 12}
    response = served.client._sessions[0].post(
        f"{served.client.base_url}/chat/completions", json={**body, "stream": True}
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "token_ids" not in response.text or '"token_ids":null' in response.text
    choice = served.client.chat(**body)["choices"][0]
    assert choice["logprobs"] is None and choice["token_ids"] is None
    assert choice["message"]["generation_token_ids"]
    assert len(choice["message"]["generation_log_probs"]) == len(choice["message"]["generation_token_ids"])


def test_new_weights_change_what_the_tied_model_computes(served: Served, tmp_path: Path) -> None:
    old, new = hf_logprobs(seed=0), hf_logprobs(seed=1)
    assert largest_difference(old, new) > 0.5
    assert largest_difference(served.client.prompt_logprobs(SEQUENCES), old) < 1e-3
    push_file(served.client, build_random_policy(tmp_path, seed=1) / "model.safetensors", "step-1")
    assert largest_difference(served.client.prompt_logprobs(SEQUENCES), new) < 1e-3
    assert served.client.weight_version() == "step-1"
    assert served.chat([USER], max_tokens=2)["weight_version"] == "step-1"


def test_a_file_that_cannot_be_read_leaves_the_weights_alone(served: Served, tmp_path: Path) -> None:
    before = served.client.prompt_logprobs(SEQUENCES)
    served.client.start_weight_update()
    with pytest.raises(PolicyServerError, match=r"update_weights: HTTP 500: .*No such file"):
        served.client.update_weights({"path": str(tmp_path / "missing.safetensors")})
    assert served.client.prompt_logprobs(SEQUENCES) == before


def test_ctrl_c_ends_it_and_it_said_one_line(served: Served) -> None:
    started = time.monotonic()
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(15.0) in (0, 130)
    assert time.monotonic() - started < 10.0
    assert served.process.stdout is not None
    assert served.process.stdout.read() == ""
    assert not served.client.health()
