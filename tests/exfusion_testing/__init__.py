"""What several tests share: models, training runs, ranks, strategies for Hypothesis."""
