"""What watches a run and reports on it: metrics, spikes, hangs, dead launchers, requests to stop."""
