"""Is the daemon alive, and does it take migrations? Over HTTP, beside the metrics."""
