"""Reading a stream of events, however it is cut and whoever wrote it."""

from __future__ import annotations

import pytest

from loadtests.phase import EventReader

STREAM = (
    b'data: {"choices":[{"index":0,"text":" one","finish_reason":null}],"usage":null}\n\n'
    b'data: {"choices": [{"text": "say \\"text\\": \\"\\" ", "index": 0}]}\n\n'
    b'data: {"choices":[{"index":0,"text":"","finish_reason":"length"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5}}\n\n'
    b"data: [DONE]\n\n"
)


@pytest.mark.parametrize("size", [1, 7, 64, len(STREAM)])
@pytest.mark.parametrize("end_of_line", [b"\n", b"\r\n"])
def test_events_with_text_are_counted_and_usage_is_read(size: int, end_of_line: bytes) -> None:
    reader, stream = EventReader(), STREAM.replace(b"\n", end_of_line)
    for i in range(0, len(stream), size):
        reader.feed(stream[i : i + size], float(i))
    assert len(reader.times) == 2
    assert reader.times == sorted(reader.times)
    assert reader.usage == {"prompt_tokens": 3, "completion_tokens": 5}


def test_a_stream_that_breaks_off_has_no_usage() -> None:
    reader = EventReader()
    reader.feed(STREAM[:100], 1.0)
    assert reader.times == [1.0]
    assert reader.usage is None
