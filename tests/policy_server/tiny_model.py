"""A random policy for tests: Qwen3, 0.3 M parameters, float32, its own tokenizer and a ChatML template with tools.

Random on purpose: it samples tokens that no tokenizer would produce for the decoded text, which is what the prefix
rule is about. It learns nothing; for a policy that can, see `recipes/tiny_policy.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3ForCausalLM

TURN_END = "<|im_end|>"

CHAT_TEMPLATE = r"""
{%- if tools %}
    {{- '<|im_start|>system\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

_CORPUS = [
    "What is 47 + 36? The sum of 12 and 90 is 102.",
    '<tool_call>\n{"name": "add", "arguments": {"a": 47, "b": 36}}\n</tool_call>',
    "system user assistant tool_response description parameters properties type integer required function object",
    "the answer is correct and the policy counts to five: one two three four five six seven eight nine ten",
] * 20


def build_random_policy(folder: Path, *, tie: bool = True, seed: int = 0) -> Path:
    """Write a model folder with random weights. The tokenizer does not depend on `seed`, so weights can be swapped.

    Args:
        folder: Where to write `config.json`, `model.safetensors` and the tokenizer files.
        tie: Whether the head shares the embedding's weights.
        seed: Seed of the weights.

    Returns:
        `folder`.
    """
    tokenizer = build_tokenizer()
    build_model(tokenizer, tie=tie, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def attend_otherwise(model: PreTrainedModel) -> None:
    """Let a model compute something else under an engine's attention, as code that does not take it from there may."""

    def doubled(module: Any, _: Any, output: Any) -> Any:
        return (2 * output[0], *output[1:]) if module.config._attn_implementation.startswith("paged") else output

    model.model.layers[0].self_attn.register_forward_hook(doubled)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits and merges across words, 512 tokens and the ChatML specials."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,
        show_progress=False,
    )
    bpe.train_from_iterator(_CORPUS, trainer)
    tags = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    bpe.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=TURN_END, pad_token="<|endoftext|>", model_max_length=1024
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, *, tie: bool, seed: int) -> Qwen3ForCausalLM:
    """Two layers, hidden size 128, head_dim 64 (the smallest that vLLM's CPU attention accepts)."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=tie,
        initializer_range=0.08,  # far enough from uniform that two sets of weights are easily told apart
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).to(torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model
