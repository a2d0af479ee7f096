"""What watches a run and tells of it: metrics, spikes, hangs, launchers that are gone, requests to stop."""
