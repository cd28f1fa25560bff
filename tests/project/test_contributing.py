"""CONTRIBUTING.md's lists are followed: a thing of each kind is added to a copy of the tree, in the files and tables
that its list names and in no other, and then works."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.places import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ITEM = re.compile(r"^- `([^`]+)`(?: `([^`]+)`)?: ", re.MULTILINE)
# Heading to its list: (file, table or function; "" where the file alone is named).
LISTS = {
    heading: ITEM.findall(body)
    for heading, body in re.findall(r"^### (An? [^\n]+)\n\n(.+?)(?=\n###? |\Z)", PAGE, re.M | re.S)
}


class Edit(NamedTuple):
    """A text put into a file: after the line that opens the table `name`, before it, or at the end."""

    file: str
    name: str
    text: str
    where: str = "inside"  # inside | before | end


LOSS = '''

def bounded_log_ratio(inputs: LossInputs, *, band: float, ratio_cap: float) -> LossOutput:
    """Masked when |log r| > band."""
    inputs = zero_outside_mask(inputs)
    return from_keep(inputs, abs(log_ratio(inputs.logp, inputs.behavior_logp)) <= band, ratio_cap=ratio_cap)
'''
ADVANTAGE = '''def group_max(rewards: Array, group: Array, *, num_groups: int) -> Array:
    """R - max, f32[B]."""
    _check_groups("group_max", rewards, num_groups)
    return rewards - jax.ops.segment_max(rewards, group, num_groups)[group]


'''
VERIFIER = '''def contains(reply: str, answer: str) -> float:
    """1.0 where the answer stands anywhere in the extracted answer."""
    return float(answer.strip() in extract_answer(reply))


'''
SOURCE = '''

def load_csv(
    *,
    name: str | None,
    path: str | None,
    settings: dict[str, Any],
    size: int | None,
    seed: int,
    verifier: str,
    reading: Reading,
) -> Task:
    """A table with the columns prompt and answer."""
    import csv

    (file,) = _files("csv", path, settings, verifier, reading)
    full = list(enumerate(csv.DictReader(file.read_text(encoding="utf-8").splitlines()), start=1))
    rows = [(f"{file}, row {n}", {key: value or None for key, value in row.items()}) for n, row in full[:size]]
    return _rows_task(file.name, rows, len(full), 0, verifier, reading)
'''
GAME = '''

class Echo:
    """Says what was said, once; 1 for "again"."""

    def __init__(self, *, max_turns: int):
        pass

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """The same for every seed."""
        return "Say again: ", {}

    def step(self, action: str) -> Step:
        """Ends it."""
        return action, float(action == "again"), True, False, {}
'''
ECHO = "from dppo_jax.environments.games import Echo  # noqa: E402\n\n"
METHOD = '''    "mine": Method(
        "Mine", "M min(r, C) A", "|log r| > 0.5", "ours", "",
        {"loss.name": "bounded_log_ratio", **SEQUENCE},
    ),
'''
AQUILA = '''    "aquila": {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048},
'''
PANEL = '''    "Mine": (Panel("Mean probability", ("policy/prob_mean",)),),
'''

EDITS = {
    "A loss": [
        Edit("dppo_jax/losses/ratio.py", "", LOSS, "end"),
        Edit("dppo_jax/losses/__init__.py", "LOSSES", '    "bounded_log_ratio": ratio.bounded_log_ratio,\n'),
        Edit("configs/base.py", "loss_defaults", '            "bounded_log_ratio": dict(band=0.5, ratio_cap=5.0),\n'),
        Edit("experiments/run/ranges.py", "HYPERPARAMETERS", '    "band": THRESHOLD,\n'),
    ],
    "An advantage": [
        Edit("dppo_jax/advantages.py", "ADVANTAGES", ADVANTAGE, "before"),
        Edit("dppo_jax/advantages.py", "ADVANTAGES", '    "group_max": group_max,\n'),
    ],
    "A verifier": [
        Edit("dppo_jax/rewards/verifiers.py", "VERIFIERS", VERIFIER, "before"),
        Edit("dppo_jax/rewards/verifiers.py", "VERIFIERS", '    "contains": contains,\n'),
    ],
    "A data source": [
        Edit("dppo_jax/data/rows.py", "_rows_task", SOURCE, "end"),
        Edit("dppo_jax/data/tasks.py", "TASKS", "from dppo_jax.data.rows import load_csv  # noqa: E402\n\n", "before"),
        Edit("dppo_jax/data/tasks.py", "TASKS", '"csv": load_csv, '),
    ],
    "A shape of rows": [Edit("dppo_jax/data/shapes.py", "SHAPES", '    Shape("Mine", ("ask",), "gold.text"),\n')],
    "An environment": [
        Edit("dppo_jax/environments/games.py", "", GAME, "end"),
        Edit("dppo_jax/environments/__init__.py", "ENVIRONMENTS", ECHO, "before"),
        Edit("dppo_jax/environments/__init__.py", "ENVIRONMENTS", '    "echo": Echo,\n'),
    ],
    "A model family": [
        Edit("dppo_jax/models/families.py", "ARCHITECTURES", '    "AquilaForCausalLM": "aquila",\n'),
        Edit("dppo_jax/models/families.py", "DEFAULTS", AQUILA),
    ],
    "A metric": [
        Edit("dppo_jax/metrics.py", "trust_region_metrics", '        "policy/prob_mean": mean(jnp.exp(logp), mask),\n'),
        Edit("dppo_jax/storage/panels.py", "GROUPS", PANEL),
    ],
    "A method": [Edit("configs/methods.py", "METHODS", METHOD)],
}
OPENS = {  # the line after which a row goes in, where it is not `NAME... = {`
    "loss_defaults": r"^    c\.loss_defaults = ConfigDict\(\n +\{\n",
    "trust_region_metrics": r"^def trust_region_metrics\((?:.|\n)*?\n    sums = \{\n",
    "TASKS": r"^TASKS = \{",
    "SHAPES": r"^SHAPES = \(\n",
}

# What is asked of the edited copy, in one process of its own.
ASK = """
import json, pathlib, shutil, sys

import jax.numpy as jnp
import numpy as np

from configs.methods import METHODS
from dppo_jax.data.tasks import load_task
from dppo_jax.errors import UserError
from dppo_jax.losses import LossInputs, required_fields
from dppo_jax.metrics import summary, trust_region_metrics
from dppo_jax.models import load_policy
from dppo_jax.rewards.scorer import Scorer
from dppo_jax.storage import panels
from experiments import methods
from experiments.run import checks
from experiments.run.cli import load_config
from experiments.run.setup import Setup

golden, here = map(pathlib.Path, sys.argv[1:])
found = {}


def config(*changes, file="configs/quickstart.py"):
    c = load_config(file, ["--config." + change for change in changes])
    checks.check(c)
    return c


def refusal(call):
    try:
        call()
    except UserError as error:
        return str(error)


pi, mu = jnp.array([[0.5, 0.5]]), jnp.array([[0.4, 0.1]])
inputs = LossInputs(jnp.log(pi), jnp.log(mu), jnp.ones((1, 2)), jnp.ones((1, 2), bool))
loss = Setup(config("loss.name=bounded_log_ratio")).loss
found["A loss"] = [
    sorted(required_fields(loss)),
    np.round(loss(inputs).coef, 4).tolist(),
    refusal(lambda: config("loss.name=bounded_log_ratio", "loss.band=-1.0")),
]

two = config("advantage.name=group_max", "rollout.prompts=2", "rollout.group_size=2", "train.minibatches=1")
alone = lambda: config("advantage.name=group_max", "rollout.group_size=1")
found["An advantage"] = [
    Setup(two).advantages(jnp.array([0.0, 1.0, 1.0, 1.0]), jnp.array([0, 0, 1, 1])).tolist(),
    refusal(alone),
]

rows = here / "rows.jsonl"
rows.write_text('{"prompt": "?", "answer": "b"}\\n')
task = load_task("jsonl", path=str(rows), verifier="contains")
config("data.verifier=contains")
with Scorer(task, workers=1, time_limit_s=10.0) as scorer:
    scores, counts = scorer.submit(["a b c", "a c"], [task.examples[0]] * 2).result()
found["A verifier"] = [scores.tolist(), counts]

table, bad = here / "rows.csv", here / "bad.csv"
table.write_text("prompt,answer\\n1+1=,2\\n2+1=,3\\n")
bad.write_text("prompt,answer\\n1+1=,2\\n2+1=,\\n")
config("data.kind=csv", "data.path=rows.csv", "data.settings={}")
load = lambda path, **more: load_task("csv", path=str(path), verifier="last_number", **more)
found["A data source"] = [
    [[example.prompt, example.answer] for example in load(table).examples],
    dict(load(table, size=1).left_out),
    refusal(lambda: load(bad)),
]

rows.write_text('{"ask": "1+1=", "gold": {"text": 2}}\\n')
task = load_task("jsonl", path=str(rows), verifier="last_number")
found["A shape of rows"] = [task.examples[0].prompt, task.examples[0].answer, *task.remarks]

task = load_task("environment", name="echo", size=2, max_turns=3)
with Scorer(task, workers=1, time_limit_s=10.0) as scorer:
    scores, _ = scorer.submit(["again", "no"], list(task.examples)).result()
found["An environment"] = [[example.prompt for example in task.examples], scores.tolist()]

shutil.copytree(golden / "llama", here / "aquila")
fields = json.loads((golden / "llama" / "config.json").read_text())
fields |= dict(architectures=["AquilaForCausalLM"], model_type="aquila")
(here / "aquila" / "config.json").write_text(json.dumps(fields))
one, other = load_policy(str(golden / "llama")), load_policy(str(here / "aquila"))
tokens = jnp.array([[1, 2, 3]])
same = np.array_equal(one.logits(one.params, tokens), other.logits(other.params, tokens))
found["A model family"] = [other.config.model_type, same]

measured = trust_region_metrics(inputs, loss(inputs), jnp.zeros((1, 2)), jnp.ones((1, 2)))
drawn = [tag for panel in panels.PANELS for tag in panel.tags]
found["A metric"] = [round(summary(measured)["policy/prob_mean"], 4), "policy/prob_mean" in drawn]

mine = config(file="configs/methods.py:mine")
found["A method"] = [mine.loss.name, mine.aggregation.name, methods.cells("mine", METHODS["mine"])[:6]]
print(json.dumps(found))
"""

WORKS = {
    "A loss": [[], [[1.25, 0.0]], "loss.band must be at least 0, not -1.0"],
    "An advantage": [
        [-1.0, 0.0, 0.0, 0.0],
        "group_max needs at least 2 responses per prompt, but 32 rows form 32 groups, so there is nothing to learn; "
        "raise rollout.group_size, or use 'reward', which has no baseline",
    ],
    "A verifier": [[1.0, 0.0], {"killed": 0, "failed": 0, "refused": 0}],
    "A data source": [
        [["1+1=", "2"], ["2+1=", "3"]],
        {"blank": 0, "beyond_size": 1, "bad_label": 0},
        "bad.csv, row 2: has no 'answer'",
    ],
    "A shape of rows": ["1+1=", "2", "read as Mine (prompt: ask; answer: gold.text)"],
    "An environment": [["Say again: ", "Say again: "], [1.0, 0.0]],
    "A model family": ["aquila", True],
    "A metric": [0.5, True],
    "A method": [
        "bounded_log_ratio",
        "seq_mean_token_mean",
        ["Mine", "`mine`", "`bounded_log_ratio`", "M min(r, C) A", "|log r| > 0.5", "5"],
    ],
}


def defined(path: Path) -> set[str]:
    """What a Python file defines: functions, classes, and what is assigned to, attributes too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
            names |= {target.attr for target in targets if isinstance(target, ast.Attribute)}
    return names


def edited(text: str, edit: Edit) -> str:
    """The file's text with the edit. A name that opens nothing fails."""
    if edit.where == "end":
        return text + edit.text
    opens = OPENS.get(edit.name, rf"^{edit.name}\b.*\{{\n")
    found = re.search(opens if edit.where == "inside" else rf"^{edit.name}\b.*\{{", text, re.MULTILINE)
    assert found, f"{edit.file} has no {edit.name}"
    at = found.end() if edit.where == "inside" else found.start()
    return text[:at] + edit.text + text[at:]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list]:
    """What the copy says of itself when everything is added."""
    copy, work = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("work")
    for folder in ("dppo_jax", "configs", "experiments"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "result", "*.png"))
    for edit in (edit for edits in EDITS.values() for edit in edits):
        path = copy / edit.file
        path.write_text(edited(path.read_text(encoding="utf-8"), edit), encoding="utf-8")
    command = [sys.executable, "-P", "-c", ASK, str(ROOT / "tests" / "golden" / "models"), str(work)]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.replace(f"{work}/", ""))


def test_there_are_lists_of_all_things():
    assert list(LISTS) == list(EDITS) == list(WORKS)


@pytest.mark.parametrize("thing", EDITS)
def test_what_a_list_names_is_there(thing):
    assert LISTS[thing]
    for file, name in LISTS[thing]:
        assert (ROOT / file).is_file(), file
        assert not name or name in defined(ROOT / file), f"{file} has no {name}"


@pytest.mark.parametrize("thing", EDITS)
def test_a_list_names_what_is_edited(thing):
    for edit in EDITS[thing]:
        assert (edit.file, edit.name) in LISTS[thing], f"{thing}: {edit.file} {edit.name}"


@pytest.mark.parametrize("thing", EDITS)
def test_a_thing_that_is_added_so_works(thing, found):
    assert found[thing] == WORKS[thing]
