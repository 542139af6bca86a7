"""Recipes that cannot run here are checked as far as they can: by the parsers of everything that will read them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Qwen3Config
from trl import ModelConfig, TrlParser, get_peft_config

from tests.conftest import RECIPES
from trl_gym import GymGRPOConfig, load_gym_dataset, train
from trl_gym.cli import main
from trl_gym.errors import DatasetError
from trl_gym.gym.config import API_KEY_VARIABLE, expand_overrides, initial_config, resolve_configs
from trl_gym.policy_server.command import flags_from
from trl_gym.run.servers import server_options
from trl_gym.weight_sync.transports.plan import plan_transport

ROOT = RECIPES.parent
ALL = sorted(path.name for path in RECIPES.glob("*.yaml"))
FOR_GPUS = [name for name in ALL if name not in ("quickstart.yaml", "smollm2.yaml")]
GYMS = (".gym-venv", ".gym-venv-0.7")
HEADINGS = ("Trains", "Hardware", "Batch", "Scale", "Checked", "Time", "Data", "Command", "Expected", "Stop")


@cache
def parsed(name: str) -> tuple[Any, GymGRPOConfig, ModelConfig]:
    """As the script parses it; on a machine without a GPU, which is told apart from the recipe."""
    parser = TrlParser((train.ScriptArguments, GymGRPOConfig, ModelConfig))
    return parser.parse_args_and_config(["--config", str(RECIPES / name), "--use_cpu", "true"])


def header(name: str) -> str:
    """The comment that a file begins with, without its comment signs and continued lines."""
    lines = (RECIPES / name).read_text().splitlines()
    count = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#")[1:] for line in lines[:count]).replace("\\\n", " ")


# -- the YAMLs --------------------------------------------------------------------------------------------------------


def test_all_recipes_are_here() -> None:
    assert set(ALL) == {
        "quickstart.yaml", "workplace_assistant.yaml", "math.yaml", "several_environments.yaml", "lora_24gb.yaml",
        "one_80gb.yaml", "colocated_8gpu.yaml", "remote_server.yaml", "smollm2.yaml",
    }  # fmt: skip
    listed = (RECIPES / "README.md").read_text()
    assert [name for name in ALL if f"]({name})" not in listed] == []


@pytest.mark.parametrize("name", ALL)
def test_every_key_is_an_option(name: str) -> None:
    recipe, args, model = parsed(name)
    given = yaml.safe_load((RECIPES / name).read_text())
    for key, value in given.items():
        owner = next(options for options in (recipe, args, model) if hasattr(options, key))
        # What the options' own checks turn into another form (lists, enums) is still what was written.
        if isinstance(value, bool | int | float | str) and key != "report_to":
            assert getattr(owner, key) == value, key


def test_an_unknown_key_would_be_found(tmp_path: Path) -> None:
    recipe = tmp_path / "typo.yaml"
    recipe.write_text((RECIPES / "math.yaml").read_text() + "gym_deadlin: 5\n")
    with pytest.raises(ValueError, match="gym_deadlin"):
        parsed(str(recipe))


def section(name: str, heading: str) -> str:
    """One of `HEADINGS`, with its lines joined."""
    text = re.split(rf"^(?:{'|'.join(HEADINGS)})\b", header(name), flags=re.M)[1:][HEADINGS.index(heading)]
    return " ".join(text.split())


@pytest.mark.parametrize("name", ALL)
def test_header_says_what_one_must_know(name: str) -> None:
    text = header(name)
    assert re.findall(rf"^({'|'.join(HEADINGS)})\b", text, re.M) == list(HEADINGS)
    for config in re.findall(r"--config_file (\S+)", text):
        assert (ROOT / config).is_file()
    if name == "quickstart.yaml":
        assert section(name, "Command") == "trl-gym quickstart"
    else:
        assert f"recipes/grpo.py --config recipes/{name}" in text
        assert "not measured by us" in text.lower()


def launched(name: str) -> int:
    """The number of processes that the command starts."""
    command = section(name, "Command")
    configs = re.findall(r"--config_file (\S+)", command)
    told = re.findall(r"--num_processes (\d+)", command)
    if told or not configs:
        return int(told[0]) if told else 1
    return yaml.safe_load((ROOT / configs[0]).read_text())["num_processes"]


@pytest.mark.parametrize("name", ALL)
def test_the_arithmetic_of_the_batch_is_that_of_the_options(name: str) -> None:
    _, args, _ = parsed(name)
    size, accumulated, group = (
        getattr(args, option)
        for option in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
    )
    processes = launched(name)
    rollouts = size * accumulated * processes
    assert args.steps_per_generation == accumulated  # so that a generation batch is an optimizer step
    assert section(name, "Batch") == (
        f"{rollouts // group} tasks x {group} rollouts = {rollouts:,} rollouts per optimizer step: {size} per device "
        f"x {accumulated} accumulated x {processes} process{'es' if processes > 1 else ''}."
    )
    assert rollouts % group == 0
    assert section(name, "Scale").startswith(
        f"each process adds {size * accumulated // group} tasks to a step; `gradient_accumulation_steps` "
        f"{accumulated * processes} / processes keeps the {rollouts // group}."
    )


@pytest.mark.parametrize("name", ALL)
def test_the_stop_rule_can_be_looked_up(name: str) -> None:
    """It names a step at which there is an evaluation, and metrics that exist; what is two standard errors is."""
    _, args, _ = parsed(name)
    rule = section(name, "Stop")
    steps = [int(number) for number in re.findall(r"after (\d+)", rule)]
    assert steps and all(step <= args.max_steps for step in steps)
    assert all(step % args.eval_steps == 0 for step in steps[-1:])
    metrics = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    named = {metric.removeprefix("eval_") for metric in re.findall(r"`([^`]+)`", rule)}
    assert named and {metric for metric in named if f"`{metric}`" not in metrics} == set()
    for margin, count in re.findall(r"(0\.\d\d)[^.;]*?(\d+) (?:tasks|attempts|sudokus)", rule):
        assert 2 * (0.25 / int(count)) ** 0.5 == pytest.approx(float(margin), abs=0.005)


@pytest.mark.parametrize("name", ALL)
def test_batches_divide_on_eight_gpus_and_on_one(name: str) -> None:
    _, args, _ = parsed(name)
    per_rank = args.per_device_train_batch_size * args.gradient_accumulation_steps
    for num_ranks in (1, 8):
        assert num_ranks * per_rank % args.num_generations == 0
        assert num_ranks * args.per_device_eval_batch_size % args.num_generations_eval == 0
    assert args.save_steps % args.eval_steps == 0 or args.eval_steps % args.save_steps == 0


def test_the_shared_node_is_divided_as_its_comment_says() -> None:
    """CUDA IPC reaches the workers of the same GPU only: as many workers as processes."""
    for name in ("workplace_assistant.yaml", "math.yaml", "several_environments.yaml", "colocated_8gpu.yaml"):
        _, args, _ = parsed(name)
        assert args.vllm_tensor_parallel_size * args.gym_vllm_args["data-parallel-size"] == 8


# -- what their comments say about memory -----------------------------------------------------------------------------

SHAPES = {  # as in the configs of the models
    "Qwen/Qwen3-1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_heads": 16},
    "Qwen/Qwen3-4B-Instruct-2507": {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_heads": 32,
    },
    "Qwen/Qwen3-8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_heads": 32},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with nothing but the config.json of the models."""
    folder = tmp_path_factory.mktemp("models")
    for name, sizes in SHAPES.items():
        shape = dict(sizes)
        Qwen3Config(
            vocab_size=151_936, head_dim=128, num_key_value_heads=8, num_attention_heads=shape.pop("num_heads"),
            tie_word_embeddings=name != "Qwen/Qwen3-8B", **shape,
        ).save_pretrained(folder / name)  # fmt: skip
    return folder


@pytest.mark.parametrize("name", FOR_GPUS)
def test_the_plan_that_the_header_names_fits_and_says_what_the_header_says(
    name: str, models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    _, args, model = parsed(name)
    [command] = re.findall(r"trl-gym (plan --config .*?)$", header(name), re.M)
    assert f"--gpus {launched(name)} " in command
    assert main([*shlex.split(command), "--model-name-or-path", str(models / str(model.model_name_or_path))]) == 0
    out = capsys.readouterr().out
    assert "Warning" not in out
    if args.vllm_mode == "server":
        assert "its policy server runs elsewhere" in out and "KV cache" not in out
        return
    [(fraction, contexts)] = re.findall(r"= (0\.\d+): \d+ tokens, (\d+) sequences", out)
    assert args.vllm_gpu_memory_utilization < float(fraction)
    if name == "several_environments.yaml":  # "as workplace_assistant.yaml"
        return
    assert f"fraction of {round(float(fraction), 2)}" in section(name, "Hardware")
    if name not in ("lora_24gb.yaml", "one_80gb.yaml"):  # their tables are of what is given
        assert f"{contexts} " in section(name, "Hardware")


@pytest.mark.parametrize("name", FOR_GPUS)
def test_what_a_recipe_says_was_checked_is_checked_here(
    name: str, models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its plan, for each GPU that it names; the first is that of the command in the header."""
    monkeypatch.chdir(ROOT)
    checked = section(name, "Checked")
    sizes = re.findall(r"of (\d+\.\d) GiB", checked)
    assert checked.startswith("by that plan, in the tests, for") and re.search(
        r"[Nn]ot run on (a GPU|GPUs)\.$", checked
    )
    [(command, told)] = re.findall(r"trl-gym (plan --config .*?--gpu-memory (\S+).*?)$", header(name), re.M)
    assert sizes[0] == told
    for size in sizes[1:]:
        words = shlex.split(command.replace(f"--gpu-memory {told}", f"--gpu-memory {size}"))
        model = str(models / str(parsed(name)[2].model_name_or_path))
        assert main([*words, "--model-name-or-path", model]) == 0
        assert "Warning" not in capsys.readouterr().out


# -- what reads them: vLLM --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model without weights in the place of the hub's: its modules have the names of Qwen3's."""
    folder = tmp_path_factory.mktemp("model")
    Qwen3Config(num_hidden_layers=1, hidden_size=64, intermediate_size=64, vocab_size=64).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("remote_server.yaml", "smollm2.yaml")])
def test_vllm_takes_the_flags_of_a_server_that_we_start(name: str, skeleton: str) -> None:
    from trl_gym.policy_server.engine import entry as vllm_entry

    _, args, model = parsed(name)
    lora = get_peft_config(model)
    with_a_gpu = {
        **plan_transport(args, skeleton, lora, on_cuda=True).server_flags(),
        "gpu-memory-utilization": args.vllm_gpu_memory_utilization,
        "tensor-parallel-size": args.vllm_tensor_parallel_size,
    }
    flags = flags_from(server_options(args, skeleton, lora)[0] | with_a_gpu)
    told = vllm_entry.parse_args([model.model_name_or_path or "policy", *flags])
    assert told.weight_transfer_config.backend == "ipc"
    assert told.max_model_len == args.vllm_max_model_length
    given = args.gym_vllm_args or {}
    assert told.data_parallel_size == given.get("data-parallel-size", 1)
    assert told.enable_auto_tool_choice == ("tool-call-parser" in given)
    assert bool(told.enable_lora) == model.use_peft


def test_vllm_takes_the_flags_of_the_server_in_the_header() -> None:
    from trl_gym.policy_server.engine import entry as vllm_entry

    _, args, model = parsed("remote_server.yaml")
    [line] = re.findall(r"trl-gym serve (.*?)#", header("remote_server.yaml"))
    told = vllm_entry.parse_args(shlex.split(line))
    assert told.model == model.model_name_or_path
    assert told.max_model_len == args.vllm_max_model_length
    assert told.weight_transfer_config.backend == args.gym_weight_transport
    assert args.vllm_server_base_url == f"http://{told.host}:{told.port}/v1"


# -- what reads them: NeMo Gym ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=GYMS)
def installation(request: pytest.FixtureRequest) -> Path:
    return next((ROOT / request.param / "lib").glob("python*/site-packages"))


def test_gym_resolves_the_configs_and_has_the_agents(installation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config files are found, nothing is left open in them, every server has an entry point."""
    monkeypatch.chdir(ROOT)
    settings = []
    for name in ALL:
        _, args, _ = parsed(name)
        configs = resolve_configs(args.gym_config_paths, installation)
        config = initial_config(
            configs,
            expand_overrides(args.gym_overrides or {}),
            nonce="nonce",
            head_address=("127.0.0.1", 1),
            policy_base_urls=["http://127.0.0.1:2/v1"],
            policy_model_name="policy",
        )
        roots = [str(root) for root in (*configs.search_roots, installation)]
        settings.append({"config": config, "search_roots": roots})
    python = installation.parents[2] / "bin" / "python"
    script_path = Path(__file__).with_name("gym_configs.py")
    done = subprocess.run(
        [python, script_path, ROOT / "trl_gym" / "gym" / "host.py"],
        input=json.dumps(settings), capture_output=True, text=True,
        env={API_KEY_VARIABLE: "key", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, servers in zip(ALL, json.loads(done.stdout.splitlines()[-1]), strict=True):
        recipe, args, _ = parsed(name)
        agents = {server for server, kind in servers.items() if kind == "responses_api_agents"}
        wanted = {recipe.agent, *(args.gym_environments or {})} - {None}
        assert wanted <= agents, name
        # A row that names none goes to the only one.
        assert wanted or len(agents) == 1, name
        assert "policy_model" in servers


def test_scripts_that_make_math_data_are_installed(installation: Path) -> None:
    recipe, _, _ = parsed("math.yaml")
    modules = re.findall(r"-m ([\w.]+)", header("math.yaml"))
    assert len(modules) == 2
    for module, file in zip(modules, [*recipe.train_files, *recipe.eval_files], strict=True):
        text = (installation / (module.replace(".", "/") + ".py")).read_text()
        assert f'open("{Path(file).relative_to("runs/data/math")}", "w")' in text
    requirements = (installation / "resources_servers/math_with_judge/requirements.txt").read_text()
    assert re.search(r"math-verify==\S+", header("math.yaml"))[0] in requirements


def test_commands_that_make_sudokus_run(tmp_path: Path) -> None:
    """As in the header, but for size and folder; the rows name the agent of the recipe."""
    lines = [line.strip() for line in header("several_environments.yaml").splitlines()]
    commands = [line for line in lines if re.match(r"gym_python=|site=|make_sudokus=|\"\$gym_python", line)]
    text = re.sub(r"--size \d+", "--size 2", "\n".join(commands).replace("runs/data/mini_sudoku", str(tmp_path)))
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # with `trl-gym`
    subprocess.run(["bash", "-ec", text], check=True, capture_output=True, cwd=tmp_path, env=env)
    for file in ("train.jsonl", "validation.jsonl"):
        rows = load_gym_dataset(tmp_path / file)
        assert rows["agent"] == ["reasoning_gym_simple_agent"] * 2


def test_data_that_gym_downloads_has_the_agent_of_the_recipe(installation: Path) -> None:
    [config] = re.findall(r"--config (resources_servers/\S+)", header("workplace_assistant.yaml"))
    content = yaml.safe_load((installation / config).read_text())
    recipe, _, _ = parsed("workplace_assistant.yaml")
    datasets = content[recipe.agent]["responses_api_agents"]["simple_agent"]["datasets"]
    assert {Path(dataset["jsonl_fpath"]).name for dataset in datasets} >= {"train.jsonl", "validation.jsonl"}


# -- the script -------------------------------------------------------------------------------------------------------


def rows_file(path: Path, agent: str, num_rows: int) -> str:
    row = {"responses_create_params": {"input": "Hello"}, "agent_ref": {"name": agent}}
    path.write_text((json.dumps(row) + "\n") * num_rows)
    return str(path)


def test_train_files_are_mixed_by_weight(tmp_path: Path) -> None:
    files = [rows_file(tmp_path / "a.jsonl", "a", 300), rows_file(tmp_path / "b.jsonl", "b", 300)]
    options = train.ScriptArguments(train_files=files)
    plain = train.load_train(options, seed=0)["agent"]
    assert plain == ["a"] * 300 + ["b"] * 300
    options.train_weights = [2, 1]
    mixed = train.load_train(options, seed=0)["agent"]
    assert 1.6 < mixed.count("a") / mixed.count("b") < 2.5  # drawn, with this seed
    options.train_weights = [1, 1, 1]
    with pytest.raises(DatasetError, match=r"for 2 dataset\(s\)\. Give one positive number for each"):
        train.load_train(options, seed=0)


def test_what_the_model_options_say_about_loading_is_handed_on(tmp_path: Path) -> None:
    def told(model: ModelConfig, **options: Any) -> GymGRPOConfig:
        args = GymGRPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)
        train.load_as_told(model, args)
        return args

    args = told(ModelConfig(dtype="bfloat16", attn_implementation="sdpa", load_in_4bit=True))
    assert args.model_init_kwargs["dtype"] == "bfloat16"
    assert args.model_init_kwargs["attn_implementation"] == "sdpa"
    assert args.model_init_kwargs["quantization_config"].load_in_4bit
    args = told(ModelConfig(dtype="bfloat16"), model_init_kwargs={"dtype": "float32"})
    assert args.model_init_kwargs == {"dtype": "float32"}
    args = told(ModelConfig(model_revision="v1"), gym_vllm_args={"max-num-seqs": 8})
    assert args.model_init_kwargs["revision"] == "v1"
    assert args.gym_vllm_args == {"max-num-seqs": 8, "revision": "v1"}
