"""Measuring: step times, peak memory, device telemetry."""
