"""NeMo Gym JSONL files as `datasets.Dataset`, and back, byte for byte.

Arrow would unify the types of nested fields over all rows (missing keys become nulls, mixed lists fail). A Gym row is
therefore kept as the JSON text it was, in the column `gym_row`; beside it stands `prompt`, the messages TRL shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_gym.errors import DatasetError

if TYPE_CHECKING:
    from datasets import Dataset

ROW_COLUMN = "gym_row"
_MAX_REPORTED = 10


def load_gym_dataset(
    paths: str | Path | Sequence[str | Path],
    *,
    agent: str | None = None,
    limit: int | None = None,
) -> Dataset:
    """Load one or several Gym JSONL files.

    Args:
        paths: One file, or several whose rows are put after one another (training shuffles them).
        agent: Agent for rows that name none in `agent_ref`. Without it, such a row goes to the only agent of the
            running Gym; several agents make it an error when the row is rolled out.
        limit: At most so many rows of each file.

    Returns:
        A dataset with the columns `prompt` (list of `{"role", "content"}`), `agent` (str or None), `task_index` (int,
        the row's number over all files) and `gym_row` (the row's JSON text, unchanged except for a filled-in
        `agent_ref`).

    Raises:
        DatasetError: A file is missing or has lines that are not Gym rows; every bad line is named with its number.

    Example:

    ```python
    dataset = load_gym_dataset("data/train.jsonl")
    ```
    """
    from datasets import Dataset

    files = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    if not files:
        raise DatasetError("No Gym dataset was given; name at least one JSONL file.")
    problems: list[str] = []
    records = [record for file in files for record in read_records(file, agent, limit, problems)]
    for index, record in enumerate(records):
        record["task_index"] = index
    if problems:
        more = len(problems) - _MAX_REPORTED
        listed = "\n".join(f"  - {problem}" for problem in problems[:_MAX_REPORTED])
        tail = f"\n  … and {more} more" if more > 0 else ""
        raise DatasetError(f"{len(problems)} problem(s) in the Gym dataset:\n{listed}{tail}")
    if not records:
        raise DatasetError(f"{', '.join(map(str, files))}: no rows. A Gym dataset has one JSON object per line.")
    return Dataset.from_list(records)


def mix_gym_datasets(datasets: Sequence[Dataset], weights: Sequence[float] | None = None, *, seed: int = 0) -> Dataset:
    """Several environments in one dataset, each with its share.

    Rows are drawn by weight until every dataset has been used up once; smaller ones repeat meanwhile.

    Args:
        datasets: From `load_gym_dataset`.
        weights: One positive number per dataset, in any unit; equal shares when not given.
        seed: Of the draw.

    Returns:
        A dataset like its parts. `task_index` counts the rows of all parts, so a row that is drawn twice is the same
        task twice.

    Raises:
        DatasetError: The weights do not fit the datasets.

    Example:

    ```python
    dataset = mix_gym_datasets([load_gym_dataset("math.jsonl"), load_gym_dataset("tools.jsonl")], weights=[3, 1])
    ```
    """
    from datasets import interleave_datasets

    if not datasets:
        raise DatasetError("No Gym dataset to mix was given.")
    weights = [1.0] * len(datasets) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(datasets) or not all(0 < weight < float("inf") for weight in weights):
        raise DatasetError(f"`weights` is {weights}; one positive number for each of the {len(datasets)} is needed.")
    offset, parts = 0, []
    for dataset in datasets:
        parts.append(_renumbered(dataset, offset))
        offset += len(dataset)
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")


def _renumbered(dataset: Dataset, offset: int) -> Dataset:
    numbers = [offset + index for index in range(len(dataset))]
    # Agents may be None in one part only: strings all the same.
    from datasets import Value

    dataset = dataset.remove_columns("task_index").add_column("task_index", numbers)
    return dataset.cast_column("agent", Value("string"))


def gym_row(example: dict[str, Any]) -> dict[str, Any]:
    """The Gym row of one dataset example.

    Raises:
        DatasetError: The example does not come from `load_gym_dataset`.
    """
    try:
        return json.loads(example[ROW_COLUMN])
    except KeyError:
        raise DatasetError(
            f"A dataset row has no column `{ROW_COLUMN}` (it has: {', '.join(sorted(example))}). Load Gym datasets "
            "with `load_gym_dataset`; mapping and filtering must keep that column."
        ) from None


def prompt_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """The row's input as plain messages, for TRL's logs; what is sent to Gym is the row itself."""
    given = row["responses_create_params"].get("input", [])
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    instructions = row["responses_create_params"].get("instructions")
    messages = [{"role": "system", "content": instructions}] if instructions else []
    messages += [{"role": str(item.get("role", item.get("type", "user"))), "content": _text(item)} for item in items]
    # Environments that make their own first observation ship rows without input; TRL needs one message to show.
    return messages or [{"role": "user", "content": ""}]


def read_records(file: Path, agent: str | None, limit: int | None, problems: list[str]) -> Iterable[dict[str, Any]]:
    """Rows of one Gym JSONL file.

    Args:
        file: The file.
        agent: For rows that name none.
        limit: Rows to read at most.
        problems: What is wrong is added here, with the number of its line; such rows are left out.
    """
    try:
        # Not splitlines(): a JSON string may hold U+2028 and the like, which are no line ends in JSONL.
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{file}: cannot be read ({error})")
        return
    count = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if limit is not None and count >= limit:
            return
        problem, row = _parse(line)
        if row is None:
            problems.append(f"{file}, line {number}: {problem}")
            continue
        count += 1
        named = (row.get("agent_ref") or {}).get("name")
        if named is None and agent is not None:
            row["agent_ref"] = {"type": "responses_api_agents", "name": agent}
            line = json.dumps(row, ensure_ascii=False)
        yield {"prompt": prompt_messages(row), "agent": named or agent, ROW_COLUMN: line}


def _parse(line: str) -> tuple[str, dict[str, Any] | None]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not JSON ({error})", None
    if not isinstance(row, dict):
        return f"a JSON {type(row).__name__}, not an object", None
    params = row.get("responses_create_params")
    if not isinstance(params, dict):
        return "no object `responses_create_params` (the request that Gym's agents send)", None
    given = params.get("input")
    if not isinstance(given, str | list) or not given:
        if given == []:
            return "", row
        return "`responses_create_params.input` must be a string or a list of messages", None
    if isinstance(given, list) and not all(isinstance(item, dict) for item in given):
        return "`responses_create_params.input` holds an item that is not an object", None
    reference = row.get("agent_ref")
    if reference is not None and not isinstance(reference, dict):
        return "`agent_ref` must be an object like {'name': 'my_agent'}", None
    return "", row


def _text(item: dict[str, Any]) -> str:
    content = item.get("content", "")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)
    return json.dumps(item, ensure_ascii=False) if content is None else str(content)
