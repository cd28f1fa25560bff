"""Replies that want to be run, and verifiers that misbehave. Reward workers import this: no jax here."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

# %s is the path of the file to plant. Each would plant it, end the process or spoil later scores where it is run.
ATTACKS = (
    "open('%s','w').write('x')",
    'open("%s", "w").write("x")',
    "__import__('os').system('touch %s')",
    '__import__("os").system("touch %s")',
    "__import__('pathlib').Path('%s').touch()",
    "[open('%s','w').write('x')]",
    "(lambda: open('%s','w').write('x'))()",
    "[1, 2, open('%s','w').write('x') or 3]",
    "{'a': open('%s','w').write('x')}",
    "exec(\"open('%s','w').write('x')\")",
    "eval(\"open('%s','w').write('x')\")",
    "f\"{open('%s','w').write('x')}\"",
    "().__class__.__base__.__subclasses__()[0].__init__.__globals__ or open('%s','w')",
    "[c for c in ().__class__.__base__.__subclasses__() if c.__name__=='FileIO'][0]('%s','w')",
    "```python\nopen('%s','w').write('x')\n```",
    "import os; os.system('touch %s')",
    "1 + (0 if open('%s','w') else 1)",
    "S(\"open('%s','w')\")",
    "sympify(\"__import__('os').system('touch %s')\")",
    "Symbol('x').subs('x', \"open('%s','w')\")",
    "x.__class__.__init__.__globals__['__builtins__']['open']('%s','w')",
    "$(touch %s)",
    "`touch %s`",
    "; touch %s",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}{%% set x = open('%s','w') %%}",
    "!!python/object/apply:os.system ['touch %s']",
    '{"__reduce__": ["os.system", ["touch %s"]], "py/object": "os.system"}',
    "cos\nsystem\n(S'touch %s'\ntR.",
    r"\boxed{__import__('os').system('touch %s')}",
    r"$\text{open('%s','w')}$",
    r"$\operatorname{open}('%s','w')$",
    r"\boxed{\{open('%s','w'), 1\}}",
    r"$\begin{pmatrix} open('%s','w') \\ 1 \end{pmatrix}$",
    r"\input{|touch %s}\write18{touch %s}",
    "exit()",
    "quit(0)",
    "__import__('sys').exit()",
    '__import__("sys").exit(0)',
    "__import__('os')._exit(0)",
    "__import__('os').kill(__import__('os').getppid(), 9)",
    "(_ for _ in ()).throw(KeyboardInterrupt)",
    "(_ for _ in ()).throw(SystemExit)",
    "(_ for _ in ()).throw(GeneratorExit)",
    "[__import__('builtins').__dict__.update(float=lambda *a: 1.0)]",
    "setattr(__import__('reasoning_gym').dataset.ProceduralDataset, 'score_answer', lambda *a: 1.0)",
    "__import__('dppo_jax.data.gym').data.gym.__dict__.update(full_score=lambda *a: 1.0)",
    "print('x', file=open('%s','w'))",
    "breakpoint()",
    "\x00open('%s','w')",
    "\uff4f\uff50\uff45\uff4e('%s','w')",
)

# Replies that are long to work out, or to read.
BURDENS = (
    "9**9**9**9",
    "9^{9^{9^{9}}}",
    "\\boxed{9^{9^{9^{9}}}}",
    "((9**99)**99)**99",
    "1" * 20_000,
    "(" * 5_000 + ")" * 5_000,
    "[" * 20_000,
    "-" * 20_000 + "1",
    "1e999999999",
    "1+" * 5_000 + "1",
    "'A'*10**10",
    "<answer>" * 5_000,
    "<think>" * 5_000 + "7",
    "\\boxed{" * 5_000,
    "\ud800",
    "factorial(10**9)",
)


def attacks(path: Path) -> list[str]:
    return [attack.replace("%s", str(path)).replace("%%", "%") for attack in ATTACKS]


def dispatch(reply, example):
    """Scores by the verifier and the example that the example brings along: many tasks through one scorer."""
    return example.meta["verify"](reply, example.meta["example"])


def escapes(reply, example):
    """Raises what the reply names, after spoiling the module for whoever comes next."""
    escapes.spoiled = escapes.spoiled or reply != "fine"
    errors = {e.__name__: e for e in (SystemExit, KeyboardInterrupt, GeneratorExit, BaseException, RecursionError)}
    if reply in errors:
        raise errors[reply]("escaped")
    return float(escapes.spoiled) or 0.5


escapes.spoiled = False


def process_id(reply, example):
    return float(os.getpid())


def succeeds(reply, example):
    """1.0 where a worker can do what the reply names; example.answer is a path, a port, or the name of a variable."""
    if reply == "write":
        try:
            with open(example.answer, "w") as file:
                file.write("x")
        except OSError:
            pass
        return float(Path(example.answer).exists() and Path(example.answer).stat().st_size > 0)
    if reply == "connect":
        try:
            socket.create_connection(("127.0.0.1", int(example.answer)), timeout=5).close()
        except OSError:
            return 0.0
        return 1.0
    if reply == "environment":
        return float(example.answer in os.environ)
    if reply == "home":
        return float(Path.home().exists())
    if reply == "raise the limit":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        return float(soft != hard or hard == resource.RLIM_INFINITY)
    if reply == "core":
        import resource

        return float(resource.getrlimit(resource.RLIMIT_CORE) != (0, 0))
    if reply == "print":
        print("x" * 100_000)
        print("x" * 100_000, file=sys.stderr, flush=True)
        return 1.0
    if reply == "start a program":
        return float(os.system("true") == 0)
    assert reply == "signal"
    try:
        os.kill(os.getppid(), signal.SIGCONT)
    except OSError:
        return 0.0
    return 1.0


def waits(reply, example):
    """As many seconds as the reply says."""
    time.sleep(float(reply))
    return 1.0


def ignores(reply, example):
    """Never ends, and hears no signal that can be left unheard."""
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass
