"""What is wrong with a request's body is said in the request's own terms."""

import pytest

from emberkv.errors import RequestError
from emberkv.serving.api.responses_schema import ResponsesRequest
from emberkv.serving.api.validation import parse_body


def test_a_field_of_several_types_is_named_as_the_request_has_it() -> None:
    with pytest.raises(RequestError) as refused:
        parse_body(ResponsesRequest, b'{"model": "m", "input": 5}')
    assert str(refused.value) == "input is 5: input should be a valid string; input is 5: input should be a valid array"
    assert refused.value.param == "input"
