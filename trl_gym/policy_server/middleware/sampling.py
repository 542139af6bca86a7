"""Which fields of a request decide from which distribution its tokens are drawn, and what becomes of an agent's own.

TRL computes the log-probabilities of sampled tokens again, from the logits at the run's temperature. A field that
changes the distribution otherwise (a bias, a penalty, a grammar) changes the ratio of the two, and with it the loss,
and no metric says why. So a rollout's turn is sampled without it, unless the run asks for it (`gym_agent_sampling`).

`HARMLESS` lists what a turn may say; whatever is in none of the lists counts as skewing, so that a field of a later
engine cannot slip by. A test compares the lists with the request models of the installed vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

PINNED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Parameters that a rollout's tag sets."""

SKEWING: Mapping[str, tuple[Any, ...]] = {
    "min_tokens": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "thinking_token_budget": (-1,),
    "vllm_xargs": ({},),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "tool_choice": ("auto", "none"),  # the others make a grammar of the tools
}
"""Fields that change the distribution, each with the values at which it does not (beside null)."""

SEED = "seed"
_STRICT = "tools.strict"

HARMLESS = frozenset(
    {
        # the prompt
        *("messages", "prompt", "prompt_embeds", "prompt_token_ids", "tools", "documents", "model", "suffix"),
        *("chat_template", "chat_template_kwargs", "reasoning_effort", "media_io_kwargs", "mm_processor_kwargs"),
        *("add_generation_prompt", "continue_final_message", "add_special_tokens", "echo", "kv_transfer_params"),
        *("ec_transfer_params", "truncate_prompt_tokens", "truncation_side", "cache_salt"),
        # where an answer ends; several answers and a beam search are refused (`turn.py`)
        *("max_tokens", "max_completion_tokens", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos"),
        *("repetition_detection", "n", "best_of", "use_beam_search", "length_penalty"),
        # what an answer tells
        *("logprobs", "top_logprobs", "prompt_logprobs", "logprob_token_ids", "return_tokens_as_token_ids"),
        *("return_token_ids", "return_token_offsets", "return_prompt_text", "routed_experts_prompt_start"),
        *("stream", "stream_options", "stream_interval", "skip_special_tokens", "spaces_between_special_tokens"),
        *("include_reasoning", "parallel_tool_calls"),
        # whose it is, and when; `watermarking: false` leaves out what the engine was started with
        *("user", "request_id", "session_id", "priority", "watermarking", "trl_gym"),
        # of OpenAI's, and ignored by engines
        *("metadata", "store", "service_tier", "modalities", "audio", "prediction", "safety_identifier", "verbosity"),
        *("prompt_cache_key", "prompt_cache_retention", "web_search_options", "functions", "function_call"),
    }
)
_MAX_NAMES, _MAX_NAME_CHARS = 16, 64


def own_sampling(body: Mapping[str, Any]) -> list[str]:
    """Return what of a request would change the distribution, beside `PINNED`; a seed, which makes rollouts of a group
    the same, and strict tools, of whose schemas vLLM makes a grammar, among it."""
    names = [
        name
        for name, value in body.items()
        if name not in HARMLESS and name not in PINNED and not _is_neutral(value, SKEWING.get(name, ()))
    ]
    return [*names, _STRICT] if any(map(_is_strict, _tools(body))) else names


def leave_out(body: MutableMapping[str, Any], names: list[str]) -> None:
    """Take what `own_sampling` has found out of a request."""
    for name in names:
        if name != _STRICT:
            del body[name]
        else:
            body["tools"] = [_loosened(tool) for tool in body["tools"]]


def leave_out_seed(body: MutableMapping[str, Any]) -> None:
    """Take the seed out of a request. One seed makes all members of a group the same rollout, whose advantages are
    zero, and ends vLLM's CPU engine where a prompt is computed in chunks."""
    body.pop(SEED, None)


def pin(body: MutableMapping[str, Any], sampling: Mapping[str, Any]) -> list[str]:
    """Set sampling parameters, whatever the request says; None means the server's own default, as does a parameter
    that is not there. Nothing is set if there are none. Returns those of which the request has another value."""
    if not sampling:
        return []
    own = {name: body.pop(name) for name in PINNED if name in body}
    body.update({name: value for name, value in sampling.items() if value is not None})
    return [name for name, value in own.items() if value is not None and value != sampling.get(name)]


def shortened(names: list[str]) -> tuple[str, ...]:
    """Return names for a record: some, and none of any length. Those of fields are what the client has written."""
    return tuple(name[:_MAX_NAME_CHARS] for name in sorted(set(names))[:_MAX_NAMES])


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    return value is None or value in neutral


def _tools(body: Mapping[str, Any]) -> list[Any]:
    tools = body.get("tools")
    return tools if isinstance(tools, list) else []


def _is_strict(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    return isinstance(function, Mapping) and bool(function.get("strict"))


def _loosened(tool: Any) -> Any:
    if not _is_strict(tool):
        return tool
    function = {name: value for name, value in tool["function"].items() if name != "strict"}
    return {**tool, "function": function}
