"""Conversation and tokens of a rollout, as the page gets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.report.synthetic import make_tokenizer
from trl_gym.report.bodies import Pieces, Shared, conversation_body, run_lengths, token_bodies


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Pieces:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    make_tokenizer().save(str(path))
    return Pieces(path)


def test_a_model_call_ends_with_the_item_that_carries_its_tokens() -> None:
    output = [
        {"type": "reasoning", "summary": [{"text": "hm"}]},
        {"type": "function_call", "name": "add", "arguments": "{}", "call_id": "1", "generation_token_ids": [1]},
        {"type": "function_call_output", "call_id": "1", "output": "Internal Server Error"},
        {"type": "message", "role": "assistant", "content": [{"text": "done"}], "generation_token_ids": [2]},
        {"type": "message", "role": "user", "content": "go on"},
        {"type": "message", "role": "assistant", "content": "so"},
    ]
    body = conversation_body({"row": {}, "response": {"output": output}}, Shared())
    assert [item["turn"] for item in body["output"]] == [0, 0, None, 1, None, 2]
    assert [item["kind"] for item in body["output"]] == [
        "reasoning",
        "call",
        "result",
        "message",
        "message",
        "message",
    ]
    assert [item["text"] for item in body["output"]] == ["hm", "{}", "Internal Server Error", "done", "go on", "so"]
    assert body["output"][2]["error"] is True


def test_without_token_ids_a_call_is_what_stands_between_results() -> None:
    output = [
        {"type": "function_call", "name": "add"},
        {"type": "function_call", "name": "add"},
        {"type": "function_call_output", "output": "2"},
        {"type": "message", "role": "assistant", "content": "2"},
    ]
    body = conversation_body({"row": {}, "response": {"output": output}}, Shared())
    assert [item["turn"] for item in body["output"]] == [0, 0, None, 1]


@pytest.mark.parametrize(
    ("given_input", "texts"),
    [
        ("hello", ["hello"]),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_image"}]}],
            ["a[input_image]"],
        ),
        (None, []),
    ],
)
def test_input_may_be_a_text_or_messages_or_parts(given_input: Any, texts: list[str]) -> None:
    shared = Shared()
    body = conversation_body({"row": {"responses_create_params": {"input": given_input}}}, shared)
    assert [item["text"] for item in shared.values[body["input"]]] == texts


def test_an_item_of_an_unknown_kind_is_shown_without_its_tokens() -> None:
    item = {"type": "web_search", "query": "q", "generation_token_ids": [1], "prompt_token_ids": [2]}
    body = conversation_body({"row": {}, "response": {"output": [item]}}, Shared())
    assert body["output"][0]["role"] == "assistant" and "token_ids" not in body["output"][0]["text"]


@given(st.lists(st.integers(0, 1)))
def test_run_lengths_are_the_mask(mask: list[int]) -> None:
    lengths = run_lengths(mask)
    assert [k % 2 for k, length in enumerate(lengths) for _ in range(length)] == mask


def test_only_log_probabilities_of_sampled_tokens_are_kept(pieces: Pieces) -> None:
    record = {
        "prompt_ids": [1],
        "completion_ids": [2, 3, 4],
        "env_mask": [1, 0, 1],
        "logprobs": [-0.123456, 0.0, -2e-7],
    }
    [body] = token_bodies(record, Shared(), pieces, [[-0.123457, 9.0, -3e-7]])
    assert (body["mask"], body["logprobs"], body["gaps"]) == ([0, 1, 1, 1], [-0.1235, -2e-7], [-1e-6, -1e-7])


def test_a_rollout_without_tokens_has_no_token_body(pieces: Pieces) -> None:
    assert token_bodies({"prompt_ids": [], "completion_ids": []}, Shared(), pieces) == []


def test_each_row_has_its_own_tokens(pieces: Pieces) -> None:
    """Of the second the trainer's side is not recorded: it was dropped."""
    tokens = {"prompt_ids": [1], "completion_ids": [2], "env_mask": [1], "logprobs": [-0.5], "turn_ends": [1]}
    record = tokens | {"further_rows": [tokens | {"prompt_ids": [3, 4]}, tokens | {"completion_ids": [9]}]}
    shared = Shared()
    bodies = token_bodies(record, shared, pieces, [[-0.6], [], [-0.4]])
    assert [shared.values[body["prompt"]] for body in bodies] == [[1], [3, 4], [1]]
    assert [body["ids"] for body in bodies] == [[2], [2], [9]]
    assert [body["gaps"] for body in bodies] == [[-0.1], None, [0.1]]


@given(text=st.text(max_size=40))
@example(text="\ufffd\U0001f4da\ufffd")
def test_pieces_and_glyphs_spell_the_text(pieces: Pieces, text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    ids = make_tokenizer().encode(text).ids
    pieces.add(ids)
    glyphs = pieces.glyphs(ids)
    assert "".join(glyphs.get(at, pieces.text[token]) for at, token in enumerate(ids)) == text


def test_parts_that_make_no_character_stay_as_they_are(pieces: Pieces) -> None:
    ids = make_tokenizer().encode("é").ids[:1] * 3
    pieces.add(ids)
    assert pieces.glyphs(ids) == {}
    assert pieces.text[ids[0]] == "\ufffd"


def test_an_id_that_the_tokenizer_does_not_know_is_named(pieces: Pieces) -> None:
    pieces.add([99_999])
    assert pieces.text[99_999] == "<token 99999>"


def test_without_a_tokenizer_there_is_no_text() -> None:
    nothing = Pieces(None)
    nothing.add([1, 2])
    assert (nothing.is_known, nothing.text, nothing.glyphs([1, 2])) == (False, {}, {})


def test_a_leading_space_is_kept_where_the_decoder_drops_it(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "▁a": 1, "▁be": 2, "c": 3, "a": 4, "▁": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    pieces = Pieces(tmp_path / "tokenizer.json")
    pieces.add([2, 3])
    assert (pieces.text[2], pieces.text[3]) == (" be", "c")
