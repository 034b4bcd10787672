"""Requests made from the OpenAPI document by schemathesis never meet an error of the server's own.

More of them against a running server: schemathesis run http://127.0.0.1:8000/openapi.json --checks not_a_server_error
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import Running
from .test_limits import get, well

schemathesis = pytest.importorskip("schemathesis")


def try_all(running: Running, examples: int) -> None:
    """So many generated requests for each operation."""
    from hypothesis import HealthCheck, given, settings

    document = json.loads(get(running, "/openapi.json")[1])
    found = 0
    for result in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = result.ok()
        found += 1
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens", 1), (int, type(None))):
                    case.body = {**case.body, "max_tokens": 5, "max_completion_tokens": None}   # quick to answer
                response = case.call(base_url=running.url, timeout=30)
                assert response.status_code < 500, (case.body, response.text)

            if mode is schemathesis.GenerationMode.POSITIVE or operation.body:
                check()
    assert found >= 7 and well(running)


def test_generated_requests_meet_no_server_error(running: Running) -> None:
    try_all(running, 15)


@pytest.mark.slow
def test_many_generated_requests_meet_no_server_error(running: Running) -> None:
    try_all(running, 500)
