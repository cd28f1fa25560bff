"""Two processes save into one folder, and go on from the same step when one is damaged."""

import json

import pytest

from tests.devices.test_hosts import environment, free_port, side_by_side


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[dict, dict]:
    """What each process saw."""
    folder, port = tmp_path_factory.mktemp("savers"), str(free_port())
    commands = [["-m", "tests.helpers.two_savers", str(folder), port, str(number)] for number in range(2)]
    ended = side_by_side(folder, commands, environment(tmp_path_factory, 2))
    assert [status for status, _ in ended] == [0, 0], ended
    first, second = (json.loads((folder / f"found-{process}.json").read_text()) for process in range(2))
    assert sorted(path.name for path in (folder / "damaged_checkpoints").iterdir()) == ["6", "6.1"]
    return first, second


def test_both_see_the_same(found):
    assert found[0] == found[1]


def test_both_go_on_from_the_newest_whole_step(found):
    one = found[0]
    assert one["evaluated"] and one["same"]
    assert (one["resumed"], one["rejected"], one["about"]) == (4, 4, {"step": 4})
    (note,) = one["notes"]
    assert "checkpoint 6 is damaged (checkpoints/6/default/" in note
    assert note.endswith(
        "its bytes are not those written) and now lies in damaged_checkpoints/6; going on from checkpoint 4"
    )


def test_both_refuse_where_none_is_whole(found):
    assert "is whole: checkpoint 6 is damaged" in found[0]["refused"]
