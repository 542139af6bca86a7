"""Trajectories: every trained token is the token that was sampled, and drift is never repaired by guessing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.rollouts.sampled import calls_in, records_of
from trl_gym.policy_server.middleware.ledger import CallDrift, DriftCause
from trl_gym.policy_server.middleware.splice import num_common
from trl_gym.rollouts.trajectory import (
    Drift,
    DriftError,
    ModelCall,
    TrajectoryError,
    classify,
    contiguous_head,
    describe,
    finish_reason,
    from_calls,
    make_decoder,
    model_calls,
    report_drift,
)

token = st.integers(0, 1000)


def answer(*calls: dict[str, Any], **response: Any) -> dict[str, Any]:
    """A Gym answer with these bundles, a tool result after each as Gym puts it."""
    output: list[dict[str, Any]] = []
    for call in calls:
        output += [{"type": "function_call", "name": "f"} | call, {"type": "function_call_output", "output": "1"}]
    return {"response": {"output": output, **response}, "reward": 1.0}


def bundle(prompt: list[int], generation: list[int], logprobs: list[float] | None = None) -> dict[str, Any]:
    return {
        "prompt_token_ids": prompt,
        "generation_token_ids": generation,
        "generation_log_probs": [-0.5] * len(generation) if logprobs is None else logprobs,
    }


def call(prompt: list[int], generation: list[int], logprobs: list[float]) -> ModelCall:
    return ModelCall(prompt_ids=prompt, generation_ids=generation, logprobs=logprobs)


@st.composite
def contiguous_calls(draw: st.DrawFn) -> list[ModelCall]:
    seen = draw(st.lists(token, min_size=1, max_size=8))
    calls = []
    for _ in range(draw(st.integers(1, 5))):
        generation = draw(st.lists(token, min_size=1, max_size=6))
        logprobs = draw(st.lists(st.floats(-20, 0), min_size=len(generation), max_size=len(generation)))
        calls.append(call(list(seen), generation, logprobs))
        seen = seen + generation + draw(st.lists(token, max_size=5))
    return calls


def test_the_documented_example() -> None:
    [trajectory] = from_calls(
        calls_in(answer(bundle([1, 2], [3], [-1.0]), bundle([1, 2, 3, 4, 5], [6, 7], [-2.0, -3.0])))
    )
    assert trajectory.prompt_ids == [1, 2]
    assert trajectory.completion_ids == [3, 4, 5, 6, 7]
    assert trajectory.env_mask == [1, 0, 0, 1, 1]
    assert trajectory.logprobs == [-1.0, 0.0, 0.0, -2.0, -3.0]
    assert trajectory.turn_ends == [1, 5]
    assert trajectory.num_turns == 2
    assert trajectory.drift is None


@given(contiguous_calls())
def test_contiguous_calls_are_joined_without_loss(calls: list[ModelCall]) -> None:
    trajectory = contiguous_head(calls)
    assert trajectory.drift is None
    assert trajectory.prompt_ids + trajectory.completion_ids == calls[-1].prompt_ids + calls[-1].generation_ids
    sampled = [t for t, mask in zip(trajectory.completion_ids, trajectory.env_mask, strict=True) if mask]
    assert sampled == [t for call in calls for t in call.generation_ids]
    drawn = [p for p, mask in zip(trajectory.logprobs, trajectory.env_mask, strict=True) if mask]
    assert drawn == [p for call in calls for p in call.logprobs]
    assert all(p == 0.0 for p, mask in zip(trajectory.logprobs, trajectory.env_mask, strict=True) if not mask)
    assert trajectory.turn_ends[-1] == len(trajectory.completion_ids)


@given(contiguous_calls(), st.data())
def test_one_changed_token_of_the_history_is_drift_at_that_token(calls: list[ModelCall], data: st.DataObject) -> None:
    turn = data.draw(st.integers(0, len(calls) - 1))
    if turn == 0:
        return
    seen_before = calls[turn - 1].prompt_ids + calls[turn - 1].generation_ids
    position = data.draw(st.integers(0, len(seen_before) - 1))
    changed = list(calls[turn].prompt_ids)
    changed[position] += 1
    drifted = [*calls[:turn], call(changed, calls[turn].generation_ids, calls[turn].logprobs), *calls[turn + 1 :]]
    trajectory = contiguous_head(drifted)
    assert trajectory.drift is not None
    assert (trajectory.drift.turn, trajectory.drift.position) == (turn, position)
    assert trajectory.drift.seen == seen_before
    assert trajectory.drift.prompt == changed
    assert trajectory.drift.sampled == [0] * len(calls[0].prompt_ids) + trajectory.env_mask
    assert trajectory.completion_ids == contiguous_head(calls[:turn]).completion_ids


def test_a_shorter_prompt_is_drift() -> None:
    """A template that strips history makes the prompt shorter; TRL's removed example appended it in silence."""
    trajectory = contiguous_head([call([1, 2], [3, 4], [0.0, 0.0]), call([1, 2, 3], [9], [0.0])])
    assert trajectory.drift is not None
    assert trajectory.completion_ids == [3, 4]
    assert "model call 1" in describe(trajectory.drift)


def test_drift_keeps_the_head() -> None:
    [trajectory] = from_calls(calls_in(answer(bundle([1], [2]), bundle([9, 9, 9], [4]))), drift="truncate")
    assert trajectory.completion_ids == [2] and trajectory.drift is not None


def test_a_split_history_is_trained_in_further_rows() -> None:
    first, second = from_calls(calls_in(answer(bundle([1], [2]), bundle([9, 9, 9], [4]))), drift="split")
    assert (first.prompt_ids, first.completion_ids, first.drift) == ([1], [2], None)
    assert (second.prompt_ids, second.completion_ids, second.env_mask) == ([9, 9, 9], [4], [1])


def test_a_split_says_where_and_why_it_is() -> None:
    given = answer(bundle([1], [2]), bundle([9, 2], [4]), bundle([5], [6]))
    why = CallDrift(DriftCause.HISTORY_REWRITTEN, "the agent changed messages")
    first, second, third = from_calls(model_calls(records_of(given, {1: why})), drift="split")
    assert first.drift is not None and second.drift is None and third.drift is None  # the last begins again
    assert (first.drift.turn, first.drift.position, first.drift.known) == (1, 0, why)
    assert report_drift(first.drift, decode).cause is DriftCause.HISTORY_REWRITTEN


def test_a_call_that_two_others_continue_is_trained_once() -> None:
    given = answer(bundle([1], [2]), bundle([1, 2, 3], [4]), bundle([1, 2, 5], [6]))
    first, second = from_calls(calls_in(given), drift="split")
    assert (first.completion_ids, first.env_mask) == ([2, 3, 4], [1, 0, 1])
    assert (second.prompt_ids, second.completion_ids) == ([1, 2, 5], [6])


@pytest.mark.parametrize("policy", ["exclude", "error"])
def test_drift_can_be_refused(policy: Any) -> None:
    with pytest.raises(DriftError, match="model call 1") as caught:
        from_calls(calls_in(answer(bundle([1], [2]), bundle([9, 9, 9], [4]))), drift=policy)
    assert (caught.value.drift.turn, caught.value.drift.position) == (1, 0)


def test_without_a_call_there_is_nothing_to_train() -> None:
    with pytest.raises(TrajectoryError, match="no trainable token"):
        from_calls([])
    assert finish_reason({"response": {"incomplete_details": {"reason": "max_output_tokens"}}}) == "max_output_tokens"
    assert finish_reason({"response": {}}) == "stop"


# -- drift is reported: where, in which words, and for which reason ---------------------------------------------------


PAIR = 256  # token PAIR + 256 * a + b spells the bytes a, b; below it a token is one byte


def decode(ids: Any) -> str:
    spelled = (bytes([i]) if i < PAIR else bytes(divmod(i - PAIR, 256)) for i in ids)
    return b"".join(spelled).decode("utf-8", errors="replace")


def encode(text: str, merges: list[bool] | None = None) -> list[int]:
    """Tokens of one byte, or of two where the next of `merges` says so; characters may be torn apart."""
    raw, ids, merges = text.encode(), [], list(merges or [])
    while raw:
        width = 2 if len(raw) > 1 and merges and merges.pop() else 1
        ids.append(raw[0] if width == 1 else PAIR + 256 * raw[0] + raw[1])
        raw = raw[width:]
    return ids


def drift_of(seen: list[int], sampled: list[int], prompt: list[int], turn: int = 1) -> Drift:
    position = num_common(seen, prompt)
    assert position < len(seen)
    return Drift(turn, position, seen, sampled, prompt)


texts = st.text(alphabet="ab {é€😀", min_size=1, max_size=12)
merges = st.lists(st.booleans(), max_size=24)


@given(st.lists(st.tuples(texts, st.booleans(), merges, merges), min_size=1, max_size=4))
def test_the_same_text_in_other_tokens_is_retokenized(parts: list[Any]) -> None:
    seen = [token for text, _, first, _ in parts for token in encode(text, first)]
    again = [token for text, _, _, second in parts for token in encode(text, second)]
    assume(again != seen)
    drift = drift_of(seen, [1] * len(seen), [*again, *encode("more")])
    assert classify(drift, decode) is DriftCause.RETOKENIZED


@given(st.lists(st.tuples(texts, st.booleans(), merges, merges), min_size=1, max_size=4), st.data())
def test_the_cause_is_who_wrote_the_first_text_that_differs(parts: list[Any], data: st.DataObject) -> None:
    """Whatever was retokenized before it."""
    seen = [token for text, _, first, _ in parts for token in encode(text, first)]
    sampled = [int(by_policy) for text, by_policy, first, _ in parts for _ in encode(text, first)]
    index = data.draw(st.integers(0, len(parts) - 1))
    text, by_policy, _, again = parts[index]
    place = data.draw(st.integers(0, len(text) - 1))
    left_out = data.draw(st.booleans())
    changed = text[:place] + ("" if left_out else "#" + text[place:])
    before = [token for text, _, _, second in parts[:index] for token in encode(text, second)]
    prompt = [*before, *encode(changed, again), *encode("#tail")]
    expected = DriftCause.RETEMPLATED if by_policy else DriftCause.HISTORY_REWRITTEN
    assert classify(drift_of(seen, sampled, prompt), decode) is expected


def test_a_turn_cut_inside_a_character_is_retokenized_when_it_comes_back_as_text() -> None:
    seen = [*encode("ab"), *"€".encode()[:2]]
    prompt = [*encode("ab", [True]), *encode("\ufffd and on")]
    assert classify(drift_of(seen, [0, 0, 1, 1], prompt), decode) is DriftCause.RETOKENIZED


@pytest.mark.parametrize(("sampled", "cause"), [(1, DriftCause.RETEMPLATED), (0, DriftCause.HISTORY_REWRITTEN)])
def test_a_shorter_prompt_is_classified_by_what_it_leaves_out(sampled: int, cause: DriftCause) -> None:
    assert classify(drift_of(encode("abc"), [0, 0, sampled], encode("ab")), decode) is cause


def test_the_report_shows_both_sides() -> None:
    seen, prompt = encode("system. user: 1+1? it is TWO"), encode("system. user: 1+1? it is 2, next")
    report = report_drift(drift_of(seen, [0] * 19 + [1] * 9, prompt, turn=2), decode)
    assert (report.turn, report.position, report.cause) == (2, 25, DriftCause.RETEMPLATED)
    assert report.seen_text == " 1+1? it is TWO"
    assert report.prompt_text == " 1+1? it is 2, next"
    for words in (
        "model call 2",
        "retemplated",
        "at token 25",
        "' 1+1? it is '"[-8:],
        "'2, next'",
        "'TWO'",
        "[50, 44",
    ):
        assert words in report.text
    assert report.as_json()["cause"] == "retemplated"


def test_the_server_is_believed_where_it_says_a_cause() -> None:
    """Only it can know that the agent had sent no ids."""
    drift = drift_of(encode("abc"), [0, 1, 1], encode("aXc"))
    assert report_drift(drift, decode).cause is DriftCause.RETEMPLATED
    known = CallDrift(DriftCause.MESSAGE_WITHOUT_IDS, "the agent sent no token ids")
    report = report_drift(replace(drift, known=known), decode)
    assert report.cause is DriftCause.MESSAGE_WITHOUT_IDS
    assert "the agent sent no token ids" in report.text


@given(st.binary(min_size=1, max_size=60), st.binary(max_size=60), st.binary(max_size=10))
def test_bytes_that_are_no_text_can_be_explained(common: bytes, tail: bytes, other: bytes) -> None:
    seen, prompt = [*common, *tail, 1], [*common, *other, 2, 3]
    assume(num_common(seen, prompt) < len(seen))
    report = report_drift(drift_of(seen, [0] * len(common) + [1] * (len(tail) + 1), prompt), decode)
    assert report.cause in DriftCause
    report.text.encode()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = {char: index for index, char in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"eos_token": "<|end|>"})
    return fast


def test_a_decoder_takes_any_ids() -> None:
    tokenizer = byte_tokenizer()
    text = make_decoder(tokenizer)
    euro = tokenizer("€")["input_ids"]
    assert len(euro) == 3
    assert text([*tokenizer("a b.")["input_ids"], tokenizer.eos_token_id, *euro]) == "a b.<|end|>€"
    assert text([*euro[:2], 4711, 2**40, -1, *euro]) == "\ufffd<token 4711><token 1099511627776><token -1>€"
    assert text([]) == ""
