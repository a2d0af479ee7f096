"""What watches a run and reports on it: metrics, spikes, hangs, launchers that are gone, requests to stop."""
