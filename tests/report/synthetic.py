"""Made-up runs with everything that a real one may hold: several environments, turns, tools, failures, drift, times.

The same arguments give the same run. Tokens are the bytes of what was said, by a tokenizer that is written beside the
journal, so that what the page shows token by token can be compared with the text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from trl_gym.rollouts.journal import Journal

AGENTS = ("calculator_simple_agent", "workplace_assistant_simple_agent", "library_search_agent")
START, END = "<|im_start|>", "<|im_end|>"
_TOOLS = {"calculator": ("add", "subtract"), "workplace": ("search_mail", "create_event"), "library": ("find_books",)}
_CAUSES = (
    ("infrastructure", "POST http://127.0.0.1:43117/run: connection reset by peer", "/run"),
    ("deadline", "it took longer than its deadline of 120 s", "/run"),
    ("environment", "the server that it called: ValueError('no such calendar')", "/run"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run is made of.

    Attributes:
        steps: Optimizer steps with a training batch each; every fifth is evaluated.
        tasks: Groups per step.
        generations: Rollouts per group.
        attempts: Rollouts per task of an evaluation.
        words: About so many words of text per model call.
        calls: Most model calls of a rollout.
        seed: For everything that looks random.
    """

    steps: int = 12
    tasks: int = 9
    generations: int = 8
    attempts: int = 2
    words: int = 24
    calls: int = 3
    seed: int = 0


def write_run(folder: Path, plan: Plan | None = None) -> list[dict[str, Any]]:
    """Write a run: journal, metrics, tokenizer, the trainer's log-probabilities. Returns the journal's lines."""
    plan = plan or Plan()
    tokenizer = make_tokenizer()
    checkpoint = folder / f"checkpoint-{plan.steps}"
    checkpoint.mkdir(parents=True)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    journal = Journal(folder / "rollouts")
    records = []
    for record in _records(plan, tokenizer):
        journal.append(record)
        records.append(record)
    journal.close()
    _write_metrics(folder, plan, records)
    write_training_logprobs(folder, records, plan.seed)
    return records


def write_repeated(folder: Path, records: list[dict[str, Any]], times: int) -> int:
    """A longer run of the same rollouts, again and again at later steps, quickly. Returns the number of lines."""
    journal = Journal(folder / "rollouts")
    span = 1 + max(record["step"] for record in records)
    for repeat in range(times):
        for record in records:
            changed = {"step": record["step"] + repeat * span, "rollout_id": f"{repeat}-{record['rollout_id']}"}
            journal.append(record | changed)
    journal.close()
    return times * len(records)


def write_training_logprobs(folder: Path, records: list[dict[str, Any]], seed: int = 0) -> None:
    """The trainer's side of every rollout with tokens, a little apart from the sampling's."""
    rng = random.Random(seed + 1)
    target = folder / "training_logprobs" / "step-0.rank-0.jsonl"
    target.parent.mkdir(exist_ok=True)
    with open(target, "w") as file:
        for record in records:
            if record["completion_ids"] and record["mode"] == "train":
                values = [value + rng.random() * 10.0 ** rng.randint(-6, 0) for value in record["logprobs"]]
                file.write(json.dumps({"rollout_id": record["rollout_id"], "logprobs": values}) + "\n")


def make_tokenizer() -> Tokenizer:
    """One token per byte, and the two marks of a chat."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])
    return tokenizer


def _records(plan: Plan, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    rng = random.Random(plan.seed)
    clock = 1_795_000_000.0
    for step in range(plan.steps + 1):
        modes = (["train"] if step < plan.steps else []) + (["eval"] if step % 5 == 0 or step == plan.steps else [])
        for mode in modes:
            for group in range(plan.tasks):
                for member in range(plan.generations if mode == "train" else plan.attempts):
                    one = _Rollout(rng, plan, step, mode, group, member)
                    clock += rng.random() / 4
                    yield from one.attempts(tokenizer, clock)


class _Rollout:
    def __init__(self, rng: random.Random, plan: Plan, step: int, mode: str, group: int, member: int) -> None:
        self.rng, self.plan = rng, plan
        self.step, self.mode, self.group, self.member = step, mode, group, member
        self.agent = AGENTS[group % len(AGENTS)]
        self.kind = self.agent.split("_")[0]
        self.skill = 0.25 + 0.7 * step / max(1, plan.steps) - 0.08 * (group % len(AGENTS))

    def attempts(self, tokenizer: Tokenizer, clock: float) -> Iterator[dict[str, Any]]:
        """One line, or several where it was tried again."""
        attempt = 0
        while self.rng.random() < 0.03:
            kind, text, where = self.rng.choice(_CAUSES)
            retried = kind == "infrastructure" and attempt < 2
            failure = {"kind": kind, "text": f"{self.agent} → {text}", "where": f"{self.agent} {where}"}
            yield self._base(attempt, clock) | {"failure": failure, "retried": retried}
            if not retried:
                return
            attempt += 1
        yield self._base(attempt, clock) | self._answered(tokenizer)

    def _base(self, attempt: int, clock: float) -> dict[str, Any]:
        row = {
            "responses_create_params": {
                "input": [
                    {"role": "system", "content": f"You are a careful {self.kind} assistant. Use tools."},
                    {"role": "user", "content": self.question()},
                ],
                "tools": [{"type": "function", "name": name, "parameters": {}} for name in _TOOLS[self.kind]],
                "temperature": 1.0,
            },
            "expected_answer": str(self.group * 7),
        }
        name = f"{self.mode}{self.step}-b0-g{self.group}-m{self.member}-a{attempt}"
        return {
            "step": self.step + (self.mode == "train"),
            "version": self.step,
            "mode": self.mode,
            "task_index": self.group,
            "task_hash": f"{self.group:016x}",
            "group": self.group,
            "member": self.member,
            "rollout_id": f"5a17c0de-{name}",
            "attempt": attempt,
            "agent": self.agent,
            "weight_versions": [str(self.step)],
            "reward": None,
            "reward_components": {},
            "failure": None,
            "drift": None,
            "finish_reason": None,
            "prompt_ids": [],
            "completion_ids": [],
            "env_mask": [],
            "logprobs": [],
            "turn_ends": [],
            "turns": [],
            "seconds": round(2 + clock % 7, 4),
            "row": row,
            "response": None,
            "verify": {},
            "retried": False,
            "run": "5a17c0de",
            "weights": f"w{self.step}",
            "time": clock,
        }

    def question(self) -> str:
        asked = {
            "calculator": f"What is {self.group * 7} + {self.step * 3}?",
            "workplace": f"Move my meeting with Zoë Krüger on day {self.group + 1} to the afternoon and tell her why.",
            "library": f"Which novels of the {15 + self.group}th century are on shelf {self.step}? Two. 图书馆 📚",
        }
        return asked[self.kind]

    def _answered(self, tokenizer: Tokenizer) -> dict[str, Any]:
        rng = self.rng
        good = rng.random() < self.skill
        reward = float(good) if self.kind != "workplace" else round(min(1.0, max(0.0, rng.gauss(self.skill, 0.2))), 3)
        said, turns, ids, mask, logprobs, ends = [], [], [], [], [], []
        prompt = self._encode(tokenizer, "system", "Use tools.") + self._encode(tokenizer, "user", self.question())
        num_calls = rng.randint(1, self.plan.calls)
        for call in range(num_calls):
            last = call == num_calls - 1
            text = self._speech(last, reward)
            new = tokenizer.encode(text + END).ids
            turns.append(self._model_turn(len(prompt) + len(ids), len(new)))
            handle = [-1 - call]
            bundle = {"prompt_token_ids": handle, "generation_token_ids": handle, "generation_log_probs": [0.0]}
            ids, mask = ids + new, mask + [1] * len(new)
            logprobs += [-rng.random() * 10.0 ** rng.randint(-3, 1) for _ in new]
            ends.append(len(ids))
            if last:
                said.append({"type": "message", "role": "assistant", "content": [{"text": text}]} | bundle)
                break
            name = rng.choice(_TOOLS[self.kind])
            result = '{"error": "not found"}' if rng.random() < 0.15 else json.dumps({"found": rng.randint(0, 99)})
            arguments = json.dumps({"query": text[:40], "limit": rng.randint(1, 9)})
            said.append(
                {"type": "function_call", "name": name, "arguments": arguments, "call_id": f"c{call}"} | bundle
            )
            said.append({"type": "function_call_output", "call_id": f"c{call}", "output": result})
            turns.append({"kind": "tool", "name": name, "seconds": None, "error": None})
            back = self._encode(tokenizer, "tool", result)
            ids, mask, logprobs = ids + back, mask + [0] * len(back), logprobs + [0.0] * len(back)
        is_cut = rng.random() < 0.04
        return {
            "reward": reward,
            "success": float(good),
            "finish_reason": "max_output_tokens" if is_cut else "stop",
            "prompt_ids": prompt,
            "completion_ids": ids,
            "env_mask": mask,
            "logprobs": logprobs,
            "turn_ends": ends,
            "turns": turns,
            "response": {"output": said},
            "verify": {"reward": reward, "success": float(good)},
            "reward_components": {"answer": reward, "format": 1.0},
            "drift": None,
        } | (self._drifted(prompt, ids, mask, logprobs, ends) if num_calls > 1 and rng.random() < 0.05 else {})

    def _drifted(self, prompt: list[int], *sequences: list[Any]) -> dict[str, Any]:
        """The first model call alone is trained: what `gym_drift` set to `"truncate"` leaves."""
        end = sequences[-1][0]
        names = ("completion_ids", "env_mask", "logprobs")
        kept = {name: values[:end] for name, values in zip(names, sequences, strict=False)}
        return kept | {"turn_ends": [end], "drift": self._drift(len(prompt) + end // 2)}

    def _speech(self, last: bool, reward: float) -> str:
        words = [
            "the",
            "meeting",
            "moves",
            "to",
            "three",
            "because",
            "of",
            "the",
            "review",
            "so",
            "I",
            "looked",
            "at",
            "both",
            "calendars",
            "first",
        ]
        text = " ".join(self.rng.choice(words) for _ in range(self.rng.randint(4, self.plan.words)))
        return f"{text}. Answer: {reward}" if last else text

    def _model_turn(self, num_prompt: int, num_sampled: int) -> dict[str, Any]:
        rng = self.rng
        seconds = {"queue_s": rng.expovariate(8), "prefill_s": 0.02 + num_prompt / 2e4, "decode_s": num_sampled / 200}
        counts = {
            "prompt_tokens": num_prompt,
            "generation_tokens": num_sampled,
            "cached_tokens": num_prompt // 32 * 16,
        }
        rounded = {name: round(value, 6) for name, value in seconds.items()}
        return {"kind": "model", **counts, **rounded, "weight_version": str(self.step)}

    def _drift(self, position: int) -> dict[str, Any]:
        return {
            "turn": 1,
            "position": position,
            "cause": "history_rewritten",
            "seen_text": "I looked at both calendars",
            "prompt_text": "I looked at the calendar",
            "text": "the prompt of model call 1 does not start with the tokens already seen (history_rewritten)",
        }

    def _encode(self, tokenizer: Tokenizer, role: str, text: str) -> list[int]:
        return tokenizer.encode(f"{START}{role}\n{text}{END}\n").ids


def _write_metrics(folder: Path, plan: Plan, records: list[dict[str, Any]]) -> None:
    rng = random.Random(plan.seed + 2)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, plan.steps + 1):
            scored = [r["reward"] for r in records if r["step"] == step and r["mode"] == "train" and r["reward"]]
            line = {"step": step, "reward": sum(scored) / max(1, len(scored)), "loss": rng.gauss(0, 0.05)}
            line |= {"logprob_gap/mean": 1e-4 * rng.random(), "grad_norm": rng.random(), "entropy": 2 / (1 + step)}
            line |= {"eval_loss": 0.0, "tools/call_frequency": 0.0}  # TRL's, which mean nothing here
            line |= {f"seconds/{name}": rng.random() for name in ("rollouts", "update", "weight_sync")}
            file.write(json.dumps(line) + "\n")
