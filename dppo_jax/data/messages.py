"""Prompts of rows: text, or a conversation that ends where the policy is to answer."""

import json
from typing import Any

from dppo_jax.data.shapes import shown
from dppo_jax.errors import UserError, nearest

ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES = {"developer": "system", "human": "user", "gpt": "assistant", "model": "assistant", "function": "tool"}


def read_prompt(where: str, column: str, value: Any) -> str | tuple[dict[str, str], ...]:
    """Text as it is; messages as {"role", "content", ...}, whose content may be a list of parts of text.

    where, column: file and row, and the column's name, for sentences.
    Raises: UserError for anything else, and for messages that end with the assistant's turn.
    """
    if column == "messages" or (isinstance(value, list) and _is_conversation(value)):
        return _messages(where, column, value)
    if isinstance(value, str) and value.strip():
        if value.lstrip()[:2] in ("[{", "[ ") and _is_conversation(_read(value)):
            raise UserError(f"{where}: {shown(column)} holds messages as JSON text; write them as a list")
        return value
    if _is_conversation(value):
        raise UserError(f"{where}: {shown(column)} holds a message; write a list of them")
    raise UserError(f"{where}: {shown(column)} must be text, or a list of messages, not {shown(value)}")


def split_last_turn(where: str, row: Any, column: str, prompt: str = "") -> Any:
    """The row with the text of the assistant's last turn as its `column`: of messages that end with one, which lose it,
    unless the row has the column; or of a column that holds one message. Any other row as it is.

    prompt: the column of the messages, if it is another than 'messages'. UserError for a content that is no text.
    """
    if not isinstance(row, dict):
        return row
    name, value = prompt or "messages", row.get(column)
    if value is None and _ends_with_assistant(row.get(name)):
        return {**row, name: row[name][:-1], column: _with_text(where, row[name][-1]).get("content")}
    if isinstance(value, list) and len(value) == 1 and _ends_with_assistant(value):
        return {**row, column: _with_text(where, value[0]).get("content")}
    return row


def _ends_with_assistant(messages: Any) -> bool:
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") == "assistant"


def _is_conversation(value: Any) -> bool:
    value = value if isinstance(value, list | tuple) else [value]
    return bool(value) and all(isinstance(m, dict) and ({"role", "content"} <= {*m} or "from" in m) for m in value)


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _messages(where: str, column: str, messages: Any) -> tuple[dict[str, str], ...]:
    """The conversation, which must end where the policy is to answer."""
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
        raise UserError(f"{where}: {shown(column)} must be a list of role and content texts, not {shown(messages)}")
    messages = [_with_text(f"{where}, message {number}", message) for number, message in enumerate(messages, start=1)]
    for number, message in enumerate(messages, start=1):
        _check_message(f"{where}, message {number}", message)
    last_role, roles = messages[-1]["role"], [message["role"] for message in messages]
    if last_role == "assistant":
        raise UserError(
            f"{where}: {shown(column)} end with the assistant's turn, so the prompt would hold the reply; end "
            "them with the user's"
        )
    if "user" not in roles or last_role == "system":
        raise UserError(
            f"{where}: {shown(column)} must end with a user's or a tool's, after a user's, not {shown(roles)}"
        )
    return tuple({key: value for key, value in message.items() if value is not None} for message in messages)


def _with_text(where: str, message: dict[str, Any]) -> dict[str, Any]:
    """The message with its parts of text as one."""
    parts = message.get("content")
    if not isinstance(parts, list) or not parts:
        return message
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise UserError(f"{where}: 'content' must be text, or parts of 'type' and 'text', not {shown(parts)}")
        if part["type"] != "text":
            raise UserError(f"{where}: 'content' has a part of type {shown(part['type'])}, but only text can be asked")
        if not isinstance(part.get("text"), str):
            raise UserError(f"{where}: 'content' has a part without a 'text': {shown(part)}")
    return {**message, "content": "".join(part["text"] for part in parts)}


def _check_message(where: str, message: dict[str, Any]) -> None:
    role, content = message.get("role"), message.get("content")
    if role is None and "from" in message:
        raise UserError(f"{where}: has 'from' and 'value'; name them 'role' and 'content'")
    if not isinstance(role, str) or content is None:
        raise UserError(f"{where}: needs texts 'role' and 'content', but is {shown(message)}")
    if role not in ROLES:
        hint = f"; the nearest is {OTHER_ROLES[role]!r}" if role in OTHER_ROLES else nearest(role[:80], ROLES)
        raise UserError(f"{where}: unknown role {shown(role)}{hint}")
    if not isinstance(content, str):
        raise UserError(f"{where}: 'content' must be text, not {shown(content)}")
    if not content.strip():
        raise UserError(f"{where}: the content of the {role}'s message is empty")
