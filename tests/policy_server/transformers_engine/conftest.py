"""A small model that is trained by nobody, and an engine that samples from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.policy_server.tiny_model import build_model, build_tokenizer
from trl_gym.policy_server.transformers_engine.engine import Completion, Engine
from trl_gym.policy_server.transformers_engine.session import EngineOptions

MAX_MODEL_LEN = 256


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with one thread: the model is too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """In train mode, as a trainer has it."""
    return build_model(tokenizer, tie=True, seed=0).train()


@pytest.fixture
def engine_of(tokenizer: PreTrainedTokenizerBase) -> Iterator[Callable[..., Engine]]:
    """Makes engines, unparked, that are parked when the test has ended."""
    made: list[Engine] = []

    def make(model: torch.nn.Module, **options: Any) -> Engine:
        given = {"max_model_len": MAX_MODEL_LEN, "max_concurrency": 64, **options}
        engine = Engine(EngineOptions(**given), eos_token_ids=[tokenizer.eos_token_id])
        made.append(engine)
        engine.take(model)
        engine.unpark()
        return engine

    yield make
    for engine in made:
        engine.park()


@pytest.fixture
def engine(model: PreTrainedModel, engine_of: Callable[..., Engine]) -> Engine:
    return engine_of(model)


def gap(
    model: torch.nn.Module, prompt: list[int], sampled: Completion, *, temperature: float = 1.0, **autocast: Any
) -> float:
    """The greatest difference between the reported log-probabilities and those of a trainer's forward pass."""
    with torch.no_grad(), torch.autocast("cpu", enabled=bool(autocast), **autocast):
        logits = model(input_ids=torch.tensor([prompt + sampled.ids])).logits[0].float() / temperature
    logprobs = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
    ours = logprobs.gather(1, torch.tensor(sampled.ids)[:, None]).squeeze(1)
    return float((ours - torch.tensor(sampled.logprobs)).abs().max())
