"""Choice whether a new vision cache saves time."""

from vision_cache_fixtures import make_train_state

from finesight.encode.context_shard import SampleShape
from finesight.train.vision_cache_choice import ENCODING_EFFICIENCY, find_slow_reason


def test_gpu_builds_a_cache_that_saves_more_than_it_takes(tmp_path):
    state = make_train_state(tmp_path / "task")
    stats = state.data.train.stats
    counter = state.engine.flop_counter
    assert counter is not None
    num_samples = 4 * len(stats.sample_indices)

    def find(setting, gpu_flops, num_samples=num_samples):
        return find_slow_reason(setting, stats, num_samples, counter, gpu_flops)

    assert find("auto", None) is None
    assert "it would save 0.0 s" in find("auto", 1e15)
    assert find("auto", 1e3) is None
    assert find("memory", 1e15) is None
    assert "fewer than 1.25 uses" in find("memory", 1e3, num_samples=len(stats.sample_indices))
    # Each epoch but the first saves the time of an encoding: here 0.5 s.
    grids = tuple(grid for sample in stats.sample_stats for grid in sample.grid_thw)
    flops = counter.count_by_part(SampleShape((0,), grids, 0))
    encoding = sum(flops.matmul_by_part[part] for part in ("vision", "merger"))
    gpu_flops = (encoding + flops.vision_attention) / (0.5 * ENCODING_EFFICIENCY)
    for epochs, saved in ((2, "0.5 s"), (5, "2.0 s"), (6, "2.5 s")):
        assert f"save {saved}" in find("auto", gpu_flops, epochs * len(stats.sample_indices))
    assert find("auto", gpu_flops, 8 * len(stats.sample_indices)) is None
