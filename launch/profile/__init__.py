"""Where the time and memory of profiled steps went, summed up from the trace of a rank."""
