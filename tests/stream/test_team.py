"""Threads that wait for a decision help to make it."""

from __future__ import annotations

from threading import Barrier, Thread, get_ident

import pytest

from surgery.stream.team import Team


def test_helpers_take_part_and_the_order_stays() -> None:
    team, together = Team(), Barrier(3, timeout=10)
    helpers = [Thread(target=team.help) for _ in range(2)]
    for helper in helpers:
        helper.start()

    def work(item: int) -> tuple[int, int]:
        if item < 3:
            together.wait()  # passes only if three threads are at work
        return item * item, get_ident()

    found = team.map(work, range(50))
    team.close()
    for helper in helpers:
        helper.join(10)
        assert not helper.is_alive()
    assert [square for square, _ in found] == [item * item for item in range(50)]
    assert len({thread for _, thread in found[:3]}) == 3


@pytest.mark.parametrize("helped", [False, True])
def test_the_first_error_is_raised_by_map_and_the_team_goes_on(helped: bool) -> None:
    team = Team()
    helper = Thread(target=team.help)
    if helped:
        helper.start()
    done: list[int] = []

    def work(item: int) -> None:
        if item == 5:
            raise ValueError("five")
        done.append(item)

    with pytest.raises(ValueError, match="five"):
        team.map(work, range(1000))
    assert len(done) < 999
    assert team.map(abs, (-1, 2)) == [1, 2]
    team.close()
    if helped:
        helper.join(10)
        assert not helper.is_alive()


def test_an_error_in_a_decision_reaches_every_thread() -> None:
    from surgery.stream.checkpoint import ComputedRef, ReadContext, StoredRef

    class Failing:
        def decide(self, inputs: object, context: ReadContext) -> None:
            assert context.team is not None
            context.team.map(lambda _: 1 / 0, range(3))

    from surgery.codecs.plain import Plain
    from surgery.stream.roles import TensorInfo

    like = StoredRef("x", (1, 1), TensorInfo("other", None, None, False), Plain("F32"), (), "p")
    ref = ComputedRef(like, (like,), Failing())  # type: ignore[arg-type]
    errors: list[BaseException] = []

    def decide() -> None:
        try:
            ref.decision(ReadContext())
        except ZeroDivisionError as error:
            errors.append(error)

    threads = [Thread(target=decide) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(errors) == 3
