"""The engines of the contract as fixtures: each test of this folder runs once per engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tests.e2e.contract import engines
from tests.e2e.contract.engines import ODD, TOOL, USER, Engine, prompt_of, said_ids, taught


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("vllm", marks=[pytest.mark.e2e, pytest.mark.shares("random")]),
        "transformers",
        "sglang",
    ],
)
def engine(request: pytest.FixtureRequest) -> Engine:
    return getattr(engines, request.param)(request)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            "mortal_vllm", id="vllm", marks=[pytest.mark.e2e, pytest.mark.shares("untied, ended at the end")]
        ),
        pytest.param("mortal_transformers", id="transformers"),
        pytest.param("mortal_sglang", id="sglang"),
    ],
)
def mortal(request: pytest.FixtureRequest) -> Engine:
    """One that may be killed."""
    return getattr(engines, request.param)(request)


@pytest.fixture(scope="module")
def in_process(random_policy: Path) -> Iterator[Engine]:
    with engines.transformers_served(random_policy) as engine:
        yield engine


@pytest.fixture(scope="module")
def in_process_to_kill(random_policy: Path) -> Iterator[Engine]:
    with engines.transformers_served(random_policy) as engine:
        yield engine


@pytest.fixture(scope="module")
def stand_in(random_policy: Path) -> Iterator[Engine]:
    with engines.sglang_stand_in(random_policy) as engine:
        yield engine


@pytest.fixture(scope="module")
def stand_in_to_kill(random_policy: Path) -> Iterator[Engine]:
    with engines.sglang_stand_in(random_policy) as engine:
        yield engine


@pytest.fixture
def push(engine: Engine) -> Iterator[Callable[[torch.nn.Module, int], None]]:
    """Pushes a model with a version; the original weights come back at the end."""
    yield engine.push
    engine.push(engine.original, 0)


@pytest.fixture(scope="module")
def tokenizer(engine: Engine) -> PreTrainedTokenizerBase:
    return engine.tokenizer()


@pytest.fixture(scope="session")
def parrot(random_policy: Path) -> PreTrainedModel:
    """A model that answers `USER` with `SAID` if it has the tool `TOOL`, in tokens that no tokenizer would choose."""
    tokenizer = AutoTokenizer.from_pretrained(random_policy)
    model = AutoModelForCausalLM.from_pretrained(random_policy)
    return taught(model, prompt_of(tokenizer, [USER], [TOOL]), said_ids(tokenizer))


@pytest.fixture(scope="session")
def odd_parrot(random_policy: Path) -> PreTrainedModel:
    """One that answers with `ODD`."""
    tokenizer = AutoTokenizer.from_pretrained(random_policy)
    model = AutoModelForCausalLM.from_pretrained(random_policy)
    return taught(model, prompt_of(tokenizer, [USER], [TOOL]), said_ids(tokenizer, ODD))


@pytest.fixture
def saying(engine: Engine, parrot: PreTrainedModel, push: Callable[[torch.nn.Module, int], None]) -> Engine:
    """The engine with the weights of `parrot`."""
    push(parrot, 7)
    return engine
