"""Distillation in a training: features from models, the loss in a step, several processes, checkpoints."""
