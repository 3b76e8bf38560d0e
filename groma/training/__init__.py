"""Training on transformers' Trainer: ``run.train(config)``; which parts learn; exact, atomic checkpoints; metrics."""
