"""Every check, in order, with what it needs. A check needs another one only where it cannot be made without it."""

from __future__ import annotations

from trl_gym.doctor import data, environments, installation, leftovers, live, options, output, policy
from trl_gym.doctor import inputs as model
from trl_gym.doctor import static as machine
from trl_gym.doctor.checks import Check
from trl_gym.doctor.template import chat_template

_FILE = "options file"

CHECKS = (
    Check("python", installation.python),
    Check("versions", installation.versions),
    Check(_FILE, options.options_file),
    Check("options", options.options, (_FILE,)),
    Check("vllm", installation.vllm_version, (_FILE,)),
    Check("processes", options.processes, (_FILE,)),
    Check("devices", machine.devices),
    Check("ports", machine.ports, (_FILE,)),
    Check("gym interpreter", environments.interpreter, (_FILE,)),
    Check("gym configs", environments.configs, (_FILE, "gym interpreter")),
    Check("gym head server", environments.head_server, (_FILE,)),
    Check("data script", data.data_script, (_FILE,)),
    Check("dataset rows", data.rows, (_FILE,)),
    Check("agents", data.agents, (_FILE,)),
    Check("model", model.model, (_FILE,)),
    Check("tokenizer", model.tokenizer, (_FILE, "model")),
    Check("chat template", chat_template, (_FILE, "tokenizer")),
    Check("context", model.context, (_FILE, "tokenizer")),
    Check("memory", machine.memory_plan, (_FILE, "model")),
    Check("shared memory", machine.shared_memory, (_FILE, "model")),
    Check("vllm flags", policy.flags, (_FILE, "model")),
    Check("remote server", policy.remote, (_FILE,)),
    Check("folders", output.folders, (_FILE,)),
    Check("space", output.space, (_FILE, "model")),
    Check("reporting", output.reporting, (_FILE,)),
    Check("leftovers", leftovers.leftovers, (_FILE,)),
    Check("policy server", live.policy_server, ("options", "model", "tokenizer", "vllm flags", "remote server")),
    Check("gym servers", live.gym_servers, ("options", "gym configs", "gym head server")),
    Check("token continuation", live.continuation, ("policy server", "gym servers")),
    Check("weight sync", live.weight_sync, ("token continuation",)),
    Check("rollouts", live.rollouts, ("token continuation", "agents")),
)
