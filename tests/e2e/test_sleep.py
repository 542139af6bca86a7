"""Sleep, wake and the explanation of a mismatch against one real server on a tiny random model.

On a CPU vLLM's workers ignore sleeping; its scheduler, which holds requests back, does not. What is tested is the
order of calls, and that answers after them come from the weights that were sent in between.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests.e2e.servers import Served, push_file
from tests.policy_server.tiny_model import build_model, build_random_policy, build_tokenizer
from trl_gym.memory.sharing import DeviceSharing, Occupancy
from trl_gym.policy_server.client import PolicyClient
from trl_gym.weight_sync.sums import explain, held_sums, sent_sums
from trl_gym.weight_sync.sync import trainer_logprobs

pytestmark = [pytest.mark.e2e, pytest.mark.shares("random")]

SEQUENCES = [[5, 9, 300, 17, 44, 120, 8], [401, 33, 2, 3, 90]]


def is_sleeping(client: PolicyClient) -> bool:
    """Return whether anything sleeps, or the scheduler is paused."""
    return bool(client._call("GET", "/is_sleeping")["is_sleeping"])


def policy(seed: int) -> torch.nn.Module:
    return build_model(build_tokenizer(), tie=True, seed=seed)


def test_a_step_with_sleep_and_a_request_that_comes_too_early(served: Served, tmp_path: Path) -> None:
    client, server = served.client, served.server
    sharing = DeviceSharing(Accelerator(cpu=True), server, timeout_s=120.0, drops_weights=True)
    sharing.after_sampling()
    assert is_sleeping(client)
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(PolicyClient(server.base_url, api_key=client.api_key).prompt_logprobs, SEQUENCES[:1])
        sharing.before_sync()
        assert is_sleeping(client) and sharing.state is Occupancy.WEIGHTS
        build_random_policy(tmp_path / "next", tie=True, seed=1)
        push_file(client, tmp_path / "next" / "model.safetensors", "1", resume=False)
        sharing.pushed()
        # Whatever is asked while something sleeps waits, and is computed with what was sent.
        assert is_sleeping(client) and not early.done()
        sharing.before_sampling()
        held_back = early.result(timeout=60)
    assert not is_sleeping(client) and not client.is_paused()
    expected = [trainer_logprobs(policy(seed=1), [ids])[0] for ids in SEQUENCES]
    assert held_back[0] == pytest.approx(expected[0], abs=1e-3)
    for found, wanted in zip(client.prompt_logprobs(SEQUENCES), expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-3)


def test_weights_that_are_kept_need_no_push(served: Served) -> None:
    server = served.server
    before = server.client.prompt_logprobs(SEQUENCES)
    sharing = DeviceSharing(Accelerator(cpu=True), server, timeout_s=120.0, drops_weights=False)
    sharing.after_sampling()
    assert is_sleeping(server.client)
    sharing.before_sampling()
    assert not is_sleeping(server.client)
    assert server.client.prompt_logprobs(SEQUENCES) == before


def test_the_server_says_which_parameters_it_holds_otherwise(served: Served, tmp_path: Path) -> None:
    client = served.client
    build_random_policy(tmp_path / "weights", tie=True, seed=2)
    push_file(client, tmp_path / "weights" / "model.safetensors", "2")
    sent = sent_sums((name, weight.detach()) for name, weight in policy(seed=2).named_parameters())
    held = held_sums(client, torch.float32)
    assert held is not None and held.unseen == frozenset()
    # A CPU server has emptied the parameters of its linear layers; what they compute tells.
    assert "model.layers.0.self_attn.qkv_proj.weight" in held.sums
    assert "model.embed_tokens.weight in lm_head" in held.sums
    assert "bit for bit what was sent" in explain(client, sent, torch.float32)[0].text
    changed = sent | {"model.layers.1.mlp.up_proj.weight": sent["model.layers.1.mlp.up_proj.weight"] + 1}
    text = explain(client, changed, torch.float32)[0].text
    assert "Not what was sent (1 of " in text and "model.layers.1.mlp.gate_up_proj.weight" in text
