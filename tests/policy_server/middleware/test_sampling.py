"""The lists of fields against the request models of the installed vLLM."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.policy_server.middleware.sampling import (
    HARMLESS,
    PINNED,
    SKEWING,
    leave_out,
    own_sampling,
    shortened,
)
from trl_gym.rollout_options import SAMPLING_KEYS

_SPEC = importlib.util.find_spec("vllm")
VLLM = Path(_SPEC.origin).parent if _SPEC is not None and _SPEC.origin is not None else None
REQUESTS = {
    "entrypoints/openai/chat_completion/protocol.py": "ChatCompletionRequest",
    "entrypoints/openai/completion/protocol.py": "CompletionRequest",
}
# Parameters that requests of the API do not have, or have under the names of the right.
ENGINE_ONLY = {
    *("detokenize", "flat_logprobs", "output_kind", "skip_clone", "output_text_buffer_length"),
    *("prompt_logprob_token_ids", "prompt_logprob_start", "skip_reading_prefix_cache", "trace_decode_token_ids"),
    "extra_args",  # `vllm_xargs`
}


def fields_of(file: str, name: str) -> set[str]:
    """Fields of a class in vLLM's sources, which take seconds to import."""
    assert VLLM is not None
    tree = ast.parse((VLLM / file).read_text())
    [found] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    names = {
        node.target.id for node in found.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    return {one for one in names if not one.startswith("_")}


@pytest.mark.skipif(VLLM is None, reason="vLLM is not installed")
@pytest.mark.parametrize(("file", "name"), REQUESTS.items())
def test_every_field_of_vllms_requests_is_in_one_list(file: str, name: str) -> None:
    """A field that a new version of vLLM has is left out of turns until someone has looked what it does."""
    fields = fields_of(file, name)
    assert len(fields) > 40
    assert fields <= {*HARMLESS, *PINNED, *SKEWING, "seed"}


@pytest.mark.skipif(VLLM is None, reason="vLLM is not installed")
def test_every_sampling_parameter_of_vllm_is_known() -> None:
    """Nothing that changes the distribution is taken for harmless because the API calls it otherwise."""
    fields = fields_of("sampling_params.py", "SamplingParams")
    assert len(fields) > 30
    assert fields - ENGINE_ONLY <= {*HARMLESS, *PINNED, *SKEWING, "seed"}


def test_the_lists_do_not_overlap() -> None:
    assert not HARMLESS & {*PINNED, *SKEWING, "seed"}
    assert not {*PINNED} & SKEWING.keys()
    assert PINNED == SAMPLING_KEYS


@given(
    body=st.dictionaries(
        st.sampled_from([*HARMLESS, *PINNED, *SKEWING, "seed", "new"]),
        st.none() | st.integers() | st.text(max_size=3) | st.lists(st.dictionaries(st.just("function"), st.none())),
    )
)
def test_what_was_left_out_is_not_found_again(body: dict[str, object]) -> None:
    before = dict(body)
    names = own_sampling(body)
    leave_out(body, names)
    assert own_sampling(body) == []
    assert {name: value for name, value in before.items() if name in HARMLESS | {*PINNED}}.items() <= body.items()
    assert not set(names) & (HARMLESS | {*PINNED})


def test_names_in_a_record_are_bounded() -> None:
    assert shortened(["b", "a", "b"]) == ("a", "b")
    found = shortened([f"{number}" + "x" * 1000 for number in range(1000)])
    assert sum(map(len, found)) <= 16 * 64
