"""Where a run's metrics go to be looked at, besides ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow."""
