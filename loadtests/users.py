"""The locustfile: users who chat, complete, classify, replay a trace, upload and flip adapters.

`python -m loadtests.run` starts locust with it and writes what the users do to the file that
POLYPEFT_LOAD names (`loadtests.load.Load`). Besides what locust itself measures, streams fire

    TTFT    from when the request was due to its first text
    ITL     between two events with text of one answer

as request types of their own, so that they stand in locust's statistics and reports.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Pool
from locust import FastHttpUser, events, task
from locust.exception import StopUser
from locust.runners import STATE_STOPPING
from urllib3.filepost import encode_multipart_formdata

from clients.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from clients.client import API_KEY_VARIABLE
from clients.errors import ClientError
from clients.events import EventReader
from clients.retry_after import seconds_of
from loadtests.load import Load, Told
from loadtests.phase import Outcome
from loadtests.traffic import choose

#: The file of the load, as an environment variable, since locust reads the flags.
LOAD_VARIABLE = "POLYPEFT_LOAD"

_LOAD = Load.read(Path(os.environ[LOAD_VARIABLE]))
_WORDS = (Path(__file__).parent / "words.txt").read_text().split()
_KEY = os.environ.get(API_KEY_VARIABLE)

#: Models that are drawn at a time.
_DRAWN = 256
#: Longest wait that a refusal may ask for, in seconds.
_MAX_WAIT = 30.0
#: Uploaded adapters that are kept at a time.
_KEPT_UPLOADS = 2
#: Tokens of a turn that are not its text, at most; a chat template's.
_TURN_TOKENS = 24

_numbers = itertools.count()


class _Outcomes:
    """The file of outcomes, one for all users."""

    def __init__(self) -> None:
        self._file = Path(_LOAD.outcomes).open("w", encoding="utf-8")  # noqa: SIM115

    def add(self, told: Told) -> None:
        self._file.write(told.line())

    def close(self, **_: Any) -> None:
        self._file.close()


_outcomes = _Outcomes()
events.quit.add_listener(_outcomes.close)


class ApiUser(FastHttpUser):
    """Sends requests and tells of their outcomes. Numbered, each with its own draws."""

    abstract = True
    network_timeout = 600.0
    default_headers = {"Authorization": f"Bearer {_KEY}"} if _KEY else None

    def on_start(self) -> None:
        self.number = next(_numbers)
        self.rng = random.Random(f"{_LOAD.seed} {self.number}")
        self._models = self._draw_models()

    def wait_time(self) -> float:
        """Exponential, so that users do not march in step."""
        mean = _LOAD.think_seconds
        return self.rng.expovariate(1 / mean) if mean else 0.0

    def _draw_models(self) -> Iterator[str]:
        """Names by the load's popularity; `distinct` gives each user its own."""
        names = _LOAD.models
        if _LOAD.popularity == "distinct":
            yield from itertools.repeat(names[self.number % len(names)])
        while True:
            yield from (
                names[i]
                for i in choose(
                    _LOAD.popularity,
                    _DRAWN,
                    len(names),
                    num_streams=1,
                    zipf_s=_LOAD.zipf_s,
                    rng=self.rng,
                )
            )

    def model(self) -> str:
        return next(self._models)

    def words(self) -> str:
        return " ".join(self.rng.choices(_WORDS, k=_LOAD.prompt_words))

    def stream(self, path: str, body: dict[str, Any], due: float | None = None) -> str:
        """Stream one answer, greedily and of exactly the length that is asked for; its text.

        Args:
            due: when it was to be sent, by `time.perf_counter`; now, by default.
        """
        due = time.perf_counter() if due is None else due
        reader, times, failure = EventReader(), [], ""
        fields = {"temperature": 0, "ignore_eos": True, "stream": True}
        options = {"stream_options": {"include_usage": True}}
        with self.client.post(
            path, json=body | fields | options, name=path, stream=True, catch_response=True
        ) as response:
            status = _status(response)
            if status == "200":
                try:
                    while event := response.stream.readline(b"\n\n"):
                        if any(reader.feed(bytes(event))):
                            times.append(time.perf_counter())
                    reader.close()
                    status = "ok"
                except (ClientError, ConnectionError) as exc:
                    status, failure = "cut off", str(exc)
            else:
                failure = (response.text or "")[:500]
            end = time.perf_counter()
            response.request_meta["response_time"] = (end - due) * 1e3
            if status == "ok":
                response.success()
            else:
                response.failure(f"{status} {failure}"[:200])
        self._fire(path, due, times)
        num_output = reader.reply().num_completion_tokens
        self._tell(Outcome(body["model"], status, due, end, times, num_output, failure))
        self._back_off(response, status)
        return reader.text

    def ask(
        self,
        method: str,
        path: str,
        name: str,
        model: str,
        expected: Callable[[Any], bool],
        **send: Any,
    ) -> None:
        """One request that is answered whole.

        Args:
            name: in locust's statistics. model: that it is about.
            expected: whether the answer's JSON is what it should be.
        """
        due = time.perf_counter()
        with self.client.request(method, path, name=name, catch_response=True, **send) as response:
            status, failure = _status(response), ""
            end = time.perf_counter()
            if status in ("200", "201"):
                status = "ok" if expected(response.json()) else "unexpected"
            if status == "ok":
                response.success()
            else:
                failure = (response.text or "")[:500]
                response.failure(f"{status} {failure}"[:200])
        self._tell(Outcome(model, status, due, end, message=failure))
        self._back_off(response, status)

    def _tell(self, outcome: Outcome) -> None:
        _outcomes.add(Told(type(self).__name__, outcome))

    def _fire(self, name: str, due: float, times: list[float]) -> None:
        for kind, start, end in [
            *(("TTFT", due, first) for first in times[:1]),
            *(("ITL", a, b) for a, b in itertools.pairwise(times)),
        ]:
            self.environment.events.request.fire(
                request_type=kind,
                name=name,
                response_time=(end - start) * 1e3,
                response_length=0,
                exception=None,
                context={},
            )

    def _back_off(self, response: Any, status: str) -> None:
        """A refused user waits as long as it is told to, and any failed one for a moment."""
        if status == "ok":
            return
        headers = response.headers or {}
        told = seconds_of(headers.get("retry-after"))
        gevent.sleep(min(_MAX_WAIT, 0.5 if told is None else told))


def _status(response: Any) -> str:
    """The HTTP status; in a word why there is none."""
    return str(response.status_code) if response.status_code else type(response.error).__name__


class Completion(ApiUser):
    """Continues prompts of random tokens, each of its own."""

    @task
    def complete(self) -> None:
        prompt = self.rng.choices(_LOAD.token_ids, k=_LOAD.prompt_tokens)
        body = {"model": self.model(), "prompt": prompt, "max_tokens": _LOAD.output_tokens}
        self.stream("/v1/completions", body)


class Chat(ApiUser):
    """Holds conversations of some turns, each with one adapter."""

    @task
    def converse(self) -> None:
        model = self.model()
        messages: list[dict[str, str]] = []
        turn_tokens = _LOAD.prompt_tokens + _LOAD.output_tokens + 2 * _TURN_TOKENS
        for _ in range(max(1, min(_LOAD.turns, _LOAD.max_len // turn_tokens))):
            if messages and self.environment.runner.state == STATE_STOPPING:
                break
            messages.append({"role": "user", "content": self.words()})
            body = {"model": model, "messages": messages, "max_tokens": _LOAD.output_tokens}
            messages.append(
                {"role": "assistant", "content": self.stream("/v1/chat/completions", body)}
            )
            gevent.sleep(self.wait_time())


class Classify(ApiUser):
    """Asks classifiers for the class of two texts."""

    @task
    def classify(self) -> None:
        model = self.rng.choice(_LOAD.classifiers)
        body = {"model": model, "input": [self.words(), self.words()]}
        path = "/v1/classify"
        self.ask("POST", path, path, model, lambda answer: len(answer["data"]) == 2, json=body)


class Replay(ApiUser):
    """Sends a trace's requests when they are due, whatever became of those before; then ends."""

    fixed_count = 1
    concurrency = 10_000

    @task
    def replay(self) -> None:
        start, pool = time.perf_counter(), Pool()
        for slot in _LOAD.slots:
            assert slot.arrival is not None
            due = start + slot.arrival
            gevent.sleep(max(0.0, due - time.perf_counter()))
            prompt = self.rng.choices(_LOAD.token_ids, k=slot.num_prompt)
            body = {"model": self.model(), "prompt": prompt, "max_tokens": slot.num_output}
            pool.spawn(self.stream, "/v1/completions", body, due)
        pool.join()
        # Not from here, since it waits for this user's end.
        gevent.spawn(self.environment.runner.quit)
        raise StopUser


class _Changer(ApiUser):
    """Uploads adapters' folders."""

    abstract = True
    fixed_count = 1

    def upload(self, name: str, folder: str, allowed: set[str]) -> None:
        """Args: allowed: what the server may say that it did with the name."""
        parts: dict[str, str | tuple[str, bytes]] = {
            "name": name,
            "config": (CONFIG_NAME, (Path(folder) / CONFIG_NAME).read_bytes()),
            "weights": (WEIGHTS_NAME, (Path(folder) / WEIGHTS_NAME).read_bytes()),
        }
        data, kind = encode_multipart_formdata(parts)
        self.ask(
            "POST",
            "/v1/adapters",
            "/v1/adapters",
            name,
            lambda answer: answer["status"] in allowed,
            data=data,
            headers={"Content-Type": kind},
        )


def _upload_name(number: int) -> str:
    """Of no other step, whose last uploads may be there still."""
    return f"upload-{_LOAD.seed}-{number}"


class Uploader(_Changer):
    """Uploads an adapter under a new name, asks it once, and deletes the one before last."""

    def on_start(self) -> None:
        super().on_start()
        self._count = 0

    def wait_time(self) -> float:
        return _LOAD.upload_seconds

    @task
    def upload_another(self) -> None:
        name = _upload_name(self._count)
        self.upload(name, _LOAD.uploads[self._count % len(_LOAD.uploads)], {"created"})
        prompt = self.rng.choices(_LOAD.token_ids, k=_LOAD.prompt_tokens)
        self.stream("/v1/completions", {"model": name, "prompt": prompt, "max_tokens": 4})
        if self._count >= _KEPT_UPLOADS:
            self._delete(self._count - _KEPT_UPLOADS)
        self._count += 1

    def _delete(self, number: int) -> None:
        name = _upload_name(number)
        self.ask(
            "DELETE", f"/v1/adapters/{name}", "/v1/adapters/{name}", name,
            lambda answer: answer["deleted"],
        )  # fmt: skip

    def on_stop(self) -> None:
        for number in range(max(0, self._count - _KEPT_UPLOADS), self._count):
            self._delete(number)


class Flipper(_Changer):
    """Points names that others are asking for at other weights, each name in turn."""

    def on_start(self) -> None:
        super().on_start()
        self._turns = itertools.cycle(
            [
                (name, folders[i % len(folders)])
                for i in range(max(map(len, _LOAD.flips.values())))
                for name, folders in _LOAD.flips.items()
            ]
        )

    def wait_time(self) -> float:
        return _LOAD.flip_seconds

    @task
    def flip(self) -> None:
        name, folder = next(self._turns)
        self.upload(name, folder, {"updated", "unchanged"})
