"""The OpenAPI document against the running gateway: calls that it allows, and calls that it does not."""

from __future__ import annotations

from typing import Any

import schemathesis
from conftest import Stack
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from tools.shim import openapi

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]


DOCUMENT = openapi.document()
for methods in DOCUMENT["paths"].values():
    for operation in methods.values():
        # Without deadlines too short to be kept, which are 504 as they should be.
        operation["parameters"] = [one for one in operation.get("parameters", []) if one["in"] != "header"]

schema = schemathesis.openapi.from_dict(DOCUMENT)


@schema.parametrize()
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_route_does_what_the_document_says(stack: Stack, case: Any) -> None:
    case.call_and_validate(base_url=stack.url("embed", ""), checks=CHECKS)
