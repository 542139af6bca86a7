"""Check what a run reads: datasets, model, tokenizer, chat template."""

from __future__ import annotations

import asyncio
import difflib
import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_gym.config_checks import context_problem, dataset_problem, eval_dataset_problem
from trl_gym.dataset import ROW_COLUMN, first_with_tools, read_records
from trl_gym.doctor.context import Context, Finding, failed, ok, skipped, warning
from trl_gym.errors import Problem, TrlGymError
from trl_gym.hub import load_config
from trl_gym.policy_server.command import flags_from
from trl_gym.policy_server.middleware.splice import NoBoundaryError
from trl_gym.policy_server.middleware.templates import Chat, RenderRefusedError, Templates
from trl_gym.policy_server.parsers import Parsers, choose
from trl_gym.policy_server.sglang.server import SglangCommand
from trl_gym.policy_server.sglang.server import flags_from as sglang_flags
from trl_gym.policy_server.transformers_engine import answers
from trl_gym.rollouts.request import stamp
from trl_gym.train import load_train, make_data, model_to_train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

_MAX_REPORTED = 10  # wrong lines of a file
_MAX_RENDERED = 2000  # prompts whose length is measured
_FILE, _LINE = "doctor_file", "doctor_line"  # columns that say where a row is from


# -- datasets ---------------------------------------------------------------------------------------------------------


def data_script(context: Context) -> Iterator[Finding]:
    """Run the script that makes the data; what it makes is examined with the other files."""
    script = context.script.data_script
    if script is None:
        return
    if not Path(script).is_file():
        yield failed(
            f"`data_script` {script} does not exist", "Set it to the script's path from the working directory."
        )
        return
    made = make_data(script, str(context.work_dir()))
    if missing := [path.name for path in made if not path.is_file()]:
        yield failed(f"{script} does not write {' and '.join(missing)}", "Make it write both into `--output_dir`.")
        return
    context.script.train_files.append(str(made[0]))
    context.script.eval_files.append(str(made[1]))
    yield ok(f"{script} writes train.jsonl and validation.jsonl")


def rows(context: Context) -> Iterator[Finding]:
    """Check that every line of every file is a row that Gym understands, and that training can make a request of."""
    script = context.script
    if not script.train_files:
        yield failed(
            "no training data: `train_files` and `data_script` are not set", "Set `train_files` to Gym JSONL."
        )
    for file in dict.fromkeys([*script.train_files, *script.eval_files]):
        problems: list[Problem] = []
        lines = read_records(Path(file), script.agent, None, problems)
        found = [record | {_FILE: file, _LINE: number} for number, record in lines]
        problems += filter(None, map(partial(_request_problem, context), found))
        context.train_rows += found
        name = shown(context, file)
        for problem in problems[:_MAX_REPORTED]:
            yield failed(problem.text, problem.remedy)
        if len(problems) > _MAX_REPORTED:
            yield failed(f"{name}: {len(problems) - _MAX_REPORTED} more lines like that", "Fix the first ones first.")
        if not found and not problems:
            yield failed(f"{name} has no rows", "A Gym dataset has one JSON object per line.")
        elif not problems:
            yield ok(f"{name}: {len(found)} rows")


def dataset_size(context: Context) -> Iterator[Finding]:
    """Check that there are tasks for one generation batch of all processes, and for an evaluation."""
    args, script, processes = context.args, context.script, context.args.world_size
    size, steps = args.per_device_train_batch_size, args.steps_per_generation
    counts = Counter(record[_FILE] for record in context.train_rows)
    if script.train_weights is None:
        num_tasks = sum(counts[file] for file in script.train_files)
    else:  # smaller parts repeat
        num_tasks = len(load_train(script, args.seed))
    problems = [dataset_problem(args, num_tasks)]
    if script.eval_files:
        problems.append(eval_dataset_problem(args, "", sum(counts[file] for file in script.eval_files)))
    for problem in filter(None, problems):
        yield failed(problem.text, problem.remedy)
    if not any(problems):
        rollouts, group = args.generation_batch_size, args.num_generations
        yield ok(
            f"{num_tasks} tasks; a generation batch has {rollouts // group} × {group} rollouts ({size} per device × "
            f"{steps} × {processes} process{'es' if processes > 1 else ''})"
        )


def _request_problem(context: Context, record: dict[str, Any]) -> Problem | None:
    """Make the request of a row as training does, and say why that fails."""
    args = context.args
    try:
        stamp(
            json.loads(record[ROW_COLUMN]),
            rollout_id="doctor",
            task_index=0,
            member=0,
            sampling=args.rollout_options.sampling,
            completion_budget=args.max_completion_length or 1,
            chat_template_kwargs=args.chat_template_kwargs,
        )
    except Exception as error:  # whatever it is, it would end a run
        reason = error.problem if isinstance(error, TrlGymError) else f"{type(error).__name__}: {error}"
        where = f"{record[_FILE]}, line {record[_LINE]}"
        return Problem(f"{where}: no request can be made of it ({reason}).", "Correct the row, or leave it out.")
    return None


def shown(context: Context, file: str) -> str:
    """Name a file in a message: one that the data script made does not exist any more when it is read."""
    made = context.script.data_script is not None and Path(file).parent == context.work_dir() / "data"
    return f"{Path(file).name} of {context.script.data_script}" if made else file


def agents(context: Context) -> Iterator[Finding]:
    """Check that the agents that rows name exist, and that rows without a name have a single one to go to."""
    known = context.agents
    if known is None or not context.train_rows:
        source = "gym head server" if context.attaches_gym else "gym configs"
        yield skipped("needs agents and rows", because=(source if known is None else "dataset rows",))
        return
    named: dict[str | None, list[dict[str, Any]]] = {}
    for record in context.train_rows:
        named.setdefault(record["agent"], []).append(record)
    wrong = False
    for name, records in named.items():
        if (name is None and len(known) == 1) or name in known:
            continue
        wrong = True
        yield _unknown_agent(name, records, known)
    for name in context.args.gym_environments or {}:
        if name not in known:
            wrong = True
            yield failed(f"`gym_environments` names the unknown agent {name}", _choose(name, known))
    if not wrong:
        used = sorted({name or known[0] for name in named})
        yield ok(", ".join(used))
        unused = sorted(set(known) - set(used))
        if unused:
            yield warning(
                f"no row is for {', '.join(unused)}", "Leave their configs out, or add rows; they only cost start-up."
            )


def _unknown_agent(name: str | None, records: list[dict[str, Any]], known: tuple[str, ...]) -> Finding:
    more = f" and {len(records) - 1} more" if len(records) > 1 else ""
    where = f"{records[0][_FILE]}, line {records[0][_LINE]}{more}"
    if name is None:
        return failed(
            f"{where}: the row names no agent and there are {', '.join(known)}",
            "Choose one with `--agent NAME`, or write `agent_ref` into the rows.",
        )
    return failed(f"{where}: the row is for agent {name}, which the configs do not define", _choose(name, known))


def _choose(name: str, known: tuple[str, ...]) -> str:
    closest = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {closest[0]}? " if closest else ""
    return f"{hint}There is {', '.join(known)}; add the config of another one to `gym_config_paths`."


# -- model ------------------------------------------------------------------------------------------------------------


def model(context: Context) -> Iterator[Finding]:
    """Load the model's configuration and count its parameters without loading them."""
    from trl_gym.memory.plan import count_params

    named = model_to_train(context.model_options.model_name_or_path, context.script)
    config = load_config(
        named, revision=context.model_options.model_revision, trust_remote_code=context.args.trust_remote_code
    )
    context.model, context.model_config = named, config
    context.num_params = count_params(config, named, trust_remote_code=context.args.trust_remote_code)[0]
    yield ok(f"{named}: {type(config).__name__}, {context.num_params / 1e6:,.1f} M parameters")
    if Path(named).is_dir() and not list(Path(named).glob("*.safetensors")) + list(Path(named).glob("*.bin")):
        yield failed(f"{named} has no weights (*.safetensors)", "Save the model with `model.save_pretrained(folder)`.")


def tokenizer(context: Context) -> Iterator[Finding]:
    """Load the tokenizer and its chat template."""
    from transformers import AutoTokenizer

    given = context.args.gym_vllm_args if isinstance(context.args.gym_vllm_args, dict) else {}
    name = given.get("tokenizer") or context.model
    save = "Save it into the folder with `tokenizer.save_pretrained(folder)`."
    if Path(name).is_dir() and not list(Path(name).glob("*token*")):  # of which transformers makes an empty one
        yield failed(f"{name} has no tokenizer", save)
        return
    try:
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=context.args.trust_remote_code)
    except (OSError, ValueError) as error:
        yield failed(f"the tokenizer of {name} cannot be loaded: {_first_line(error)}", save)
        return
    file = next((value for flag, value in given.items() if flag.replace("_", "-") == "chat-template"), None)
    if file is not None:
        loaded.chat_template = Path(file).read_text(encoding="utf-8")
    if not loaded.chat_template:
        flag = ", or set `gym_vllm_args` to {'chat-template': 'FILE'}" if context.engine == "vllm" else ""
        yield failed(f"the tokenizer of {name} has no chat template", f"Save it with its `chat_template`{flag}.")
        return
    context.tokenizer = loaded
    yield ok(f"{len(loaded)} tokens, with a chat template")


def context_length(context: Context) -> Iterator[Finding]:
    """Check that prompts, and the tokens after them, fit into the context that is served."""
    args = context.args
    most = getattr(context.model_config.get_text_config(), "max_position_embeddings", None)
    length = args.vllm_max_model_length or most
    if length is None:
        yield ok("neither `vllm_max_model_length` nor the model bounds it")
        return
    if most is not None and length > most:
        yield failed(
            f"`vllm_max_model_length` {length} is more than the model was made for ({most})",
            f"Set `vllm_max_model_length` to {most} at most.",
        )
    records = context.train_rows[:_MAX_RENDERED]
    if not records:
        yield skipped("needs dataset rows", because=("dataset rows",))
        return
    sizes = [_prompt_length(context, record) for record in records]
    longest = max(range(len(sizes)), key=sizes.__getitem__)
    where = f"the longest prompt ({shown(context, records[longest][_FILE])}) has about {sizes[longest]} tokens"
    too_long = sum(size >= length for size in sizes)
    completion = args.max_completion_length or 0
    if too_long:
        yield failed(
            f"{where} and `vllm_max_model_length` is {length}: {too_long} of {len(sizes)} rows fail at once",
            f"Set `vllm_max_model_length` to {sizes[longest] + completion} or more, or leave these rows out.",
        )
    elif (problem := context_problem(args, length, sizes[longest])) is not None:
        yield warning(f"{where}; {problem.text}", problem.remedy)
    else:
        yield ok(f"{where}, a rollout up to {completion} more, and the context {length}")


def _prompt_length(context: Context, record: dict[str, Any]) -> int:
    """Count tokens of a row's first prompt as the template writes it, without what an agent adds to it by itself."""
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
    rendered = context.tokenizer.apply_chat_template(
        messages,
        tools=tools or None,
        add_generation_prompt=True,
        tokenize=False,
        **(context.args.chat_template_kwargs or {}),
    )
    return len(context.tokenizer(rendered, add_special_tokens=False)["input_ids"])


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def served_model(context: Context) -> Iterator[Finding]:
    """Check that the model can be sampled from in the trainer's process; it is built without its weights."""
    from trl import get_peft_config

    from trl_gym import compat
    from trl_gym.policy_server.transformers_engine.session import sampled_model
    from trl_gym.run.in_process import require_servable

    require_servable(context.args, context.model)
    model = compat.empty_model(context.model_config, trust_remote_code=context.args.trust_remote_code)
    if (adapter := get_peft_config(context.model_options)) is not None:
        from peft import get_peft_model

        model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    name = type(sampled_model(model)).__name__
    yield ok(f"transformers samples from {name} by continuous batching")


def parsers_of(context: Context) -> Parsers:
    """Return what reads answers of the policy server that the run starts. Raises `ConfigError`: see `choose` of each
    engine."""
    args = context.args
    if context.engine == "transformers":
        return answers.choose(context.model, args.gym_response_template).parsers
    given = args.gym_sglang_args if context.engine == "sglang" else args.gym_vllm_args
    named = {name.lstrip("-"): value for name, value in given.items()} if isinstance(given, dict) else {}
    if context.engine == "sglang":
        return SglangCommand(context.model, sglang_flags(named), "python").parsers
    return choose(context.model, flags_from(named))[0]


def tool_parser(context: Context) -> Iterator[Finding]:
    """Check that tool calls of the model can be read, as a run would have them read."""
    parsers = parsers_of(context)
    agent = first_with_tools(record[ROW_COLUMN] for record in context.train_rows)
    problem = None if agent is None else parsers.problem(agent)
    if problem is not None:
        yield failed(problem.text, problem.remedy)
        return
    if agent is None:
        yield ok(f"no row has tools; thinking: {parsers.reasoning}")
    elif parsers.tool.name is None:
        yield skipped(f"rows of `{agent}` have tools; what reads their calls: {parsers.tool.why}")
    else:
        yield ok(f"{parsers.tool}; thinking: {parsers.reasoning}")


# -- chat template ----------------------------------------------------------------------------------------------------
# Can a sampled turn be continued exactly? The template itself is asked, as the policy server's middleware does, with
# short chats; docs/token_fidelity.md has what comes out for well-known models.

_USER: Message = {"role": "user", "content": "What is 2 + 3?"}
_CALL: Message = {"id": "callabcd0", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
_TOOL: Message = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
# What follows the policy's turn; the turn itself; tools.
_CASES: dict[str, tuple[Message, list[Message], list[Message]]] = {
    "a question after an answer": (
        {"role": "assistant", "content": "It is 5."},
        [{"role": "user", "content": "And 4 + 4?"}],
        [],
    ),
    "a result after a tool call": (
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        [{"role": "tool", "tool_call_id": "callabcd0", "name": "add", "content": "5"}],
        [_TOOL],
    ),
    "a system message after an answer": (
        {"role": "assistant", "content": "It is 5."},
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And 4 + 4?"}],
        [],
    ),
}
_RARE = "a system message after an answer"
_REMEDY = (
    "Rollouts of several turns drift there; `gym_drift` decides what becomes of them. Use a model, or (with vLLM) a "
    "`chat-template` in `gym_vllm_args`, that docs/token_fidelity.md lists as exact."
)


def chat_template(context: Context) -> Iterator[Finding]:
    """Ask the template whether sampled turns can be continued exactly."""
    outcomes = classify(context.tokenizer, context.args.chat_template_kwargs or {})
    wrong = {case: reason for case, reason in outcomes.items() if reason is not None}
    is_fatal = context.args.gym_drift == "error"
    for case, reason in wrong.items():
        say = failed if is_fatal and case != _RARE else warning
        yield say(f"{case} cannot be continued exactly: {reason}", _REMEDY)
    exact = [case for case in outcomes if case not in wrong]
    if exact:
        yield ok(f"exact: {', '.join(exact)}")


def classify(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> dict[str, str | None]:
    """Return by case why the next prompt cannot be made without a guess; None where it can.

    Args:
        tokenizer: With a chat template.
        options: `chat_template_kwargs`.
    """
    return asyncio.run(_classify(tokenizer, options))


async def _render(tokenizer: PreTrainedTokenizerBase, body: dict[str, Any]) -> dict[str, Any]:
    """Answer `POST /tokenize` as vLLM does."""
    try:
        text = tokenizer.apply_chat_template(
            [_with_parsed_calls(message) for message in body["messages"]],
            tools=body.get("tools"),
            add_generation_prompt=body["add_generation_prompt"],
            continue_final_message=body.get("continue_final_message", False),
            tokenize=False,
            **body.get("chat_template_kwargs", {}),
        )
    except Exception as error:  # a template is a program: it raises what it likes
        raise RenderRefusedError(f"{type(error).__name__}: {error}") from error
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return {"tokens": ids, "token_strs": tokenizer.convert_ids_to_tokens(ids)}


def _with_parsed_calls(message: Message) -> Message:
    """vLLM hands a template the arguments of a call as an object."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


async def _classify(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> dict[str, str | None]:
    templates, render, outcomes = Templates(), partial(_render, tokenizer), dict[str, str | None]()
    for case, (turn, following, tools) in _CASES.items():
        chat_options: dict[str, Any] = {"chat_template_kwargs": options} if options else {}
        if tools:
            chat_options["tools"] = tools
        ending = {"add_generation_prompt": True, "continue_final_message": False}
        chat = Chat([_USER, turn, *following], 1, chat_options, ending)
        try:
            first = await render({**chat_options, "messages": [_USER], **ending})
            seen = [*first["tokens"], *first["tokens"][-4:][::-1]]  # no tokenizer would write the turn like that
            prompt = await templates.next_prompt(render, chat, seen)
        except NoBoundaryError as error:
            outcomes[case] = str(error)
        except RenderRefusedError as error:
            outcomes[case] = f"the template refuses it ({error})"
        else:
            tail = str(tokenizer.decode(prompt[len(seen) :]))
            if prompt[: len(seen)] != seen:
                outcomes[case] = "the prompt does not start with the tokens seen"
            elif any(message["content"] not in tail for message in following):
                outcomes[case] = "the template does not write what follows a turn behind it"
            else:
                outcomes[case] = None
    return outcomes
