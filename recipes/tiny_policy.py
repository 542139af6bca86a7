# Copyright 2026 The trl-gym Authors
# SPDX-License-Identifier: Apache-2.0
"""Build a small tool-calling policy on this machine, so that the quickstart needs no model hub.

    python recipes/tiny_policy.py --output_dir runs/tiny_policy

That of seed 0, which the quickstart uses, was made by this script and comes with the package: it is copied. With
other seeds, or with `--from_scratch`, it is trained, which takes about 25 CPU seconds. It is an ordinary model folder
(Qwen3 architecture, 0.45 M parameters, float32) that transformers and vLLM load. It is warm-started on synthetic
demonstrations of the calculator environment (`recipes/environments/calculator`) that are wrong in two systematic ways,
so it solves some but far from all episodes and reinforcement learning has something to correct:

* asked to subtract, it usually adds;
* it often gives up without calling a tool.

Both are decisions of one token, while copying numbers is demonstrated cleanly: a sampled reward then points at the
decision, and GRPO corrects it within about 20 steps of 128 rollouts.

Contract with the policy server: the demonstrations are rendered by the policy's own chat template from the same
messages and tools that NeMo Gym sends to the server, so the warm start sees the token ids of a real rollout.
Contract with the data: no demonstration uses a held-out operand pair (`generate_data.is_held_out`).

torch and transformers are imported only when a policy is really built; a cached one is returned at once.

After a change of what is built, `python recipes/tiny_policy.py --output_dir recipes/small_policy --from_scratch` makes
the one that the package holds.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import inspect
import json
import random
import re
import shutil
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

CALCULATOR_DATA = Path(__file__).resolve().parent / "environments" / "calculator" / "generate_data.py"
SHIPPED = Path(__file__).resolve().parent / "small_policy"
MANIFEST = "trl_gym_tiny_policy.json"

# ChatML with Hermes-style tool calls (vLLM's tool-call parser `hermes`). Every message is rendered from itself alone
# and ends in `<|im_end|>\n`, so a conversation is a prefix of each of its continuations. A tool is rendered from its
# name, description and parameters in this order, whatever else a server adds to its copy of the schema.
CHAT_TEMPLATE = r"""
{%- set system = messages[0] if messages and messages[0].role in ('system', 'developer') else none %}
{%- if system or tools %}
    {{- '<|im_start|>system\n' }}
    {%- if system %}{{- system.content or '' }}{%- endif %}
    {%- if tools %}
        {{- ('\n\n' if system else '') + '<tools>' }}
        {%- for tool in tools %}
            {%- set function = tool.function or tool %}
            {{- '\n{"name": ' + function.name | tojson }}
            {%- if function.description %}{{- ', "description": ' + function.description | tojson }}{%- endif %}
            {%- if function.parameters %}{{- ', "parameters": ' + function.parameters | tojson }}{%- endif %}
            {{- '}' }}
        {%- endfor %}
        {{- '\n</tools>' }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {%- set arguments = function.arguments %}
            {{- ('' if loop.first else '\n') + '<tool_call>{"name": ' + function.name | tojson + ', "arguments": ' }}
            {{- arguments if arguments is string and arguments else (arguments or {}) | tojson }}
            {{- '}</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>' + (message.content or '') + '</tool_response><|im_end|>\n' }}
    {%- elif not (loop.first and system) %}
        {{- '<|im_start|>' + ('system' if message.role == 'developer' else message.role) + '\n' }}
        {{- (message.content or '') + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Not special in the tokenizer's sense: a server that decodes with `skip_special_tokens` must keep them, or its
# tool-call parser has nothing to parse.
TOOL_MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
GIVE_UP = "I do not know."


@dataclass(frozen=True)
class Settings:
    """Everything but the seed that decides what is built. Rates are probabilities per demonstration."""

    # Two wide heads instead of more: on a CPU the cost of this size is element-wise work per head, not matmuls.
    # vLLM's CPU backend serves a head size of 64.
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 2
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 64
    max_position_embeddings: int = 1024  # tokens
    rope_theta: float = 10_000.0

    vocab_size: int = 512  # upper bound; the domain's merges run out before
    max_token_length: int = 128  # characters; long, so that a tool schema is three tokens

    ask_subtract_rate: float = 0.6  # above one half, because negative results are rare and must be learned too
    give_up_rate: float = 0.28
    add_instead_of_subtract_rate: float = 0.60
    subtract_instead_of_add_rate: float = 0.03

    num_steps: int = 200  # optimizer steps of the warm start
    batch_size: int = 32  # demonstrations per step
    num_extra_steps: int = 50  # per extension, when the policy is not good enough yet
    max_extensions: int = 3
    extra_lr_factor: float = 0.3
    min_success: float = 0.42  # expected success on training tasks that ends the warm start
    num_probe_tasks: int = 256
    muon_lr: float = 0.02  # hidden matrices
    adamw_lr: float = 3e-3  # embedding and norms
    warmup_steps: int = 20


SETTINGS = Settings()


def load_calculator_data() -> ModuleType:
    """Import the environment's `generate_data.py` by path: recipes are scripts, not a package."""
    spec = importlib.util.spec_from_file_location("trl_gym_calculator_data", CALCULATOR_DATA)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {CALCULATOR_DATA}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------------------------------
# Conversations, as the policy server receives them from NeMo Gym


def chat_tools(data: ModuleType) -> list[dict[str, Any]]:
    """The environment's tools in chat-completions form, as Gym's model server sends them."""
    keep = ("name", "description", "parameters")
    return [{"type": "function", "function": {key: tool[key] for key in keep}} for tool in data.TOOLS]


def episode(data: ModuleType, asked: str, a: int, b: int, called: str | None = None) -> list[dict[str, Any]]:
    """A whole episode: question `asked` about a and b, call of `called` (default: the right tool), result, answer."""
    called = called or asked
    answer = str(data.result(called, a, b))
    call = {"type": "function", "function": {"name": called, "arguments": {"a": a, "b": b}}}
    return [
        {"role": "user", "content": data.question(asked, a, b)},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": answer},
        {"role": "assistant", "content": answer},
    ]


def demonstrations(data: ModuleType, num: int, rng: random.Random, settings: Settings) -> list[list[dict[str, Any]]]:
    """`num` flawed episodes on training pairs."""
    pairs = data.operand_pairs(held_out=False)
    episodes = []
    for _ in range(num):
        asked = "subtract" if rng.random() < settings.ask_subtract_rate else "add"
        a, b = rng.choice(pairs)
        if rng.random() < settings.give_up_rate:
            episodes.append(
                [
                    {"role": "user", "content": data.question(asked, a, b)},
                    {"role": "assistant", "content": GIVE_UP},
                ]
            )
            continue
        wrong_tool = "add" if asked == "subtract" else "subtract"
        rate = settings.add_instead_of_subtract_rate if asked == "subtract" else settings.subtract_instead_of_add_rate
        episodes.append(episode(data, asked, a, b, called=wrong_tool if rng.random() < rate else asked))
    return episodes


# ----------------------------------------------------------------------------------------------------
# Tokenizer and model


def build_tokenizer(data: ModuleType, settings: Settings = SETTINGS) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer on rendered episodes; about 420 tokens, the same for every seed.

    Any text can be encoded, through bytes. Three boundaries are never merged across:

    * digits, so that copying a number means copying tokens one by one;
    * the end of a line, so that the generation prompt (`<|im_start|>assistant\\n`) ends on a token boundary whatever
      the policy writes next;
    * added tokens, so that a turn's ids do not depend on its neighbours.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.utils.chat_template_utils import render_jinja_template

    rng = random.Random(0)
    tasks = [(tool, *pair) for tool in data.OPERATORS for pair in rng.sample(data.operand_pairs(held_out=False), 200)]
    corpus = [episode(data, *task) for task in tasks]
    corpus += [[{"role": "assistant", "content": GIVE_UP}]] * 100
    texts, _ = render_jinja_template(corpus, tools=chat_tools(data), chat_template=CHAT_TEMPLATE)
    added = re.compile("|".join(map(re.escape, (PAD, TURN_START, TURN_END, *TOOL_MARKERS))))

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), behavior="merged_with_previous"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),  # no regex: merges may span words
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[PAD, TURN_START, TURN_END],
        max_token_length=settings.max_token_length,
        show_progress=False,
    )
    bpe.train_from_iterator((part for text in texts for part in added.split(text) if part), trainer)
    bpe.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in TOOL_MARKERS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=PAD,
        model_max_length=settings.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, settings: Settings = SETTINGS) -> Qwen3ForCausalLM:
    """A freshly initialized model in float32; draws from torch's global generator."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 8) * 8,  # rounded up to a multiple of 8
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    model = Qwen3ForCausalLM(config).to(torch.float32)
    model.generation_config.update(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def encode(
    tokenizer: PreTrainedTokenizerFast, episodes: list[list[dict[str, Any]]], tools: list[dict[str, Any]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `[N, T]` (padded right) and a boolean mask `[N, T]` of what the policy wrote, end of turn included."""
    import torch

    texts = tokenizer.apply_chat_template(episodes, tools=tools, tokenize=False)
    rows = tokenizer(texts, add_special_tokens=False).input_ids
    header = tokenizer(f"{TURN_START}assistant\n", add_special_tokens=False).input_ids
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), tokenizer.pad_token_id, dtype=torch.long)
    written = torch.zeros((len(rows), length), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        position = 0
        while position < len(row):
            if row[position : position + len(header)] == header:
                start = position + len(header)
                position = row.index(tokenizer.eos_token_id, start) + 1
                written[index, start:position] = True
            else:
                position += 1
    return ids, written


# ----------------------------------------------------------------------------------------------------
# Warm start


def written_logprobs(model: Qwen3ForCausalLM, ids: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """Log-probability of every written token, row by row, as one vector `[written.sum()]`."""
    import torch.nn.functional as F

    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # [N, T - 1, hidden]
    selected = written[:, 1:]
    return -F.cross_entropy(model.lm_head(hidden[selected]), ids[:, 1:][selected], reduction="none")


def expected_success(model: Qwen3ForCausalLM, ids: torch.Tensor, written: torch.Tensor) -> float:
    """Mean probability of sampling exactly these right episodes at temperature 1: the success rate, without its noise.

    (Sampling could spell a right episode with other tokens too; that never carries weight in practice.)
    """
    import torch

    with torch.no_grad():
        logprobs = torch.zeros(written.shape)
        logprobs[written] = written_logprobs(model, ids, written)
    return logprobs.sum(dim=1).exp().mean().item()


def warm_start(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    data: ModuleType,
    seed: int,
    settings: Settings = SETTINGS,
) -> tuple[float, list[float]]:
    """Train on flawed demonstrations until the policy is good enough.

    Returns:
        Its expected success on training tasks, and the loss of every step.

    The demonstrations bound success from above, at (1 - 0.28) * (0.97 + 0.40) / 2 = 0.49, and the extensions from
    below: every seed lands in between.
    """
    import torch
    from tqdm.auto import tqdm

    rng, tools = random.Random(seed), chat_tools(data)
    demos = demonstrations(data, settings.num_steps * settings.batch_size, rng, settings)
    ids, written = encode(tokenizer, demos, tools)
    pairs = rng.sample(data.operand_pairs(held_out=False), settings.num_probe_tasks)
    tasks = [(rng.choice(tuple(data.OPERATORS)), *pair) for pair in pairs]
    probe = encode(tokenizer, [episode(data, *task) for task in tasks], tools)

    # Muon needs about half the steps of AdamW here. It is made for matrices between hidden layers only.
    is_hidden = {name: p.ndim == 2 and "embed_tokens" not in name for name, p in model.named_parameters()}
    hidden = [p for name, p in model.named_parameters() if is_hidden[name]]
    others = [p for name, p in model.named_parameters() if not is_hidden[name]]
    optimizers = [
        torch.optim.Muon(hidden, lr=settings.muon_lr, momentum=0.9, weight_decay=0.0),
        torch.optim.AdamW(others, lr=settings.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peak_lrs = [settings.muon_lr, settings.adamw_lr]

    model.train()
    success, start, losses = 0.0, 0, []
    rounds = [(settings.num_steps, 1.0)] + [
        (settings.num_extra_steps, settings.extra_lr_factor)
    ] * settings.max_extensions
    with tqdm(total=settings.num_steps, desc="Warm start", unit="step", disable=None) as progress:
        for num_steps, round_factor in rounds:
            for step in range(num_steps):
                # Linear warm-up and decay. The decay sharpens the copying, which GRPO then does not break.
                factor = round_factor * min(1.0, (step + 1) / settings.warmup_steps) * max(0.05, 1 - step / num_steps)
                for optimizer, peak_lr in zip(optimizers, peak_lrs, strict=True):
                    for group in optimizer.param_groups:
                        group["lr"] = peak_lr * factor
                    optimizer.zero_grad()
                batch = slice(start, start + settings.batch_size)
                start = (start + settings.batch_size) % len(demos)
                loss = -written_logprobs(model, ids[batch], written[batch]).mean()
                losses.append(loss.item())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                progress.update()
            success = expected_success(model, *probe)
            if success >= settings.min_success:
                break
    model.eval()
    return success, losses


# ----------------------------------------------------------------------------------------------------
# The folder


def fingerprint(seed: int, settings: Settings = SETTINGS) -> str:
    """Identifies what a build would produce: settings, seed, template, demonstrations, the code that trains on them.

    It depends on nothing else in this file or in the data's: the policy that the package holds stays what it is.
    """
    data = load_calculator_data()
    demos = demonstrations(data, settings.num_steps * settings.batch_size, random.Random(seed), settings)
    code = [build_tokenizer, build_model, encode, written_logprobs, expected_success, warm_start]
    decides = (seed, asdict(settings), CHAT_TEMPLATE, chat_tools(data), demos, [*map(inspect.getsource, code)])
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished policy, or None: the folder is missing, foreign, or parts of it were removed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    return manifest if files and all((folder / name).is_file() for name in files) else None


def is_cached(folder: Path, seed: int, settings: Settings = SETTINGS) -> bool:
    """Whether `folder` already holds what a build would produce."""
    manifest = read_manifest(folder)
    return manifest is not None and manifest.get("fingerprint") == fingerprint(seed, settings)


def publish(staging: Path, folder: Path) -> None:
    """Move a finished build to its place by renaming, so that a reader sees the old policy, none, or the new one."""
    if folder.exists():
        old = staging.with_name(f"{staging.name}.old")
        folder.rename(old)
        shutil.rmtree(old)
    staging.rename(folder)


def write_policy(folder: Path, seed: int, settings: Settings) -> dict[str, Any]:
    """Build, and write model, tokenizer and manifest into `folder`; return the manifest."""
    import torch
    from transformers.utils import logging as transformers_logging

    started = time.perf_counter()
    data = load_calculator_data()
    tokenizer = build_tokenizer(data, settings)
    with torch.random.fork_rng(devices=[]):  # leave the caller's random state alone
        torch.manual_seed(seed)
        model = build_model(tokenizer, settings)
        # One thread: a second one gains a third on an idle machine, and loses far more on a busy one, where each of
        # thousands of small operations waits for the slower thread. Flushing denormals avoids steps that are several
        # times slower, because of vanishing softmax tails.
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        try:
            success, losses = warm_start(model, tokenizer, data, seed, settings)
        finally:
            torch.set_flush_denormal(False)
            torch.set_num_threads(num_threads)

    had_progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # a bar for one file of 2 MB
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if had_progress_bar:
            transformers_logging.enable_progress_bar()
    manifest = {
        "fingerprint": fingerprint(seed, settings),
        "seed": seed,
        "num_parameters": model.num_parameters(),
        "expected_success": round(success, 4),
        "first_losses": losses[:2],  # a rebuild must begin like this
        "build_s": round(time.perf_counter() - started, 1),
        "files": sorted(path.name for path in folder.iterdir()),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def copy_policy(folder: Path) -> None:
    """Copy the policy that comes with the package into `folder`, file by file: modes are those of new files."""
    for path in SHIPPED.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


def build_tiny_policy(output_dir: str | Path, *, seed: int = 0, from_scratch: bool = False) -> Path:
    """Build the policy, copy it if the package holds it, or return at once if `output_dir` does.

    Args:
        output_dir: Model folder. Replaced if it holds another tiny policy (other seed or version of this file); any
            other non-empty folder is refused.
        seed: Initial weights and demonstrations. The same seed gives the same policy on the same machine.
        from_scratch: Build it whoever has it.

    Returns:
        `output_dir` as a path, ready for `from_pretrained` and for vLLM's `--model`.
    """
    folder = Path(output_dir).absolute()
    if is_cached(folder, seed) and not from_scratch:
        return Path(output_dir)
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"`{output_dir}` exists and is not a tiny policy; give another `output_dir`")

    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    staging.mkdir()
    try:
        if is_cached(SHIPPED, seed) and not from_scratch:
            copy_policy(staging)
        else:
            write_policy(staging, seed, SETTINGS)
        try:
            publish(staging, folder)
        except OSError:
            if not is_cached(folder, seed):  # otherwise another process finished the same build first
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Path(output_dir)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build the small policy of the quickstart.")
    parser.add_argument("--output_dir", required=True, help="model folder to write")
    parser.add_argument("--seed", type=int, default=0, help="initial weights and demonstrations (default 0)")
    parser.add_argument("--from_scratch", action="store_true", help="train it even where it is at hand")
    args = parser.parse_args(argv)
    try:
        folder = build_tiny_policy(args.output_dir, seed=args.seed, from_scratch=args.from_scratch)
    except FileExistsError as error:
        sys.exit(f"error: {error}")
    manifest = read_manifest(folder) or {}
    print(
        f"{folder}: {manifest.get('num_parameters'):,} parameters, built in {manifest.get('build_s')} s, "
        f"solves {manifest.get('expected_success'):.0%} of the training tasks"
    )


if __name__ == "__main__":
    main()
