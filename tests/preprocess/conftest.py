import os

import counting_worker
import pytest
from counted_world import World


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.fixture(scope="session")
def local_ray():
    """One small Ray for all tests; it is up in a few seconds, once."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(counting_worker)  # Ray's processes lack tests/
    ray.init(
        address="local",  # not somebody else's on this machine
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
    )
    yield ray
    ray.shutdown()
