"""Token copies go to their experts' devices and come back, whatever the load."""

from hetmoe.parallel.exchange import capacity
from hetmoe.parallel.shard import Shard
from tests.parallel.processes import output_of


def test_every_copy_gets_its_experts_answer_under_any_load() -> None:
    """In one round and in several, padded and ragged; results are compared with numpy inside the process."""
    lines = output_of("tests.parallel.exchange_cases").splitlines()
    assert len(lines) == 4 and lines[-1] == "ragged"


def test_capacity_is_twice_an_even_load_and_no_more_than_there_can_be() -> None:
    assert capacity(100, 4, 8, Shard(expert=16)) == (56, 400)  # 2 * 400 / 16 = 50, whole eights
    assert capacity(100, 4, 8, Shard(expert=2)) == (400, 400)
    assert capacity(100, 4, 2, Shard(expert=64)) == (16, 200)  # a token has at most two experts there
