"""The figures of `scripts.bench_train.checkpoint`, from records made by hand."""

from scripts.bench_train.checkpoint import by_position


def test_the_steps_after_a_save_are_compared_with_the_later_ones() -> None:
    times = {step: 1.0 for step in range(1, 37)}
    times |= {12: 50.0, 13: 2.0, 25: 4.0, 14: 1.5, 26: 1.5, 20: 9.0}  # 20: disturbed from outside
    run = [{"step": step, "step_s": seconds} for step, seconds in times.items()]
    assert by_position([run], [12, 24]) == [3.0, 1.5, 1.0, 1.0, 1.0, 1.0]
    assert by_position([run], [36]) == [], "no steps after it"
