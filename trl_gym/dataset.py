"""Read NeMo Gym JSONL files into a `datasets.Dataset`, and rows out of it again, byte for byte.

Arrow would unify the types of nested fields over all rows (missing keys become nulls, mixed lists fail). The column
`gym_row` therefore keeps the JSON text of a row; the column `prompt` has the messages that TRL shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from trl_gym.errors import DatasetError, Problem
from trl_gym.responses import input_items, media_in, prompt_messages
from trl_gym.untrusted import parse_json, shape_problem

if TYPE_CHECKING:
    from datasets import Dataset

ROW_COLUMN = "gym_row"
_MAX_REPORTED = 10
_MAX_SEARCHED = 2000  # rows of a dataset that are looked at for tools, from its whole length


def load_gym_dataset(
    paths: str | Path | Sequence[str | Path], *, agent: str | None = None, limit: int | None = None
) -> Dataset:
    """Load one or several Gym JSONL files.

    Args:
        paths: One file, or several, whose rows are concatenated (training shuffles them).
        agent: Agent for rows without `agent_ref`. Default: the only agent of the running Gym; if it has several, the
            rollout of such a row is an error.
        limit: Maximum number of rows of each file.

    Returns:
        A dataset with the columns `prompt` (list of `{"role", "content"}`), `agent` (str or None), `task_index` (int,
        the row's number over all files) and `gym_row` (the row's JSON text, unchanged except for a filled-in
        `agent_ref`).

    Raises:
        DatasetError: If a file does not exist, is empty or has lines that are not Gym rows, that Gym would refuse (a
            parameter of another type) or that cannot be trained on (images and other media); gives their numbers.

    Example:

    ```python
    dataset = load_gym_dataset("data/train.jsonl")
    ```
    """
    from datasets import Dataset

    files = [Path(path).expanduser() for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not files:
        raise DatasetError("No Gym dataset was given.", "Name at least one JSONL file.")
    problems: list[Problem] = []
    records: list[dict[str, Any]] = []
    for file in files:
        before = len(records), len(problems)
        records += [record for _, record in read_records(file, agent, limit, problems)]
        if before == (len(records), len(problems)):
            problems.append(Problem(f"{file} has no rows.", "Write one JSON object per line."))
    for index, record in enumerate(records):
        record["task_index"] = index
    if problems:
        shown, more = problems[:_MAX_REPORTED], len(problems) - _MAX_REPORTED
        if more > 0:
            shown.append(Problem(f"… and {more} more"))
        raise DatasetError(f"{len(problems)} problem(s) in the Gym dataset:", problems=shown)
    return Dataset.from_list(records)


def mix_gym_datasets(datasets: Sequence[Dataset], weights: Sequence[float] | None = None, *, seed: int = 0) -> Dataset:
    """Mix the datasets of several environments by weight.

    Rows are drawn until every dataset was used up once; smaller datasets repeat.

    Args:
        datasets: Results of `load_gym_dataset`.
        weights: One positive number per dataset, in any unit. Default: equal weights.
        seed: Seed of the draw.

    Returns:
        A dataset like its parts. `task_index` counts the rows of all parts: a row that is drawn twice is one task.

    Raises:
        DatasetError: If the weights do not fit the datasets.

    Example:

    ```python
    dataset = mix_gym_datasets([load_gym_dataset("math.jsonl"), load_gym_dataset("tools.jsonl")], weights=[3, 1])
    ```
    """
    from datasets import Value, interleave_datasets

    if not datasets:
        raise DatasetError("No Gym dataset to mix was given.", "Give at least one.")
    weights = [1.0] * len(datasets) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(datasets) or not all(0 < weight < float("inf") for weight in weights):
        raise DatasetError(
            f"`weights` is {weights}, for {len(datasets)} dataset(s).", "Give one positive number for each dataset."
        )
    offset, parts = 0, []
    for dataset in datasets:
        numbers = list(range(offset, offset + len(dataset)))
        part = dataset.remove_columns("task_index").add_column("task_index", numbers)
        parts.append(part.cast_column("agent", Value("string")))  # also where all agents of a part are None
        offset += len(dataset)
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")


def gym_row(example: dict[str, Any]) -> dict[str, Any]:
    """Return the Gym row of a dataset example.

    Raises:
        DatasetError: If the example does not come from `load_gym_dataset`, or that column was changed.
    """
    try:
        return parse_json(example[ROW_COLUMN])
    except (ValueError, TypeError) as error:
        raise DatasetError(
            f"The column `{ROW_COLUMN}` of a dataset row cannot be read: {error}.",
            "Leave that column as `load_gym_dataset` makes it, or write JSON into it.",
        ) from error
    except KeyError:
        raise DatasetError(
            f"A dataset row has no column `{ROW_COLUMN}`; it has {', '.join(sorted(example))}.",
            "Load Gym datasets with `load_gym_dataset`, and keep that column when mapping and filtering.",
        ) from None


def agent_with_tools(*datasets: Any) -> str | None:
    """Return the agent of a row with tools, as `first_with_tools` does; rows are taken from the whole of a dataset.

    Args:
        datasets: Of `load_gym_dataset`; None, mappings of names to datasets, and those that cannot be indexed, which
            are not looked into.
    """
    for dataset in datasets:
        if isinstance(dataset, Mapping):
            if (found := agent_with_tools(*dataset.values())) is not None:
                return found
        elif ROW_COLUMN in (getattr(dataset, "column_names", None) or ()) and hasattr(dataset, "__len__"):
            stride = max(1, len(dataset) // _MAX_SEARCHED)
            rows = dataset.select_columns(ROW_COLUMN)[::stride][ROW_COLUMN]
            if (found := first_with_tools(rows)) is not None:
                return found
    return None


def first_with_tools(rows: Iterable[str]) -> str | None:
    """Return the agent of the first row with tools, "the only agent" where it names none; None without such a row.

    Args:
        rows: The JSON text of Gym rows.
    """
    for text in rows:
        row = json.loads(text) if '"tools"' in text else {}
        if row.get("responses_create_params", {}).get("tools"):
            return (row.get("agent_ref") or {}).get("name") or "the only agent"
    return None


def read_records(
    file: Path, agent: str | None, limit: int | None, problems: list[Problem]
) -> Iterable[tuple[int, dict[str, Any]]]:
    """Yield the rows of one Gym JSONL file with the numbers of their lines, without wrong ones.

    Args:
        file: The file.
        agent: Agent for rows that name none.
        limit: Maximum number of rows to read.
        problems: Receives a problem for each wrong line, with its number.
    """
    data = b""
    try:
        data = file.expanduser().read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        problems.append(Problem(f"{file}, line {number}: not UTF-8 ({error}).", "Save the file as UTF-8."))
        return
    except OSError as error:
        remedy = "Check the path (from the working directory), or make the file; a recipe says how, under Data."
        problems.append(Problem(f"{file}: cannot be read ({error.strerror or error}).", remedy))
        return
    # Not splitlines(): a JSON string may hold U+2028 and the like, which do not end a line in JSONL.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    count = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if limit is not None and count >= limit:
            return
        problem, row = _parse(line)
        if row is None:
            remedy = "Write one JSON object per line, a Gym row with text alone in `responses_create_params.input`."
            problems.append(Problem(f"{file}, line {number}: {problem}.", remedy))
            continue
        count += 1
        named = (row.get("agent_ref") or {}).get("name")
        if named is None and agent is not None:
            row["agent_ref"] = {"type": "responses_api_agents", "name": agent}
            line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
        prompt = [{name: _shown(text) for name, text in message.items()} for message in prompt_messages(row)]
        yield number, {"prompt": prompt, "agent": (named and _shown(named)) or agent, ROW_COLUMN: line}


def _shown(text: str) -> str:
    """Replace halves of surrogates, which Arrow refuses; JSON may have them."""
    return text.encode("utf-8", "replace").decode()


def _parse(line: str) -> tuple[str, dict[str, Any] | None]:
    try:
        row = parse_json(line)
    except ValueError as error:
        return f"not JSON ({error})", None
    if not isinstance(row, dict):
        return f"a JSON {type(row).__name__}, not an object", None
    problem = row_problem(row)
    return ("", row) if problem is None else (problem, None)


# -- what a row must be, to be loaded and to be sent ------------------------------------------------------------------


class _Parameters(msgspec.Struct):
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    max_output_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    metadata: dict[str, str] | None = None


class _AgentRef(msgspec.Struct):
    name: str | None = None


class _Row(msgspec.Struct):
    responses_create_params: _Parameters
    agent_ref: _AgentRef | None = None


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without the nulls of its request, which mean the same as nothing there.

    `datasets` writes every key that any row has, null where a row has none, at every depth; NeMo Gym answers 422 to
    many of them, and 500 to `"metadata": null` (0.4). Fields of the environment stay as they are.

    Args:
        row: A Gym row.
    """
    params = row.get("responses_create_params")
    if not isinstance(params, Mapping):
        return dict(row)
    return {**row, "responses_create_params": _pruned(params)}


_REQUIRED_NULLS = frozenset({"parameters", "strict"})  # of a tool: Gym demands the keys, and takes null
_SCHEMAS = frozenset({"parameters", "schema", "input_schema"})
_MEANT_NULLS = frozenset({"default", "const"})  # of a JSON schema, where null is a value
_BY_NAME = frozenset({"properties", "$defs", "definitions"})  # of a JSON schema: schemas by name


def _pruned(value: Any, *, by_name: bool = False) -> Any:
    """Leave out what is null, and what only nulls were in; but a name of a schema stays, whose keywords were all null.

    Args:
        value: A request, or a part of one.
        by_name: Whether it has schemas by name: `{}`, of which `datasets` makes nulls, then allows any value.
    """
    if isinstance(value, list):
        return [_pruned(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    is_tool = value.get("type") == "function"
    kept = {}
    for key, one in value.items():
        pruned = _pruned(one, by_name=not by_name and key in _BY_NAME)
        if key in _SCHEMAS and isinstance(one, Mapping) and not _has_filled_nulls(one):
            kept[key] = one
            continue
        stays = one is not None if by_name else one == {} or (is_tool and key in _REQUIRED_NULLS)
        if stays or pruned not in (None, {}):
            kept[key] = pruned
    return kept


def _has_filled_nulls(schema: Any, *, by_name: bool = False) -> bool:
    """Tell whether a schema has nulls that no schema means, so that all of its nulls are `datasets`' own."""
    if isinstance(schema, list):
        return any(map(_has_filled_nulls, schema))
    return isinstance(schema, Mapping) and any(
        by_name or key not in _MEANT_NULLS
        if one is None
        else _has_filled_nulls(one, by_name=not by_name and key in _BY_NAME)
        for key, one in schema.items()
    )


def row_problem(row: Mapping[str, Any]) -> str | None:
    """Say why a row cannot be sent to Gym, or not be trained on; None where it can.

    Args:
        row: A parsed Gym row, or what a trainer's `choose_task` made of one.
    """
    if (problem := _writing_problem(row)) is not None:
        return problem
    row = without_nulls(row)
    params = row.get("responses_create_params")
    if not isinstance(params, dict):
        return "no object `responses_create_params` (the request that Gym's agents send)"
    given = params.get("input")
    if not isinstance(given, str | list) or given == "":
        return "`responses_create_params.input` must be a string or a list of messages"
    if (problem := shape_problem(row, _Row)) is not None:
        return problem
    for name in ("extra_body", "chat_template_kwargs"):
        try:
            json_object((params.get("metadata") or {}).get(name))
        except ValueError as error:
            return f"`responses_create_params.metadata.{name}` must be the text of a JSON object ({error})"
    if (media := media_in(input_items(row))) is not None:
        return f"the input has `{media}`, and images, audio, video and files cannot be trained on"
    return None


def _writing_problem(row: Mapping[str, Any]) -> str | None:
    """Say why NeMo Gym's servers cannot hand a row on to each other."""
    try:
        text = json.dumps(row)
    except (TypeError, ValueError) as error:
        return f"it cannot be written as JSON ({error})"
    if _MANY_DIGITS.search(text) is not None and _has_long_integer(row):
        return "it has an integer of more than 64 bits, which Gym cannot send"
    return None


_MANY_DIGITS = re.compile(r"\d{19}")


def _has_long_integer(value: Any) -> bool:
    if isinstance(value, Mapping | list):
        return any(map(_has_long_integer, value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, int) and not -(2**63) <= value < 2**64


def body_of(row: Mapping[str, Any]) -> bytes:
    """Return what is sent of a row: UTF-8, without the nulls of its request, `?` for halves of surrogates, which Gym
    would answer 500 to."""
    return json.dumps(without_nulls(row), ensure_ascii=False).encode("utf-8", "replace")


def json_object(text: str | None) -> dict[str, Any]:
    """Parse the text of a JSON object; no text is an empty one. Raises `ValueError` for anything else."""
    value = parse_json(text) if text else {}
    if not isinstance(value, dict):
        raise ValueError(f"it is a JSON {type(value).__name__}")
    return value
