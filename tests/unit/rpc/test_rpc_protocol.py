from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from syncd.errors import InvalidParams, RequestError, TimedOut, UnknownDataset
from syncd.protocol.messages import MAX_INCLUDED, NoParams, SearchParams, SearchResult
from syncd.rpc.discovery import openrpc_document
from syncd.rpc.protocol import (
    BadRequest,
    InvalidRequestError,
    Method,
    MethodNotFoundError,
    ParseError,
    Request,
    as_request_error,
    decode_params,
    decode_request,
    error_line,
    result_line,
)

SEED = 20_240_611
DEEP = 100_000
search_decoder = msgspec.json.Decoder(SearchParams)


def refused(line: bytes) -> tuple[int, Any]:
    """The code and the id of the answer to a line that is not a request."""
    request = decode_request(line)
    assert isinstance(request, BadRequest)
    answer = json.loads(error_line(request.id, request.error))
    assert answer["error"]["message"]
    assert set(answer["error"]["data"]) == {"kind", "hint"}
    return answer["error"]["code"], answer["id"]


def params_error(text: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        decode_params(search_decoder, msgspec.Raw(text))
    return caught.value


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"{",
        b'{"jsonrpc":"2.0","method":"ping","id":1} trailing',
        b'{"jsonrpc":"2.0","method":"ping","id":01}',
        b'{"jsonrpc":"2.0","method":"ping","id":NaN}',
        b'{"jsonrpc":"2.0","method":"\xff","id":1}',
        b'{"jsonrpc":"2.0","method":"ping","id":1,"params":{"a":"\xed\xa0\x80"}}',
        b'{"jsonrpc":"2.0","method":"\\ud800","id":1}',
        b"[" * DEEP,
        b'{"jsonrpc":"2.0","method":"ping","id":1,"params":' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"id":' * DEEP,
        b"\xef\xbb\xbf{}",
        b"\x00",
    ],
)
def test_a_line_that_is_not_json_is_a_parse_error_with_id_null(line: bytes) -> None:
    assert refused(line) == (-32700, None)


@pytest.mark.parametrize(
    ("line", "request_id"),
    [
        (b"[]", None),
        (b'[{"jsonrpc":"2.0","method":"ping","id":1}]', None),
        (b"1", None),
        (b'"ping"', None),
        (b"null", None),
        (b"{}", None),
        (b'{"jsonrpc":"1.0","method":"ping","id":1}', 1),
        (b'{"jsonrpc":2.0,"method":"ping","id":1}', 1),
        (b'{"method":"ping","id":"a"}', "a"),
        (b'{"jsonrpc":"2.0","id":"a"}', "a"),
        (b'{"jsonrpc":"2.0","method":7,"id":2.5}', 2.5),
        (b'{"jsonrpc":"2.0","method":"ping","id":true}', None),
        (b'{"jsonrpc":"2.0","method":"ping","id":[1]}', None),
        (b'{"jsonrpc":"2.0","method":"ping","id":{"a":1}}', None),
    ],
)
def test_json_that_is_not_a_request_is_invalid_and_carries_the_id_if_there_is_one(
    line: bytes, request_id: Any
) -> None:
    assert refused(line) == (-32600, request_id)


@pytest.mark.parametrize(
    "request_id",
    [b"1", b"-7", b"0", b'"a"', b'"\xc3\xa9"', b"1.50", b"1e400", b"9" * 5000, b"null", b'""'],
)
def test_an_answer_carries_the_very_bytes_of_the_id(request_id: bytes) -> None:
    request = decode_request(b'{"jsonrpc":"2.0","method":"ping","id": ' + request_id + b" }")
    assert isinstance(request, Request)
    assert request.id == request_id
    assert (
        result_line(request_id, "pong")
        == b'{"jsonrpc":"2.0","id":' + request_id + b',"result":"pong"}\n'
    )


def test_a_request_without_an_id_is_a_notification() -> None:
    request = decode_request(b'{"jsonrpc":"2.0","method":"ping"}')
    assert isinstance(request, Request)
    assert request.id is None


def test_the_last_of_a_repeated_member_counts() -> None:
    request = decode_request(b'{"jsonrpc":"2.0","id":1,"method":"a","method":"b","id":2}')
    assert isinstance(request, Request)
    assert (request.method, request.id) == ("b", b"2")


@pytest.mark.parametrize("text", [b"", b"null", b"{}"])
def test_params_may_be_left_out(text: bytes) -> None:
    assert decode_params(msgspec.json.Decoder(NoParams), msgspec.Raw(text)) == NoParams()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b'{"dataset":"c","vector":[1],"colour":2}', "colour"),
        (b'{"vector":[1]}', "dataset"),
        (b'{"dataset":"c","vector":[1],"k":0}', "k"),
        (b'{"dataset":"c","vector":[1],"k":1000001}', "k"),
        (b'{"dataset":"c","vector":[1],"k":true}', "k"),
        (b'{"dataset":"c","vector":[1],"k":"10"}', "k"),
        (b'{"dataset":"c","vector":[1],"k":1e400}', "k"),
        (b'{"dataset":"c","vector":[1,null]}', "vector"),
        (b'{"dataset":"c","vector":[1,"2"]}', "vector"),
        (b'{"dataset":"c","vector":[1e400]}', "vector"),
        (b'{"dataset":"c","vector":{"a":1}}', "vector"),
        (b'{"dataset":"c"}', "vector"),
        (b'{"dataset":"c","vector":[1],"key":1}', "vector"),
        (b'{"dataset":"c","vector":[1],"vectors":[[1]]}', "vector"),
        (b'{"dataset":"c","key":1.5}', "key"),
        (b'{"dataset":"c","key":1,"recall":1.5}', "recall"),
        (b'{"dataset":"c","key":1,"timeout_ms":-1}', "timeout_ms"),
        (b'{"dataset":"c","key":1,"consistency":"weak"}', "consistency"),
        (b'{"dataset":"c","key":1,"include":[' + b'"a",' * MAX_INCLUDED + b'"a"]}', "include"),
        (
            b'{"dataset":"c","key":1,"filter":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
            "nested too deeply",
        ),
        (b'["c",[1]]', "by name"),
        (b'"c"', "object"),
        (b"7", "object"),
    ],
)
def test_wrong_params_are_refused_by_name(text: bytes, named: str) -> None:
    error = params_error(text)
    assert isinstance(error, InvalidParams)
    assert named in error.message
    assert json.loads(error_line(b"1", error))["error"]["code"] == -32602


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (ParseError("x"), -32700, "parse_error"),
        (InvalidRequestError("x"), -32600, "invalid_request"),
        (MethodNotFoundError("x"), -32601, "method_not_found"),
        (InvalidParams("x"), -32602, "invalid_params"),
        (UnknownDataset("x"), -32000, "unknown_dataset"),
        (TimedOut("x"), -32000, "timeout"),
    ],
)
def test_every_error_has_a_code_a_kind_and_a_hint(
    error: RequestError, code: int, kind: str
) -> None:
    body = json.loads(error_line(b"1", error))["error"]
    assert (body["code"], body["data"]) == (code, {"kind": kind, "hint": error.hint})


def test_a_fault_of_syncds_own_is_logged_and_tells_the_client_nothing_of_its_inside() -> None:
    with capture_logs() as logs:
        error = as_request_error(RuntimeError("the password is 1234"), "search")
    body = json.loads(error_line(b"1", error))["error"]
    assert (body["code"], body["data"]["kind"]) == (-32000, "internal_error")
    assert "1234" not in json.dumps(body)
    assert logs[0]["event"] == "request_failed"
    assert isinstance(logs[0]["exc_info"], RuntimeError)


def test_an_error_whose_text_is_not_unicode_is_still_answered() -> None:
    assert json.loads(error_line(b"1", TimedOut("a \ud800 file name")))["id"] == 1


def test_no_mutation_of_a_request_raises_or_loses_its_answer() -> None:
    rng = random.Random(SEED)
    seeds = [
        b'{"jsonrpc":"2.0","method":"search","id":1,'
        b'"params":{"dataset":"c","vector":[0.5,-1e3],"k":3}}',
        b'{"jsonrpc":"2.0","method":"get","id":"\xc3\xa4",'
        b'"params":{"dataset":"c","keys":[1,"a",["b",2,null,true]]}}',
        b'{"jsonrpc":"2.0","id":-1.5e3,"method":"\\u00e9\\ud83d\\ude00","params":null}',
    ]
    for _ in range(4000):
        line = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(line) + 1)
            action = rng.random()
            if action < 0.4:
                line[at:at] = rng.choice(
                    [
                        b'"',
                        b"{",
                        b"[",
                        b"\\",
                        b"\\ud800",
                        b"\xff",
                        b"9" * 30,
                        b"null",
                        b"\x00",
                        b"]",
                    ]
                )
            elif action < 0.7:
                del line[at : at + rng.randint(1, 5)]
            else:
                line[at : at + 1] = rng.randbytes(1)
        request = decode_request(bytes(line))
        if isinstance(request, BadRequest):
            answer = error_line(request.id, request.error)
        else:
            try:
                decode_params(search_decoder, request.params)
                answer = result_line(request.id or b"null", None)
            except RequestError as error:
                answer = error_line(request.id or b"null", error)
        assert answer.count(b"\n") == 1
        assert set(json.loads(answer)) in ({"jsonrpc", "id", "result"}, {"jsonrpc", "id", "error"})


def test_discover_lists_every_method_with_its_params_and_every_error() -> None:
    methods: dict[str, Method[Any, Any]] = {
        "search": Method(SearchParams, SearchResult, lambda _: None, "Search."),
        "ping": Method(NoParams, str, lambda _: "pong", "Answer."),
    }
    document = json.loads(msgspec.json.encode(openrpc_document(methods, version="1.2.3")))
    assert document["info"] == {"title": "syncd", "version": "1.2.3"}
    assert [method["name"] for method in document["methods"]] == ["ping", "search"]
    params = {param["name"]: param for param in document["methods"][1]["params"]}
    assert set(params) == set(SearchParams.__struct_fields__)
    assert params["dataset"]["required"]
    assert not params["k"]["required"]
    assert params["k"]["schema"] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 1_000_000,
        "default": 10,
    }
    assert document["components"]["errors"]["unknown_dataset"]["code"] == -32000
    assert document["components"]["errors"]["invalid_params"]["code"] == -32602
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split('"$ref": "')[1:]}:
        _, _, section, name = reference.split("/")
        assert name in document["components"][section]
