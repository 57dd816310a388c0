"""What fits a request, and the one sentence about what does not."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from logitlab.errors import InputError
from logitlab.server.requests import Prompt, parse, shortened, target_of

READ: dict[str, Any] = {"do": "read", "model": "m", "prompt": {"text": "x"}}
STEER: dict[str, Any] = READ | {"do": "steer", "vector": {"token": "a"}, "site": "1.resid_post"}
PATCH: dict[str, Any] = READ | {
    "do": "patch",
    "source": {"text": "y"},
    "site": "s",
    "position": 0,
    "source_position": 0,
}


def refused(body: Any, *limit: int) -> str:
    with pytest.raises(InputError) as caught:
        parse(body if isinstance(body, bytes) else json.dumps(body).encode(), *limit)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_defaults() -> None:
    assert parse(json.dumps(READ).encode()).model_dump(exclude_none=True) == READ | {
        "lens": "logit",
        "sites": ["resid"],
        "statistics": ["entropy", "kl"],
        "targets": [],
        "top_k": 5,
        "precision": "exact",
    }
    steer: Any = parse(json.dumps(STEER).encode())
    assert (steer.strength, steer.positions, steer.new_tokens) == (1.0, "all", 0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON: EOF while parsing a value at line 1 column 0"),
        (b"{", "the body is not JSON: EOF while parsing an object at line 1 column 1"),
        (b'{"do": "read",}', "the body is not JSON: trailing comma at line 1 column 15"),
        (b"\xff\xfe", "the body is not JSON: "),
        (b'{"do": NaN}', "'do' must be one of load, read, compare, patch, patch_all, steer and generate"),
        (b"[" * 100_000, "the body is not JSON: recursion limit exceeded"),
        (b'{"a":' * 100_000, "the body is not JSON: recursion limit exceeded"),
        (b"[]", "the body does not fit: "),
        (b"3", "the body does not fit: "),
        (b"null", "the body does not fit: "),
        ({}, "'do' must be one of load, read, compare, patch, patch_all, steer and generate"),
        ({"do": "run"}, "'do' must be one of"),
        ({"do": ["read"]}, "'do' must be one of"),
        ({"do": "read"}, "'model' is missing"),
        ({"do": "load", "model": ""}, "'model': string should have at least 1 character"),
        ({"do": "load", "model": 3}, "'model': input should be a valid string"),
        ({"do": "load", "model": "m", "path": "/etc"}, "'path' is not known in this request"),
        (READ | {"<script>": 1}, "'<script>' is not known in this request"),
        (READ | {"prompt": "x"}, "'prompt': input should be an object"),
        (READ | {"prompt": {}}, "'prompt': give a text, a chat or images"),
        (READ | {"prompt": {"text": "x", "chat": []}}, "'prompt.chat': list should have at least 1 item"),
        (READ | {"prompt": {"chat": [{"role": "root", "content": ""}]}}, "'prompt.chat.0.role': input should be "),
        (
            READ | {"prompt": {"chat": [{"role": "user", "content": [{"type": "image", "path": "/etc/x.png"}]}]}},
            "'prompt.chat.0.content': input should be a valid string",
        ),
        (
            READ | {"prompt": {"text": "x", "chat": [{"role": "user", "content": "y"}]}},
            "'prompt': give a text or a chat, not both; pictures go with a text",
        ),
        (READ | {"prompt": {"images": ["/etc/passwd"]}}, "'prompt.images.0': give a PNG, JPEG or WebP picture as"),
        (READ | {"prompt": {"images": ["https://evil.example/a.png"]}}, "'prompt.images.0': give a PNG"),
        (READ | {"prompt": {"images": ["file:///etc/a.png"]}}, "'prompt.images.0': give a PNG"),
        (READ | {"prompt": {"images": ["data:image/svg+xml;base64,AAAA"]}}, "'prompt.images.0': give a PNG"),
        (READ | {"prompt": {"images": ["data:image/png;base64,AA AA"]}}, "'prompt.images.0': give a PNG"),
        (READ | {"prompt": {"text": "x" * 3_000_000}}, "the request has 3,000,052 bytes without its pictures; this "),
        (READ | {"sites": ["x"] * 4097}, "the body does not fit: it has more than 4,096 values"),
        (READ | {"sites": list(range(60))}, "'sites.0': input should be a valid string"),
        (READ | {f"x{i}": 0 for i in range(65)}, "the body does not fit: 65 of its values are not known or not right"),
        (READ | {"top_k": 0}, "'top_k': input should be greater than or equal to 1"),
        (READ | {"top_k": 21}, "'top_k': input should be less than or equal to 20"),
        (READ | {"top_k": 1.5}, "'top_k': input should be a valid integer"),
        (READ | {"top_k": True}, "'top_k': input should be a valid integer"),
        (READ | {"top_k": "5"}, "'top_k': input should be a valid integer"),
        (READ | {"top_k": 10**400}, "'top_k': input should be less than or equal to 20"),
        (READ | {"sites": []}, "'sites': list should have at least 1 item"),
        (READ | {"sites": ["x"] * 65}, "'sites': list should have at most 64 items"),
        (READ | {"sites": "resid"}, "'sites': input should be a valid array"),
        (READ | {"targets": ["x"] * 9}, "'targets': list should have at most 8 items"),
        (READ | {"targets": [""]}, "'targets.0': string should have at least 1 character"),
        (READ | {"statistics": ["loss"]}, "'statistics.0': input should be 'entropy' or 'kl'"),
        (READ | {"precision": "half"}, "'precision': input should be 'exact', 'screened' or 'auto'"),
        (STEER | {"vector": {}}, "'vector': give one of prompts, token and file"),
        (STEER | {"vector": {"token": "a", "file": "b"}}, "'vector': give one of prompts, token and file"),
        (STEER | {"vector": {"prompts": ["a"]}}, "'vector.prompts': list should have at least 2 items"),
        (STEER | {"strength": 1e9}, "'strength': input should be less than or equal to 1000000"),
        (STEER | {"positions": "first"}, "'positions': input should be 'all', 'last' or 'each'"),
        (READ | {"do": "compare"}, "'other' is missing"),
        (READ | {"do": "compare", "other": {}}, "'other': give one of prompt, lens and model"),
        (PATCH | {"position": 0.5}, "'position': input should be a valid integer"),
        (READ | {"do": "generate", "new_tokens": 0}, "'new_tokens': input should be greater than or equal to 1"),
        (READ | {"do": "generate", "temperature": 0}, "'temperature': input should be greater than 0"),
        (READ | {"do": "generate", "seed": -1}, "'seed': input should be greater than or equal to 0"),
        (READ | {"do": "generate", "seed": 2**63}, "'seed': input should be less than 9223372036854775808"),
    ],
)  # fmt: skip
def test_what_does_not_fit(body: Any, message: str) -> None:
    found = refused(body)
    assert found.startswith(message), found


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(text: str) -> None:
    body = json.dumps(STEER)[:-1] + f', "strength": {text}}}'
    assert refused(body.encode()).startswith("'strength': ")


def test_half_characters_are_refused() -> None:
    assert refused(b'{"do": "load", "model": "\\ud800"}').startswith("the body is not JSON: ")


def test_many_unknown_fields_are_one_sentence() -> None:
    assert refused(READ | {f"x{i}": i for i in range(50)}) == "'x0' is not known in this request"
    assert refused(READ | {f"x{i}": i for i in range(50_000)}) == "the body does not fit: it has more than 4,096 values"
    assert len(refused(READ | {"y" * 100_000: 1})) < 200


def test_targets() -> None:
    assert [target_of(text) for text in (" Paris", "id:7", "ID:7", "id")] == [" Paris", 7, "ID:7", "id"]
    for bad in ("id:", "id:-1", "id:1.5", "id:٣", "id: 7", "id:" + "9" * 30):
        with pytest.raises(InputError, match="after id: comes a whole number"):
            target_of(bad)


def test_titles() -> None:
    assert Prompt(text="a\n b  c").title == "a b c"
    assert len(Prompt(text="word " * 100).title) == 80
    assert (
        Prompt.model_validate({"chat": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}).title
        == "u"
    )
    assert Prompt(images=["data:image/png;base64,AAAA"]).title == "a picture"
    assert shortened("abc", 2) == "a…"


def test_sites_are_taken_once() -> None:
    found: Any = parse(json.dumps(READ | {"sites": ["neuron", "mlp_out", "neuron", "neuron"]}).encode())
    assert found.sites == ["neuron", "mlp_out"]
    found = parse(json.dumps(READ | {"sites": ["resid"] * 64}).encode())
    assert found.sites == ["resid"]


def test_pictures_are_not_counted_as_text_and_commas_in_texts_not_as_values() -> None:
    picture = "data:image/png;base64," + "A" * 3_000_000
    found: Any = parse(json.dumps(READ | {"prompt": {"images": [picture, picture]}}).encode())
    assert found.prompt.images == [picture, picture]
    for text in ("a,b" * 100_000, '\\",' * 100_000, "[{,:}]" * 10_000):
        found = parse(json.dumps(READ | {"prompt": {"text": text}}).encode())
        assert found.prompt.text == text
    assert refused(json.dumps(READ | {"prompt": {"text": "x" * 200}}).encode(), 100).startswith("the request has 252 ")


PEAK = """
import resource, sys
from logitlab.server.requests import parse
from logitlab.errors import InputError
body = {body}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    parse(body, {limit})
except InputError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told in other units")
@pytest.mark.parametrize(
    "body",
    [
        "b'{\"do\":\"load\"' + b''.join(b',\"%x\":0' % i for i in range(1_500_000)) + b'}'",
        "b'{\"do\":\"read\",\"sites\":[' + b'1,' * 7_000_000 + b'1]}'",
        "b'\"' + bytes([92, 34]) * 8_000_000",
        "b'\"data:image/png;base64,' * 700_000",
    ],
    ids=["unknown", "numbers", "escapes", "pictures"],
)
def test_a_body_costs_little_more_than_itself(body: str) -> None:
    script = PEAK.format(body=body, limit=2**24)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kilobytes, _, message = done.stdout.partition(" ")
    assert int(kilobytes) < 200_000, message  # a million errors, each by itself, are 1.4 GB
    assert message.count("\n") == 1
