"""What the users of one step do: written by the command, read by the locustfile. Sends nothing.

The two are different processes, since locust patches sockets and threads of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loadtests.phase import Outcome
from loadtests.traffic import Slot

#: Users whose requests generate text.
GENERATING = ("Chat", "Completion", "Replay")
#: Users who change the server under the others' feet, one of each.
BACKGROUND = ("Uploader", "Flipper")


@dataclass(frozen=True)
class Load:
    """
    Attributes:
        models: names that chat and completions are spread over, the most popular first.
        popularity, zipf_s: how, as `traffic.choose` has them.
        classifiers: names that classification is spread over evenly.
        prompt_tokens, output_tokens: of a completion, and of each turn of a chat.
        prompt_words: of a turn, so that it has about as many tokens.
        token_ids: that completions' prompts are made of.
        max_len: the longest context in tokens; a chat forgets before it is reached.
        turns: after which a chat begins anew.
        think_seconds: mean of a user's pause between two requests.
        slots: of a replayed trace, with their arrivals.
        uploads: folders of adapters, which are uploaded in turn under names of their own.
        flips: by a name of `models`, folders that the name is pointed at in turn.
        upload_seconds, flip_seconds: between two of them.
        seed: of all that is drawn.
        outcomes: the file that a line is written to for every request.
    """

    models: Sequence[str]
    popularity: str
    outcomes: str
    zipf_s: float = 1.0
    classifiers: Sequence[str] = ()
    prompt_tokens: int = 64
    output_tokens: int = 32
    prompt_words: int = 48
    token_ids: Sequence[int] = ()
    max_len: int = 2048
    turns: int = 3
    think_seconds: float = 0.0
    slots: Sequence[Slot] = ()
    uploads: Sequence[str] = ()
    flips: Mapping[str, Sequence[str]] = field(default_factory=dict)
    upload_seconds: float = 5.0
    flip_seconds: float = 5.0
    seed: int = 0

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)))
        return path

    @classmethod
    def read(cls, path: Path) -> Load:
        fields: dict[str, Any] = json.loads(path.read_text())
        fields["slots"] = [Slot(**slot) for slot in fields["slots"]]
        return cls(**fields)


@dataclass(frozen=True)
class Told:
    """One request's outcome, and whose it was: the name of a user class."""

    user: str
    outcome: Outcome

    def line(self) -> str:
        return json.dumps({"user": self.user, **asdict(self.outcome)}) + "\n"


def read_outcomes(path: Path) -> Iterator[Told]:
    """Every line of a step's file; a last one that was cut off is left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                fields = json.loads(line)
                yield Told(fields.pop("user"), Outcome(**fields))
