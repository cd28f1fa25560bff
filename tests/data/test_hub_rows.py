"""Tasks of data sets on the hub, in processes of their own: the client reads its settings when it is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dppo_jax.data.tasks import load_task
from dppo_jax.errors import UserError
from tests.helpers.hub_server import HubServer, parquet

ROOT = Path(__file__).resolve().parents[2]
LOAD = """
import json, sys
from dppo_jax.data.tasks import load_task
found = []
for arguments in json.loads(sys.argv[1]):
    task = load_task("hub", verifier="last_number", **arguments)
    found.append([task.name, [[e.prompt, e.answer] for e in task.examples], dict(task.left_out)])
assert "jax" not in sys.modules
print(json.dumps(found))
"""


def rows(*answers):
    return [[f"{answer}+0=", str(answer)] for answer in answers]


def test_a_split_of_several_shards_is_one_task(tmp_path):
    """In the shards' order, and with what is beyond data.size counted over all of them."""
    shards = {f"data/train-{n:05}-of-00003.parquet": parquet(*range(10 * n, 10 * n + 3)) for n in range(3)}
    lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in rows(7, 8)]
    text = {"train-1.jsonl": lines[0].encode(), "train-2.jsonl": f"\n{lines[1]}\n\n".encode()}
    asked = [{"name": "acme/sums"}, {"name": "acme/sums", "size": 4}, {"name": "acme/text"}]
    asked += [{"name": "acme/text", "size": 1}]
    with HubServer() as server:
        server.push("dataset", "acme/sums", shards)
        server.push("dataset", "acme/text", text)
        environment = server.environment(tmp_path, PYTHONPATH=str(ROOT))
        command = [sys.executable, "-c", LOAD, json.dumps(asked)]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    every = rows(0, 1, 2, 10, 11, 12, 20, 21, 22)
    assert json.loads(ran.stdout) == [
        ["acme/sums", every, {"blank": 0, "beyond_size": 0, "bad_label": 0}],
        ["acme/sums", every[:4], {"blank": 0, "beyond_size": 5, "bad_label": 0}],
        ["acme/text", rows(7, 8), {"blank": 2, "beyond_size": 0, "bad_label": 0}],
        ["acme/text", rows(7), {"blank": 2, "beyond_size": 1, "bad_label": 0}],
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "needs data.name, such as 'openai/gsm8k'"),
        ({"name": "gsm8k"}, "'gsm8k' is no name of a data set on the hub: write ORG/NAME"),
        ({"name": "o/n", "path": "rows.jsonl"}, "unset data.path='rows.jsonl'"),
        ({"name": "o/n", "verifier": "task"}, "has no scorer of its own; set data.verifier to one of"),
    ],
)
def test_what_is_no_data_set_of_the_hub_is_refused_before_it_is_asked(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        load_task("hub", **{"verifier": "last_number", **arguments})
