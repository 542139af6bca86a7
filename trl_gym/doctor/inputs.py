"""The model: its files, its tokenizer, its context."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trl_gym.dataset import ROW_COLUMN
from trl_gym.doctor.checks import Finding, failed, from_error, ok, skipped, warning
from trl_gym.doctor.context import Subject
from trl_gym.doctor.data import FILE_KEY, shown
from trl_gym.errors import ConfigError

_MAX_RENDERED = 2000  # prompts whose length is measured
_LOAD_REMEDY = "Check the name, or fetch it with `hf download NAME` and give the folder."


def model(subject: Subject) -> Iterator[Finding]:
    """The model's configuration can be loaded, and its parameters counted without loading them."""
    from transformers import AutoConfig

    from trl_gym.memory.estimate import count_params

    named = subject.model_options.model_name_or_path
    if named is None:
        folder = Path(subject.script.small_policy_dir)
        if not (folder / "config.json").is_file():
            yield skipped(
                f"no model is given, and the small policy is not in {folder} yet", "`make quickstart` builds it."
            )
            return
        named = str(folder)
    if _is_path(named) and not (Path(named) / "config.json").is_file():
        what = "has no config.json" if Path(named).is_dir() else "does not exist"
        yield failed(f"the model folder {named} {what}", "Set `model_name_or_path` to a folder that has one.")
        return
    try:
        config = AutoConfig.from_pretrained(named, trust_remote_code=subject.args.trust_remote_code)
    except (OSError, ValueError) as error:
        yield failed(f"the model {named} cannot be loaded: {_first_line(error)}", _LOAD_REMEDY)
        return
    subject.model, subject.model_config = named, config
    subject.num_params = count_params(config, named, None)[0]
    yield ok(f"{named}: {type(config).__name__}, {subject.num_params / 1e6:,.1f} M parameters")
    if Path(named).is_dir() and not list(Path(named).glob("*.safetensors")) + list(Path(named).glob("*.bin")):
        yield failed(f"{named} has no weights (*.safetensors)", "Save the model with `model.save_pretrained(folder)`.")


def tokenizer(subject: Subject) -> Iterator[Finding]:
    """The tokenizer can be loaded and has a chat template."""
    from transformers import AutoTokenizer

    from trl_gym.policy_server.command import check_before_start, flags_from

    given = subject.args.gym_vllm_args if isinstance(subject.args.gym_vllm_args, dict) else {}
    name = given.get("tokenizer") or subject.model
    if subject.starts_policy and name == subject.model:
        try:
            check_before_start(subject.model, "127.0.0.1", None, flags_from({}))
        except ConfigError as error:
            yield from (finding for finding in from_error(error) if "vLLM is not installed" not in finding.text)
            if "tokenizer" in str(error):
                return
    try:
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=subject.args.trust_remote_code)
    except (OSError, ValueError) as error:
        yield failed(
            f"the tokenizer of {name} cannot be loaded: {_first_line(error)}",
            "Save it into the folder with `tokenizer.save_pretrained(folder)`.",
        )
        return
    file = next((value for flag, value in given.items() if flag.replace("_", "-") == "chat-template"), None)
    if file is not None:
        loaded.chat_template = Path(file).read_text(encoding="utf-8")
    if not loaded.chat_template:
        yield failed(
            f"the tokenizer of {name} has no chat template",
            "Save it with its `chat_template`, or set `gym_vllm_args` to {'chat-template': 'FILE'}.",
        )
        return
    subject.tokenizer = loaded
    yield ok(f"{len(loaded)} tokens, with a chat template")


def context(subject: Subject) -> Iterator[Finding]:
    """Prompts, and the tokens after them, fit into the context that is served."""
    args = subject.args
    most = getattr(subject.model_config.get_text_config(), "max_position_embeddings", None)
    length = args.vllm_max_model_length or most
    if length is None:
        yield ok("neither `vllm_max_model_length` nor the model bounds it")
        return
    if most is not None and length > most:
        yield failed(
            f"`vllm_max_model_length` {length} is more than the model was made for ({most}); vLLM refuses it",
            f"Set `vllm_max_model_length` to {most} at most.",
        )
    records = subject.train_rows[:_MAX_RENDERED]
    if not records:
        yield skipped("needs dataset rows")
        return
    sizes = [_prompt_length(subject, record) for record in records]
    longest = max(range(len(sizes)), key=sizes.__getitem__)
    where = f"the longest prompt ({shown(subject, records[longest][FILE_KEY])}) has about {sizes[longest]} tokens"
    too_long = sum(size >= length for size in sizes)
    completion = args.max_completion_length or 0
    if too_long:
        yield failed(
            f"{where} and `vllm_max_model_length` is {length}: {too_long} of {len(sizes)} rows fail at once",
            f"Set `vllm_max_model_length` to {sizes[longest] + completion} or more, or leave these rows out.",
        )
    elif sizes[longest] + completion > length:
        yield warning(
            f"{where}; with `max_completion_length` {completion} that is more than the context of {length}",
            f"Set `vllm_max_model_length` to {sizes[longest] + completion}, or rollouts of such rows are cut off.",
        )
    else:
        yield ok(f"{where}, a rollout up to {completion} more, and the context {length}")


def _prompt_length(subject: Subject, record: dict[str, Any]) -> int:
    """Tokens of a row's first prompt as the template writes it; without what an agent adds to it by itself."""
    import json

    parameters = json.loads(record[ROW_COLUMN])["responses_create_params"]
    tools = [
        {
            "type": "function",
            "function": {key: tool[key] for key in ("name", "description", "parameters") if key in tool},
        }
        for tool in parameters.get("tools") or []
        if tool.get("type") == "function"
    ]
    messages = [
        message if message["role"] in ("system", "user", "assistant") else message | {"role": "user"}
        for message in record["prompt"]
    ]
    rendered = subject.tokenizer.apply_chat_template(
        messages,
        tools=tools or None,
        add_generation_prompt=True,
        tokenize=False,
        **(subject.args.chat_template_kwargs or {}),
    )
    return len(subject.tokenizer(rendered, add_special_tokens=False)["input_ids"])


def _is_path(name: str) -> bool:
    return Path(name).exists() or name.startswith((".", "/", "~"))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
