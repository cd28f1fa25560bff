"""Chat templates, rendered by a process of their own that has limits: a template is a program from somebody else.

    python -m dppo_jax.data.chat    # the process; one JSON object a line, in and out

Rendering is transformers' own. What differs from run to run is not: `strftime_now` gives the config's date, and what
draws at random is refused.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dppo_jax.errors import UserError, first_line, nearest

DATE = "2024-07-26"  # the day that Llama 3's template falls back on
CPU_SECONDS = 10  # limit of one rendering, some thousand times what it takes; a busy machine does not shorten it
WALL_SECONDS = 600
MEMORY_BYTES = 2**30  # beyond what the process starts with; enforced on Linux
CHARACTERS = 2**24  # limit of one rendered text

# Names that the rendering gives a template itself, and those that transformers' own function takes.
GIVEN = (
    "messages", "add_generation_prompt", "tools", "documents", "strftime_now", "raise_exception",
    "conversations", "chat_template", "return_assistant_tokens_mask", "continue_final_message",
)  # fmt: skip

_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}>")  # how Python prints an object without a text of its own


def check_date(date: Any) -> None:
    """UserError unless it is a day such as 2024-07-26."""
    try:
        if _DAY.fullmatch(date):
            datetime.fromisoformat(date)
            return
    except (TypeError, ValueError):
        pass
    raise UserError(f"data.date must be a day such as {DATE}, not {str(date)!r:.60}")


class ChatRenderer:
    """Conversations to text, by a tokenizer's chat template, open for the assistant's reply unless it is in them.

    date: what the template takes for today, YYYY-MM-DD.
    arguments: of the template, by name, beside those that rendering gives (`GIVEN`, and special tokens); JSON values.
    replied: the conversations end with the assistant's reply.
    cpu_seconds: the limit on one rendering, in seconds of computing. Close it, or use it in a `with`.
    Raises: UserError where the tokenizer has no template to use, or one that reads no such argument; and in a call
    where the template fails or does not end.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        date: str = DATE,
        arguments: Mapping[str, Any] | None = None,
        cpu_seconds: float = CPU_SECONDS,
        replied: bool = False,
    ):
        check_date(date)
        self._cpu_seconds, arguments = cpu_seconds, dict(arguments or {})
        given = {*GIVEN, *tokenizer.special_tokens_map}
        for name in sorted(arguments.keys() & given):
            hint = "set data.date" if name == "strftime_now" else "leave it out"
            raise UserError(f"data.chat_kwargs: {name!r} is what the rendering gives the chat template itself; {hint}")
        start = {
            "template": _template_of(tokenizer),
            "arguments": tokenizer.special_tokens_map | arguments,
            "date": date,
            "cpu_seconds": cpu_seconds,
            "replied": replied,
        }
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0", "TZ": "UTC"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dppo_jax.data.chat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="ascii",
            env=os.environ | environment,
        )
        try:
            read = set(self._ask(start)["read"]) - given
            for name in sorted(arguments.keys() - read):
                has = nearest(name, read) if read else "; it has none"
                raise UserError(f"data.chat_kwargs: the tokenizer's chat template has no argument {name!r:.80}{has}")
        except BaseException:
            self.close()
            raise

    def __call__(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of one conversation."""
        return self._ask({"messages": list(messages)})["text"]

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass

    def __enter__(self) -> "ChatRenderer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            line_out = json.dumps(question)
        except (TypeError, ValueError) as error:
            what = "messages" if "messages" in question else "arguments of the chat template"
            raise UserError(f"the {what} hold what is no JSON: {first_line(error):.200}") from None
        try:
            stdin.write(line_out + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            raise UserError(f"the tokenizer's chat template {self._ending(self._process.wait())}")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"the tokenizer's chat template {answer['error']}")
        return answer

    def _ending(self, status: int) -> str:
        if status == -signal.SIGPROF:
            return f"does not end: one rendering took more than {self._cpu_seconds:g} seconds of computing"
        if status == -signal.SIGALRM:
            return f"does not end: one rendering took more than {WALL_SECONDS} seconds"
        return f"ended the process that renders it, with status {status}"


def _template_of(tokenizer: Any) -> str:
    templates = tokenizer.chat_template
    if not templates:
        raise UserError("the tokenizer has no chat template; set data.chat=False")
    if isinstance(templates, dict) and "default" not in templates:
        raise UserError(
            f"the tokenizer has several chat templates ({', '.join(map(str, sorted(templates)))!s:.200}), and none "
            "that is named 'default'"
        )
    template = templates["default"] if isinstance(templates, dict) else templates
    if not isinstance(template, str):
        raise UserError(f"the tokenizer's chat template must be text, not {template!r:.80}")
    return template


# --- the process ---


def _prepare(template: str, date: str) -> list[str]:
    """Compiles the template, and takes from its environment what differs from run to run. The names that it reads."""
    from jinja2 import TemplateError
    from jinja2.meta import find_undeclared_variables
    from transformers.utils.chat_template_utils import _compile_jinja_template

    def drawing(name: str) -> Any:
        def refuse(*_: Any, **__: Any) -> None:
            raise TemplateError(f"it draws at random ({name}), so every run would see other prompts")

        return refuse

    environment = _compile_jinja_template(template).environment  # kept by transformers, which renders with the same
    environment.filters["random"] = drawing("random")
    environment.globals["lipsum"] = drawing("lipsum")
    environment.globals["strftime_now"] = datetime.fromisoformat(date).strftime
    return sorted(find_undeclared_variables(environment.parse(template)))


def _render(template: str, arguments: Mapping[str, Any], messages: list[dict[str, Any]], replied: bool) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=not replied, **arguments
    )
    if len(text) > CHARACTERS:
        raise ValueError(f"it writes {len(text)} characters, more than {CHARACTERS}")
    if _ADDRESS.search(text) and not _ADDRESS.search(json.dumps(messages)):
        raise ValueError("it prints an object's address, so every run would see other prompts")
    return text


def _failure(error: Exception) -> str:
    from jinja2 import TemplateError, TemplateSyntaxError

    sentence = f"{first_line(error):.300}"
    if isinstance(error, TemplateError) and not isinstance(error, TemplateSyntaxError):
        return f"refuses the messages: {sentence}"
    return f"fails: {sentence if isinstance(error, ValueError) else f'{type(error).__name__}: {sentence}'}"


def _limit_memory() -> None:
    statm = Path("/proc/self/statm")
    if statm.is_file():
        import resource

        in_use = int(statm.read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = in_use + MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(in_use + MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def main() -> None:
    """Answers every line of stdin: first the template, then conversations. {"read"}, {"text"} or {"error"}."""
    import transformers.utils.chat_template_utils  # noqa: F401  before the limits

    for name in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(name, signal.SIG_DFL)  # they end the process, even inside a long C call
    _limit_memory()
    start: dict[str, Any] = {}
    for line in sys.stdin:
        question = json.loads(line)
        start = start or question
        signal.setitimer(signal.ITIMER_PROF, start["cpu_seconds"])
        signal.alarm(WALL_SECONDS)
        try:
            if question is start:
                answer: dict[str, Any] = {"read": _prepare(start["template"], start["date"])}
            else:
                text = _render(start["template"], start["arguments"], question["messages"], start["replied"])
                answer = {"text": text}
        except Exception as error:
            answer = {"error": _failure(error)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
