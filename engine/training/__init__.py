"""The ZeRO step, schedules, checkpoints and telemetry of a run."""
