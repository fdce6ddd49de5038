"""Every method on the same checkpoints: ``python -m benchmarks.quality.leaderboard``. See docs/leaderboard.md."""
