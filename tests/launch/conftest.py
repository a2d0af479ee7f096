"""Fixtures of the launch tests."""

from tests.launch.slurm.slurm_cluster import cluster

__all__ = ["cluster"]
