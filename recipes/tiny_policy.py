# Copyright 2026 The trl-gym Authors
# SPDX-License-Identifier: Apache-2.0
"""Build a small tool-calling policy on this machine, so that the quickstart needs no model hub.

    python recipes/tiny_policy.py --output_dir runs/tiny_policy

The result is an ordinary model folder (Qwen3 architecture, 0.55 M parameters, float32) that transformers and vLLM
load. It is warm-started on synthetic demonstrations of the calculator environment
(`recipes/environments/calculator`) that are wrong in two systematic ways, so it solves some but far from all
episodes and reinforcement learning has something to correct:

* asked to subtract, it usually adds;
* it often answers with the first operand instead of the tool's result.

Contract with the policy server: the demonstrations are rendered by the policy's own chat template from the same
messages and tools that NeMo Gym sends to the server, so the warm start sees the token ids of a real rollout.
Contract with the data: no demonstration uses a held-out operand pair (`generate_data.is_held_out`).

torch and transformers are imported only when a policy is really built; a cached one is returned at once.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
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
