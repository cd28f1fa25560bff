"""Rows of JSON that went wrong in a hundred ways, and what each says by an independent reading of the rules."""

import json
import math
import re
from fractions import Fraction
from typing import Any

REFUSED = None  # a reading that is no example


class Number(str):
    """The text of a JSON number, or of what Python's reader takes for one."""


def number(text):
    """What an answer that is a number must be; REFUSED for one that is not finite."""
    if re.fullmatch("-?[0-9]+", text):
        return REFUSED if len(text.lstrip("-")) > 4300 else str(int(text))
    if not math.isfinite(float(text)):
        return REFUSED
    exact = Fraction(text)
    return str(exact.numerator) if exact.denominator == 1 else text


def once(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("twice")
    return found


def depth(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (isinstance(value, dict | list)) + max(map(depth, inner), default=0)


def reading(line: bytes):
    """(prompt, answer) of a line, by the rules of README and base.py, or REFUSED."""
    hooks: dict[str, Any] = dict(parse_int=Number, parse_float=Number, parse_constant=Number, object_pairs_hook=once)
    try:
        row = json.loads(line.decode("utf-8"), **hooks)
        json.dumps(row, ensure_ascii=False).encode("utf-8")
        deep = depth(row) > 64
    except (ValueError, RecursionError):
        return REFUSED
    if not isinstance(row, dict) or deep or re.search(rb"[0-9]{4301}", line):
        return REFUSED
    prompt, messages, answer = (row.get(key) for key in ("prompt", "messages", "answer"))
    if (prompt is None) == (messages is None) or answer is None:
        return REFUSED
    if isinstance(answer, Number):
        answer = number(answer)
    if isinstance(answer, list) and len(answer) == 1:
        answer = number(answer[0]) if isinstance(answer[0], Number) else answer[0]
    if not isinstance(answer, str) or not answer.strip():
        return REFUSED
    if messages is not None or isinstance(prompt, list):
        messages = joined(prompt if messages is None else messages)
        found = conversation(messages)
        return (tuple({k: v for k, v in m.items() if v is not None} for m in messages), answer) if found else REFUSED
    good = isinstance(prompt, str) and not isinstance(prompt, Number) and prompt.strip()
    return (prompt, answer) if good else REFUSED


def joined(messages):
    """Their parts of text as one text."""
    for m in messages if isinstance(messages, list) else ():
        if isinstance(m, dict) and isinstance(m.get("content"), list) and m["content"]:
            m["content"] = "".join(part["text"] for part in m["content"])
    return messages


def conversation(messages):
    if not isinstance(messages, list) or not messages:
        return False
    for m in messages:
        if not isinstance(m, dict) or m.get("role") not in ("system", "user", "assistant", "tool"):
            return False
        content = m.get("content")
        if not isinstance(content, str) or isinstance(content, Number) or not content.strip():
            return False
    return messages[-1]["role"] in ("user", "tool") and any(m["role"] == "user" for m in messages)


def talk(*roles, content='"1+1="'):
    """Messages of these roles as JSON text, all with this content."""
    return "[" + ", ".join(f'{{"role": {json.dumps(role)}, "content": {content}}}' for role in roles) + "]"


def digits(rng, count):
    return rng.choice("123456789") + "".join(rng.choices("0123456789", k=count - 1))


def numbers(rng):
    part = f"{digits(rng, rng.randint(1, 9))}.{digits(rng, rng.randint(1, 9))}"
    return [
        f"{digits(rng, 3)}.0", f"-{digits(rng, 3)}.000", "-0.0", "0.0", "-0", part, f"-{part}0", "0.10", "1e400",
        f"{digits(rng, 2)}e{rng.randint(0, 30)}", f"{part}E-{rng.randint(1, 40)}", f"{part}e+{rng.randint(9, 40)}",
        "1e-400", "1e-99999", "NaN", "Infinity", "-Infinity", digits(rng, 20), f"-{digits(rng, 400)}",
        f"{digits(rng, 300)}.0", digits(rng, 4000), digits(rng, 5000), "-1e400",
    ]  # fmt: skip


def values(rng):
    """JSON texts of values that may stand anywhere in a row, one of every kind."""
    return [
        *numbers(rng), f"[{digits(rng, 5000)}]", "true", "false", "null", "[]", "{}", "[[]]",
        '""', '" "', '"\\n"', '"x"', '"5 apples"', '"two\\nlines"', '"2.0"', json.dumps("long " * 20_000),
        '"\\ud800"', '"a\\udfff"', '"\\ud83d\\ude00"', '"\\udc00\\ud800"', '["\\ud800"]', '{"\\ud800": 1}', '"\\u0000"',
        '"\u00e9"', '"\u2028"', '"\U0001f600"', '"\x7f"', '"</s>"', '["1"]', '{"text": "1"}', '{"a": 1, "a": 2}',
        *(count * "[" + count * "]" for count in (60, 70, 900, 100_000)), 70 * '{"a":' + "1" + 70 * "}",
        talk("user"), talk("user", "assistant"), talk("system"), talk("user", "assistant", "user"), talk("User"),
        talk("developer", "user"), talk("user", "assistant", "tool"), talk("tool"), talk("user", "system"), talk(""),
        talk(7), talk("system", "user"), *(talk("user", content=c) for c in ("[]", '""', '" "', "null", "1.0", "true")),
        talk("user", content='[{"type": "text", "text": "a"}]'), '[{"from": "human", "value": "a"}]', '["a"]',
        '[{"role": "user"}]', '[{"content": "a"}]', '[{"role": "user", "content": "a", "name": null}]',
    ]  # fmt: skip


def row_text(fields):
    return "{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in fields) + "}"


def mutated_line(rng, value, place) -> bytes:
    """A good row with this value at one of its places."""
    fields = {"prompt": '"1+1="', "answer": "2", "source": '"hand"'}
    if place == "messages":
        del fields["prompt"]
    line = row_text((fields | {place: value}).items())
    if place == "twice":
        line = row_text([*fields.items(), ("answer", value)])
    return line.encode("utf-8", "surrogatepass")


def broken_lines(rng):
    """Lines that are damaged as bytes, or are no object."""
    good = b'{"prompt": "1+1=", "answer": 2, "source": "a \\u00e9 b"}'
    lines = [b"[1]", b"1", b'"x"', b"null", b"{}", b"{", good + b"}", good + good, good[:-1] + b",}", b"\x00", b"#"]
    lines += [b"\xef\xbb\xbf" + good, good.decode().encode("utf-16"), b'{"prompt": "\xed\xa0\x80"}']
    for old, new in ((b'"', b"'"), (b"prompt", b"Prompt"), (b" b", b"\xe9"), (b" b", b"\t"), (b"a ", b"\\x")):
        lines.append(good.replace(old, new))
    lines += [good.replace(b"2", new) for new in (b"0x2", b"+2", b".5", b"02", b"2.", b"1_0", b"nan", b"2e", b"--2")]
    for _ in range(60):
        line = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(line))
            line[at : at + rng.randint(0, 2)] = rng.choice([b"", bytes([rng.randrange(256)]), line[at : at + 4]])
        lines.append(bytes(line).replace(b"\n", b"").replace(b"\r", b""))
    return lines
