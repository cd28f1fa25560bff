"""Rows that went wrong in a hundred ways, seeded: a file loads as an independent reading of it, or names file and row.

Real files, the loader, a real tokenizer; a limit for every case. `reading` and `number` are the independent reading.
"""

import contextlib
import random
import signal
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from dppo_jax.data.prompts import PromptStream, load_tokenizer
from dppo_jax.data.tasks import load_task
from dppo_jax.errors import UserError
from experiments.chaos.inputs.row_texts import (
    REFUSED,
    broken_lines,
    conversation,
    mutated_line,
    numbers,
    reading,
    values,
)
from tests.data.test_prompts import write_tokenizer

LIMIT_S = 60  # a case takes milliseconds
CHAT = "{% for m in messages %}<|user|>{{ m.role }}: {{ m.content }}{% endfor %}<|reply|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat=CHAT))


@contextlib.contextmanager
def limit():
    def hang(*_):
        raise AssertionError("a case hangs")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(kind, file, tokenizer, **settings):
    """The task and its stream, or the sentence."""
    with limit():
        try:
            task = load_task(kind, path=str(file), verifier="exact_match")
            return task, PromptStream(task, tokenizer, num_prompts=1, max_prompt_len=2**20, seed=0, **settings)
        except UserError as error:
            return str(error)


def check_sentence(said, file, row=None):
    assert "\n" not in said and len(said) < 500, said
    said.encode("utf-8")  # no lone surrogate
    assert said.startswith(str(file)), said
    assert row is None or said.startswith((f"{file}, row {row}:", f"{file}, row {row} ", f"{file}, row {row}, ")), said


# --- JSONL ---


def check_line(line, tokenizer, file, rng, loaded):
    """One line between good ones; examples that load, and hold messages, go into `loaded`."""
    end = rng.choice([b"\n", b"\r\n"])
    good, blank = b'{"prompt": "0+1=", "answer": "1"}', rng.choice([0, 1, 2])
    file.write_bytes(end.join([good, *[b" "] * blank, line, good]) + rng.choice([b"", end]))
    row, expected = 2 + blank, reading(line)
    if not line.strip():
        return
    task = outcome("jsonl", file, tokenizer, chat=False)
    if isinstance(task, tuple):
        task, stream = task
        assert expected is not REFUSED, (line[:200], task.examples[1])
        assert stream.counts == {
            "examples": 3, "blank": blank, "beyond_size": 0, "bad_label": 0, "skipped": 0,
            "duplicates": 1 + (expected == ("0+1=", "1")),
        }  # fmt: skip
        assert (task.examples[1].prompt, task.examples[1].answer) == expected, line[:200]
        (batch, (example, *_)), *_ = [found for found in stream.eval_batches(1) if found[1][0] is task.examples[1]]
        assert tokenizer.decode(batch.tokens[0, batch.mask[0]]) == f"<s>{expected[0]}"
        return
    check_sentence(task, file, row)
    if expected is REFUSED:
        return
    if isinstance(expected[0], tuple):  # no text: it needs a chat template
        assert "the data holds chat messages; set data.chat=True" in task
        loaded.append(line)
    else:  # the tokenizer has printable ASCII only
        assert not all(" " <= c <= "~" for c in expected[0]), (line[:200], task)
        assert "the tokenizer has no token for" in task or "the prompt has no tokens" in task


def test_lines(tokenizer, tmp_path):
    rng = random.Random(0)
    places = ("prompt", "messages", "answer", "source", "twice", "\u00e9")
    cases = [mutated_line(rng, value, place) for place in places for value in values(rng)]
    cases += [mutated_line(rng, value, "answer") for _ in range(4) for value in numbers(rng)]
    cases += broken_lines(rng)
    assert len(cases) > 500
    file, loaded = tmp_path / "rows.jsonl", []
    for line in cases:
        check_line(line, tokenizer, file, rng, loaded)
    readings = [reading(line) for line in cases]
    assert 100 < sum(found is REFUSED for found in readings) < len(cases) - 100  # both ways are tried

    # What holds messages goes through the chat template together: rendering takes a process.
    file.write_bytes(b"\n".join(loaded))
    task, stream = outcome("jsonl", file, tokenizer, chat=True)
    assert len(loaded) > 3 and [(e.prompt, e.answer) for e in task.examples] == [reading(line) for line in loaded]
    for (batch, (example,)) in stream.eval_batches(1):
        turns = "".join(f"<|user|>{m['role']}: {m['content']}" for m in example.prompt)
        assert tokenizer.decode(batch.tokens[0, batch.mask[0]]) == turns + "<|reply|>"


# --- parquet ---


def bad_utf8():
    """A column of texts of which the second is none; pyarrow does not look."""
    return pa.Array.from_buffers(pa.string(), 3, pa.array([b"1+1=", b"\xff\xfe", b"2"], pa.binary()).buffers())


def columns(rng):
    """(array of three rows, what each must be read as if it were an answer: text, or REFUSED)."""
    whole = [rng.randrange(-(10**6), 10**6) for _ in range(3)]
    parts = [round(rng.uniform(-9, 9), 3) + 0.0005 for _ in range(3)]
    as_text, no = [str(n) for n in whole], [REFUSED] * 3
    big = [2**63 - 1, -(2**63), 10**18]
    good = {
        pa.string(): ["5", "x y", "-7"], pa.large_string(): ["5", "x y", "-7"],
        pa.dictionary(pa.int8(), pa.string()): ["a", "b", "a"],
    }  # fmt: skip
    found = [(pa.array(texts, kind), texts) for kind, texts in good.items()]
    for kind in (pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.int32(), pa.uint32(), pa.uint64()):
        found.append((pa.array([n % 100 for n in whole], kind), [str(n % 100) for n in whole]))
    found += [(pa.array(big, pa.int64()), [str(n) for n in big])]
    found += [(pa.array([2**64 - 1] * 3, pa.uint64()), [str(2**64 - 1)] * 3)]
    found += [(pa.array([float(n) for n in whole], pa.float64()), as_text), (pa.array(parts), [repr(x) for x in parts])]
    found += [(pa.array(kind([2, 0.1, -0.0])), ["2", "0.1", "0"]) for kind in (np.float32, np.float16)]
    found += [(pa.array([1e22, 1e300, 2.0**53]), ["1" + "0" * 22, "1" + "0" * 300, "9007199254740992"])]
    found += [(pa.array([float("nan"), float("inf"), -float("inf")]), no)]
    for scale, wide in ((2, pa.decimal128(10, 2)), (3, pa.decimal256(60, 3)), (0, pa.decimal128(38, 0))):
        unit = Decimal(1).scaleb(-scale)
        held = [(Decimal(n) / 10).quantize(unit) if scale else Decimal(n) for n in whole]
        shown = [str(int(d)) if d == int(d) else f"{d:f}" for d in held]
        found.append((pa.array(held, wide), shown))
    found += [(pa.array([True, False, True]), no), (pa.nulls(3), no), (pa.array([b"5", b"\xff", b""], pa.binary()), no)]
    found += [(pa.array([["5"], ["7"], ["x"]]), ["5", "7", "x"])]  # one label is a list of one
    found += [(pa.array([b"abc"] * 3, pa.binary(3)), no), (pa.array([[["5"]]] * 3), no)]
    found += [(pa.array([{"a": "5"}] * 3), no)]
    found += [(pa.array([[{"a": 1}]] * 3), no), (pa.array([[("k", "v")]] * 3, pa.map_(pa.string(), pa.string())), no)]
    found += [(pa.array([1, 10**12 + 1, 7], pa.timestamp(unit, zone)), no)
              for unit in ("s", "ms", "us", "ns") for zone in (None, "UTC", "Europe/Rome", "+02:00")]  # fmt: skip
    found += [(pa.array([1, 10**6 + 1, 10**9], pa.duration(unit)), no) for unit in ("s", "ms", "us", "ns")]
    found += [(pa.array([1, 10**6, 10**7], pa.date32()), no), (pa.array([1, 86_399_999, 7], pa.time32("ms")), no)]
    found += [(pa.array([1, 86_399_999_999_999, 7], pa.time64("ns")), no)]
    found += [(pa.array([[{"t": 10**18 + 1}]] * 3, pa.list_(pa.struct([("t", pa.timestamp("ns"))]))), no)]
    found += [(bad_utf8(), ["1+1=", REFUSED, "2"]), (pa.array(["5", None, ""]), ["5", REFUSED, REFUSED])]
    found += [(pa.array(["\U0001f600", "\x00", "a\nb"]), ["\U0001f600", "\x00", "a\nb"])]
    asked = [{"role": "user", "content": "1+1="}]
    ends = [*asked, {"role": "assistant", "content": "2"}]
    found += [(pa.array(talks), no) for talks in ([asked, ends, asked], [asked, [{"role": "user"}], []], [asked] * 3)]
    return found


def check_table(place, array, texts, tokenizer, file):
    """A column of this array at one place of a good table."""
    table = {"prompt": ["1+1=", "1+2=", "1+3="], "answer": ["2", "3", "4"]}
    if place == "messages":
        del table["prompt"]
    pa.parquet.write_table(pa.table(table | {place: array}), file)
    found = outcome("parquet", file, tokenizer, chat=False)
    kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    expected = texts
    if place == "prompt":
        expected = [t if is_text and t is not REFUSED and t.strip() else REFUSED for t in texts]
    if place == "messages" or (place == "prompt" and not is_text):
        expected = [REFUSED] * 3
        if pa.types.is_list(kind) and pa.types.is_struct(kind.value_type) and "role" in str(kind):
            expected = [tuple(v) if conversation(v) else REFUSED for v in array.to_pylist()]
    elif place == "source":  # not looked at, but text that is no text is refused wherever it stands
        expected = [REFUSED if t is REFUSED and is_text and array[i].is_valid and len(array[i].as_buffer()) else "2"
                    for i, t in enumerate(texts)]  # fmt: skip
    bad = [row for row, text in enumerate(expected, start=1) if text is REFUSED]
    if isinstance(found, str):
        check_sentence(found, file, bad[0] if bad and "cannot be read" not in found else None)
        if not bad:  # what the tokenizer has no token for, or a column that neither Python nor a text can hold
            known = {"prompt": "has no token", "messages": "set data.chat=True", "source": "column 'source' (list<"}
            known |= {} if is_text else {"prompt": known["messages"]}
            assert place in known and known[place] in found, (place, kind, found)
        return False
    assert not bad, (place, kind)
    if place in ("prompt", "answer"):
        shown = [e.prompt if place == "prompt" else e.answer for e in found[0].examples]
        assert shown == expected, (place, kind)
    assert place == "answer" or [e.answer for e in found[0].examples] == ["2", "3", "4"]
    return True


def test_tables(tokenizer, tmp_path):
    rng, file, outcomes = random.Random(1), tmp_path / "rows.parquet", []
    for _ in range(2):
        for array, texts in columns(rng):
            for place in ("prompt", "messages", "answer", "source"):
                outcomes.append(check_table(place, array, texts, tokenizer, file))
    assert len(outcomes) > 300 and 60 < sum(outcomes) < len(outcomes) - 60


def test_damaged_tables(tokenizer, tmp_path):
    """Bytes flipped, cut or doubled: what still loads is what was written, or names the file."""
    rng, file = random.Random(2), tmp_path / "rows.parquet"
    prompts, answers = [f"{i}+1=" for i in range(20)], [str(i + 1) for i in range(20)]
    table = pa.table({"prompt": prompts, "answer": answers})
    pa.parquet.write_table(table, file, write_page_checksum=True)
    whole = file.read_bytes()
    for _ in range(60):
        damaged = bytearray(whole)
        at = rng.randrange(len(damaged))
        damaged[at : at + rng.choice([1, 1, 4])] = rng.choice([b"", b"\xff", b"\x00" * 4, bytes([damaged[at] ^ 1])])
        file.write_bytes(damaged)
        found = outcome("parquet", file, tokenizer, chat=False)
        if isinstance(found, str):
            check_sentence(found, file)
        else:
            assert [(e.prompt, e.answer) for e in found[0].examples] == list(zip(prompts, answers, strict=True))
