"""Models that hand their tokens to hooks, and know no method."""
