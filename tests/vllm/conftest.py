"""One process with vLLM for all of these tests: it takes half a minute to start."""

from collections.abc import Iterator

import pytest
from support.in_vllm import Vllm


@pytest.fixture(scope="session")
def vllm() -> Iterator[Vllm]:
    process = Vllm()
    yield process
    process.close()
