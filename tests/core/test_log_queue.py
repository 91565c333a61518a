from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh_client.core.log_queue import LogQueue


def test_the_oldest_go_when_it_is_full_and_are_counted_once() -> None:
    queue = LogQueue[int](3)
    for number in range(5):
        queue.put(number)
    assert len(queue) == 3
    assert queue.take(2) == ([2, 3], 2)
    assert queue.take(2) == ([4], 0)
    queue.lost(7)
    assert queue.take(2) == ([], 7)


@given(st.lists(st.integers(min_value=1, max_value=5) | st.none(), max_size=30))
def test_whatever_is_put_in_is_taken_in_order_or_counted(steps: list[int | None]) -> None:
    queue = LogQueue[int](4)
    put, taken, dropped = 0, list[int](), 0
    for step in [*steps, 100]:
        if step is None:
            queue.put(put)
            put += 1
        else:
            items, lost = queue.take(step)
            taken += items
            dropped += lost
    assert taken == sorted(taken)
    assert len(taken) + dropped == put
