# Copyright 2026 The trl-gym Authors
# SPDX-License-Identifier: Apache-2.0
"""Everything about the tiny policy but its training, which takes longer than a unit test may."""

import ast
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 47, "b": 36}}}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello, wörld! 123"},
    {"role": "assistant", "content": "-5 degrees\n"},
    {"role": "user", "content": "Two sums, please."},
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "83"},
    {"role": "tool", "tool_call_id": "c1", "content": '{"error": "x"}'},
    {"role": "assistant", "content": "Once more.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "-83"},
    {"role": "assistant", "content": "-83"},
    {"role": "user", "content": ""},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_policy, calculator_data):
    return tiny_policy.build_tokenizer(calculator_data)


@pytest.fixture(scope="module")
def tools(tiny_policy, calculator_data):
    return tiny_policy.chat_tools(calculator_data)


def text(tokenizer, messages, **kwargs):
    return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


def ids(tokenizer, messages, **kwargs):
    return tokenizer.apply_chat_template(messages, return_dict=False, **kwargs)


@pytest.mark.parametrize("with_tools", [False, True], ids=["no tools", "tools"])
@pytest.mark.parametrize("with_system", [False, True], ids=["no system", "system"])
def test_earlier_turns_render_the_same_when_later_ones_follow(tokenizer, tools, with_tools, with_system):
    messages, kwargs = CONVERSATION[0 if with_system else 1 :], {"tools": tools if with_tools else None}
    whole = ids(tokenizer, messages, **kwargs)
    for end in range(1, len(messages)):
        prefix = ids(tokenizer, messages[:end], **kwargs)
        assert whole[: len(prefix)] == prefix
        if messages[end]["role"] == "assistant":
            prompt = ids(tokenizer, messages[:end], add_generation_prompt=True, **kwargs)
            assert whole[: len(prompt)] == prompt


def test_whole_episode_as_text(tokenizer, tiny_policy, calculator_data, tools):
    messages = tiny_policy.episode(calculator_data, "subtract", 12, 57)
    rendered = text(tokenizer, messages, tools=tools)
    schema = '"parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, '
    assert rendered == (
        "<|im_start|>system\n<tools>\n"
        f'{{"name": "add", "description": "a + b", {schema}"required": ["a", "b"]}}}}\n'
        f'{{"name": "subtract", "description": "a - b", {schema}"required": ["a", "b"]}}}}\n'
        "</tools><|im_end|>\n"
        "<|im_start|>user\nWhat is 12 - 57?<|im_end|>\n"
        "<|im_start|>assistant\n"
        '<tool_call>{"name": "subtract", "arguments": {"a": 12, "b": 57}}</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>-45</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n-45<|im_end|>\n"
    )


def test_system_text_and_tools_share_one_turn(tokenizer, tools):
    for role in ("system", "developer"):
        rendered = text(tokenizer, [{"role": role, "content": "Be brief."}, *CONVERSATION[1:2]], tools=tools)
        assert rendered.startswith("<|im_start|>system\nBe brief.\n\n<tools>\n{")
        assert rendered.count("<|im_start|>system") == 1


def test_parallel_calls_and_their_results(tokenizer):
    rendered = text(tokenizer, CONVERSATION[4:7])
    call = '<tool_call>{"name": "add", "arguments": {"a": 47, "b": 36}}</tool_call>'
    assert rendered == (
        f"<|im_start|>assistant\n{call}\n{call}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>83</tool_response><|im_end|>\n"
        '<|im_start|>user\n<tool_response>{"error": "x"}</tool_response><|im_end|>\n'
    )


def test_what_servers_add_or_leave_out_changes_nothing(tokenizer, tools):
    dumped = [
        {"defer_loading": None, "function": {"strict": None, **dict(reversed(tool["function"].items()))}}
        for tool in tools
    ]
    plain = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    variants = [
        [plain[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        [plain[0], {"role": "assistant", "tool_calls": [CALL], "generation_token_ids": [1]}],
        [plain[0], {"role": "assistant", "content": None, "tool_calls": [CALL["function"]]}],
        [
            plain[0],
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 47, "b": 36}'}}],
            },
        ],
    ]
    expected = text(tokenizer, plain, tools=tools)
    assert text(tokenizer, plain, tools=dumped) == expected
    assert [text(tokenizer, variant, tools=tools) for variant in variants] == [expected] * len(variants)


def test_call_without_arguments(tokenizer):
    for arguments in (None, "", {}):
        call = {"function": {"name": "now", "arguments": arguments}}
        rendered = text(tokenizer, [{"role": "assistant", "content": "", "tool_calls": [call]}])
        assert '{"name": "now", "arguments": {}}' in rendered


@pytest.mark.parametrize("sample", ["", "a", "Ünïcödé ✓ 中文", "  spaces\n\n\ttabs ", "1234567890", "<tool_call>{}"])
def test_any_text_survives_the_tokenizer(tokenizer, sample):
    encoded = tokenizer(sample, add_special_tokens=False).input_ids
    assert tokenizer.decode(encoded) == sample
    assert tokenizer.unk_token is None


def test_generation_prompt_ends_on_a_token_boundary(tokenizer):
    # A merge such as "assistant\n-" would give the policy a prompt that no rollout contains.
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids
    for answer in ("-45", "45", " x", "\n", "<tool_call>", "I do not know."):
        whole = tokenizer("<|im_start|>assistant\n" + answer, add_special_tokens=False).input_ids
        assert whole[: len(header)] == header


def test_special_tokens(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    # A server that skips special tokens must still show its parser the tool call.
    shown = tokenizer.decode(tokenizer("<tool_call>1</tool_call><|im_end|>").input_ids, skip_special_tokens=True)
    assert shown == "<tool_call>1</tool_call>"


def test_prompts_are_short(tokenizer, tiny_policy, calculator_data, tools):
    episode = tiny_policy.episode(calculator_data, "add", 47, 36)
    assert len(ids(tokenizer, episode[:1], tools=tools, add_generation_prompt=True)) <= 32
    assert len(ids(tokenizer, episode, tools=tools)) <= 64


def test_mask_covers_what_the_policy_writes(tokenizer, tiny_policy, calculator_data, tools):
    episodes = [tiny_policy.episode(calculator_data, "subtract", 12, 57), [CONVERSATION[1], CONVERSATION[2]]]
    token_ids, written = tiny_policy.encode(tokenizer, episodes, tools)
    assert token_ids.shape == written.shape
    call = '<tool_call>{"name": "subtract", "arguments": {"a": 12, "b": 57}}</tool_call><|im_end|>'
    assert [tokenizer.decode(row[mask]) for row, mask in zip(token_ids, written, strict=True)] == [
        call + "-45<|im_end|>",
        "-5 degrees\n<|im_end|>",
    ]


def test_demonstrations_use_no_held_out_pair(tiny_policy, calculator_data):
    held_out = {
        calculator_data.question(tool, a, b)
        for tool in calculator_data.OPERATORS
        for a, b in calculator_data.operand_pairs(held_out=True)
    }
    demos = tiny_policy.demonstrations(calculator_data, 5_000, random.Random(0), tiny_policy.SETTINGS)
    assert not held_out & {demo[0]["content"] for demo in demos}


def test_model_shape(tokenizer, tiny_policy):
    model = tiny_policy.build_model(tokenizer)
    assert model.num_parameters() < 1_000_000
    assert model.config.tie_word_embeddings and model.config.head_dim == 64
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {str(p.dtype) for p in model.parameters()} == {"torch.float32"}
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id


# ----------------------------------------------------------------------------------------------------
# The policy that comes with the package


def test_the_package_holds_what_a_build_makes_now(tiny_policy, tokenizer, tmp_path):
    assert tiny_policy.is_cached(tiny_policy.SHIPPED, 0), "build it again: the command is in tiny_policy.py"
    tokenizer.save_pretrained(tmp_path)
    tiny_policy.build_model(tokenizer).save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        if path.name != "model.safetensors":
            assert (tiny_policy.SHIPPED / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in tiny_policy.SHIPPED.iterdir()} == {p.name for p in tmp_path.iterdir()} | {
        tiny_policy.MANIFEST
    }


def test_its_warm_start_begins_like_one_of_today(tiny_policy, tokenizer, calculator_data):
    manifest = tiny_policy.read_manifest(tiny_policy.SHIPPED)
    short = replace(tiny_policy.SETTINGS, num_steps=2, max_extensions=0, num_probe_tasks=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tiny_policy.build_model(tokenizer)
        _, losses = tiny_policy.warm_start(model, tokenizer, calculator_data, 0, short)
    assert losses == pytest.approx(manifest["first_losses"], rel=1e-4)  # sums differ between machines


def test_its_weights_solve_what_its_manifest_says(tiny_policy, tokenizer, calculator_data, tools):
    model = Qwen3ForCausalLM.from_pretrained(tiny_policy.SHIPPED)
    rng = random.Random(5)
    pairs = rng.sample(calculator_data.operand_pairs(held_out=True), 128)
    tasks = [(rng.choice(tuple(calculator_data.OPERATORS)), *pair) for pair in pairs]
    episodes = [tiny_policy.episode(calculator_data, *task) for task in tasks]
    success = tiny_policy.expected_success(model, *tiny_policy.encode(tokenizer, episodes, tools))
    assert success == pytest.approx(tiny_policy.read_manifest(tiny_policy.SHIPPED)["expected_success"], abs=0.1)


def test_it_is_copied_and_built_only_on_demand(tiny_policy, monkeypatch, tmp_path):
    def write_policy(folder, seed, settings):
        raise InterruptedError("built")

    monkeypatch.setattr(tiny_policy, "write_policy", write_policy)
    folder = tiny_policy.build_tiny_policy(tmp_path / "policy")
    assert (folder / "model.safetensors").read_bytes() == (tiny_policy.SHIPPED / "model.safetensors").read_bytes()
    assert tiny_policy.is_cached(folder, 0)
    for options in ({"seed": 1}, {"from_scratch": True}):
        with pytest.raises(InterruptedError):
            tiny_policy.build_tiny_policy(folder, **options)
    assert tiny_policy.is_cached(folder, 0)  # a build that fails replaces nothing


# ----------------------------------------------------------------------------------------------------
# Cache


@pytest.fixture
def none_shipped(tiny_policy, monkeypatch, tmp_path):
    monkeypatch.setattr(tiny_policy, "SHIPPED", tmp_path / "shipped")


@pytest.fixture
def fake_build(tiny_policy, none_shipped, monkeypatch):
    """Replaces the build by one that writes two files, and counts."""
    seeds = []

    def write_policy(folder, seed, settings):
        seeds.append(seed)
        (folder / "config.json").write_text(str(seed))
        manifest = {"fingerprint": tiny_policy.fingerprint(seed, settings), "files": ["config.json"]}
        (folder / tiny_policy.MANIFEST).write_text(json.dumps(manifest))

    monkeypatch.setattr(tiny_policy, "write_policy", write_policy)
    return seeds


def test_second_build_is_free_and_another_seed_replaces(tiny_policy, fake_build, tmp_path):
    folder = tmp_path / "runs" / "policy"
    for seed in (0, 0, 1, 1):
        assert tiny_policy.build_tiny_policy(folder, seed=seed) == folder
        assert (folder / "config.json").read_text() == str(seed)
    assert fake_build == [0, 1]
    assert [path.name for path in folder.parent.iterdir()] == ["policy"]  # nothing left aside


def test_damaged_policy_is_rebuilt(tiny_policy, fake_build, tmp_path):
    folder = tiny_policy.build_tiny_policy(tmp_path / "policy")
    (folder / "config.json").unlink()
    tiny_policy.build_tiny_policy(folder)
    assert fake_build == [0, 0]


def test_failed_build_leaves_nothing(tiny_policy, none_shipped, monkeypatch, tmp_path):
    def write_policy(folder, seed, settings):
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_policy, "write_policy", write_policy)
    with pytest.raises(KeyboardInterrupt):
        tiny_policy.build_tiny_policy(tmp_path / "policy")
    assert not list(tmp_path.iterdir())


def test_foreign_folder_is_refused_and_untouched(tiny_policy, fake_build, tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(FileExistsError, match="not a tiny policy"):
        tiny_policy.build_tiny_policy(tmp_path)
    assert fake_build == [] and (tmp_path / "precious.txt").read_text() == "x"


def test_losing_a_race_to_the_same_build_is_fine(tiny_policy, fake_build, monkeypatch, tmp_path):
    folder = tmp_path / "policy"

    def publish(staging, target):
        shutil.copytree(staging, target)  # the other process, a moment earlier
        raise OSError("Directory not empty")

    monkeypatch.setattr(tiny_policy, "publish", publish)
    assert tiny_policy.build_tiny_policy(folder) == folder
    assert tiny_policy.is_cached(folder, 0)


def test_fingerprint_depends_on_seed_and_settings(tiny_policy):
    other = replace(tiny_policy.SETTINGS, num_steps=tiny_policy.SETTINGS.num_steps + 1)
    assert tiny_policy.fingerprint(0) == tiny_policy.fingerprint(0)
    assert len({tiny_policy.fingerprint(0), tiny_policy.fingerprint(1), tiny_policy.fingerprint(0, other)}) == 3


def test_cached_policy_needs_no_torch(tiny_policy, fake_build, tmp_path):
    folder = tiny_policy.build_tiny_policy(tmp_path / "policy")
    script = (
        f"import runpy, sys; m = runpy.run_path({tiny_policy.__file__!r}); "
        f"m['build_tiny_policy']({str(folder)!r}); "
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_heavy_imports_are_inside_functions(tiny_policy):
    tree = ast.parse(Path(tiny_policy.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not {"torch", "transformers", "tokenizers", "tqdm.auto"} & names
