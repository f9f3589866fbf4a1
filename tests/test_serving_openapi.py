"""The OpenAPI document, and what schemathesis makes of it: whatever is sent, the server never fails."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
from tiny_server import Running, small_chat

from llavakit.serving.app import Settings, create_app


def test_the_document_describes_bodies_answers_and_errors():
    document = create_app(small_chat(), Settings(names=("tiny",))).openapi()
    schemas = document["components"]["schemas"]
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert schemas["ChatRequest"]["additionalProperties"] is False
    parts = schemas["ChatMessage"]["properties"]["content"]["anyOf"][0]["oneOf"][1]["items"]["discriminator"]["mapping"]
    assert set(parts) == {"text", "image_url", "video_url", "volume_url", "boxes"}
    for path, methods in document["paths"].items():
        if path.startswith("/v1/"):
            for operation in methods.values():
                assert operation["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("Answer")
                assert "422" not in operation["responses"]
    upload = document["paths"]["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]["$ref"]
    assert set(schemas[upload.rsplit("/", 1)[1]]["properties"]) == {"file", "purpose"}


@pytest.mark.slow
@pytest.mark.parametrize("keys", [(), ("secret",)])
def test_schemathesis_finds_no_failure(keys):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance  # no schema can say what a picture is

    running = Running(small_chat(), Settings(names=("tiny",), api_keys=keys, max_tokens=3, default_tokens=3))
    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    try:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json", headers=headers)
        for result in schema.get_all_operations():
            operation = result.ok()

            @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy())
            def check(case):
                if isinstance(case.body, dict) and "model" in case.body:
                    case.body["model"] = "tiny"  # otherwise nearly every request is answered with 404
                case.call_and_validate(headers=headers, excluded_checks=[positive_data_acceptance])

            check()
    finally:
        running.stop()
