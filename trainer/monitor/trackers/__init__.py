"""Where a run's figures go to be looked at, besides ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow."""
