"""`trl-gym serve --engine transformers`, where vLLM cannot be imported: chats, weights from files, its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.conftest import wait_for
from tests.e2e.servers import push_file, random_like
from tests.policy_server.middleware.template_chats import TOOLS
from tests.policy_server.tiny_model import build_random_policy
from trl_gym.errors import ConfigError, PolicyServerError
from trl_gym.policy_server.client import PolicyClient
from trl_gym.policy_server.server import PolicyServer
from trl_gym.policy_server.splice_probe import check_splice
from trl_gym.weight_sync.sync import SyncOptions, WeightSync, compare, probe_batch, trainer_logprobs
from trl_gym.weight_sync.transports.file import FileTransport

pytestmark = [pytest.mark.e2e, pytest.mark.no_policy]

KEY = "a-key-of-the-tests"
HELD_OUT = probe_batch(256, seed=1)
MAX_GAP = 1e-4  # nats, mean; both sides compute in float32
USER = {"role": "user", "content": "What is 47 + 36?"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a process that has no vLLM."""
    folder = tmp_path_factory.mktemp("hidden")
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['vllm'] = None\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=":")
        return dict(os.environ)


@dataclass
class Served:
    """A server that the command started."""

    process: subprocess.Popen[str]
    server: PolicyServer
    model: Path
    stderr: Path

    @property
    def client(self) -> PolicyClient:
        return self.server.client


@pytest.fixture(scope="module")
def served(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    model = build_random_policy(folder / "policy")
    command = [sys.executable, "-m", "trl_gym.cli", "serve", str(model), "--port", "0", "--api-key", KEY]
    command += ["--log-dir", str(folder / "logs"), "--max-model-len", "512"]  # and no --engine: there is no vLLM
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready http://127.0.0.1:"), (folder / "stderr").read_text()
        server = PolicyServer.attach(line.split()[1], api_key=KEY)
        yield Served(process, server, model, folder / "stderr")
    finally:
        process.kill()
        process.wait(60.0)


def gap(client: PolicyClient, model: torch.nn.Module) -> float:
    return compare(trainer_logprobs(model, HELD_OUT), client.prompt_logprobs(HELD_OUT)).mean_gap


def test_it_says_what_it_is_and_continues_sampled_turns_exactly(served: Served) -> None:
    info = served.client.info()
    assert (info["engine"], info["max_model_len"], info["model_names"]) == ("transformers", 512, ["policy"])
    assert served.server.weight_transports == ("file",)
    assert "read by the response template `qwen3`" in served.stderr.read_text()
    check_splice(served.client, served.server.model_name)
    with pytest.raises(PolicyServerError, match="401"):
        PolicyClient(served.client.base_url).info()


def test_every_sync_arrives(served: Served) -> None:
    assert gap(served.client, AutoModelForCausalLM.from_pretrained(served.model)) < MAX_GAP
    sync = WeightSync(Accelerator(cpu=True), served.server, FileTransport(), SyncOptions(dtype=torch.float32))
    chat = {"messages": [USER], "tools": TOOLS, "max_tokens": 8, "temperature": 0.0, "logprobs": True}
    for step in (1, 2):
        model = random_like(served.model, seed=10 + step)
        assert gap(served.client, model) > 0.1
        sync.push(model, step)
        assert gap(served.client, model) < MAX_GAP
        answer = served.client.chat(**chat)
        assert answer["weight_version"] == str(step)
        message = answer["choices"][0]["message"]
        ids = [*message["prompt_token_ids"], *message["generation_token_ids"]]
        with torch.no_grad():  # what it samples comes of the new weights too, whatever it remembers of the prompt
            likeliest = model(torch.tensor([ids])).logits[0].argmax(-1)
        assert likeliest[len(message["prompt_token_ids"]) - 1 : -1].tolist() == message["generation_token_ids"]


def test_after_the_first_sync_a_part_is_enough(served: Served) -> None:
    model = random_like(served.model, seed=30)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layers.1.mlp.down_proj" in name
    options = SyncOptions(dtype=torch.float32, only_trainable=True)
    sync = WeightSync(Accelerator(cpu=True), served.server, FileTransport(), options)
    whole = sync.push(model, 4).num_bytes
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(0.1)
    assert gap(served.client, model) > 0.001
    assert sync.push(model, 5).num_bytes < 0.5 * whole
    assert gap(served.client, model) < MAX_GAP


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: {**weights, "model.other": torch.ones(2)}, "model.other, which the model does not have"),
        (lambda weights: {name: tensor[..., :1].clone() for name, tensor in weights.items()}, "in the model"),
        (lambda weights: dict(list(weights.items())[:3]), "lacks"),
        (lambda weights: {}, "no tensors"),
    ],
)
def test_weights_of_another_model_are_refused_and_whole_ones_are_taken_afterwards(
    served: Served,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    words: str,
) -> None:
    model = random_like(served.model, seed=40)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    save_file(change(weights), tmp_path / "wrong.safetensors")
    save_file(weights, tmp_path / "right.safetensors")
    with pytest.raises(PolicyServerError, match=words):
        push_file(served.client, tmp_path / "wrong.safetensors", "wrong")
    push_file(served.client, tmp_path / "right.safetensors", "right")
    assert gap(served.client, model) < MAX_GAP
    assert served.client.weight_version() == "right"


def test_files_of_another_machine_are_refused(served: Served, tmp_path: Path) -> None:
    with pytest.raises(PolicyServerError, match="cannot read what the trainer wrote"):
        served.client.init_weight_transfer({"probe": str(tmp_path / "missing"), "secret": "x"})
    (tmp_path / "other").write_text("something else")
    with pytest.raises(PolicyServerError, match="is another file here"):
        served.client.init_weight_transfer({"probe": str(tmp_path / "other"), "secret": "x"})
    with pytest.raises(PolicyServerError, match="cannot read the weights"):
        push_file(served.client, tmp_path / "missing", "3")
    served.client.resume()


def test_it_ends_with_the_command_also_where_a_call_waits(served: Served) -> None:
    served.client.pause("keep")
    before = served.client.untagged_calls().others
    with ThreadPoolExecutor(1) as pool, closing(PolicyClient(served.client.base_url, api_key=KEY)) as other:
        call = pool.submit(other.chat, messages=[USER], max_tokens=4)
        wait_for(lambda: served.client.untagged_calls().others > before)
        served.process.send_signal(signal.SIGINT)
        with pytest.raises(PolicyServerError, match="was stopped"):
            call.result(120.0)
    assert served.process.wait(120.0) == 130
    written = [served.stderr, *(served.stderr.parent / "logs").rglob("*.log")]
    assert len(written) > 1 and not [path for path in written if "Traceback" in path.read_text()]
    with pytest.raises(PolicyServerError):
        served.client.info(timeout_s=1.0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--response-template", "none-such"], "no name of TRL's"), (["--enforce-eager"], "unrecognized arguments")],
)
def test_what_it_cannot_be_started_with_is_said(tmp_path: Path, flags: list[str], words: str) -> None:
    model = build_random_policy(tmp_path / "policy")
    server = PolicyServer(model, engine="transformers", vllm_args=flags, log_dir=tmp_path / "logs")
    try:
        with pytest.raises((ConfigError, PolicyServerError), match=words):
            server.start().wait_ready()
    finally:
        server.stop()
