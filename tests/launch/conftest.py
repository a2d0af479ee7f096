"""Fixtures of the launch tests."""

from tests.launch.slurm_cluster import cluster

__all__ = ["cluster"]
