"""One training loop for fine-tuning and every distillation method: `kdbench.training.run.train(kdbench.training.job.Job(...))`."""
