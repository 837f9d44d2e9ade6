"""fathom bench: the verbs that measure, quality first."""

from ui.verbs import bench_peers, bench_quality, bench_speed
from ui.verbs.bench_options import app

__all__ = ["app", "bench_peers", "bench_quality", "bench_speed"]
