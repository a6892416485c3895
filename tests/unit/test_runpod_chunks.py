"""Large answers of RunPod's /stream, read from a file chunk by chunk."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comfy_executors.clients import runpod_chunks
from comfy_executors.clients.runpod_answers import parse_stream
from comfy_executors.clients.runpod_chunks import ChunkFile

PLAIN = st.sampled_from([None, True, 12, -1.5e9, 0, "", 'a "b" \\', "ü\n漢🦊", "{[,]}:"])
NAMES = st.sampled_from(["a", "ü", "stream"])
VALUES = PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(NAMES, PLAIN)
ITEMS = st.lists(
    st.fixed_dictionaries({}, optional={"output": VALUES, "metrics": VALUES}), max_size=4
)
ANSWERS = st.fixed_dictionaries(
    {"stream": ITEMS}, optional={"status": st.sampled_from(["IN_PROGRESS", ""]), "more": VALUES}
)


@pytest.mark.parametrize("number", ["-1500000000.0", "1e9", "1.5E-3", "12", "-0.0"])
@pytest.mark.parametrize("piece", range(1, 20))
def test_a_number_is_not_cut_in_two(
    number: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runpod_chunks, "_READ_BYTES", piece)
    chunks = ChunkFile(io.BytesIO(f'{{"more":{number},"stream":[{{"output":{number}}}]}}'.encode()))
    assert tuple(chunks) == (json.loads(number),)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ANSWERS, st.booleans(), st.sampled_from([None, 1]), st.integers(1, 40), st.randoms())
def test_a_file_says_what_the_whole_answer_says(
    answer: dict[str, Any], ascii_: bool, indent: int | None, piece: int, chance: Any
) -> None:
    fields = list(answer.items())
    chance.shuffle(fields)
    text = json.dumps(dict(fields), ensure_ascii=ascii_, indent=indent)
    body = text.encode("utf-8", "replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runpod_chunks, "_READ_BYTES", piece)
        chunks = ChunkFile(io.BytesIO(body))
        expected = parse_stream(answer)
        assert (chunks.status, len(chunks)) == (expected.status, len(expected.chunks))
        for _ in range(2):
            assert tuple(chunks) == expected.chunks


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"stream": {}}', '{"stream": [1', '{"stream": []', '{"stream": [1 2]}',
        '{"status": "COMPLETED"}', "<html>", '{"stream": [{"output": "\xff"}]}', '{stream: []}',
        '{"stream": []] ',
    ],
)  # fmt: skip
def test_what_is_no_answer(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  of several kinds
        ChunkFile(io.BytesIO(text.encode("latin-1")))


def test_the_file_is_closed() -> None:
    body = io.BytesIO(b'{"stream": [{"output": 1}]}')
    chunks = ChunkFile(body)
    chunks.close()
    assert body.closed
