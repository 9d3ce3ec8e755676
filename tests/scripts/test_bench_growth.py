"""The settings of every point of the growth benchmark, and of the trainer against each peer."""

import pytest

from configs.loader import load
from scripts.bench_growth.__main__ import Measured, table
from scripts.bench_growth.axes import AXES
from scripts.bench_train.peers import PEERS


@pytest.mark.parametrize("name", AXES)
def test_every_point_is_an_experiment(name: str) -> None:
    points = AXES[name]
    sizes = [point.size for point in points]
    assert sizes == sorted(set(sizes)) and len(sizes) > 1
    measured = [Measured(point, 1e6 / point.size, 1.0, 8.0) for point in points]
    _, _, first, *others = table(name, measured)
    assert "| 1.00 |  | 1.00 |" in first
    for line in others:  # time per token as the size
        assert line.split("|")[4].strip() == "1.00"


def test_flops_grow_with_layers_and_not_with_experts() -> None:
    layers = [point.flops_per_token() for point in AXES["layers"]]
    first, second, third, fourth = layers
    assert (fourth - third) == pytest.approx(4 * (second - first))  # 8 layers more, and 2
    experts = [point.flops_per_token() for point in AXES["experts"]]
    assert max(experts) < 1.05 * min(experts)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_trains_eight_sequences_in_a_step(name: str) -> None:
    peer = PEERS[name]
    config = load(peer.experiment, [*peer.arguments, "--train.micro_batch=4"])
    assert config.train.global_batch == 8 and config.data.seq_len == 256
