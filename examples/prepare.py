"""Make the training rows of an example from its data set's original file.

    python examples/prepare.py {gsm8k,sst2,text2sql} ORIGINAL_FILE ROWS.jsonl

E2E needs no preparation. Held-out rows come last, where a recipe's `eval_rows` takes them.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

Row = tuple[str, str]


def gsm8k(text: str) -> Iterator[Row]:
    """Questions and worked answers, without the calculator's annotations `<<48/2=24>>`."""
    for line in text.splitlines():
        row = json.loads(line)
        yield row["question"], re.sub(r"<<.*?>>", "", row["answer"])


def sst2(text: str) -> Iterator[Row]:
    """Film review sentences and the word for their label, 0 or 1."""
    for line in text.splitlines():
        sentence, label = line.split("\t")
        yield sentence, ("negative", "positive")[int(label)]


def text2sql(text: str) -> Iterator[Row]:
    """Questions with the first SQL query for each, variables filled in, `test` questions last."""
    rows: list[tuple[bool, Row]] = []
    for query in json.loads(text):
        for sentence in query["sentences"]:
            question, sql = sentence["text"], query["sql"][0]
            for name, value in sentence["variables"].items():
                question, sql = question.replace(name, value), sql.replace(name, value)
            # CITYalias0 is the data set's name for a table's first use; needless beside no other.
            for table in set(re.findall(r"\b([A-Z_]+)alias\d", sql)):
                if f"{table}alias1" not in sql:
                    sql = sql.replace(f"{table} AS {table}alias0", table)
                    sql = sql.replace(f"{table}alias0", table)
            sql = re.sub(r"\b([A-Z_]+)alias(\d)", r"\1_\2", sql)
            sql = re.sub(r"\s+([,;)])", r"\1", re.sub(r"\(\s+", "(", sql))
            rows.append((sentence["question-split"] == "test", (question, sql)))
    yield from (row for _, row in sorted(rows, key=lambda r: r[0]))


def main() -> None:
    kinds = {"gsm8k": gsm8k, "sst2": sst2, "text2sql": text2sql}
    if len(sys.argv) != 4 or sys.argv[1] not in kinds:
        sys.exit(__doc__)
    rows = list(kinds[sys.argv[1]](Path(sys.argv[2]).read_text(encoding="utf-8")))
    with Path(sys.argv[3]).open("w", encoding="utf-8") as file:
        for prompt, completion in rows:
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    print(f"{len(rows)} rows")


if __name__ == "__main__":
    main()
