"""Launch files for two nodes: `node.sh` and the SLURM script run here, with stand-ins for SLURM and both programs."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import RECIPES, wait_for
from tests.fork_ranks import free_port

SCRIPTS = [RECIPES / "cloud" / "node.sh", RECIPES / "slurm" / "two_nodes.sbatch"]
TIMEOUT_S = 180.0

# A server that answers /health until it is told to end, or that dies at once.
SERVER = """#!{python}
import http.server, json, os, pathlib, sys
here = pathlib.Path({root!r})
started = {{"argv": sys.argv[1:], "key": os.environ["VLLM_API_KEY"], "pid": os.getpid()}}
(here / "server.json").write_text(json.dumps(started))
if (here / "server_dies").exists():
    sys.exit(3)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *_):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Health).serve_forever()
"""
# A trainer that ends as it is told, or runs on.
TRAINER = """#!{python}
import json, os, pathlib, sys, time
here = pathlib.Path({root!r})
started = {{"argv": sys.argv[1:], "key": os.environ["VLLM_API_KEY"], "pid": os.getpid()}}
(here / "trainer.json").write_text(json.dumps(started))
status = here / "trainer_status"
while not status.exists():
    time.sleep(0.02)
sys.exit(int(status.read_text()))
"""
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> {root}/srun.txt
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> {root}/scontrol.txt
if [[ "$1 $2" == "show hostnames" ]]; then printf 'trains\\nlocalhost\\n'; fi
"""


@dataclass
class Checkout:
    """A folder that looks like a checkout to the scripts.

    Attributes:
        root: The folder.
        port: For the server; free.
        started: Processes to end.
    """

    root: Path
    port: int
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self, *command: str, **settings: str) -> subprocess.Popen[str]:
        """Start a script of this checkout."""
        environment = {
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}", "TRL_GYM_SERVER_PORT": str(self.port),
            "TRL_GYM_GPUS": "8", "VLLM_API_KEY": "secret-key", "TRL_GYM_LEASE_POLL": "0.05",
        } | settings  # fmt: skip
        process = subprocess.Popen(
            command, cwd=self.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def node(self, *arguments: str, **settings: str) -> subprocess.Popen[str]:
        return self.run("bash", "recipes/cloud/node.sh", *arguments, **settings)

    def sbatch(self, *options: str, **settings: str) -> subprocess.Popen[str]:
        job = {
            "SLURM_SUBMIT_DIR": str(self.root), "SLURM_JOB_NODELIST": "[a-b]", "SLURM_JOB_ID": "123",
            "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "96",
        }  # fmt: skip
        return self.run("bash", "recipes/slurm/two_nodes.sbatch", *options, **(job | settings))

    def end_trainer(self, status: int) -> None:
        whole = self.root / "trainer_status.tmp"
        whole.write_text(str(status))
        whole.rename(self.root / "trainer_status")

    def record(self, who: str) -> dict[str, Any]:
        """What `server` or `trainer` was started with; waits for it."""
        path = self.root / f"{who}.json"
        wait_for(lambda: path.exists() and path.read_text().endswith("}"), f"{who} is started")
        return json.loads(path.read_text())

    def ended(self, who: str) -> bool:
        return not Path(f"/proc/{self.record(who)['pid']}").exists()


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    for folder in ("cloud", "slurm", "accelerate"):
        shutil.copytree(RECIPES / folder, tmp_path / "recipes" / folder)
    shutil.copy(RECIPES / "remote_server.yaml", tmp_path / "recipes")
    programs = {
        ".venv/bin/trl-gym": SERVER,
        ".venv/bin/accelerate": TRAINER,
        "bin/srun": SRUN,
        "bin/scontrol": SCONTROL,
    }
    for name, text in programs.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(python=sys.executable, root=str(tmp_path)))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    made = Checkout(tmp_path, free_port())
    yield made
    for process in made.started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


# -- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_accepts_the_syntax(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in path.read_text()


def test_only_account_and_partition_are_left_open() -> None:
    text = SCRIPTS[1].read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.M))
    assert len(options) == len(re.findall(r"^#SBATCH", text, re.M))
    assert [name for name, value in options.items() if re.fullmatch("[A-Z]+", value)] == ["account", "partition"]
    assert (options["nodes"], options["signal"]) == ("2", "B:USR1@300")
    assert "requeue" in options and options["open-mode"] == "append"
    # SLURM reads options up to the first command.
    assert text.rindex("#SBATCH") < text.index("set -euo pipefail")
    for path in RECIPES.rglob("*"):
        if path.suffix in (".yaml", ".sh", ".sbatch"):
            assert not re.search(r"/path/to|<your|<[A-Z_]+>|/home/|CHANGE", path.read_text()), path


def test_settings_of_the_scripts_are_documented() -> None:
    node = SCRIPTS[0].read_text()
    comment = node[: node.index("set -euo pipefail")]
    used = {name for path in RECIPES.rglob("*") if path.suffix in (".yaml", ".sh", ".sbatch")
            for name in re.findall(r"TRL_GYM_[A-Z_]+", path.read_text())}  # fmt: skip
    assert used == set(re.findall(r"^#   (TRL_GYM_[A-Z_]+) ", comment, re.M))


# -- one node ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        (["serve"], {"VLLM_API_KEY": ""}, "VLLM_API_KEY is not set"),
        (["sevre"], {}, "`serve` or `train`, got 'sevre'"),
        ([], {}, "got ''"),
        (["train"], {}, "TRL_GYM_SERVER_HOST is not set"),
        (["serve"], {"TRL_GYM_RECIPE": "recipes/gone.yaml"}, "recipes/gone.yaml does not exist"),
        (["serve"], {"TRL_GYM_RECIPE": "recipes/accelerate/ddp.yaml"}, "sets no model_name_or_path"),
        (["serve"], {"TRL_GYM_TENSOR_PARALLEL": "3"}, "8 GPUs do not divide into replicas of 3"),
        (["train"], {"TRL_GYM_SERVER_HOST": "localhost", "TRL_GYM_START_TIMEOUT": "1"}, "did not answer within 1 s"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(
    checkout: Checkout, arguments: list[str], settings: dict[str, str], said: str
) -> None:
    process = checkout.node(*arguments, **settings)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2
    assert said in output


def test_vllm_takes_what_the_server_is_started_with(checkout: Checkout) -> None:
    from trl_gym.cli import _add_serve_options
    from trl_gym.policy_server.engine import entry as vllm_entry

    checkout.node("serve", "--enable-prefix-caching", TRL_GYM_TENSOR_PARALLEL="2")
    started = checkout.record("server")
    assert started["key"] == "secret-key" and "secret-key" not in " ".join(started["argv"])
    assert started["argv"][:2] == ["serve", "Qwen/Qwen3-4B-Instruct-2507"]
    own = argparse.ArgumentParser(allow_abbrev=False)
    _add_serve_options(own)
    ours, flags = own.parse_known_args(started["argv"][2:])
    assert (ours.host, ours.port) == ("0.0.0.0", checkout.port)
    told = vllm_entry.parse_args([started["argv"][1], *flags])
    recipe = yaml.safe_load((RECIPES / "remote_server.yaml").read_text())
    assert told.max_model_len == recipe["vllm_max_model_length"]
    assert (told.tensor_parallel_size, told.data_parallel_size) == (2, 4)
    assert told.weight_transfer_config.backend == recipe["gym_weight_transport"]


def test_a_server_with_a_lease_ends_with_training(checkout: Checkout) -> None:
    lease_port = str(free_port())
    server = checkout.node("serve", TRL_GYM_LEASE_URL=f"http://127.0.0.1:{lease_port}/")
    trainer = checkout.node("train", TRL_GYM_SERVER_HOST="localhost", TRL_GYM_LEASE_PORT=lease_port)
    checkout.record("trainer")
    assert server.poll() is None
    checkout.end_trainer(0)
    assert trainer.wait(TIMEOUT_S) == 0
    output, _ = server.communicate(timeout=TIMEOUT_S)
    assert server.returncode == 0 and "training has ended" in output
    assert checkout.ended("server")


def test_a_server_that_dies_in_its_lease_is_a_failure(checkout: Checkout) -> None:
    (checkout.root / "server_dies").touch()
    server = checkout.node("serve", TRL_GYM_LEASE_URL="http://127.0.0.1:9/")
    output, _ = server.communicate(timeout=TIMEOUT_S)
    assert server.returncode == 2 and "the policy server has ended" in output


# -- SLURM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 7])
def test_the_job_ends_with_training_and_takes_the_server_down(checkout: Checkout, status: int) -> None:
    job = checkout.sbatch("--learning_rate", "1e-6", VLLM_API_KEY="")
    trainer, server = checkout.record("trainer"), checkout.record("server")
    assert not checkout.ended("server")
    checkout.end_trainer(status)
    output, _ = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == status, output
    assert checkout.ended("server")
    assert "trains trains, localhost serves" in output
    # A key of this job's own, in the environment only.
    assert trainer["key"] == server["key"] and re.fullmatch("[0-9a-f]{64}", server["key"])
    assert server["key"] not in output + (checkout.root / "srun.txt").read_text() + str(
        [trainer["argv"], server["argv"]]
    )
    options = " ".join(trainer["argv"])
    assert options.startswith("launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 8 recipes/grpo.py")
    assert "--resume true" in options and options.endswith("--learning_rate 1e-6")
    assert f"--vllm_server_base_url http://localhost:{checkout.port}/v1" in options
    steps = (checkout.root / "srun.txt").read_text()
    assert "--nodelist=localhost" in steps and "--nodelist=trains" in steps


def test_a_job_whose_server_dies_fails_and_ends_training(checkout: Checkout) -> None:
    job = checkout.sbatch()
    checkout.record("trainer")
    os.kill(checkout.record("server")["pid"], signal.SIGKILL)
    output, _ = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 137
    assert "the policy server on localhost has ended with status 137" in output
    wait_for(lambda: checkout.ended("trainer"), "training is ended")


def test_the_job_goes_into_the_queue_again_before_its_time_is_over(checkout: Checkout) -> None:
    job = checkout.sbatch()
    checkout.record("trainer")
    os.kill(job.pid, signal.SIGUSR1)  # to the batch script alone, as SLURM does
    output, _ = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 0, output
    assert "requeue 123" in (checkout.root / "scontrol.txt").read_text()
    assert checkout.ended("trainer") and checkout.ended("server")


# -- SkyPilot, Kubernetes ---------------------------------------------------------------------------------------------


def test_skypilot_task() -> None:
    task = yaml.safe_load((RECIPES / "cloud" / "skypilot.yaml").read_text())
    known = {"name", "num_nodes", "workdir", "resources", "envs", "secrets", "file_mounts", "setup", "run"}
    assert set(task) == known and task["num_nodes"] == 2
    subprocess.run(["bash", "-n"], input=task["setup"] + "\n" + task["run"], text=True, check=True)
    assert task["secrets"] == {"VLLM_API_KEY": None}  # null: `sky` demands it
    mount = next(iter(task["file_mounts"]))
    assert f"--output_dir {mount}/" in task["run"]
    given = {"SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS", "SKYPILOT_NUM_GPUS_PER_NODE"}
    assert set(re.findall(r"SKYPILOT_[A-Z_]+", task["run"])) == given
    assert (RECIPES.parent / task["envs"]["TRL_GYM_RECIPE"]).is_file()


def test_kubernetes_objects_name_each_other() -> None:
    claim, service, job = yaml.safe_load_all((RECIPES / "cloud" / "kubernetes.yaml").read_text())
    assert [one["kind"] for one in (claim, service, job)] == ["PersistentVolumeClaim", "Service", "Job"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == service["metadata"]["name"]
    # Of indexed jobs only: pods with names, and an end when training ends.
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert volumes["trl-gym"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["TRL_GYM_SERVER_HOST"] == f"{job['metadata']['name']}-1.{pod['subdomain']}"
    assert environment["TRL_GYM_GPUS"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    subprocess.run(["bash", "-n"], input=container["command"][-1], text=True, check=True)
